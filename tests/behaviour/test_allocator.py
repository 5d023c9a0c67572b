"""With glibc, the process keeps freed memory."""

import platform
import resource
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from halfstep.runtime.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def use():
    # Two blocks, so that the second one's end is the top of the heap.
    blocks = [libc.malloc(8 << 20) for _ in range(2)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in blocks:
        libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    """Return the page faults of twenty allocations of two 8 MB blocks, after the first."""
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory")
def test_blocks_that_are_used_again_are_not_cleared_again() -> None:
    pages = 2 * (8 << 20) // resource.getpagesize()
    assert _faults("kept") < pages
    assert _faults("default") > 10 * pages
