"""Load the weights of a run, and apply them to new texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clpet.api.guest import guest
from clpet.api.run import Run
from clpet.errors import ConfigError, suggest

if TYPE_CHECKING:
    from clpet.evaluation.text_prediction import Text
    from clpet.runs.load_run import LoadedRun


class Model:
    """The model of a run after some of its tasks; `clpet.load` and `Run.load` make it.

    `run` is the run, `after` the number of learned tasks. `loaded` has everything behind it: method, network, data.
    """

    def __init__(self, loaded: "LoadedRun") -> None:
        self.loaded = loaded
        self.run, self.after = Run(loaded.record.out), loaded.row

    def __repr__(self) -> str:
        return f"<clpet.Model: {self.loaded.method.name} after {self.after} of {len(self.tasks)} tasks>"

    @property
    def tasks(self) -> list[str]:
        """The tasks of the benchmark in training order."""
        return self.loaded.benchmark.names

    @property
    def labels(self) -> list[str]:
        """The labels learned so far, from which `predict` chooses; empty for generated answers and plain text.

        >>> run = clpet.train("method=sequential", "debug=smoke", quiet=True)
        >>> clpet.load(run).labels[:3]
        ['collections', 'decimal', 'ipaddress']
        """
        benchmark = self.loaded.benchmark
        return [benchmark.labels[label] for label in benchmark.seen_labels(self.after)]

    @property
    def scores(self) -> dict[str, float]:
        """The recorded score of every task that was measured with these weights: a row of the transfer matrix.

        >>> run = clpet.train("method=sequential", "debug=smoke", quiet=True)
        >>> list(clpet.load(run).scores)
        ['data', 'internet', 'running', 'files', 'code']
        """
        rows = zip(self.tasks, self.loaded.scores, strict=True)
        return {task: score for task, score in rows if score is not None}

    def predict(self, texts: "Sequence[Text]", task: str | None = None) -> list[str]:
        """A label or a generated answer for every text.

        Args:
            texts: texts as in the benchmark's text column. The template is applied and long texts are cut as in the
                run. If the template has more slots, rows such as {"text": ..., "premise": ...}; examples of
                `loaded.benchmark` work too.
            task: the name of the task that all texts belong to: only its labels compete. Methods that are given the
                task at test need it.

        The texts of a whole evaluation in their order get the predictions of the run bit for bit; in other batches
        scores round differently. Raises ConfigError for plain text (see `perplexity`), and before the first task.

        >>> run = clpet.train("method=sequential", "debug=smoke", quiet=True)
        >>> model = clpet.load(run)
        >>> [label in model.labels for label in model.predict(["Open a URL.", "Run a coroutine."])]
        [True, True]
        """
        from clpet.evaluation.text_prediction import as_examples, predict
        from clpet.training.trainer import quiet_libraries

        loaded = self.loaded
        with guest(), quiet_libraries():
            examples = as_examples(texts, loaded.benchmark, loaded.record.components.source, task)
            return predict(loaded.method, loaded.benchmark, examples, self.after, task)

    def perplexity(self, texts: Sequence[str]) -> list[float]:
        """The perplexity of every text under a model of plain text, end token included; lower is better.

        Each text is read by itself, from its start to its end, in windows as in the run's evaluation. Raises
        ConfigError for other objectives, and DataError for a text without a token to predict.
        """
        from clpet.evaluation.text_prediction import perplexities
        from clpet.training.trainer import quiet_libraries

        with guest(), quiet_libraries():
            return perplexities(self.loaded.method, texts)


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
        clpet.ClpetError: the run has no such weights, or its data or model are not what they were.

    >>> run = clpet.train("method=sequential", "debug=smoke", "train.snapshot_every=1", seed=1, quiet=True)
    >>> clpet.load(run.path, after=3)
    <clpet.Model: sequential after 3 of 5 tasks>
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
            return Model(load_run(read_record(Run(path).path, words, allow_plugins), after))
