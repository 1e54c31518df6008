"""Weights of the reconstruction loss by the Fisher information of a unit's output (BRECQ, arXiv 2102.05426, Sec. 3.3).

    E sum_c F_c (y_c - y'_c)^2,   F = (d log p(k | y) / d y)^2
The second-order change of the task loss, with the Hessian at the unit's output replaced by the diagonal of the Fisher matrix.
BRECQ takes the gradient of the distance to the float outputs at the quantized ones; we take it at the float network, of a
class k drawn from its own prediction, which is the Fisher matrix by definition and needs no label. F is scaled to mean 1, so
that the weight of the rounding regulariser keeps its meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from inc_clusterq.reconstruction.fake_quantize import Mode
from inc_clusterq.reconstruction.quantizers import in_mode
from inc_clusterq.reconstruction.shelf import Shelf


def fisher_weights(
    rest: nn.Module | None,  # the network behind the unit, up to its logits; None: the unit's outputs are the logits
    outputs: Tensor,  # of the unit in the float network, shape: (N, ...)
    generator: torch.Generator,
    batch_size: int,
    shelf: Shelf,
) -> Tensor:
    """F for every element of `outputs`, of the same shape."""
    weights = shelf.empty(tuple(outputs.shape), outputs)
    total = 0.0
    for begin in range(0, len(outputs), batch_size):
        part = slice(begin, begin + batch_size)
        squared = squared_gradient(rest, outputs[part].to(generator.device), generator)
        weights[part] = squared
        total += float(squared.sum(dtype=torch.float64))
    if total == 0:
        return weights.fill_(1.0)
    return weights.mul_(weights.numel() / total)


def squared_gradient(rest: nn.Module | None, y: Tensor, generator: torch.Generator) -> Tensor:
    """(d log p(k | y) / d y)^2 with k drawn from p, image by image."""
    y = y.detach().requires_grad_()
    with torch.enable_grad():
        if rest is None:
            logits = y
        else:
            with in_mode(rest, Mode.FLOAT):
                logits = rest(y)
        chances = logits.detach().softmax(1)
        drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
        (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, drawn, reduction="sum"), y)
    return gradient.square()
