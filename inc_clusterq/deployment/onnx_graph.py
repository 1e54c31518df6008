"""An ONNX graph that is being rewritten: its constants, producers and users at hand, new nodes gathered in order."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

Array = NDArray[Any]


@dataclass
class Graph:
    """An ONNX graph with its constants at hand; nodes are added to a new list."""

    model: ModelProto
    constants: dict[str, Array] = field(default_factory=dict)
    producer: dict[str, NodeProto] = field(default_factory=dict)
    users: dict[str, list[NodeProto]] = field(default_factory=lambda: defaultdict(list))
    shapes: dict[str, list[int | None]] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)

    @classmethod
    def of(cls, model: ModelProto) -> Graph:
        """The graph of `model`, indexed."""
        graph = cls(model)
        for tensor in model.graph.initializer:
            graph.constants[tensor.name] = numpy_helper.to_array(tensor)
        graph.index()
        for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
            dims = value.type.tensor_type.shape.dim
            graph.shapes[value.name] = [dim.dim_value or None for dim in dims]
        return graph

    def index(self) -> None:
        """Producers and users of each value, from the model's nodes as they stand."""
        self.producer.clear()
        self.users.clear()
        for node in self.model.graph.node:
            for name in node.output:
                self.producer[name] = node
            for name in node.input:
                self.users[name].append(node)

    def constant(self, name: str, value: Array) -> str:
        """A new constant under `name`, or under a name like it where another value has that."""
        unique, number = name, 0
        while unique in self.constants and not (
            self.constants[unique].dtype == value.dtype and np.array_equal(self.constants[unique], value)
        ):
            number += 1
            unique = f"{name}.{number}"
        self.constants[unique] = value
        return unique

    def add(self, kind: str, inputs: list[str], output: str, name: str, **attributes: Any) -> str:
        """A new node; returns the name of its output."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def commit(self) -> None:
        """The new nodes take the place of the old ones; what nobody reads is dropped."""
        wanted = {value.name for value in self.model.graph.output}
        kept: list[NodeProto] = []
        for node in reversed(self.nodes):
            if any(name in wanted for name in node.output):
                kept.append(node)
                wanted.update(node.input)
        del self.model.graph.node[:]
        self.model.graph.node.extend(reversed(kept))
        self.nodes = []
        self.index()


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """An attribute of a node, or what stands for it where it is left out."""
    return next((helper.get_attribute_value(found) for found in node.attribute if found.name == name), default)
