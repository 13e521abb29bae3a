"""Whole runs side by side on one machine; a part of scripts/bench.py.

python scripts/bench.py side_by_side [rounds=5 train.epochs=3 ...]

One run alone as clpet sets OpenMP up (clpet/__init__.py) against one with the runtime's own spinning, then two and four
runs at once. Their share is two and four times the time of one: a run alone uses all cores.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clpet import SPIN

RUNTIME = {
    "GOMP_SPINCOUNT": "300000",
    "KMP_BLOCKTIME": "200",
}  # what libgomp, and Intel's and LLVM's runtimes, do unset
SMALL = ["tracking=off", "cache_dir=null", "method=sequential", "evaluation.matrix=last", "train.epochs=1"]


def side_by_side(overrides: list[str], rounds: int) -> None:
    """Prints medians, over rounds in which all take turns, of seconds and of ratios within a round."""
    alone, own, two, four = "one", "one, the runtime's own spinning", "two at once", "four at once"
    seconds: dict[str, list[float]] = {alone: [], own: [], two: [], four: []}
    together(1, overrides, SPIN)  # files are in memory from now on
    for _ in range(rounds):
        seconds[alone].append(together(1, overrides, SPIN))
        seconds[own].append(together(1, overrides, RUNTIME))
        seconds[two].append(together(2, overrides, SPIN))
        seconds[four].append(together(4, overrides, SPIN))
    for name, values in seconds.items():
        print(f"{name:32} median {statistics.median(values):6.1f} s   min {min(values):.1f}  max {max(values):.1f}")
    for name, other, count, limit in ((alone, own, 1, 1.03), (two, alone, 2, 1.15), (four, alone, 4, 1.15)):
        found = statistics.median(a / (count * b) for a, b in zip(seconds[name], seconds[other], strict=True))
        print(f"{name} / ({count} x {other}): {found:.2f}, at most {limit} wanted")


def together(count: int, overrides: list[str], spin: dict[str, str]) -> float:
    """Seconds until the last of `count` runs that start at the same time is over. Raises where one fails."""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", *RUNTIME)}
    command = [sys.executable, "-m", "clpet", "train", *SMALL, *overrides]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        runs = [
            subprocess.Popen([*command, f"output_dir={Path(folder, str(index))}"], env={**environment, **spin},
                             stdout=subprocess.DEVNULL)
            for index in range(count)
        ]  # fmt: skip
        codes = [run.wait() for run in runs]
        assert not any(codes), codes
        return time.perf_counter() - start
