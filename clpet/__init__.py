"""clpet: continual learning of language models, one command or one function call per experiment.

The Python API, in docs/api.md: `train`, `load`, `compare`, `session`, and the classes `Run`, `Model`,
`Session` and `ClpetError`.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clpet.api.comparison import compare as compare
    from clpet.api.model import Model as Model
    from clpet.api.model import load as load
    from clpet.api.run import Run as Run
    from clpet.api.run import train as train
    from clpet.api.session import Session as Session
    from clpet.api.session import session as session
    from clpet.errors import ClpetError as ClpetError

__version__ = "0.2.0"

# OpenMP threads that wait for work spin before they sleep: for about 14 ms in libgomp, 200 ms in the runtimes of Intel
# and LLVM. Simultaneous runs on one machine stall each other in that time (`scripts/bench.py side_by_side`). 3,000
# iterations, about 0.15 ms (the other runtimes accept no less than 1 ms), still bridge most pauses inside a step of a
# single run. The variables are read when torch is loaded.
SPIN = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
if not os.environ.keys() & {"OMP_WAIT_POLICY", *SPIN}:  # the user's own settings take precedence
    os.environ.update(SPIN)

API = {
    "train": "clpet.api.run",
    "Run": "clpet.api.run",
    "load": "clpet.api.model",
    "Model": "clpet.api.model",
    "compare": "clpet.api.comparison",
    "session": "clpet.api.session",
    "Session": "clpet.api.session",
    "ClpetError": "clpet.errors",
}  # {name: the module that is imported when the name is used}


def __getattr__(name: str) -> object:
    """The names of the API: torch is imported by the first call that needs it, not by `import clpet`."""
    if name not in API:
        raise AttributeError(f"module 'clpet' has no attribute {name!r}")
    return getattr(importlib.import_module(API[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *API})
