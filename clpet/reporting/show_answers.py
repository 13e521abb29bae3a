"""`clpet show RUN --confusion` and `--mistakes N`: what a run answered after its last task."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from clpet.errors import DataError
from clpet.metrics.label_scores import LabelCounts, label_counts, macro_f1
from clpet.reporting.answers import Answer, mistakes, pairs, read_answers
from clpet.reporting.tables import table
from clpet.runtime.untrusted_json import read_results

MAX_COLUMNS = 12  # widest confusion matrix that is printed as a matrix; above, the most frequent confusions are listed
MAX_PAIRS = 20
SHOWN_TEXT = 80  # characters of a text


def show_answers(path: Path, confusion: bool, num_mistakes: int) -> str:
    """The tables of every task. Raises DataError for a run that is not finished or has no predictions."""
    file = path / "results.json"
    if not file.is_file():
        raise DataError(f"{path} is not the directory of a finished run: it has no results.json")
    answers = read_answers(path, read_results(file))
    if not any(answers.values()):
        raise DataError(f"{path} has no predictions of labels or answers (train with evaluation.predictions=true)")
    blocks = []
    for task, members in answers.items():
        blocks += [_confusion(task, members)] if confusion else []
        blocks += [_mistakes(task, members, num_mistakes)] if num_mistakes else []
    return "\n\n".join(blocks)


def _confusion(task: str, answers: Sequence[Answer]) -> str:
    """Accuracy and macro-F1 of a task, the figures of its labels, and which labels were predicted for which."""
    counts = label_counts([answer.label for answer in answers], [answer.prediction for answer in answers])
    correct = sum(answer.right for answer in answers)
    title = f"{task}: {correct} of {len(answers)} right ({100 * correct / max(1, len(answers)):.2f} %), "
    title += f"macro-F1 {macro_f1(counts):.2f}"
    frequent = pairs(answers)
    columns = list(dict.fromkeys([*counts, *(prediction for _, prediction in sorted(frequent))]))
    if len(columns) <= MAX_COLUMNS:
        rows = [[label, *(str(frequent[label, column] or "") for column in columns)] for label in counts]
        matrix = table(["label \\ predicted", *columns], rows)
    else:
        wrong = [(pair, n) for pair, n in frequent.most_common() if pair[0] != pair[1]]
        matrix = table(["label", "predicted", "times"], [[*pair, str(n)] for pair, n in wrong[:MAX_PAIRS]])
        matrix += f"\n({len(wrong) - MAX_PAIRS} rarer confusions not shown)" if len(wrong) > MAX_PAIRS else ""
    return f"{title}\n{_label_table(counts)}\n\n{matrix}"


def _label_table(counts: Mapping[str, LabelCounts]) -> str:
    rows = [
        [label, str(n.examples), str(n.predicted), str(n.correct),
         f"{100 * n.correct / n.predicted:.1f}" if n.predicted else "-", f"{100 * n.correct / n.examples:.1f}",
         f"{n.f1:.1f}"]
        for label, n in counts.items()
    ]  # fmt: skip
    return table(["label", "examples", "predicted", "correct", "precision", "recall", "F1"], rows)


def _mistakes(task: str, answers: Sequence[Answer], count: int) -> str:
    """The most confident wrong answers of a task; the text only if it was recorded (evaluation.keep_text=true)."""
    wrong = mistakes(answers, count)
    if not wrong:
        return f"{task}: no mistakes"
    with_text = any(answer.text is not None for answer in wrong)
    rows = [
        [str(answer.example), answer.label, answer.prediction,
         "-" if answer.probability is None else f"{answer.probability:.3f}",
         *([(answer.text or "")[:SHOWN_TEXT]] if with_text else [])]
        for answer in wrong
    ]  # fmt: skip
    header = ["test row", "label", "predicted", "probability", *(["text"] if with_text else [])]
    note = "" if with_text else "\n(evaluation.keep_text=true records the texts)"
    total = sum(not answer.right for answer in answers)
    return f"{task}: the most confident of {total} mistakes\n{table(header, rows)}{note}"
