"""Templates, entity windows, batches."""

import numpy as np
import pytest
import torch

from clpet.data.batches import EncodedDataset
from clpet.data.benchmark import Example
from clpet.data.sources.entities import mark_entities, mentions
from clpet.data.template import Template, tokens_to_keep
from clpet.errors import ConfigError, DataError
from clpet.models.backbone import byte_tokenizer

MASKED = "{text} In this sentence, {tail} is the {mask} of {head}."


def template(text: str = MASKED, length: int = 128, needs_mask: bool = True) -> Template:
    return Template(byte_tokenizer(), text, length, needs_mask)


def spans(n: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(n)]


def test_markers_wrap_every_mention() -> None:
    """Head in [m0] [m1], tail in [m2] [m3]; the template's fields are the first mentions."""
    tokens = ["Paris", "is", "in", "France", "and", "Paris", "is", "big"]
    found = mark_entities(tokens, {"head": [(3, 3)], "tail": [(0, 0), (5, 5)]}, "capital")
    assert found.text == "[m2] Paris [m3] is in [m0] France [m1] and [m2] Paris [m3] is big"
    assert found.fields == {"head": "France", "tail": "Paris"}
    assert [found.text[a:b] for a, b in found.entity_spans] == ["[m0] France [m1]", "[m2] Paris [m3]"]


def test_entities_may_nest_and_touch() -> None:
    found = mark_entities(["the", "old", "bridge"], {"head": [(0, 2)], "tail": [(2, 2)]}, "part")
    assert found.text == "[m0] the old [m2] bridge [m3] [m1]"


def test_mentions_from_flat_or_nested_positions() -> None:
    assert mentions([3, 4, 9]) == [(3, 4), (9, 9)]
    assert mentions([[3, 4], [5]]) == [(3, 5)]
    assert mentions(np.array([7])) == [(7, 7)]


def test_template_puts_the_tail_first_and_has_one_mask() -> None:
    found = template()
    example = mark_entities(["Paris", "is", "in", "France"], {"head": [(3, 3)], "tail": [(0, 0)]}, "x")
    text = found.tokenizer.decode(found.encode([example]).rows[0])
    assert "In this sentence, Paris is the[MASK] of France." in text.replace("[MASK] of", "[MASK] of").replace(
        " [MASK]", "[MASK]"
    )
    assert text.count("[MASK]") == 1
    assert text.count("[unused0]") == text.count("[unused3]") == 1


def test_markers_are_single_reserved_tokens() -> None:
    found = template()
    ids = found.encode([mark_entities(["a", "b"], {"head": [(0, 0)], "tail": [(1, 1)]}, "x")]).rows[0]
    for marker in ("[unused0]", "[unused1]", "[unused2]", "[unused3]"):
        assert ids.count(found.tokenizer.convert_tokens_to_ids(marker)) == 1


def test_a_template_without_a_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match="mask"):
        template("{text}")


def test_a_second_mask_in_the_text_is_refused() -> None:
    with pytest.raises(DataError, match="2 times"):
        template("{text} is {mask}").encode([Example("a [MASK] b", "x")])


def test_the_template_is_never_truncated() -> None:
    """Only the sentence is cut; the template and both entities remain."""
    tokens = ["word"] * 60 + ["Paris"] + ["word"] * 60 + ["France"] + ["word"] * 60
    found = template(length=200)
    ids = found.encode([mark_entities(tokens, {"head": [(121, 121)], "tail": [(60, 60)]}, "x")]).rows[0]
    text = found.tokenizer.decode(ids)
    assert len(ids) <= 200
    for part in ("[unused0] France [unused1]", "[unused2] Paris [unused3]", "In this sentence, Paris is the"):
        assert part in text


def test_window_is_centred_on_close_entities() -> None:
    assert tokens_to_keep(spans(100), [(40, 42), (48, 50)], 20) == list(range(35, 55))


def test_window_near_an_edge_keeps_its_width() -> None:
    assert tokens_to_keep(spans(100), [(0, 1)], 20) == list(range(20))
    assert tokens_to_keep(spans(100), [(99, 100)], 20) == list(range(80, 100))


def test_entities_too_far_apart_get_half_of_the_room_each() -> None:
    rows = tokens_to_keep(spans(100), [(10, 11), (90, 91)], 20)
    assert rows == [*range(5, 15), *range(85, 95)]


def test_text_without_entities_keeps_its_head() -> None:
    assert tokens_to_keep(spans(100), [], 5) == [0, 1, 2, 3, 4]


def test_a_template_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(DataError, match="no room"):
        template("{text} " + "long " * 50 + "{mask}", length=64).encode([Example("a", "x")])


def dataset(lengths: list[int]) -> EncodedDataset:
    return EncodedDataset([[7] * n for n in lengths], list(range(len(lengths))), [0] * len(lengths), 0, -1)


def test_batches_by_length_cover_all_rows_with_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 100).tolist()
    pool = dataset(lengths)
    parts = pool.by_length(np.arange(100), 16)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    padded = sum(pool.batch(part).tokens for part in parts)
    assert padded < 1.25 * sum(lengths)


def test_an_epoch_is_a_permutation_that_depends_only_on_its_rng() -> None:
    pool = dataset(list(range(1, 51)))
    one = pool.shuffled(np.arange(50), 8, np.random.default_rng(1))
    two = pool.shuffled(np.arange(50), 8, np.random.default_rng(1))
    other = pool.shuffled(np.arange(50), 8, np.random.default_rng(2))
    assert sorted(np.concatenate(one).tolist()) == list(range(50))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_selecting_from_a_batch_trims_its_padding() -> None:
    batch = dataset([5, 2, 9]).batch([0, 1, 2])
    part = batch.select(torch.tensor([1, 0]))
    assert part.input_ids.tolist() == [[7, 7, 0, 0, 0], [7, 7, 7, 7, 7]]
    assert part.rows.tolist() == [1, 0]
    assert part.labels.tolist() == [1, 0]
