"""The user's labelled set, for scoring trials only: loaded and checked against the model."""

from __future__ import annotations

import torch
from torch import Tensor

from inc_clusterq.config import AccuracyConfig
from inc_clusterq.errors import DatasetError
from inc_clusterq.models import FloatModel
from inc_clusterq.references import call_reference


def load_labelled(config: AccuracyConfig, model: FloatModel) -> tuple[Tensor, Tensor]:
    """Inputs (N, *shape), float32, normalised as the model takes them, and labels (N,), int64; or DatasetError."""
    found = call_reference(config.dataset, config.folder, DatasetError)
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(part, Tensor) for part in found):
        raise DatasetError(f"{config.dataset} must return two tensors, (inputs, labels); it returned {type(found).__name__}")
    inputs, labels = found
    if not inputs.is_floating_point() or inputs.shape[1:] != model.input.shape or len(inputs) == 0:
        raise DatasetError(
            f"{config.dataset}: inputs are {inputs.dtype} of shape {tuple(inputs.shape)}; they must be floats of shape "
            f"(N, {', '.join(map(str, model.input.shape))}), normalised as the model takes them"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != inputs.shape[:1]:
        raise DatasetError(
            f"{config.dataset}: labels are {labels.dtype} of shape {tuple(labels.shape)}; they must be one class "
            f"number for each of the {len(inputs)} inputs"
        )
    if not bool(inputs.isfinite().all()):
        raise DatasetError(f"{config.dataset}: some inputs are not finite")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= model.num_classes:
        raise DatasetError(
            f"{config.dataset}: labels go from {low} to {high}; the model has the classes 0 to {model.num_classes - 1}"
        )
    return inputs.to(torch.float32), labels.to(torch.int64)
