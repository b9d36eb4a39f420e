"""Making a network compute in a low format: weights cast once, values cast where the formats meet."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphprune.model.nodes import constant_array, is_constant_value, python_value, stored_tensor
from graphprune.model.splice import SEPARATE_SINCE, Splicer
from graphprune.precision.choice import INDIFFERENT, Choice, all_nodes, kind_of
from graphprune.precision.formats import Format
from graphprune.precision.stored import cast_tensor
from graphprune.precision.typing import Types


@dataclass
class Done:
    """What lowering did.

    Attributes:
        casts: Cast nodes that were put in.
        weights: Constants that are stored in the low format now.
        doubled: Those among them that are stored in float32 too, since others read them so.
    """

    casts: int = 0
    weights: int = 0
    doubled: int = 0


class Lowering:
    """Rewrites one model in place, by a choice.

    A value keeps its name in the format that its producer makes it in; its other form is made by one Cast behind the
    producer, whoever reads it.
    """

    def __init__(self, model: ir.Model, choice: Choice, types: Types, low: Format, *, io: bool) -> None:
        """Prepare.

        Args:
            model: Changed in place by :meth:`run`; without functions.
            choice: Nodes of this very model.
            types: Element types of its values, as they are before.
            low: The format.
            io: Graph inputs and outputs become low too.
        """
        self._model, self._choice, self._types, self._low = model, choice, types, low
        self._io = io
        self._splice = Splicer(model)
        self._lows: dict[ir.Value, ir.Value] = {}
        self._fulls: dict[ir.Value, ir.Value] = {}
        self.done = Done()

    def run(self) -> Done:
        """Rewrite."""
        nodes = list(all_nodes(self._model))
        graphs = list(self._model.graphs())
        if self._io:
            for value in self._model.graph.inputs:
                if self._is_float(value) and not value.is_initializer():
                    self._become_low(value)
        for node, operands in self._choice.lowered.items():
            for slot in operands.outputs:
                self._become_low(node.outputs[slot])
        for node in nodes:
            self._read(node)
        for graph in graphs:
            self._give(graph)
        return self.done

    def _is_float(self, value: ir.Value) -> bool:
        return self._types.get(value) == ir.DataType.FLOAT

    def _become_low(self, value: ir.Value) -> None:
        value.type = ir.TensorType(self._low.dtype)
        self._lows[value] = value

    def _read(self, node: ir.Node) -> None:
        """Give a node its operands in the form that it wants."""
        if kind_of(node) in INDIFFERENT:
            return
        operands = self._choice.lowered.get(node)
        wanted = operands.inputs if operands is not None else ()
        for slot, value in enumerate(node.inputs):
            if value is None or not self._is_float(value):
                continue
            form = self._low_form(value) if slot in wanted else self._full_form(value)
            if form is not value:
                node.replace_input_with(slot, form)

    def _give(self, graph: ir.Graph) -> None:
        """Give a graph its outputs in the form that its readers want; names of the main graph's stay."""
        main = graph is self._model.graph
        for position, value in enumerate(graph.outputs):
            if not self._is_float(value):
                continue
            if main and self._io:
                form = value if is_constant_value(value) else self._low_form(value)
            else:
                form = self._full_form(value)
            if form is value:
                continue
            graph.outputs[position] = form
            form.shape = value.shape
            if main and not value.is_graph_input():
                name = value.name
                value.name = self._splice.fresh(f"{name}_{self._low.name if not self._io else 'float32'}")
                form.name = name

    # -- the two forms of a value -----------------------------------------------------------------------------------

    def _full_form(self, value: ir.Value) -> ir.Value:
        if self._lows.get(value) is not value:
            return value
        if value not in self._fulls:
            self._fulls[value] = self._cast(value, ir.DataType.FLOAT)
        return self._fulls[value]

    def _low_form(self, value: ir.Value) -> ir.Value:
        if value not in self._lows:
            form = (
                self._low_constant(value) if is_constant_value(value) else self._cast(value, self._low.dtype)
            )
            self._lows[value] = form
        return self._lows[value]

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A Cast behind what makes the value, or at the top of the graph that it is an input of."""
        suffix = self._low.name if dtype == self._low.dtype else "float32"
        name = self._splice.fresh(f"{value.name}_to_{suffix}")
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
        made = cast.outputs[0]
        made.name = self._splice.fresh(f"{value.name}_{suffix}")
        made.type = ir.TensorType(dtype)
        made.shape = value.shape
        producer = value.producer()
        if producer is not None:
            self._splice.graph_of(producer).insert_after(producer, cast)
        else:
            graph = value.graph
            assert isinstance(graph, ir.Graph)
            if len(graph):
                graph.insert_before(graph[0], cast)
            else:
                graph.append(cast)
        self.done.casts += 1
        return made

    # -- constants --------------------------------------------------------------------------------------------------

    def _low_constant(self, value: ir.Value) -> ir.Value:
        """A constant in the low format: itself if nobody reads it in float32, else a second one."""
        self.done.weights += 1
        stored = stored_tensor(value)
        if stored is None:  # a Constant of numbers that is no tensor yet
            node = value.producer()
            assert node is not None
            array = constant_array({name: python_value(a) for name, a in node.attributes.items()})
            stored = ir.Tensor(array, dtype=ir.DataType.FLOAT, name=value.name)
        alone = not value.is_graph_output() and all(
            self._wants_low(reader, slot) for reader, slot in value.uses()
        )
        if alone:
            self._set_constant(value, cast_tensor(stored, self._low.dtype, value.name))
            return value
        self.done.doubled += 1
        name = self._splice.fresh(f"{value.name}_{self._low.name}")
        tensor = cast_tensor(stored, self._low.dtype, name)
        graph, producer = value.graph, value.producer()
        if producer is None and (self._model.ir_version or 0) >= SEPARATE_SINCE:
            made = ir.Value(
                name=name,
                type=ir.TensorType(self._low.dtype),
                shape=ir.Shape(tuple(stored.shape.numpy())),
                const_value=tensor,
            )
            assert isinstance(graph, ir.Graph)
            graph.register_initializer(made)
            return made
        contents = ir.Tensor(tensor.numpy(), dtype=self._low.dtype, name=name)
        node = ir.node("Constant", [], {"value": contents}, name=self._splice.fresh(f"{name}_constant"))
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(self._low.dtype)
        node.outputs[0].shape = ir.Shape(tuple(stored.shape.numpy()))
        if producer is not None:
            self._splice.graph_of(producer).insert_after(producer, node)
        else:
            assert isinstance(graph, ir.Graph)
            graph.insert_before(graph[0], node)
        return node.outputs[0]

    def _wants_low(self, reader: ir.Node, slot: int) -> bool:
        operands = self._choice.lowered.get(reader)
        return operands is not None and slot in operands.inputs

    def _set_constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        value.type = ir.TensorType(self._low.dtype)
        if value.is_initializer():
            value.const_value = tensor
            return
        node = value.producer()
        assert node is not None
        node.attributes.clear()
        # Attributes are written whole.
        held = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        node.attributes["value"] = ir.AttrTensor("value", held)
