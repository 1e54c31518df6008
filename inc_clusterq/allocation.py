"""Memory of large tensors that is used again instead of being given back to the system.

By default the C library maps fresh memory for every large tensor, which the system clears page by page at the first touch.
Kept memory is neither mapped nor cleared again. No computed value depends on it. It is for stretches that take the same large
tensors over and over; what is kept counts as used meanwhile.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of `mallopt(3)`
KEPT = 2**31 - 1  # bytes that may lie free
LARGEST = (2**30, 32 * 2**20)  # bytes of a tensor; older versions of the library take the second only
USUAL_KEPT, USUAL_LARGEST = 64 * 2**20, 32 * 2**20  # where the library's own limits end up once large memory was freed


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Let this process keep what it frees, and give it back on leaving; yields whether it is kept (GNU C library only)."""
    if platform.libc_ver()[0] != "glibc":
        yield False
        return
    library = ctypes.CDLL(None)
    try:
        yield bool(library.mallopt(TRIM_THRESHOLD, KEPT)) and any(library.mallopt(MMAP_THRESHOLD, size) for size in LARGEST)
    finally:
        library.mallopt(TRIM_THRESHOLD, USUAL_KEPT)
        library.mallopt(MMAP_THRESHOLD, USUAL_LARGEST)
        library.malloc_trim(0)
