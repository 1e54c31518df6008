"""A loss that no longer falls ends a run early, in the second half of its schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.clusterq import synthesise
from inc_clusterq.synthesis.plateau import Plateau
from inc_clusterq.synthesis.settings import ClusterQSettings


def taken(losses: list[float], patience: int, steps: int) -> int:
    plateau = Plateau(patience, steps)
    return next((step for step, loss in enumerate(losses, start=1) if plateau.reached(loss)), len(losses))


@pytest.mark.parametrize(
    ("losses", "patience", "wanted"),
    [
        ([1.0] * 100, 10, 50),  # flat from the start, asked in the second half
        ([1.0] * 100, 30, 60),  # two windows are needed
        ([1.0] * 100, 0, 100),
        ([0.99**step for step in range(100)], 10, 100),  # falls by a tenth from window to window
        ([2.0**-step for step in range(60)] + [2.0**-60] * 40, 10, 80),  # both windows flat
        ([1.0 + step for step in range(100)], 10, 50),  # rises
    ],
)
def test_it_is_reached_where_two_windows_say_so(losses: list[float], patience: int, wanted: int) -> None:
    assert taken(losses, patience, 100) == wanted


@pytest.mark.parametrize("synthesizer", ["clusterq", "latent"])
def test_a_batch_at_rest_is_finished_early_and_always_the_same(
    synthesizer: str, trained: nn.Module, spec: InputSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def counted(self: Plateau, loss: float) -> bool:
        steps.append(loss)
        return original(self, loss)

    original = Plateau.reached
    monkeypatch.setattr(Plateau, "reached", counted)
    chosen = {"synthesizer": synthesizer, "iterations": 0, "refine_iterations": 400, "refine_batch": 4, "augmentation": "none"}
    runs = []
    for _ in range(2):
        steps.clear()
        settings = ClusterQSettings.model_validate({**chosen, "patience": 10, "classification_weight": 0})
        runs.append(synthesise(trained, spec, settings, num_classes=4, samples=4, seed=0)[0])
        assert 200 <= len(steps) < 400
    assert torch.equal(*runs)
