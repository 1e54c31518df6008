"""User functions named in the YAML: `python:package.module:function`, called without arguments.

The YAML's folder can be imported from while the function is found and runs, and at no other time.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from inc_clusterq.errors import UserError
from inc_clusterq.precision import default_dtype_kept

REFERENCE_PATTERN = r"^python:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


def call_reference(reference: str, folder: Path, error: type[UserError]) -> Any:
    """Import the function that `reference` names and return what it returns; raises `error` for all that fails."""
    _, module_name, function_name = reference.split(":")
    with _importable(folder), default_dtype_kept():
        _refuse_shadowed(module_name, folder, reference, error)
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as missing:
            if missing.name is not None and f"{module_name}.".startswith(f"{missing.name}."):
                hint = "; write its name without .py" if module_name.endswith(".py") else ""
                raise error(
                    f"{reference}: there is no module {missing.name!r} in {folder} or among the installed packages{hint}"
                ) from missing
            raise error(f"{reference}: {module_name} cannot be imported: {_last_line(missing)}") from missing
        except (Exception, SystemExit) as failure:  # the user's own code: anything can come out of it
            raise error(f"{reference}: {module_name} cannot be imported: {_last_line(failure)}") from failure
        function = getattr(module, function_name, None)
        if not callable(function):
            near = get_close_matches(function_name, [name for name in dir(module) if callable(getattr(module, name, None))], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise error(f"{reference}: {module_name} ({module.__file__}) has no function {function_name!r}{hint}")
        if needed := _needed(function):
            raise error(
                f"{reference}: {function_name}() is called without arguments and needs {', '.join(needed)}; name a function "
                "that passes them"
            )
        try:
            return function()
        except (Exception, SystemExit) as failure:
            raise error(f"{reference}: {function_name}() failed: {_last_line(failure)}") from failure


def _needed(function: Callable[..., Any]) -> list[str]:
    """Arguments that a function cannot be called without; none where it does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is each.empty and each.kind not in optional]


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)


def _refuse_shadowed(module_name: str, folder: Path, reference: str, error: type[UserError]) -> None:
    """A module of the same name that is already imported would silently be taken in place of the user's file."""
    top = module_name.partition(".")[0]
    loaded = sys.modules.get(top)
    wanted = importlib.machinery.PathFinder.find_spec(top, [str(folder.resolve())])
    if loaded is None or wanted is None or wanted.origin is None:
        return
    origin = getattr(loaded, "__file__", None)
    if origin is None or Path(origin).resolve() != Path(wanted.origin).resolve():
        raise error(
            f"{reference}: another module {top!r} ({origin or 'built in'}) is already imported, "
            f"so {wanted.origin} cannot be; rename the file"
        )


def _last_line(failure: BaseException) -> str:
    """`NameError: name 'x' is not defined (net.py, line 12)`."""
    text = " ".join(traceback.format_exception_only(failure)[-1].split())
    if isinstance(failure, SyntaxError):
        return f"{text} ({Path(failure.filename or '').name}, line {failure.lineno})"
    frames = traceback.extract_tb(failure.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith("<") and frame.filename != __file__]
    return f"{text} ({Path(users[-1].filename).name}, line {users[-1].lineno})" if users else text
