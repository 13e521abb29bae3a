"""A run stopped inside a fit resumes at its step and ends bit for bit like an uninterrupted one."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clpet.errors import HostError
from clpet.replay.batch_plan import BatchPlan
from clpet.runtime.run_checkpoint import read_tree, write_tree
from clpet.training.fit_checkpoint import FitCheckpointer
from clpet.training.step import StepContext, StepHooks
from clpet.training.trainer import Trainer

SMALL = "train.global_batch_size=4"  # 6 steps an epoch


def same(one: Any, two: Any) -> bool:
    """Whether two trees are equal bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return one == two


def learn_and_save(
    run: SimpleNamespace, index: int, write: Any, record: dict | None = None, minutes: float = 1e-9
) -> None:
    """Learns a task, with a checkpoint after every step by default."""
    run.trainer.checkpointer = FitCheckpointer(run.method, minutes)
    run.trainer.begin_task(index, last=index == 2)
    run.trainer.checkpointer.start_task(record, write)
    run.method.learn(run.benchmark.tasks[index], index, run.trainer)
    run.method.after_task(run.benchmark.tasks[index], index)


def learning_cost(run: SimpleNamespace) -> dict:
    """The cost of learning the task, without time and memory."""
    cost = run.method.objective.meter.take_learning()
    return {key: value for key, value in cost.items() if key not in ("seconds", "peak_memory_mb")}


def learned_with_checkpoints(
    make, overrides: list[str], folder: Path, kept: tuple[int, ...]
) -> tuple[SimpleNamespace, list[int]]:
    """A run of two tasks, and the numbers of the checkpoints in the second; the state before it and those `kept` are saved."""
    run, numbers = make(*overrides), []
    run.learn(0)
    write_tree(folder / "before", {"method": run.method.state_dict(), "trainer": run.trainer.state()})

    def write(number: int, record: dict) -> None:
        numbers.append(number)
        if number in kept:
            write_tree(folder / str(number), record)

    learn_and_save(run, 1, write)
    return run, numbers


def resumed_from(make, overrides: list[str], folder: Path, number: int) -> SimpleNamespace:
    """A run resumed in its second task, from the files that one killed after this checkpoint leaves behind."""
    resumed, saved = make(*overrides), read_tree(folder / "before")
    resumed.method.load_state_dict(saved["method"])
    resumed.trainer.load(saved["trainer"])
    learn_and_save(resumed, 1, lambda *_: None, read_tree(folder / str(number)))
    return resumed


VARIANTS = {
    "plain": ["method=sequential"],
    "dropout": ["method=sequential", "peft.dropout=0.3", "model.dropout=0.2", "model.head_dropout=0.1", "train.clip=1"],
    "best": ["method=replay", "replay=reservoir", "train.select=best", "train.lr=1e-2", "train.schedule=cosine"],
    "carry": [
        "method=replay",
        "replay=all",
        "method.future_labels=true",
        "peft=none",
        "train.lr=1e-4",
        "train.optimizer_state=carry",
        "train.schedule=ar",
    ],
    "muon": ["method=sequential", "train.optimizer=muon", "train.optimizer_state=carry"],
    "sgd": ["method=sequential", "train.optimizer=sgd", "train.momentum=0.9", "train.optimizer_state=carry"],
    "sgd_without_momentum": ["method=sequential", "train.optimizer=sgd"],
    "dynamic_conpet": ["method=dynamic_conpet", "method.top_k=2", "train.select=best", "model.dropout=0.2"],
    "crl": ["method=crl", "model.dropout=0.2"],
    "crl_star": ["method=crl", "replay=dynamic", "method.sample=20"],
    "ea_emr": ["method=ea_emr", "replay=dynamic", "model.dropout=0.2"],
    "slm": ["method=slm", "method.stage1.min_steps=20", "model.dropout=0.2"],
    "kif": ["method=kif", "train.select=best", "model.dropout=0.2"],
    "kif_after": ["method=kif", "replay=share", "replay.share=0.5", "method.replay_phase=after", "method.gradient=raw"],
    "recurrent_kif": [
        "method=recurrent_kif",
        "replay=all",
        "method.inner_steps=3",
        "method.outer_steps=2",
        "method.outer_weight=0.25",
        "train.schedule=linear",
    ],
    "aim_merging": ["method=aim_merging", "replay=all", "method.interval=2", "method.longest=2", "method.alarm=0.01"],
    "lwf": ["method=lwf"],
    "ewc": ["method=ewc"],
    "mocl": ["method=mocl"],
    "sapt": ["method=sapt", "train.optimizer_state=carry"],
    "gain_lora": ["method=gain_lora", "peft.dropout=0.3"],
    "progressive_prompts": ["method=progressive_prompts"],
    "osf": ["method=osf"],
    "derpp": ["method=derpp"],
    "ilora": ["method=ilora", "replay=all"],
    "lori": ["method=lori"],
    "cl_moe": ["method=cl_moe"],
    "mbpa": ["method=mbpa", "method.replay_rate=0.5"],
    "fusion": ["method=fusion", "replay=all"],
    "bic": ["method=bic", "replay.per_class=6", "replay.train_share=0.5"],
    "slao": ["method=slao"],
    "sd_lora": ["method=sd_lora", "train.select=best"],
    "merge": ["method=merge", "method.rule=opcm"],
    "sdft": [
        "method=sdft",
        "model=tiny_llama",
        "objective=text_to_text",
        "benchmark.max_target=8",
        "replay=all",
        "method.rate=0.2",
    ],
}


QUICK = ("plain", "best", "kif")  # the other variants are slow tests


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_a_task_killed_inside_a_fit_ends_bit_for_bit_like_uninterrupted(name: str, make, tmp_path: Path) -> None:
    """Killed in the middle of the first epoch, and at step 13: in a later epoch, at the end of a fit, or in the next fit.

    What a killed process leaves behind are the files of its newest checkpoint, which the uninterrupted run writes too.
    """
    overrides = [*VARIANTS[name], SMALL]
    uninterrupted, numbers = learned_with_checkpoints(make, overrides, tmp_path, (4, 13))
    state, cost = uninterrupted.method.state_dict(), learning_cost(uninterrupted)
    assert numbers[:13] == list(range(1, 14))
    for number in (4, 13):
        resumed = resumed_from(make, overrides, tmp_path, number)
        assert same(state, resumed.method.state_dict())
        assert same(uninterrupted.trainer.state(), resumed.trainer.state())
        assert cost == learning_cost(resumed)


def test_nothing_is_written_before_the_interval_has_passed(make) -> None:
    run = make("method=sequential", SMALL)
    learn_and_save(run, 0, lambda *_: pytest.fail("a checkpoint was written"), minutes=10)


def plan_of(run: SimpleNamespace, batches: list) -> BatchPlan:
    """A plan that consists of the given batches."""
    return BatchPlan(run.data.train, len(batches), lambda epoch: batches)


def nan_at(run: SimpleNamespace, step: int) -> Any:
    """The loss of the method, but NaN in one step of the fit, counted from 0."""
    calls = iter(range(1000))
    return lambda context: run.method.loss(context) * (float("nan") if next(calls) == step else 1)


def test_a_nan_loss_stops_the_run_with_its_step(make) -> None:
    run, numbers = make("method=sequential", SMALL), []
    run.trainer.checkpointer = FitCheckpointer(run.method, 1e-9)
    run.trainer.begin_task(1)
    run.trainer.checkpointer.start_task(None, lambda number, record: numbers.append(number))
    run.method.grow_head(0)
    plan = run.method.plan(0)
    with pytest.raises(HostError, match=r"task 2 \(stage\) in epoch 2, step 3 is nan"):
        run.trainer.fit(plan, run.method.named_parameters(), StepHooks(nan_at(run, 8)), stage="stage")
    assert numbers == list(range(1, 9))


def test_infinite_weights_are_never_written(make) -> None:
    """A gradient may be infinite while the loss is still finite."""
    run, numbers = make("method=sequential", SMALL), []
    run.method.grow_head(0)
    run.trainer.checkpointer = FitCheckpointer(run.method, 1e-9)
    run.trainer.checkpointer.start_task(None, lambda number, record: numbers.append(number))

    def break_a_weight(context: StepContext) -> None:
        if len(numbers) == 4:
            with torch.no_grad():
                run.method.objective.head.weight[0, 0] = float("inf")

    hooks = StepHooks(run.method.loss, after_step=break_a_weight)
    with pytest.raises(HostError, match="weights of task 1 in epoch 1, step 5"):
        run.trainer.fit(run.method.plan(0), run.method.named_parameters(), hooks)
    assert numbers == [1, 2, 3, 4]


def test_a_step_with_a_nan_loss_can_be_skipped(make) -> None:
    """It changes nothing and is counted; the fit continues as if the batch did not exist."""
    states = []
    for skip in (True, False):
        run, steps = make("method=sequential", SMALL, "train.on_nan=skip", "train.epochs=1"), []
        run.method.grow_head(0)
        batches = run.method.plan(0).epoch(0)
        loss = nan_at(run, 2) if skip else run.method.loss
        plan = plan_of(run, batches if skip else [*batches[:2], *batches[3:]])
        hooks = StepHooks(loss, after_step=steps.append)
        run.trainer.fit(plan, run.method.named_parameters(), hooks)
        assert len(steps) == 5
        assert learning_cost(run)["skipped_steps"] == int(skip)
        states.append(run.method.state_dict())
    assert same(*states)


def update_counts(run: SimpleNamespace, tasks: int = 2) -> list[dict[str, int]]:
    """After each task: the number of updates in the stored moments of each tensor."""
    counts = []
    for index in range(tasks):
        run.learn(index)
        moments = run.trainer.stage_history[""].get("moments", {})
        counts.append({name: int(state["step"]) for name, state in moments.items()})
    return counts


CARRY = [SMALL, "train.epochs=1", "train.optimizer_state=carry"]


def test_moments_are_carried_where_the_tensors_keep_their_shapes(make) -> None:
    """AdamW keeps counting from task to task; a head that has grown starts from zero, and so does everything by default."""
    replay = ["method=replay", "replay=all", *CARRY]
    first, second = update_counts(make(*replay, "method.future_labels=true"))
    assert (set(first.values()), set(second.values())) == ({6}, {6 + 12})
    first, second = update_counts(make(*replay))
    assert set(first.values()) == {6}
    assert {name: second.pop(name) for name in ("weight", "bias")} == {"weight": 12, "bias": 12}
    assert set(second.values()) == {6 + 12}
    assert update_counts(make(*replay, "train.optimizer_state=reset")) == [{}, {}]


RETRAINED = {  # tensors of a method, except for the head, that are trained again in the next task
    "sequential": "base_model",
    "l2p": "prompts|keys",
    "crl": "base_model|projection",
    "sapt": "query",
    **dict.fromkeys(["o_lora", "gain_lora", "mocl", "progressive_prompts", "dynamic_conpet", "slm", "osf"], "nothing"),
}


@pytest.mark.parametrize("name", RETRAINED)
def test_a_name_means_the_same_tensor_in_all_tasks(name: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch, gate, key, prompt or module of a new task has the shape of the previous one, but another name."""
    fits: dict[str, list[dict[str, Tensor]]] = {}

    def fit(
        self, plan: BatchPlan, parameters: dict[str, Tensor], hooks: StepHooks, *, stage: str = "", **_: Any
    ) -> None:
        fits.setdefault(stage, []).append(dict(parameters))

    monkeypatch.setattr(Trainer, "fit", fit)
    run = make(
        f"method={name}", *{"progressive_prompts": ["method.mlp=4"], "slm": ["method.stage1.min_steps=2"]}.get(name, [])
    )
    for index in range(2):
        run.learn(index)
    first, second = next(fits[stage] for stage in ("", "contrast") if stage in fits)
    common = {key for key in first if key in second and key not in ("weight", "bias")}
    assert common == {key for key in first if re.match(RETRAINED[name], key)}
    assert all(first[key] is second[key] for key in common)
    assert len(first) > 2


def test_a_new_branch_starts_without_moments(make, caplog: pytest.LogCaptureFixture) -> None:
    """SAPT's query network is trained further; with IncLoRA every tensor is new, and a warning says so."""
    steps = update_counts(make("method=sapt", *CARRY))[1]
    assert {key.split(".")[0] for key, count in steps.items() if count == 12} == {"query"}
    assert {count for key, count in steps.items() if not key.startswith("query")} == {6}
    assert "optimizer_state=carry has no effect" not in caplog.text
    assert set(update_counts(make("method=inc_lora", *CARRY))[1].values()) == {6}
    assert "task 2: train.optimizer_state=carry has no effect" in caplog.text


def test_a_selector_keeps_its_moments(make) -> None:
    """One adapter serves all tasks; its head gains rows."""
    run = make("method=dynamic_conpet", "method.selector_ratio=null", *CARRY)
    for index in range(3):
        run.learn(index)
    steps = {name: int(state["step"]) for name, state in run.trainer.stage_history["selector"]["moments"].items()}
    assert {steps.pop(name) for name in ("weight", "bias")} == {12}
    assert set(steps.values()) == {24}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")])  # fmt: skip
def test_out_of_memory_reports_the_batch_and_the_option_to_lower(error: Exception, make) -> None:
    run = make("method=sequential", "hardware.micro_batch_size=6", "train.select=best")
    run.method.grow_head(0)

    def fail(*_: object) -> Tensor:
        raise error

    with pytest.raises(HostError, match=r"6 examples in a training pass: lower hardware.micro_batch_size"):
        run.trainer.fit(run.method.plan(0), run.method.named_parameters(), StepHooks(fail))
    run.method.predict = fail
    with pytest.raises(HostError, match=r"128 examples in a pass without gradients: lower hardware.eval_batch_size"):
        run.method.fit(run.trainer, 0)
