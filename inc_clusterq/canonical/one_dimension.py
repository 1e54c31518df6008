"""Networks on signals, (N, channels, length), as networks on images of height 1.

The host's quantizer and Inductor have int8 convolutions for two spatial axes. Of those for one axis the quantizer takes what
ReLU follows and nothing else, the kernel knows no other activation function, and behind it the compiler assumes a wrong
length, so that additions and concatenations don't compile. So convolutions are given an axis of size 1, and what lies between
them too, lest a `squeeze` come between an operator and what belongs into its kernel:

    conv1d(x, w) = squeeze(conv2d(unsqueeze(x), unsqueeze(w)))        f(squeeze(y)) = squeeze(f(y))

Input and output of the network keep their shapes, and so does what has no counterpart here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from inc_clusterq.attributes import unused_name
from inc_clusterq.nodes import named_arguments
from inc_clusterq.reconstruction.graph import ACTIVATIONS

aten = torch.ops.aten
AXIS = 2  # the new one, in front of the length
CONVOLUTION = aten.conv1d.default
BROADCASTING = {aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor}
# Norms and PReLU take their channels from axis 1, whatever comes behind it.
ALIKE = ACTIVATIONS | BROADCASTING | {aten.clone.default}

Call = tuple[Any, tuple[Any, ...]]  # operator and arguments
Lift = Callable[[fx.Node], fx.Node]  # the image of a signal


def lift_to_two_dimensions(graph_module: fx.GraphModule) -> int:
    """Rewrite convolutions over one axis and what follows them, in place; returns how many convolutions there were."""
    graph = graph_module.graph
    count = sum(map(_convolves_signal, graph.nodes))
    if count:
        lifting = _Lifting(graph_module)
        for node in list(graph.nodes):
            with graph.inserting_before(node):
                lifting.lift(node)
        lifting.forget_unused()
        graph_module.recompile()
    return count


class _Lifting:
    """A graph on its way from signals to images."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._module, self._graph = graph_module, graph_module.graph
        self._lifted: dict[fx.Node, fx.Node] = {}  # squeezed node -> what it squeezes
        self._unsqueezed: dict[fx.Node, fx.Node] = {}  # what stays a signal -> its image
        self._weights: dict[fx.Node, fx.Node] = {}

    def lift(self, node: fx.Node) -> None:
        """Replace a node by the operator on images of height 1 that does the same, where there is one."""
        call = self._call(node)
        if call is None:
            return
        flat = new = self._graph.call_function(*call)
        new.meta = _planar_meta(node)
        if _is_signal(node):
            new.meta["val"] = node.meta["val"].unsqueeze(AXIS)
            flat = self._graph.call_function(aten.squeeze.dim, (new, AXIS))
            flat.meta = {"val": node.meta["val"]}
            self._lifted[flat] = new
        node.replace_all_uses_with(flat)
        self._graph.erase_node(node)

    def forget_unused(self) -> None:
        """Drop what nothing reads any more."""
        for flat in self._lifted:
            if not flat.users:
                self._graph.erase_node(flat)
        for weight in self._weights:
            if weight.users:
                continue
            self._graph.erase_node(weight)
            if not any(node.target == weight.target for node in self._graph.nodes if node.op == "get_attr"):
                delattr(*self._owner(weight))

    def _call(self, node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
        if _convolves_signal(node):
            x, weight, bias, stride, padding, dilation, groups = named_arguments(node).values()
            window = [1, *stride], [0, *padding], [1, *dilation]
            return aten.conv2d.default, (self._image(x), self._kernel(weight), bias, *window, groups), {}
        if node.op != "call_function" or not any(source in self._lifted for source in node.all_input_nodes):
            return None
        if node.target in ALIKE:
            if node.target in BROADCASTING and any(_dimensions(source) not in (0, 3) for source in node.all_input_nodes):
                return None
            return node.target, tuple(self._image(given) if _is_signal(given) else given for given in node.args), node.kwargs
        found = RULES[node.target](named_arguments(node), self._image) if node.target in RULES else None
        return None if found is None else (*found, {})

    def _image(self, x: Any) -> fx.Node:
        if x in self._lifted:
            return self._lifted[x]
        if x not in self._unsqueezed:
            image = self._unsqueezed[x] = self._graph.call_function(aten.unsqueeze.default, (x, AXIS))
            image.meta = {"val": x.meta["val"].unsqueeze(AXIS)}
        return self._unsqueezed[x]

    def _kernel(self, weight: fx.Node) -> fx.Node:
        """A convolution's weight (out, in, 1, size): an attribute again where it was one, since the host looks for that."""
        if weight.op != "get_attr":
            return self._image(weight)
        if weight not in self._weights:
            owner, name = self._owner(weight)
            tensor, new = getattr(owner, name), unused_name(owner, f"{name}_2d")
            image = tensor.detach().unsqueeze(AXIS)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(new, nn.Parameter(image, requires_grad=tensor.requires_grad))
            else:
                owner.register_buffer(new, image)
            with self._graph.inserting_before(weight):
                self._weights[weight] = self._graph.get_attr(str(weight.target).removesuffix(name) + new)
            self._weights[weight].meta = _planar_meta(weight) | {"val": weight.meta["val"].unsqueeze(AXIS)}
        return self._weights[weight]

    def _owner(self, weight: fx.Node) -> tuple[nn.Module, str]:
        path, _, name = str(weight.target).rpartition(".")
        return self._module.get_submodule(path), name


def _max_pool(given: dict[str, Any], lift: Lift) -> Call:
    return aten.max_pool2d.default, (lift(given["self"]), *_window(given), [1, *given["dilation"]], given["ceil_mode"])


def _avg_pool(given: dict[str, Any], lift: Lift) -> Call:
    return aten.avg_pool2d.default, (lift(given["self"]), *_window(given), given["ceil_mode"], given["count_include_pad"])


def _window(given: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    size, stride = given["kernel_size"], given["stride"] or given["kernel_size"]
    return [1, *size], [1, *stride], [0, *given["padding"]]


def _adaptive_avg_pool(given: dict[str, Any], lift: Lift) -> Call:
    return aten.adaptive_avg_pool2d.default, (lift(given["self"]), [1, *given["output_size"]])


def _mean(given: dict[str, Any], lift: Lift) -> Call | None:
    """Over the length alone: over both axes of the image, which is what the host knows as a pooling."""
    if given["dtype"] is not None or [axis % 3 for axis in given["dim"] or []] != [2]:
        return None
    return aten.mean.dim, (lift(given["self"]), [AXIS, 3], given["keepdim"])


def _cat(given: dict[str, Any], lift: Lift) -> Call | None:
    if not all(map(_is_signal, given["tensors"])):  # an empty tensor may have any number of axes
        return None
    return aten.cat.default, ([lift(tensor) for tensor in given["tensors"]], _axis(given["dim"]))


def _slice(given: dict[str, Any], lift: Lift) -> Call:
    return aten.slice.Tensor, (lift(given["self"]), _axis(given["dim"]), given["start"], given["end"], given["step"])


def _flatten(given: dict[str, Any], lift: Lift) -> Call | None:
    if (given["start_dim"], given["end_dim"] % 3) != (1, 2):
        return None
    return aten.flatten.using_ints, (lift(given["self"]), 1, -1)


def _pad(given: dict[str, Any], lift: Lift) -> Call | None:
    widths, mode = list(given["pad"]), given.get("mode", "constant")
    if len(widths) > 2 or mode != "constant":  # (before, behind) of the length, then those of the new axis
        widths[2:2] = [0, 0]
    if mode != "constant" and len(widths) != 4:
        return None
    return aten.pad.default, (lift(given["self"]), widths, mode, given["value"])


RULES: dict[Any, Callable[[dict[str, Any], Lift], Call | None]] = {
    aten.max_pool1d.default: _max_pool,
    aten.avg_pool1d.default: _avg_pool,
    aten.adaptive_avg_pool1d.default: _adaptive_avg_pool,
    aten.mean.dim: _mean,
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.flatten.using_ints: _flatten,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
}


def _axis(axis: int) -> int:
    """Where an axis of a signal is in its image."""
    return (0, 1, 3)[axis % 3]


def _convolves_signal(node: fx.Node) -> bool:
    """Whether it is a convolution over one axis, and not of a single sample without a batch dimension."""
    return node.target is CONVOLUTION and _is_signal(node)


def _is_signal(node: Any) -> bool:
    return isinstance(node, fx.Node) and _dimensions(node) == 3


def _dimensions(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def _planar_meta(node: fx.Node) -> dict[str, Any]:
    """What is known of an operator, with the two-dimensional module or function as its origin: the host goes by that."""
    meta = {key: value for key, value in node.meta.items() if key not in ("tensor_meta", "example_value")}
    if "source_fn_stack" in meta:
        meta["source_fn_stack"] = [(name, _in_two_dimensions(source)) for name, source in meta["source_fn_stack"]]
    return meta


def _in_two_dimensions(source: Any) -> Any:
    """`nn.Conv2d` for `nn.Conv1d`, `functional.max_pool2d` for `functional.max_pool1d`; anything else is what it is."""
    name = getattr(source, "__name__", "")
    if not name.endswith("1d"):
        return source
    home = nn if isinstance(source, type) else functional
    return getattr(home, f"{name[:-2]}2d", source)
