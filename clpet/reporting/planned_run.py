"""A run of a table of results, finished or not. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from clpet.records import Json, Results
from clpet.runtime.untrusted_json import read_json, read_results


@dataclass(frozen=True)
class PlannedRun:
    """The run of a row with one seed, one order of the tasks and one choice of the values in the grid."""

    row: str
    words: list[str]  # its overrides
    out: Path  # its directory
    seed: int
    order: int  # number of the order
    trial: list[str]  # the values of the grid
    signature: str = ""  # of its configuration, wherever data and weights are (`portable_signature`)

    @property
    def results(self) -> Results | None:
        """Its results, None before it has finished. Raises DataError for a damaged file."""
        file = self.out / "results.json"
        return read_results(file) if file.is_file() else None

    @property
    def host(self) -> dict[str, Json]:
        """What the rounding of its figures depends on, without the name of the machine; {} where it is not recorded."""
        file = self.out / "run.json"
        host = read_json(file).get("host") if file.is_file() else None
        return {name: value for name, value in host.items() if name != "name"} if isinstance(host, dict) else {}

    @property
    def average(self) -> float | None:
        """Its final average; None if it has not finished, or a task was not measured."""
        from clpet.metrics.transfer_matrix import TransferMatrix  # keeps numpy out of `clpet --help`

        return TransferMatrix.from_json(results).final() if (results := self.results) else None
