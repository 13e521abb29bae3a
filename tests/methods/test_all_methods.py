"""Every method on a tiny model: it learns, and a killed and resumed run ends like an uninterrupted one."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from clpet.methods.unused_options import unused_options
from clpet.runtime.run_checkpoint import RunState
from tests.conftest import QUICKER, methods_of, tiny_args, words_of
from tests.runs.test_stored_bytes import check_stored_bytes

METHODS = methods_of("classification")


@contextlib.contextmanager
def copied_after(tasks: int, out: Path, copy: Path) -> Iterator[None]:
    """Copies an output folder once the state after a number of tasks is saved there: what kill -9 leaves at that moment."""
    save = RunState.save

    def save_and_copy(self: RunState, folder: Path, *state: Any) -> None:
        save(self, folder, *state)
        if self.done == tasks:
            shutil.copytree(out, copy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "save", save_and_copy)
        yield


def results(folder: Path) -> dict:
    (path,) = folder.glob("*/*/s*/results.json")
    return json.loads(path.read_text())


def four_tasks(words: Path) -> list[str]:
    """The words benchmark in 4 tasks of 3 labels."""
    return [*tiny_args(words), "benchmark.task=null", "benchmark.classes_per_task=3"]


WORDS_OUT = [
    "objective=text_to_text",
    "benchmark.max_target=8",
    "benchmark.task=task",
    "benchmark.classes_per_task=null",
]
VARIANTS = [
    *([method, *QUICKER.get(method, [])] for method in METHODS),
    ["dynamic_conpet", "method.top_k=2"],
    ["dynamic_conpet", "method.top_k=2", "cache_dir=null"],
    ["replay", "replay=reservoir", "train.select=best"],
    ["emr", "replay=dynamic", "peft.dropout=0.3", "model.dropout=0.2"],
    ["crl", "replay=dynamic"],
    ["ea_emr", "replay=dynamic"],
    ["sequential", "peft=none", "train.lr=1e-4"],
    ["kif", "peft=none", "train.lr=1e-4", "method.unit=matrix", "method.fusion=static", "train.select=best"],
    ["kif", "replay=share", "method.replay_phase=after", "train.weight_decay=0.1"],
    ["ewc", "peft=none", "train.lr=1e-4", "method.fisher_batches=1"],
    ["ewc", "method.merge=average", "method.fisher=batch"],
    ["gain_lora", "peft.dropout=0.3"],
    ["slm", "method.values=per_group", "method.top_k=2", "train.select=best"],
    ["slm", "method.head=per_task", "cache_dir=null"],
    ["progressive_prompts", "method.mlp=16", "method.task_id_at_test=true"],
    ["kif", *WORDS_OUT, "model=tiny_llama"],
    ["sapt", *WORDS_OUT, "model=tiny_t5", "evaluation.decode=rank"],
    ["lamol", *WORDS_OUT, "model=tiny_llama", "peft=none", "train.epochs=12"],
    ["independent", *WORDS_OUT, "model=tiny_llama", "evaluation.decode=rank"],
]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_killed_after_a_task_ends_bit_for_bit_like_uninterrupted(
    variant: list[str], words: Path, clpet, tmp_path: Path
) -> None:
    """After kill -9 following task 3 (joint: its only fit) the same command ends with equal scores, adapters, predictions.

    One run is both the uninterrupted one and, by the files it has at that moment, the killed one. Tests of single
    methods and scripts/torture.py do kill processes.
    """
    method, *more = variant
    args = ["train", f"method={method}", *four_tasks(words), *more]
    after = 1 if method == "joint" else 3
    with copied_after(after, tmp_path / "whole", tmp_path / "cut"):
        assert clpet(*args, "output_dir=whole").code == 0
    assert not list((tmp_path / "cut").glob("*/*/s*/results.json"))
    again = clpet(*args, "output_dir=cut")
    assert again.code == 0
    assert f"resuming after {after} of" in again.out
    uninterrupted, cut = results(tmp_path / "whole"), results(tmp_path / "cut")
    for key in ("scores", "correct", "task_scores", "backward", "forward", "diagnostics"):
        assert uninterrupted[key] == cut[key], key
    (one,), (two,) = ((tmp_path / name).glob("*/*/s*") for name in ("whole", "cut"))
    if more == QUICKER.get(method, []):
        check_stored_bytes(one, method)
    for file in one.glob("adapters/*/adapter_model.safetensors"):
        a, b = load_file(file), load_file(two / file.relative_to(one))
        assert all(torch.equal(a[key], b[key]) for key in a)
    for file in one.glob("predictions/*.parquet"):
        assert pyarrow.parquet.read_table(file).equals(pyarrow.parquet.read_table(two / file.relative_to(one)))
    lines = [(json.loads(line)["row"]) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines))


# Fast tests of their own, or of a method that shares their code, train these as well.
ALIKE = {"der", "bic", "slao", "sd_lora", "lori", "knn", "cl_moe", "aim_merging", "mbpa"}
EACH = [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else []) for name in METHODS]


@pytest.mark.parametrize("method", EACH)
def test_a_method_learns_the_words(method: str, make) -> None:
    """After training, accuracy among the four labels of the task is above chance."""
    run = make(*words_of(method), "train.lr=2e-2", "train.epochs=6")
    assert unused_options(run.method) == []
    from clpet.evaluation.evaluator import Evaluator

    index, task = run.method.curriculum()[0]
    run.trainer.begin_task(index)
    run.method.learn(task, index, run.trainer)
    run.method.after_task(task, index)
    evaluation = Evaluator(run.benchmark, run.data)(run.method, index + 1, [0])
    assert evaluation.per_task[0].value > 50


@pytest.mark.parametrize("method", EACH)
def test_trained_parameters_are_those_that_change(method: str, make) -> None:
    """No tensor outside `parameters()` changes while a task is learned."""
    run = make(f"method={method}")
    model = run.method.objective.adapters.model
    base = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if "lora" not in name and "osf" not in name
    }
    index, task = run.method.curriculum()[0]
    run.trainer.begin_task(index)
    run.method.learn(task, index, run.trainer)
    after = {name.removeprefix("base_model.model.").replace(".base_layer", ""): v
             for name, v in run.method.objective.adapters.model.named_parameters()}  # fmt: skip
    for name, value in base.items():
        assert torch.equal(value, after[name.removeprefix("base_model.model.").replace(".base_layer", "")]), name


@pytest.mark.parametrize("replay", ["dynamic", "fixed", "share", "reservoir", "all"])
@pytest.mark.parametrize("method", ["replay", "dynamic_conpet"])
def test_every_memory_goes_with_every_method_that_replays(method: str, replay: str, make) -> None:
    run = make(f"method={method}", f"replay={replay}")
    for index in range(3):
        run.learn(index)
    assert run.method.replay.stored() > 0


@pytest.mark.parametrize("peft", ["ia3", "prompt"])
def test_a_module_per_task_with_other_adapters(peft: str, make) -> None:
    """Each task has an adapter of any kind; the first one is unchanged bit for bit while the second is trained."""
    run = make("method=independent", f"peft={peft}", "train.lr=1e-2")
    run.learn(0)
    adapters = run.method.objective.adapters
    before = {key: value.detach().clone() for key, value in adapters.tensors("task000").items()}
    run.learn(1)
    assert before
    assert all(torch.equal(before[key], value) for key, value in adapters.tensors("task000").items())
    assert any(not torch.equal(before[key], value) for key, value in adapters.tensors("task001").items())


def test_best_epoch_is_kept_by_validation(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """train.select=best keeps the state of the best validation score, not the last one."""
    run = make("method=sequential", "train.select=best", "train.epochs=3")
    scores = iter([0.1, 0.5, 0.9, 0.3])
    states = []

    def validate(index: int) -> float:
        states.append(run.method.objective.head.weight.detach().clone())
        return next(scores)

    monkeypatch.setattr(run.method, "validate", validate)
    run.learn(0)
    assert torch.equal(run.method.objective.head.weight, states[2])
    assert not torch.equal(states[2], states[3])


def test_first_state_stays_without_a_better_epoch(make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make("method=sequential", "train.select=best", "train.epochs=2")
    monkeypatch.setattr(run.method, "validate", lambda index: 0.5)
    before = [p.detach().clone() for p in run.method.objective.adapters.tensors("default").values()]
    run.learn(0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, run.method.objective.adapters.tensors("default").values(), strict=True)
    )


@pytest.mark.parametrize("method", ["sequential", "lwf", "ewc", "dynamic_conpet"])
def test_micro_batches_give_the_same_gradients(method: str, make) -> None:
    """One batch of 16 and four of 4 end in the same weights, including penalties and distillation.

    AdamW turns a gradient of mere rounding errors into a full step; a larger eps suppresses such steps.
    """
    weights = []
    for size in ("null", "4"):
        run = make(f"method={method}", f"hardware.micro_batch_size={size}", "train.lr=1e-4", "train.eps=1e-3")
        run.learn(0)
        run.learn(1)
        weights.append(torch.cat([value.detach().flatten() for value in run.method.parameters()]))
    assert torch.allclose(*weights, atol=1e-5)


@pytest.mark.parametrize("method", ["independent", "dynamic_conpet"])
def test_tasks_that_share_labels(method: str, tmp_path: Path, clpet) -> None:
    """Task 2 has a label of task 1 and one that sorts before it."""
    lines = [{"text": f"{label} {label} {i}", "label": label, "task": task}
             for task, labels in (("t1", "bd"), ("t2", "ab")) for label in labels for i in range(10)]  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = clpet("train", f"method={method}", *tiny_args(tmp_path / "data"), "train.epochs=15", "train.lr=2e-2")
    assert result.code == 0, result.err
    task_scores = results(tmp_path / "outputs")["task_scores"]
    assert task_scores[2][0] > 50
    assert task_scores[2][1] > 50


def test_joint_validates_on_all_tasks(make) -> None:
    run = make("method=joint", "train.select=best")
    ((pool, rows),) = run.method.validation(2)
    assert set(pool.tasks[rows]) == {0, 1, 2}


def test_seconds_are_those_of_learning(make) -> None:
    """Time before the first task is not counted."""
    import time

    run = make("method=sequential", "train.epochs=1")
    time.sleep(0.7)
    run.learn(0)
    assert run.method.objective.meter.take_learning()["seconds"] < 0.7


def test_validation_is_counted_separately(make) -> None:
    run = make("method=sequential", "train.select=best")
    run.learn(0)
    cost = run.method.objective.meter.take_learning()
    assert cost["forward_examples"] == 24 * 2
    assert cost["validated_examples"] == 8 * 3
