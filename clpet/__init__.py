"""clpet: continual learning of language models, one command per experiment."""

import os

__version__ = "0.2.0"

# An OpenMP thread that waits for work spins before it sleeps: in libgomp for about 14 ms, in the runtimes of Intel and
# LLVM for 200 ms. Runs side by side on one machine stall each other so (`scripts/bench.py side_by_side`). The
# 0.15 ms of 3,000 turns (1 ms is the least of the others) still bridge most pauses inside a step of a run alone.
# Read when torch is loaded.
SPIN = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
if not os.environ.keys() & {"OMP_WAIT_POLICY", *SPIN}:  # what the user has set stays
    os.environ.update(SPIN)
