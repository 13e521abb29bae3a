"""What a run has cost, as columns of comparisons and reports. Runs of older versions lack some of the values."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from clpet.errors import ConfigError, suggest
from clpet.records import Results
from clpet.reporting.run_groups import Row, Section
from clpet.reporting.run_metrics import MeanStd, mean_and_std


class CostColumn(NamedTuple):
    """A column: the value of a run (None where it was not recorded), the format of a mean, and an explanation."""

    value: Callable[[Results], float | None]
    form: str
    explanation: str


def _values(run: Results, key: str) -> list[float | None]:
    """A counter of every task; None where it was not recorded."""
    values: list[object] = [cost.get(key) for cost in run["cost"]]
    return [float(value) if isinstance(value, int | float) else None for value in values]


def _total(*keys: str) -> Callable[[Results], float | None]:
    """The sum of counters over the tasks of a run."""

    def total(run: Results) -> float | None:
        values = [value for key in keys for value in _values(run, key)]
        numbers = [value for value in values if value is not None]
        return sum(numbers) if len(numbers) == len(values) else None

    return total


def _last(key: str) -> Callable[[Results], float | None]:
    """The value after the last task."""
    return lambda run: (_values(run, key) or [None])[-1]


def _largest(key: str) -> Callable[[Results], float | None]:
    """The largest value of all tasks."""
    return lambda run: max((value for value in _values(run, key) if value is not None), default=None)


COSTS: Mapping[str, CostColumn] = {
    "seconds": CostColumn(_total("seconds"), "{:,.1f}", "seconds of training, over all tasks"),
    "evaluation_seconds": CostColumn(
        _total("evaluation_seconds"), "{:,.1f}", "seconds of evaluation, over all tasks"),
    "flops": CostColumn(
        _total("forward_flops", "backward_flops"), "{:.3g}",
        "floating-point operations of training, forwards and backwards, by formula from matrices and attention"),
    "forward_examples": CostColumn(_total("forward_examples"), "{:,.0f}", "examples passed forwards in training"),
    "backward_examples": CostColumn(_total("backward_examples"), "{:,.0f}", "examples passed backwards in training"),
    "forward_tokens": CostColumn(
        _total("forward_tokens"), "{:,.0f}", "tokens passed forwards in training, padding included"),
    "trained_parameters": CostColumn(
        _last("trainable_parameters"), "{:,.0f}", "parameters trained in the last task"),
    "stored_bytes": CostColumn(
        _last("stored_bytes"), "{:,.0f}", "kept in addition to the model after the last task, as on disk"),
    "replay_examples": CostColumn(_last("replay_examples"), "{:,.0f}", "old examples stored for replay"),
    "replay_bytes": CostColumn(_last("replay_bytes"), "{:,.0f}", "their tokens, four bytes each"),
    "peak_memory_mb": CostColumn(
        _largest("peak_memory_mb"), "{:,.0f}", "peak memory of the device in training, on a CPU of the process"),
}  # fmt: skip
# The columns of `clpet runs --compare KEY --costs`.
COST_COLUMNS = ("seconds", "flops", "stored_bytes", "replay_bytes", "peak_memory_mb")


def mean_costs(row: Row) -> dict[str, MeanStd | None]:
    """{cost: mean and deviation} over the seeds of a row; None for a cost that a seed did not record."""
    return {name: mean_and_std([column.value(run) for _, run in row.runs]) for name, column in COSTS.items()}


def shown(name: str, value: MeanStd | None) -> str:
    """A mean with its deviation as a cell, a cost in its own format; "-" if there is none."""
    if value is None or name not in COSTS:
        return str(value or "-")
    form = COSTS[name].form
    return form.format(value.mean) + ("" if value.std is None else f" ± {form.format(value.std)}")


def smallest_first(means: Mapping[str, MeanStd | None], row: Row) -> float:
    """The sorting key of a row by its mean; a row without one comes last."""
    mean = means[row.name]
    return mean.mean if mean else math.inf


def parse_budget(text: str) -> dict[str, float]:
    """{cost: most that a row may need} from words such as flops=2e12,stored_bytes=1e6. Raises ConfigError."""
    budget = {}
    for word in filter(None, text.split(",")):
        name, _, number = word.strip().partition("=")
        if name not in COSTS:
            raise ConfigError(f"--budget {word}: unknown cost {name}{suggest(name, COSTS)}")
        try:
            budget[name] = float(number)
        except ValueError:
            raise ConfigError(f"--budget {word}: give a number, such as {name}=1e12") from None
    return budget


def limit_to(section: Section, budget: Mapping[str, float]) -> None:
    """Removes the rows whose mean costs exceed a budget or were not recorded, and notes their names."""
    if not budget:
        return
    costs = {row.name: mean_costs(row) for row in section.rows}
    fits = {
        name: all((mean := values[key]) is not None and mean.mean <= most for key, most in budget.items())
        for name, values in costs.items()
    }
    words = ", ".join(f"{key} of {COSTS[key].form.format(most)}" for key, most in budget.items())
    section.over_budget = [f"{row.name}: above {words}, or not recorded" for row in section.rows if not fits[row.name]]
    section.rows = [row for row in section.rows if fits[row.name]]
