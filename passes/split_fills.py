"""One fill a reader, so that readers that share zeros are not coupled by them."""

from __future__ import annotations

import onnx_ir as ir

from graphprune.model.nodes import is_constant_value, stored_tensor
from graphprune.model.splice import Splicer, base_name


def is_fill(node: ir.Node) -> bool:
    """True for ConstantOfShape, and for Expand of a single stored element."""
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "ConstantOfShape":
        return True
    source = node.inputs[0] if node.op_type == "Expand" else None
    stored = stored_tensor(source) if source is not None and is_constant_value(source) else None
    return stored is not None and stored.size == 1


class SplitFillsPass(ir.passes.InPlacePass):
    """Gives each reader of a fill (ConstantOfShape, or an Expand of one element) a node of its own.

    Exporters make the initial states of all layers of an LSTM from one tensor of zeros, cut into slices. The layers
    have nothing else in common: one may be narrowed without the other.

    Attributes:
        copies: (copy, original) of each node that the calls made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[ir.Node, ir.Node]] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Split in place."""
        before = len(self.copies)
        splice: Splicer | None = None
        for graph in list(model.graphs()):
            for node in list(graph):
                if not is_fill(node):
                    continue
                value = node.outputs[0]
                for reader, index in list(value.uses())[1:]:
                    splice = splice or Splicer(model)
                    reader.replace_input_with(index, self._copy(node, splice))
        return ir.passes.PassResult(model, modified=len(self.copies) > before)

    def _copy(self, node: ir.Node, splice: Splicer) -> ir.Value:
        original = node.outputs[0]
        made = splice.insert(
            node, node.op_type, list(node.inputs), dict(node.attributes), like=original, after=True
        )
        made.shape = original.shape
        producer = made.producer()
        assert producer is not None
        producer.name = splice.fresh(f"{base_name(node)}_copy")
        self.copies.append((producer, node))
        return made

    def join(self) -> None:
        """Take back the copies that still make what their original makes."""
        for copy, original in reversed(self.copies):
            if copy.graph is None or original.graph is None or copy.inputs != original.inputs:
                continue
            for reader, index in list(copy.outputs[0].uses()):
                reader.replace_input_with(index, original.outputs[0])
            copy.graph.remove(copy, safe=True)
        self.copies.clear()
