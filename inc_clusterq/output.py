"""What is written appears when it is whole: the output folder, refused before any work where it cannot be used, and files."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from inc_clusterq.errors import OutputError

RESULT = "result.json"
"""Name of the report; a folder that holds it was written by us."""


def check_output(folder: Path, *, overwrite: bool, report: str = RESULT, workspace: Path | None = None) -> None:
    """Raise OutputError where a result could not be written to `folder` later.

    `overwrite` replaces an earlier result, told by its `report`; a folder that holds anything else is never replaced.
    `workspace` is where the job keeps what it makes on the way.
    """
    place = folder.resolve()  # a link stays, and what it leads to is written
    if place.is_mount():
        raise OutputError(f"output {folder} is a mount point and cannot be put in place in one step; name a folder inside it")
    if place in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"output {folder} is the current folder or holds it and could not be replaced; name one inside it")
    if workspace is not None and workspace.resolve().is_relative_to(place):
        raise OutputError(
            f"output {folder} is written as a whole, and the workspace {workspace} lies in it; name another for one of them"
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _held(folder, place):  # which also tells whether something can be written there
            _refuse_files(folder, place, overwrite=overwrite, report=report)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"output {folder} cannot be written: {place.parent} is not a folder") from error
    except OSError as error:
        raise _unwritable(folder, error) from error


@contextmanager
def filled_whole(folder: Path, *, overwrite: bool, report: str = RESULT) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    What `check_output` refuses is refused again: the job may have taken hours.
    """
    place = folder.resolve()
    hidden = _new(place)
    with _held(folder, place):
        try:
            hidden.mkdir(mode=0o755)
            yield hidden
        except OSError as error:
            if is_of(error, hidden):
                raise _unwritable(folder, error) from error
            raise
        else:
            _refuse_files(folder, place, overwrite=overwrite, report=report)
            _put(folder, hidden, place)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def _refuse_files(folder: Path, place: Path, *, overwrite: bool, report: str) -> None:
    if place.exists() and not place.is_dir():
        raise OutputError(f"output {folder} is a file; name a folder")
    if place.is_dir() and any(place.iterdir()):
        if not (place / report).is_file():
            raise OutputError(f"output {folder} holds other files and no earlier result; name a new or an empty folder")
        if not overwrite:
            raise OutputError(f"output {folder} already holds a result; add --overwrite to replace it, or name another")


def _new(place: Path) -> Path:
    return place.with_name(f".{place.name}.inc-clusterq-new")


def _old(place: Path) -> Path:
    return place.with_name(f".{place.name}.inc-clusterq-old")


@contextmanager
def _held(folder: Path, place: Path) -> Iterator[None]:
    """Keep other jobs away from a place. The system ends a lock with its process; what a killed one left is mended first."""
    file = place.with_name(f".{place.name}.lock")
    lock = FileLock(file, fallback_to_soft=False)  # a soft lock outlives a killed process
    try:
        lock.acquire(timeout=0)
    except Timeout as busy:
        if not file.exists():  # some places, such as /proc, take no file and do not say so
            raise OutputError(f"output {folder} cannot be written: no file can be made in {place.parent}") from busy
        raise OutputError(f"output {folder} is being written by another job; wait until it ends, or name another") from busy
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        if place.exists():
            shutil.rmtree(_old(place), ignore_errors=True)
        elif _old(place).exists():
            _old(place).rename(place)
        shutil.rmtree(_new(place), ignore_errors=True)
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def _put(folder: Path, hidden: Path, place: Path) -> None:
    """Rename a folder over another one, which stays where that fails, and comes back with the next job after a kill."""
    old = _old(place)
    try:
        if place.exists():
            place.rename(old)
        try:
            hidden.rename(place)
        except BaseException:  # Ctrl-C too
            if old.exists():
                old.rename(place)
            raise
    except OSError as error:
        raise _unwritable(folder, error) from error
    shutil.rmtree(old, ignore_errors=True)


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
    names = [name for name in (error.filename, error.filename2) if name is not None]  # the second is where a copy goes
    if not names:  # the disk is full, and what was written is not told
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(Path(os.fsdecode(name)).is_relative_to(folder) for name in names)


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"output {folder} cannot be written: {error.strerror or error}")
