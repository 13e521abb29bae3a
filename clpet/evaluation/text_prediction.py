"""Applies a trained method to new texts, which are filled into the template and cut as those of its benchmark."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from clpet.config.schema import Decode
from clpet.data.benchmark import Benchmark, Example
from clpet.data.conversation import Message, example_of, question
from clpet.data.sources.base import Source
from clpet.errors import ConfigError, DataError, suggest
from clpet.escape import short_repr
from clpet.methods.base import Method
from clpet.objectives.base import Predictions
from clpet.objectives.language_modeling import LanguageModeling, perplexity
from clpet.runtime.distributed import without_gradients

# A text, a row with the template's slots, an example of a benchmark or, for conversations, messages.
Text = str | Mapping[str, object] | Example | Sequence[Message]


def as_examples(texts: Sequence[Text], benchmark: Benchmark, source: Source, task: str | None) -> list[Example]:
    """The texts as examples, with the spans that benchmark.cut_last protects. Raises ConfigError.

    A row has a value for "text" and for every other slot of the template. With benchmark.chat a text is a user's turn;
    whole conversations are lists of messages, or rows with "messages" and perhaps "tools".
    """
    if isinstance(texts, str | Mapping | Example):
        raise ConfigError("predict takes a list of texts, not a single one: put it into a list")
    slots = {slot for slot in re.findall(r"\{(\w+)\}", benchmark.template) if slot not in ("text", "mask")}
    examples = []
    for text in texts:
        if isinstance(text, Example):
            examples.append(text)
            continue
        if benchmark.chat and (isinstance(text, list) or (isinstance(text, Mapping) and "messages" in text)):
            examples.append(_conversation(text))
            continue
        row = dict(text) if isinstance(text, Mapping) else {"text": text}
        if row.keys() != {"text", *slots} or not all(isinstance(value, str) for value in row.values()):
            names = ", ".join(f"{name!r}: ..." for name in ("text", *sorted(slots)))
            expected = f"a row {{{names}}}" if slots else "a text"
            raise ConfigError(f"{short_repr(text)} is not {expected}, which the template of {benchmark.name} needs")
        values = {key: str(value).replace("\r\n", "\n") for key, value in row.items()}  # as when files are read
        examples.append(Example(values.pop("text"), fields=values))
    return source.protect(task, examples)


def _conversation(talk: Sequence[Message] | Mapping[str, object]) -> Example:
    """The example of a conversation whose next turn is to be predicted. Raises ConfigError."""
    row = talk if isinstance(talk, Mapping) else {"messages": talk}
    if not row.keys() <= {"messages", "tools"}:
        raise ConfigError(f"{short_repr(talk)} is not a row of messages and tools")
    try:
        return example_of(question(row["messages"], row.get("tools")))
    except DataError as error:
        raise ConfigError(f"{short_repr(talk)} is {error}") from error


@without_gradients()
def predict(
    method: Method, benchmark: Benchmark, examples: list[Example], learned: int, task: str | None = None
) -> list[str]:
    """A label or an answer per example, after the first `learned` tasks; with `task` among its labels only.

    Texts of an evaluation, all of them in the same order, get the same predictions bit for bit. Raises ConfigError.
    """
    index = _task_index(method, benchmark, task)
    objective = method.objective
    traits = objective.traits
    if traits.plain_text:
        raise ConfigError("a model of plain text predicts no labels and no answers: measure texts with perplexity")
    if not (traits.has_labels or traits.generates_text):
        raise ConfigError(f"objective={objective.name} scores given answers: it predicts no labels and no answers")
    labels = benchmark.seen_labels(learned)
    if traits.has_labels and not labels and task is None:
        raise ConfigError("no labels have been learned yet: predict after one task or more, or name a task")
    if not examples:
        return []
    pool = objective.encode_split(examples, [-1] * len(examples), [index] * len(examples))
    pool.cached_on_disk = False  # a program that predicts all day must not fill the disk
    rows, answers = np.arange(len(pool)), np.empty(len(pool), dtype=object)
    method.before_evaluation(pool, rows)
    for batch_rows in method.batches(pool, rows):
        batch = pool.batch(batch_rows, objective.device)
        choices = method.choices(batch, labels if task is None else benchmark.task_labels(index))
        predictions = method.predict(batch, choices)
        if task is not None:
            predictions = method.predict_known_task(batch, predictions)
        answers[batch_rows] = _answers(predictions, choices.labels, benchmark.labels)
    method.after_evaluation()
    return [str(answer) for answer in answers]


def _answers(predictions: Predictions, allowed: Sequence[int], names: Sequence[str]) -> list[str]:
    """Generated texts, or the label with the highest score among those allowed, the lowest id of a tie."""
    if predictions.texts is not None:
        return predictions.texts
    assert predictions.scores is not None
    ids = torch.as_tensor(sorted(allowed), device=predictions.scores.device)
    return [names[label] for label in ids[predictions.scores[:, ids].argmax(1)].tolist()]


def _task_index(method: Method, benchmark: Benchmark, task: str | None) -> int:
    """The task's number. Raises ConfigError if it is unknown, or if the method needs one and none is given."""
    if task is None:
        if method.task_id_at_test:
            raise ConfigError(f"method={method.name} needs the task of each text: predict(texts, task=NAME)")
        if method.objective.traits.generates_text and method.objective.evaluation.decode is Decode.rank:
            raise ConfigError("evaluation.decode=rank chooses among the labels of a task: predict(texts, task=NAME)")
        return 0
    if task not in benchmark.names:
        raise ConfigError(f"unknown task {task!r}{suggest(task, benchmark.names)}")
    return benchmark.names.index(task)


@without_gradients()
def perplexities(method: Method, texts: Sequence[str]) -> list[float]:
    """The perplexity of each text, read by itself as a document of a test split. Raises ConfigError and DataError."""
    objective = method.objective
    if not isinstance(objective, LanguageModeling):
        raise ConfigError(f"a model of {objective.name} has no perplexity: use predict")
    if isinstance(texts, str):
        raise ConfigError("perplexity takes a list of texts, not a single one: put it into a list")
    pool, text_of = objective.windows(texts)
    nll, tokens = np.zeros(len(texts)), np.zeros(len(texts))
    rows = np.arange(len(pool))
    method.before_evaluation(pool, rows)
    for batch_rows in method.batches(pool, rows) if len(rows) else ():
        batch = pool.batch(batch_rows, objective.device)
        extras = method.predict(batch, method.choices(batch, [])).extras
        np.add.at(nll, text_of[batch_rows], extras["nll"].cpu().numpy())
        np.add.at(tokens, text_of[batch_rows], extras["tokens"].cpu().numpy())
    method.after_evaluation()
    return [perplexity(*sums) for sums in zip(nll.tolist(), tokens.tolist(), strict=True)]
