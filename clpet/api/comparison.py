"""Compare finished runs: the figures of `clpet runs --compare` as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clpet.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow


def compare(
    folder: str | Path = "outputs",
    by: str | Sequence[str] = "method",
    metrics: Sequence[str] = (),
    view: Literal["all", "own"] = "all",
    benchmark: str | None = None,
    best_by_validation: bool = False,
) -> "pyarrow.Table":
    """The figures of `clpet runs FOLDER --compare BY`, one row each, over the seeds of every setting.

    Args:
        folder: the output folder of the runs.
        by: the option, or options, that the runs are compared by: "method", "model", "train.lr", ...
        metrics: names of metrics; none: the usual ones. docs/metrics.md has all of them.
        view: labels that compete at test: "all" seen so far, or each task's "own" (task-incremental).
        benchmark: only the runs of this benchmark.
        best_by_validation: of the settings of a row only the one that is best on validation.

    Returns:
        Columns: `benchmark`, `objective`, `metric`, `data`, `split`, `view`, then the options that differ, `figure`
        (the name of the metric), `mean`, `std` (null for one seed) and `n`, the number of seeds. A mean is null where
        a seed lacks the metric. `.to_pandas()` needs pandas.

    Raises:
        clpet.ClpetError: no finished runs, or an unknown option or metric.

    >>> for method in ("sequential", "ewc"):
    ...     run = clpet.train(f"method={method}", "debug=smoke", "tasks=[data,files]", output_dir="two", quiet=True)
    >>> table = clpet.compare("two", by="method", metrics=["average"])
    >>> table.column("method").to_pylist()
    ['ewc', 'sequential']
    """
    from clpet.reporting.comparison import CSV_COLUMNS, Comparison
    from clpet.runtime.untrusted_json import find_runs

    if view not in ("all", "own"):
        raise ConfigError(f"view must be 'all' or 'own', not {view!r}")
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder; runs are written to outputs/ unless output_dir is set")
    runs = [(path, run) for path, run in find_runs(Path(folder)) if benchmark in (None, run["benchmark"])]
    if not runs:
        raise DataError(f"{folder} has no finished runs to compare")
    keys = [by] if isinstance(by, str) else list(by)
    comparison = Comparison(keys, [metrics] if isinstance(metrics, str) else list(metrics), view == "own",
                            best_by_validation)  # fmt: skip
    options, figures = comparison.figures(comparison.sections(runs))
    import pyarrow

    words = [[*item.measure, item.split, view, *item.options, item.metric] for item in figures]
    means = [item.mean for item in figures]
    columns: dict[str, pyarrow.Array] = {
        name: pyarrow.array(values, pyarrow.string())
        for name, values in zip([*CSV_COLUMNS, *options, "figure"], zip(*words, strict=True), strict=True)
    }
    columns["mean"] = pyarrow.array([mean and mean.mean for mean in means], pyarrow.float64())
    columns["std"] = pyarrow.array([mean and mean.std for mean in means], pyarrow.float64())
    columns["n"] = pyarrow.array([mean.n if mean else 0 for mean in means], pyarrow.int32())
    return pyarrow.table(columns)
