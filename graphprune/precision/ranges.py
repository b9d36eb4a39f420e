"""The greatest magnitude of every activation, worked out by the network itself.

Each float32 value gets ``max(abs(x))`` behind it, and one further output of the graph holds all these numbers: no
activation leaves ONNX Runtime, and none is held longer than the network needs it. Bodies of If, Loop and Scan hand
theirs on to the graph around them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphprune.model.nodes import subgraphs
from graphprune.model.splice import Splicer
from graphprune.precision.choice import kind_of

#: The output of the graph that holds the numbers.
MAXIMA = "graphprune_maxima"
#: Where is of this opset; before, infinities count as numbers.
_WHERE_SINCE = 9
#: ReduceMax takes its axes as an operand.
_AXES_SINCE = 18
#: Scan has no batch axis any more.
_SCAN_SINCE = 9


def add_probes(model: ir.Model, wanted: Collection[ir.Value], filled: Collection[ir.Value]) -> list[ir.Value]:
    """Give a model one more output: the greatest finite magnitude of some of its values, float32 ``[values]``.

    Args:
        model: Changed in place; without functions.
        wanted: Float32 values of its graphs.
        filled: Those that cannot be empty.

    Returns:
        The values in the order of the output; those in bodies that cannot hand numbers on are left out. Without any
        there is no output.
    """
    probes = _Probes(model, set(wanted), set(filled))
    vector, order = probes.graph(model.graph)
    if vector is not None:
        vector.name = MAXIMA
        vector.shape = ir.Shape((len(order),))
        model.graph.outputs.append(vector)
    return order


class _Probes:
    def __init__(self, model: ir.Model, wanted: set[ir.Value], filled: set[ir.Value]) -> None:
        self._model, self._wanted, self._filled = model, wanted, filled
        self._splice = Splicer(model)
        self._opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))

    def graph(self, graph: ir.Graph) -> tuple[ir.Value | None, list[ir.Value]]:
        """Add probes to a graph; the vector of its numbers, and what they are of."""
        parts: list[ir.Value] = []
        order: list[ir.Value] = []
        original = list(graph)
        for value in graph.inputs:
            if value in self._wanted:
                parts.append(self._probe(_Cursor(graph, None), value))
                order.append(value)
        for node in original:
            if subgraphs(node):
                found = self._control(node)
                if found is not None:
                    parts.append(found[0])
                    order += found[1]
            for value in node.outputs:
                if value in self._wanted:
                    parts.append(self._probe(_Cursor(graph, node), value))
                    order.append(value)
        if not parts:
            return None, []
        cursor = _Cursor(graph, graph[len(graph) - 1])
        return self._add(cursor, "Concat", parts, {"axis": 0}), order

    def _add(
        self,
        cursor: _Cursor,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, Any] | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        name = self._splice.fresh(f"graphprune_probe_{op_type}")
        node = ir.node(op_type, inputs, attributes or {}, name=name)
        node.outputs[0].name = f"{name}_output"
        node.outputs[0].type = ir.TensorType(dtype)
        cursor.put(node)
        return node.outputs[0]

    def _constant(self, cursor: _Cursor, array: np.ndarray[Any, Any]) -> ir.Value:
        tensor = ir.tensor(array)
        return self._add(cursor, "Constant", [], {"value": tensor}, tensor.dtype)

    def _probe(self, cursor: _Cursor, value: ir.Value) -> ir.Value:
        """The number of one value, ``[1]``."""
        number = self._add(cursor, "Abs", [value])
        zero = self._constant(cursor, np.zeros(1, np.float32))
        if self._opset >= _WHERE_SINCE:
            infinity = self._constant(cursor, np.array([np.inf], np.float32))
            finite = self._add(cursor, "Less", [number, infinity], dtype=ir.DataType.BOOL)
            number = self._add(cursor, "Where", [finite, number, zero])
        flat = self._constant(cursor, np.array([-1], np.int64))
        number = self._add(cursor, "Reshape", [number, flat])
        if value not in self._filled:
            number = self._add(cursor, "Concat", [number, zero], {"axis": 0})
        return self._add(cursor, "ReduceMax", [number], {"keepdims": 1})

    # -- control flow -----------------------------------------------------------------------------------------------

    def _control(self, node: ir.Node) -> tuple[ir.Value, list[ir.Value]] | None:
        kind = kind_of(node)
        if kind == "If":
            return self._branches(node)
        if kind == "Loop" or (kind == "Scan" and self._opset >= _SCAN_SINCE):
            return self._steps(node)
        return None

    def _branches(self, node: ir.Node) -> tuple[ir.Value, list[ir.Value]] | None:
        """Each branch hands on its own numbers, and zeros for the other's."""
        branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        found = [self.graph(branch) for branch in branches]
        order = [value for _, values in found for value in values]
        if not order:
            return None
        for turn, branch in enumerate(branches):
            parts = []
            for index, (vector, values) in enumerate(found):
                if not values:
                    continue
                last = _Cursor(branch, branch[len(branch) - 1] if len(branch) else None)
                zeros = np.zeros(len(values), np.float32)
                parts.append(vector if index == turn and vector is not None else self._constant(last, zeros))
            last = _Cursor(branch, branch[len(branch) - 1] if len(branch) else None)
            branch.outputs.append(self._add(last, "Concat", parts, {"axis": 0}))
        return self._new_output(node), order

    def _steps(self, node: ir.Node) -> tuple[ir.Value, list[ir.Value]] | None:
        """A body hands on its numbers at each step; what counts is the greatest of all steps."""
        body = node.attributes["body"].as_graph()
        vector, order = self.graph(body)
        if vector is None:
            return None
        body.outputs.append(vector)
        for name in ("scan_output_axes", "scan_output_directions"):
            if name in node.attributes:
                node.attributes[name] = ir.AttrInt64s(name, [*node.attributes[name].as_ints(), 0])
        steps = self._new_output(node)
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        cursor = _Cursor(graph, steps.producer())
        none = self._constant(cursor, np.zeros((1, len(order)), np.float32))
        all_steps = self._add(cursor, "Concat", [steps, none], {"axis": 0})
        if self._opset >= _AXES_SINCE:
            axes = self._constant(cursor, np.array([0], np.int64))
            return self._add(cursor, "ReduceMax", [all_steps, axes], {"keepdims": 0}), order
        return self._add(cursor, "ReduceMax", [all_steps], {"axes": [0], "keepdims": 0}), order

    def _new_output(self, node: ir.Node) -> ir.Value:
        node.resize_outputs(len(node.outputs) + 1)
        value = node.outputs[-1]
        value.name = self._splice.fresh("graphprune_probe_body")
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return value


class _Cursor:
    """Where the next node goes."""

    def __init__(self, graph: ir.Graph, after: ir.Node | None) -> None:
        self._graph, self._after = graph, after

    def put(self, node: ir.Node) -> None:
        """Put a node there, and stand behind it."""
        if self._after is not None:
            self._graph.insert_after(self._after, node)
        elif len(self._graph):
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.append(node)
        self._after = node
