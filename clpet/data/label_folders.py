"""Texts that are sorted into one folder per label: LABEL/*.txt, or SPLIT/LABEL/*.txt."""

from pathlib import Path

from clpet.data.data_files import SPLIT_NAMES, file_name, note_unread, read_bytes, subfolders, suffix, tables, visible
from clpet.data.decoding import decode
from clpet.data.read_report import ReadReport
from clpet.data.tabular_files import SplitRows
from clpet.escape import short_repr


def label_folders(root: Path) -> dict[str, dict[str, Path]]:
    """{split: {label: its folder}} of a folder with at least two labels and without tables; empty for another folder.

    Folders that are not named after splits are the labels of train.
    """
    if not root.is_dir() or tables(root):
        return {}
    inner = subfolders(root)
    splits = {
        SPLIT_NAMES[name.lower()]: _with_texts(path) for name, path in inner.items() if name.lower() in SPLIT_NAMES
    }
    by_split = splits if splits.get("train") else {"train": _with_texts(root)}
    return by_split if len(by_split.get("train", {})) > 1 else {}


def _with_texts(folder: Path) -> dict[str, Path]:
    return {name: path for name, path in subfolders(folder).items() if _texts(path) and not subfolders(path)}


def _texts(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if suffix(path) == ".txt" and path.is_file()]


def labelled_texts(root: Path, report: ReadReport) -> dict[str, SplitRows]:
    """{split: rows with the columns text and label} of a folder of `label_folders`; empty for another folder."""
    by_split = label_folders(root)
    rows = {split: _rows(root, labels, report) for split, labels in by_split.items()}
    if rows:
        names = sorted({label for labels in by_split.values() for label in labels})
        report.other_notes.append(f"the labels of {root} are the names of its folders: {short_repr(names)}")
        folders = {path for labels in by_split.values() for path in labels.values()}
        note_unread(root, folders | {path.parent for path in folders}, report)
    return rows


def _rows(root: Path, labels: dict[str, Path], report: ReadReport) -> SplitRows:
    values, numbers, bad = [], [], {}
    files = [(label, path) for label, folder in labels.items() for path in _texts(folder)]
    for number, (label, path) in enumerate(files, 1):
        decoded = decode(read_bytes(path), path)
        report.add_decoded(path, decoded)
        if decoded.text.strip():
            values.append({"text": decoded.text.strip(), "label": label})
            numbers.append(number)
        else:
            bad[number] = f"an empty text ({label}/{file_name(path)})"
    for folder in labels.values():
        note_unread(folder, _texts(folder), report)
    origin = str(root)
    report.read[origin] += len(files)
    return SplitRows(origin, {"text", "label"}, values, numbers, bad)
