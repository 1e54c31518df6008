"""Where a network is computed: on a CUDA GPU where there is one and the network runs there, else on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn

from inc_clusterq.errors import ModelError
from inc_clusterq.modes import evaluated

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


def gpu() -> torch.device | None:
    """The GPU that this process may use, if any; `CUDA_VISIBLE_DEVICES=` hides all of them."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def moved(module: nn.Module, example: Tensor, doing: str) -> torch.device:
    """Move a network, in place, to the GPU if there is one and it runs there for `example`, else to the CPU.

    Returns where it is. `doing` says in the log what is done on the CPU after all, such as "it is reconstructed".
    """
    device = gpu()
    if device is None or not _runs(module, example, device, doing):
        device = CPU
    module.to(device)
    return device


def copied_to_gpu(module: nn.Module, example: Tensor, doing: str) -> nn.Module:
    """A copy of a network on the GPU if there is one and it runs there for `example`; else the network itself.

    One that its owner has put elsewhere than on the CPU stays there, and itself.
    """
    device, anchor = gpu(), next(chain(module.parameters(), module.buffers()), None)
    if device is None or anchor is None or anchor.device != CPU:
        return module
    try:
        copied = deepcopy(module)
    except Exception as error:  # whatever a module of somebody else's holds
        logger.warning("The model cannot be copied to the GPU (%s); %s on the CPU", error, doing)
        return module
    with evaluated(copied):
        return copied if _runs(copied, example.to(anchor.dtype), device, doing) else module


@contextmanager
def within_gpu_memory() -> Iterator[None]:
    """Say what to do where the GPU's memory runs out.

    Raises:
        ModelError: it has.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).strip().split(". ")[:2])
        raise ModelError(
            f"the memory of the GPU does not suffice ({reason}); lower refine_batch where images are synthesised, or "
            "quantization.reconstruction.memory_budget where units are reconstructed; or hide the GPU by "
            "CUDA_VISIBLE_DEVICES= in front of the command, and all is computed on the CPU"
        ) from error


@torch.no_grad()
def _runs(module: nn.Module, example: Tensor, device: torch.device, doing: str) -> bool:
    """Move a network, and see."""
    try:
        module.to(device)(example.to(device))
    except Exception as error:  # such as of a tensor that `forward` makes on the CPU, whatever its input is on
        reason = str(error).strip().split("\n")[0]
        logger.warning("The model does not run on the GPU (%s); %s on the CPU", reason, doing)
        return False
    return True
