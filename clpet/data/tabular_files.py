"""Rows of tables, from files and from the hub."""

import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpet.data.data_files import split_files, suffix
from clpet.data.decoding import decode_strictly
from clpet.data.read_report import ReadReport
from clpet.errors import DataError, first_line, suggest
from clpet.escape import safe_name, short_repr
from clpet.runtime.hub import unavailable
from clpet.runtime.json_lines import parse_rows

LARGEST_BLOCK = 2**31 - 2  # bytes that pyarrow's csv reader takes at a time


@dataclass
class Rows:
    """The rows of one split and where they came from; `bad` are those that could not be read, by their number."""

    where: str
    columns: set[str]
    values: list[dict[str, Any]]
    numbers: list[int] = field(default_factory=list)  # of the rows: lines of a jsonl file, else counted from 1
    bad: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.numbers = self.numbers or list(range(1, len(self.values) + 1))

    def fill(self, column: str, value: Any) -> None:
        """Adds a column that holds one value."""
        self.columns.add(column)
        for row in self.values:
            row[column] = value

    def need(self, *columns: str) -> None:
        """Raises DataError when a column is missing."""
        for column in columns if self.values else ():
            if column not in self.columns:
                only = next(iter(self.columns)) if len(self.columns) == 1 else ""
                hint = "; its values must be separated by commas" if {";", "\t"} & set(only) else ""
                raise DataError(f"{self.where} has no column {safe_name(column)}{suggest(column, self.columns)}{hint}")


def existing(data_dir: str | None) -> Path | None:
    """The folder that data_dir names, if it names one. Raises DataError where it is not there."""
    folder = Path(data_dir).expanduser() if data_dir else None
    if folder is not None and not folder.is_dir():
        raise DataError(f"data_dir={data_dir} is not a folder")
    return folder


def read_local(folder: Path, splits: dict[str, str], report: ReadReport | None = None) -> dict[str, Rows]:
    """{split: rows} of a folder's train, validation and test files; a single data file counts as train.

    Raises DataError when the folder or its train file is not there, or a file cannot be read.
    """
    report = report or ReadReport()
    rows = {split: _read_file(path, report) for split, path in split_files(folder, splits, report).items()}
    for part in rows.values():
        if not part.values and not part.bad:
            raise DataError(f"{part.where} has no rows; without the file its part is cut from train")
        report.read[part.where] += len(part.values) + len(part.bad)
    return rows


def _read_file(path: Path, report: ReadReport) -> Rows:
    import pyarrow

    reader = {".parquet": _parquet, ".csv": _csv}.get(suffix(path), _json)
    try:
        return reader(path, report)
    except (pyarrow.ArrowException, csv.Error, OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as {suffix(path)[1:]}: {first_line(error)[:200]}") from error


def _parquet(path: Path, report: ReadReport) -> Rows:
    import pyarrow.parquet

    _check_columns(pyarrow.parquet.read_schema(path).names, path)
    table = pyarrow.parquet.read_table(path)
    return Rows(str(path), set(table.column_names), table.to_pylist())


def _csv(path: Path, report: ReadReport) -> Rows:
    """A csv file as one block, so that a cell may be of any length. All cells are texts: labels 1 and 01 are two."""
    import pyarrow.csv

    found = decode_strictly(path.read_bytes(), path)
    report.add_decoded(path, found)
    data = found.text.encode()
    bad: dict[int, str] = {}

    def invalid(row: Any) -> str:
        lines = row.text.count("\n")
        across = f" (a quote that is not closed? it spans {lines + 1} lines)" if lines else ""
        bad[row.number - 1] = f"{row.actual_columns} cells instead of {row.expected_columns}{across}"
        return "skip"

    block = pyarrow.csv.ReadOptions(block_size=min(len(data) + 1, LARGEST_BLOCK), use_threads=False)
    options = pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=invalid)
    names = _header(found.text)
    _check_columns([name.strip() for name in names], path)
    as_text = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=True, null_values=[""]
    )
    table = pyarrow.csv.read_csv(pyarrow.BufferReader(data), block, options, as_text)
    if table.column_names != names:
        raise ValueError(f"its first row is read as {short_repr(table.column_names)} and as {short_repr(names)}")
    if padded := [name for name in names if name != name.strip()]:
        report.other_notes.append(f"spaces are removed from the column names {short_repr(padded)} of {path}")
        table = table.rename_columns([name.strip() for name in names])
    values = table.to_pylist()
    _note_swallowed_rows(values, len(names), path, report)
    numbers = [number for number in range(1, len(values) + len(bad) + 1) if number not in bad]
    return Rows(str(path), set(table.column_names), values, numbers, bad)


def _header(text: str) -> list[str]:
    """The cells of the first row. A stream of pyarrow's would do, but its thread can abort the process at exit."""
    return next((row for row in csv.reader(io.StringIO(text, newline="")) if row), [])


def _note_swallowed_rows(values: list[dict[str, Any]], width: int, path: Path, report: ReadReport) -> None:
    """Notes cells of many lines that look like rows: an odd quote begins a cell that ends with the next quote."""
    for number, row in enumerate(values, 1):
        for column, value in row.items():
            if value is None or value.count("\n") < 3:
                continue
            lines = value.splitlines()
            alike = sum(line.count(",") == width - 1 for line in lines)
            if width > 1 and 2 * alike > len(lines):
                report.other_notes.append(
                    f"{path}: column {safe_name(column)} of row {number} spans {len(lines)} lines, of which {alike} "
                    "look like rows: is a quote missing or one too many?"
                )


def _check_columns(names: list[str], path: Path) -> None:
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise DataError(f"{path} has the column {safe_name(twice[0])} twice")


def _json(path: Path, report: ReadReport) -> Rows:
    """A list of objects, or an object a line. pyarrow's own reader crashes on some lines that are no objects."""
    found = decode_strictly(path.read_bytes(), path)
    report.add_decoded(path, found)
    text = found.text
    _check_not_columns(text, path)
    rows: dict[int, dict[str, Any]] = {}
    bad: dict[int, str] = {}
    for number, row in parse_rows(text, _object):
        if not isinstance(row, dict):
            bad[number] = str(row) if isinstance(row, ValueError) else "a value that is not an object"
        elif "\\u" in text and not _encodes(row):
            bad[number] = "half of a character (a lone surrogate)"
        else:
            rows[number] = row
    columns = {column for row in rows.values() for column in row}
    values = [{column: row.get(column) for column in columns} for row in rows.values()]
    return Rows(str(path), columns, values, list(rows), bad)


def _check_not_columns(text: str, path: Path) -> None:
    """Raises DataError for a file that is a single object of lists or objects: a table written column by column."""
    if not re.match(r'\s*\{\s*"[^"\\]*"\s*:\s*[\[{]', text):
        return
    try:
        whole = json.loads(text)
    except ValueError:  # several objects, one a line
        return
    if all(isinstance(value, list | dict) for value in whole.values()):
        raise DataError(
            f"{path} is one object with the keys {short_repr(list(whole))}: a list of rows, or a row a line, is "
            "expected (in pandas: to_json(FILE, orient='records', lines=True))"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {safe_name(next(name for name in names if names.count(name) > 1))} twice")
    return found


def _encodes(row: dict[str, Any]) -> bool:
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
        what = f"the data set {name}"
        raise DataError(unavailable(what, name, error, "data_dir=FOLDER with its files", data_set=True)) from error
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
            if report:
                report.read[rows[split].where] += len(values)
    return rows


def _named(ids: Any, names: list[str]) -> Any:
    if isinstance(ids, list):
        return [_named(number, names) for number in ids]
    return names[ids] if ids >= 0 else None


def slots(column: str) -> list[str]:
    """Column names in a column knob: a bare name, or a text with {name} slots."""
    return re.findall(r"\{(\w+)\}", column) or [column]


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: null, a missing number, or spaces alone; the same in all formats."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def cell(value: Any, column: str) -> str:
    """A cell as text; an empty one is the empty text. Raises DataError for a list, an object or bytes."""
    if is_empty(value):
        return ""
    if isinstance(value, list | dict | bytes):
        kind = {list: "a list", dict: "an object"}.get(type(value), "bytes that are not UTF-8")
        raise DataError(f"{kind} in column {safe_name(column)}, where a text is needed")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with a hole is read as floats
    return str(value).replace("\r\n", "\n")


def fill(column: str, row: dict[str, Any]) -> str:
    """The text of a row: one column, or several put into a text with {name} slots.

    Raises DataError for what is not a text; a number is one only inside a text with slots.
    """
    if "{" in column:
        return re.sub(r"\{(\w+)\}", lambda slot: cell(row[slot.group(1)], slot.group(1)), column)
    value = row[column]
    if not isinstance(value, str | list | dict | bytes) and not is_empty(value):
        raise DataError(f"a {type(value).__name__} in column {safe_name(column)}, where a text is needed")
    return cell(value, column)
