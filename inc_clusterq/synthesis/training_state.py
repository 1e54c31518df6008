"""The state of the generator's training as named tensors, so that a process that was killed continues it to the bit."""

from __future__ import annotations

import torch
from torch import nn

from inc_clusterq.resuming import State, adam_state, below, restore_adam
from inc_clusterq.synthesis.batches import centroids_of, centroids_state
from inc_clusterq.synthesis.centroids import Centroids


def training_state(
    generator: nn.Module, optimiser: torch.optim.Adam, centroids: Centroids, done: int, rng: torch.Generator
) -> State:
    """Everything that the steps after the first `done` depend on."""
    parameters = {f"generator.{name}": value for name, value in generator.state_dict().items()}
    counts = {"done": torch.tensor(done), "rng": rng.get_state()}
    return {**parameters, **adam_state(optimiser), **centroids_state(centroids), **counts}


def restore_training(
    state: State, generator: nn.Module, optimiser: torch.optim.Adam, centroids: Centroids, rng: torch.Generator
) -> tuple[Centroids, int]:
    """Inverse of `training_state`: sets generator, optimiser and `rng`; returns the centroids and the steps done."""
    generator.load_state_dict(below("generator", state))
    restore_adam(state, optimiser)
    rng.set_state(state["rng"])
    return centroids_of(state, centroids), int(state["done"])
