"""The transfer matrix, and every continual-learning metric computed from it alone.

Rows are training time (row 0 before any training), columns are tasks; R[i, j] is the score on task j after
task i, in percent for accuracies. A metric whose entries were not measured is None.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from clpet.records import MatrixRecord, Metrics, Rows

CONVENTIONS = {
    "average": "mean_j R[T,j]",
    "whole": "100 * correct over all test examples / all test examples, after task T",
    "average_incremental": "mean_i mean_{j<=i} R[i,j]",
    "learning_accuracy": "mean_j R[j,j]",
    "bwt": "mean_{j<T} (R[T,j] - R[j,j]), divided by T-1",
    "bwt_sapt": "sum_{j<T} (R[T,j] - R[j,j]) / T",
    "fwt": "mean_{j>=2} (R[j-1,j] - R[0,j])",
    "fwt_zero_shot": "mean_{j>=2} R[j-1,j]",
    "fwt_single_task": "mean_j (R[j,j] - s_j), s_j = own score of an independent run",
    "forgetting": "mean_{j<T} (max_{j<=i<T} R[i,j] - R[T,j])",
    "intransigence": "mean_j (J_j - R[j,j]), J_j = score of task j in a joint run",
}
NEEDS = {"fwt_single_task": "independent", "intransigence": "joint"}


def _mean(values: np.ndarray | Sequence[float]) -> float | None:
    array = np.asarray(values, dtype=float)
    return None if array.size == 0 or np.isnan(array).any() else float(array.mean())


@dataclass
class TransferMatrix:
    """scores[T+1, T], NaN where not measured; `correct` and `total` [T+1, T] hold the counts behind them.

    For perplexities (direction lower) these are negative log-likelihoods and predicted tokens.
    """

    tasks: list[str]
    direction: str = "higher"
    scores: np.ndarray = field(default_factory=lambda: np.empty(0))
    correct: np.ndarray = field(default_factory=lambda: np.empty(0))
    total: np.ndarray = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        shape = (len(self.tasks) + 1, len(self.tasks))
        for name in ("scores", "correct", "total"):
            if getattr(self, name).size == 0:
                setattr(self, name, np.full(shape, np.nan))

    def __len__(self) -> int:
        return len(self.tasks)

    def record(self, row: int, column: int, value: float, correct: float, total: float) -> None:
        """Sets one entry."""
        self.scores[row, column], self.correct[row, column], self.total[row, column] = value, correct, total

    @property
    def backward(self) -> np.ndarray:
        """B[i,j] = R[i,j] - R[j,j] for j < i: the effect of later tasks on task j."""
        rows, columns = np.indices(self.scores.shape)
        return np.where(columns < rows - 1, self.scores - self._diagonal(), np.nan)

    @property
    def forward(self) -> np.ndarray:
        """F[i,j] = R[i,j] - R[0,j] for j > i: the effect of earlier tasks on task j before it is learned."""
        rows, columns = np.indices(self.scores.shape)
        return np.where((columns >= rows) & (rows > 0), self.scores - self.scores[0], np.nan)

    def _diagonal(self) -> np.ndarray:
        return np.array([self.scores[j + 1, j] for j in range(len(self))])

    def average(self, row: int = -1, seen: int | None = None) -> float | None:
        """mean_j R[row,j], over the first `seen` tasks."""
        return _mean(self.scores[row, :seen])

    def micro_average(self, row: int = -1, seen: int | None = None) -> float | None:
        """100 * correct / total over the examples of the first `seen` tasks; for perplexities exp(nll / tokens)."""
        total = self.total[row, :seen].sum()
        if np.isnan(total) or total == 0:
            return None
        share = self.correct[row, :seen].sum() / total
        return float(100 * share if self.direction == "higher" else np.exp(share))

    def average_incremental(self) -> float | None:
        """The mean over time of the average accuracy on the tasks seen so far."""
        return _mean([_nan(self.average(i, i)) for i in range(1, len(self) + 1)])

    def backward_transfer(self) -> float | None:
        """BWT, the mean of B's last row; None for a single task."""
        return _mean(self.backward[-1, :-1])

    def forward_transfer(self) -> float | None:
        """FWT, the mean of F just right of the diagonal; None for a single task."""
        return _mean([self.forward[j, j] for j in range(1, len(self))])

    def forgetting(self) -> float | None:
        """Mean drop of earlier tasks from their best score; for perplexities the rise, so that more is always worse."""
        sign = 1.0 if self.direction == "higher" else -1.0
        best = [np.max(sign * self.scores[j + 1 : -1, j]) for j in range(len(self) - 1)]
        return _mean([b - sign * self.scores[-1, j] for j, b in enumerate(best)])

    def learning_accuracy(self) -> float | None:
        """mean_j R[j,j]."""
        return _mean(self._diagonal())

    @property
    def separate(self) -> bool:
        """Whether every task has a model of its own (method=dapt): nothing but the diagonal is measured."""
        return len(self) > 1 and bool((np.isfinite(self.total[1:]) == np.eye(len(self), dtype=bool)).all())

    def final(self) -> float | None:
        """What a run is compared by: its average after the last task; of separate models the mean of the diagonal."""
        return self.learning_accuracy() if self.separate else self.average()

    def metrics(self, independent: "TransferMatrix | None" = None, joint: "TransferMatrix | None" = None) -> Metrics:
        """Every metric of CONVENTIONS by name; the two that need a reference run are None without it."""
        backward = self.backward[-1, :-1]
        gain = None if independent is None else self._diagonal() - independent._aligned(self, independent._diagonal())
        short = None if joint is None else joint._aligned(self, joint.scores[-1]) - self._diagonal()
        if self.direction == "lower":  # positive where the run is worse than joint, as for accuracies
            short = None if short is None else -short
        return {
            "average": self.average(),
            "whole": self.micro_average(),
            "average_incremental": self.average_incremental(),
            "learning_accuracy": self.learning_accuracy(),
            "bwt": self.backward_transfer(),
            "bwt_sapt": None if _mean(backward) is None else float(backward.sum() / len(self)),
            "fwt": self.forward_transfer(),
            "fwt_zero_shot": _mean([self.scores[j, j] for j in range(1, len(self))]),
            "fwt_single_task": None if gain is None else _mean(gain),
            "forgetting": self.forgetting(),
            "intransigence": None if short is None else _mean(short),
        }

    def _aligned(self, other: "TransferMatrix", values: np.ndarray) -> np.ndarray:
        by_name = dict(zip(self.tasks, values, strict=True))
        return np.array([by_name.get(task, np.nan) for task in other.tasks])

    def to_json(self) -> MatrixRecord:
        """Plain lists, None for NaN; exact, since Python prints floats in full."""
        scores, correct, total = tolist(self.scores), tolist(self.correct), tolist(self.total)
        return {"tasks": self.tasks, "direction": self.direction, "scores": scores, "correct": correct, "total": total}

    @classmethod
    def from_json(cls, value: MatrixRecord, scores: Rows | None = None) -> "TransferMatrix":
        """Restores what `to_json` returned; `scores` replace those of the record."""
        scores = value["scores"] if scores is None else scores
        arrays = (np.array(rows, dtype=float) for rows in (scores, value["correct"], value["total"]))
        return cls(list(value["tasks"]), value["direction"], *arrays)


def on_split(benchmark: str, split: str) -> str:
    """The name of a benchmark next to scores; the split is added unless it is test."""
    return benchmark if split == "test" else f"{benchmark} ({split})"


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def tolist(array: np.ndarray) -> Rows:
    """Nested lists with None for NaN."""
    return [[None if value != value else value.item() for value in row] for row in array]


def round2(value: float | None) -> str:
    """A number as it is printed; - if it is missing."""
    return "-" if value is None or value != value else f"{value:.2f}"
