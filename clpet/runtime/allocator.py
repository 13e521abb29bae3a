"""The C library's allocator, set for training on a CPU. Imports no torch."""

import ctypes
import os
import sys
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # numbers of options of mallopt in glibc's malloc.h
LARGEST = 2**30  # bytes; larger blocks are still given back to the system when they are freed


@cache
def keep_freed_memory() -> bool:
    """Makes malloc keep freed memory for the next step instead of giving it back to the system; whether it does.

    Activations are freed and allocated again in every step. By default glibc returns blocks of more than 32 MiB at
    once, and the kernel clears every page of the next block again. Nothing changes with another C library, or where
    the environment already sets the allocator (MALLOC_..., GLIBC_TUNABLES).
    """
    set_by_user = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if set_by_user or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # glibc before 2.35 refuses a threshold above 32 MiB: there blocks of every size are kept.
    return bool((mallopt(MMAP_THRESHOLD, LARGEST) or mallopt(MMAP_MAX, 0)) and mallopt(TRIM_THRESHOLD, -1))
