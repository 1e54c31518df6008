"""The home folder in file names, which a shell writes in place of ~ in some places and not in others."""

from __future__ import annotations

from pathlib import Path


def expanded(path: Path) -> Path:
    """With the home folder in place of ~, which is nobody's folder name; ValueError where there is no such home."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"the home folder of {path} is not known; write the whole path") from error
