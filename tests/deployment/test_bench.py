from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from inc_clusterq.config import QuantizationConfig
from inc_clusterq.cpu import Cpu, cpu, multiplies_blocks, overflows, range_warning
from inc_clusterq.deployment import bench as module
from inc_clusterq.deployment.bench import bench, compared, numbers
from inc_clusterq.deployment.latency import ROUNDS, WARM_UP, milliseconds_in_turn
from inc_clusterq.deployment.saved import SavedModel
from inc_clusterq.errors import ConfigError, ModelError, ResultError
from inc_clusterq.pipeline import _within_range
from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.quantizers import install_quantizers
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.result import place

SavedResult = Callable[..., SavedModel]
OLD = Cpu("old", "x86_64", frozenset({"avx2", "avx512f"}))
NEW = Cpu("new", "x86_64", frozenset({"avx2", "avx512_vnni"}))
TILES = Cpu("tiles", "x86_64", frozenset({"amx_int8"}))
ARM = Cpu("arm", "aarch64", frozenset({"asimd"}))
UNKNOWN = Cpu("unknown processor", "x86_64", frozenset())


def test_only_an_x86_without_vnni_and_amx_overflows() -> None:
    assert [overflows(processor) for processor in (OLD, NEW, TILES, ARM, UNKNOWN)] == [True, False, False, False, False]


def test_only_an_x86_without_avx_512_and_avx_vnni_leaves_products_to_older_routines() -> None:
    blocks, vnni = (Cpu("new", "x86_64", frozenset({"avx2", flag})) for flag in ("avx512bw", "avx_vnni"))
    zen3 = Cpu("zen 3", "x86_64", frozenset({"avx2"}))
    assert [multiplies_blocks(processor) for processor in (zen3, blocks, vnni, ARM, UNKNOWN)] == [False, True, True, True, True]


def test_the_warning_is_for_8_bit_weights_on_such_a_processor() -> None:
    warning = range_warning(OLD, [4, 8])
    assert warning is not None
    assert "reduce_range: true" in warning
    assert range_warning(OLD, [4, 7]) is None
    assert range_warning(NEW, [8]) is None


def test_the_processor_is_read_from_the_systems_description(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nmodel name\t: Fast\nflags\t\t: avx2 avx_vnni\nprocessor\t: 1\nmodel name\t: Slow\nflags\t: avx2\n"
    )
    found = cpu(file)
    assert (found.model, found.vnni, found.amx) == ("Fast", True, False)
    assert str(found) == "Fast: VNNI yes, AMX no, avx2"
    assert cpu(tmp_path / "none").flags == frozenset()


@pytest.mark.parametrize(
    ("wanted", "processor", "ceiling"), [("auto", OLD, 7), ("auto", NEW, 8), (True, NEW, 7), (False, OLD, 8)]
)
def test_reduce_range_keeps_weights_to_7_bits_where_8_overflow(
    monkeypatch: pytest.MonkeyPatch, wanted: bool | str, processor: Cpu, ceiling: int
) -> None:
    monkeypatch.setattr("inc_clusterq.pipeline.cpu", lambda: processor)
    settings = _within_range(QuantizationConfig.model_validate({"reduce_range": wanted}))
    assert settings.weight_ceiling == ceiling


def test_the_ceiling_holds_for_the_first_and_last_layer_too(
    network: Callable[[str], tuple[nn.Module, Tensor]], prepare: Callable[..., torch.fx.GraphModule]
) -> None:
    settings = ReconstructionSettings(weight_ceiling=7)
    graph = install_quantizers(prepare(*network("chain")), BitPlan(8, 8), settings)
    weights = {layer.quantizer for unit in graph.units for layer in unit.layers}
    assert {graph.bits[str(name)] for name in weights} == {7}
    assert {bits for name, bits in graph.bits.items() if name not in weights} == {8}


def test_the_models_take_turns_and_are_compared_pair_by_pair() -> None:
    calls: list[str] = []

    def model(name: str, seconds: float) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            calls.append(name)
            time.sleep(seconds)
            return x

        return call

    timings = compared({"float": model("float", 0.004), "fast": model("fast", 0.001)}, torch.zeros(3, 1))
    assert calls == ["float", "fast"] * (WARM_UP + ROUNDS)
    assert [(timing.model, timing.batch) for timing in timings] == [("float", 3), ("fast", 3)]
    assert timings[0].speed.median == 1
    assert 2 < timings[1].speed.median < 5
    assert timings[1].latency.low <= timings[1].latency.median <= timings[1].latency.high


@pytest.mark.parametrize("text", ["", "0", "1,x", "-1", "1,4097"])
def test_batch_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="whole numbers from 1 to 4096"):
        numbers(text)
    assert numbers("1,32") == (1, 32)


NET = """
    from torch import nn

    def net():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).eval()
"""


def test_the_float_model_is_found_where_the_result_says(
    saved: SavedResult,
    write_module: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "milliseconds_in_turn", partial(milliseconds_in_turn, rounds=8))
    folder = saved("chain", 8).folder
    report = json.loads((folder / "result.json").read_text())
    try:
        with pytest.raises(ResultError, match="--config"):
            bench(folder, (1,), ("onnxruntime",))
        model = {**report["config"]["model"], "architecture": f"python:{write_module(NET)}:net"}
        found = {**report, "fingerprint": "of another network", "folder": str(tmp_path), "config": {"model": model}}
        (folder / "result.json").write_text(json.dumps(found))
        with pytest.raises(ResultError, match=r"has been moved since it was made, .* name the job's YAML with --config"):
            bench(folder, (1,), ("onnxruntime",))
        found["place"] = place(tmp_path)
        (folder / "result.json").write_text(
            json.dumps({**found, "config": {"model": {**model, "input": {"shape": [3, 5, 5]}}}})
        )
        with pytest.raises(ResultError, match=r"takes inputs of shape \[3, 8, 8\], and those of its YAML have \[3, 5, 5\]"):
            bench(folder, (1,), ("onnxruntime",))
        (folder / "result.json").write_text(json.dumps(found))
        with caplog.at_level("WARNING"):
            measured = bench(folder, (1, 2), ("onnxruntime", "openvino"), threads=1)
        assert "is not the one that was quantized" in caplog.text
        (folder / "result.json").write_text(json.dumps({**found, "folder": "."}))
        with pytest.raises(ResultError, match="none of its own code is run: name the job's YAML with --config"):
            bench(folder, (1,), ("onnxruntime",))
        found["config"]["model"]["architecture"] = "python:nowhere:net"
        (folder / "result.json").write_text(json.dumps(found))
        with pytest.raises(ModelError, match="nowhere"):
            bench(folder, (1,), ("onnxruntime",))
    finally:
        (folder / "result.json").write_text(json.dumps(report))
    assert [(timing.model, timing.batch) for timing in measured.timings] == [
        (name, batch) for batch in (1, 2) for name in ("float", "onnxruntime", "openvino")
    ]
    measured.print(Console(file=(text := StringIO()), width=160))
    assert "1 thread(s)" in text.getvalue()
    assert "VNNI" in text.getvalue()
