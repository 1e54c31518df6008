"""An exported graph written with the operators that the host's quantizer knows.

The quantizer finds convolutions by the operator that they were exported to. Those of other operators stay in float, or make it
raise. Each step keeps what the graph computes, but for rounding where a kernel adds up in another order, and leaves graphs that
hold nothing for it untouched; who calls it compares the outputs with the original's.
"""

from __future__ import annotations

from torch import fx

from inc_clusterq.canonical.clamps import write_clamps_as_activations
from inc_clusterq.canonical.folding import isolate_folds
from inc_clusterq.canonical.one_dimension import lift_to_two_dimensions
from inc_clusterq.canonical.origin import name_origins
from inc_clusterq.canonical.padding import write_padding_as_numbers
from inc_clusterq.canonical.products import write_products_as_linear
from inc_clusterq.canonical.sizes import write_sizes_in_full
from inc_clusterq.canonical.weights import compute_weights


def canonicalise(graph_module: fx.GraphModule) -> None:
    """All steps, in place, in the order in which they build on each other."""
    if graph_module.graph.eliminate_dead_code():  # the host does not expect a convolution that nothing reads
        graph_module.recompile()
    write_sizes_in_full(graph_module)
    write_padding_as_numbers(graph_module)
    write_products_as_linear(graph_module)
    write_clamps_as_activations(graph_module)
    compute_weights(graph_module)
    isolate_folds(graph_module)
    name_origins(graph_module)
    lift_to_two_dimensions(graph_module)
