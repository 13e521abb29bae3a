"""Load the weights of a run, and apply them to new texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clpet.api.guest import guest
from clpet.api.run import Run
from clpet.errors import ConfigError, suggest

if TYPE_CHECKING:
    import pyarrow

    from clpet import wiring
    from clpet.data.benchmark import Benchmark
    from clpet.evaluation.text_prediction import Tasks, Text
    from clpet.methods.base import Method
    from clpet.runs.load_run import LoadedRun


class TextModel:
    """What `Model` and `Session` share: a model after some of its tasks answers texts."""

    def __init__(self, session: "wiring.Session") -> None:
        self.wired = session

    @property
    def after(self) -> int:
        """The number of tasks learned so far."""
        raise NotImplementedError

    @property
    def method(self) -> "Method":
        """The method; `method.objective` has the network, its adapters and the tokenizer."""
        return self.wired.method

    @property
    def benchmark(self) -> "Benchmark":
        """The benchmark, with all tasks and their examples."""
        return self.wired.benchmark

    @property
    def tasks(self) -> list[str]:
        """The names of the benchmark's tasks in training order."""
        return self.benchmark.names

    @property
    def labels(self) -> list[str]:
        """The labels learned so far, from which `predict` chooses; empty for generated answers and plain text.

        >>> run = clpet.train("method=sequential", "debug=smoke", quiet=True)
        >>> clpet.load(run).labels[:3]
        ['collections', 'decimal', 'ipaddress']
        """
        return [self.benchmark.labels[label] for label in self.benchmark.seen_labels(self.after)]

    def predict(self, texts: "Sequence[Text]", task: "Tasks" = None) -> list[str]:
        """A label or a generated answer for every text; `predict_table` has the probabilities, too.

        Args:
            texts: texts as in the benchmark's text column. The template is applied and long texts are cut as in the
                run. If the template has more slots, rows such as {"text": ..., "premise": ...}; examples of
                `benchmark` work too. With benchmark.chat a text is a user's turn, and a list of messages
                [{"role": ..., "content": ...}, ...] is a conversation to continue.
            task: the name of the task that all texts belong to, or a list with that of each text: only its labels
                compete. Methods that are given the task at test need it.

        The texts of a whole evaluation in their order get the predictions of the run bit for bit; in other batches
        scores round differently. After objective=preference the model writes an answer to every prompt. Raises
        ConfigError for plain text (see `perplexity`), and before the first task.

        >>> run = clpet.train("method=sequential", "debug=smoke", quiet=True)
        >>> model = clpet.load(run)
        >>> [label in model.labels for label in model.predict(["Open a URL.", "Run a coroutine."])]
        [True, True]
        """
        from clpet.evaluation.text_prediction import as_examples, predict
        from clpet.training.trainer import quiet_libraries

        with guest(), quiet_libraries():
            examples = as_examples(texts, self.benchmark, self.wired.components.source, task)
            return list(predict(self.method, self.benchmark, examples, self.after, task)["prediction"])

    def predict_table(self, texts: "Sequence[Text]", task: "Tasks" = None) -> "pyarrow.Table":
        """The columns that `clpet predict` adds to its input, one row per text; arguments as of `predict`.

        `prediction`; for labels their `probability`, the softmax among the labels that compete; `selected`, the task
        whose module answered, for methods that route texts. For plain text only `perplexity`.

        >>> run = clpet.train("method=dynamic_conpet", "debug=smoke", quiet=True)
        >>> clpet.load(run).predict_table(["Open a URL."]).column_names
        ['prediction', 'probability', 'selected']
        """
        import pyarrow

        from clpet.evaluation.text_prediction import answer_texts
        from clpet.training.trainer import quiet_libraries

        with guest(), quiet_libraries():
            source = self.wired.components.source
            return pyarrow.table(answer_texts(self.method, self.benchmark, source, texts, self.after, task))

    def perplexity(self, texts: Sequence[str]) -> list[float]:
        """The perplexity of every text under a model of plain text, end token included; lower is better.

        Each text is read by itself, from its start to its end, in windows as in the run's evaluation. Raises
        ConfigError for other objectives, and DataError for a text without a token to predict.
        """
        from clpet.evaluation.text_prediction import perplexities
        from clpet.training.trainer import quiet_libraries

        with guest(), quiet_libraries():
            return perplexities(self.method, texts)


class Model(TextModel):
    """The model of a run after some of its tasks; `clpet.load` and `Run.load` make it. `run` is its run.

    >>> run = clpet.train("method=sequential", "debug=smoke", quiet=True)
    >>> clpet.load(run)
    <clpet.Model: sequential after 5 of 5 tasks>
    """

    def __init__(self, loaded: "LoadedRun") -> None:
        super().__init__(loaded.session)
        self.run, self.loaded = Run(loaded.record.out), loaded

    def __repr__(self) -> str:
        return f"<clpet.Model: {self.method.name} after {self.after} of {len(self.tasks)} tasks>"

    @property
    def after(self) -> int:
        """The number of tasks learned so far."""
        return self.loaded.row

    @property
    def scores(self) -> dict[str, float]:
        """The recorded score of every task that was measured with these weights: a row of the transfer matrix.

        >>> run = clpet.train("method=sequential", "debug=smoke", quiet=True)
        >>> list(clpet.load(run).scores)
        ['data', 'internet', 'running', 'files', 'code']
        """
        rows = zip(self.tasks, self.loaded.scores, strict=True)
        return {task: score for task, score in rows if score is not None}


def load(
    path: str | Path | Run,
    *locations: str,
    after: int | None = None,
    config_dir: str | Path | None = None,
    allow_plugins: bool = False,
    **options: str | Path | None,
) -> Model:
    """Loads the weights of a run.

    Args:
        path: a run directory, or a `Run`.
        locations: new values of options that depend on the machine, such as "hardware.device=cpu" or "model.path=DIR".
        after: the weights after so many tasks, for which the run must have saved them (train.snapshot_every=1); None:
            the newest.
        config_dir: the folder with your own classes, if the run used some; needs `allow_plugins`.
        allow_plugins: run the classes and remote code that the run's record names. Only for runs that you trust.
        options: the same as `locations` for names without a dot: data_dir="moved/".

    Raises:
        clpet.ClpetError: the run has no such weights, or its model is not what it was.

    Where the data of the run are gone or changed, names of tasks and labels come from its record, with a warning: the
    model answers new texts, but `benchmark` has no examples.

    >>> words = ["method=sequential", "debug=smoke", "tasks=[data,files]", "train.snapshot_every=1"]
    >>> run = clpet.train(*words, quiet=True)
    >>> clpet.load(run.path, after=1)
    <clpet.Model: sequential after 1 of 2 tasks>
    """
    if config_dir is not None and not allow_plugins:
        raise ConfigError("config_dir needs allow_plugins=True, because the run's record chooses which code is run")
    with guest(config_dir):
        from clpet.runs.load_run import LOCATIONS, load_run, read_record
        from clpet.training.trainer import quiet_libraries

        words = [*locations, *(f"{key}={'' if value is None else value}" for key, value in options.items())]
        for word in words:
            if "=" not in word or not word.startswith(LOCATIONS):
                hint = suggest(word.partition("=")[0], LOCATIONS)
                raise ConfigError(f"{word!r} cannot be set when a run is loaded, only {', '.join(LOCATIONS)}*{hint}")
        with quiet_libraries():
            return Model(load_run(read_record(Run(path).path, words, allow_plugins), after, needs_data=False))
