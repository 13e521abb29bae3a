"""Entity benchmarks in the layouts they are published in, made into rows of one shape.

A row holds `tokens`, the positions of what is marked (`head_pos` and `tail_pos`, or `entity_pos`) and its label.
A layout is two functions: one reads a file's records, one turns a record into rows. Records from the hub skip
the first.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from clpet.data.decoding import decode_strictly
from clpet.errors import DataError
from clpet.runtime.json_lines import parse_rows

Row = dict[str, Any]


def read_published(path: Path, layout: str) -> list[Row]:
    """The rows of one published file. Raises DataError when it is not in the layout."""
    return tidy(LAYOUTS[layout][0](path), layout, str(path))


def tidy(records: Iterable[Row], layout: str, where: str) -> list[Row]:
    """The rows of published records. Raises DataError, with the number of records read, for one that does not fit."""
    convert, number = LAYOUTS[layout][1], 0
    rows: list[Row] = []
    try:
        for number, record in enumerate(records, 1):  # noqa: B007
            rows += convert(record)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise DataError(f"{where} is not in the {layout} layout near record {max(1, number)}: {reason}") from error
    return rows


def json_records(path: Path) -> Iterator[Row]:
    """The objects of a JSON list, or of one line each."""
    text = decode_strictly(path.read_bytes(), path).text
    for _, value in parse_rows(text):
        if isinstance(value, ValueError):
            raise value
        yield value


def positions(first: int, last: int, tokens: list[str]) -> list[int]:
    """first, ..., last; ValueError unless they are places of the sentence."""
    if not 0 <= first <= last < len(tokens):
        raise ValueError(f"tokens {first} to {last} are not in a sentence of {len(tokens)}")
    return list(range(first, last + 1))


def fewrel_records(path: Path) -> Iterator[Row]:
    """FewRel: {relation: [{tokens, h: [name, id, [[positions]]], t: ...}]}, as the hub has it."""
    for relation, examples in json.loads(decode_strictly(path.read_bytes(), path).text).items():
        for example in examples:
            head, tail = ({"text": example[key][0], "indices": example[key][2]} for key in ("h", "t"))
            yield {"relation": relation, "tokens": example["tokens"], "head": head, "tail": tail}


def fewrel(record: Row) -> Iterator[Row]:
    """Every mention of head and tail, and their names; the label is the relation's id.

    A token that is a single blank is dropped, as ConPET does.
    """
    tokens = record["tokens"]
    kept = [place for place, token in enumerate(tokens) if token != " "]
    new = {place: number for number, place in enumerate(kept)}
    row = {"tokens": [tokens[place] for place in kept], "pid": record["relation"]}
    for role in ("head", "tail"):
        places = [place for mention in record[role]["indices"] for place in mention]
        row |= {role: record[role].get("text"), f"{role}_pos": [new[i] for i in places if tokens[i] != " "]}
    yield row


def fewnerd_records(path: Path) -> Iterator[Row]:
    """Few-NERD: a line `token TAB tag` a token, an empty line after each sentence."""
    lines = decode_strictly(path.read_bytes(), path).text.split("\n")
    for filled, group in groupby(lines, key=lambda line: bool(line.strip())):
        if filled:
            tokens, tags = zip(*(line.rstrip("\r").rsplit("\t", 1) for line in group), strict=True)
            yield {"tokens": list(tokens), "fine_ner_tags": list(tags)}


def fewnerd(record: Row) -> Iterator[Row]:
    """A row per mention: tags are inside or outside, so equal tags in a row are one mention."""
    for tag, group in groupby(range(len(record["tokens"])), key=lambda place: record["fine_ner_tags"][place]):
        if tag != "O":
            yield {"tokens": record["tokens"], "entity_pos": list(group), "label": tag}


def span_records(path: Path) -> Iterator[Row]:
    """OntoNotes and BBN: a line `start TAB end TAB tokens TAB label` a mention, tokens between spaces."""
    for line in decode_strictly(path.read_bytes(), path).text.split("\n"):
        if line.strip():
            start, end, tokens, label = line.rstrip("\r").split("\t")
            yield {"start": int(start), "end": int(end), "tokens": tokens.split(" "), "label": label}


def span(record: Row) -> Iterator[Row]:
    """The mention is tokens[start:end]."""
    tokens = record["tokens"]
    place = positions(record["start"], record["end"] - 1, tokens)
    yield {"tokens": tokens, "entity_pos": place, "label": record["label"]}


def tacred(record: Row) -> Iterator[Row]:
    """TACRED: the subject is the head, the object the tail, ends inclusive; odd tokens are cleaned."""
    tokens = record["token"]
    yield {
        "tokens": [cleaned(token) for token in tokens],
        "head_pos": positions(record["subj_start"], record["subj_end"], tokens),
        "tail_pos": positions(record["obj_start"], record["obj_end"], tokens),
        "label": record["relation"],
    }


def cleaned(token: str) -> str:
    """[UNK] for links and rulers, as ConPET cleans TACRED."""
    ruler = len(token) > 2 and not set(token) - set("=-*")
    return "[UNK]" if ruler or token.startswith("http") else token


def ace(record: Row) -> Iterator[Row]:
    """ACE 2005 documents of DyGIE++: places count from the document's start; the label is the subtype alone."""
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
