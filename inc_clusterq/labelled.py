"""The user's labelled set, for scoring trials and inspecting sets only: loaded and checked against the model."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from inc_clusterq.config import AccuracyConfig
from inc_clusterq.errors import DatasetError
from inc_clusterq.models import FloatModel
from inc_clusterq.references import call_reference

logger = logging.getLogger(__name__)

OUTSIDE = 0.01  # of the range: so far beyond it come resized and rounded images of the sensor


def load_labelled(config: AccuracyConfig, model: FloatModel) -> tuple[Tensor, Tensor]:
    """Inputs (N, *shape), float32, normalised as the model takes them, and labels (N,), int64; or DatasetError."""
    found = call_reference(config.dataset, config.folder, DatasetError)
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(part, Tensor) for part in found):
        kind = type(found).__name__
        parts = " of " + ", ".join(type(part).__name__ for part in found[:3]) if isinstance(found, tuple) else ""
        raise DatasetError(f"{config.dataset} must return two tensors, (inputs, labels); it returned {kind}{parts}")
    return _checked(config.dataset, *found, model)


def load_npz(file: Path, model: FloatModel) -> tuple[Tensor, Tensor]:
    """The same from the arrays `inputs` and `labels` of an .npz file; nothing is unpickled."""
    try:
        with np.load(file, allow_pickle=False) as opened:
            missing = [name for name in ("inputs", "labels") if name not in opened]
            if missing:
                raise DatasetError(f"{file} has no array {missing[0]!r}; it must hold `inputs` and `labels`")
            inputs, numbers = torch.from_numpy(opened["inputs"]), opened["labels"]
            labels = torch.from_numpy(numbers.astype(np.int64) if numbers.dtype.kind == "u" else numbers)
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror or error}") from error
    except (BadZipFile, zlib.error, EOFError, ValueError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file} is not an .npz file of numbers: {error}") from error
    return _checked(str(file), inputs, labels, model)


def _checked(name: str, inputs: Tensor, labels: Tensor, model: FloatModel) -> tuple[Tensor, Tensor]:
    if not inputs.is_floating_point() or inputs.shape[1:] != model.input.shape or len(inputs) == 0:
        raise DatasetError(
            f"{name}: inputs are {inputs.dtype} of shape {tuple(inputs.shape)}; they must be floats of shape "
            f"(N, {', '.join(map(str, model.input.shape))}), normalised as the model takes them"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != inputs.shape[:1]:
        raise DatasetError(
            f"{name}: labels are {labels.dtype} of shape {tuple(labels.shape)}; they must be one class "
            f"number for each of the {len(inputs)} inputs"
        )
    if not bool(inputs.isfinite().all()):
        raise DatasetError(f"{name}: some inputs are not finite")
    lowest, highest = model.input.bounds(inputs)
    slack = OUTSIDE * (highest - lowest)
    if outside := int(((inputs < lowest - slack) | (inputs > highest + slack)).flatten(1).any(1).sum()):
        logger.warning(
            "%s: %d of %d inputs leave the range that model.input gives, %.3g to %.3g when normalised; are they as the model "
            "takes them?",
            name,
            outside,
            len(inputs),
            float(lowest.min()),
            float(highest.max()),
        )
    low, high = int(labels.min()), int(labels.max())
    if model.num_classes and (low < 0 or high >= model.num_classes):
        raise DatasetError(f"{name}: labels go from {low} to {high}; the model has the classes 0 to {model.num_classes - 1}")
    return inputs.to(torch.float32), labels.to(torch.int64)
