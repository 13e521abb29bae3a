"""What reports must know of the objective of a recorded run.

Records of older versions lack some of the keys. The names of the objectives of those versions stand in for them, here
and nowhere else.
"""

from collections.abc import Mapping

from clpet.records import Results


def objective_name(run: Results) -> str:
    """The name of a finished run's objective."""
    return str(run.get("objective") or ("language_modeling" if run["direction"] == "lower" else "classification"))


def has_labels(run: Results) -> bool:
    """Whether scores are shares of right labels, so that there is a view in which only a task's own labels compete."""
    return run["softmax"] is not None if "softmax" in run else objective_name(run) == "classification"


def direction_of(record: Mapping[str, object]) -> str:
    """Which scores of a run are better, lower or higher, from its run.json."""
    return str(record.get("direction") or ("lower" if record.get("objective") == "language_modeling" else "higher"))
