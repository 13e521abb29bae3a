"""`clpet check RUN`: exit code 1 if a run forgot too much, for scripts and continuous integration."""

import argparse
from pathlib import Path

from clpet.escape import printable

MAX_DROP = 2.0  # points; the limit unless another one is given


def check(argv: list[str]) -> int:
    """`clpet check`: one line per limit that is not met. Returns 0 if all are met, else 1."""
    parser = argparse.ArgumentParser(
        "clpet check",
        description="Checks a finished run against limits. Exit code 0: all are met; 1: one line for each that is not.",
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument(
        "--max-drop", type=float, metavar="POINTS",
        help="largest drop of a task from right after it was learned to the end of the run; for perplexities the "
        f"largest rise in percent (default: {MAX_DROP:g}, unless only --min-average is given)",
    )  # fmt: skip
    parser.add_argument("--min-average", type=float, metavar="PERCENT", help="smallest average after the last task")
    parser.add_argument(
        "--against", type=Path, metavar="RUN2",
        help="measure drops from the final scores of this run instead, on the same test examples",
    )  # fmt: skip
    parser.add_argument(
        "--view", choices=("all", "own"), default="all",
        help="labels to choose from at test time: all seen so far, or only the task's own",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    from clpet.reporting.limits import Limits, check_limits

    max_drop = arguments.max_drop
    if max_drop is None and (arguments.min_average is None or arguments.against):
        max_drop = MAX_DROP
    limits = Limits(max_drop, arguments.min_average)
    text, all_met = check_limits(arguments.run, limits, arguments.against, arguments.view == "own")
    print(printable(text))
    return 0 if all_met else 1
