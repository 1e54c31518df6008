"""What the benchmark scripts measure of a model and of this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from inc_clusterq.deployment.arithmetic import kernel_arithmetic


def top1(model: nn.Module, inputs: Tensor, labels: Tensor, batch: int = 50) -> float:
    """Percentage of labels predicted; quantized models compute as the int8 kernels do."""
    deployed = kernel_arithmetic(model)
    with torch.no_grad():
        pairs = zip(inputs.split(batch), labels.split(batch), strict=True)
        return 100 * sum(int((deployed(x).argmax(1) == y).sum()) for x, y in pairs) / len(labels)


def output_error(model: nn.Module, plain: nn.Module, inputs: Tensor, batch: int = 50) -> float:
    """Mean squared distance of a quantized model's outputs from the float one's, in units of the variance of the latter.

    Needs no label, and tells apart what the accuracy of a few thousand images does not.
    """
    deployed = kernel_arithmetic(model)
    with torch.no_grad():
        wanted = torch.cat([plain(x) for x in inputs.split(batch)])
        given = torch.cat([deployed(x) for x in inputs.split(batch)])
    return float((given - wanted).square().mean() / wanted.var(0, correction=0).mean())


def milliseconds(run: Callable[[], None]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


def forget_peak() -> None:
    """Let the highest memory of this process, `VmHWM`, begin anew at what it uses now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory_mb(key: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MB; its `ru_maxrss` would count what the parent used before it began."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status[key].split()[0]) / 1024
