"""Padding-free rows: the examples of a batch of prompts and answers, one behind the other in a few rows.

The examples of a row neither attend to each other nor share positions (see `clpet/objectives/document_attention.py`),
so that each is read as if it were alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clpet.data.batches import EncodedDataset, to_device

MOST_PLACES = 1.02  # places over tokens: the width of the rows grows until this is reached


@dataclass(frozen=True)
class PackedRows:
    """Token ids [rows, width]; `documents` [rows, width] number the examples of a row, padding included.

    `before` [terms] are the places, in the flattened rows, in front of the tokens to predict, example after example in
    the order of the batch.
    """

    input_ids: Tensor
    documents: Tensor
    before: Tensor


def pack_rows(pool: EncodedDataset, rows: np.ndarray, device: torch.device, one_row: bool = False) -> PackedRows:
    """Packs examples of a pool with answers; with `one_row` into a single row, without any padding."""
    assert pool.answer is not None
    lengths, bins, width = divide(pool, rows, one_row)
    ids = np.full((len(bins), width), pool.pad_id, np.int64)
    documents, before = np.zeros_like(ids), [np.empty(0, np.int64)] * len(rows)
    for index, members in enumerate(bins):
        start = 0
        for number, member in enumerate(members):
            row, end = int(rows[member]), start + int(lengths[member])
            ids[index, start:end] = np.concatenate([pool.source[row], pool.answer[row][:-1]])
            documents[index, start:end] = number
            before[member] = index * width + start + predicted(pool, row) - 1
            start = end
        documents[index, start:] = len(members)
    arrays = (ids, documents, np.concatenate(before))
    return PackedRows(*(to_device(torch.from_numpy(array), device) for array in arrays))


def divide(pool: EncodedDataset, rows: np.ndarray, one_row: bool) -> tuple[np.ndarray, list[list[int]], int]:
    """(tokens of each example, positions in `rows` of the examples of each packed row, width of the packed rows)."""
    lengths = pool.lengths[rows] - 1  # the last token of an answer is not an input
    bins = [list(range(len(rows)))] if one_row else fill(lengths)
    return lengths, bins, max(int(lengths[members].sum()) for members in bins)


def predicted(pool: EncodedDataset, row: int) -> np.ndarray:
    """Positions of the tokens to predict in an example: those of earlier answers in its prompt, and its answer."""
    assert pool.answer is not None
    length, answer = pool.source.lengths[row], np.arange(pool.answer.lengths[row])
    earlier = np.flatnonzero(pool.trained[row][1:]) + 1 if pool.trained is not None else np.empty(0, np.int64)
    return np.concatenate([earlier, length + answer])


def fill(lengths: np.ndarray) -> list[list[int]]:
    """Divides examples into rows: as wide as the longest example, or two, three, ... times that, until padding is rare.

    Narrow rows need less attention. Longest examples first, each into the first row with room for it.
    """
    longest, order = int(lengths.max()), np.argsort(-lengths, kind="stable").tolist()
    for factor in range(1, len(lengths) + 1):
        bins: list[list[int]] = []
        used: list[int] = []
        for member in order:
            length = int(lengths[member])
            index = next((i for i, total in enumerate(used) if total + length <= factor * longest), len(bins))
            if index == len(bins):
                bins.append([])
                used.append(0)
            bins[index].append(member)
            used[index] += length
        if len(bins) * max(used) <= MOST_PLACES * lengths.sum():
            return bins
    return [order]
