"""Shapes of a converted graph's tensors: the host notes them for the nodes it exported, not for those it put in later."""

from __future__ import annotations

import logging

from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

logger = logging.getLogger(__name__)


def record_shapes(graph_module: fx.GraphModule) -> None:
    """Note what every node yields in `meta["val"]`, without contents; nothing where the inputs' own are unknown.

    A recurrent operator cannot be run on shapes alone: from there on what the host noted stays.
    """
    inputs = [node.meta.get("val") for node in graph_module.graph.nodes if node.op == "placeholder"]
    if inputs and all(isinstance(value, Tensor) for value in inputs):
        try:
            FakeTensorProp(graph_module, mode=inputs[0].fake_mode).propagate_dont_convert_inputs(*inputs)
        except RuntimeError as error:
            logger.debug("shapes are not all known: %s", error)
