"""The caller's model is in use for a while and comes back unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.errors import ConfigError, ModelError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.teacher import first_aligned, frozen, teach


def open_teacher(module: nn.Module, spec: InputSpec, classes: int = 2) -> None:
    with teach(module, spec, num_classes=classes, first_aligned_layer=None):
        pass


def test_every_flag_comes_back_after_a_failure(trained: nn.Sequential) -> None:
    trained.train()
    trained[1].eval()
    trained[0].weight.requires_grad_(False)
    before = copy.deepcopy(trained)

    def fail() -> None:
        with frozen(trained):
            assert not any(part.training for part in trained.modules())
            assert not any(parameter.requires_grad for parameter in trained.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [part.training for part in trained.modules()] == [part.training for part in before.modules()]
    assert [p.requires_grad for p in trained.parameters()] == [p.requires_grad for p in before.parameters()]


def test_layers_come_in_order_of_execution_and_unused_ones_are_left_out() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.unused, self.first = nn.BatchNorm1d(3), nn.BatchNorm1d(9), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(input=self.first(x).relu())
            return out

    net = Backwards()
    with teach(net, InputSpec((3,)), num_classes=3, first_aligned_layer=None) as teacher:
        assert teacher.layers == (net.first, net.last)


class OwnBatchNorm(nn.Module):
    """Holds its statistics in the shape that they are used in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.randn(1, channels, 1, 1))
        self.register_buffer("running_var", torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.running_mean, Tensor)
        assert isinstance(self.running_var, Tensor)
        return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()


def test_a_batch_norm_that_users_wrote_may_hold_its_statistics_in_the_shape_that_it_needs() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), OwnBatchNorm(4), nn.Conv2d(4, 2, 6), OwnBatchNorm(2), nn.Flatten())
    with teach(net, InputSpec((1, 8, 8)), num_classes=2, first_aligned_layer=None) as teacher:
        assert [layer.moments.mean.shape for layer in teacher.references] == [(4,), (2,)]
        assert [found.mean.shape for found in teacher.observe(torch.randn(5, 1, 8, 8)).samples] == [(5, 4), (5, 2)]


def test_statistics_that_are_not_one_per_channel_are_named() -> None:
    with pytest.raises(ModelError, match=r"a OwnBatchNorm holds 1 running means for an input of 4 channels \(axis 1\)"):
        open_teacher(nn.Sequential(nn.Conv2d(1, 4, 3), OwnBatchNorm(1), nn.Flatten()), InputSpec((1, 3, 3)), classes=4)


def test_a_model_that_calls_no_batch_norm_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(ModelError, match="calls none of them"):
        open_teacher(Idle(), InputSpec((2,)))


def test_outputs_that_are_not_the_expected_logits_are_named() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(ModelError, match=r"returns \[2, 2\] .* \[2, 5\] are needed"):
        open_teacher(net, InputSpec((2,)), classes=5)


def test_batch_norm_before_convolution_and_in_double_precision_works() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    spec = InputSpec((3, 5, 5))
    with teach(net, spec, num_classes=6, first_aligned_layer=None) as teacher:
        x = torch.rand(4, 3, 5, 5, requires_grad=True)
        seen = teacher.observe(x)
        seen.samples[0].mean.sum().backward()
    assert seen.logits is not None
    assert seen.logits.dtype == torch.float32
    torch.testing.assert_close(seen.samples[0].mean, x.detach().double().mean((2, 3)))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 25))


@pytest.mark.parametrize(("layers", "first"), [(1, 0), (3, 0), (4, 0), (5, 1), (19, 8), (20, 8), (27, 12)])
def test_first_aligned_layer_follows_the_released_code(layers: int, first: int) -> None:
    assert first_aligned(layers, None) == first


def test_a_first_aligned_layer_beyond_the_last_is_refused() -> None:
    assert first_aligned(3, 2) == 2
    with pytest.raises(ConfigError, match="first_aligned_layer is 3, but the model calls 3 BatchNorm layers; use 0 to 2"):
        first_aligned(3, 3)


class Cut(nn.Module):
    """A frozen backbone, as some write it."""

    def __init__(self, context: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.norm, self.head, self.context = nn.BatchNorm1d(3), nn.Linear(3, 2), context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            features = self.norm(x)
        out: Tensor = self.head(features)
        return out


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_forward_that_gives_no_gradient_is_refused(context: Callable[[], AbstractContextManager[object]]) -> None:
    with pytest.raises(ModelError, match=r"Cut gives no gradient to its input: .* requires_grad_"):
        open_teacher(Cut(context), InputSpec((3,)))
    open_teacher(Cut(nullcontext), InputSpec((3,)))


class Overwritten(nn.Module):
    """Runs and is exported, and has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.linear(x))
        out: Tensor = self.head(self.norm(gate.mul_(0.5)))
        return out


def test_a_forward_that_overwrites_what_its_gradient_needs_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Overwritten has no gradient .*modified by an inplace operation; .*new tensors"):
        open_teacher(Overwritten(), InputSpec((3,)))


def test_the_gradient_of_the_input_is_asked_for_whatever_the_caller_has_switched_off() -> None:
    model = Cut(nullcontext)
    with torch.inference_mode():
        open_teacher(model, InputSpec((3,)))
