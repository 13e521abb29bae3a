"""What a run answered, from its predictions after the last task: confusion matrices, macro-F1, mistakes, labels."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clpet.metrics.label_scores import label_counts, macro_f1
from clpet.records import Json, Results
from clpet.reporting.run_groups import Row
from clpet.runtime.untrusted_json import as_data_error

MAX_LABELS = 60  # most labels of a task for which a confusion matrix is shown
MAX_MISTAKES = 6  # per task and run
MAX_ANSWER = 160  # characters of an answer or label
MAX_TEXT = 300  # characters of a test text
MAX_PAIRS = 60_000  # (label, prediction) pairs in one report: above, only one seed of each row has its answers shown
TEXT = "text"  # column of the predictions with the text
CONFIDENCE = "probability"  # column of the predictions with the probability of the answer

ReadTexts = Callable[[Path, Results], Mapping[int, str]]  # {row number: text} of a run's test examples, if readable


@dataclass
class Words:
    """Numbers texts in order of first use, cut to `max_length` characters: the page stores each of them once."""

    max_length: int
    ids: dict[str, int] = field(default_factory=dict)

    def __call__(self, text: str) -> int:
        """The number of a text."""
        text = text if len(text) <= self.max_length else f"{text[: self.max_length - 1]}…"
        return self.ids.setdefault(text, len(self.ids))


@dataclass(frozen=True)
class Answer:
    """One test example: row number, correct and predicted answer; probability and text if they were recorded."""

    example: int
    label: str
    prediction: str
    right: bool
    probability: float | None
    text: str | None = None


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
            probability, text = row.get(CONFIDENCE), row.get(TEXT)
            answer = Answer(
                example=int(row["example"]),
                label=str(row["label"]),
                prediction=str(row["prediction"]),
                right=float(row["score"]) >= 1,
                probability=None if probability is None else float(probability),
                text=None if text is None else str(text),
            )
            answers[row["task"]].append(answer)
    return answers


def pairs(answers: Sequence[Answer]) -> Counter[tuple[str, str]]:
    """Number of examples by (label, prediction)."""
    return Counter((answer.label, answer.prediction) for answer in answers)


def mistakes(answers: Sequence[Answer], count: int = MAX_MISTAKES) -> list[Answer]:
    """The wrong answers with the highest probability; if none is recorded, one of each of the most frequent kinds."""
    wrong = [answer for answer in answers if not answer.right]
    if any(answer.probability is not None for answer in wrong):
        return sorted(wrong, key=lambda answer: -(answer.probability or 0))[:count]
    frequency, first = pairs(wrong), dict[tuple[str, str], Answer]()
    for answer in wrong:
        first.setdefault((answer.label, answer.prediction), answer)
    return [first[pair] for pair, _ in frequency.most_common(count)]


class AnswerData:
    """The answers of a section's runs as the page reads them: labels and texts are stored once, as numbers below."""

    def __init__(self) -> None:
        self.words, self.texts = Words(MAX_ANSWER), Words(MAX_TEXT)
        self.runs, self.tasks_of_labels = list[Json](), dict[str, str]()
        self.num_pairs = self.num_left_out = 0

    def add(self, row: Row, texts: ReadTexts) -> None:
        """Adds the runs of a row: all seeds, or only the first one if the report has many answers already."""
        for path, run in row.runs:
            if self.num_pairs > MAX_PAIRS and path != row.runs[0][0]:
                self.num_left_out += 1
            elif answers := read_answers(path, run):
                wrong = {name: mistakes(members) for name, members in answers.items()}
                unread = any(answer.text is None for members in wrong.values() for answer in members)
                readable = texts(path, run) if unread else {}
                tasks = [self._task(name, members, wrong[name], readable) for name, members in answers.items()]
                self.runs.append({"row": row.name, "seed": run["seed"], "tasks": tasks})

    def _task(self, name: str, answers: Sequence[Answer], wrong: list[Answer], readable: Mapping[int, str]) -> Json:
        """What the page shows of a task of a run."""
        labels, predictions = [answer.label for answer in answers], [answer.prediction for answer in answers]
        counts, confusions = label_counts(labels, predictions), sorted(pairs(answers).items())
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
            "mistakes": [self._mistake(answer, readable) for answer in wrong],
        }

    def _mistake(self, answer: Answer, readable: Mapping[int, str]) -> Json:
        """[row number, label, prediction, probability or None, text or None]."""
        text = readable.get(answer.example) if answer.text is None else answer.text
        probability = None if answer.probability is None else round(answer.probability, 4)
        words = self.words(answer.label), self.words(answer.prediction)
        return [answer.example, *words, probability, None if text is None else self.texts(text)]

    def remarks(self) -> list[str]:
        """What was left out."""
        lines = [f"answers of {self.num_left_out} runs are not shown, to keep the file small: one seed per row is"]
        return lines if self.num_left_out else []

    def to_json(self) -> Json:
        """The data for the page."""
        words, texts = list(self.words.ids), list(self.texts.ids)
        return {"words": words, "tasks_of_labels": self.tasks_of_labels, "texts": texts, "runs": self.runs}
