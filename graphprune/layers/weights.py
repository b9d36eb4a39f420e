"""Reading and writing the weights and biases of contractions in a pruned model."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from graphprune.calibration import Array
from graphprune.graph import Op, Tensor
from graphprune.layers.contractions import Contraction
from graphprune.layers.execution import constant_contents
from graphprune.model.nodes import python_value
from graphprune.model.splice import Splicer, base_name

#: Where a bias is: a node and the slot that takes it.
Place = tuple[ir.Node, int]


class Shapes(Protocol):
    """What shape each tensor of the twin has by now."""

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of a tensor."""


class Changed(Protocol):
    """A model that is no longer what its twin says: pruned, or with other weights."""

    @property
    def model(self) -> ir.Model:
        """The model; the twin's ops have its nodes."""

    @property
    def masks(self) -> Shapes:
        """What is left of each tensor."""


class LayerWeights:
    """The weights and biases that a changed model's contractions have now."""

    def __init__(self, changed: Changed) -> None:
        self._model = changed.model
        self._masks = changed.masks
        self._splice = Splicer(changed.model)

    def constant(self, op: Op, slot: int) -> Array:
        """What the pruned model holds at a constant operand.

        Args:
            op: An op of the twin.
            slot: The operand, which is there.
        """
        value = op.node.inputs[slot] if op.node is not None else None
        assert value is not None
        return constant_contents(self._model, value)

    def bias(self, contraction: Contraction) -> tuple[Array | None, Place | None]:
        """The bias that is part of the contraction's result, and where a new one would go.

        A MatMul has no bias; the constant that is added behind it takes the change.
        """
        node = node_of(contraction)
        if contraction.bias is not None:
            beta = float(contraction.op.attributes.get("beta", 1.0))
            tensor = contraction.bias_tensor
            bias = None
            if tensor is not None:
                bias = self.constant(contraction.op, contraction.bias).astype(np.float64) * beta
            if bias is not None and bias.size == 1:
                outputs = self._masks.shape(contraction.output)[-1 if contraction.op.kind == "Gemm" else 1]
                bias = np.full(outputs, float(bias.ravel()[0]))
            return (None if bias is None else bias.ravel()), (node, contraction.bias) if beta else None
        uses = contraction.output.uses
        if len(uses) == 1 and not contraction.output.is_output and uses[0][0].kind == "Add":
            op, slot = uses[0]
            other = op.inputs[1 - slot]
            outputs = self._masks.shape(contraction.output)[-1]
            transposed = getattr(contraction.form, "transposed_result", False)
            if other is not None and other.constant and op.node is not None and not transposed:
                if (
                    trimmed(self._masks.shape(other)) == (outputs,)
                    and self._masks.shape(other)[-1] == outputs
                ):
                    return None, (op.node, 1 - slot)
        return None, None

    def write(self, contraction: Contraction, weight: Array, biases: Array, place: Place | None) -> None:
        """Give a contraction a new weight, and a bias where it has a place.

        Args:
            contraction: The contraction.
            weight: Of the shape that its weight has now.
            biases: The bias that its result shall have; what is to be added, where the place is behind it.
            place: What :meth:`bias` said.
        """
        self.replace(node_of(contraction), contraction.weight, weight)
        if place is not None:
            self.write_bias(contraction, biases, place, weight.dtype)

    def write_bias(self, contraction: Contraction, biases: Array, place: Place, dtype: np.dtype[Any]) -> None:
        """Give a contraction a bias.

        Args:
            contraction, biases, place: As of :meth:`write`.
            dtype: What a bias of its own is stored in.
        """
        target, slot = place
        shift = biases.ravel()
        if target is node_of(contraction):
            beta = float(contraction.op.attributes.get("beta", 1.0))
            self.replace(target, slot, (shift / beta).astype(dtype))
            return
        if not shift.any():
            return
        value = target.inputs[slot]
        assert value is not None
        old = constant_contents(self._model, value)
        self.replace(target, slot, (old + shift.astype(old.dtype).reshape(old.shape)).astype(old.dtype))

    def replace(self, node: ir.Node, slot: int, array: Array) -> None:
        """Feed an input from a new constant; the one before goes if nothing else reads it."""
        if slot >= len(node.inputs):
            node.resize_inputs(slot + 1)
        old = node.inputs[slot]
        base = old.name if old is not None and old.name else f"{base_name(node)}_bias"
        if (
            old is not None
            and old.is_initializer()
            and len(list(old.uses())) == 1
            and not old.is_graph_input()
        ):
            if old.const_value is not None and old.const_value.dtype == ir.DataType.from_numpy(array.dtype):
                old.const_value = ir.tensor(array, name=old.name)
                old.shape = ir.Shape(array.shape)
                return
        node.replace_input_with(slot, self._splice.constant(node, base, array))
        self._splice.remove_unread([] if old is None else [old])


def attributes_now(op: Op) -> dict[str, object] | None:
    """The attributes that an op's node has now, after pruning; None for an op without a node."""
    if op.node is None:
        return None
    return {name: python_value(value) for name, value in op.node.attributes.items() if not value.is_ref()}


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its axes of size 1."""
    return tuple(size for size in shape if size != 1)


def node_of(contraction: Contraction) -> ir.Node:
    """The pruned model's node."""
    node = contraction.op.node
    assert node is not None
    return node
