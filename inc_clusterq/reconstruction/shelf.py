"""Room for the inputs and targets of a unit: in memory up to a budget, in memory-mapped files beyond it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

AT_ONCE = 5  # tensors of all images that live at the same time: two inputs, two outputs and the loss weights of a unit


@dataclass(frozen=True)
class Shelf:
    """Makes tensors that hold one value per calibration image and element."""

    budget: float  # bytes of all of them together
    folder: Path | None = None  # of the files; None: the system's folder for temporary files

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of the dtype of `like`, and on its device unless it is mapped."""
        count = torch.Size(shape).numel()
        if count * like.element_size() <= self.budget / AT_ONCE:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".mapped")
        os.close(handle)
        try:
            mapped = torch.from_file(name, shared=True, size=count, dtype=like.dtype)
        finally:
            os.unlink(name)  # its place on the disk goes when the tensor does, even if the process is killed
        return mapped.view(shape)
