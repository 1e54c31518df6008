from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inc_clusterq.deployment import latency
from inc_clusterq.deployment.latency import FEWEST, WARM_UP, Latency, milliseconds_in_turn


def models(calls: list[str], *names: str) -> dict[str, Callable[[Tensor], None]]:
    return {name: lambda x, name=name: calls.append(name) for name in names}  # type: ignore[misc]


def test_models_take_turns_and_the_first_rounds_do_not_count() -> None:
    calls: list[str] = []
    times = milliseconds_in_turn(models(calls, "a", "b"), torch.zeros(1), rounds=8)
    assert calls == ["a", "b"] * (WARM_UP + 8)
    assert {name: len(found) for name, found in times.items()} == {"a": 8, "b": 8}


def test_slow_models_are_called_less_often_but_some_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "BUDGET", 0.0)
    times = milliseconds_in_turn(models([], "a"), torch.zeros(1), rounds=1000)
    assert len(times["a"]) == FEWEST + 1


def test_a_latency_is_median_and_outer_deciles() -> None:
    found = Latency.of([float(value) for value in range(101)])
    assert (found.low, found.median, found.high) == (10, 50, 90)


def test_the_deciles_of_few_calls_lie_between_them() -> None:
    found = Latency.of([10.0, 10.2, 10.1, 10.3, 10.2, 10.4, 30.0])
    assert 10.0 < found.low < found.median < found.high < 30.0
