from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from inc_clusterq.config import AccuracyConfig
from inc_clusterq.errors import DatasetError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.labelled import load_labelled, load_npz
from inc_clusterq.models import FloatModel

MODEL = FloatModel("net", nn.Identity(), InputSpec((2, 4)), 3, "")


def load(folder: Path, write_module: Callable[[str], str], result: str) -> tuple[torch.Tensor, torch.Tensor]:
    module = write_module(f"import torch\ndef data():\n    return {result}")
    return load_labelled(AccuracyConfig.model_validate({"dataset": f"python:{module}:data"}, context={"folder": folder}), MODEL)


def test_a_labelled_set_arrives_as_float32_and_int64(tmp_path: Path, write_module: Callable[[str], str]) -> None:
    result = "torch.ones(3, 2, 4, dtype=torch.float64), torch.tensor([0, 2, 1], dtype=torch.uint8)"
    inputs, labels = load(tmp_path, write_module, result)
    assert torch.equal(inputs, torch.ones(3, 2, 4))
    assert torch.equal(labels, torch.tensor([0, 2, 1]))


@pytest.mark.parametrize(
    "result",
    [
        "[torch.ones(5, 2, 4), torch.arange(5) % 3]",
        "torch.ones(5, 2, 4).numpy()[::-1], (torch.arange(5) % 3).numpy().astype('uint16')",
        "torch.ones(5, 2, 4).numpy().astype('>f4'), (torch.arange(5) % 3).numpy().astype('>i8')",
        "torch.ones(5, 2, 4), (torch.arange(5) % 3).to(torch.uint16)",
        "torch.utils.data.DataLoader([(torch.ones(2, 4), number % 3) for number in range(5)], batch_size=2)",
    ],
)
def test_a_labelled_set_may_come_in_usual_forms(tmp_path: Path, write_module: Callable[[str], str], result: str) -> None:
    inputs, labels = load(tmp_path, write_module, result)
    assert torch.equal(inputs, torch.ones(5, 2, 4))
    assert labels.tolist() == [0, 1, 2, 0, 1]


def test_channels_that_come_last_are_told(tmp_path: Path) -> None:
    model = replace(MODEL, input=InputSpec((3, 4, 5)))
    np.savez(tmp_path / "set.npz", inputs=np.ones((2, 4, 5, 3), np.float32), labels=np.zeros(2, np.int64))
    with pytest.raises(DatasetError, match=r"channels come first: inputs\.permute\(0, 3, 1, 2\)"):
        load_npz(tmp_path / "set.npz", model)


def test_inputs_out_of_the_range_are_told(
    tmp_path: Path, write_module: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    load(tmp_path, write_module, "torch.ones(3, 2, 4) * 1.005, torch.zeros(3).long()")
    assert not caplog.records
    load(tmp_path, write_module, "torch.tensor([0.0, 128.0, 255.0]).view(3, 1, 1).expand(3, 2, 4), torch.zeros(3).long()")
    assert "2 of 3 inputs leave the range that model.input gives, 0 to 1 when normalised" in caplog.text


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("[1, 2]", r"must return \(inputs, labels\), .* it returned list of int, int"),
        ("torch.ones(3, 2, 4), [0, 1, 2]", r"must return \(inputs, labels\), .* it returned tuple of Tensor, list"),
        ("torch.utils.data.DataLoader([1, 2])", r"must return \(inputs, labels\), .* it returned Tensor"),
        ("torch.utils.data.DataLoader([(torch.ones(2, 4), 0), (torch.ones(2, 5), 0)])", "its DataLoader failed: RuntimeError"),
        ("torch.utils.data.DataLoader([])", "returned a DataLoader without a batch"),
        ("torch.ones(3, 2, 4), torch.zeros(3).numpy().astype(object)", "returned an array that is not of numbers"),
        ("torch.ones(3, 2, 4), torch.eye(3).long()", r"one class number for each of the 3 inputs, such as argmax\(1\) gives"),
        ("torch.ones(3, 2, 4), torch.zeros(3, 1).long()", r"shape \(3, 1\); they must be .*, such as squeeze\(1\) gives"),
        ("torch.ones(3, 2, 4), torch.tensor([1, 2, 3])", "the classes 0 to 2; subtract 1"),
        ("torch.ones(3, 2, 5), torch.zeros(3).long()", r"shape \(3, 2, 5\); they must be floats of shape \(N, 2, 4\)"),
        ("torch.ones(3, 2, 4).byte(), torch.zeros(3).long()", r"inputs are torch.uint8 .* \(inputs.float\(\) - mean\) / std"),
        ("torch.ones(0, 2, 4), torch.zeros(0).long()", r"shape \(0, 2, 4\)"),
        ("torch.ones(3, 2, 4), torch.zeros(3)", "labels are torch.float32"),
        ("torch.ones(3, 2, 4), torch.zeros(4).long()", r"labels are torch.int64 of shape \(4,\)"),
        ("torch.ones(2, 2, 4), torch.tensor([1, 3])", "labels go from 1 to 3; the model has the classes 0 to 2"),
        ("torch.ones(2, 2, 4), torch.tensor([-1, 2])", "labels go from -1 to 2"),
        ("torch.ones(1, 2, 4) / 0, torch.tensor([1])", "some inputs are not finite"),
    ],
)
def test_a_set_that_does_not_suit_the_model_is_refused(
    tmp_path: Path, write_module: Callable[[str], str], result: str, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        load(tmp_path, write_module, result)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint64, np.int32])
def test_labels_of_a_file_may_be_integers_of_any_kind(tmp_path: Path, dtype: type) -> None:
    np.savez(tmp_path / "set.npz", inputs=np.ones((3, 2, 4), np.float32), labels=np.array([0, 2, 1], dtype))
    assert load_npz(tmp_path / "set.npz", MODEL)[1].tolist() == [0, 2, 1]


def test_an_empty_or_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    file.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"set.npz is not an .npz file"):
        load_npz(file, MODEL)
    np.save(tmp_path / "set.npy", np.ones(3))
    with pytest.raises(DatasetError, match=r"set.npy holds a single array; it must be an .npz file"):
        load_npz(tmp_path / "set.npy", MODEL)
    np.savez_compressed(file, inputs=np.random.default_rng(0).random((9, 2, 4), np.float32), labels=np.zeros(9, np.int64))
    whole = file.read_bytes()
    for place in range(60, 160, 5):
        file.write_bytes(whole[:place] + b"\xff\x00\xff" + whole[place + 3 :])
        with pytest.raises(DatasetError):
            load_npz(file, MODEL)
