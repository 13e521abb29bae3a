"""Hooks of a training step: their order and context, terms computed once per step, and names that are not hooks."""

import sys
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.training.step import StepContext, StepHooks

SMALL = ("train.epochs=2", "benchmark.max_train=24", "train.global_batch_size=16")


def recording(run: SimpleNamespace, calls: list[tuple[str, StepContext]]) -> StepHooks:
    """The hooks of a run's method, each of which also notes its name and a copy of its context."""
    hooks = run.method.hooks(0)

    def noted(name: str) -> object:
        hook = getattr(hooks, name)

        def call(context: StepContext) -> object:
            calls.append((name, StepContext(**vars(context))))
            return hook(context)

        return call

    names = ("before_step", "loss", "step_loss", "adjust_gradients", "after_step", "end_step")
    return StepHooks(**{name: noted(name) for name in names})


def test_hooks_run_in_order_and_know_their_step(make) -> None:
    """A batch of 12 rows in micro-batches of 5; only `loss` has a batch."""
    run, calls = make("method=sequential", *SMALL, "hardware.micro_batch_size=5"), []
    run.trainer.begin_task(2)
    run.method.grow_head(0)
    plan = run.method.plan(0)
    run.trainer.fit(plan, run.method.named_parameters(), recording(run, calls), stage="part")
    rows = plan.epoch(0)[0]
    per_step = [
        "before_step",
        *["loss"] * -(-len(rows) // 5),
        "step_loss",
        "adjust_gradients",
        "after_step",
        "end_step",
    ]
    assert [name for name, _ in calls[: len(per_step)]] == per_step
    assert all(context.rows.tolist() == rows.tolist() for _, context in calls[: len(per_step)])
    batches = [context.micro_batch for name, context in calls[: len(per_step)]]
    assert np.concatenate([batch.rows for batch in batches if batch]).tolist() == rows.tolist()
    assert [batch is not None for batch in batches] == [name == "loss" for name in per_step]
    ends = [context for name, context in calls if name == "end_step"]
    assert [(end.epoch, end.step) for end in ends] == [(e, s) for e in range(2) for s in range(plan.steps)]
    assert {(end.task, end.stage) for end in ends} == {(2, "part")}
    with pytest.raises(AttributeError, match=r"use context\.rows"):
        ends[0].batch  # noqa: B018


TERMS = {"ewc": "penalty", "kif": "orthogonality", "o_lora": "overlap", "sapt": "divergence"}


@pytest.mark.parametrize("method", TERMS)
def test_a_term_of_weights_is_computed_once_per_step(method: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 16 in four micro-batches; the weights end as they do without micro-batches."""
    weights = []
    for size in ("null", "4"):
        more = ("method.share=0.2",) if method == "sapt" else ()
        run = make(f"method={method}", *SMALL, *more, f"hardware.micro_batch_size={size}")
        run.learn(0)
        counts = Counter()
        owner = run.method if hasattr(run.method, TERMS[method]) else sys.modules[type(run.method).__module__]

        term = getattr(owner, TERMS[method])

        def counted(*args: object, counts=counts, term=term) -> object:
            counts["term"] += 1
            return term(*args)

        def ended(context: StepContext, counts=counts, end_step=run.method.end_step) -> None:
            counts["step"] += 1
            end_step(context)

        with monkeypatch.context() as patch:
            patch.setattr(owner, TERMS[method], counted)
            patch.setattr(run.method, "end_step", ended)
            run.learn(1)
        assert counts["term"] == counts["step"] > 0
        weights.append({name: value.detach() for name, value in run.method.named_parameters().items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "hook"), [
    ("after_steps", "after_step"), ("adjust_gradient", "adjust_gradients"), ("step_losses", "step_loss"),
    ("on_after_task", "after_task"), ("after_batch", "end_step"), ("state_dicts", "state_dict"),
])  # fmt: skip
def test_a_name_that_resembles_a_hook_is_refused(name: str, hook: str) -> None:
    with pytest.raises(ConfigError, match=f"Mine.{name} is not a hook and is never called: did you mean {hook}?"):
        dataclass(type("Mine", (Method,), {name: lambda self: None}))


def test_helpers_overrides_and_private_names_are_accepted() -> None:
    functions = ("losses", "teacher_logits", "after_step", "_after_steps", "stored_parameters")
    type("Mine", (Method,), {name: lambda self, *context: None for name in functions})


def test_a_hook_of_an_old_signature_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"after_step takes no step: define it as after_step\(self, context\)"):
        type("Mine", (Method,), {"after_step": lambda self: None})


def test_a_list_of_objectives_is_refused() -> None:
    """The attribute of earlier versions would be ignored without a word."""
    with pytest.raises(ConfigError, match=r"Mine\.objectives has no effect: declare what the method needs"):
        type("Mine", (Method,), {"objectives": ("classification",)})
