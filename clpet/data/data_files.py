"""The files of a data folder that are read. Hidden files are ignored; all others that are not read are reported."""

import gzip
import os
import re
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path

from clpet.data.read_report import ReadReport
from clpet.errors import DataError, suggest
from clpet.escape import safe_name

TEXTS = (".parquet", ".jsonl", ".txt")  # files of plain text
TABLES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")  # files of labelled rows
COMPRESSED = (".jsonl", ".json", ".csv", ".tsv", ".txt")  # files that may also end in .gz
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
               "dev": "validation", "test": "test"}  # fmt: skip
PART = re.compile(r"([a-z]+)([-_.]?\d+)?([-_.]of[-_.]\d+)?", re.IGNORECASE)  # train, train-1, test-00000-of-00001
ABOUT = ("readme", "license", "licence")  # files about the data, not reported as unread


def file_name(path: Path) -> str:
    """The last component of a path as text, the same in every locale; invalid UTF-8 bytes are escaped."""
    return os.fsencode(path.name).decode(errors="backslashreplace")


def stem(path: Path) -> str:
    """`file_name` without the suffix, and without .gz."""
    inner = Path(path.stem) if is_compressed(path) else path
    return os.fsencode(inner.stem).decode(errors="backslashreplace")


def suffix(path: Path) -> str:
    """The suffix in lower case; that of a compressed file is the one before .gz."""
    return Path(path.stem).suffix.lower() if is_compressed(path) else path.suffix.lower()


def missing_file(path: Path) -> str:
    """The message that a path does not exist, with a similar name next to it if there is one."""
    return f"{path} does not exist{similar_file(path)}"


def similar_file(path: Path) -> str:
    """'; did you mean X?' if the folder of a missing path has a similar name X, else the empty text."""
    others = [file_name(other) for other in visible(path.parent)] if path.parent.is_dir() else []
    hint = suggest(file_name(path), others)
    return hint if hint.startswith("; did") else ""


def is_compressed(path: Path) -> bool:
    """Whether a file is a compressed table or text, such as train.csv.gz."""
    return path.suffix.lower() == ".gz" and Path(path.stem).suffix.lower() in COMPRESSED


def read_bytes(path: Path) -> bytes:
    """The contents of a file, decompressed. Raises DataError for a compressed file that is damaged."""
    data = path.read_bytes()
    try:
        return gzip.decompress(data) if is_compressed(path) else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be decompressed: {error}") from error


def visible(folder: Path) -> list[Path]:
    """Files and sub-folders sorted by name, without hidden ones (those that begin with a dot)."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def subfolders(folder: Path) -> dict[str, Path]:
    """{name: path} of the visible sub-folders."""
    return {file_name(path): path for path in visible(folder) if path.is_dir()}


def tables(folder: Path) -> list[Path]:
    """Visible files of labelled rows."""
    return [path for path in visible(folder) if suffix(path) in TABLES and path.is_file()]


def note_unread(folder: Path, read: Collection[Path], report: ReadReport) -> None:
    """Reports the files and sub-folders of a folder that are not read."""
    report.skip(folder, [_label(path, folder) for path in visible(folder) if path not in read and not _about(path)])


def split_files(folder: Path, splits: dict[str, str], report: ReadReport) -> dict[str, Path]:
    """{split: its file} of a folder of tables; a single data file that is not named after another split is train.

    In place of a folder, a file is train whatever its name. Raises DataError if train is missing or a split has two
    files.
    """
    train = splits["train"]
    if folder.is_file():
        _note_other_splits(folder, report)
        return {"train": table_file(folder)}
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: a folder with {train}.parquet (or .jsonl, .csv) is expected")
    candidates = tables(folder)
    chosen = {}
    for split, name in splits.items():
        files = [path for path in candidates if stem(path) == name]
        if len(files) > 1:
            both = " and ".join(file_name(path) for path in files)
            raise DataError(f"{folder} has {both} for one split: remove all but one of them")
        if files:
            chosen[split] = files[0]
    if "train" not in chosen:
        if len(candidates) == 1 and (other := split_of(stem(candidates[0]))) not in (None, "train"):
            raise DataError(f"{folder} has only {file_name(candidates[0])}: a {other} file is not used as train")
        if len(candidates) != 1 or chosen:
            more = f"; it has {_few(candidates)}" if candidates else ""
            raise DataError(f"{folder} has no {train}{{{','.join(TABLES)}}}, nor a single data file{more}")
        chosen = {"train": candidates[0]}
    note_unread(folder, chosen.values(), report)
    return chosen


def table_file(path: Path) -> Path:
    """The path itself. Raises DataError unless it ends like a table."""
    if suffix(path) not in TABLES:
        raise DataError(f"{path} does not end in {', '.join(TABLES)} (or these with .gz), so it is not read as a table")
    return path


def _note_other_splits(path: Path, report: ReadReport) -> None:
    others = [other for other in tables(path.parent) if other != path and split_of(stem(other))]
    if split_of(stem(path)) and others:
        report.other_notes.append(
            f"only {path} is read, and split; {_few(others)} next to it: data_dir={path.parent} reads all splits"
        )


def task_tables(folder: Path) -> dict[str, Path]:
    """{task: its folder}: the sub-folders with tables or, if there are none, {task: its file} for every table.

    Files that are named after splits are not tasks.
    """
    names = {name: path for name, path in subfolders(folder).items() if tables(path)}
    return names or {stem(path): path for path in tables(folder) if not split_of(stem(path))}


def split_of(name: str) -> str | None:
    """The split that a file name stands for, alone or as one of several parts; None for another name."""
    match = PART.fullmatch(name)
    return SPLIT_NAMES.get(match[1].lower()) if match else None


def text_files(folder: Path, report: ReadReport, root: Path | None = None) -> list[Path]:
    """Files of plain text in a folder and below it, sorted; other files are reported by their path below `root`."""
    root = root or folder
    texts: list[Path] = []
    others: list[str] = []
    for path in visible(folder):
        if path.is_dir() and not path.is_symlink():
            inner = text_files(path, report, root)
            texts += inner
            others += [] if inner else [_label(path, root)]
        elif suffix(path) in TEXTS and path.is_file():
            texts.append(path)
        elif not _about(path):
            others.append(_label(path, root))
    if texts or folder == root:  # the caller reports a folder without any text by its own name alone
        report.skip(root, others)
    return sorted(texts)


def domain_files(folder: Path, report: ReadReport) -> dict[str, list[Path]]:
    """{domain: its files}: every sub-folder with text files, and every text file, sorted; or one domain of one file.

    Raises DataError for two domains of the same name.
    """
    if folder.is_file():
        return {stem(folder): [folder]} if suffix(folder) in (*TEXTS, *TABLES) else {}
    domains: dict[str, tuple[Path, list[Path]]] = {}
    others = []
    for path in visible(folder):
        files = text_files(path, report, folder) if path.is_dir() else [path] * (suffix(path) in TEXTS)
        if not files or not path.exists():
            others += [] if _about(path) else [_label(path, folder)]
            continue
        name = file_name(path) if path.is_dir() else stem(path)
        if name in domains:
            both = f"{_label(domains[name][0], folder)} and {_label(path, folder)}"
            raise DataError(f"{folder}: {both} would both be the domain {safe_name(name)}: rename or remove one")
        domains[name] = path, files
    report.skip(folder, others)
    return {name: files for name, (_, files) in domains.items()}


def named_splits(files: list[Path], folder: Path, report: ReadReport) -> dict[str, list[Path]]:
    """{split: files} of a domain by the split that their name, or their folder's, begins with.

    Files that name no split are all returned as train, which is split later. Raises DataError for files of test or
    validation without train, and for two files with the same name.
    """
    names: dict[Path, Path] = {}
    for path in files:
        if (other := names.setdefault(path.parent / stem(path), path)) != path:
            both = f"{_label(other, folder)} and {_label(path, folder)}"
            raise DataError(f"{folder}: {both} have the same name: remove all but one of them")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        for name in (stem(path), file_name(path.parent)):
            split = SPLIT_NAMES.get(re.split(r"[-_.]", name)[0].lower())
            if split:
                by_split.setdefault(split, []).append(path)
                break
    if "train" in by_split:
        used = {path for paths in by_split.values() for path in paths}
        report.skip(folder, [_label(path, folder) for path in files if path not in used and not _about(path)])
        return by_split
    held_out = [path for path in files if split_of(stem(path)) or split_of(file_name(path.parent))]
    if held_out:
        raise DataError(f"{folder}: {_few(held_out)} has no train file next to it, and is not used as train")
    return {"train": files}


def _about(path: Path) -> bool:
    written_by_init = path.name == "benchmark" and path.is_dir() and all(suffix(p) == ".yaml" for p in path.iterdir())
    return written_by_init or stem(path).lower() in ABOUT


def _label(path: Path, folder: Path) -> str:
    inner = os.fsencode(path.relative_to(folder)).decode(errors="backslashreplace")
    return inner + ("/" if path.is_dir() else "")


def _few(paths: Iterable[Path]) -> str:
    names = [safe_name(file_name(path)) for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
