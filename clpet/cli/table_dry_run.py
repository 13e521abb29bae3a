"""`clpet reproduce TABLE --dry-run`: composes and checks every run of a table, and predicts what the runs need."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clpet.cli.table_plan import compose
from clpet.config.build import parse_config
from clpet.config.identity import digest
from clpet.config.schema import Config
from clpet.config.table_spec import TableSpec
from clpet.data.benchmark import Benchmark
from clpet.errors import ClpetError, ConfigError, DataError, ModelError
from clpet.escape import printable
from clpet.reporting.estimates import MB, Estimate
from clpet.reporting.progress import duration
from clpet.runs.dry_run import Shapes
from clpet.runs.estimate import estimate
from clpet.training.progress import NoProgress
from clpet.training.trainer import quiet_libraries
from clpet.wiring import Components, Session


def dry_run(spec: TableSpec, output: Path) -> None:
    """Prints a line for every row: its runs and what they need. Raises ConfigError if a run cannot begin.

    Data and weights that are given (data_dir, model.path) must be there. Others may be missing: the runs are then
    checked as far as they can be without them.
    """
    checks, failed, seconds = TableCheck(output), dict[str, str](), list[float | None]()
    width = max(map(len, spec.rows))
    for row in spec.rows:
        trials, seeds = len(list(spec.trials(row))), len(spec.seeds)
        runs = trials + seeds * (len(spec.orders) + bool(trials))  # with those of the defaults
        try:
            need = checks.row(spec, row)
        except ClpetError as error:
            failed[row] = str(error)
            line = "cannot run"
        else:
            seconds.append(None if need.seconds is None else runs * need.seconds)
            line = f"{need.line()}{f', {duration(runs * need.seconds)} in all' if need.seconds is not None else ''}"
        print(printable(f"{row:{width}}  {runs:3} runs  {line}"), flush=True)
    for note in dict.fromkeys(checks.missing.values()):
        print(printable(f"not here: {note}"))
    measured = [value for value in seconds if value is not None]
    if measured and len(measured) == len(seconds):
        print(f"{len(spec.rows)} rows, {duration(sum(measured))} in all, one run at a time on this machine")
    if failed:
        raise ConfigError(f"{len(failed)} of {len(spec.rows)} rows cannot run: {'; '.join(failed.values())}")


@dataclass(frozen=True)
class Need:
    """What a run of a row needs, as far as it is known."""

    trained: int | None = None  # parameters
    memory: float | None = None  # bytes
    seconds: float | None = None

    def line(self) -> str:
        """In words."""
        parts = {
            "{:,} trained parameters": self.trained,
            "{:,.0f} MB": None if self.memory is None else self.memory / MB,
            "{:,.0f} s each": self.seconds,
        }
        figures = [form.format(value) for form, value in parts.items() if value is not None]
        return ", ".join(["composes", *figures])


@dataclass
class TableCheck:
    """Checks the runs of a table's rows; what several rows share is loaded once. `missing` has reasons by input."""

    output: Path
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    shapes: dict[str, Shapes] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def row(self, spec: TableSpec, row: str) -> Need:
        """Checks the runs of a row, all but those that differ in nothing but the seed. Raises ClpetError."""
        first: tuple[Components, Benchmark | None] | None = None
        for words in self.distinct(spec, row):
            cfg = compose(row, [*words, f"output_dir={self.output}", "dry_run=true"])
            try:
                components = Components.build(parse_config(cfg))
                benchmark = self.benchmark(components.config, components)
                benchmark = benchmark and components.settle(benchmark)
            except ClpetError as error:
                raise ConfigError(f"row {row}: {error}") from error
            first = first or (components, benchmark)
        assert first is not None  # a row has at least one run
        return self.need(*first)

    @staticmethod
    def distinct(spec: TableSpec, row: str) -> Iterator[list[str]]:
        """The words of every trial, of the runs in every order with the first trial, and of that with the defaults."""
        seed, trials = spec.seeds[0], list(spec.trials(row))
        for trial in trials:
            yield [*spec.run_words(row, trial, seed, spec.orders[0]), "evaluation.split=validation"]
        for order in spec.orders:
            yield spec.run_words(row, trials[0] if trials else [], seed, order)
        if trials:
            yield spec.run_words(row, [], seed, spec.orders[0])

    def benchmark(self, config: Config, components: Components) -> Benchmark | None:
        """The data of a run; None if they are on the hub and cannot be loaded. Raises DataError."""
        name, key = str(config.benchmark["name"]), digest([config.benchmark, config.objective, config.data_dir])
        if name not in self.missing and key not in self.benchmarks:
            try:
                self.benchmarks[key] = components.source.load(config.data_dir)
            except DataError as error:
                if config.data_dir is not None:
                    raise
                self.missing[name] = str(error)
        return self.benchmarks.get(key)

    def need(self, components: Components, benchmark: Benchmark | None) -> Need:
        """What a run needs: from a few of its steps, or from shapes where data or weights are missing."""
        config, name = components.config, str(components.config.model["name"])
        if benchmark is not None and name not in self.missing:
            try:
                with quiet_libraries():
                    session = Session.assemble(components, benchmark, NoProgress())
                    return measured(estimate(session), session.method.trainable_parameters())
            except ModelError as error:
                if config.model.get("path"):
                    raise
                self.missing[name] = str(error)
        if not components.backbone.config:
            return Need()
        lengths, train = benchmark or components.source, config.train
        step = [train.global_batch_size, train.optimizer, lengths.max_length, lengths.max_target]
        key = digest([config.model, config.peft, config.objective, config.hardware, step])
        if key not in self.shapes:
            self.shapes[key] = Shapes.of(components, lengths.max_length, lengths.max_target)
        return Need(self.shapes[key].trained or None, self.shapes[key].memory)


def measured(estimated: Estimate, trained: int) -> Need:
    """What a dry run has measured."""
    return Need(trained, estimated["peak_memory_mb"] * MB, estimated["seconds"])
