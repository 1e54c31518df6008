from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.errors import DatasetError, ModelError
from inc_clusterq.evaluation import BATCH, accuracy, agreement, predictions


class Largest(nn.Module):
    """The class is the place of the largest of an image's three numbers, moved on by `shift`."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.shift = shift
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.roll(self.shift, 1)


@pytest.fixture
def inputs() -> Tensor:
    """Not a whole number of batches."""
    return torch.randn(BATCH + 7, 3, generator=torch.Generator().manual_seed(0))


def test_every_image_is_predicted_the_short_last_batch_too(inputs: Tensor) -> None:
    assert torch.equal(predictions(Largest(), inputs), inputs.argmax(1))


def test_predictions_keep_no_graph() -> None:
    model = nn.Linear(3, 2)
    assert not predictions(model, torch.ones(2, 3)).requires_grad


def test_accuracy_is_the_share_of_labels_that_are_met(inputs: Tensor) -> None:
    labels = inputs.argmax(1)
    labels[:18] = (labels[:18] + 1) % 3
    assert accuracy(inputs, labels)(Largest()) == pytest.approx(1 - 18 / len(inputs))


def test_the_float_model_agrees_with_itself(inputs: Tensor) -> None:
    model = Largest()
    assert agreement(model, inputs)(model) == 1.0


@pytest.mark.parametrize(
    ("output", "told"), [({"logits": torch.ones(2, 3)}, "dict"), (torch.ones(2, 3, 4), r"shape \(2, 3, 4\)")]
)
def test_what_is_not_logits_is_not_scored(output: Any, told: str) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output

    with pytest.raises(ModelError, match=f"the model returns .*{told}; what is scored must return one tensor of class logits"):
        predictions(Other(), torch.ones(2, 3))


@pytest.mark.parametrize("nothing", [[], torch.ones(0, 3)])
def test_a_score_needs_images(nothing: Any) -> None:
    with pytest.raises(DatasetError, match="no images to compare"):
        agreement(Largest(), nothing)(Largest())


def test_agreement_is_the_share_of_equal_classes(inputs: Tensor) -> None:
    class Half(Largest):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0, x, x.roll(1, 1))

    expected = float(((inputs[:, 0] > 0) | (inputs.argmax(1) == inputs.roll(1, 1).argmax(1))).double().mean())
    assert agreement(Largest(), inputs)(Half()) == pytest.approx(expected)
    assert agreement(Largest(), inputs)(Largest(1)) == 0.0


def test_a_loader_serves_as_well_as_a_tensor_and_is_read_once(inputs: Tensor) -> None:
    class Loader:
        reads = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.reads += 1
            for batch in inputs.split(10):
                yield batch, torch.zeros(len(batch))

    loader, model = Loader(), Largest()
    score = agreement(model, loader)
    assert loader.reads == model.calls == 0  # synthesis, for one, happens when it is needed
    assert score(Largest(1)) == agreement(Largest(), inputs)(Largest(1))
    calls = model.calls
    score(Largest(2))
    assert loader.reads == 1
    assert model.calls == calls  # the float model is asked once


def test_labels_may_be_left_out_of_batches_and_what_is_no_image_is_refused(inputs: Tensor) -> None:
    expected = agreement(Largest(), inputs)(Largest(1))
    for batches in (inputs.split(2), [[batch] for batch in inputs.split(2)]):
        assert agreement(Largest(), batches)(Largest(1)) == expected
    mistakes: list[Any] = [{"image": inputs}, (inputs, inputs, inputs), []]
    for wrong in mistakes:
        with pytest.raises(DatasetError, match=r"it must be a tensor, or \(images, labels\)"):
            agreement(Largest(), [wrong])(Largest())


def test_the_float_model_is_asked_in_eval_mode_and_keeps_its_own(inputs: Tensor) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9)).train()
    before = model[0].running_mean.clone()  # type: ignore[operator]
    assert agreement(model, inputs)(Largest()) == 1.0
    assert model.training
    assert torch.equal(model[0].running_mean, before)  # type: ignore[arg-type]
