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


def test_large_images_are_pressed_less_into_their_class_unless_told_otherwise() -> None:
    weights = [ClusterQSettings().of_inputs(shape).classification_weight for shape in ((3, 96, 96), (3, 95, 200), (40,))]
    assert weights == [0.001, 0.01, 0.01]
    assert ClusterQSettings(classification_weight=0).of_inputs((3, 96, 96)).classification_weight == 0


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
