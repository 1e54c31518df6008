"""The user's labelled set, for scoring trials and inspecting sets only: loaded and checked against the model."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from inc_clusterq.config import AccuracyConfig
from inc_clusterq.errors import DatasetError
from inc_clusterq.models import FloatModel
from inc_clusterq.references import call_reference

logger = logging.getLogger(__name__)

OUTSIDE = 0.01  # of the range: so far beyond it come resized and rounded images of the sensor


def load_labelled(config: AccuracyConfig, model: FloatModel) -> tuple[Tensor, Tensor]:
    """Inputs (N, *shape), float32, normalised as the model takes them, and labels (N,), int64; or DatasetError."""
    found = call_reference(config.dataset, config.folder, DatasetError)
    inputs, labels = _read(config.dataset, found) if isinstance(found, DataLoader) else _pair(config.dataset, found)
    return _checked(config.dataset, inputs, labels, model)


def _read(name: str, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    try:
        batches = [_pair(name, batch) for batch in loader]
        if not batches:
            raise DatasetError(f"{name} returned a DataLoader without a batch")
        return torch.cat([inputs for inputs, _ in batches]), torch.cat([labels for _, labels in batches])
    except DatasetError:
        raise
    except Exception as failure:  # the user's own data: anything can come out of reading it
        raise DatasetError(f"{name}: its DataLoader failed: {type(failure).__name__}: {failure}") from failure


def _pair(name: str, found: object) -> tuple[Tensor, Tensor]:
    if isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in found):
        try:
            inputs, labels = (part if isinstance(part, Tensor) else _tensor(part) for part in found)
        except TypeError as error:
            raise DatasetError(f"{name} returned an array that is not of numbers: {error}") from error
        return inputs, labels
    parts = " of " + ", ".join(type(part).__name__ for part in found[:3]) if isinstance(found, tuple | list) else ""
    raise DatasetError(
        f"{name} must return (inputs, labels), two tensors or NumPy arrays, or a DataLoader of such; it returned "
        f"{type(found).__name__}{parts}"
    )


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    numbers = array.astype(np.int64) if array.dtype.kind == "u" and array.ndim == 1 else array
    own = numbers.astype(numbers.dtype.newbyteorder("="), copy=False)  # files may have the bytes of a number in either order
    return torch.from_numpy(np.ascontiguousarray(own))


def load_npz(file: Path, model: FloatModel) -> tuple[Tensor, Tensor]:
    """The same from the arrays `inputs` and `labels` of an .npz file; nothing is unpickled."""
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise DatasetError(f"{file} holds a single array; it must be an .npz file with the arrays `inputs` and `labels`")
        with loaded as opened:
            missing = [name for name in ("inputs", "labels") if name not in opened]
            if missing:
                raise DatasetError(f"{file} has no array {missing[0]!r}; it must hold `inputs` and `labels`")
            inputs, labels = _tensor(opened["inputs"]), _tensor(opened["labels"])
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror or error}") from error
    except (BadZipFile, zlib.error, EOFError, ValueError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file} is not an .npz file of numbers: {error}") from error
    return _checked(str(file), inputs, labels, model)


def _checked(name: str, inputs: Tensor, labels: Tensor, model: FloatModel) -> tuple[Tensor, Tensor]:
    if not inputs.is_floating_point() or inputs.shape[1:] != model.input.shape or len(inputs) == 0:
        raise DatasetError(
            f"{name}: inputs are {inputs.dtype} of shape {tuple(inputs.shape)}; they must be floats of shape "
            f"(N, {', '.join(map(str, model.input.shape))}), normalised as the model takes them{_remedy(inputs, model)}"
        )
    if not _holds_integers(labels) or labels.shape != inputs.shape[:1]:
        hint = "squeeze(1)" if labels.shape[1:] == (1,) else "argmax(1)"
        raise DatasetError(
            f"{name}: labels are {labels.dtype} of shape {tuple(labels.shape)}; they must be one class "
            f"number for each of the {len(inputs)} inputs" + (f", such as {hint} gives" if labels.dim() == 2 else "")
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
    labels = labels.to(torch.int64)  # first: torch knows no minimum of some unsigned types
    low, high = int(labels.min()), int(labels.max())
    if model.num_classes and (low < 0 or high >= model.num_classes):
        hint = "; subtract 1" if (low, high) == (1, model.num_classes) else ""
        raise DatasetError(
            f"{name}: labels go from {low} to {high}; the model has the classes 0 to {model.num_classes - 1}{hint}"
        )
    return inputs.to(torch.float32), labels


def _holds_integers(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def _remedy(inputs: Tensor, model: FloatModel) -> str:
    if inputs.dim() == 4 and inputs.permute(0, 3, 1, 2).shape[1:] == model.input.shape:
        return "; channels come first: inputs.permute(0, 3, 1, 2)"
    return "" if inputs.is_floating_point() else "; raw values are to be normalised: (inputs.float() - mean) / std"
