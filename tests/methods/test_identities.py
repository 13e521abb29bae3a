"""Methods that are other methods at certain values of their options: after two tasks the weights are equal."""

import numpy as np
import pytest
import torch
from torch import Tensor

from clpet.methods import moe_lora
from clpet.models.stacked_lora import kaiming
from clpet.training.step import StepContext
from tests.conftest import scores


def weights(make, *options: str, tasks: int = 2) -> Tensor:
    """The trained tensors after some tasks of one epoch."""
    run = make(*options, "train.epochs=1")
    for index in range(tasks):
        run.learn(index)
    return torch.cat([value.detach().flatten() for value in run.method.parameters()])


@pytest.mark.slow
def test_n_lora_without_a_penalty_is_inc_lora(make) -> None:
    assert torch.equal(weights(make, "method=n_lora", "method.strength=0"), weights(make, "method=inc_lora"))


@pytest.mark.slow
def test_slao_is_sequential_in_its_first_task(make) -> None:
    runs = [make(f"method={name}", "train.epochs=1") for name in ("slao", "sequential")]
    for run in runs:
        run.learn(0)
    rows = runs[0].data.test.rows_of(0)
    assert torch.equal(scores(runs[0], rows), scores(runs[1], rows))


@pytest.mark.slow
def test_merging_one_task_gives_its_own_model(make) -> None:
    """With a scale of 1 it answers as sequential training with the same LoRA does: inc_lora after one task."""
    runs = [make("method=merge", "method.scale=1"), make("method=inc_lora")]
    for run in runs:
        run.learn(0)
    rows = runs[0].data.test.rows_of(0)
    assert torch.allclose(scores(runs[0], rows), scores(runs[1], rows), atol=1e-5)


def test_derpp_without_logits_is_replay_with_separate_means(make) -> None:
    """The gradient of a step is that of the mean loss of new examples and of the mean loss of those drawn."""
    run = make("method=derpp", "method.alpha=0", "method.beta=1", "method.draws=1", "train.epochs=1")
    run.learn(0)
    method, pool = run.method, run.data.train
    method.grow_head(1)
    parameters, rows = method.parameters(), pool.rows_of(1)[:5]
    context = StepContext(1, "", 0, 0, rows, pool, pool.batch(rows))
    method.before_step(context)
    method.loss(context).backward()
    method.adjust_gradients(context)
    ((drawn, _),) = method.drawn
    assert np.isin(drawn, pool.rows_of(0)).all()
    separate = method.objective.loss(pool.batch(rows)) + method.objective.loss(pool.batch(drawn))
    for parameter, expected in zip(parameters, torch.autograd.grad(separate, parameters), strict=True):
        assert torch.allclose(parameter.grad, expected, atol=1e-6)


@pytest.mark.slow
def test_moe_lora_with_one_expert_learns_as_a_lora_does(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same A: the router's weight is 1 and gets no gradient."""
    monkeypatch.setattr(moe_lora, "normal", kaiming)
    expert, lora = make("method=moe_lora", "method.experts=1"), make("method=inc_lora")
    start = {name: layer.A.detach().clone() for name, layer in expert.method.stack.layers.items()}
    add = lora.method.add_branch

    def add_branch(index: int) -> None:
        add(index)
        for name, layer in lora.method.stack.layers.items():
            with torch.no_grad():
                layer.A.copy_(start[name])

    lora.method.add_branch = add_branch
    expert.learn(0)
    lora.learn(0)
    for name, layer in lora.method.stack.layers.items():
        assert torch.allclose(expert.method.stack.layers[name].B, layer.B, atol=1e-5)
        assert torch.allclose(expert.method.stack.layers[name].A, layer.A, atol=1e-5)
        assert layer.B.detach().any()
