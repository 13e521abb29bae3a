"""Atomic writes and shared caches: empty, damaged, and written by several processes at once."""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clpet.data.benchmark import Example
from clpet.data.token_cache import TokenCache
from clpet.models.backbone import byte_tokenizer
from clpet.runtime import atomic_io

FORK = multiprocessing.get_context("fork")
ROUNDS = 8


def together(work: Callable[[int], None], processes: int = 4) -> None:
    """Runs `work(round)` in several processes that start every round at the same moment; asserts that none fails."""
    ready, failed = FORK.Barrier(processes), FORK.SimpleQueue()

    def one() -> None:
        try:
            for index in range(ROUNDS):
                ready.wait(30)
                work(index)
        except BaseException:
            failed.put(traceback.format_exc())
            ready.abort()
            raise

    started = [FORK.Process(target=one) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert failed.empty(), failed.get()
    assert [process.exitcode for process in started] == [0] * processes


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer's threads do not survive a fork."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.mark.parametrize("damaged", [False, True])
def test_four_processes_share_an_empty_or_damaged_token_cache(damaged: bool, tmp_path: Path) -> None:
    examples = [Example(f"text number {index}") for index in range(40)]
    tokenizer = byte_tokenizer()
    expected = TokenCache(tokenizer).stream(examples, sized=True)
    if damaged:
        for index in range(ROUNDS):
            TokenCache(tokenizer, str(tmp_path / str(index))).stream(examples, sized=True)
            (file,) = (tmp_path / str(index)).glob("tokens/*/tokens")
            file.write_bytes(b"\x00" + file.read_bytes()[1:])

    def work(index: int) -> None:
        for _ in range(2):
            stream = TokenCache(tokenizer, str(tmp_path / str(index))).stream(examples, sized=True)
            np.testing.assert_array_equal(stream.tokens, expected.tokens)
            np.testing.assert_array_equal(stream.sizes, expected.sizes)

    together(work)
    assert {path.name for path in tmp_path.glob("*/tokens/.*")} == {".lock"}


def test_the_first_of_several_writers_wins(tmp_path: Path) -> None:
    """Later writers discard their copy; a reader never finds the folder missing."""

    def work(index: int) -> None:
        folder = tmp_path / str(index)
        for _ in range(2):
            with atomic_io.cache_folder(folder) as temporary:
                (temporary / "a").write_text("x" * 1000)
            inode = (folder / "a").stat().st_ino
            assert atomic_io.is_intact(folder)
            assert (folder / "a").stat().st_ino == inode

    together(work)


def test_a_damaged_folder_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    for change in (
        lambda: (folder / "a").write_text("b"),
        (folder / "a").unlink,
        lambda: (folder / atomic_io.CHECKSUMS).write_text("3"),
    ):
        with atomic_io.cache_folder(folder) as temporary:
            (temporary / "a").write_text("a")
        assert atomic_io.is_intact(folder)
        change()
        assert not atomic_io.is_intact(folder)
    with atomic_io.cache_folder(folder) as temporary:
        (temporary / "a").write_text("a")
    assert atomic_io.is_intact(folder)
    with contextlib.suppress(ZeroDivisionError), atomic_io.cache_folder(tmp_path / "y") as temporary:
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "x"]
