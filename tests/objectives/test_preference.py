"""objective=preference: the loss of DPO, the reference policy, and what methods keep of earlier preferences."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from clpet.data.batches import IGNORED
from clpet.objectives.base import AnswerSpace
from clpet.objectives.preference import Preference
from tests.conftest import set_up

TASKS = {"sea": ("#", "yes", "no"), "hill": ("&", "no", "yes")}  # task: first letter, chosen, rejected
METHODS = ["sequential", "replay", "ewc", "kif", "o_lora", "independent"]


def write_pairs(folder: Path, train: int = 48, noise: int = 6) -> Path:
    """Two opposite preferences; only the first letter of a prompt tells which one is meant."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in {"train": train, "validation": 8, "test": 20}.items():
        rows = [
            {"prompt": mark + "".join(rng.choices("abcdefgh", k=noise)), "chosen": a, "rejected": b, "task": task}
            for task, (mark, a, b) in TASKS.items()
            for _ in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the made-up preferences."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def words(folder: Path, *more: str) -> list[str]:
    """The words of a command on a folder of pairs."""
    return ["objective=preference", "model=tiny_llama", "benchmark=files", f"data_dir={folder}", "benchmark.text=prompt",
            "benchmark.label=chosen", "benchmark.task=task", "benchmark.max_length=32", "benchmark.max_target=10",
            "tracking=off", "hardware=cpu", "hardware.threads=1", "train.lr=1e-2", *more]  # fmt: skip


def ready(folder: Path, *more: str) -> SimpleNamespace:
    """A method set up on the pairs, with an adapter that is not neutral."""
    run = set_up(words(folder, "cache_dir=null", *more))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in run.method.objective.adapters.tensors("default").values():
            value.add_(torch.randn(value.shape, generator=generator).to(value) * 0.3)
    return run


def dpo(model: torch.nn.Module, prompt: list[int], chosen: list[int], rejected: list[int], beta: float) -> torch.Tensor:
    """Equation 7 for one pair of token lists, without padding."""

    def log_probability(answer: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.float().log_softmax(-1)[range(len(answer)), answer].sum()

    policy = log_probability(chosen) - log_probability(rejected)
    with model.disable_adapter():
        reference = log_probability(chosen) - log_probability(rejected)
    return -torch.nn.functional.logsigmoid(beta * (policy - reference))


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_the_loss_and_its_gradient_are_those_of_the_paper(beta: float, pairs: Path) -> None:
    run = ready(pairs, "method=sequential", f"objective.beta={beta}", "hardware.dtype=fp32")
    objective, pool = run.method.objective, run.data.train
    rows, trained = [3, 0, 50, 60, 17], run.method.parameters()
    lists = [(pool.tokens(row).tolist(), pool.answer[row].tolist(), pool.rejected[row].tolist()) for row in rows]
    losses = torch.stack([dpo(objective.adapters.model, *parts, beta) for parts in lists])
    loss = objective.loss(pool.batch(rows))
    assert losses.std() > 1e-3
    assert loss.item() == pytest.approx(losses.mean().item(), abs=1e-6)
    ours, expected = torch.autograd.grad(loss, trained), torch.autograd.grad(losses.mean(), trained)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, expected, strict=True))
    margins = objective.predict(pool.batch(rows), AnswerSpace([])).extras["margin"]
    assert torch.allclose(-torch.nn.functional.logsigmoid(margins), losses, atol=1e-6)


def test_micro_batches_have_the_loss_of_their_whole(pairs: Path) -> None:
    """A pair is one term whatever the length of its answers."""
    pool = ready(pairs, "method=sequential").data.train
    assert set(pool.weights) == {1.0}
    row = next(row for row in range(len(pool)) if pool.tasks[row] == 0)
    assert pool.lengths[row] == len(pool.tokens(row)) + len("yes") + 1  # the longer answer and its end token


def test_a_fresh_adapter_ties_every_pair(pairs: Path) -> None:
    """The policy is then the reference, bit for bit: a score of 50, and a loss of log 2."""
    for method in METHODS:
        run = set_up(words(pairs, f"method={method}", "cache_dir=null"))
        objective, pool = run.method.objective, run.data.test
        rows = objective.batches(pool, pool.rows_of(0))[0]
        batch, choices = pool.batch(rows), run.method.choices(pool.batch(rows), [])
        predictions = run.method.predict(batch, choices)
        assert set(objective.score(batch, predictions, choices)["score"].tolist()) == {0.5}


def test_the_reference_is_computed_once_and_not_changed_by_training(pairs: Path) -> None:
    run = ready(pairs, "method=o_lora", "train.epochs=1")
    objective, pool, calls = run.method.objective, run.data.train, []
    original = objective.reference_of
    objective.reference_of = lambda *arguments: calls.append(arguments) or original(*arguments)
    run.learn(0)
    run.learn(1)
    assert len(calls) == 2  # once per task
    before = pool.reference[0].clone()
    assert torch.equal(original(pool, pool.rows_of(0)), before)
    cost = objective.meter.cost  # of task 2: 48 pairs are two passes each through the reference and through the policy
    assert (cost.reference_examples, cost.forward_examples, cost.backward_examples) == (96, 192, 96)
    assert cost.backward_flops > cost.forward_flops / 2 > 0


def test_a_truncated_answer_is_counted(tmp_path: Path) -> None:
    run = set_up(words(write_pairs(tmp_path / "p", 8), "benchmark.max_target=3", "method=sequential", "cache_dir=null"))
    pool = run.data.train
    assert pool.num_truncated(pool.rows_of(0)) == (0, 8)  # `yes` is chosen in task 1 and rejected in task 2
    assert pool.num_truncated(pool.rows_of(1)) == (0, 8)
    assert (pool.batch([0]).targets != IGNORED).sum() == 3


def scores(folder: Path) -> list[list[float]]:
    """The transfer matrix of the only run below a folder."""
    (path,) = folder.glob("*/*/s*/results.json")
    return json.loads(path.read_text())["scores"]


def counters(folder: Path) -> list[list[float]]:
    """Per task of the only run below a folder: passes with those of the reference, their FLOPs, and bytes."""
    (path,) = folder.glob("*/*/s*/results.json")
    keys = ("forward_examples", "forward_flops", "backward_flops", "reference_examples", "stored_bytes", "replay_bytes")
    return [[cost[key] for key in keys] for cost in json.loads(path.read_text())["cost"]]


def test_preferences_are_learned_forgotten_and_replayed(pairs: Path, clpet, tmp_path: Path) -> None:
    """Pair accuracy goes from 50 to above 90; the second preference overwrites the first, unless that is replayed."""
    for method in (["method=sequential"], ["method=replay", "replay=all"]):
        answer = clpet("train", *words(pairs, *method, "train.epochs=6", f"output_dir={tmp_path / method[0]}"))
        assert answer.code == 0, answer.err
    sequential, replay = scores(tmp_path / "method=sequential"), scores(tmp_path / "method=replay")
    assert sequential[0] == replay[0] == [50, 50]
    assert min(sequential[1][0], sequential[2][1], *replay[2]) > 90
    assert sequential[2][0] < 30
    assert "score in % after each task" in answer.out


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name == "replay" else pytest.mark.slow) for name in METHODS]
)
def test_a_run_that_fails_inside_a_task_resumes_bit_for_bit(method, clpet, tmp_path: Path, monkeypatch) -> None:
    folder = write_pairs(tmp_path / "pairs", train=24)
    args = ["train", *words(folder, f"method={method}", "train.epochs=2", "train.save_minutes=1e-9")]
    assert clpet(*args, "output_dir=whole").code == 0
    loss, calls = Preference.loss, []

    def failing(self, batch):
        calls.append(len(batch))
        if len(calls) == (12 if method == "ewc" else 7):
            raise RuntimeError("made-up failure")
        return loss(self, batch)

    monkeypatch.setattr(Preference, "loss", failing)
    assert clpet(*args, "output_dir=cut").code == 1
    monkeypatch.setattr(Preference, "loss", loss)
    again = clpet(*args, "output_dir=cut")
    assert again.code == 0, again.err
    assert "resuming after 1 of 2 tasks, inside task 2" in again.out
    assert scores(tmp_path / "whole") == scores(tmp_path / "cut")
    assert counters(tmp_path / "whole") == counters(tmp_path / "cut")
    (one,), (two,) = ((tmp_path / name).glob("*/*/s*") for name in ("whole", "cut"))
    files = sorted(one.glob("adapters/**/*.safetensors"))
    assert files
    for file in files:
        a, b = load_file(file), load_file(two / file.relative_to(one))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["peft=none"], "the model whose adapter is switched off, which peft=none does not have: use peft=lora"),
        (["method=lwf"], "method=lwf does not support objective=preference"),
        (["method=osf", "peft=osf"], "method=osf does not support objective=preference: it changes the backbone"),
        (["model=tiny"], "is an encoder and cannot write an answer"),
        (["objective.beta=0"], "objective.beta must be more than 0"),
        (["objective.rejected=worse"], "has no column worse"),
        (["evaluation.decode=rank"], "evaluation.decode is for text_to_text; objective=preference does not use it"),
        (["method=replay", "replay=fixed"], "chooses its memory by class logits"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_work_starts(more: list[str], message: str, pairs: Path, clpet) -> None:
    answer = clpet("train", *words(pairs, "method=sequential", *more))
    assert (answer.code, message in answer.err, answer.err.count("\n")) == (2, True, 1), answer.err


def test_plain_text_and_labels_in_the_yaml_are_no_pairs(clpet) -> None:
    for benchmark, message in {
        "python_domains": "objective=preference does not suit benchmark=python_domains",
        "clinc150": "benchmark.task_labels must be null with objective=preference",
    }.items():
        answer = clpet(
            "train", "objective=preference", "method=sequential", "model=tiny_llama", f"benchmark={benchmark}"
        )
        assert (answer.code, message in answer.err) == (2, True), answer.err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rejected": ""}, "row 1 has an empty rejected"),
        ({"rejected": "yes"}, "the chosen and the rejected answer to '#a' are equal (train): remove such pairs"),
    ],
)
def test_pairs_without_a_difference_are_refused(row: dict, message: str, clpet, tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p", 8)
    first = {"prompt": "#a", "chosen": "yes", "rejected": "no", "task": "sea", **row}
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([json.dumps(first), *lines]) + "\n")
    answer = clpet("train", *words(folder, "method=sequential"))
    assert (answer.code, message in answer.err) == (2, True), answer.err
