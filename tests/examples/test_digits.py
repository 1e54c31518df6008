from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from inc_clusterq.config import load_config
from inc_clusterq.errors import ModelError
from inc_clusterq.labelled import load_labelled
from inc_clusterq.models import FloatModel, load_model
from inc_clusterq.references import call_reference


@pytest.fixture(scope="module")
def examples() -> Path:
    return Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def digits(examples: Path) -> FloatModel:
    return load_model(load_config(examples / "digits.yaml").model)


def accuracy(module: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((module(inputs).argmax(1) == labels).double().mean())


def test_the_parts_are_disjoint_fixed_and_together_all_images(examples: Path) -> None:
    from sklearn.datasets import load_digits

    parts = call_reference("python:digits:split", examples, ModelError)
    again = call_reference("python:digits:split", examples, ModelError)
    assert [len(labels) for _, labels in parts] == [1077, 360, 360]
    assert all(torch.equal(one[0], other[0]) for one, other in zip(parts, again, strict=True))
    together = torch.cat([inputs for inputs, _ in parts]).flatten(1) * 16
    original = torch.from_numpy(load_digits().data).float()
    assert sorted(together.tolist()) == sorted(original.tolist())


def test_the_committed_checkpoint_has_the_accuracy_it_records(examples: Path, digits: FloatModel) -> None:
    file = examples / "digits.safetensors"
    assert file.stat().st_size < 1_000_000
    with safe_open(file, "pt") as opened:
        record = opened.metadata()
    assert record["command"] == "python examples/train_digits.py"
    readme = (examples.parent / "README.md").read_text()
    for part in ("validation", "test"):
        inputs, labels = call_reference(f"python:digits:{part}", examples, ModelError)
        assert f"{accuracy(digits.module, inputs, labels):.2f}" == record[f"{part}_accuracy"]
        assert f"{record[f'{part}_accuracy']} %" in readme


def test_the_labelled_set_of_the_example_suits_its_model(examples: Path, digits: FloatModel) -> None:
    config = load_config(examples / "digits.yaml").evaluation.accuracy
    assert config is not None
    inputs, labels = load_labelled(config, digits)
    low, high = digits.input.bounds(inputs)
    assert bool((inputs >= low).all())
    assert bool((inputs <= high).all())
    assert len(labels) == 360


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.Conv2d])
def test_the_network_is_residual_with_a_batch_norm_for_every_convolution(digits: FloatModel, kind: type[nn.Module]) -> None:
    assert sum(isinstance(part, kind) for part in digits.module.modules()) == 15
