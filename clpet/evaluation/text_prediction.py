"""Applies a trained method to new texts, which are filled into the template and cut as those of its benchmark."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from clpet.config.schema import Decode
from clpet.data.batches import Batch, EncodedDataset
from clpet.data.benchmark import Benchmark, Example
from clpet.data.conversation import Message, example_of, question
from clpet.data.sources.base import Source
from clpet.data.traits import Traits
from clpet.errors import ConfigError, DataError, suggest
from clpet.escape import safe_name, short_repr
from clpet.methods.base import Method
from clpet.objectives.language_modeling import LanguageModeling, perplexity
from clpet.runtime.distributed import without_gradients

log = logging.getLogger(__name__)

# A text, a row with the template's slots, an example of a benchmark or, for conversations, messages.
Text = str | Mapping[str, object] | Example | Sequence[Message]
Tasks = str | Sequence[str] | None  # the task of all texts, or of each; None where it is not known
Answers = dict[str, list[str] | np.ndarray]  # columns with one value per text: `prediction`, `probability`, `selected`
Progress = Callable[[int, int], None]  # is called with the rows that are done and all rows, after every batch
UNKNOWN = -1  # task number of a text whose task is not known


def no_progress(done: int, total: int) -> None:
    """Shows nothing."""


def answer_texts(
    method: Method,
    benchmark: Benchmark,
    source: Source,
    texts: Sequence[Text],
    learned: int,
    task: Tasks = None,
    progress: Progress = no_progress,
) -> Answers:
    """What the model after `learned` tasks says about texts: `perplexity` of plain text, else what `predict` returns.

    Raises ConfigError and DataError.
    """
    if method.objective.traits.plain_text:
        check_task(method, method.objective.traits, method.objective.evaluation.decode, benchmark.names, task)
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError("a model of plain text reads texts alone, without columns")
        return {"perplexity": np.array(perplexities(method, [str(text) for text in texts], progress))}
    return predict(method, benchmark, as_examples(texts, benchmark, source, task), learned, task, progress)


def as_examples(texts: Sequence[Text], benchmark: Benchmark, source: Source, task: Tasks) -> list[Example]:
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
    pairs = zip(task_of_each(task, len(examples)), examples, strict=True)
    return [source.protect(name, [example])[0] for name, example in pairs]


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
    method: Method,
    benchmark: Benchmark,
    examples: list[Example],
    learned: int,
    task: Tasks = None,
    progress: Progress = no_progress,
) -> Answers:
    """The answers after the first `learned` tasks; with `task` only its labels compete.

    Texts of an evaluation, all of them in the same order, get the same answers bit for bit: those of its `prediction`
    without `task`, those of its `own_prediction` with the task of every text. Raises ConfigError.
    """
    objective = method.objective
    check_task(method, objective.traits, objective.evaluation.decode, benchmark.names, task)
    if objective.traits.plain_text:
        raise ConfigError("a model of plain text predicts no labels and no answers: measure texts with perplexity")
    labels = benchmark.seen_labels(learned)
    if objective.traits.has_labels and not labels and task is None:
        raise ConfigError("no labels have been learned yet: predict after one task or more, or name a task")
    columns: dict[str, list[np.ndarray]] = {}
    batches: list[np.ndarray] = []
    if examples:
        pool = new_pool(method, examples, [UNKNOWN if name is None else benchmark.names.index(name)
                                           for name in task_of_each(task, len(examples))])  # fmt: skip
        rows = np.arange(len(pool))
        method.before_evaluation(pool, rows)
        for batch_rows in method.batches(pool, rows):
            batch = pool.batch(batch_rows, objective.device)
            for name, values in _answer(method, batch, labels, task is not None).items():
                columns.setdefault(name, []).append(values)
            batches.append(batch_rows)
            progress(sum(map(len, batches)), len(rows))
        method.after_evaluation()
    return _in_order(columns, batches, benchmark)


def _answer(method: Method, batch: Batch, labels: Sequence[int], known_task: bool) -> dict[str, np.ndarray]:
    """The columns of a batch: those of the objective, and the task that the method has selected for each text."""
    choices = method.choices(batch, labels)
    predictions = method.predict(batch, choices)
    selected = {} if known_task else {key: x for key, x in predictions.extras.items() if key == "selected"}
    if known_task:
        predictions = method.predict_known_task(batch, predictions)
    columns = {**method.objective.answers(batch, predictions, choices, known_task), **selected}
    return {name: values.cpu().numpy() if torch.is_tensor(values) else values for name, values in columns.items()}


def _in_order(columns: dict[str, list[np.ndarray]], batches: list[np.ndarray], benchmark: Benchmark) -> Answers:
    """The columns of all batches in the order of the texts, with names instead of ids."""
    order = np.argsort(np.concatenate(batches)) if batches else np.arange(0)
    answers: Answers = {}
    for name, pieces in (columns or {"prediction": []}).items():
        values = np.concatenate(pieces)[order] if pieces else np.array([], dtype=object)
        names = {"prediction": benchmark.labels, "selected": benchmark.names}.get(name)
        if names is not None and np.issubdtype(values.dtype, np.integer):
            answers[name] = [names[number] for number in values.tolist()]
        else:
            answers[name] = values if np.issubdtype(values.dtype, np.floating) else values.tolist()
    return answers


def new_pool(method: Method, examples: list[Example], tasks: list[int]) -> EncodedDataset:
    """New texts, tokenised. Warns of those that are cut. Nothing about them is written to the cache folder."""
    pool = method.objective.prompts(examples, tasks)
    pool.texts = [example.text for example in examples]
    pool.cached_on_disk = False  # a program that predicts all day must not fill the disk
    if cut := pool.num_truncated(np.arange(len(pool)))[0]:
        length = method.objective.benchmark.max_length
        log.warning("%d of %d texts are cut to benchmark.max_length=%d tokens", cut, len(pool), length)
    return pool


def check_task(method: Method, traits: Traits, decode: Decode, names: Sequence[str], task: Tasks) -> None:
    """Raises ConfigError if a task is unknown, or if the method or the objective needs one and none is given."""
    for name in {task} if isinstance(task, str) else set(task or ()):
        if name not in names:
            raise ConfigError(f"unknown task {short_repr(name)}{suggest(str(name), names)}")
    if task is not None:
        return
    remedy = f"--task NAME (in Python task=NAME), one of {', '.join(map(safe_name, names))}"
    if method.task_id_at_test:
        raise ConfigError(f"method={method.name} needs the task of the texts: {remedy}")
    if traits.generates_text and decode is Decode.rank:
        raise ConfigError(f"evaluation.decode=rank chooses among the labels of a task: {remedy}")


def task_of_each(task: Tasks, count: int) -> list[str | None]:
    """The task of each of `count` texts. Raises ConfigError for another number of names."""
    names: list[str | None] = [task] * count if task is None or isinstance(task, str) else list(task)
    if len(names) != count:
        raise ConfigError(f"{len(names)} tasks for {count} texts: give one name, or one for each text")
    return names


@without_gradients()
def perplexities(method: Method, texts: Sequence[str], progress: Progress = no_progress) -> list[float]:
    """The perplexity of each text, read by itself as a document of a test split. Raises ConfigError and DataError."""
    objective = method.objective
    if not isinstance(objective, LanguageModeling):
        raise ConfigError(f"a model of {objective.name} has no perplexity: use predict")
    if isinstance(texts, str):
        raise ConfigError("perplexity takes a list of texts, not a single one: put it into a list")
    pool, text_of = objective.windows(texts)
    nll, tokens = np.zeros(len(texts)), np.zeros(len(texts))
    rows, done = np.arange(len(pool)), 0
    method.before_evaluation(pool, rows)
    for batch_rows in method.batches(pool, rows) if len(rows) else ():
        batch = pool.batch(batch_rows, objective.device)
        extras = method.predict(batch, method.choices(batch, [])).extras
        np.add.at(nll, text_of[batch_rows], extras["nll"].cpu().numpy())
        np.add.at(tokens, text_of[batch_rows], extras["tokens"].cpu().numpy())
        done += len(batch_rows)
        progress(done, len(rows))
    method.after_evaluation()
    return [perplexity(*sums) for sums in zip(nll.tolist(), tokens.tolist(), strict=True)]
