"""Freed memory stays with the process, by the count of page faults that the system keeps."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from inc_clusterq.allocation import freed_memory_kept

TOUCH = """
import ctypes, resource, sys
from contextlib import nullcontext
from inc_clusterq.allocation import freed_memory_kept
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch():
    block = library.malloc(100 * 2**20)
    ctypes.memset(block, 1, 100 * 2**20)
    library.free(block)
with freed_memory_kept() if sys.argv[1] == "kept" else nullcontext(True) as done:
    assert done
    touch()
    before = faults()
    for _ in range(5):
        touch()
    print(faults() - before)
for line in open("/proc/self/status"):
    if line.startswith("VmRSS"):
        print(line.split()[1])
"""


def touched(way: str) -> tuple[int, int]:
    """Pages that the system has to provide while 100 MB are taken and freed five more times; kB in use afterwards."""
    done = subprocess.run([sys.executable, "-c", TOUCH, way], capture_output=True, text=True, check=True)
    pages, kilobytes = map(int, done.stdout.split())
    return pages, kilobytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is nothing to set without the GNU C library")
def test_memory_that_was_freed_is_used_again_without_the_system() -> None:
    pages = 100 * 2**20 // 4096
    (often, usual), (seldom, after) = touched("given back"), touched("kept")
    assert often > 4 * pages
    assert seldom < pages / 10
    assert after < usual + 20_000  # and on leaving it has been given back


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("no library was to be opened"))
    with freed_memory_kept() as kept:
        assert not kept
