"""Strategies and host adaptors by name, through entry points, so that other packages can bring their own.

An entry point of the group `inc_clusterq.strategies` or `inc_clusterq.adaptors` is only imported when it is asked for
by name: one that is broken does not disturb the others.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from inc_clusterq.errors import ConfigError

STRATEGIES = "inc_clusterq.strategies"
ADAPTORS = "inc_clusterq.adaptors"


def names(group: str) -> tuple[str, ...]:
    """What is installed in a group, in alphabetical order; nothing is imported."""
    return tuple(sorted(_scan(group)))


def find(group: str, name: str) -> Any:
    """Import what is installed under `name`; ConfigError if nothing is, or if it cannot be imported."""
    found = _scan(group).get(name)
    kind = {STRATEGIES: "strategy", ADAPTORS: "adaptor"}.get(group, group)
    if found is None:
        near = get_close_matches(name, names(group), 1)
        raise ConfigError(
            f"there is no {kind} {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" Installed: {', '.join(names(group)) or 'none'}."
            + f" A package adds its own through the entry-point group {group!r}."
        )
    try:
        return found.load()
    except Exception as failure:  # other people's code: anything can come out of importing it
        raise ConfigError(
            f"the {kind} {name!r} ({found.value}) of the package {_package(found)} cannot be imported: "
            f"{type(failure).__name__}: {failure}"
        ) from failure


def _scan(group: str) -> dict[str, EntryPoint]:
    """The only function that touches the environment. Of two with one name the first on the path counts."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, entry)
    return found


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "(unknown)"
