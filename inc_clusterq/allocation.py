"""Memory of large tensors that is used again instead of being given back to the system.

By default the C library maps fresh memory for every large tensor, which the system clears page by page at the first touch: for
a tensor of 50 MB that takes longer than to multiply it by two. Kept memory is neither mapped nor cleared again. No computed
value depends on it.
"""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of `mallopt(3)`
KEPT = 2**31 - 1  # bytes that may lie free
LARGEST = (2**30, 32 * 2**20)  # bytes of a tensor; older versions of the library take the second only


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; for programs of our own, since it concerns the whole process.

    Returns:
        Whether that was possible; it is with the GNU C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(TRIM_THRESHOLD, KEPT)) and any(library.mallopt(MMAP_THRESHOLD, size) for size in LARGEST)
