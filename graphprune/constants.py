"""Changed contents of constants: weights are rewritten where they are stored, each use by what its labels say.

What becomes of a constant is a function of its elements alone: what is left of it after a cut, or another order. Uses
of one initializer that need different contents get initializers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator
from typing import Any, Protocol

import numpy.typing as npt
import onnx_ir as ir

from graphprune.axes.analysis import Analysis
from graphprune.errors import PlanError
from graphprune.graph import Tensor
from graphprune.graph.evaluate import evaluate_constant
from graphprune.model.splice import Splicer
from graphprune.model.stream import release

Array = npt.NDArray[Any]

#: Weights of at least this many elements are changed when they are read.
LAZY_FROM = 1 << 16


class Change(Protocol):
    """What becomes of one constant."""

    @property
    def key(self) -> Hashable:
        """Equal for changes that do the same."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape after."""

    def apply(self, array: Array) -> Array:
        """The new contents; the element type stays."""


def changed_later(source: ir.TensorProtocol, change: Change) -> ir.LazyTensor:
    """A stored weight, changed each time that it is read: the result is never held beside its source."""

    def read() -> ir.Tensor[Any]:
        array = source.numpy()
        new = change.apply(array)
        del array
        release(source)
        return ir.Tensor(new, dtype=source.dtype, name=source.name)

    return ir.LazyTensor(
        read, source.dtype, ir.Shape(change.shape), name=source.name, doc_string=source.doc_string
    )


class ConstantChanges:
    """Changes all constants of one model in place.

    Attributes:
        loose: Values that nothing may read any more.
    """

    def __init__(
        self, analysis: Analysis, splice: Splicer, change_of: Callable[[Tensor], Change | None], suffix: str
    ) -> None:
        """Prepare; nothing is changed yet.

        Args:
            analysis: The analysis of the model.
            splice: Makes new initializers.
            change_of: What becomes of a constant of the twin; None where nothing does.
            suffix: Ends the names of constants that were computed and are stored from now on.
        """
        self.loose: list[ir.Value] = []
        self._analysis = analysis
        self._splice = splice
        self._change_of = change_of
        self._suffix = suffix

    def run(self) -> None:
        """Change each weight; uses of one weight that need different things get weights of their own.

        What is computed from constants is worked out first, while all weights are as they were; it is stored where it
        is changed itself, and where it is computed from a weight that is changed for the sake of another reader.

        Raises:
            PlanError: A constant cannot be replaced where it is.
        """
        by_value: dict[ir.Value, list[Tensor]] = {}
        for tensor in self._analysis.graph.tensors:
            if tensor.constant and tensor.value is not None and tensor.producer is None:
                by_value.setdefault(tensor.value, []).append(tensor)
        touched = {
            value: tensors
            for value, tensors in by_value.items()
            if any(self._change_of(tensor) is not None for tensor in tensors)
        }
        computed = {
            tensor: evaluate_constant(tensor)
            for tensor in self._computed_constants()
            if self._change_of(tensor) is not None or self._stems_from(tensor, touched)
        }
        for value, tensors in touched.items():
            self._change(value, tensors)
        for tensor, array in computed.items():
            if tensor.value is not None:
                change = self._change_of(tensor)
                self._replace_contents(tensor.value, array if change is None else change.apply(array))

    def _computed_constants(self) -> Iterator[Tensor]:
        """Results of ops on constants that something else reads."""
        for op in self._analysis.graph.ops:
            if self._analysis.is_leaf(op):
                for tensor in op.outputs:
                    if tensor is not None and any(
                        not self._analysis.is_leaf(user) for user, _ in tensor.uses
                    ):
                        yield tensor

    @staticmethod
    def _stems_from(tensor: Tensor, values: Container[ir.Value]) -> bool:
        todo, seen = [tensor], {tensor}
        while todo:
            current = todo.pop()
            if current.producer is None:
                if current.value is not None and current.value in values:
                    return True
                continue
            fresh = [t for t in current.producer.inputs if t is not None and t not in seen]
            seen.update(fresh)
            todo += fresh
        return False

    def _change(self, value: ir.Value, tensors: list[Tensor]) -> None:
        versions: dict[Hashable, list[Tensor]] = {}
        for tensor in tensors:
            change = self._change_of(tensor)
            versions.setdefault(None if change is None else change.key, []).append(tensor)
        stored = value.const_value if value.is_initializer() else None
        lazy = (
            stored if stored is not None and stored.size >= LAZY_FROM and stored.dtype.bitwidth >= 8 else None
        )
        array = evaluate_constant(tensors[0]) if lazy is None or len(versions) > 1 else None
        # The version that keeps the name is the first one; the others are clones.
        for number, users in enumerate(versions.values()):
            change = self._change_of(users[0])
            if number == 0 and lazy is not None:
                if change is not None:
                    value.const_value = changed_later(lazy, change)
                    value.shape = ir.Shape(change.shape)
                continue
            assert array is not None
            data = array if change is None else change.apply(array)
            if number == 0:
                if change is not None:
                    self._replace_contents(value, data)
                continue
            for tensor in users:
                self._clone(value, tensor, data)

    def _clone(self, value: ir.Value, tensor: Tensor, data: Array) -> None:
        """Let the uses of one tensor read contents of their own."""
        clone: ir.Value | None = None
        for op, slot in tensor.uses:
            if op.node is None:
                continue
            if clone is None:
                clone = self._splice.constant(op.node, value.name or "weight", data)
            _replace_use(op.node, slot, value, clone)

    def _replace_contents(self, value: ir.Value, data: Array) -> None:
        if data.dtype.kind in "OSU":
            encoded = [
                text.encode() if isinstance(text, str) else bytes(text) for text in data.ravel().tolist()
            ]
            tensor: ir.TensorProtocol = ir.StringTensor(encoded, shape=ir.Shape(data.shape), name=value.name)
        else:
            tensor = ir.tensor(data, name=value.name)
        if value.is_initializer():
            if value.const_value is not None and value.const_value.dtype != tensor.dtype:
                tensor = ir.Tensor(data, dtype=value.const_value.dtype, name=value.name)
            value.const_value = tensor
            value.shape = ir.Shape(data.shape)
            return
        node = value.producer()
        if node is not None and node.op_type == "Constant" and not node.domain and "value" in node.attributes:
            node.attributes["value"] = ir.AttrTensor("value", tensor)
            if value.shape is not None:
                value.shape = ir.Shape(data.shape)
            return
        if node is None:
            raise PlanError(f"{value.name!r} holds no contents that could be rewritten")
        replacement = self._splice.constant(node, f"{value.name}_{self._suffix}", data)
        for user, index in list(value.uses()):
            user.replace_input_with(index, replacement)
        self.loose.append(value)


def _replace_use(node: ir.Node, slot: int, value: ir.Value, clone: ir.Value) -> None:
    if slot < len(node.inputs) and node.inputs[slot] is value:
        node.replace_input_with(slot, clone)
        return
    for index, operand in enumerate(node.inputs):  # at the border of a subgraph the slots differ
        if operand is value:
            node.replace_input_with(index, clone)
            return
    raise PlanError(f"{value.name!r} is returned by a subgraph of {node.name!r} and used elsewhere")
