"""How the C library keeps memory that is free; no torch."""

import contextlib
import ctypes
from typing import Final

TRIM_THRESHOLD: Final = -1
"""M_TRIM_THRESHOLD of mallopt(3): free bytes at the top of the heap beyond which they are given back."""
MMAP_THRESHOLD: Final = -3
"""M_MMAP_THRESHOLD: size from which a block is a mapping of its own, given back as soon as it is free."""


def keep_freed_memory() -> bool:
    """Let the process keep what large tensors free, and return whether the C library does so.

    Every update on the CPU allocates blocks of the same megabytes. By default glibc returns them to the system in
    between, which must then clear each page again: 8 % of an update of the digits and of Fashion-MNIST.
    Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        # The largest values that glibc takes: half of a heap of 64 MB, and an int.
        return bool(mallopt(MMAP_THRESHOLD, 32 * 2**20)) and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))
    return False
