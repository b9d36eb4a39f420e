"""Small models from ONNX's text format, and the laws that every twin obeys."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper

from graphprune.graph import Graph, Op, Tensor
from graphprune.graph.twin import build_twin

HEADER = '<ir_version: 9, opset_import: ["" : 18, "local" : 1, "com.microsoft" : 1]>\n'


def parse(text: str, **initializers: np.ndarray[Any, Any]) -> ir.Model:
    """A model from ONNX's text format; arrays given by name become initializers."""
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in initializers.items()
    )
    return ir.from_proto(proto)


def twin(
    text: str, shapes: dict[str, tuple[int, ...]] | None = None, **initializers: np.ndarray[Any, Any]
) -> Graph:
    """The twin of such a model, its invariants checked."""
    graph = build_twin(parse(text, **initializers), shapes)
    check(graph)
    return graph


def check(graph: Graph) -> None:
    """What holds for every twin: unique names, uses and producers that agree with the ops, data that fits its shape."""
    assert len({tensor.name for tensor in graph.tensors}) == len(graph.tensors)
    tensors = set(graph.tensors)
    uses: dict[Tensor, list[tuple[Op, int]]] = {tensor: [] for tensor in graph.tensors}
    for index, op in enumerate(graph.ops):
        assert op.index == index
        for slot, tensor in enumerate(op.inputs):
            if tensor is None:
                continue
            assert tensor in tensors
            uses[tensor].append((op, slot))
            # Only the Join of a loop reads what a later op makes.
            assert (
                tensor.producer is None or tensor.producer.index < index or (op.op_type, slot) == ("Join", 1)
            )
        assert all(tensor is None or (tensor in tensors and tensor.producer is op) for tensor in op.outputs)
    for tensor in graph.tensors:
        assert tensor.uses == uses[tensor]
        if tensor.data is not None:
            assert tensor.data.shape == tensor.shape
            assert tensor.dtype is not None
            assert tensor.data.dtype == tensor.dtype.numpy()


def named(graph: Graph, name: str) -> Tensor:
    """The tensor of this name."""
    return next(tensor for tensor in graph.tensors if tensor.name == name)


def kinds(graph: Graph) -> list[str]:
    """The op types in order."""
    return [op.op_type for op in graph.ops]
