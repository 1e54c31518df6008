from __future__ import annotations

import pytest

from inc_clusterq.reconstruction.bits import LayerBits
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.registry import STRATEGIES, find
from inc_clusterq.strategies.mrecg import MRECGStrategy
from inc_clusterq.tuning import Trial, TuningRequest


def trials(weight: int = 4, activation: int = 4, most: int = 6, **settings: object) -> list[Trial]:
    chosen = ReconstructionSettings.model_validate(settings)
    return list(MRECGStrategy().trials(TuningRequest(weight, activation, chosen, max_trials=most)))


def summary(found: list[Trial]) -> list[tuple[str | None, int]]:
    return [(trial.settings.granularity, trial.fallback_units) for trial in found]


def test_modcap_comes_first_then_loss_then_ever_more_units_at_8_bits() -> None:
    assert summary(trials()) == [("modcap", 0), ("loss", 0), ("modcap", 1), ("modcap", 2), ("modcap", 4), ("modcap", 8)]


@pytest.mark.parametrize("granularity", ["layer", "block", "modcap", "loss"])
def test_a_granularity_that_the_user_fixed_is_kept(granularity: str) -> None:
    assert summary(trials(granularity=granularity, most=3)) == [(granularity, 0), (granularity, 1), (granularity, 2)]


def test_at_8_bits_there_is_nothing_to_fall_back_to() -> None:
    assert summary(trials(8, 8)) == [("modcap", 0), ("loss", 0)]
    assert summary(trials(8, 8, granularity="block")) == [("block", 0)]


@pytest.mark.parametrize(("weight", "activation"), [(4, 8), (8, 4)])
def test_one_width_below_8_bits_is_enough_to_fall_back(weight: int, activation: int) -> None:
    assert len(trials(weight, activation)) == 6


@pytest.mark.parametrize("most", [1, 2, 3, 7])
@pytest.mark.parametrize("bits", [4, 8])
def test_there_is_at_least_one_trial_and_never_more_than_allowed(most: int, bits: int) -> None:
    assert 1 <= len(trials(bits, bits, most)) <= most


@pytest.mark.parametrize(("units", "raised"), [(1, [1]), (4, [1, 2, 4]), (19, [1, 2, 4, 8, 16, 19])])
def test_the_last_trial_has_all_units_at_8_bits(units: int, raised: list[int]) -> None:
    request = TuningRequest(4, 4, ReconstructionSettings(), units=units, max_trials=100)
    found = list(MRECGStrategy().trials(request))
    assert summary(found)[2:] == [("modcap", count) for count in raised]
    assert found[-1].label == "modcap, all units at 8 bits"


def test_where_no_unit_can_get_more_bits_there_is_nothing_to_fall_back_to() -> None:
    absent = TuningRequest(8, 8, ReconstructionSettings(), kinds={"grouped": LayerBits(4)}, units=0, max_trials=9)
    assert summary(list(MRECGStrategy().trials(absent))) == [("modcap", 0), ("loss", 0)]


def test_a_single_layer_below_8_bits_is_enough_to_fall_back() -> None:
    for few in ({"layers": {"conv": LayerBits(activation=4)}}, {"kinds": {"dense": LayerBits(4)}}):
        request = TuningRequest(8, 8, ReconstructionSettings(), max_trials=3, **few)  # type: ignore[arg-type]
        assert len(MRECGStrategy().trials(request)) == 3


def test_a_single_trial_is_modcap() -> None:
    assert summary(trials(most=1)) == [("modcap", 0)]


def test_no_two_trials_are_alike_and_each_has_a_label_of_its_own() -> None:
    found = trials(most=9)
    assert len(set(summary(found))) == len(found)
    assert len({trial.label for trial in found}) == len(found)


def test_the_users_other_settings_reach_every_trial() -> None:
    assert {(trial.settings.iterations, trial.settings.top_k) for trial in trials(iterations=7, top_k=2)} == {(7, 2)}


def test_the_strategy_is_found_by_its_name() -> None:
    assert find(STRATEGIES, "mrecg") is MRECGStrategy
