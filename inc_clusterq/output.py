"""The output folder: refused before any work where it cannot be used, and filled in one step when the result is whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inc_clusterq.errors import OutputError

RESULT = "result.json"
"""Name of the report; a folder that holds it was written by us."""


def check_output(folder: Path, *, overwrite: bool, report: str = RESULT) -> None:
    """Raise OutputError where a result could not be written to `folder` later.

    `overwrite` replaces an earlier result, told by its `report`; a folder that holds anything else is never replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {folder} is a file; name a folder")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"output {folder} is the current folder or holds it and could not be replaced; name one inside it")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / report).is_file():
            raise OutputError(f"output {folder} holds other files and no earlier result; name a new or an empty folder")
        if not overwrite:
            raise OutputError(f"output {folder} already holds a result; add --overwrite to replace it, or name another")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}."):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"output {folder} cannot be written: {folder.parent} is not a folder") from error
    except OSError as error:
        raise OutputError(f"output {folder} cannot be written: {error.strerror or error}") from error


@contextmanager
def filled_whole(folder: Path, report: str = RESULT) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its place when the block ends well, and vanishes when it does not."""
    try:
        hidden = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OutputError(f"output {folder} cannot be written: {error.strerror or error}") from error
    try:
        hidden.chmod(0o755)
        yield hidden
        if folder.exists():
            check_output(folder, overwrite=True, report=report)  # again: the job may have taken hours
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
                old = folder.rename(Path(beside) / "old")
                try:
                    hidden.rename(folder)
                except OSError:
                    old.rename(folder)
                    raise
        else:
            hidden.rename(folder)
    except OSError as error:
        raise OutputError(f"output {folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
