"""SLM's heads, generated answers, memory, records of a run, and refused settings."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clpet.errors import ConfigError, ModelError
from clpet.objectives.base import AnswerSpace
from clpet.training.step import StepContext
from tests.methods.test_all_methods import results
from tests.methods.test_slm import everything


def shared_labels(folder: Path) -> Path:
    """Writes three tasks; all labels of the second one are also labels of the first one."""
    folder.mkdir()
    lines = [f'{{"text": "{label} {label} {i}", "label": "{label}", "task": "{task}"}}\n'
             for task, labels in (("t1", "abc"), ("t2", "bc"), ("t3", "cd")) for label in labels for i in range(10)]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


def test_the_head_grows_by_new_labels_alone(slm, tmp_path: Path) -> None:
    """A task without new labels trains no row; old columns do not depend on later tasks."""
    run = slm(f"data_dir={shared_labels(tmp_path / 'data')}", distance=None)
    method = run.method
    run.learn(0)
    h = torch.randn(2, method.objective.dim)
    before, rows = method.task_heads.scores(h, None), everything(method)
    assert method.task_heads.heads[0].labels == [0, 1, 2]
    run.learn(1)
    assert method.task_heads.heads[1].labels == []
    assert len(method.parameters()) == len(method.stack.current())
    assert torch.equal(method.task_heads.scores(h, None), before)
    run.learn(2)
    after = method.task_heads.scores(h, None)
    assert method.task_heads.heads[2].labels == [3]
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.equal(after[:, 3], before[:, 3])
    assert all(torch.equal(everything(method)[name], value) for name, value in rows.items() if "head" in name)
    batch = run.data.train.batch(run.data.train.rows_of(2)[:4])
    logits = torch.cat([head(h) for head in method.task_heads.competing], 1)[:, method.task_heads.columns]
    assert logits.shape == (2, 2)  # the softmax is over c and d
    assert method.task_heads.target[batch.labels].min() >= 0


def test_a_head_per_task_has_all_of_its_rows(slm, tmp_path: Path) -> None:
    """In SLM-TI a label of two tasks has two rows, selected by the task id; labels of other tasks cannot be predicted."""
    run = slm(f"data_dir={shared_labels(tmp_path / 'data')}", "method.head=per_task", distance=None)
    for task in range(3):
        run.learn(task)
    heads = run.method.task_heads.heads
    assert [head.labels for head in heads] == [[0, 1, 2], [1, 2], [2, 3]]
    h = torch.randn(2, run.method.objective.dim)
    scores = run.method.task_heads.scores(h, torch.tensor([0, 2]))
    assert torch.allclose(scores[0, :3], heads[0](h)[0])
    assert torch.allclose(scores[1, 2:], heads[2](h)[1])
    assert scores[0, 3] == scores[1, 0] == float("-inf")


@pytest.mark.parametrize("model", ["tiny_t5", "tiny_llama"])
@pytest.mark.parametrize("decode", ["generate", "rank"])
def test_answers_in_a_batch_are_those_alone(model: str, decode: str, slm) -> None:
    """The mixture of a prompt is used for all tokens of its answer and for all candidates."""
    run = slm(f"model={model}", "objective=text_to_text", "benchmark.max_target=6", "method.values=per_group",
              "method.top_k=2", f"evaluation.decode={decode}", "train.epochs=1", distance=0.5)  # fmt: skip
    for task in range(3):
        run.learn(task)
    method, pool = run.method, run.data.test
    with torch.no_grad():
        for value in method.stack.current().values():
            value.normal_(generator=torch.Generator().manual_seed(3))
    rows = pool.rows_of(1)
    with torch.inference_mode():
        together = method.predict(pool.batch(rows), AnswerSpace(range(12)))
        alone = [method.predict(pool.batch([row]), AnswerSpace(range(12))).texts[0] for row in rows]
    assert together.texts == alone
    with method.stack.off(), torch.inference_mode():
        bare = method.objective.predict(pool.batch(rows), AnswerSpace(range(12))).texts
    assert decode == "rank" or bare != alone


@pytest.mark.parametrize("model", ["tiny_t5", "tiny_llama"])
def test_text_to_text_learns_with_its_own_values(model: str, slm) -> None:
    run = slm(f"model={model}", "objective=text_to_text", "train.epochs=6", "benchmark.max_target=8")
    pool = run.data.train
    batch = pool.batch(pool.rows_of(0))
    start = run.method.objective.loss(batch).item()
    run.learn(0)
    assert run.method.loss(StepContext.of(batch)).item() < start - 0.1
    assert not hasattr(run.method.objective, "head")
    run.learn(1)
    assert run.evaluate(2).seen[0].total == 8


class Peak(TorchDispatchMode):
    """Measures the peak number of bytes of live tensors created inside `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self.alive:
                    self.alive.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key: int, size: int) -> None:
        if key in self.alive:
            self.alive.remove(key)
            self.now -= size


def test_a_training_step_costs_no_more_memory_with_twenty_tasks(slm) -> None:
    """Apart from the stored factors, earlier tasks need no activation, gradient or optimiser state."""
    run = slm(distance=None)
    method, batch = run.method, run.data.train.batch(run.data.train.rows_of(0)[:16])
    method.embeddings = lambda pool, rows: torch.randn(len(rows), 48)
    peaks = []
    for task in range(20):
        method.key_pool.append(torch.randn(6, 4, 8))
        method.stack.add(task, method.per_task)
        if task == 0:
            method.task_heads.grow([0, 1, 2, 3], seen=False)
        if task in (0, 19):
            with Peak() as peak:
                optimizer = torch.optim.AdamW(method.parameters())
                method.loss(StepContext.of(batch)).backward()
                optimizer.step()
            peaks.append(peak.peak)
    assert peaks[0] > 10_000
    assert peaks[1] <= peaks[0]
    assert method.stack.count() == 20 * 4 * 4 * (32 + 32) * 2


@pytest.mark.usefixtures("rendered")
def test_a_run_keeps_and_shows_what_was_retrieved(words: Path, encoder: Path, clpet, tmp_path: Path) -> None:
    """Retrieval is in results.json, the parquet and the figure; a second run reads cached embeddings and is equal."""
    from tests.conftest import tiny_args

    sizes = ["method.groups=6", "method.keys=4", "method.top_k=4"]
    args = ["train", "method=slm", f"method.encoder={encoder}", *sizes, *tiny_args(words), "fresh=true"]
    assert clpet(*args).code == 0
    first, cache = results(tmp_path / "outputs"), sorted(tmp_path.glob("outputs/.cache/embeddings/*/*"))
    stamps = [path.stat().st_mtime_ns for path in cache]
    figures = first["diagnostics"][-1]
    (folder,) = tmp_path.glob("outputs/*/slm/s*")
    table = pyarrow.parquet.read_table(folder / "predictions" / "after-003.parquet")
    for name in ("fruit", "metal", "river"):
        rows = [row for row in table.to_pylist() if row["task"] == name]
        assert figures[f"vote/{name}"] == pytest.approx(100 * np.mean([row["selected"] == name for row in rows]))
        assert figures[f"picks/{name}"] == pytest.approx(100 * np.mean([row["right_picks"] for row in rows]))
    assert (folder / "retrieval.png").stat().st_size > 5000
    assert len(list((folder / "adapters").iterdir())) == 3 * 4
    assert first["cost"][0]["stored_parameters"] == 4 * 12 * 64 * 2 + 6 * 4 * 8 + 4 * 33
    assert (first["softmax"], first["resolved"]) == ("task", {})
    assert len(cache) == 9  # train, validation and test of three tasks
    assert clpet(*args).code == 0
    assert [path.stat().st_mtime_ns for path in cache] == stamps
    assert results(tmp_path / "outputs")["scores"] == first["scores"]
    assert results(tmp_path / "outputs")["diagnostics"] == first["diagnostics"]


@pytest.mark.parametrize(
    ("override", "message"),
    [("method.top_k=5", "method.top_k must be from 1 to method.keys=4"),
     ("method.stage1.top_k=5", "method.stage1.top_k must be from 1 to method.keys=4"),
     ("method.groups=7", "method.groups=7 must be a divisor of 48"),
     ("method.keys=9", "method.keys=9 must be at most 8"),
     ("method.values=both", "method.values must be shared or per_group, not both"),
     ("method.rank=0", "method.rank must be at least 1"),
     ("peft=lora", "method=slm needs peft=frozen"),
     ("method.encoder=nli_mpnet_base", "is not on this machine"),
     ("method.targets=[nowhere]", "method.targets names the layer nowhere")],
)  # fmt: skip
def test_invalid_settings_are_refused(override: str, message: str, slm) -> None:
    with pytest.raises((ConfigError, ModelError)) as error:
        slm(override, distance=None)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sizes_follow_the_labels_of_a_task_unless_they_are_set(make, encoder: Path) -> None:
    """With labels the defaults are one group, at least 20 keys and the best one; explicit options have priority."""
    run = make("method=slm", f"method.encoder={encoder}")
    assert run.method.sizes == (1, 20, 1)
    assert run.method.resolved(run.benchmark) == {"method.groups": 1, "method.keys": 20, "method.top_k": 1}
    run.learn(0)
    assert run.method.key_pool[0].shape == (1, 20, 48)
    chosen = make("method=slm", f"method.encoder={encoder}", "method.groups=4", "method.keys=6").method
    assert chosen.sizes == (4, 6, 1)
    assert chosen.resolved(run.benchmark) == {"method.top_k": 1}
    plain = SimpleNamespace(tasks=[SimpleNamespace(labels=())])
    assert chosen.choose_sizes(plain) == (4, 6, 4)
    many = SimpleNamespace(tasks=[SimpleNamespace(labels=range(5)), SimpleNamespace(labels=range(30))])
    assert run.method.choose_sizes(many) == (1, 60, 1)
