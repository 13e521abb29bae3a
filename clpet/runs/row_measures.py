"""What is measured along with the rows of the matrix: probes, plasticity, downstream tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

from clpet.evaluation.probes import Probes
from clpet.records import Metrics
from clpet.runs.downstream import Downstream, check_downstream
from clpet.runs.plasticity import Plasticity, check_plasticity
from clpet.wiring import Components, Session


def check_measures(components: Components) -> None:
    """Raises ConfigError where something cannot be measured, before anything is loaded."""
    check_plasticity(components)
    check_downstream(components)


@dataclass
class RowMeasures:
    """Measures a row, without any effect on the run. The values belong to the diagnostics of the row."""

    probes: Probes
    plasticity: Plasticity
    downstream: Downstream

    @classmethod
    def of(cls, session: Session) -> "RowMeasures":
        """Those of a session. Raises ConfigError and DataError for tasks that cannot be loaded, before training."""
        return cls(session.probes, Plasticity.of(session), Downstream.of(session))

    def measure(self, row: int, earlier: Sequence[Metrics]) -> dict[str, float]:
        """The values after `row` tasks; `earlier` are the diagnostics of the rows before."""
        return self.probes.measure(row) | self.plasticity.measure(row, earlier) | self.downstream.measure(row)
