"""Rows of tables, from files and from the hub."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clpet.errors import DataError, suggest

NOT_UTF8 = " (it is not UTF-8)"
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


@dataclass
class Rows:
    """The rows of one split and where they came from."""

    where: str
    columns: set[str]
    values: list[dict[str, Any]]

    def fill(self, column: str, value: Any) -> None:
        """Adds a column that holds one value."""
        self.columns.add(column)
        for row in self.values:
            row[column] = value

    def need(self, *columns: str) -> None:
        """Raises DataError when a column is missing."""
        for column in columns:
            if column not in self.columns:
                only = next(iter(self.columns)) if len(self.columns) == 1 else ""
                hint = "; its values must be separated by commas" if {";", "\t"} & set(only) else ""
                raise DataError(f"{self.where} has no column {column}{suggest(column, self.columns)}{hint}")


def existing(data_dir: str | None) -> Path | None:
    """The folder that data_dir names, if it names one. Raises DataError where it is not there."""
    folder = Path(data_dir).expanduser() if data_dir else None
    if folder is not None and not folder.is_dir():
        raise DataError(f"data_dir={data_dir} is not a folder")
    return folder


def read_local(folder: Path, splits: dict[str, str]) -> dict[str, Rows]:
    """{split: rows} of a folder's train, validation and test files; a single data file counts as train.

    Raises DataError when the folder or its train file is not there, or a file cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: a folder with {splits['train']}.parquet (or .jsonl, .csv) is expected")
    found = {split: path for split, stem in splits.items() if (path := _find(folder, stem))}
    if "train" not in found:
        single = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
        if len(single) != 1:
            raise DataError(f"{folder} has no {splits['train']}{{{','.join(SUFFIXES)}}}, nor a single data file")
        found = {"train": single[0]}
    rows = {split: _read_file(path) for split, path in found.items()}
    for part in rows.values():
        if not part.values:
            raise DataError(f"{part.where} has no rows; without the file its part is cut from train")
    return rows


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()), None)


def _read_file(path: Path) -> Rows:
    import pyarrow

    reader = {".parquet": _parquet, ".csv": _csv}.get(path.suffix, _json)
    try:
        return Rows(str(path), *reader(path))
    except (pyarrow.ArrowException, OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}") from error


Table = tuple[set[str], list[dict[str, Any]]]


def _parquet(path: Path) -> Table:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return set(table.column_names), table.to_pylist()


def _csv(path: Path) -> Table:
    import pyarrow.csv

    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    names = pyarrow.csv.open_csv(path, parse_options=options).schema.names
    as_text = pyarrow.csv.ConvertOptions(  # labels 1 and 01 are two
        column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=True, null_values=[""]
    )
    table = pyarrow.csv.read_csv(path, parse_options=options, convert_options=as_text)
    return set(table.column_names), table.to_pylist()


def _json(path: Path) -> Table:
    """A list of objects, or an object a line. pyarrow's own reader crashes on some lines that are no objects."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] == "[":
        values = json.loads(text)
        names = [f"entry {number}" for number in range(1, len(values) + 1)]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        values, names = [_parsed(line, number) for number, line in lines], [f"line {number}" for number, _ in lines]
    for name, row in zip(names, values, strict=True):
        if not isinstance(row, dict):
            raise ValueError(f"{name} is no object with columns")
        if "\\u" in text and not _encodes(row):
            raise ValueError(f"{name} has half of a character (a lone surrogate)")
    columns = {column for row in values for column in row}
    return columns, [{column: row.get(column) for column in columns} for row in values]


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _encodes(row: dict[str, Any]) -> bool:
    try:
        return bool(json.dumps(row, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def read_hub(
    name: str, config: str | None, revision: str | None, splits: dict[str, str], columns: dict[str, str]
) -> dict[str, Rows]:
    """{split: rows} of a data set on the Hugging Face hub (or a local folder in its layout); label ids become names.

    Of the hub's own parquet conversion (revision refs/convert/parquet) the configuration is a folder.
    """
    import datasets

    datasets.disable_progress_bars()
    files = None
    if revision == "refs/convert/parquet":
        files = {split: f"{config or 'default'}/{split}/*.parquet" for split in splits.values()}
    try:
        found = datasets.load_dataset(name, None if files else config, revision=revision, data_files=files)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data set {name} cannot be loaded from the hub ({reason}); download it where there is a network, "
            "or say data_dir=FOLDER with its files"
        ) from error
    first = next(iter(splits.values()))
    if first not in found:
        raise DataError(f"data set {name} has no split {first}{suggest(first, found)}")
    rows = {}
    for split, hub_split in splits.items():
        if hub_split in found:
            part = found[hub_split].rename_columns({theirs: ours for ours, theirs in columns.items()})
            values = part.to_list()
            for column, feature in part.features.items():
                label = getattr(feature, "feature", feature)  # a list of labels, or one
                if isinstance(label, datasets.ClassLabel):
                    for row in values:
                        row[column] = _named(row[column], label.names)
            rows[split] = Rows(f"{name}/{hub_split}", set(part.column_names), values)
    return rows


def _named(ids: Any, names: list[str]) -> Any:
    if isinstance(ids, list):
        return [_named(number, names) for number in ids]
    return names[ids] if ids >= 0 else None


def slots(column: str) -> list[str]:
    """Column names in a column knob: a bare name, or a text with {name} slots."""
    return re.findall(r"\{(\w+)\}", column) or [column]


def fill(column: str, row: dict[str, Any]) -> str:
    """The text of a row: one column, or several put into a text with {name} slots."""
    if "{" in column:
        return re.sub(r"\{(\w+)\}", lambda slot: str(row[slot.group(1)]), column)
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"column {column} holds {value!r} where a text is needed{NOT_UTF8 * isinstance(value, bytes)}")
    return value
