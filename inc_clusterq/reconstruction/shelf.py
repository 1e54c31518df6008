"""Room for the inputs and targets of a unit: in memory up to a budget, in memory-mapped files beyond it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inc_clusterq.errors import OutputError
from inc_clusterq.layout import shaped

AT_ONCE = 5  # tensors of all images that live at the same time: two inputs, two outputs and the loss weights of a unit


@dataclass(frozen=True)
class Shelf:
    """Makes tensors that hold one value per calibration image and element."""

    budget: float  # bytes of all of them together
    folder: Path | None = None  # of the files; None: the system's folder for temporary files

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of the dtype of `like`, in the same order in memory, and on its device unless it is mapped.

        Raises:
            OutputError: there is no room for its file.
        """
        count = torch.Size(shape).numel()
        if count * like.element_size() <= self.budget / AT_ONCE:
            return shaped(torch.empty(count, dtype=like.dtype, device=like.device), shape, like)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".mapped")
        size = count * like.element_size()
        try:
            os.posix_fallocate(handle, 0, size)  # a disk that is full later would end the process without a word (SIGBUS)
            mapped = torch.from_file(name, shared=True, size=count, dtype=like.dtype)
        except OSError as failure:
            raise OutputError(
                f"cannot keep {size / 1e9:.1f} GB of activations in {Path(name).parent}: {failure.strerror}; choose a "
                "workspace with more room (tuning.workspace.path), fewer calibration images, or a larger "
                "quantization.reconstruction.memory_budget"
            ) from failure
        finally:
            os.close(handle)
            os.unlink(name)  # its place on the disk goes when the tensor does, even if the process is killed
        return shaped(mapped, shape, like)
