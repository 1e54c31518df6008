from __future__ import annotations

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from inc_clusterq.inputs import InputSpec


def test_normalise_is_the_hand_value_per_channel() -> None:
    spec = InputSpec((2, 1, 1), 0, 255, mean=(10.0, 20.0), std=(2.0, 4.0))
    raw = torch.tensor([[[[30.0]], [[20.0]]]])
    assert torch.equal(spec.normalise(raw), torch.tensor([[[[10.0]], [[0.0]]]]))


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 7), (3, 2, 5, 4), (3,)])
def test_normalise_is_torchs_own_for_every_rank(shape: tuple[int, ...]) -> None:
    spec = InputSpec(shape, 0, 255, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    raw = torch.rand((4, *shape), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 255
    mean, std = torch.tensor(spec.mean, dtype=raw.dtype), torch.tensor(spec.std, dtype=raw.dtype)
    expected = nn.functional.batch_norm(raw, mean, std**2, eps=0.0)
    torch.testing.assert_close(spec.normalise(raw), expected)


def test_bytes_are_normalised_as_floats() -> None:
    spec = InputSpec((1, 1, 2), 0, 255, std=(255.0,))
    assert torch.equal(spec.normalise(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)), torch.tensor([[[[0.0, 1.0]]]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_normalised_value_falls_outside_the_bounds(dtype: torch.dtype) -> None:
    spec = InputSpec((3, 1, 1), -7.3, 251.9, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    ramp = torch.linspace(spec.low, spec.high, 10_001, dtype=torch.float64).to(dtype)
    raw = ramp[:, None, None, None].expand(-1, 3, 1, 1)
    low, high = spec.bounds(raw)
    assert low.dtype == high.dtype == dtype
    x = spec.normalise(raw)
    assert bool(((x >= low) & (x <= high)).all())
    assert bool((x.amin(0) == low).all())
    assert bool((x.amax(0) == high).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": ()}, "shape is []"),
        ({"shape": (3, 0, 4)}, "shape is [3, 0, 4]"),
        ({"low": 1.0, "high": 1.0}, "range is [1, 1]"),
        ({"high": float("inf")}, "range is [0, inf]"),
        ({"mean": (0.0, 0.0)}, "mean has 2 values; shape [3, 4, 4] takes one for all channels or 3, one per channel"),
        ({"mean": (float("nan"),)}, "mean is [nan]"),
        ({"mean": (123.7,)}, "mean is [123.7] and range is [0, 1]; both are of raw values"),
        ({"mean": (0.5, 0.5, -0.1)}, "mean is [0.5, 0.5, -0.1] and range is [0, 1]"),
        ({"shape": (3, 4, 4, 4, 4)}, "shape is [3, 4, 4, 4, 4]; a sample has one axis of channels and at most three of space"),
        ({"std": (1.0, 0.0, 1.0)}, "std is [1.0, 0.0, 1.0]; every value must be above 0"),
    ],
)
def test_an_impossible_input_is_refused_with_the_value(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        InputSpec(**{"shape": (3, 4, 4), **arguments})  # type: ignore[arg-type]


def test_one_number_stands_for_all_channels() -> None:
    assert InputSpec((3, 4, 4), mean=0.5, std=2) == InputSpec((3, 4, 4), mean=(0.5,), std=(2.0,))  # type: ignore[arg-type]


def test_a_size_is_a_whole_number() -> None:
    with pytest.raises(ValueError, match=re.escape("shape is [3, 4.5, 4]; it must hold the positive sizes")):
        InputSpec((3, 4.5, 4))  # type: ignore[arg-type]


def test_numbers_may_be_those_of_numpy_and_torch() -> None:
    plain = InputSpec((3, 4, 4), 0.0, 1.0, (0.5, 0.5, 0.25), (1.0,))
    mean = [0.5, 0.5, 0.25]
    for given in (np.array(mean), torch.tensor(mean)):
        spec = InputSpec(torch.Size((3, 4, 4)), np.float32(0), torch.tensor(1), given)  # type: ignore[arg-type]
        assert spec == plain
        assert json.dumps(asdict(spec)) == json.dumps(asdict(plain))


def test_a_range_without_zero_goes_with_no_mean() -> None:
    low, high = InputSpec((3, 4, 4), 20, 300, std=(10.0,)).bounds(torch.empty(0))
    assert (float(low), float(high)) == (2, 30)


def test_the_middle_is_that_of_the_raw_values() -> None:
    middle = InputSpec((2, 3, 1), 0.0, 255.0, (55.0, 127.5), (10.0,)).middle(4)
    assert (middle.shape, middle.dtype) == ((4, 2, 3, 1), torch.float32)
    assert middle[:, 0].unique().tolist() == [7.25]
    assert middle[:, 1].unique().tolist() == [0]
