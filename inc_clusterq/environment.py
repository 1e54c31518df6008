"""Versions and machine: what a figure depends on, for reports and benchmarks."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata

import torch

from inc_clusterq import __version__
from inc_clusterq.cpu import cpu


def installed(*distributions: str) -> dict[str, str]:
    """Versions of those of them that are installed; some packages come as one of several."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(host: Mapping[str, str]) -> dict[str, str]:
    """This package, Python, the `host`'s own versions, and the machine."""
    processor = cpu()
    return {
        "inc-clusterq": __version__,
        "python": platform.python_version(),
        **host,
        "machine": platform.machine(),
        "processor": processor.model,
        "instruction set": torch.backends.cpu.get_cpu_capability() + (" and AMX" if processor.amx else ""),
        "threads": str(torch.get_num_threads()),
        "processors": str(os.cpu_count()),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }
