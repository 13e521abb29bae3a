"""What a run answered, from its predictions after the last task: confusion matrices, macro-F1, mistakes, labels."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clpet.records import Json, Results
from clpet.reporting.run_groups import Row
from clpet.runtime.untrusted_json import as_data_error

MAX_LABELS = 60  # most labels of a task for which a confusion matrix is shown
MAX_MISTAKES = 6  # per task and run
MAX_ANSWER = 160  # characters of an answer or label
MAX_TEXT = 300  # characters of a test text
MAX_PAIRS = 60_000  # (label, prediction) pairs in one report: above, only one seed of each row has its answers shown
CONFIDENCE = "probability"  # column of the predictions with the probability of the answer

ReadTexts = Callable[[Path, Results], Mapping[int, str]]  # texts of a run's test examples by row number, if readable


def no_texts(path: Path, run: Results) -> Mapping[int, str]:
    """Leaves the texts of mistakes out of the report."""
    return {}


@dataclass
class Words:
    """Numbers words in order of first use: the page stores every label once."""

    ids: dict[str, int] = field(default_factory=dict)

    def __call__(self, word: str) -> int:
        """The number of a word."""
        return self.ids.setdefault(word[:MAX_ANSWER], len(self.ids))


@dataclass(frozen=True)
class Answer:
    """One test example: row number in the test pool, correct and predicted answer, and the probability if recorded."""

    example: int
    label: str
    prediction: str
    right: bool
    probability: float | None


def read_answers(run: Path, results: Results) -> dict[str, list[Answer]]:
    """{task: answers after the last task}; empty for a run without predictions. Raises DataError for a damaged file."""
    import pyarrow.parquet

    file = run / "predictions" / f"after-{len(results['tasks']):03d}.parquet"
    if not file.is_file():
        return {}
    answers: dict[str, list[Answer]] = {task: [] for task in results["tasks"]}
    with as_data_error(f"{file} cannot be read"):
        table = pyarrow.parquet.read_table(file)
        if not {"example", "task", "label", "prediction", "score"} <= set(table.column_names):
            return {}
        for row in table.to_pylist():
            probability = row.get(CONFIDENCE)
            answer = Answer(int(row["example"]), str(row["label"]), str(row["prediction"]), float(row["score"]) >= 1,
                            None if probability is None else float(probability))  # fmt: skip
            answers[row["task"]].append(answer)
    return answers


def pairs(answers: Sequence[Answer]) -> Counter[tuple[str, str]]:
    """Number of examples by (label, prediction)."""
    return Counter((answer.label, answer.prediction) for answer in answers)


def label_counts(answers: Sequence[Answer]) -> dict[str, tuple[int, int, int]]:
    """{label: (examples of it, times predicted, times predicted correctly)} of the task's labels, sorted."""
    support = Counter(answer.label for answer in answers)
    predicted = Counter(answer.prediction for answer in answers)
    correct = Counter(answer.label for answer in answers if answer.label == answer.prediction)
    return {label: (support[label], predicted[label], correct[label]) for label in sorted(support)}


def macro_f1(counts: Mapping[str, tuple[int, int, int]]) -> float:
    """Mean over labels of F1 = 2 correct / (examples + times predicted), in percent."""
    scores = [2 * correct / (support + predicted) for support, predicted, correct in counts.values()]
    return 100 * sum(scores) / len(scores) if scores else float("nan")


def mistakes(answers: Sequence[Answer]) -> list[Answer]:
    """The wrong answers with the highest probability; if none is recorded, one of each of the most frequent kinds."""
    wrong = [answer for answer in answers if not answer.right]
    if any(answer.probability is not None for answer in wrong):
        return sorted(wrong, key=lambda answer: -(answer.probability or 0))[:MAX_MISTAKES]
    frequency, first = pairs(wrong), dict[tuple[str, str], Answer]()
    for answer in wrong:
        first.setdefault((answer.label, answer.prediction), answer)
    return [first[pair] for pair, _ in frequency.most_common(MAX_MISTAKES)]


class AnswerData:
    """The answers of a section's runs as the page reads them: labels and texts are stored once, as numbers below."""

    def __init__(self) -> None:
        self.words, self.runs = Words(), list[Json]()
        self.texts, self.tasks_of_labels = dict[str, str](), dict[str, str]()
        self.num_pairs = self.num_left_out = 0

    def add(self, row: Row, texts: ReadTexts) -> None:
        """Adds the runs of a row: all seeds, or only the first one if the report has many answers already."""
        for path, run in row.runs:
            if self.num_pairs > MAX_PAIRS and path != row.runs[0][0]:
                self.num_left_out += 1
            elif answers := read_answers(path, run):
                tasks = [self._task(name, members) for name, members in answers.items()]
                self.runs.append({"row": row.name, "seed": run["seed"], "tasks": tasks})
                wrong = [answer.example for members in answers.values() for answer in mistakes(members)]
                readable = texts(path, run)
                self.texts |= {str(n): readable[n][:MAX_TEXT] for n in wrong if n in readable}

    def _task(self, name: str, answers: Sequence[Answer]) -> Json:
        """What the page shows of a task of a run."""
        counts, confusions = label_counts(answers), sorted(pairs(answers).items())
        labelled = len(counts) <= MAX_LABELS
        if labelled:
            self.num_pairs += len(confusions)
            self.tasks_of_labels |= {str(self.words(label)): name for label in counts}
        return {
            "task": name,
            "examples": len(answers),
            "correct": sum(answer.right for answer in answers),
            "f1": round(macro_f1(counts), 2) if labelled and counts else None,
            "labels": [[self.words(label), *numbers] for label, numbers in counts.items()] if labelled else None,
            "pairs": [[self.words(a), self.words(b), n] for (a, b), n in confusions] if labelled else None,
            "mistakes": [
                [m.example, self.words(m.label), self.words(m.prediction), m.probability and round(m.probability, 4)]
                for m in mistakes(answers)
            ],
        }

    def remarks(self) -> list[str]:
        """What was left out."""
        lines = [f"answers of {self.num_left_out} runs are not shown, to keep the file small: one seed per row is"]
        return lines if self.num_left_out else []

    def to_json(self) -> Json:
        """The data for the page."""
        words, texts = list(self.words.ids), self.texts
        return {"words": words, "tasks_of_labels": self.tasks_of_labels, "texts": texts, "runs": self.runs}
