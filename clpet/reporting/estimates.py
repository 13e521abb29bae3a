"""What a dry run predicts of a run: the record, the lines of one run and the table of a sweep. Imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, cast

from clpet.reporting.progress import duration
from clpet.reporting.tables import table
from clpet.runtime.untrusted_json import NUMBER, Schema, check_schema, read_json

FILE = "estimate.json"
MB = 2**20


class Estimate(TypedDict):
    """The predicted costs of a run; times are those of this machine, without loading model and data.

    `flops` is null if the steps of the run cannot be planned, and so are all seconds.
    """

    device: str  # the name of the GPU, or cpu
    devices: int  # GPUs, on a CPU threads of all ranks
    tasks: int
    rehearsed: int  # tasks of which steps were made; the others are extrapolated
    steps: int
    training_seconds: float | None
    other_seconds: float | None  # of learning outside of steps: selecting memory, estimating importance
    evaluation_seconds: float | None
    seconds: float | None
    device_hours: float | None
    flops: float | None
    training_memory_mb: float
    evaluation_memory_mb: float
    peak_memory_mb: float
    stored_bytes: int
    replay_bytes: int


SCHEMA: dict[str | type[str], Schema] = {
    "device": str,
    **dict.fromkeys(("devices", "tasks", "rehearsed", "steps", "stored_bytes", "replay_bytes"), int),
    **dict.fromkeys(
        ("training_seconds", "other_seconds", "evaluation_seconds", "seconds", "device_hours", "flops"), NUMBER | None
    ),
    **dict.fromkeys(("training_memory_mb", "evaluation_memory_mb", "peak_memory_mb"), NUMBER),
}  # fmt: skip


def write(folder: Path, estimate: Estimate) -> None:
    """Writes the estimate of a dry run into its folder."""
    (folder / FILE).write_text(json.dumps(estimate, indent=1) + "\n")


def read(folder: Path) -> Estimate:
    """The estimate of a dry run. Raises DataError."""
    values = read_json(folder / FILE)
    check_schema(values, SCHEMA, str(folder / FILE))
    return cast(Estimate, values)


def lines(estimate: Estimate) -> list[str]:
    """The estimate of one run in words."""
    unit = _unit(estimate)
    complete = estimate["tasks"] == estimate["rehearsed"]
    basis = "every task" if complete else f"the first {estimate['rehearsed']} of {estimate['tasks']} tasks"
    memory = f"peak memory {estimate['peak_memory_mb']:,.0f} MB"
    peaks = f"training {estimate['training_memory_mb']:,.0f} MB, evaluation {estimate['evaluation_memory_mb']:,.0f} MB"
    result = [
        f"estimate from a few steps of {basis} on this machine",
        f"memory   {memory} ({peaks}{'; tensors alone' if unit == 'CPU' else ''})",
    ]
    if estimate["seconds"] is None:
        result.append("time     not known: the steps of this method cannot be planned")
    else:
        named = {"training": estimate["training_seconds"], "other work of the method": estimate["other_seconds"],
                 "evaluation": estimate["evaluation_seconds"]}  # fmt: skip
        times = ", ".join(f"{name} {duration(seconds or 0)}" for name, seconds in named.items())
        hours = f"{estimate['device_hours']:.3g} {unit}-hours on {estimate['devices']} {_noun(estimate)}"
        result += [f"time     {duration(estimate['seconds'])} ({times}), {hours}",
                   f"FLOPs    {estimate['flops']:.3g} of training"]  # fmt: skip
    examples = f", and {estimate['replay_bytes']:,} bytes of examples" if estimate["replay_bytes"] else ""
    return [*result, f"stored   {estimate['stored_bytes']:,} bytes in addition to the model{examples}"]


def _unit(estimate: Estimate) -> str:
    return "CPU" if estimate["device"] == "cpu" else "GPU"


def _noun(estimate: Estimate) -> str:
    noun = "thread" if _unit(estimate) == "CPU" else estimate["device"]
    return noun + "s" * (estimate["devices"] != 1 and _unit(estimate) == "CPU")


def sweep_table(runs: Sequence[tuple[Sequence[str], Estimate | None]]) -> str:
    """A line per run, given by its varied words, and the sums over the sweep; None: the run could not be estimated."""
    keys = list(dict.fromkeys(word.partition("=")[0] for words, _ in runs for word in words))
    estimated = [estimate for _, estimate in runs if estimate]
    units = {_unit(estimate) for estimate in estimated} or {"device"}
    rows = []
    for words, estimate in runs:
        values = dict(word.split("=", 1) for word in words if "=" in word)
        rows.append([*(values.get(key, "") for key in keys), *_cells(estimate)])
    if len(estimated) == len(runs):
        seconds, hours, flops = (_sum(estimated, key) for key in ("seconds", "device_hours", "flops"))
        peak = max((estimate["peak_memory_mb"] for estimate in estimated), default=0.0)
        stored, replay = (sum(estimate[key] for estimate in estimated) for key in ("stored_bytes", "replay_bytes"))
        label = ["sum, largest peak", *[""] * (len(keys) - 1)] if keys else []
        rows.append([*label, *_numbers(seconds, hours, flops, peak, stored, replay)])
    header = ["time", f"{units.pop() if len(units) == 1 else 'device'}-hours", "FLOPs", "peak MB", "stored bytes",
              "example bytes"]  # fmt: skip
    return table([*keys, *header], rows)


def _sum(estimates: Sequence[Estimate], key: str) -> float | None:
    values = [cast(float | None, estimate[key]) for estimate in estimates]  # type: ignore[literal-required]
    numbers = [value for value in values if value is not None]
    return sum(numbers) if len(numbers) == len(values) else None


def _cells(estimate: Estimate | None) -> list[str]:
    if estimate is None:
        return ["no estimate", *[""] * 5]
    numbers = (estimate["seconds"], estimate["device_hours"], estimate["flops"], estimate["peak_memory_mb"])
    return _numbers(*numbers, estimate["stored_bytes"], estimate["replay_bytes"])


def _numbers(
    seconds: float | None, hours: float | None, flops: float | None, peak: float, stored: int, replay: int
) -> list[str]:
    time = "-" if seconds is None else duration(seconds)
    return [time, *("-" if value is None else f"{value:.3g}" for value in (hours, flops)), f"{peak:,.0f}",
            f"{stored:,}", f"{replay:,}"]  # fmt: skip
