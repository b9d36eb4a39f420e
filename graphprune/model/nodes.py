"""Reading nodes of an ``onnx_ir`` model: attributes as Python values, subgraphs, constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphprune.errors import ModelError


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs among the node's attributes."""
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return graphs


def captured(node: ir.Node) -> list[ir.Value]:
    """Values from outside that the node's subgraphs read, in order of first use."""
    found: dict[ir.Value, None] = {}
    inner: set[ir.Value] = set()

    def visit(graph: ir.Graph) -> None:
        inner.update(graph.inputs)
        inner.update(graph.initializers.values())
        for child in graph:
            found.update((value, None) for value in child.inputs if value is not None)
            inner.update(child.outputs)
            for subgraph in subgraphs(child):
                visit(subgraph)
        found.update((value, None) for value in graph.outputs)

    for graph in subgraphs(node):
        visit(graph)
    return [value for value in found if value not in inner]


def is_constant_value(value: ir.Value) -> bool:
    """True for initializers and outputs of Constant nodes."""
    if value.is_initializer():
        return True
    node = value.producer()
    return node is not None and node.op_type == "Constant" and not node.domain


def stored_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor that the model stores for an initializer or for the output of a plain Constant node."""
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is not None and node.op_type == "Constant" and not node.domain:
        attribute = node.attributes.get("value")
        if attribute is not None and not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
            tensor: ir.TensorProtocol = attribute.value  # not as_tensor(): it checks the protocol, slowly
            return tensor
    return None


def constant_array(attributes: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The contents of a Constant node with these attributes.

    Raises:
        ModelError: if none of the attributes holds a value that onnx-ir can read.
    """
    for name, value in attributes.items():
        if name == "value":
            return np.asarray(value)
        if name in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
        if name in ("value_string", "value_strings"):
            return np.asarray(value, object)
    raise ModelError(f"a Constant node has no readable value (attributes: {', '.join(attributes) or 'none'})")


def python_value(attribute: ir.Attr) -> Any:
    """An attribute's value: int, float, str, a list of them, or a NumPy array; types and graphs stay as they are."""
    value = attribute.value
    match attribute.type:
        case ir.AttributeType.TENSOR:
            return value.numpy()
        case ir.AttributeType.STRING:
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        case ir.AttributeType.TENSORS:
            return [tensor.numpy() for tensor in value]
        case ir.AttributeType.STRINGS:
            return [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in value]
        case ir.AttributeType.INTS | ir.AttributeType.FLOATS | ir.AttributeType.TYPE_PROTOS:
            return list(value)
    return value
