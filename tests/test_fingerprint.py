"""A fingerprint is equal for networks that compute the same, and for no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.fingerprint import fingerprint
from inc_clusterq.inputs import InputSpec

SPEC = InputSpec((1, 8, 8))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


class Scaled(nn.Module):
    """What no parameter and no `repr` tells: an attribute, a buffer that is not saved, and what the code does with them."""

    def __init__(self, slope: float = 0.1, offset: float = 0.5, *, squared: bool = False) -> None:
        super().__init__()
        self.body, self.slope, self.squared = net(), slope, squared
        self.offset: Tensor
        self.register_buffer("offset", torch.tensor(offset), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = nn.functional.leaky_relu(self.body(x - self.offset), self.slope)
        return {"logits": out.square() if self.squared else out}


def test_structure_and_every_value_are_told_apart() -> None:
    model, twin = net(), net()
    assert fingerprint(twin, SPEC) == fingerprint(model, SPEC)
    assert fingerprint(nn.Sequential(*model, nn.ReLU()), SPEC) != fingerprint(model, SPEC)
    variance = twin.state_dict()["1.running_var"]
    variance[3] = variance[3].nextafter(torch.tensor(9.0))
    assert fingerprint(twin, SPEC) != fingerprint(model, SPEC)


@pytest.mark.parametrize("keys", [{"slope": 0.2}, {"offset": 0.5000001}, {"squared": True}])
def test_what_the_code_does_counts_too(keys: dict[str, Any]) -> None:
    assert fingerprint(Scaled(), SPEC) == fingerprint(Scaled(), SPEC)
    assert fingerprint(Scaled(**keys), SPEC) != fingerprint(Scaled(), SPEC)


def test_last_digits_of_what_is_computed_do_not_count() -> None:
    class Nearly(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.body, self.factor = net(), factor

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x) * self.factor
            return out

    assert fingerprint(Nearly(1 + 1e-6), SPEC) == fingerprint(Nearly(1.0), SPEC)
    assert fingerprint(Nearly(1.1), SPEC) != fingerprint(Nearly(1.0), SPEC)


def test_a_network_that_draws_random_numbers_has_one_fingerprint_and_the_callers_numbers_stay() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.body(x), 0.5, training=True)

    model = Drawing()
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = fingerprint(model, SPEC)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(8)
    assert fingerprint(model, SPEC) == first


def test_the_model_comes_back_as_it_was() -> None:
    model = net().train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fingerprint(model, SPEC)
    assert [part.training for part in model] == [True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_hooks for part in model.modules())
