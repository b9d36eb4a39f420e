"""A network in a low format as a float32 network that rounds where the other does.

Few runtimes on a CPU have kernels for these formats: ONNX Runtime computes float16 ops in float32 and drops the
roundings between two of them, and refuses most bfloat16 ops. Here every op is computed in float32, and each of its low
results goes through a Cast to the format and back, which is what hardware does that accumulates in float32.
"""

from __future__ import annotations

import onnx_ir as ir

from graphprune.model.nodes import is_constant_value, stored_tensor
from graphprune.model.splice import Splicer
from graphprune.precision.choice import all_nodes, kind_of
from graphprune.precision.stored import LAZY_FROM, cast_tensor


def emulate(model: ir.Model, dtype: ir.DataType) -> None:
    """Turn a model into its emulation, in place.

    Args:
        model: Without functions; the element types of its values must be known.
        dtype: The low type; values of it become float32, inputs and outputs too.
    """
    splice = Splicer(model)
    nodes = list(all_nodes(model))
    for graph in list(model.graphs()):
        for value in graph.initializers.values():
            if value.const_value is None or value.const_value.dtype != dtype:
                continue
            if value.const_value.size < LAZY_FROM or value.is_graph_input():
                value.const_value = cast_tensor(value.const_value, ir.DataType.FLOAT, value.name)
                value.type = ir.TensorType(ir.DataType.FLOAT)
            else:  # widened when it is read: half as much to write, and to hold
                _widen(splice, value, graph)
        for value in graph.inputs:
            if value.dtype == dtype and not value.is_initializer():
                _round(splice, value, graph, dtype)
    for node in nodes:
        if kind_of(node) == "Constant":
            _widen_constant(node, dtype)
            continue
        if kind_of(node) == "Cast" and node.attributes["to"].as_int() == dtype:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype == dtype:
                _round(splice, value, splice.graph_of(node), dtype)


def _widen_constant(node: ir.Node, dtype: ir.DataType) -> None:
    value = node.outputs[0]
    stored = stored_tensor(value) if is_constant_value(value) else None
    if stored is not None and stored.dtype == dtype:
        widened = ir.Tensor(cast_tensor(stored, ir.DataType.FLOAT, stored.name).numpy(), name=stored.name)
        node.attributes["value"] = ir.AttrTensor("value", widened)
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _widen(splice: Splicer, value: ir.Value, graph: ir.Graph) -> None:
    """Everybody reads a stored weight through a Cast to float32."""
    readers = list(value.uses())
    up = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=splice.fresh(f"{value.name}_widened"))
    up.outputs[0].name, up.outputs[0].type = f"{up.name}_output", ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(graph[0], up)
    for reader, slot in readers:
        reader.replace_input_with(slot, up.outputs[0])


def _round(splice: Splicer, value: ir.Value, graph: ir.Graph, dtype: ir.DataType) -> None:
    """Everybody reads the value rounded."""
    readers = list(value.uses())
    value.type = ir.TensorType(ir.DataType.FLOAT)
    down = ir.node("Cast", [value], {"to": int(dtype)}, name=splice.fresh(f"{value.name}_down"))
    up = ir.node("Cast", [down.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{down.name}_up")
    down.outputs[0].name, up.outputs[0].name = f"{down.name}_output", f"{down.name}_rounded"
    down.outputs[0].type, up.outputs[0].type = ir.TensorType(dtype), ir.TensorType(ir.DataType.FLOAT)
    up.outputs[0].shape = value.shape
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, [down, up])
    elif len(graph):
        graph.insert_before(graph[0], [down, up])
    else:
        graph.extend([down, up])
    rounded = up.outputs[0]
    for reader, slot in readers:
        reader.replace_input_with(slot, rounded)
    for position, output in enumerate(graph.outputs):
        if output is value:  # under its name: it is compared
            graph.outputs[position] = rounded
            value.name, rounded.name = f"{rounded.name}_before", value.name
