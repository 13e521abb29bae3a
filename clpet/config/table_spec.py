"""Tables of results for `clpet reproduce`, one YAML in conf/table for each. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clpet.config.compose import conf_dir
from clpet.config.overrides import quote
from clpet.config.schema import Scalar
from clpet.errors import ConfigError, first_line, suggest


@dataclass
class Published:
    """A figure of a paper that a row is compared with."""

    average: float
    source: str  # paper and page or table
    why: str = ""  # the known reason of a difference


@dataclass
class Row:
    """A row of a table: the words of its method, and what was published.

    Without `tuned` the values of the grid have no effect, as on a method that trains nothing: no trials are run. `grid`
    replaces values of the table's grid by equally many others, as for prompts, which need higher learning rates.
    """

    words: list[str] = field(default_factory=list)
    tuned: bool = True
    grid: dict[str, list[Scalar]] = field(default_factory=dict)
    published: Published | None = None


@dataclass
class Budget:
    """What a budget replaces in a table; null: as in the table. `words` are added to those of all runs."""

    seeds: list[int] | None = None
    orders: list[str] | None = None
    grid: dict[str, list[Scalar]] | None = None
    rows: list[str] | None = None
    words: list[str] = field(default_factory=list)


@dataclass
class TableSpec:
    """A table: the runs of each row are the same but for its method and the values chosen for it on validation data.

    `words` are the overrides of all runs. `grid` holds the values that are tried, the same for every row, with the
    first seed and order: every combination is a trial. `orders` are the words of each order of the tasks. `local` are
    overrides that hold on one machine, such as data_dir: they change no figure and are not recorded. `tolerance` is how
    much the average of a row may differ, in points, between machines with equal versions: other kernels, threads and
    precisions round differently.
    """

    title: str = ""
    words: list[str] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    grid: dict[str, list[Scalar]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    orders: list[str] = field(default_factory=lambda: [""])
    budgets: dict[str, Budget] = field(default_factory=dict)
    tolerance: float | None = None
    local: list[str] = field(default_factory=list)

    def check(self, where: str) -> None:
        """Raises ConfigError for a table without rows or values."""
        for key in ("title", "rows", "seeds", "orders"):
            if not getattr(self, key):
                raise ConfigError(f"{where}: {key} is missing or empty")
        for key, values in self.grid.items():
            if not values:
                raise ConfigError(f"{where}: grid.{key} has no values")
        for name, row in self.rows.items():
            for key, values in row.grid.items():
                if len(values) != len(self.grid.get(key, [])):
                    raise ConfigError(f"{where}: rows.{name}.grid.{key} needs as many values as grid.{key}")

    def with_budget(self, name: str, only: list[str]) -> "TableSpec":
        """This table with what a budget replaces, and only the rows `only` if there are any. Raises ConfigError."""
        if name not in self.budgets:
            raise ConfigError(f"unknown budget {name!r}{suggest(name, list(self.budgets))}")
        budget = self.budgets[name]
        names = only or budget.rows or list(self.rows)
        for row in names:
            if row not in self.rows:
                raise ConfigError(f"the table has no row {row!r}{suggest(row, list(self.rows))}")
        return replace(
            self,
            words=[*self.words, *budget.words],
            rows={row: self.rows[row] for row in names},
            grid=self.grid if budget.grid is None else budget.grid,
            seeds=budget.seeds or self.seeds,
            orders=budget.orders or self.orders,
        )

    def trials(self, row: str) -> Iterator[list[str]]:
        """The words of every combination of the values in the grid; none for a row that is not tuned.

        An option that the row sets itself is not tuned.
        """
        fixed = {word.partition("=")[0].lstrip("+") for word in self.rows[row].words}
        replaced = self.rows[row].grid
        grid = {key: replaced.get(key, values) for key, values in self.grid.items() if key not in fixed}
        for values in product(*grid.values()) if grid and self.rows[row].tuned else ():
            yield [f"{key}={_spell(value)}" for key, value in zip(grid, values, strict=True)]

    def run_words(self, row: str, trial: list[str], seed: int, order: str) -> list[str]:
        """The overrides of one run; those of a row come after those of a trial, so that it can fix a value."""
        return [*self.words, *order.split(), *trial, *self.rows[row].words, f"seed={seed}", *self.local]


def _spell(value: Scalar) -> str:
    return quote(value) if isinstance(value, str) else str(value)


def table_files() -> dict[str, Path]:
    """The tables that ship, by name."""
    return {path.stem: path for path in sorted((conf_dir() / "table").glob("*.yaml"))}


def read_table(name: str) -> TableSpec:
    """A table that ships, or the table in a YAML of your own. Raises ConfigError."""
    files = table_files()
    path = Path(name) if name.endswith((".yaml", ".yml")) else files.get(name)
    if path is None or not path.is_file():
        raise ConfigError(f"unknown table {name!r}{suggest(name, list(files))}; or give a YAML file")
    try:
        node = OmegaConf.merge(OmegaConf.structured(TableSpec), OmegaConf.load(path))
        spec = cast(TableSpec, OmegaConf.to_object(node))
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"{path}: {first_line(error)}") from error
    spec.check(str(path))
    return spec
