"""How long compiled models take, timed in turn, so that a drift of the machine's speed meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUNDS = 50
WARM_UP = 5  # rounds that do not count
FEWEST = 7  # rounds that count, however slow the calls are
BUDGET = 60.0  # seconds, after which no round begins


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call, or a ratio of two such."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile

    @classmethod
    def of(cls, values: Sequence[float]) -> Latency:
        """That of several calls, at least two; the percentiles lie between the values."""
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), deciles[0], deciles[-1])


def milliseconds_in_turn(
    models: Mapping[str, Callable[[Tensor], Any]],
    inputs: Tensor,  # shape: (batch, *shape)
    rounds: int = ROUNDS,
) -> dict[str, list[float]]:
    """Milliseconds of every call that counts, as many of each model."""
    times: dict[str, list[float]] = {name: [] for name in models}
    began = time.perf_counter()
    with torch.no_grad():
        for number in range(WARM_UP + rounds):
            for name, model in models.items():
                start = time.perf_counter()
                model(inputs)
                if number >= WARM_UP:
                    times[name].append(1000 * (time.perf_counter() - start))
            if number >= WARM_UP + FEWEST and time.perf_counter() - began > BUDGET:
                break
    return times
