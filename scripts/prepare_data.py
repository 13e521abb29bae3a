"""Converts published data sets to parquet files for data_dir=FOLDER.

    python scripts/prepare_data.py tacred ~/ldc/tacred/data/json data      then clpet train benchmark=tacred data_dir=data
    python scripts/prepare_data.py fewrel FewRel/data data                 train_wiki.json, val_wiki.json
    python scripts/prepare_data.py fewnerd few-nerd/supervised data        train.txt, dev.txt, test.txt
    python scripts/prepare_data.py ontonotes typing/onto data              train.txt, dev.txt, test.txt; bbn likewise
    python scripts/prepare_data.py ace2005 dygiepp/ace05/json data         train.json, dev.json, test.json
    python scripts/prepare_data.py clinc150 oos-eval/data data             data_full.json
    python scripts/prepare_data.py superni natural-instructions/tasks data task*.json, to one folder each

The entity benchmarks also read their published files directly (data_dir=FOLDER); prepared files load faster and are
already split. For the files of a benchmark and how to get them: clpet list benchmark NAME.
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
Splits = dict[str, list[Row]]
ENTITIES = ("ace2005", "bbn", "fewnerd", "fewrel", "ontonotes", "tacred")
MAX_TRAIN, MAX_TEST = 1000, 100  # per task of Super-NaturalInstructions, as usual in continual learning


def main(argv: list[str]) -> int:
    """Runs the script. Invalid input prints one line and returns exit code 2."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help=f"{', '.join((*ENTITIES, 'clinc150', 'superni'))}")
    parser.add_argument("raw", metavar="RAW", type=Path, help="folder with the published files")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="the folder for data_dir=; the data set becomes a sub-folder of it"
    )
    arguments = parser.parse_args(argv)
    try:
        for folder, splits in prepare(arguments.name, arguments.raw):
            write(arguments.out / folder, splits)
    except ClpetError as error:
        print(f"prepare_data: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    hint = f"; inspect it with: clpet data {arguments.name} data_dir={arguments.out}"
    print(f"ready for data_dir={arguments.out}{hint if arguments.name in options('benchmark') else ''}")
    return 0


def prepare(name: str, raw: Path) -> Iterator[tuple[str, Splits]]:
    """(folder inside OUT, rows of train, validation and test) of the data set, per task. Raises ClpetError."""
    if name not in (*ENTITIES, "clinc150", "superni"):
        raise ConfigError(f"unknown data set {name}{suggest(name, (*ENTITIES, 'clinc150', 'superni'))}")
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
            raise DataError(f"{raw} contains no task*.json of Super-NaturalInstructions")
        for path in paths:
            yield f"{name}/{path.stem}", superni(path)


def clinc150(path: Path) -> Splits:
    """CLINC150 without out-of-scope queries, from {train: [[text, label]], val: ..., test: ...}."""
    published = read_json(path)
    try:
        return {
            split: [{"text": text, "label": label} for text, label in published[key]]
            for split, key in (("train", "train"), ("validation", "val"), ("test", "test"))
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not CLINC150's data_full.json: {error!r}") from error


def superni(path: Path) -> Splits:
    """A task of Super-NaturalInstructions, without repeated inputs, in a random order that depends only on its name.

    The first tenth, at most MAX_TEST, is test; of the next MAX_TRAIN, a tenth is validation and the rest train.
    """
    published = read_json(path)
    try:
        definition = published["Definition"]
        definition = definition if isinstance(definition, str) else definition[0]
        distinct = {item["input"]: item for item in reversed(published["Instances"])}
        rows = [
            {"id": item["id"], "definition": definition, "input": item["input"], "output": item["output"][0],
             "references": list(item["output"])}
            for item in reversed(distinct.values())
        ]  # fmt: skip
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"{path} is not a task of Super-NaturalInstructions: {error!r}") from error
    order = np.random.default_rng(derive(0, "superni", path.stem)).permutation(len(rows))
    rows = [rows[index] for index in order]
    n_test = min(MAX_TEST, len(rows) // 10)
    rest = rows[n_test : n_test + MAX_TRAIN]
    return {"train": rest[len(rest) // 10 :], "validation": rest[: len(rest) // 10], "test": rows[:n_test]}


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises DataError if it does not exist or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def write(folder: Path, splits: Splits) -> None:
    """Writes one parquet file per split, atomically. Train is written last, so that its file marks a complete folder."""
    if not splits["train"]:
        raise DataError(f"{folder.name} has no train examples")
    schema = pyarrow.Table.from_pylist(splits["train"]).schema  # another split may be empty
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.parquet").unlink(missing_ok=True)
        for split in ("validation", "test", "train"):
            path = folder / f"{split}.parquet"
            table = pyarrow.Table.from_pylist(splits[split], schema)
            with atomic_file(path) as temporary:
                pyarrow.parquet.write_table(table, temporary, compression="zstd")
            print(f"{path}: {len(splits[split]):,} rows", flush=True)
    except OSError as error:
        raise HostError(f"{folder} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
