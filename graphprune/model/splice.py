"""Splicing nodes and constants into a model, under names that are not taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.errors import PlanError

#: The IR version from which on initializers need not be inputs of the graph.
SEPARATE_SINCE = 4


def base_name(node: ir.Node) -> str:
    """What names spliced in around a node begin with."""
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type


class Splicer:
    """Adds nodes and initializers to the graphs of one model."""

    def __init__(self, model: ir.Model) -> None:
        self._ir_version = model.ir_version
        self._names = {
            name
            for graph in model.graphs()
            for name in (
                *(v.name for v in (*graph.inputs, *graph.initializers.values())),
                *(n.name for n in graph),
                *(o.name for n in graph for o in n.outputs),
            )
            if name
        }

    def fresh(self, base: str) -> str:
        """``base``, or ``base`` with a number behind it where that is taken."""
        name, number = base, 0
        while name in self._names:
            number += 1
            name = f"{base}_{number}"
        self._names.add(name)
        return name

    @staticmethod
    def graph_of(node: ir.Node) -> ir.Graph:
        """The graph that a node lies in.

        Raises:
            PlanError: It lies in a model-local function, which holds no initializers.
        """
        if not isinstance(node.graph, ir.Graph):
            raise PlanError(f"node {node.name!r} lies in a function that was not inlined")
        return node.graph

    def constant(self, node: ir.Node, base: str, array: npt.NDArray[Any]) -> ir.Value:
        """A new initializer of the graph that ``node`` lies in; a Constant node where initializers must be inputs."""
        name = self.fresh(base)
        tensor = ir.tensor(array, name=name)
        if self._ir_version < SEPARATE_SINCE:
            made = ir.node("Constant", [], {"value": tensor}, name=self.fresh(f"{name}_constant"))
            made.outputs[0].name = name
            made.outputs[0].type = ir.TensorType(tensor.dtype)
            made.outputs[0].shape = ir.Shape(array.shape)
            self.graph_of(node).insert_before(node, made)
            return made.outputs[0]
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self.graph_of(node).register_initializer(value)
        return value

    def integers(self, node: ir.Node, base: str, values: Sequence[int] | int) -> ir.Value:
        """A new int64 initializer."""
        return self.constant(node, base, np.asarray(values, dtype=np.int64))

    def insert(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        like: ir.Value | None = None,
        after: bool = False,
    ) -> ir.Value:
        """A new node before (or after) ``node``; returns its output, typed like ``like``."""
        name = self.fresh(f"{base_name(node)}_{op_type.lower()}")
        made = ir.node(op_type, inputs, dict(attributes or {}), name=name)
        made.outputs[0].name = self.fresh(f"{name}_output")
        if like is not None and like.type is not None:
            made.outputs[0].type = like.type
        graph = self.graph_of(node)
        if after:
            graph.insert_after(node, made)
        else:
            graph.insert_before(node, made)
        return made.outputs[0]

    @staticmethod
    def remove_unread(values: Iterable[ir.Value]) -> None:
        """Remove values that nothing reads (any more), and whatever only fed them."""
        todo = list(values)
        while todo:
            value = todo.pop()
            if value.uses() or value.is_graph_output():
                continue
            node = value.producer()
            if node is None:
                inside = value.is_initializer() and not value.is_graph_input()
                if inside and isinstance(value.graph, ir.Graph) and value.name is not None:
                    value.graph.initializers.pop(value.name, None)
                continue
            if node.graph is None or any(o.uses() or o.is_graph_output() for o in node.outputs):
                continue
            todo += [operand for operand in node.inputs if operand is not None]
            node.graph.remove(node, safe=True)
