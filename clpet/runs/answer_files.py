"""The output of `clpet predict`: rows on stdout, or a csv, tsv, jsonl or parquet file, complete or not at all."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO, cast

import numpy as np

from clpet.errors import ConfigError, DataError, HostError
from clpet.escape import inline, safe_name
from clpet.runtime.atomic_io import atomic_file

Columns = Mapping[str, Sequence[object] | np.ndarray]  # one value per row
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")


def check_path(path: Path, source: str) -> None:
    """Raises ConfigError for an ending without a format, a missing folder, or the file that the texts are read from."""
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"-o {path}: the name must end in {', '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"-o {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigError(f"-o {path} is a folder")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise ConfigError(f"-o {path} would replace the input: give another name")


def check_columns(columns: Columns, path: Path) -> None:
    """Raises DataError for a column that the format of `path` cannot hold."""
    import pyarrow

    for name, values in columns.items() if path.suffix.lower() == ".parquet" else ():
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError) as error:
            message = (
                f"column {safe_name(name)} has values of several types, which parquet cannot hold: use -o NAME.jsonl"
            )
            raise DataError(message) from error


def write_file(columns: Columns, path: Path) -> None:
    """Writes the columns in the format of the ending; replaces an older file. Raises HostError if the disk refuses."""
    try:
        with atomic_file(path) as temporary:
            if path.suffix.lower() == ".parquet":
                _write_parquet(columns, temporary)
                return
            with temporary.open("w", newline="", encoding="utf-8") as file:
                if path.suffix.lower() == ".jsonl":
                    write_jsonl(columns, file)
                    return
                table = csv.writer(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", lineterminator="\n")
                table.writerow(columns)
                table.writerows(map(cell, row) for row in _rows(columns))
    except OSError as error:
        raise HostError(f"{path} cannot be written: {error.strerror or error}") from error


def _write_parquet(columns: Columns, path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()})
    pyarrow.parquet.write_table(table, path, compression="zstd")


def write_jsonl(columns: Columns, file: TextIO) -> None:
    """One object per row; NaN and infinity, which JSON does not have, are null."""
    for row in _rows(columns):
        values = {name: _json(value) for name, value in zip(columns, row, strict=True)}
        file.write(json.dumps(values, ensure_ascii=False, default=str) + "\n")


def write_tsv(columns: Columns, file: TextIO) -> None:
    """A line of names and a line per row, for terminals and pipes; control characters in cells are escaped."""
    file.write("\t".join(map(inline, columns)) + "\n")
    for row in _rows(columns):
        file.write("\t".join(inline(str(value)) for value in map(cell, row)) + "\n")


def _rows(columns: Columns) -> "zip[tuple[object, ...]]":
    """The rows; numbers of an array as Python numbers, an fp32 with as many digits as it takes to read it back."""
    as_lists = [
        [float(str(value)) for value in values] if isinstance(values, np.ndarray) else values
        for values in columns.values()
    ]
    return zip(*as_lists, strict=True)


def cell(value: object) -> object:
    """A value in a csv or tsv file: nothing for null, JSON for a list or an object."""
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


def _json(value: object) -> object:
    """The value without NaN and infinity, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    return [_json(item) for item in cast(list[object], value)] if isinstance(value, list) else value
