"""What a command shows of a run that has already finished."""

from pathlib import Path

from rich.console import Console

from clpet.config.schema import Config
from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.records import Results
from clpet.reporting import run_summary
from clpet.runs import provenance
from clpet.runtime.untrusted_json import as_data_error


def show_existing(console: Console, config: Config, out: Path, results: Results) -> TransferMatrix:
    """Prints the results of a finished run. Raises ConfigError if its data, weights or code have changed since."""
    with as_data_error(f"{out / 'results.json'} is not the result of a run"):
        provenance.check_finished(out, results, config)
        run_summary.show_finished(console, out, results)
    console.print("already finished; showing its results (fresh=true runs it again)")
    return TransferMatrix.from_json(results)
