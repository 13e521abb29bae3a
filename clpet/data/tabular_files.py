"""SplitRows of tables, from local files and from the Hugging Face hub."""

import csv
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from clpet.config.schema import require
from clpet.data.csv_files import check_columns, missing_header, read_csv
from clpet.data.data_files import read_bytes, similar_file, split_files, suffix
from clpet.data.decoding import decode_strictly
from clpet.data.read_report import ReadReport
from clpet.errors import DataError, first_line, need_package, suggest
from clpet.escape import safe_name, short_repr
from clpet.records import Json
from clpet.runtime.hub import unavailable
from clpet.runtime.json_lines import parse_rows

if TYPE_CHECKING:
    import datasets

SAMPLE = 500  # rows by which a missing header is recognised

Row = dict[str, Any]  # the cells of a user's table may be anything that its format can hold


class TableLayout(NamedTuple):
    """What the bytes of a table do not say."""

    encoding: str | None = None  # of files without a byte order mark; None: UTF-8
    header: list[str] | None = None  # names of the columns of csv and tsv files without a header row


USUAL = TableLayout()


def check_encoding(name: str | None) -> None:
    """Raises ConfigError unless Python knows this encoding of text."""
    try:
        valid = name is None or bool("".encode(name).decode(name) == "")
    except (LookupError, UnicodeError):
        valid = False
    require(valid, "benchmark.encoding", name, "an encoding such as cp1252, latin-1 or shift_jis, or null")


@dataclass
class SplitRows:
    """The rows of one split, and the file or data set they come from."""

    origin: str
    columns: set[str]
    values: list[Row]
    numbers: list[int] = field(default_factory=list)  # row numbers: lines of a jsonl file, else counted from 1
    bad: dict[int, str] = field(default_factory=dict)  # row number -> error, for rows that could not be read

    def __post_init__(self) -> None:
        self.numbers = self.numbers or list(range(1, len(self.values) + 1))

    def add_column(self, column: str, value: object) -> None:
        """Adds a column with the same value in every row."""
        self.columns.add(column)
        for row in self.values:
            row[column] = value

    def require(self, *columns: str) -> None:
        """Raises DataError for missing columns. The column a.b is the key b of the objects in the column a."""
        names = dict.fromkeys(columns if self.values else ())
        missing = [name for name in names if name not in self.columns and not self._add_nested(name)]
        if missing and suffix(Path(self.origin)) in (".csv", ".tsv") and missing_header(self._first_lines()):
            width = len(self.values[0])
            raise DataError(
                f"{no_columns(self.origin, missing, ())}, and its first row looks like values: if it has no header "
                f"row, name its columns with benchmark.header=[{','.join(['NAME'] * width)}]"
            )
        if missing:
            raise DataError(no_columns(self.origin, missing, self.columns))

    def _first_lines(self) -> list[list[str]]:
        """The header and the first rows, as they are in the file."""
        rows = [list(self.values[0]), *(row.values() for row in self.values[:SAMPLE])]
        return [["" if cell is None else str(cell) for cell in row] for row in rows]

    def _add_nested(self, column: str) -> bool:
        """Adds the column a.b of the values of b in the objects of the column a; False if there are none."""
        first, *keys = column.split(".")
        values = [nested(row.get(first), keys) for row in self.values] if keys else []
        if all(value is None for value in values):
            return False
        self.columns.add(column)
        for row, value in zip(self.values, values, strict=True):
            row[column] = value
        return True


def no_columns(origin: object, missing: Iterable[str], columns: Collection[str]) -> str:
    """The message that columns are missing, each with a similar one, or with the columns that are there."""
    hints = {name: suggest(name, columns) for name in missing}
    without = [name for name, hint in hints.items() if not hint.startswith("; did")]
    parts = [f"no column {safe_name(name)}{hint if name not in without else ''}" for name, hint in hints.items()]
    return f"{origin} has {' and '.join(parts)}{hints[without[0]] if without else ''}"


def nested(value: object, keys: Sequence[str]) -> object:
    """The value below the keys of an object of objects, None if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def data_path(data_dir: str | None, single_file: bool = False) -> Path | None:
    """The path of data_dir, None if it is not set: a folder or, with `single_file`, also a file. Raises DataError."""
    path = Path(data_dir).expanduser() if data_dir else None
    if path is not None and not (path.is_dir() or (single_file and path.is_file())):
        hint = "" if path.exists() else similar_file(path)
        raise DataError(f"data_dir={data_dir} is not a folder{' or a file' * single_file}{hint}")
    return path


def read_local(
    folder: Path, splits: dict[str, str], report: ReadReport | None = None, layout: TableLayout = USUAL
) -> dict[str, SplitRows]:
    """{split: rows} of a folder's train, validation and test files; a single data file, or a file, counts as train.

    Raises DataError if the folder or its train file does not exist, or a file cannot be read.
    """
    report = report or ReadReport()
    by_split = {split: read_table(path, report, layout) for split, path in split_files(folder, splits, report).items()}
    for rows in by_split.values():
        if not rows.values and not rows.bad:
            raise DataError(f"{rows.origin} has no rows; remove the file to cut this split from train")
        report.read[rows.origin] += len(rows.values) + len(rows.bad)
    return by_split


def read_table(path: Path, report: ReadReport, layout: TableLayout = USUAL) -> SplitRows:
    """The rows of one file, by its ending. Raises DataError if it cannot be read."""
    import pyarrow

    reader = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv}.get(suffix(path), _json)
    try:
        return reader(path, report, layout)
    except (pyarrow.ArrowException, csv.Error, OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as {suffix(path)[1:]}: {first_line(error)[:200]}") from error


def _parquet(path: Path, report: ReadReport, layout: TableLayout) -> SplitRows:
    import pyarrow.parquet

    check_columns(pyarrow.parquet.read_schema(path).names, path)
    table = pyarrow.parquet.read_table(path)
    return SplitRows(str(path), set(table.column_names), table.to_pylist())


def _csv(path: Path, report: ReadReport, layout: TableLayout) -> SplitRows:
    table = read_csv(_decoded(path, report, layout), path, report, layout.header)
    return SplitRows(str(path), set(table.columns), cast(list[Row], table.values), table.numbers, table.bad)


def _decoded(path: Path, report: ReadReport, layout: TableLayout) -> str:
    decoded = decode_strictly(read_bytes(path), path, layout.encoding)
    report.add_decoded(path, decoded)
    return decoded.text


def _json(path: Path, report: ReadReport, layout: TableLayout) -> SplitRows:
    """A list of objects, or one object per line. pyarrow's own reader crashes on some lines that are not objects."""
    return json_rows(_decoded(path, report, layout), path)


def json_rows(text: str, path: Path) -> SplitRows:
    """The rows of a JSON text that `path` contains. Raises DataError and ValueError."""
    _check_not_columns(text, path)
    rows: dict[int, Row] = {}
    bad: dict[int, str] = {}
    for number, row in parse_rows(text, _object):
        if not isinstance(row, dict):
            bad[number] = str(row) if isinstance(row, ValueError) else "a value that is not an object"
        elif "\\u" in text and not _encodes(row):
            bad[number] = "half of a character (a lone surrogate)"
        else:
            rows[number] = row
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))  # in order of appearance
    values = [{column: row.get(column) for column in columns} for row in rows.values()]
    return SplitRows(str(path), set(columns), values, list(rows), bad)


def _check_not_columns(text: str, path: Path) -> None:
    """Raises DataError for a single object of lists or objects: a table that was written by columns."""
    if not re.match(r'\s*\{\s*"[^"\\]*"\s*:\s*[\[{]', text):
        return
    try:
        value = json.loads(text)
    except ValueError:  # several objects, one per line
        return
    cells = [cell for column in value.values() if isinstance(column, list) for cell in column]
    if any(isinstance(cell, dict) and "role" in cell for cell in cells):  # one row, a conversation
        return
    if all(isinstance(column, list | dict) for column in value.values()):
        raise DataError(
            f"{path} is one object with the keys {short_repr(list(value))}: a list of rows, or one row per line, is "
            "expected (in pandas: to_json(FILE, orient='records', lines=True))"
        )


def _object(pairs: list[tuple[str, Json]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {safe_name(next(name for name in names if names.count(name) > 1))} twice")
    return row


def _encodes(row: Row) -> bool:
    try:
        return bool(json.dumps(row, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def read_hub(
    name: str,
    config: str | None,
    revision: str | None,
    splits: dict[str, str],
    columns: dict[str, str],
    report: ReadReport | None = None,
) -> dict[str, SplitRows]:
    """{split: rows} of a data set on the hub (or of a local folder in its layout), with label names instead of ids."""
    need_package("datasets", "hub", f"the data set {name} of the hub", DataError)
    import datasets

    data_set = _load_data_set(name, config, revision, splits)
    first = next(iter(splits.values()))
    if first not in data_set:
        raise DataError(f"data set {name} has no split {first}{suggest(first, data_set)}")
    rows = {}
    for split, hub_split in splits.items():
        if hub_split in data_set:
            table = data_set[hub_split].rename_columns({theirs: ours for ours, theirs in columns.items()})
            values = table.to_list()
            for column, feature in table.features.items():
                label = getattr(feature, "feature", feature)  # a list of labels, or one
                if isinstance(label, datasets.ClassLabel):
                    for row in values:
                        row[column] = _label_names(row[column], label.names)
            rows[split] = SplitRows(f"{name}/{hub_split}", set(table.column_names), values)
            if report:
                report.read[rows[split].origin] += len(values)
    return rows


def _load_data_set(
    name: str, config: str | None, revision: str | None, splits: dict[str, str]
) -> "Mapping[str, datasets.Dataset]":
    import datasets

    datasets.disable_progress_bars()
    files = None
    if revision == "refs/convert/parquet":  # the hub's own conversion, where a configuration is a folder
        files = {split: f"{config or 'default'}/{split}/*.parquet" for split in splits.values()}
    try:
        loaded = datasets.load_dataset(name, None if files else config, revision=revision, data_files=files)
        return cast(Mapping[str, datasets.Dataset], loaded)
    except Exception as error:  # offline, no such id, no permission: the errors have no common type
        what = f"the data set {name}"
        raise DataError(unavailable(what, name, error, "data_dir=FOLDER with its files", data_set=True)) from error


def _label_names(ids: int | list[int], names: list[str]) -> object:
    if isinstance(ids, list):
        return [_label_names(number, names) for number in ids]
    return names[ids] if ids >= 0 else None  # -1: the hub's id for an example without a label


def column_names(column: str) -> list[str]:
    """The columns that an option such as benchmark.text reads: the column it names, or those in {name} slots."""
    return re.findall(r"\{(\w+)\}", column) or [column]


def is_empty(value: object) -> bool:
    """Whether a cell is null, NaN, or only spaces; formats differ in how they store an empty cell."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def cell_text(value: object, column: str) -> str:
    """A cell as text; an empty cell is the empty text. Raises DataError for a list, an object or bytes."""
    if is_empty(value):
        return ""
    if isinstance(value, list | dict | bytes):
        kind = {list: "a list", dict: "an object"}.get(type(value), "bytes that are not UTF-8")
        raise DataError(f"{kind} in column {safe_name(column)}, where a text is needed")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with an empty cell is read as floats
    return str(value).replace("\r\n", "\n")


def row_text(column: str, row: Row) -> str:
    """The text of a row: one column, or several inserted into a text with {name} slots.

    Raises DataError for a value that is not a text; numbers are only converted to text in slots.
    """
    if "{" in column:
        return re.sub(r"\{(\w+)\}", lambda slot: cell_text(row[slot.group(1)], slot.group(1)), column)
    value = row[column]
    if not isinstance(value, str | list | dict | bytes) and not is_empty(value):
        raise DataError(f"a {type(value).__name__} in column {safe_name(column)}, where a text is needed")
    return cell_text(value, column)
