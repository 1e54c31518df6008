from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch

from inc_clusterq.reconstruction.granularity import differences, explicit_units, merge_pairs, select_pairs, stack_chains
from inc_clusterq.reconstruction.graph import Unit
from inc_clusterq.reconstruction.layers import Layer
from inc_clusterq.reconstruction.quantizers import QuantizedGraph

Make = Callable[..., Layer]
MakeUnit = Callable[..., Unit]


def names(units: list[Unit]) -> list[str]:
    return ["".join(layer.name for layer in unit.layers) for unit in units]


def test_differences_are_squared_and_missing_where_units_cannot_be_compared(layer: Make, unit: MakeUnit) -> None:
    units = [unit(layer(name)) for name in "abcd"]
    found = differences(units, [1.0, 4.0, 2.0, 2.0], lambda first, second: first.layers[0].name != "b")
    assert found == [9.0, None, 0.0]


def test_the_largest_differences_are_chosen_and_ties_go_to_the_earlier_pair() -> None:
    assert select_pairs([1.0, 9.0, 4.0, 9.0, 2.0], 1, chain=True) == [1]
    assert select_pairs([1.0, 9.0, 4.0, 9.0, 2.0], 3, chain=True) == [1, 2, 3]


def test_without_chaining_no_unit_is_in_two_pairs() -> None:
    assert select_pairs([1.0, 9.0, 8.0, 7.0], 2, chain=False) == [1, 3]
    assert select_pairs([1.0, 9.0, 8.0, 7.0], 4, chain=False) == [1, 3]


def test_pairs_that_cannot_be_compared_or_do_not_differ_are_never_chosen() -> None:
    assert select_pairs([None, 0.0, 3.0, None], 4, chain=True) == [2]


def test_no_number_means_the_differences_above_their_mean() -> None:
    assert select_pairs([1.0, 2.0, None, 9.0, 4.0], None, chain=True) == [3]  # the mean is 4
    assert select_pairs([1.0, 2.0, None, 9.0, 4.1], None, chain=True) == [3, 4]


@pytest.mark.parametrize("gaps", [[], [None], [0.0]])
@pytest.mark.parametrize("top_k", [None, 0, 2])
def test_nothing_to_choose_from_is_no_pair(gaps: list[float | None], top_k: int | None) -> None:
    assert select_pairs(gaps, top_k, chain=True) == []


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_choice_maximises_the_papers_objective(top_k: int) -> None:
    gaps = torch.rand(7, generator=torch.Generator().manual_seed(top_k)).tolist()
    best = max(combinations(range(7), top_k), key=lambda chosen: sum(gaps[i] for i in chosen))
    assert select_pairs(gaps, top_k, chain=True) == sorted(best)


def test_consecutive_pairs_merge_into_one_unit(layer: Make, unit: MakeUnit) -> None:
    units = [unit(layer(name)) for name in "abcdef"]
    assert names(merge_pairs(units, [0, 1, 4])) == ["abc", "d", "ef"]
    assert names(merge_pairs(units, [])) == list("abcdef")


def test_chains_stack_up_to_the_longest_and_end_before_a_branch(layer: Make, unit: MakeUnit) -> None:
    branch = unit(layer("x"), layer("y"))
    units = [*(unit(layer(name)) for name in "abcd"), branch, unit(layer("e")), unit(layer("f"))]
    assert names(stack_chains(units, 3)) == ["abc", "d", "xy", "ef"]
    assert names(stack_chains(units, 1)) == ["a", "b", "c", "d", "xy", "e", "f"]
    assert names(stack_chains([branch, branch], 3)) == ["xy", "xy"]


def test_stacking_keeps_step_with_depthwise_and_pointwise_pairs(layer: Make, unit: MakeUnit) -> None:
    kinds = ["dense", "depthwise", "dense", "depthwise", "dense", "depthwise", "dense"]
    units = [unit(layer(str(i), kind=kind)) for i, kind in enumerate(kinds)]
    assert names(stack_chains(units, 3)) == ["012", "34", "56"]


def test_a_stacked_unit_keeps_every_node_in_order(quantized: Callable[..., QuantizedGraph]) -> None:
    units = quantized("chain").units
    stacked = stack_chains(units, 3)
    assert [node for unit in stacked for node in unit.nodes] == [node for unit in units for node in unit.nodes]
    assert [unit.start for unit in stacked] == [units[0].start, units[3].start]


def test_explicit_units_are_those_of_the_list_and_the_rest_stays(quantized: Callable[..., QuantizedGraph]) -> None:
    units = quantized("depthwise").units
    found = explicit_units(units, [["pw1.0", "dw1.0"], ["pw2.0", "fc"]])
    assert names(found) == ["stem.0", "dw1.0pw1.0", "dw2.0", "pw2.0fc"]
    assert names(explicit_units(units, [["stem.0"]])) == names(list(units))


def test_an_explicit_unit_takes_in_what_cannot_be_cut(quantized: Callable[..., QuantizedGraph]) -> None:
    assert names(explicit_units(quantized("residual").units, [["one.conv2.0", "two.conv1.0"]])) == [
        "stem.0",
        "one.conv1.0one.conv2.0two.conv1.0two.conv2.0",
        "fc",
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([["dw1"]], r"'dw1', which the model does not have; did you mean dw1\.0"),
        ([["nothing"]], r"it has: stem\.0, dw1\.0"),
        ([["dw1.0", "dw2.0"]], r"dw1\.0, dw2\.0 has a gap: pw1\.0 must belong to it"),
        ([["dw1.0", "pw1.0"], ["pw1.0", "dw2.0"]], "share a part of the graph"),
    ],
)
def test_explicit_units_that_cannot_be_are_named(
    quantized: Callable[..., QuantizedGraph], wanted: list[list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        explicit_units(quantized("depthwise").units, wanted)
