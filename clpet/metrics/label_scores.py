"""Scores per label, and their mean: macro-F1."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

Label = TypeVar("Label", str, int)


class LabelCounts(NamedTuple):
    """Numbers of examples of a label, of predictions of it, and of correct ones among them."""

    examples: int
    predicted: int
    correct: int

    @property
    def f1(self) -> float:
        """F1 = 2 correct / (examples + predicted), in percent: the harmonic mean of precision and recall."""
        return 200 * self.correct / (self.examples + self.predicted)


def label_counts(labels: Sequence[Label], predictions: Sequence[Label]) -> dict[Label, LabelCounts]:
    """{label: its counts} of the labels that examples have, sorted; other predictions count as wrong only."""
    examples, predicted = Counter(labels), Counter(predictions)
    correct = Counter(label for label, prediction in zip(labels, predictions, strict=True) if label == prediction)
    return {label: LabelCounts(examples[label], predicted[label], correct[label]) for label in sorted(examples)}


def macro_f1(counts: Mapping[Label, LabelCounts]) -> float:
    """The mean of F1 over labels, in percent; NaN without labels."""
    return sum(count.f1 for count in counts.values()) / len(counts) if counts else float("nan")
