"""Turns data sets as published into the parquet files that data_dir= reads.

    python scripts/prepare_data.py tacred ~/ldc/tacred/data/json data      then clpet train benchmark=tacred data_dir=data
    python scripts/prepare_data.py fewrel FewRel/data data                 train_wiki.json, val_wiki.json
    python scripts/prepare_data.py fewnerd few-nerd/supervised data        train.txt, dev.txt, test.txt
    python scripts/prepare_data.py ontonotes typing/onto data              train.txt, dev.txt, test.txt; so does bbn
    python scripts/prepare_data.py ace2005 dygiepp/ace05/json data         train.json, dev.json, test.json
    python scripts/prepare_data.py clinc150 oos-eval/data data             data_full.json
    python scripts/prepare_data.py superni natural-instructions/tasks data task*.json: a folder each

The entity benchmarks also read their published files directly (data_dir=FOLDER); prepared files load faster and
hold the examples already split. What a benchmark's files are and who has them: clpet list benchmark NAME.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from clpet.cli.options import options
from clpet.config.build import build, parse_config
from clpet.config.compose import compose_config
from clpet.config.seeding import derive
from clpet.errors import ClpetError, ConfigError, DataError, HostError, suggest
from clpet.runtime.atomic_io import atomic_file

Row = dict[str, Any]
Parts = dict[str, list[Row]]
ENTITIES = ("ace2005", "bbn", "fewnerd", "fewrel", "ontonotes", "tacred")
MOST_TRAIN, MOST_TEST = 1000, 100  # of a task of Super-NaturalInstructions, as continual-learning work samples it


def main(argv: list[str]) -> int:
    """Runs the script; a mistake is one line and exit code 2."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help=f"{', '.join((*ENTITIES, 'clinc150', 'superni'))}")
    parser.add_argument("raw", metavar="RAW", type=Path, help="folder of the published files")
    parser.add_argument("out", metavar="OUT", type=Path, help="what data_dir= will be; gets a folder for the data set")
    arguments = parser.parse_args(argv)
    try:
        for place, parts in prepared(arguments.name, arguments.raw):
            write(arguments.out / place, parts)
    except ClpetError as error:
        print(f"prepare_data: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    look = f"; look at it with: clpet data {arguments.name} data_dir={arguments.out}"
    print(f"ready for data_dir={arguments.out}{look if arguments.name in options('benchmark') else ''}")
    return 0


def prepared(name: str, raw: Path) -> Iterator[tuple[str, Parts]]:
    """(folder inside OUT, rows of train, validation and test) of the data set. Raises ClpetError."""
    if name not in (*ENTITIES, "clinc150", "superni"):
        raise ConfigError(f"there is no data set {name}{suggest(name, (*ENTITIES, 'clinc150', 'superni'))}")
    if not raw.is_dir():
        raise DataError(f"{raw} is not a folder")
    if name in ENTITIES:
        source = build(parse_config(compose_config([f"benchmark={name}"])).benchmark, "benchmark")
        yield source.folder or name, {split: rows.values for split, rows in source.rows(raw).items()}
    elif name == "clinc150":
        yield name, clinc150(raw / "data_full.json")
    else:
        paths = sorted(raw.glob("task*.json"))
        if not paths:
            raise DataError(f"{raw} holds no task*.json of Super-NaturalInstructions")
        for path in paths:
            yield f"{name}/{path.stem}", superni(path)


def clinc150(path: Path) -> Parts:
    """CLINC150 within its scope: {train: [[text, label]], val: ..., test: ...}."""
    found = published(path)
    try:
        return {
            split: [{"text": text, "label": label} for text, label in found[key]]
            for split, key in (("train", "train"), ("validation", "val"), ("test", "test"))
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not CLINC150's data_full.json: {error!r}") from error


def superni(path: Path) -> Parts:
    """A task of Super-NaturalInstructions: a seeded tenth, at most 100, for test, then a tenth of the rest."""
    found = published(path)
    try:
        definition = found["Definition"]
        definition = definition if isinstance(definition, str) else definition[0]
        distinct = {item["input"]: item for item in reversed(found["Instances"])}
        rows = [
            {"id": item["id"], "definition": definition, "input": item["input"], "output": item["output"][0],
             "references": list(item["output"])}
            for item in reversed(distinct.values())
        ]  # fmt: skip
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"{path} is not a task of Super-NaturalInstructions: {error!r}") from error
    order = np.random.default_rng(derive(0, "superni", path.stem)).permutation(len(rows))
    rows = [rows[place] for place in order]
    n_test = min(MOST_TEST, len(rows) // 10)
    rest = rows[n_test : n_test + MOST_TRAIN]
    return {"train": rest[len(rest) // 10 :], "validation": rest[: len(rest) // 10], "test": rows[:n_test]}


def published(path: Path) -> Any:
    """A JSON file's content. Raises DataError when it is not there or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there") from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error


def write(folder: Path, parts: Parts) -> None:
    """One parquet file a part, each whole or not at all; train last, for its being there says that all are."""
    if not parts["train"]:
        raise DataError(f"{folder.name} has no train examples")
    schema = pyarrow.Table.from_pylist(parts["train"]).schema  # a part may be empty
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.parquet").unlink(missing_ok=True)
        for split in ("validation", "test", "train"):
            path = folder / f"{split}.parquet"
            table = pyarrow.Table.from_pylist(parts[split], schema)
            with atomic_file(path) as temporary:
                pyarrow.parquet.write_table(table, temporary, compression="zstd")
            print(f"{path}: {len(parts[split]):,} rows", flush=True)
    except OSError as error:
        raise HostError(f"{folder} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
