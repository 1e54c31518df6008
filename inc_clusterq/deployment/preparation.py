"""What is rewritten in a converted graph, so that int8 kernels take as much of it as they can, and take it right.

Each step leaves the eager result as it is to the bit.
"""

from __future__ import annotations

from torch import fx

from inc_clusterq.deployment.fusion import fuse_clamps
from inc_clusterq.deployment.padding import quantize_before_padding
from inc_clusterq.deployment.pooling import write_ceil_mode
from inc_clusterq.deployment.residuals import set_residuals_apart
from inc_clusterq.deployment.shapes import record_shapes
from inc_clusterq.deployment.sharing import separate_shared_weights


def prepare_for_kernels(graph_module: fx.GraphModule) -> None:
    """All steps, in the order in which they build on each other."""
    separate_shared_weights(graph_module)
    quantize_before_padding(graph_module)
    fuse_clamps(graph_module)
    write_ceil_mode(graph_module)
    set_residuals_apart(graph_module)
    record_shapes(graph_module)
