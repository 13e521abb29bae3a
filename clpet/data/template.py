"""Text to tokens: templates, truncation, and windows around entities."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from clpet.data.benchmark import Example, Truncate
from clpet.errors import ConfigError, DataError
from clpet.models.protocols import Tokenizer

Span = tuple[int, int]
# Reserved vocabulary entries, by model family, that replace the markers [m0] to [m3] and, the last one, a missing mask
# token. Reserved entries have embeddings already, so the vocabulary does not grow.
RESERVED = (
    [f"[unused{i}]" for i in range(5)],
    ["<0x00>", "<0x01>", "<0x02>", "<0x03>", "<0x05>"],
    [f"<|reserved_special_token_{i}|>" for i in range(5)],
    [f"madeupword000{i}" for i in range(3)] + ["<unk>", "<unk>"],
    [f"<extra_id_{i}>" for i in range(5)],
)
PLAIN = ["#", "#", "@", "@", "_"]  # used instead by vocabularies without reserved entries


class Tokenised(NamedTuple):
    """Token ids of texts, and the number of tokens of each before truncation."""

    rows: list[list[int]]
    lengths: list[int]


class Template:
    """Fills a template with an Example and tokenises it; if it is too long, only `{text}` is truncated.

    `truncate` is the end of the text that is cut; the example's protected spans are cut last. `{mask}` becomes the
    tokenizer's mask token, or a reserved token if it has none; with `needs_mask` it must occur exactly once. The
    markers [m0] to [m3] in a text become reserved tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        max_length: int,
        needs_mask: bool = False,
        end: bool = True,
        truncate: Truncate = Truncate.end,
    ) -> None:
        if template.count("{text}") != 1:
            raise ConfigError(f"benchmark.template must contain {{text}} exactly once: {template!r}")
        if needs_mask and template.count("{mask}") != 1:
            raise ConfigError(
                f"model.representation=mask needs a benchmark.template that contains {{mask}} exactly once, not "
                f"{template!r}; alternatives: model.representation=mean, cls or last"
            )
        self.tokenizer, self.max_length, self.needs_mask = tokenizer, max_length, needs_mask
        self.truncate = truncate
        self.before, self.after = template.split("{text}")
        vocabulary = tokenizer.get_vocab()
        reserved = next((names for names in RESERVED if all(name in vocabulary for name in names)), PLAIN)
        self.markers = {f"[m{i}]": name for i, name in enumerate(reserved[:4])}
        self.mask = tokenizer.mask_token or reserved[4]
        special = sorted({self.mask, *self.markers.values()} - {*PLAIN, *tokenizer.all_special_tokens})
        if special:
            tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
        mask_id = tokenizer.convert_tokens_to_ids(self.mask)
        self.mask_id = -1 if mask_id is None else mask_id
        self.head, self.tail = special_tokens(tokenizer)
        if not end:  # an end token would stop a decoder from continuing the text
            self.tail = []

    def encode(self, examples: Sequence[Example]) -> Tokenised:
        """Each example as at most `max_length` tokens. Raises DataError if the template alone is too long."""
        marked = [self._mark(example) for example in examples]
        befores = [self._fill(self.before, example) for example in examples]
        afters = [self._fill(self.after, example) for example in examples]
        texts = [text for text, *_ in marked]
        filled = self._tokens(
            [before + text + after for before, text, after in zip(befores, texts, afters, strict=True)]
        )
        rows, lengths = [], []
        for (ids, offsets), before, (text, entity_spans, protected_spans) in zip(filled, befores, marked, strict=True):
            start, end = len(before), len(before) + len(text)
            first = sum(b <= start for _, b in offsets)  # tokens of the template before the text, and after it
            last = max(first, len(ids) - sum(b > end for _, b in offsets))
            around = len(self.head) + len(self.tail) + first + len(ids) - last
            room = self.max_length - around
            if room < 1:
                raise DataError(
                    f"benchmark.max_length={self.max_length} leaves no room for a text in addition to the {around} "
                    "tokens of the template"
                )
            inside = [(a - start, b - start) for a, b in offsets[first:last]]
            rows_inside = tokens_to_keep(inside, entity_spans, room, protected_spans, self.truncate)
            window = [ids[first + row] for row in rows_inside]
            row = [*self.head, *ids[:first], *window, *ids[last:], *self.tail]
            if self.needs_mask and row.count(self.mask_id) != 1:
                raise DataError(f"an example contains the mask token {row.count(self.mask_id)} times instead of once")
            rows.append(row)
            lengths.append(around + len(inside))
        return Tokenised(rows, lengths)

    def _fill(self, template: str, example: Example) -> str:
        values = {"mask": self.mask, **example.fields}
        return re.sub(r"\{(\w+)\}", lambda slot: values.get(slot.group(1), slot.group(0)), template)

    def _mark(self, example: Example) -> tuple[str, list[Span], list[Span]]:
        """The text with its markers replaced by reserved tokens, and its entity and protected spans after that."""
        text, spans = example.text, [*example.entity_spans, *example.protected_spans]
        if "[m" in text:
            for marker, token in self.markers.items():
                while (start := text.find(marker)) >= 0:
                    text = text[:start] + token + text[start + len(marker) :]
                    shift = len(token) - len(marker)
                    spans = [(a + shift * (start < a), b + shift * (start < b)) for a, b in spans]
        count = len(example.entity_spans)
        return text, spans[:count], spans[count:]

    def _tokens(self, texts: list[str]) -> list[tuple[list[int], list[Span]]]:
        """Ids and character spans of each text's tokens.

        Template and text are tokenised together: some tokenizers treat the beginning of a text specially.
        """
        if not texts:
            return []
        out = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return list(zip(out["input_ids"], out["offset_mapping"], strict=True))


def first_tokens(tokenizer: Tokenizer, add_bos: bool) -> list[int]:
    """The special tokens before a document; with `add_bos` the BOS token if the tokenizer itself adds none."""
    head, bos = special_tokens(tokenizer)[0], tokenizer.bos_token_id
    return [bos] if add_bos and not head and bos is not None else head


def special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds before and after a text."""
    probe = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(probe)] == probe), 0)
    return full[:start], full[start + len(probe) :]


def tokens_to_keep(
    offsets: Sequence[Span], entity_spans: Sequence[Span], room: int, protected_spans: Sequence[Span] = (),
    truncate: Truncate = Truncate.end,
) -> list[int]:  # fmt: skip
    """Indices of the tokens of a text to keep if only `room` of them fit.

    With entities, a window centred on the span of all of them; entities that are too far apart share the room evenly
    (ConPET, section 2 of its input template). Without, all tokens but those cut at the end that `truncate` names, where
    the tokens of `protected_spans` are the last to be cut.
    """
    total = len(offsets)
    if total <= room:
        return list(range(total))
    spans = [(rows[0], rows[-1] + 1) for span in entity_spans if (rows := _inside(offsets, span))]
    if not spans:
        protected = sorted({row for span in protected_spans for row in _inside(offsets, span)})
        protected = _shortened(protected, room, truncate)
        rest = sorted(set(range(total)).difference(protected))
        return sorted(protected + _shortened(rest, room - len(protected), truncate))
    start, end = min(a for a, _ in spans), max(b for _, b in spans)
    if end - start <= room:
        return _centred(start, end, room, total)
    share = room // len(spans)
    return sorted({row for a, b in spans for row in _centred(a, b, share, total)})


def _inside(offsets: Sequence[Span], span: Span) -> list[int]:
    """Indices of the tokens that overlap a span of characters."""
    return [row for row, (a, b) in enumerate(offsets) if b > span[0] and a < span[1]]


def _shortened(rows: list[int], room: int, truncate: Truncate) -> list[int]:
    """At most `room` of the rows, cut at the end, the start or in the middle."""
    excess = max(0, len(rows) - room)
    cut = {Truncate.end: len(rows) - excess, Truncate.start: 0, Truncate.middle: (room + 1) // 2}[truncate]
    return rows[:cut] + rows[cut + excess :]


def _centred(start: int, end: int, room: int, total: int) -> list[int]:
    before = (max(0, room - (end - start)) + 1) // 2  # rounded up: an odd token goes before the span
    left = max(0, min(start - before, total - room))
    return list(range(left, min(total, left + room)))
