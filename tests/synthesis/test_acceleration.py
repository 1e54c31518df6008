"""The teacher in other arithmetic or as compiled code still says what it said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.cpu import Cpu
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis import acceleration
from inc_clusterq.synthesis.acceleration import compiled, is_channels_last, is_compiled, is_in_bfloat16
from inc_clusterq.synthesis.clusterq import synthesise
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.teacher import Teacher, teach

SPEC, LARGE, SMALL = InputSpec((3, 12, 12)), InputSpec((3, 96, 96)), InputSpec((3, 32, 32))
BRIEF = {"iterations": 0, "refine_iterations": 4, "refine_batch": 6, "bfloat16": False}


@pytest.fixture
def net() -> nn.Module:
    """A dense and a depthwise convolution, one normalisation that is called twice, and one before its convolution."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.before, self.shared = nn.BatchNorm2d(3), nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.shared(self.stem(self.before(x))).relu()
            x = self.shared(self.depthwise(x)).relu() + x
            out: Tensor = self.head(x.mean((2, 3)))
            return out

    torch.manual_seed(0)
    return Net().eval()


def made(net: nn.Module, **keys: Any) -> Tensor:
    settings = ClusterQSettings.model_validate({**BRIEF, **keys})
    return synthesise(net, SPEC, settings, num_classes=4, samples=11, seed=0)[0]


def seen_by(teacher: Teacher) -> list[Tensor]:
    """Logits, all moments, and the gradient of their sum."""
    x = torch.rand(5, *SPEC.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    seen = teacher.observe(x)
    assert seen.logits is not None
    values = [seen.logits, *[moment for layer in seen.samples for moment in (layer.mean, layer.variance)]]
    (gradient,) = torch.autograd.grad(torch.stack([value.square().sum() for value in values]).sum(), x)
    return [*[value.detach() for value in values], gradient]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own look at what is no leaf
def test_compiled_the_teacher_says_what_it_said_and_the_set_repeats_to_the_bit(net: nn.Module) -> None:
    with teach(net, SPEC, num_classes=4, first_aligned_layer=None) as teacher:
        with compiled(teacher, SPEC, samples=6) as faster:
            assert faster is not teacher
            torch.testing.assert_close(seen_by(faster), seen_by(teacher), rtol=1e-4, atol=1e-5)
        assert not any(part._forward_pre_hooks for part in net.modules())
    once, again, plain = made(net, compile_teacher=True), made(net, compile_teacher=True), made(net, compile_teacher=False)
    assert torch.equal(once, again)
    assert not torch.equal(once, plain)  # or it would not have been compiled
    torch.testing.assert_close(once, plain, rtol=0, atol=1e-2)


def test_what_the_compiler_refuses_is_run_as_it_stands(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("no C++ compiler found\nand much more")

        return call

    plain = made(net, compile_teacher=False)
    monkeypatch.setattr(torch, "compile", refuse)
    assert torch.equal(made(net, compile_teacher=True), plain)
    assert (
        "the model can't be compiled (RuntimeError: no C++ compiler found) and is run as it stands, slower" in caplog.messages
    )


@pytest.mark.parametrize(
    ("keys", "spec", "batches", "wanted"),
    [
        ({}, LARGE, 4, True),
        ({}, SMALL, 4, False),
        (ClusterQSettings.PRESETS["fast"], LARGE, 4, True),
        (ClusterQSettings.PRESETS["fast"], LARGE, 3, False),
        ({"compile_teacher": True}, SMALL, 1, True),
        ({"compile_teacher": False}, LARGE, 40, False),
        ({"compile_teacher": True, "synthesizer": "latent"}, LARGE, 4, False),
    ],
)
def test_long_runs_on_large_images_are_compiled_unless_told_otherwise(
    keys: dict[str, Any], spec: InputSpec, batches: int, wanted: bool
) -> None:
    assert is_compiled(ClusterQSettings.model_validate(keys), spec, batches, torch.device("cpu")) is wanted


@pytest.mark.parametrize(
    ("keys", "flags", "dtype", "size", "groups", "wanted"),
    [
        ({}, {"amx_bf16"}, torch.float32, 96, 1, True),
        ({}, {"amx_bf16"}, torch.float32, 95, 1, False),
        ({}, {"amx_bf16"}, torch.float32, 96, 2, False),
        ({}, {"amx_bf16"}, torch.float64, 96, 1, False),
        ({}, {"avx512_bf16"}, torch.float32, 96, 1, True),
        ({}, {"avx512f"}, torch.float32, 96, 1, False),
        ({"bfloat16": True}, set(), torch.float32, 12, 2, True),
        ({"bfloat16": False}, {"amx_bf16"}, torch.float32, 96, 1, False),
    ],
)
def test_dense_networks_are_in_bfloat16_where_there_are_instructions_for_it_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    flags: set[str],
    dtype: torch.dtype,
    size: int,
    groups: int,
    wanted: bool,
) -> None:
    monkeypatch.setattr(acceleration, "cpu", lambda: Cpu("some", "x86_64", frozenset(flags)))
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=groups), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(dtype)
    spec = InputSpec((2, size, size))
    with teach(net, spec, num_classes=4, first_aligned_layer=None) as teacher:
        assert is_in_bfloat16(ClusterQSettings.model_validate(keys), spec, teacher) is wanted


def test_with_channels_last_the_teacher_says_what_it_said_and_its_maps_keep_them_there(net: nn.Module) -> None:
    layouts = []
    with teach(net, SPEC, num_classes=4, first_aligned_layer=None) as teacher:
        assert is_channels_last(SPEC, teacher)
        handle = teacher.layers[1].register_forward_pre_hook(
            lambda _, given: layouts.append(given[0].is_contiguous(memory_format=torch.channels_last))
        )
        torch.testing.assert_close(seen_by(replace(teacher, channels_last=True)), seen_by(teacher), rtol=1e-4, atol=1e-5)
        handle.remove()
    assert layouts == [True, True, False, False]  # of two calls each


class Viewed(nn.Module):
    """Takes maps apart as they lie in memory, as many classifiers do."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1)


@pytest.mark.parametrize(
    ("flat", "dims", "bfloat16", "wanted"),
    [
        (nn.Flatten(), 2, False, True),
        (Viewed(), 2, False, False),
        (nn.Flatten(), 1, False, False),
        (nn.Flatten(), 2, True, True),
    ],
)
def test_channels_are_last_for_images_where_the_network_takes_them_so(
    flat: nn.Module, dims: int, bfloat16: bool, wanted: bool
) -> None:
    conv, norm = (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)) if dims == 1 else (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net, spec = nn.Sequential(conv, norm, flat, nn.Linear(4 * 6**dims, 2)).eval(), InputSpec((3, *[8] * dims))
    with teach(net, spec, num_classes=2, first_aligned_layer=None) as teacher:
        assert is_channels_last(spec, replace(teacher, bfloat16=bfloat16)) is wanted
    settings = ClusterQSettings.model_validate({**BRIEF, "bfloat16": bfloat16})
    assert synthesise(net, spec, settings, num_classes=2, samples=3, seed=0)[0].shape == (3, *spec.shape)


def test_bfloat16_moves_moments_by_what_its_digits_allow_and_the_set_little(net: nn.Module) -> None:
    with teach(net, SPEC, num_classes=4, first_aligned_layer=None) as teacher:
        rounded, exact = seen_by(replace(teacher, bfloat16=True)), seen_by(teacher)
    for moved, wanted in zip(rounded, exact, strict=True):
        assert moved.dtype == torch.float32
        assert (moved - wanted).norm() < 2**-6 * wanted.norm()  # 8 binary digits, through a few layers
    assert any(not torch.equal(moved, wanted) for moved, wanted in zip(rounded, exact, strict=True))
    assert not torch.equal(made(net, bfloat16=True), made(net))
    torch.testing.assert_close(made(net, bfloat16=True), made(net), rtol=0, atol=0.2)
