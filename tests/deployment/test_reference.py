from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from inc_clusterq.deployment.reference import ExactSums, exact_sums
from inc_clusterq.deployment.saved import SavedModel

SavedResult = Callable[..., SavedModel]


def test_the_reference_is_the_evaluated_model_and_does_not_depend_on_the_batch(saved: SavedResult) -> None:
    model = saved("residual", 8)
    inputs = torch.randn(16, *model.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model.module(inputs), exact_sums(model.module)(inputs)
        alone = torch.cat([exact_sums(model.module)(image) for image in inputs.split(1)])
    assert torch.equal(found, alone)
    spread = float(expected.max() - expected.min())
    assert float((found - expected).square().mean().sqrt()) < 0.005 * spread  # float32 sums near a border


def test_a_module_without_a_graph_is_its_own_reference() -> None:
    module = nn.Linear(2, 2)
    assert exact_sums(module) is module
    assert not isinstance(exact_sums(module), ExactSums)
