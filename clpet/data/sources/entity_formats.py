"""Converts entity benchmarks from their published layouts into rows of one form.

A row has `tokens`, the positions of the marked entities (`head_pos` and `tail_pos`, or `entity_pos`) and a label. A
layout is two functions: one reads the records of a file, one converts a record to rows. For records from the hub only
the second is used. To add a layout, write both and add them to LAYOUTS.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import cast

from clpet.data.decoding import decode_strictly
from clpet.data.tabular_files import Row
from clpet.errors import DataError
from clpet.runtime.json_lines import parse_rows


def read_published(path: Path, layout: str) -> list[Row]:
    """The rows of one published file. Raises DataError if it is not in the layout."""
    return convert(LAYOUTS[layout][0](path), layout, str(path))


def convert(records: Iterable[Row], layout: str, origin: str) -> list[Row]:
    """The rows of published records. Raises DataError, with the number of the record, for one not in the layout."""
    convert_record, number = LAYOUTS[layout][1], 0
    rows: list[Row] = []
    try:
        for number, record in enumerate(records, 1):  # noqa: B007
            rows += convert_record(record)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise DataError(f"{origin} is not in the {layout} layout near record {max(1, number)}: {reason}") from error
    return rows


def json_records(path: Path) -> Iterator[Row]:
    """The objects of a JSON list, or of JSON lines."""
    text = decode_strictly(path.read_bytes(), path).text
    for _, value in parse_rows(text):
        if isinstance(value, ValueError):
            raise value
        yield cast(Row, value)


def positions(first: int, last: int, tokens: list[str]) -> list[int]:
    """first, ..., last. Raises ValueError unless they are positions of the sentence."""
    if not 0 <= first <= last < len(tokens):
        raise ValueError(f"tokens {first} to {last} are not in a sentence of {len(tokens)}")
    return list(range(first, last + 1))


def fewrel_records(path: Path) -> Iterator[Row]:
    """FewRel: {relation: [{tokens, h: [name, id, [[positions]]], t: ...}]}, converted to the form that the hub uses."""
    for relation, examples in json.loads(decode_strictly(path.read_bytes(), path).text).items():
        for example in examples:
            head, tail = ({"text": example[key][0], "indices": example[key][2]} for key in ("h", "t"))
            yield {"relation": relation, "tokens": example["tokens"], "head": head, "tail": tail}


def fewrel(record: Row) -> Iterator[Row]:
    """Every mention of head and tail, and their names; the label is the id of the relation.

    Tokens that are a single space are dropped, as ConPET does.
    """
    tokens = record["tokens"]
    nonblank = [position for position, token in enumerate(tokens) if token != " "]
    renumbered = {old: new for new, old in enumerate(nonblank)}
    row = {"tokens": [tokens[position] for position in nonblank], "pid": record["relation"]}
    for role in ("head", "tail"):
        old_positions = [position for mention in record[role]["indices"] for position in mention]
        new_positions = [renumbered[position] for position in old_positions if tokens[position] != " "]
        row |= {role: record[role].get("text"), f"{role}_pos": new_positions}
    yield row


def fewnerd_records(path: Path) -> Iterator[Row]:
    """Few-NERD: one line `token TAB tag` per token, an empty line after each sentence."""
    lines = decode_strictly(path.read_bytes(), path).text.split("\n")
    for filled, group in groupby(lines, key=lambda line: bool(line.strip())):
        if filled:
            tokens, tags = zip(*(line.rstrip("\r").rsplit("\t", 1) for line in group), strict=True)
            yield {"tokens": list(tokens), "fine_ner_tags": list(tags)}


def fewnerd(record: Row) -> Iterator[Row]:
    """One row per mention: tags have no B/I prefix, so consecutive equal tags are one mention."""
    for tag, group in groupby(range(len(record["tokens"])), key=lambda position: record["fine_ner_tags"][position]):
        if tag != "O":
            yield {"tokens": record["tokens"], "entity_pos": list(group), "label": tag}


def span_records(path: Path) -> Iterator[Row]:
    """OntoNotes and BBN: one line `start TAB end TAB tokens TAB label` per mention, tokens separated by spaces."""
    for line in decode_strictly(path.read_bytes(), path).text.split("\n"):
        if line.strip():
            start, end, tokens, label = line.rstrip("\r").split("\t")
            yield {"start": int(start), "end": int(end), "tokens": tokens.split(" "), "label": label}


def span(record: Row) -> Iterator[Row]:
    """The mention is tokens[start:end]."""
    tokens = record["tokens"]
    entity = positions(record["start"], record["end"] - 1, tokens)
    yield {"tokens": tokens, "entity_pos": entity, "label": record["label"]}


def tacred(record: Row) -> Iterator[Row]:
    """TACRED: the subject is the head, the object the tail; end positions are inclusive. Tokens are cleaned."""
    tokens = record["token"]
    yield {
        "tokens": [cleaned(token) for token in tokens],
        "head_pos": positions(record["subj_start"], record["subj_end"], tokens),
        "tail_pos": positions(record["obj_start"], record["obj_end"], tokens),
        "label": record["relation"],
    }


def cleaned(token: str) -> str:
    """[UNK] for links and for rulers such as `-----`, as ConPET cleans TACRED."""
    ruler = len(token) > 2 and not set(token) - set("=-*")
    return "[UNK]" if ruler or token.startswith("http") else token


def ace(record: Row) -> Iterator[Row]:
    """ACE 2005 as documents of DyGIE++: positions count from the start of the document; the label is the subtype."""
    start = 0
    for tokens, relations in zip(record["sentences"], record["relations"], strict=True):
        for head, head_end, tail, tail_end, label in relations:
            yield {
                "tokens": tokens,
                "head_pos": positions(head - start, head_end - start, tokens),
                "tail_pos": positions(tail - start, tail_end - start, tokens),
                "label": label.rpartition(".")[2],
            }
        start += len(tokens)


LAYOUTS: dict[str, tuple[Callable[[Path], Iterable[Row]], Callable[[Row], Iterable[Row]]]] = {
    "fewrel": (fewrel_records, fewrel),
    "fewnerd": (fewnerd_records, fewnerd),
    "spans": (span_records, span),
    "tacred": (json_records, tacred),
    "ace": (json_records, ace),
}
