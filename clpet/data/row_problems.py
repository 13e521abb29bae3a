"""Problems of labelled rows, all at once: bad rows, mixed types, contradictions, repeats, rare and unseen labels."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from clpet.data.benchmark import normalize
from clpet.data.column_summary import type_name
from clpet.data.read_report import ReadReport, listed
from clpet.data.splits import label_name
from clpet.data.tabular_files import Row, SplitRows, is_empty, row_text
from clpet.errors import DataError
from clpet.escape import safe_name, short_repr

RARE = 4  # rows of a label in train below which its validation and test examples are few or none


class _Checked(NamedTuple):
    key: str  # the normalized text
    text: str
    label: str


@dataclass
class RowProblems:
    """Problems of the rows of one task."""

    bad: ReadReport = field(default_factory=ReadReport)  # rows that cannot be used
    checked: dict[str, list[_Checked]] = field(default_factory=dict)  # split -> rows that can be used
    types: Counter[str] = field(default_factory=Counter)  # of the labels

    def add(self, split: str, rows: SplitRows, text: str, label: str, labels: bool) -> None:
        """Checks the rows of a split; with `labels` their labels must be names or integers."""
        for number, row in zip(rows.numbers, rows.values, strict=True):
            try:
                checked = _checked(row, text, label, labels)
            except DataError as error:
                self.bad.add_bad_row(rows.origin, str(error), number)
                continue
            self.types[type_name(row[label])] += 1
            self.checked.setdefault(split, []).append(checked)

    def unseen(self) -> list[str]:
        """Labels of the other splits that do not occur in train."""
        return sorted({row.label for rows in self.checked.values() for row in rows} - set(self.train_labels()))

    def train_labels(self) -> Counter[str]:
        """The labels of train with their numbers of rows."""
        return Counter(row.label for row in self.checked.get("train", []))

    def describe(self, label: str, labels: bool) -> list[str]:
        """One line for each kind of problem except bad rows."""
        lines = []
        if labels and len(self.types) > 1:
            counts = ", ".join(f"{name} ({count})" for name, count in self.types.most_common())
            lines.append(f"column {safe_name(label)} mixes types: {counts}")
        lines += _repeats(self.checked, labels)
        if not labels:
            return lines
        if unseen := self.unseen():
            names = listed(map(short_repr, unseen))
            lines.append(f"labels that do not occur in train cannot be learned: {names}; they are left out")
        rows_of = self.train_labels()
        rare = [f"{short_repr(name)} ({n})" for name, n in sorted(rows_of.items()) if n < RARE]
        if len(rows_of) > 1 and rows_of.total() == len(rows_of):
            lines.append(
                f"every label occurs once: column {safe_name(label)} has {len(rows_of)} different values in "
                f"{len(rows_of)} rows of train, so it does not hold labels"
            )
        elif rare:
            lines.append(f"labels with fewer than {RARE} rows in train: {listed(rare)}")
        return lines


def _checked(row: Row, text: str, label: str, labels: bool) -> _Checked:
    """A row that can be used. Raises DataError with a noun phrase."""
    target, content = row.get(label), row_text(text, row)
    if is_empty(target):
        raise DataError("no label" if labels else "no answer")
    if labels and not isinstance(target, str | int | bool) and not (isinstance(target, float) and target.is_integer()):
        raise DataError(f"the label {short_repr(target)}, which is neither a name nor an integer")
    if not content.strip():
        raise DataError("an empty text")
    return _Checked(normalize(content), content, label_name(int(target) if isinstance(target, float) else target))


def _repeats(texts: Mapping[str, Iterable[_Checked]], labels: bool) -> list[str]:
    lines = []
    targets: dict[str, set[str]] = {}
    originals: dict[str, str] = {}
    for split, checked in texts.items():
        pairs = [(row.key, row.label) for row in checked]
        if copies := len(pairs) - len(set(pairs)):
            lines.append(f"rows of {split} that repeat an earlier text and {'label' if labels else 'answer'}: {copies}")
        for row in checked:
            targets.setdefault(row.key, set()).add(row.label)
            originals.setdefault(row.key, row.text)
    conflicts = {key: names for key, names in targets.items() if len(names) > 1}
    if conflicts and labels:
        key, names = next(iter(conflicts.items()))
        shown = " and ".join(map(short_repr, sorted(names)[:2]))
        lines.append(
            f"equal texts with different labels: {len(conflicts)}, such as {short_repr(originals[key])}: {shown}"
        )
    return lines
