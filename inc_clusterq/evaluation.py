"""Scores that the host's accuracy criterion reads: all lie in [0, 1], higher is better.

Without labels a model is scored by its agreement with the float model: the share of images to which both give the same
class. It tells how much quantization has changed, not how good the float model is; on synthetic images it tends to be
stricter than accuracy on real ones, and it cannot see a fault that synthetic images do not excite.

A quantized program is scored as int8 kernels compute it (`inc_clusterq.deployment.arithmetic`): the score is the compiled
model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from inc_clusterq.deployment.arithmetic import kernel_arithmetic
from inc_clusterq.errors import DatasetError, ModelError
from inc_clusterq.modes import evaluated
from inc_clusterq.tuning import Score

BATCH = 64  # images per forward pass


@torch.no_grad()
def predictions(
    model: nn.Module,
    inputs: Tensor,  # shape: (N, *shape)
) -> Tensor:
    """Class of each input, shape (N,).

    Raises:
        ModelError: the model returns something else than logits.
    """
    as_deployed = kernel_arithmetic(model)
    classes = []
    for batch in inputs.split(BATCH):
        logits = as_deployed(batch)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(f"the model returns {found}; what is scored must return one tensor of class logits, (N, classes)")
        classes.append(logits.argmax(1))
    return torch.cat(classes)


def accuracy(inputs: Tensor, labels: Tensor) -> Score:
    """Share of `labels` (N,) that a model predicts (top 1)."""

    def score(model: nn.Module) -> float:
        return float((predictions(model, inputs) == labels).double().mean())

    return score


def agreement(
    float_model: nn.Module,
    images: Tensor | Iterable[Tensor | Sequence[Tensor]],  # shape: (N, *shape), or batches, alone or in front of their labels
) -> Score:
    """Share of `images` to which a model gives the class that `float_model` gives; the float model scores 1.

    `images` may be a loader such as `ClusterQDataLoader`; it is read at the first call, which raises DatasetError where it is
    empty.
    """
    known: list[tuple[Tensor, Tensor]] = []

    def score(model: nn.Module) -> float:
        if not known:
            batches = [images] if isinstance(images, Tensor) else [_images(batch) for batch in images]
            if not any(len(batch) for batch in batches):
                raise DatasetError("there are no images to compare models on")
            inputs = torch.cat(batches)
            with evaluated(float_model):
                known.append((inputs, predictions(float_model, inputs)))
        inputs, expected = known[0]
        return float((predictions(model, inputs) == expected).double().mean())

    return score


def _images(batch: object) -> Tensor:
    found = batch[0] if isinstance(batch, tuple | list) and len(batch) in (1, 2) else batch
    if not isinstance(found, Tensor):
        raise DatasetError(f"a batch of the images is {type(batch).__name__}; it must be a tensor, or (images, labels)")
    return found
