"""Optional packages: imported where they are needed, and named with the extra that brings them where they are missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from inc_clusterq.errors import MissingDependencyError


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{package} is needed for this and cannot be imported ({error}); install it with "
            f'pip install "inc-clusterq[{extra}]"'
        ) from error
