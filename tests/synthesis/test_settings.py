"""Defaults, presets and limits of the expert keys."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from inc_clusterq.synthesis.settings import ClusterQSettings


@pytest.mark.parametrize("name", ["fast", "balanced", "best"])
def test_presets_are_valid_and_differ_in_effort_alone(name: str) -> None:
    settings = ClusterQSettings(**ClusterQSettings.PRESETS[name])
    effort = {"iterations", "warmup_iterations", "refine_iterations", "coarse_share"}
    changed = {key for key, value in settings if value != getattr(ClusterQSettings(), key)}
    assert changed <= effort
    assert 0 < settings.warmup_iterations < settings.iterations


def test_presets_rise_in_effort() -> None:
    steps = [ClusterQSettings(**ClusterQSettings.PRESETS[name]) for name in ("fast", "balanced", "best")]
    assert steps[0].iterations < steps[1].iterations < steps[2].iterations
    assert steps[0].refine_iterations < steps[1].refine_iterations < steps[2].refine_iterations


@pytest.mark.parametrize(
    ("shape", "weight", "rate", "smoothness"),
    [((3, 96, 96), 0.001, 0.01, 1), ((3, 95, 200), 0.01, 0.03, 0), ((40,), 0.01, 0.03, 0)],
)
def test_what_is_left_open_follows_the_size_of_the_images(
    shape: tuple[int, ...], weight: float, rate: float, smoothness: float
) -> None:
    found = ClusterQSettings().of_inputs(shape)
    assert (found.classification_weight, found.refine_learning_rate, found.refine_smoothness) == (weight, rate, smoothness)
    assert [ClusterQSettings(synthesizer=name).of_inputs(shape).learning_rate for name in ("clusterq", "latent")] == [
        3e-3,
        1e-2,
    ]


def test_what_is_given_stays_but_for_waves_where_there_are_no_neighbours() -> None:
    given = ClusterQSettings(classification_weight=0, learning_rate=1, refine_learning_rate=1, refine_smoothness=0.5)
    assert given.of_inputs((3, 96, 96)) == given
    assert given.of_inputs((40,)) == given.model_copy(update={"refine_smoothness": 0})


def test_every_key_says_what_it_is_and_where_its_default_comes_from() -> None:
    sources = ("Paper", "Released code", "By trial", "by trial", "Our choice", "paper", "See classification_weight")
    for name, field in ClusterQSettings.model_fields.items():
        assert field.description, name
        assert any(source in field.description for source in sources), name


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"iteration": 5}, "iteration"),
        ({"batch_size": 1}, "greater than or equal to 2"),
        ({"centroid_momentum": 0}, "greater than 0"),
        ({"betas": (0.5, 1.0)}, r"each must be in \[0, 1\)"),
        ({"iterations": 0, "refine_iterations": 0}, "nothing would be synthesised"),
        ({"start": "leaves", "refine_iterations": 0}, "give it at least 1"),
        ({"statistics_distance": "l1"}, "'relative', 'deviation' or 'variance'"),
    ],
)
def test_impossible_values_are_refused(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ClusterQSettings(**keys)
