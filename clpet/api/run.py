"""Train a run from Python, and read what it has measured."""

from pathlib import Path
from typing import TYPE_CHECKING

from clpet.api.guest import guest, log_file, process_logging
from clpet.api.words import compose, overrides, run_folder
from clpet.errors import DataError

if TYPE_CHECKING:
    import pyarrow

    from clpet.api.model import Model
    from clpet.api.words import Value
    from clpet.metrics.transfer_matrix import TransferMatrix
    from clpet.records import Results


class Run:
    """A run directory, such as `clpet train` writes; `Run("outputs/...")` opens one.

    >>> run = clpet.train("method=sequential", "debug=smoke", quiet=True)
    >>> clpet.Run(run.path).matrix.tasks
    ['data', 'internet', 'running', 'files', 'code']
    """

    def __init__(self, path: "str | Path | Run") -> None:
        self.path: Path = path.path if isinstance(path, Run) else Path(path)

    def __repr__(self) -> str:
        return f"clpet.Run({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        """What `clpet show` prints: matrices, metrics and costs."""
        from clpet.escape import printable
        from clpet.reporting.show import show

        return printable(show(self.path, every_metric=False))

    @property
    def results(self) -> "Results":
        """The contents of results.json. Raises DataError for a run that has not finished."""
        from clpet.runtime.untrusted_json import read_results

        if not (self.path / "results.json").is_file():
            started = (self.path / "run.json").is_file()
            fix = "the same call of clpet.train resumes it" if started else "it has no run.json"
            raise DataError(f"{self.path} is not {'finished' if started else 'a run directory'}: {fix}")
        return read_results(self.path / "results.json")

    @property
    def matrix(self) -> "TransferMatrix":
        """The transfer matrix: `matrix.scores[i, j]` is the score on task j after i tasks.

        >>> run = clpet.train("method=sequential", "debug=smoke", quiet=True)
        >>> run.matrix.scores.shape
        (6, 5)
        """
        from clpet.metrics.transfer_matrix import TransferMatrix

        return TransferMatrix.from_json(self.results)

    @property
    def metrics(self) -> dict[str, float]:
        """The measured metrics by name; docs/metrics.md has their formulas.

        >>> run = clpet.train("method=sequential", "debug=smoke", quiet=True)
        >>> [name for name in run.metrics if name.startswith("b")]
        ['bwt', 'bwt_sapt']
        """
        from clpet.reporting.run_metrics import run_metrics

        results = self.results
        metrics = run_metrics(results, [(self.path, results)])
        return {name: value for name, value in metrics.items() if value is not None}

    def predictions(self, after: int | None = None) -> "pyarrow.Table":
        """The prediction for every test example: after `after` tasks, or all rows of the matrix.

        Columns: `after`, `example` (number of the test example), `task`, `label`, `prediction`, `own_prediction` (among
        the labels of the task only), `score`, and what the method records. Raises DataError where none are stored.

        >>> run = clpet.train("method=sequential", "debug=smoke", quiet=True)
        >>> run.predictions(after=5).num_rows
        250
        """
        import pyarrow
        import pyarrow.parquet

        name = "*" if after is None else f"{after:03d}"
        files = sorted((self.path / "predictions").glob(f"after-{name}.parquet"))
        if not files:
            row = "" if after is None else f" after {after} tasks"
            raise DataError(f"{self.path} has no predictions{row} (evaluation.predictions=true writes them)")
        tables = []
        for file in files:
            table = pyarrow.parquet.read_table(file)
            row_number = pyarrow.array([int(file.stem.removeprefix("after-"))] * len(table), pyarrow.int32())
            tables.append(table.add_column(0, "after", row_number))
        return pyarrow.concat_tables(tables, promote_options="permissive").unify_dictionaries()

    def load(self, after: int | None = None) -> "Model":
        """The model after `after` tasks, as `clpet.load` gives it."""
        from clpet.api.model import load

        return load(self.path, after=after)


def train(*words: str, quiet: bool = False, config_dir: str | Path | None = None, **options: "Value") -> Run:
    """Trains as `clpet train` does: into the same folder, resuming or showing what is already there.

    Args:
        words: words of the command line, such as "method=replay" or "train.epochs=2".
        quiet: print no progress and no tables, only warnings.
        config_dir: a folder with YAMLs and classes of your own (--config-dir of the command line).
        options: options without a dot in their names, and the command line's short ones: data_dir="my/", max_train=100.

    Raises:
        clpet.ClpetError: wrong input, or a failure of the machine, in one line.
        KeyboardInterrupt: after Ctrl-C; the progress is saved, and the same call resumes.

    With `extend=run` the settings are those of that run, and only tasks that it has not learned are learned.

    With several processes (hardware.ranks) a script needs `if __name__ == "__main__":` around the call.

    >>> run = clpet.train("method=sequential", "debug=smoke", tasks=["data", "files"], seed=1, quiet=True)
    >>> run.path.parent.name
    'sequential'
    """
    with guest(config_dir):
        named = overrides(words, options)
        cfg = compose(named)
        from clpet.config.build import parse_config

        parse_config(cfg)  # reports a wrong value before the import of torch takes seconds
        from clpet.cli.launch import launch

        out = run_folder(cfg)
        log = out / "train.log"
        with log_file(log):
            launch(cfg, out, named, quiet, process_logging(log))
        return Run(out)
