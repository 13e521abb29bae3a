"""Logits of frozen modules: each is computed once, and the cache gives the same bits as the network."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clpet.methods.components.logit_cache import LogitCache, LogitTable
from clpet.methods.modular import module_name
from clpet.models.fixed_blocks import BLOCK_ROWS, block_widths, split_into_blocks
from clpet.runtime.run_checkpoint import RunState
from tests.conftest import tiny_args

TOP_2 = ["method=dynamic_conpet", "method.top_k=2", "benchmark.task=null", "benchmark.classes_per_task=3"]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(file name, row) of every logit vector that is computed."""
    logits: list[tuple[str, int]] = []
    original = LogitCache._compute

    def spy(self, name, pool, rows):
        path = self._table(name, pool).path
        logits.extend((path.name if path else "", int(row)) for row in rows)
        return original(self, name, pool, rows)

    monkeypatch.setattr(LogitCache, "_compute", spy)
    return logits


def outcome(folder: Path) -> tuple[list, dict[str, torch.Tensor]]:
    """Scores and adapters of the only run in a folder."""
    (path,) = folder.glob("*/*/s*/results.json")
    tensors = {
        f"{file.parent.name} {key}": value
        for file in path.parent.glob("adapters/*/adapter_model.safetensors")
        for key, value in load_file(file).items()
    }
    return json.loads(path.read_text())["scores"], tensors


def assert_same(a: Path, b: Path) -> None:
    """Two runs ended in the same scores and, bit for bit, the same adapters."""
    (scores, tensors), (others, other_tensors) = outcome(a), outcome(b)
    assert scores == others
    assert len(tensors) > 1
    assert all(torch.equal(value, other_tensors[key]) for key, value in tensors.items())


@pytest.mark.slow
def test_a_repeated_run_computes_nothing_again_and_ends_alike(words: Path, clpet, tmp_path: Path, computed) -> None:
    """A run gives the same results without a cache, while filling one and while reading one, in any output folder."""
    args = ["train", *tiny_args(words), *TOP_2]
    assert clpet(*args, "output_dir=none", "cache_dir=null").code == 0
    without = len(computed)
    assert clpet(*args, "output_dir=cold", "cache_dir=cache").code == 0
    assert len(computed) == 2 * without > 0
    assert clpet(*args, "output_dir=warm", "cache_dir=cache").code == 0
    assert len(computed) == 2 * without
    assert_same(tmp_path / "none", tmp_path / "cold")
    assert_same(tmp_path / "none", tmp_path / "warm")
    assert not list(tmp_path.glob("none/.cache"))


@pytest.mark.slow
def test_what_another_run_has_filled_in_does_not_change_a_run(words: Path, clpet, tmp_path: Path, computed) -> None:
    """A run with K = 4 fills the cache of the first module too, which it computes in other blocks."""
    args = ["train", *tiny_args(words), *TOP_2]
    assert clpet(*args, "output_dir=none", "cache_dir=null").code == 0
    without = len(computed)
    assert clpet(*args, "method.top_k=4", "output_dir=other", "cache_dir=cache").code == 0
    computed.clear()
    assert clpet(*args, "output_dir=warm", "cache_dir=cache").code == 0
    assert 0 < len(computed) < without
    assert_same(tmp_path / "none", tmp_path / "warm")


@pytest.mark.parametrize("method", ["method.top_k=2", "method.top_k=1"])
def test_each_logit_is_computed_once_across_a_resume(
    method: str, words: Path, clpet, tmp_path: Path, computed, monkeypatch
) -> None:
    """No (example, module) pair is computed twice in training, evaluation and after a stop; files contain exactly these."""
    save = RunState.save

    def stop(self, *rest) -> None:
        save(self, *rest)
        if self.done == 3:
            raise KeyboardInterrupt

    args = ["train", *tiny_args(words), *TOP_2, method]
    monkeypatch.setattr(RunState, "save", stop)
    assert clpet(*args).code == 130
    before = len(computed)
    monkeypatch.setattr(RunState, "save", save)
    assert clpet(*args).code == 0
    assert 0 < before < len(computed)
    assert len(set(computed)) == len(computed)
    files = list(tmp_path.glob("outputs/.cache/logits/*.safetensors"))
    stored = {(path.name, int(row)) for path in files for row in load_file(path)["rows"]}
    assert stored == set(computed)


def test_the_cost_of_a_repeated_run_says_what_was_read(make, tmp_path: Path) -> None:
    """forward_examples counts computed logits, cached_examples those that an earlier run has computed."""
    costs = []
    for _ in range(2):
        run = make("method=dynamic_conpet", "method.top_k=2", f"cache_dir={tmp_path}")
        for index in range(3):
            run.learn(index)
        costs.append(run.method.objective.meter.take_learning())
    assert costs[0]["cached_examples"] == 0
    assert costs[1]["cached_examples"] > 0
    assert costs[1]["forward_examples"] < costs[0]["forward_examples"]
    assert costs[1]["backward_examples"] == costs[0]["backward_examples"]


def frozen(make, *overrides: str):
    """A method that has learned one task, its logit cache, and the train pool."""
    run = make("method=dynamic_conpet", "train.epochs=1", *overrides)
    run.learn(0)
    return run.method, run.method.cache, run.data.train


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("logits/*.safetensors")
    return path


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty"])
def test_a_damaged_file_is_computed_again(harm: str, make, tmp_path: Path, computed) -> None:
    _, store, pool = frozen(make, f"cache_dir={tmp_path}")
    rows = np.arange(20)
    good = store.get(module_name(0), pool, rows)
    path, data = only_file(tmp_path), only_file(tmp_path).read_bytes()
    offset = data.index(good[0].tobytes()[:8])
    path.write_bytes(
        {"truncated": data[:-5], "empty": b"", "flipped": data[:offset] + b"\1" + data[offset + 1 :]}[harm]
    )
    computed.clear()
    _, store, pool = frozen(make, f"cache_dir={tmp_path}")
    assert np.array_equal(store.get(module_name(0), pool, rows), good)
    assert sorted(row for _, row in computed) == list(range(20))
    assert path.read_bytes() == data


@pytest.mark.slow
def test_settings_do_not_share(make, tmp_path: Path) -> None:
    """Each of these settings changes the network, the module, the texts or the position that is read: a separate file."""
    settings = [
        [],
        ["seed=1"],
        ["train.lr=2e-3"],
        ["peft.alpha=8"],
        ["benchmark.template='{text}!'"],
        ["benchmark.max_length=10"],
        ["model.representation=cls"],
        ["hardware.dtype=bf16"],
        ["model.attention=sdpa"],
        ["benchmark.max_train=20"],
    ]
    for count, overrides in enumerate(settings, 1):
        for _ in range(2):
            _, store, pool = frozen(make, f"cache_dir={tmp_path}", *overrides)
            store.get(module_name(0), pool, np.arange(4))
        assert len(list(tmp_path.glob("logits/*"))) == count, overrides


def test_a_module_trained_again_has_a_file_of_its_own(make, tmp_path: Path) -> None:
    """Changing one value of the adapter or the readout makes a different module."""
    method, store, pool = frozen(make, f"cache_dir={tmp_path}")
    first = store.get(module_name(0), pool, np.arange(4))
    adapter = next(iter(method.objective.adapters.tensors(module_name(0)).values()))
    for count, tensor in enumerate([adapter, method.modules[0].bias], 2):
        with torch.no_grad():
            tensor.view(-1)[0] += 1
        store.freeze(module_name(0), *method.readout(0))
        again = store.get(module_name(0), pool, np.arange(4))
        assert not np.array_equal(first, again)
        assert len(list(tmp_path.glob("logits/*"))) == count


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_neighbours_do_not_change_a_bit(dtype: str, attention: str, make) -> None:
    """Logits are the same row by row, in any order and all at once, which the cache relies on."""
    method, store, pool = frozen(make, f"hardware.dtype={dtype}", f"model.attention={attention}")
    rows = np.arange(len(pool))
    logits = store.get(module_name(0), pool, rows)
    rng = np.random.default_rng(0)
    for size in (1, 5, 30):
        store.freeze(module_name(0), *method.readout(0))
        order = rng.permutation(rows)
        for start in range(0, len(rows), size):
            store.get(module_name(0), pool, order[start : start + size])
        assert np.array_equal(store.get(module_name(0), pool, rows), logits)


def test_blocks_hold_rows_of_one_shape() -> None:
    """Widths are multiples of 8 or the longest row; rows that fill their block are separate from padded ones."""
    lengths = np.array([3, 8, 9, 16, 20, 7] + [5] * BLOCK_ROWS)
    assert block_widths(lengths)[:6].tolist() == [8, 8, 16, 16, 20, 8]
    rows = [block.tolist() for block in split_into_blocks(lengths, np.arange(len(lengths)))]
    assert rows == [[0, 5, *range(6, 20)], [20, 21], [1], [2], [3], [4]]


def fill(path: Path, start: int) -> None:
    """Adds every second row to the shared file, one by one, as one of two processes."""
    table = LogitTable(100, 2, path)
    for row in range(start, 100, 2):
        if table.slot[row] < 0:
            table.add(np.array([row]), np.full((1, 2), row, dtype=np.float32))
            table.save()


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    """Neither process damages the file for the other, and in the end it contains the rows of both."""
    path, context = tmp_path / "x.safetensors", multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(path, start)) for start in (0, 1)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        exists = path.exists()
        assert len(LogitTable(100, 2, path).values) > 0 or not exists  # never a half-written file
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    for start in (0, 1):
        fill(path, start)
    table = LogitTable(100, 2, path)
    assert table.values[table.slot[np.arange(100)], 0].tolist() == list(range(100))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_that_cannot_be_written_is_given_up(make, tmp_path: Path, caplog) -> None:
    (tmp_path / "logits").write_text("a file where the folder should be")
    _, store, pool = frozen(make, f"cache_dir={tmp_path}")
    logits = store.get(module_name(0), pool, np.arange(4))
    assert np.isfinite(logits).all()
    assert "cannot be written" in caplog.text
