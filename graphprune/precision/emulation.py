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
from graphprune.precision.stored import cast_tensor


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
            if value.const_value is not None and value.const_value.dtype == dtype:
                value.const_value = cast_tensor(value.const_value, ir.DataType.FLOAT, value.name)
                value.type = ir.TensorType(ir.DataType.FLOAT)
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
