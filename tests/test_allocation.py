"""Freed memory stays with the process, by the count of page faults that the system keeps."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from inc_clusterq.allocation import keep_freed_memory

TOUCH = """
import ctypes, resource, sys
from inc_clusterq.allocation import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch():
    block = library.malloc(100 * 2**20)
    ctypes.memset(block, 1, 100 * 2**20)
    library.free(block)
touch()
before = faults()
for _ in range(5):
    touch()
print(faults() - before)
"""


def faults_of(way: str) -> int:
    """Pages that the system has to provide while 100 MB are taken and freed five more times."""
    done = subprocess.run([sys.executable, "-c", TOUCH, way], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is nothing to set without the GNU C library")
def test_memory_that_was_freed_is_used_again_without_the_system() -> None:
    pages = 100 * 2**20 // 4096
    assert faults_of("given back") > 4 * pages
    assert faults_of("kept") < pages / 10


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("no library was to be opened"))
    assert not keep_freed_memory()
