"""When an optimisation has come to rest: its loss, averaged over a while, no longer falls.

    flat at step i:   mean of the losses of steps i-p+1 .. i   >   (1 - FALL) * mean of those of steps i-2p+1 .. i-p

with p = `patience`. Asked only in the second half of a schedule: while the rate is high a loss may stand still, or rise for
the sake of another term, and fall again when the rate does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from inc_clusterq.progress import Stage
from inc_clusterq.synthesis.objective import Losses
from inc_clusterq.synthesis.settings import ClusterQSettings

FALL = 0.01  # the least share by which a loss that is worth more steps falls from one window to the next


class Plateau:
    """The losses of one run of `steps`, step by step; `patience` 0 never ends it early."""

    def __init__(self, patience: int, steps: int) -> None:
        self.patience, self.steps = patience, steps
        self.losses: list[float] = []

    def reached(self, loss: float) -> bool:
        """Take the loss of one more step; whether the run may end with it."""
        self.losses.append(loss)
        taken, window = len(self.losses), self.patience
        if not window or taken < max(2 * window, self.steps / 2):
            return False
        before, last = sum(self.losses[taken - 2 * window : taken - window]), sum(self.losses[taken - window :])
        return last > (1 - FALL) * before


def descend(
    evaluated: Callable[[], Losses],
    optimiser: torch.optim.Optimizer,
    steps: int,
    settings: ClusterQSettings,
    stage: Stage,
    after: Callable[[], object] = lambda: None,
) -> None:
    """`steps` of `optimiser` with its rates on a cosine to 0, or fewer where the loss comes to rest; `after` follows each."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    plateau = Plateau(settings.patience, steps)
    for step in range(steps):
        losses = evaluated()
        loss = losses.total(settings)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        after()
        schedule.step()
        if plateau.reached(loss.item()):
            stage.skip(steps - step, losses.note())
            return
        stage.advance(1, losses.note())
