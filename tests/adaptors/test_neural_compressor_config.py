from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from neural_compressor.common.base_config import config_registry
from neural_compressor.torch.utils.utility import algos_mapping

from inc_clusterq.adaptors.neural_compressor_algorithm import mrecg_entry
from inc_clusterq.adaptors.neural_compressor_config import MRECGConfig, refuse_foreign
from inc_clusterq.errors import ClusterQError

QUICK = {"iterations": 4, "batch_size": 8}


def test_the_host_knows_the_configuration_and_the_algorithm() -> None:
    assert config_registry.get_cls_configs()["torch"]["mrecg"] is MRECGConfig
    assert algos_mapping["mrecg"] is mrecg_entry


def test_lists_expand_into_one_trial_per_combination() -> None:
    config = MRECGConfig(w_bits=[2, 4], act_bits=4, granularity=["block", "loss"], **QUICK)  # type: ignore[arg-type]
    expanded = config.expand()
    assert {(one.w_bits, one.granularity) for one in expanded} == {(2, "block"), (2, "loss"), (4, "block"), (4, "loss")}
    for one in expanded:
        assert (one.act_bits, one.settings) == (4, QUICK)
        assert one.reconstruction_settings().iterations == 4
    assert len({json.dumps(one.to_dict(), sort_keys=True) for one in expanded}) == 4


def test_every_scalar_argument_expands() -> None:
    lists: dict[str, Any] = {"fallback_units": [0, 1], "preset": ["fast", "best"], "seed": [1, 2]}
    for key, values in lists.items():
        assert [getattr(one, key) for one in MRECGConfig(**{key: values}).expand()] == values


def test_the_hosts_own_tuning_set_is_the_papers_two_granularities() -> None:
    assert [one.granularity for one in MRECGConfig.get_config_set_for_tuning().expand()] == ["modcap", "loss"]


def test_a_configuration_is_the_same_after_the_hosts_dictionary() -> None:
    config = MRECGConfig(w_bits=4, layer_bits={"fc": (8, None)}, **QUICK)  # type: ignore[arg-type]
    again = MRECGConfig(**json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == json.loads(json.dumps(config.to_dict()))
    assert again.bit_plan() == config.bit_plan()
    assert again.reconstruction_settings() == config.reconstruction_settings()


def test_a_saved_configuration_tells_nothing_about_the_machine(tmp_path: Path) -> None:
    assert str(tmp_path) not in json.dumps(MRECGConfig(workspace=str(tmp_path)).to_dict())


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"wbits": 4}, TypeError, "no key 'wbits'; did you mean 'w_bits'"),
        ({"iteration": 4}, TypeError, "did you mean 'iterations'"),
        ({"zzz": 4}, TypeError, "no key 'zzz'$"),
        ({"w_bits": 1}, ValueError, "w_bits is 1; it must be a whole number from 2 to 8"),
        ({"act_bits": 9}, ValueError, "act_bits is 9"),
        ({"act_bits": [4, 9]}, ValueError, "act_bits is 9"),
        ({"w_bits": "4"}, ValueError, "w_bits is '4'"),
        ({"w_bits": 4.5}, ValueError, r"w_bits is 4\.5"),
        ({"preset": "slow"}, ValueError, "preset is 'slow'; it must be one of fast, balanced, best"),
        ({"granularity": "channel"}, ValueError, "granularity"),
        ({"iterations": -1}, ValueError, "iterations"),
        ({"settings": {"iteration": 4}}, ValueError, "iteration"),
        ({"w_bits": 4.0}, ValueError, r"w_bits is 4\.0"),
        ({"fallback_units": 1.5}, ValueError, r"fallback_units is 1\.5"),
        ({"fallback_units": -1}, ValueError, "fallback_units is -1"),
        ({"w_bits": []}, ValueError, "w_bits is an empty list"),
        ({"seed": None}, ValueError, "seed is None; it must be a whole number from 0"),
        ({"seed": 1.5}, ValueError, r"seed is 1\.5"),
        ({"layer_bits": {"fc": (16, 8)}}, ValueError, r"bits of 'fc' is \(16, 8\)"),
        ({"layer_bits": {"fc": (4.0, 8)}}, ValueError, r"bits of 'fc' is \(4\.0, 8\)"),
        ({"layer_bits": {"fc": 4}}, ValueError, "bits of 'fc' is 4; it must be a pair"),
        ({"kind_bits": {"conv": (4, 8)}}, ValueError, "kind_bits names 'conv'; it must be one of dense, depthwise"),
        ({"kind_bits": {"linear": (1, 8)}}, ValueError, r"bits of 'linear' is \(1, 8\)"),
        ({"granularity": "explicit"}, ValueError, "needs `explicit_units`"),
        ({"white_list": ["fc"]}, ValueError, "layer_bits="),
    ],
)
def test_a_wrong_argument_is_an_error_at_once(keys: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MRECGConfig(**keys)


def test_the_hosts_way_to_single_out_an_operator_is_refused_and_not_ignored() -> None:
    with pytest.raises(ValueError, match="layer_bits="):
        MRECGConfig().set_local("fc", MRECGConfig(w_bits=8))


def test_a_foreign_algorithm_of_the_same_name_is_not_overwritten() -> None:
    class Theirs:
        __module__ = "their_package.quantization"

    with pytest.raises(ClusterQError, match=r"another package \(their_package\.quantization\) has registered 'mrecg'"):
        refuse_foreign(Theirs)
    refuse_foreign(None)
    refuse_foreign(MRECGConfig)


def test_a_clash_is_found_on_import(root: Path) -> None:
    code = (
        "from neural_compressor.torch.utils import register_algo\n"
        "register_algo('mrecg')(lambda *args, **kwargs: None)\n"
        "from inc_clusterq.errors import ClusterQError\n"
        "try:\n    import inc_clusterq.adaptors.neural_compressor\n"
        "except ClusterQError as error:\n    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert "refused: another package (__main__) has registered 'mrecg'" in done.stdout
