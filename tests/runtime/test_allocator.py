"""The allocator keeps the memory of one step for the next one."""

import subprocess
import sys

import pytest

PAGES_OF_TEN_BLOCKS = """
import resource, sys

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1:]:
    from clpet.runtime.allocator import keep_freed_memory
    kept = keep_freed_memory()
bytearray(64 << 20)  # freed at once
before = faults()
for _ in range(10):
    bytearray(64 << 20)
print(faults() - before, kept if sys.argv[1:] else "")
"""


def page_faults(*arguments: str, **environment: str) -> list[str]:
    command = [sys.executable, "-c", PAGES_OF_TEN_BLOCKS, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is a function of glibc")
def test_freed_memory_is_kept_unless_the_user_sets_the_allocator() -> None:
    paths = {"PYTHONPATH": ":".join(sys.path)}
    (default,) = page_faults(**paths)
    assert int(default) > 100  # 10 x 64 MiB in pages of 4 KiB: 163,840; in huge ones of 2 MiB: 320
    kept, done = page_faults("keep", **paths)
    assert (int(kept) < int(default) / 10, done) == (True, "True")
    by_user, done = page_faults("keep", **paths, MALLOC_TOP_PAD_="0")
    assert (int(by_user) > int(default) / 2, done) == (True, "False")
