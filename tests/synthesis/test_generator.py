"""Any input shape, exactly inside the value range, from the given random numbers alone."""

from __future__ import annotations

import pytest
import torch

from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.generator import build_generator, squash, stage_sizes

SHAPES = [(5,), (1, 49), (2, 1), (1, 8, 8), (3, 33, 21), (4, 7, 50), (2, 5, 6, 7), (1, 1, 1)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_have_the_shape_and_lie_in_the_range(shape: tuple[int, ...]) -> None:
    spec = InputSpec(shape, -3.0, 250.0, (7.3,), (0.7,))
    rng = torch.Generator().manual_seed(0)
    generator = build_generator(spec, 3, 8, rng, CPU)
    x = generator(1e3 * torch.randn(4, 8, generator=rng), torch.tensor([0, 1, 2, 0]))
    low, high = spec.bounds(x)
    assert x.shape == (4, *shape)
    assert x.dtype == torch.float32
    assert bool(((x >= low) & (x <= high)).all())
    x.sum().backward()
    grads = [parameter.grad for parameter in generator.parameters()]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)


def test_the_ends_of_the_range_are_reached_and_not_passed() -> None:
    spec = InputSpec((3, 1, 1), 0.0, 255.0, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    x = squash(torch.tensor([-1e4, 1e4]).view(2, 1, 1, 1).expand(2, 3, 1, 1), spec)
    low, high = spec.bounds(x)
    torch.testing.assert_close(x, torch.stack([low, high]), rtol=1e-6, atol=0)
    assert bool(((x >= low) & (x <= high)).all())


def test_sizes_double_up_to_the_full_one() -> None:
    assert stage_sizes((224, 224)) == [(7, 7), (14, 14), (28, 28), (56, 56), (112, 112), (224, 224)]
    assert stage_sizes((49, 10)) == [(7, 2), (13, 3), (25, 5), (49, 10)]
    assert stage_sizes((8, 8)) == [(4, 4), (8, 8)]
    assert stage_sizes(()) == [(), ()]


def test_start_values_come_from_the_generator_passed_in_and_from_nowhere_else() -> None:
    spec = InputSpec((1, 9, 9))
    before = torch.random.get_rng_state()
    one, two, other = (build_generator(spec, 2, 4, torch.Generator().manual_seed(s), CPU) for s in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    assert not torch.equal(one.project.weight, other.project.weight)


def test_a_class_changes_what_is_painted() -> None:
    generator = build_generator(InputSpec((1, 8, 8)), 2, 16, torch.Generator().manual_seed(0), CPU).eval()
    z = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(generator(z, torch.tensor([0])), generator(z, torch.tensor([1])))
