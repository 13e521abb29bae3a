"""Batches: what `select` keeps of every kind of batch, and that a batch is never changed."""

import dataclasses

import numpy as np
import pytest
import torch

from clpet.data.batches import IGNORED, AnswerBatch, Batch, WindowBatch


def fields(rows: int, **changes: object) -> dict[str, object]:
    """The fields that all batches have, for texts of 2, 4, 3, ... tokens in 5 positions."""
    lengths = torch.tensor([2, 4, 3, 1])[:rows]
    ids = torch.arange(rows * 5).view(rows, 5)
    common: dict[str, object] = {
        "rows": np.arange(rows) + 10, "input_ids": ids, "attention_mask": (torch.arange(5) < lengths[:, None]).long(),
        "positions": torch.arange(rows), "labels": torch.arange(rows) * 2, "tasks": torch.arange(rows) + 5, "share": 0.25,
    }  # fmt: skip
    return common | changes


def test_a_selection_of_texts() -> None:
    chosen = Batch(**fields(4)).select(torch.tensor([2, 0]))
    assert chosen.rows.tolist() == [12, 10]
    assert chosen.input_ids.tolist() == [[10, 11, 12], [0, 1, 2]]  # trimmed to the longest, of 3 tokens
    assert chosen.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (chosen.positions.tolist(), chosen.labels.tolist(), chosen.tasks.tolist()) == ([2, 0], [4, 0], [7, 5])
    assert (chosen.share, chosen.padded, len(chosen)) == (0.25, True, 2)


def test_texts_padded_on_the_left_keep_their_right_end() -> None:
    values = fields(4, left=True)
    values["attention_mask"] = values["attention_mask"].flip(1)
    chosen = Batch(**values).select(torch.tensor([2]))
    assert chosen.input_ids.tolist() == [[12, 13, 14]]


def test_a_selection_of_texts_with_answers() -> None:
    targets = torch.tensor([[1, 2], [3, IGNORED], [4, 5], [6, 7]])
    chosen = AnswerBatch(**fields(4), targets=targets).select(torch.tensor([1, 2]))
    assert chosen.targets.tolist() == [[3, IGNORED], [4, 5]]
    assert chosen.tokens == 2 * 4 + 4


def test_a_selection_of_windows() -> None:
    """The positions of the terms are those in the trimmed input, in the order of the selected windows."""
    positions = torch.tensor([1, 5 + 1, 5 + 3, 10 + 2])  # one term of window 0, two of window 1, one of window 2
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 3], [0, 0, 0, 1, 1]])
    batch = WindowBatch(
        **fields(3), target_positions=positions, target_ids=torch.tensor([91, 92, 93, 94]), document_ids=documents
    )
    chosen = batch.select(torch.tensor([2, 1]))
    assert chosen.input_ids.shape == (2, 4)
    assert chosen.target_positions.tolist() == [2, 4 + 1, 4 + 3]
    assert chosen.target_ids.tolist() == [94, 92, 93]
    expected = batch.input_ids.flatten()[torch.tensor([12, 6, 8])]
    assert chosen.input_ids.flatten()[chosen.target_positions].tolist() == expected.tolist()
    assert chosen.document_ids is not None
    assert chosen.document_ids.tolist() == [[0, 0, 0, 1], [0, 1, 1, 2]]


@pytest.mark.parametrize("kind", [Batch, AnswerBatch, WindowBatch])
def test_a_selection_handles_every_field(kind: type[Batch]) -> None:
    """A new tensor field must be selected too: of all tensors, `select` returns new ones."""
    tensors = {"targets", "target_positions", "target_ids", "document_ids"} & {f.name for f in dataclasses.fields(kind)}
    extra = {
        name: torch.zeros(3, 5, dtype=torch.long) if name != "target_positions" else torch.tensor([0])
        for name in tensors
    }
    if kind is WindowBatch:
        extra["target_ids"] = torch.tensor([1])
    batch = kind(**fields(3), **extra)
    chosen = batch.select(torch.tensor([0]))
    for field in dataclasses.fields(kind):
        if isinstance(value := getattr(batch, field.name), torch.Tensor):
            assert getattr(chosen, field.name) is not value, field.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.share = 1.0
