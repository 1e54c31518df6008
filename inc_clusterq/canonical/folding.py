"""BatchNorm that can be folded without harm.

The host multiplies a BatchNorm into the weight and the bias of the operator whose output it reads, and asks neither who else
reads that output, as do the shortcuts of pre-activation networks; nor who else reads that weight, as does every further call of
a shared backbone, which would be folded over and over; nor whether the weight is a parameter, as a fixed filter is not. It
folds into transposed convolutions in groups as if they had none, reads statistics that a BatchNorm without any lacks, and
behind linear operators the weight and the bias that one without affine parameters lacks. The second of two BatchNorms in a row
it drops.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx, nn

from inc_clusterq.attributes import attribute, read_instead, unused_name
from inc_clusterq.canonical.weights import BIAS
from inc_clusterq.reconstruction.layers import WEIGHTED

aten = torch.ops.aten
NORMS = {aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default}
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
GROUPS = 6  # their position among the arguments of these, where they are not 1
AFFINE, STATISTICS = slice(1, 3), slice(3, 5)  # of a BatchNorm, among its arguments


def isolate_folds(graph_module: fx.GraphModule) -> int:
    """Part BatchNorms from operators that others read, and give the rest weights of their own, in place; returns how many."""
    graph = graph_module.graph
    readers = Counter[str]()
    for node in graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] += len(node.users)
    changed = 0
    for norm in [node for node in graph.nodes if node.target in NORMS]:
        product = norm.args[0]
        if not isinstance(product, fx.Node) or product.target not in {*WEIGHTED, *NORMS}:
            continue
        if product.target in NORMS or len(product.users) > 1 or not _folds(product, norm):
            with graph.inserting_before(norm):
                between = graph.call_function(aten.clone.default, (product,))
            between.meta = {"val": product.meta["val"]}
            norm.replace_input_with(product, between)
            changed += 1
            continue
        for source in [product.args[position] for position in (WEIGHTED[product.target], BIAS) if position < len(product.args)]:
            if not isinstance(source, fx.Node) or source.op != "get_attr":
                continue
            target = str(source.target)
            value = attribute(graph_module, target)
            if readers[target] == 1 and isinstance(value, nn.Parameter):
                continue
            own = unused_name(graph_module, f"{product.name}_{target.rpartition('.')[2]}")
            graph_module.register_parameter(own, nn.Parameter(value.detach().clone(), requires_grad=False))
            read_instead(product, source, own)
            readers[target] -= 1
            changed += 1
    if changed:
        graph_module.recompile()
    return changed


def _folds(product: fx.Node, norm: fx.Node) -> bool:
    """Whether the host folds these two as they are to be folded."""
    in_groups = product.target in TRANSPOSED and product.args[GROUPS : GROUPS + 1] not in ((), (1,))
    is_whole = product.target is not aten.linear.default or None not in norm.args[AFFINE]
    return not in_groups and is_whole and None not in norm.args[STATISTICS]
