"""The element types that contractions compute in: what decides whether sparse tensor cores can take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphprune.graph.twin import build_twin
from graphprune.model.inlining import inlined
from graphprune.model.nodes import is_constant_value, python_value
from graphprune.precision.choice import all_nodes, kind_of, title
from graphprune.precision.formats import MOVEMENT
from graphprune.precision.typing import types_of
from graphprune.sparsity.contracted import contracted_weights


@dataclass(frozen=True, slots=True)
class ContractionTypes:
    """One contraction with a constant weight.

    Attributes:
        node: Its name, or what it makes where it has none.
        op: Its kind.
        weight: The stored weight.
        weight_type: The element type of the operand, as the op reads it.
        activation_type: The element type of what it is multiplied with.
    """

    node: str
    op: str
    weight: str
    weight_type: str
    activation_type: str

    @property
    def is_half(self) -> bool:
        """True if both are float16 or bfloat16: what sparse tensor cores multiply among floating-point types."""
        half = ("FLOAT16", "BFLOAT16")
        return self.weight_type in half and self.activation_type in half


def element_types(
    model: ir.Model, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> list[ContractionTypes]:
    """The element types of all contractions with constant weights, in the order of the graph, bodies included.

    Args:
        model: Not changed.
        input_shapes: Sizes for inputs with dynamic dimensions, by input name.
    """
    if model.functions:
        model = inlined(model, {function.identifier() for function in model.functions.values()})
    types = types_of(model, build_twin(model, input_shapes))
    found = []
    for node in all_nodes(model):
        attributes = {
            name: python_value(attribute)
            for name, attribute in node.attributes.items()
            if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        }
        for weight in contracted_weights(node.domain, node.op_type, attributes):
            operands = [
                node.inputs[slot] if slot < len(node.inputs) else None for slot in (weight.slot, weight.other)
            ]
            stored = _stored(operands[0])
            if stored is None or operands[1] is None or _stored(operands[1]) is not None:
                continue
            names = [_name(types.get(value)) for value in operands if value is not None]
            found.append(ContractionTypes(title(node), kind_of(node), stored.name or "", *names))
    return found


def _name(dtype: ir.DataType | None) -> str:
    return "unknown" if dtype is None else dtype.name


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The stored constant behind ops that move it, or quantise it; None if it is computed."""
    while value is not None and not is_constant_value(value):
        node = value.producer()
        carries = node is not None and (
            kind_of(node) in MOVEMENT or node.op_type in ("DequantizeLinear", "QuantizeLinear")
        )
        value = node.inputs[0] if node is not None and carries and node.inputs else None
    return value
