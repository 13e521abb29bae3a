"""Whole runs next to each other on one machine; run by scripts/bench.py.

python scripts/bench.py side_by_side [rounds=5 train.epochs=3 ...]

Compares one run with clpet's OpenMP settings (clpet/__init__.py) with one under the runtime's default spinning, and
with two and four runs at once. Ideally these take two and four times as long as one run, which uses all cores.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clpet import SPIN

# The defaults of libgomp, and of the runtimes of Intel and LLVM.
RUNTIME = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
SMALL = ["tracking=off", "cache_dir=null", "method=sequential", "evaluation.matrix=last", "train.epochs=1"]


def side_by_side(overrides: list[str], rounds: int) -> None:
    """Prints medians over rounds: seconds, and ratios within a round; in each round all contenders take turns."""
    one, spinning, two, four = "one", "one, the runtime's spinning", "two at once", "four at once"
    seconds: dict[str, list[float]] = {one: [], spinning: [], two: [], four: []}
    together(1, overrides, SPIN)  # warms up the file cache
    for _ in range(rounds):
        seconds[one].append(together(1, overrides, SPIN))
        seconds[spinning].append(together(1, overrides, RUNTIME))
        seconds[two].append(together(2, overrides, SPIN))
        seconds[four].append(together(4, overrides, SPIN))
    for name, values in seconds.items():
        print(f"{name:32} median {statistics.median(values):6.1f} s   min {min(values):.1f}  max {max(values):.1f}")
    for name, other, count, limit in ((one, spinning, 1, 1.03), (two, one, 2, 1.15), (four, one, 4, 1.15)):
        ratio = statistics.median(a / (count * b) for a, b in zip(seconds[name], seconds[other], strict=True))
        print(f"{name} / ({count} x {other}): {ratio:.2f}, target at most {limit}")


def together(count: int, overrides: list[str], spin: dict[str, str]) -> float:
    """Seconds until the last of `count` runs that start at the same time has ended. Raises if one fails."""
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
