"""What is written appears when it is whole: the output folder, refused before any work where it cannot be used, and files."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from inc_clusterq.errors import OutputError

RESULT = "result.json"
"""Name of the report; a folder that holds it was written by us."""


def check_output(folder: Path, *, overwrite: bool, report: str = RESULT) -> None:
    """Raise OutputError where a result could not be written to `folder` later.

    `overwrite` replaces an earlier result, told by its `report`; a folder that holds anything else is never replaced.
    """
    place = folder.resolve()  # a link stays, and what it leads to is written
    if place.exists() and not place.is_dir():
        raise OutputError(f"output {folder} is a file; name a folder")
    if place.is_mount():
        raise OutputError(f"output {folder} is a mount point and cannot be put in place in one step; name a folder inside it")
    if place in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"output {folder} is the current folder or holds it and could not be replaced; name one inside it")
    if place.is_dir() and any(place.iterdir()):
        if not (place / report).is_file():
            raise OutputError(f"output {folder} holds other files and no earlier result; name a new or an empty folder")
        if not overwrite:
            raise OutputError(f"output {folder} already holds a result; add --overwrite to replace it, or name another")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}."):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"output {folder} cannot be written: {place.parent} is not a folder") from error
    except OSError as error:
        raise _unwritable(folder, error) from error


@contextmanager
def filled_whole(folder: Path, report: str = RESULT) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its place when the block ends well, and vanishes when it does not."""
    place = folder.resolve()
    try:
        hidden = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        hidden.chmod(0o755)
        try:
            yield hidden
        except OSError as error:
            if is_of(error, hidden):
                raise _unwritable(folder, error) from error
            raise
        if place.exists():
            check_output(folder, overwrite=True, report=report)  # again: the job may have taken hours
        try:
            _put(hidden, place)
        except OSError as error:
            raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _put(hidden: Path, place: Path) -> None:
    """Rename a folder over another one, which stays where that fails."""
    if not place.exists():
        hidden.rename(place)
        return
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as beside:
        old = place.rename(Path(beside) / "old")
        try:
            hidden.rename(place)
        except OSError:
            old.rename(place)
            raise


def replace_file(file: Path, content: bytes, beside: Path | None = None) -> None:
    """Write a file that is whole whenever it is seen; what is not whole lies in `beside`, by default in its own folder."""
    partial = (beside or file.parent) / f".{file.name}.{uuid4().hex[:8]}.partial"
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def is_of(error: OSError, folder: Path) -> bool:
    """Whether an error is of what is written to a folder, and not of something else that a job reads or writes meanwhile."""
    if error.filename is None:  # the disk is full, and what was written is not told
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Path(os.fsdecode(error.filename)).is_relative_to(folder)


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"output {folder} cannot be written: {error.strerror or error}")
