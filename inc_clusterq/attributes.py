"""Tensors that a graph reads as attributes of its modules."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx, nn


def attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def unused_name(module: nn.Module, name: str) -> str:
    """`name`, with as many underscores behind it as keep it from being an attribute that `module` has."""
    while hasattr(module, name):
        name += "_"
    return name


def replace_attribute(graph_module: fx.GraphModule, path: str, value: nn.Parameter, readers: Collection[fx.Node]) -> None:
    """Let `readers` of the attribute at `path` read `value`; what else reads it reads it as it was."""
    graph = graph_module.graph
    sources = [node for node in graph.nodes if node.op == "get_attr" and node.target == path]
    if all(reader in readers for source in sources for reader in source.users):
        owner, _, leaf = path.rpartition(".")
        setattr(graph_module.get_submodule(owner), leaf, value)
        return
    own = unused_name(graph_module, path.replace(".", "_"))
    graph_module.register_parameter(own, value)
    for source in sources:
        for reader in [reader for reader in source.users if reader in readers]:
            read_instead(reader, source, own)


def read_instead(reader: fx.Node, source: fx.Node, path: str) -> None:
    """Let `reader` read the attribute at `path`, of the same kind, in place of the node `source`."""
    with reader.graph.inserting_before(reader):
        own = reader.graph.get_attr(path)
    own.meta.update(source.meta)
    reader.replace_input_with(source, own)
