"""Streams of tokens: the cache, lazy streams, and windows."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from clpet.data.benchmark import Example
from clpet.data.packing import Windows, pack, train_blocks
from clpet.data.token_cache import Stream, TokenCache, byte_sizes
from clpet.models.backbone import byte_tokenizer
from tests.objectives.test_language_modeling import TEXTS


def test_blocks_drop_one_remainder_and_reproduce_the_stream() -> None:
    tokens = np.arange(103, dtype=np.uint16)
    stream = Stream(tokens, np.empty(0, np.int64), np.empty(0, np.float32))
    pool = Windows(pad_id=0)
    pack(0, "d", pool, stream, 10)
    assert len(pool) == 10
    assert np.concatenate([pool.tokens(row) for row in range(10)]).tolist() == list(range(100))
    assert train_blocks(103, 10)[0].tolist() == list(range(0, 100, 10))
    assert pool.weights.tolist() == [9.0] * 10


def test_the_cache_gives_the_same_tokens_and_survives_damage(tmp_path: Path) -> None:
    examples = [Example(text) for text in TEXTS["birds"]]
    fresh = TokenCache(byte_tokenizer()).stream(examples, sized=True)
    first = TokenCache(byte_tokenizer(), str(tmp_path)).stream(examples, sized=True)
    again = TokenCache(byte_tokenizer(), str(tmp_path)).stream(examples, sized=True)
    for part in ("tokens", "starts", "sizes"):
        assert np.array_equal(getattr(fresh, part), getattr(first, part))
        assert np.array_equal(getattr(fresh, part), getattr(again, part))
    assert isinstance(again.tokens, np.memmap)
    assert first.tokens.dtype == np.uint16
    file = next(tmp_path.glob("tokens/*/tokens"))
    file.write_bytes(file.read_bytes()[:-2])
    assert np.array_equal(TokenCache(byte_tokenizer(), str(tmp_path)).stream(examples, sized=True).tokens, fresh.tokens)
    assert len(list(tmp_path.glob("tokens/[!.]*"))) == 1


def test_without_a_writable_cache_tokens_stay_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder below a file or in /proc cannot be created: one warning, and the same tokens."""
    examples = [Example(text) for text in TEXTS["birds"]]
    fresh = TokenCache(byte_tokenizer()).stream(examples, sized=True)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc/x")):
        tokens = TokenCache(byte_tokenizer(), str(folder))
        for _ in range(2):
            found = tokens.stream(examples, sized=True)
            assert all(np.array_equal(getattr(fresh, part), getattr(found, part)) for part in vars(fresh))
        assert [str(folder) in message for message in caplog.messages] == [True]
        caplog.clear()


def test_lazy_streams_give_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example(text) for text in TEXTS["birds"]] * 3
    tokens = TokenCache(byte_tokenizer(), str(tmp_path))
    whole, lazy = tokens.stream(examples, sized=False), tokens.lazy_stream(examples)
    assert len(lazy.tokens) == len(whole.tokens)
    assert lazy.starts.tolist() == whole.starts.tolist()
    for start, stop in [(0, 5), (30, 80), (0, len(whole.tokens)), (69, 70), (70, 71)]:
        assert lazy.tokens[start:stop].tolist() == whole.tokens[start:stop].tolist()
    assert not (TokenCache(byte_tokenizer(), str(tmp_path)).lazy_stream(examples).tokens.ends - lazy.tokens.ends).any()
    monkeypatch.setattr("clpet.data.packing.BUFFER", 4)
    pool = Windows(pad_id=0)
    pack(0, "birds", pool, lazy, 16)
    order = np.concatenate(pool.shuffled(np.arange(len(pool)), 3, np.random.default_rng(0)))
    assert sorted(order) == list(range(len(pool)))
    assert all(sorted(order[start : start + 4]) == list(range(start, start + 4)) for start in (0, 4, 8))


def test_lazy_domains_are_mixed_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay and joint training need it: every fifth of an epoch contains an equal share of each domain."""
    monkeypatch.setattr("clpet.data.packing.BUFFER", 4)
    tokens, pool = TokenCache(byte_tokenizer(), str(tmp_path)), Windows(pad_id=0)
    for task in range(3):
        pack(task, "d", pool, tokens.lazy_stream([Example(text) for text in TEXTS["birds"]] * 60), 16)
    order = np.concatenate(pool.shuffled(np.arange(len(pool)), 5, np.random.default_rng(0)))
    assert sorted(order) == list(range(len(pool)))
    for part in np.array_split(pool.tasks[order], 5):
        assert np.bincount(part, minlength=3) / len(part) == pytest.approx([1 / 3] * 3, abs=0.08)


def test_bytes_count_every_character_once() -> None:
    text = "naïve €5"
    offsets = [(0, 2), (2, 3), (2, 3), (3, 5), (6, 7), (7, 8)]  # ï in two tokens; a space that no token holds
    assert byte_sizes(text, offsets) == [2, 2, 0, 2, 4, 1]
    assert sum(byte_sizes(text, offsets)) == len(text.encode())
    found = TokenCache(byte_tokenizer()).stream([Example("añb")], sized=True)
    assert found.sizes.sum() == 4
    assert found.sizes[[0, -1]].tolist() == [0, 0]  # [CLS] and [SEP]


def test_add_bos_puts_one_bos_token_before_every_document(tmp_path: Path) -> None:
    """Also if the tokenizer adds one itself. The token counts 0 bytes, and the cache tells both streams apart."""
    own, bare = byte_tokenizer(), byte_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    bare.bos_token = bare.cls_token
    documents = [Example("ab"), Example("c")]
    found = {
        name: TokenCache(tokenizer, str(tmp_path), begin).stream(documents, sized=True)
        for name, tokenizer, begin in (("own", own, False), ("asked", bare, True), ("bare", bare, False))
    }
    assert found["asked"].tokens.tolist() == found["own"].tokens.tolist()
    assert found["asked"].starts.tolist() == [0, 4]
    assert found["asked"].sizes.tolist() == [0, 1, 1, 0, 0, 1, 0]
    kept = found["asked"].tokens != bare.bos_token_id
    assert found["bare"].tokens.tolist() == found["asked"].tokens[kept].tolist()
    assert TokenCache(own, add_bos=True).stream(documents, sized=False).tokens.tolist() == found["own"].tokens.tolist()
    assert (
        TokenCache(bare, add_bos=True).lazy_stream(documents).tokens[3:6].tolist()
        == found["asked"].tokens[3:6].tolist()
    )
