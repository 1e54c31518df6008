"""Which quantizer gets how many bits.

The protocol of the papers: the first and the last layer keep 8 bits, weights and inputs, whatever the rest gets. Both
are found in the graph: a first layer has no weighted operator before it, a last layer none behind it. So do tensors that
the network holds itself and adds to its feature maps, for example: 8 bits of theirs cost nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache

from torch import fx

from inc_clusterq.nodes import is_observer
from inc_clusterq.reconstruction.graph import Unit
from inc_clusterq.reconstruction.layers import Layer

FULL_BITS = 8  # what a unit that falls back gets: as many as the host's kernels take

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerBits:
    """Bits of one layer's weight and of its input activation; None: as the rest of the model."""

    weight: int | None = None
    activation: int | None = None


@dataclass(frozen=True)
class BitPlan:
    """What the user asked for: bits of the model, of its edges, of single layers by module name and of kinds of layers."""

    weight: int
    activation: int
    edge: int = 8
    layers: Mapping[str, LayerBits] = field(default_factory=dict)
    kinds: Mapping[str, LayerBits] = field(default_factory=dict)
    raised: frozenset[str] = frozenset()  # layers of the units of which everything gets FULL_BITS

    def asked(self, layer: Layer) -> LayerBits:
        """What was asked for this very layer: by its name, else by its kind."""
        if layer.name in self.raised:
            return LayerBits(FULL_BITS, FULL_BITS)
        named, kind = self.layers.get(layer.name, LayerBits()), self.kinds.get(layer.kind, LayerBits())
        return LayerBits(named.weight or kind.weight, named.activation or kind.activation)


def assign_bits(graph_module: fx.GraphModule, units: list[Unit], plan: BitPlan) -> dict[str, int]:
    """Bits of every quantizer, by the name of the module that stands in its place.

    Raises:
        ValueError: a layer named in the plan is not in the graph.
    """
    layers = {layer.node: layer for unit in units for layer in unit.layers}
    unknown = sorted(set(plan.layers) - {layer.name for layer in layers.values()})
    if unknown:
        known = ", ".join(dict.fromkeys(layer.name for layer in layers.values()))
        near = get_close_matches(unknown[0], [layer.name for layer in layers.values()], 3)
        hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else f"it has: {known}"
        raise ValueError(f"op_wise (layer_bits) names layers that the model does not have: {', '.join(unknown)}; {hint}")
    if left := [layer.name for layer in layers.values() if layer.name in plan.layers and not layer.quantizer]:
        raise ValueError(f"op_wise (layer_bits) names {left[0]}, which the host's quantizer leaves in float; take it out")
    if absent := sorted(set(plan.kinds) - {layer.kind for layer in layers.values()}):
        _tell(" and ".join(absent))
    behind = _weighted_behind(graph_module, set(layers))
    before = _has_weighted_before(graph_module, set(layers))
    last = {name for name in layers if not behind[name]}
    raised = {name for unit in units if any(layer.name in plan.raised for layer in unit.layers) for name in unit.nodes}
    bits: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.name in layers:
            layer = layers[node.name]
            edge = node.name in last or not before[node.name]
            override = plan.asked(layer)
            if layer.quantizer:
                wanted = override.weight or (max(plan.edge, plan.weight) if edge else plan.weight)
                bits[layer.quantizer] = max(bits.get(layer.quantizer, 0), wanted)  # of layers that share a weight, the finest
        elif is_observer(node) and node.name in before:
            edge = not before[node.name] or behind[node.name] <= last
            asked = [(layers[name].name, plan.asked(layers[name]).activation) for name in sorted(behind[node.name])]
            usual = max(plan.edge, plan.activation) if edge else plan.activation
            found = max((value for _, value in asked if value), default=usual)
            if found < usual and (others := tuple(name for name, value in asked if not value)):
                _tell_of_readers(tuple(name for name, value in asked if value), others, found)
            # One observer may stand at several places (pooling keeps its input's scale): the finest request counts.
            bits[str(node.target)] = max(found, FULL_BITS if node.name in raised else 0)
    held = [node for node in graph_module.graph.nodes if is_observer(node) and node.name not in before]
    constants = {
        str(node.target): max(plan.edge, plan.activation, FULL_BITS if {user.name for user in node.users} & raised else 0)
        for node in held  # which belong to no unit's nodes
        if str(node.target) not in bits
    }
    return _same_for_shared(graph_module, bits, constants)


@cache
def _tell(kinds: str) -> None:
    """Once, and not in every trial."""
    logger.warning("bits are given for %s layers, and the model has none", kinds)


@cache
def _tell_of_readers(named: tuple[str, ...], others: tuple[str, ...], bits: int) -> None:
    """Once, and not in every trial."""
    logger.warning(
        "op_wise or optype_wise gives the input of %s %d bits, and %s reads the same: it gets no more",
        ", ".join(named),
        bits,
        ", ".join(others),
    )


def _same_for_shared(graph_module: fx.GraphModule, bits: dict[str, int], constants: dict[str, int]) -> dict[str, int]:
    """One width for all that share a quantizer: the most. Tensors of the network's own take it over and do not raise it."""
    most: dict[int, int] = {}
    for name, value in bits.items():
        module = id(getattr(graph_module, name))
        most[module] = max(most.get(module, 0), value)
    for name, value in constants.items():
        most.setdefault(id(getattr(graph_module, name)), value)
    return {name: most[id(getattr(graph_module, name))] for name in (*bits, *constants)}


def _has_weighted_before(graph_module: fx.GraphModule, weighted: set[str]) -> dict[str, bool]:
    """For every node that depends on the input: whether a weighted operator lies before it."""
    before: dict[str, bool] = {}
    for node in graph_module.graph.nodes:
        active = [argument for argument in node.all_input_nodes if argument.name in before]
        if node.op == "placeholder":
            before[node.name] = False
        elif active:
            before[node.name] = any(before[argument.name] or argument.name in weighted for argument in active)
    return before


def _weighted_behind(graph_module: fx.GraphModule, weighted: set[str]) -> dict[str, set[str]]:
    """For every node: the nearest weighted operators behind it."""
    behind: dict[str, set[str]] = {}
    for node in reversed(graph_module.graph.nodes):
        behind[node.name] = set()
        for user in node.users:
            behind[node.name] |= {user.name} if user.name in weighted else behind[user.name]
    return behind
