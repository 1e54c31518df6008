"""The state of the generator's training as named tensors, so that a process that was killed continues it to the bit."""

from __future__ import annotations

import torch
from torch import nn

from inc_clusterq.synthesis.batches import centroids_of, centroids_state
from inc_clusterq.synthesis.centroids import Centroids
from inc_clusterq.synthesis.draft import State


def training_state(
    generator: nn.Module, optimiser: torch.optim.Adam, centroids: Centroids, done: int, rng: torch.Generator
) -> State:
    """Everything that the steps after the first `done` depend on."""
    moments = {
        f"adam.{number}.{name}": value
        for number, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }
    parameters = {f"generator.{name}": value for name, value in generator.state_dict().items()}
    return {**parameters, **moments, **centroids_state(centroids), "done": torch.tensor(done), "rng": rng.get_state()}


def restore_training(
    state: State, generator: nn.Module, optimiser: torch.optim.Adam, centroids: Centroids, rng: torch.Generator
) -> tuple[Centroids, int]:
    """Inverse of `training_state`: sets generator, optimiser and `rng`; returns the centroids and the steps done."""
    generator.load_state_dict(_below("generator", state))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in _below("adam", state).items():
        number, _, what = name.partition(".")
        moments.setdefault(int(number), {})[what] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    rng.set_state(state["rng"])
    return centroids_of(state, centroids), int(state["done"])


def _below(prefix: str, state: State) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}
