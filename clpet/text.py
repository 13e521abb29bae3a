"""Text to tokens, once per split: templates, entity windows, pooled splits and length-bucketed batches."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clpet.errors import ConfigError, DataError
from clpet.tasks import SPLITS, Benchmark, Example

# Reserved vocabulary entries that can stand for the markers [m0] to [m3] and, last, for a missing mask token.
RESERVED = (
    [f"[unused{i}]" for i in range(5)],
    ["<0x00>", "<0x01>", "<0x02>", "<0x03>", "<0x05>"],
    [f"<|reserved_special_token_{i}|>" for i in range(5)],
    [f"madeupword000{i}" for i in range(3)] + ["<unk>", "<unk>"],
    [f"<extra_id_{i}>" for i in range(5)],
)
IGNORED = -100  # target id of a place that is not learned
PLAIN = ["#", "#", "@", "@", "_"]  # a vocabulary without reserved entries marks entities with signs


class Template:
    """Turns an Example into token ids: `{text}` may be cut, what stands around it never is.

    `{mask}` becomes the tokenizer's mask token, or a reserved token where there is none; it must occur exactly
    once when the representation is read there. [m0] to [m3] in a text become reserved tokens.
    """

    def __init__(
        self, tokenizer: Any, template: str, max_length: int, needs_mask: bool = False, end: bool = True
    ) -> None:
        if template.count("{text}") != 1:
            raise ConfigError(f"benchmark.template must hold {{text}} once: {template!r}")
        if needs_mask and template.count("{mask}") != 1:
            raise ConfigError(
                f"model.representation=mask needs a benchmark.template with {{mask}} once, not {template!r}; "
                "or take model.representation=mean, cls or last"
            )
        self.tokenizer, self.max_length, self.needs_mask = tokenizer, max_length, needs_mask
        self.before, self.after = template.split("{text}")
        vocabulary = tokenizer.get_vocab()
        reserved = next((names for names in RESERVED if all(name in vocabulary for name in names)), PLAIN)
        self.markers = {f"[m{i}]": name for i, name in enumerate(reserved[:4])}
        self.mask = tokenizer.mask_token or reserved[4]
        special = sorted({self.mask, *self.markers.values()} - {*PLAIN, *tokenizer.all_special_tokens})
        if special:
            tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
        self.mask_id = tokenizer.convert_tokens_to_ids(self.mask)
        self.head, self.tail = frame(tokenizer)
        if not end:  # a text that will be continued
            self.tail = []

    def encode(self, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids of each example, at most `max_length`. Raises DataError when the template alone is too long."""
        marked = [self._mark(example) for example in examples]
        befores = [self._fill(self.before, example) for example in examples]
        afters = [self._fill(self.after, example) for example in examples]
        texts = [text for text, _ in marked]
        wholes = self._tokens(
            [before + text + after for before, text, after in zip(befores, texts, afters, strict=True)]
        )
        rows = []
        for (ids, offsets), before, (text, focus) in zip(wholes, befores, marked, strict=True):
            start, end = len(before), len(before) + len(text)
            first = sum(b <= start for _, b in offsets)  # tokens of the template before the text, and after it
            last = max(first, len(ids) - sum(b > end for _, b in offsets))
            around = len(self.head) + len(self.tail) + first + len(ids) - last
            room = self.max_length - around
            if room < 1:
                raise DataError(
                    f"benchmark.max_length={self.max_length} leaves no room for a text beside the {around} tokens of "
                    "its template"
                )
            inside = [(a - start, b - start) for a, b in offsets[first:last]]
            window = [ids[first + place] for place in window_rows(inside, focus, room)]
            row = [*self.head, *ids[:first], *window, *ids[last:], *self.tail]
            if self.needs_mask and row.count(self.mask_id) != 1:
                raise DataError(f"an example holds the mask token {row.count(self.mask_id)} times, not once")
            rows.append(row)
        return rows

    def _fill(self, part: str, example: Example) -> str:
        values = {"mask": self.mask, **example.fields}
        return re.sub(r"\{(\w+)\}", lambda slot: values.get(slot.group(1), slot.group(0)), part)

    def _mark(self, example: Example) -> tuple[str, list[tuple[int, int]]]:
        text, focus = example.text, list(example.focus)
        if "[m" in text:
            for marker, token in self.markers.items():
                while (place := text.find(marker)) >= 0:
                    text = text[:place] + token + text[place + len(marker) :]
                    shift = len(token) - len(marker)
                    focus = [(a + shift * (place < a), b + shift * (place < b)) for a, b in focus]
        return text, focus

    def _tokens(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and character spans of each text's tokens; whole texts, since some tokenizers mark where one begins."""
        if not texts:
            return []
        out = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return list(zip(out["input_ids"], out["offset_mapping"], strict=True))


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens a tokenizer puts before and after one text."""
    probe = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(probe)] == probe), 0)
    return full[:start], full[start + len(probe) :]


def window_rows(offsets: Sequence[tuple[int, int]], focus: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Which tokens of a text to keep when only `room` fit: the head of it, or a window around its entities.

    The window is centred on the span of all entities; entities too far apart get half of the room each
    (ConPET, section 2 of its input template).
    """
    total = len(offsets)
    if total <= room:
        return list(range(total))
    spans = []
    for first, last in focus:
        rows = [row for row, (a, b) in enumerate(offsets) if b > first and a < last]
        if rows:
            spans.append((rows[0], rows[-1] + 1))
    if not spans:
        return list(range(room))
    start, end = min(a for a, _ in spans), max(b for _, b in spans)
    if end - start <= room:
        return _centred(start, end, room, total)
    part = room // len(spans)
    kept = {row for a, b in spans for row in _centred(a, b, part, total)}
    return sorted(kept)


def _centred(start: int, end: int, room: int, total: int) -> list[int]:
    left = max(0, min(start - max(0, room - (end - start)) // 2, total - room))
    return list(range(left, min(total, left + room)))


@dataclass
class Batch:
    """Padded token ids [batch, length] with what is needed to score them; `rows` index the pool they came from.

    Where an answer is to be learned, `targets` [batch, answer length] holds its tokens, IGNORED at padding. Where the
    text itself is, `wanted` [terms] holds the tokens to be predicted and `places` [terms] where they stand in the
    flattened input; `documents` [batch, length] numbers the documents of a window that do not see each other.
    """

    rows: np.ndarray
    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    labels: Tensor
    tasks: Tensor
    padded: bool = True
    left: bool = False  # padded on the left, for texts that are continued
    share: float = 1.0  # of the optimiser step's mean, where a step is made of several batches
    targets: Tensor | None = None
    places: Tensor | None = None
    wanted: Tensor | None = None
    documents: Tensor | None = None
    pool: "EncodedDataset | None" = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def references(self) -> list[tuple[str, ...]]:
        """The answers that count as right, per example."""
        assert self.pool is not None
        assert self.pool.references is not None
        return [self.pool.references[row] for row in self.rows]

    @property
    def sources(self) -> list[str]:
        """The texts as they were read, per example."""
        assert self.pool is not None
        assert self.pool.sources is not None
        return [self.pool.sources[row] for row in self.rows]

    @property
    def tokens(self) -> int:
        """Token places computed on, padding included."""
        return self.input_ids.numel() + (0 if self.targets is None else self.targets.numel())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value.to(device, non_blocking=True))
        return self

    def select(self, keep: Tensor) -> "Batch":
        """The examples at the given positions, re-padded to the longest of them."""
        mask = self.attention_mask[keep]
        width = int(mask.sum(1).max())
        inside = slice(-width, None) if self.left else slice(width)
        chosen = keep.tolist()
        return Batch(
            self.rows[chosen],
            self.input_ids[keep][:, inside],
            mask[:, inside],
            self.positions[keep],
            self.labels[keep],
            self.tasks[keep],
            left=self.left,
            targets=None if self.targets is None else self.targets[keep],
            pool=self.pool,
        )


def positions(mask: Tensor) -> Tensor:
    """[batch, length]: the place of each token among its row's real ones."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class Ragged:
    """Rows of token ids of any length, as one flat array with offsets."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.flat = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(self.starts[-1]))

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.starts[row] : self.starts[row + 1]]

    def padded(
        self, rows: np.ndarray, fill: int, left: bool = False, width: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids [rows, width or longest], whether a place is inside its row)."""
        lengths = self.lengths[rows][:, None]
        places = np.arange(width or int(lengths.max()))
        inside = places >= places.size - lengths if left else places < lengths
        ids = np.full(inside.shape, fill, dtype=np.int64)
        ids[inside] = np.concatenate([self[row] for row in rows])
        return ids, inside


class EncodedDataset:
    """One split of all tasks, tokenised: a label id and a task number per row, and an answer where there is one.

    `lengths` [rows] is what batches are sorted by; `weights` [rows] how many terms of a mean loss a row has.
    """

    def __init__(
        self,
        tokens: list[list[int]],
        labels: Sequence[int],
        tasks: Sequence[int],
        pad_id: int,
        mask_id: int = -1,
        answers: list[list[int]] | None = None,
        references: list[tuple[str, ...]] | None = None,
        sources: list[str] | None = None,
        left: bool = False,
    ) -> None:
        self.source = Ragged(tokens)
        self.answer = None if answers is None else Ragged(answers)
        self.references, self.sources, self.left = references, sources, left
        self.lengths = self.source.lengths + (0 if self.answer is None else self.answer.lengths)
        self.weights = np.ones(len(tokens)) if self.answer is None else self.answer.lengths.astype(float)
        self.labels = np.array(labels, dtype=np.int64)
        self.tasks = np.array(tasks, dtype=np.int64)
        self.pad_id, self.mask_id = pad_id, mask_id

    def __len__(self) -> int:
        return len(self.lengths)

    def rows_of(self, *tasks: int) -> np.ndarray:
        """Row numbers of the given tasks, in order."""
        return np.flatnonzero(np.isin(self.tasks, tasks))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that a network is given of this split."""
        found = hashlib.sha256(f"{self.pad_id} {self.mask_id}".encode())
        for part in (self.source, self.answer):
            for array in (part.flat, part.starts) if part else ():
                found.update(array.tobytes())
        return found.hexdigest()

    def tokens(self, row: int) -> np.ndarray:
        """Token ids of one row, without its answer."""
        return self.source[row]

    def batch(
        self, rows: Sequence[int] | np.ndarray, device: torch.device | str = "cpu", width: int | None = None
    ) -> Batch:
        """The rows, padded to the longest, or to `width`."""
        rows = np.asarray(rows, dtype=np.int64)
        ids, inside = self.source.padded(rows, self.pad_id, self.left, width)
        positions = np.argmax(ids == self.mask_id, axis=1)
        arrays = [ids, inside.astype(np.int64), positions, self.labels[rows], self.tasks[rows]]
        if self.answer is not None:
            arrays.append(self.answer.padded(rows, IGNORED)[0])
        input_ids, mask, places, labels, tasks, *answers = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in arrays
        )
        batch = Batch(rows, input_ids, mask, places, labels, tasks, not inside.all(), self.left, pool=self)
        batch.targets = answers[0] if answers else None
        return batch

    def by_length(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """The rows in batches of `size`, longest first, so that padding is next to nothing."""
        ordered = rows[np.argsort(-self.lengths[rows], kind="stable")]
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def shuffled(self, rows: np.ndarray, size: int, rng: np.random.Generator, chunk: int = 4) -> list[np.ndarray]:
        """One epoch: the rows shuffled, batches formed inside chunks of a few batches sorted by length."""
        order = rng.permutation(rows)
        batches: list[np.ndarray] = []
        for start in range(0, len(order), size * chunk):
            batches += self.by_length(order[start : start + size * chunk], size)
        return [batches[i] for i in rng.permutation(len(batches))]


@dataclass
class Encoded:
    """A benchmark's splits, each one pool over all tasks."""

    train: EncodedDataset
    validation: EncodedDataset
    test: EncodedDataset
    key: Callable[[int], int | str] = int  # of a task number: what its random draws are named by


def encode_benchmark(
    benchmark: Benchmark, encode: Callable[[list[Example], list[int], list[int]], EncodedDataset]
) -> Encoded:
    """Encodes every split once; `encode` gets examples, their label ids (-1 without) and their task numbers."""
    pools = {}
    for split in SPLITS:
        pairs = [(index, example) for index, task in enumerate(benchmark.tasks) for example in task.split(split)]
        labels = [benchmark.label_ids.get(str(example.target), -1) for _, example in pairs]
        pools[split] = encode([example for _, example in pairs], labels, [index for index, _ in pairs])
    return Encoded(pools["train"], pools["validation"], pools["test"])
