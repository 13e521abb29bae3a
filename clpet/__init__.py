"""clpet: continual learning of language models, one command per experiment."""

import os

__version__ = "0.2.0"

# OpenMP threads that wait for work spin before they sleep: for about 14 ms in libgomp, 200 ms in the runtimes of Intel
# and LLVM. Simultaneous runs on one machine stall each other in that time (`scripts/bench.py side_by_side`). 3,000
# iterations, about 0.15 ms (the other runtimes accept no less than 1 ms), still bridge most pauses inside a step of a
# single run. The variables are read when torch is loaded.
SPIN = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
if not os.environ.keys() & {"OMP_WAIT_POLICY", *SPIN}:  # the user's own settings take precedence
    os.environ.update(SPIN)
