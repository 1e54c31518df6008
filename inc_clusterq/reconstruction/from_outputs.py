"""Gradients of weights' step sizes and of biases from what a layer returns, where the weights' integers stay.

Then y = s (q * x) + b in every output channel, so that
    dL / d log s = sum over g (y - b),   dL / db = sum over g   with g = dL / dy.
Autograd would take the gradient of every weight on the way to s; benchmarks/whole_step.py tells what that costs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from inc_clusterq.reconstruction.fake_quantize import WeightQuantizer

aten = torch.ops.aten
CHANNELS = {  # operator -> axis of its output's channels
    aten.conv1d.default: -2,
    aten.conv2d.default: -3,
    aten.conv3d.default: -4,
    aten.linear.default: -1,
}


def with_gradients_from_outputs(module: fx.GraphModule) -> fx.GraphModule:
    """A graph with the same parts that computes the same, for quantizers whose weights have constant integers."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        axis = CHANNELS.get(node.target)
        if axis is None:
            continue
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        quantizer = getattr(module, str(weight.target), None)
        if not isinstance(quantizer, WeightQuantizer):
            continue
        with graph.inserting_before(node):
            node.update_arg(1, graph.call_method("detach", (weight,)))
            if bias is not None:
                node.update_arg(2, graph.call_method("detach", (bias,)))
            shift = graph.get_attr(f"{weight.target}.scale_shift") if quantizer.joint else None
        with graph.inserting_after(node):
            learning = graph.call_function(passed_on, (node, bias, shift, axis))
        node.replace_all_uses_with(learning, delete_user_cb=lambda user, made=learning: user is not made)
    return fx.GraphModule(module, graph)


def passed_on(y: Tensor, bias: Tensor | None, shift: Tensor | None, axis: int) -> Tensor:
    """y as it is; what is learned of the layer gets its gradient here. `shift` is log s of every channel."""
    result: Tensor = _PassedOn.apply(y, bias, shift, axis) if torch.is_grad_enabled() else y
    return result


class _PassedOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor | None, shift: Tensor | None, axis: int) -> Tensor:
        ctx.axis, ctx.shape = axis, None if shift is None else shift.shape
        ctx.save_for_backward(y if shift is not None else None, bias)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        y, bias = ctx.saved_tensors
        of_bias = _by_channel(grad, ctx.axis) if bias is not None else None
        of_shift = None
        if y is not None:
            # Taken off before it is summed up: of a channel without input exactly nothing is left.
            product = grad * (y if bias is None else y - bias.reshape(-1, *[1] * (-1 - ctx.axis)))
            of_shift = _by_channel(product, ctx.axis).reshape(ctx.shape)
        return grad, of_bias, of_shift, None


def _by_channel(x: Tensor, axis: int) -> Tensor:
    """Sums over all other axes."""
    others = [other for other in range(x.dim()) if other != x.dim() + axis]
    return x.sum(others) if others else x
