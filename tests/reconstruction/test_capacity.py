from __future__ import annotations

from collections.abc import Callable

import pytest

from inc_clusterq.reconstruction.capacity import homogeneous, modcap
from inc_clusterq.reconstruction.graph import Unit
from inc_clusterq.reconstruction.layers import Layer

Make = Callable[..., Layer]
MakeUnit = Callable[..., Unit]


def test_modcap_is_parameters_times_bits_times_the_stride_factor(layer: Make, unit: MakeUnit) -> None:
    block = unit(layer("a", (16, 8, 3, 3), stride=2), layer("b", (16, 16, 3, 3)))
    # 1152 * 4 * 1.6 + 2304 * 2
    assert modcap(block, {"q_a": 4, "q_b": 2}, 1.6) == pytest.approx(7372.8 + 4608)
    assert modcap(block, {"q_a": 4, "q_b": 2}, 1.0) == 4608 + 4608


def test_modcap_counts_shortcuts_and_counts_float_weights_as_32_bits(layer: Make, unit: MakeUnit) -> None:
    block = unit(layer("a", (2, 3)), layer("up", (4, 1, 2, 2), quantizer=None), path=("a",))
    assert modcap(block, {"q_a": 8}, 1.6) == 6 * 8 + 16 * 32


def test_kernel_size_channels_and_stride_do_not_part_units(layer: Make, unit: MakeUnit) -> None:
    first = unit(layer("a", (8, 4, 3, 3)), layer("b", (8, 8, 1, 1)))
    second = unit(layer("c", (16, 8, 5, 5), stride=2), layer("d", (32, 16, 1, 1)))
    assert homogeneous(first, second)
    assert homogeneous(second, first)


def test_a_shortcut_off_the_main_path_does_not_part_units(layer: Make, unit: MakeUnit) -> None:
    plain = unit(layer("a"), layer("b"))
    projected = unit(layer("c"), layer("d"), layer("shortcut", (8, 4, 1, 1)), path=("c", "d"))
    assert homogeneous(plain, projected)


@pytest.mark.parametrize("changed", [{"kind": "depthwise"}, {"kind": "grouped"}, {"dilation": 2}, {"kind": "linear"}])
def test_kind_and_dilation_part_units(layer: Make, unit: MakeUnit, changed: dict[str, object]) -> None:
    assert not homogeneous(unit(layer("a"), layer("b")), unit(layer("c"), layer("d", **changed)))


def test_the_number_of_layers_parts_units(layer: Make, unit: MakeUnit) -> None:
    assert not homogeneous(unit(layer("a"), layer("b")), unit(layer("c")))


def test_the_order_of_kinds_parts_units(layer: Make, unit: MakeUnit) -> None:
    assert not homogeneous(unit(layer("a", kind="depthwise"), layer("b")), unit(layer("c"), layer("d", kind="depthwise")))
