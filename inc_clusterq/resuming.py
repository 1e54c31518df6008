"""What long work keeps of an optimiser, so that a process that was killed continues to the bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]

SAVE_SECONDS = 20.0  # between two states of a long stage: what a killed process loses at most of it


def adam_state(optimiser: torch.optim.Adam) -> dict[str, Tensor]:
    """The optimiser's moments and counts, as `adam.NUMBER.NAME`."""
    return {
        f"adam.{number}.{name}": value
        for number, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_adam(state: State, optimiser: torch.optim.Adam) -> None:
    """Inverse of `adam_state`, for an optimiser of the same parameters."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in below("adam", state).items():
        number, _, what = name.partition(".")
        moments.setdefault(int(number), {})[what] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})


def below(prefix: str, state: State) -> dict[str, Tensor]:
    """What stands in `state` as `PREFIX.NAME`, by its name."""
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}
