"""Writing ONNX nodes as expressions over values of known shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]
Operand: TypeAlias = "Value | float | Array"
#: The body of a loop: states and slices to new states and results.
Body: TypeAlias = "Callable[[list[Value], list[Value]], tuple[list[Value], list[Value]]]"

#: What names of emitted values begin with.
PREFIX = "graphprune_vjp_"


class NoGradientError(Exception):
    """The derivative of an op is not known, for the reason given."""


@dataclass
class Emitter:
    """A list of nodes that grows, with its constants.

    Attributes:
        opset: Version of the standard domain, which decides how axes and bounds are passed.
        dtype: The one real type in which everything is computed.
        nodes: In topological order.
        constants: By name.
    """

    opset: int
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    _known: dict[tuple[str, Shape, bytes], str] = field(default_factory=dict)
    _count: list[int] = field(default_factory=lambda: [0])

    def fresh(self) -> str:
        """A name that nothing else has."""
        self._count[0] += 1
        return f"{PREFIX}{self._count[0]}"

    def value(self, name: str, shape: Shape) -> Value:
        """A value that something else makes."""
        return Value(self, name, shape)

    def literal(self, array: Any, dtype: Any = None) -> Value:
        """A constant; reals take the emitter's type. Equal ones are one."""
        array = np.asarray(array, dtype=dtype)
        if array.dtype.kind == "f":
            array = array.astype(self.dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self.fresh()
            self.constants[self._known[key]] = array
        return Value(self, self._known[key], array.shape)

    def integers(self, values: Sequence[int]) -> Value:
        """An int64 vector."""
        return self.literal(np.asarray(values, dtype=np.int64))

    def op(
        self, kind: str, inputs: Sequence[Value | None], shape: Shape, domain: str = "", **attributes: Any
    ) -> Value:
        """A node with one output of the given shape."""
        return self.ops(kind, inputs, [shape], domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[Value | None],
        shapes: Sequence[Shape],
        domain: str = "",
        **attributes: Any,
    ) -> list[Value]:
        """A node with several outputs."""
        names = ["" if value is None else value.name for value in inputs]
        made = [Value(self, self.fresh(), tuple(shape)) for shape in shapes]
        self.nodes.append(
            onnx.helper.make_node(kind, names, [value.name for value in made], domain=domain, **attributes)
        )
        return made

    def scan(
        self, states: Sequence[Value], inputs: Sequence[Value], body: Body, *, reverse: bool = False
    ) -> tuple[list[Value], list[Value]]:
        """A loop over axis 0 of ``inputs``.

        Args:
            states: What is handed from step to step, at the start.
            inputs: What each step gets a slice of.
            body: Takes states and slices to new states and what is to be stacked.
            reverse: From the last slice to the first; results are stacked in the order of the slices.

        Returns:
            The states at the end, and the stacked results.
        """
        steps = inputs[0].shape[0]

        def turned(values: Sequence[Value]) -> list[Value]:
            return [v.take(np.arange(steps)[::-1], 0) if reverse and steps > 1 else v for v in values]

        inner = Emitter(self.opset, self.dtype, [], self.constants, self._known, self._count)
        ins = [inner.value(inner.fresh(), value.shape) for value in states]
        slices = [inner.value(inner.fresh(), value.shape[1:]) for value in inputs]
        new, stacked = body(ins, slices)
        outputs = [inner.op("Identity", [value], value.shape) for value in (*new, *stacked)]
        element = onnx.helper.np_dtype_to_tensor_dtype(self.dtype)
        given, made_inside = (
            [onnx.helper.make_tensor_value_info(value.name, element, value.shape) for value in values]
            for values in ((*ins, *slices), outputs)
        )
        made = self.ops(
            "Scan",
            [*states, *turned(inputs)],
            [*(value.shape for value in new), *((steps, *value.shape) for value in stacked)],
            body=onnx.helper.make_graph(inner.nodes, self.fresh(), given, made_inside),
            num_scan_inputs=len(inputs),
        )
        return made[: len(new)], turned(made[len(new) :])

    def where(self, condition: Value, yes: Operand, no: Operand) -> Value:
        """Elementwise choice."""
        a, b = self.lift(yes), self.lift(no)
        shape = np.broadcast_shapes(condition.shape, a.shape, b.shape)
        return self.op("Where", [condition, a, b], shape)

    def lift(self, operand: Operand) -> Value:
        """A value of a number or an array."""
        return operand if isinstance(operand, Value) else self.literal(np.asarray(operand, dtype=self.dtype))

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Join along an axis."""
        if len(values) == 1:
            return values[0]
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.op("Concat", values, tuple(shape), axis=axis)

    def zeros(self, shape: Shape) -> Value:
        """Zeros, held as one number."""
        return self.literal(np.zeros((), self.dtype)).expand(shape)

    def total(self, values: Sequence[Value]) -> Value:
        """Sum of values of one shape."""
        if len(values) == 1:
            return values[0]
        return self.op("Sum", values, values[0].shape)


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of an emitted graph; operators emit nodes, and broadcast as NumPy does."""

    emitter: Emitter = field(repr=False)
    name: str
    shape: Shape

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def _with(self, kind: str, left: Operand, right: Operand) -> Value:
        a, b = self.emitter.lift(left), self.emitter.lift(right)
        return self.emitter.op(kind, [a, b], np.broadcast_shapes(a.shape, b.shape))

    def __add__(self, other: Operand) -> Value:
        return self._with("Add", self, other)

    def __radd__(self, other: Operand) -> Value:
        return self._with("Add", other, self)

    def __sub__(self, other: Operand) -> Value:
        return self._with("Sub", self, other)

    def __rsub__(self, other: Operand) -> Value:
        return self._with("Sub", other, self)

    def __mul__(self, other: Operand) -> Value:
        return self._with("Mul", self, other)

    def __rmul__(self, other: Operand) -> Value:
        return self._with("Mul", other, self)

    def __truediv__(self, other: Operand) -> Value:
        return self._with("Div", self, other)

    def __rtruediv__(self, other: Operand) -> Value:
        return self._with("Div", other, self)

    def __neg__(self) -> Value:
        return self.apply("Neg")

    def above(self, other: Operand) -> Value:
        """Elementwise ``>``, bool."""
        return self._with("Greater", self, other)

    def below(self, other: Operand) -> Value:
        """Elementwise ``<``, bool."""
        return self._with("Less", self, other)

    def equals(self, other: Operand) -> Value:
        """Elementwise equality, bool."""
        return self._with("Equal", self, other)

    def power(self, exponent: Operand) -> Value:
        """Elementwise power."""
        return self._with("Pow", self, exponent)

    def apply(self, kind: str, **attributes: Any) -> Value:
        """An elementwise op of one operand."""
        return self.emitter.op(kind, [self], self.shape, **attributes)

    def cast(self) -> Value:
        """To the emitter's real type."""
        to = onnx.helper.np_dtype_to_tensor_dtype(self.emitter.dtype)
        return self.apply("Cast", to=to)

    # -- axes ---------------------------------------------------------------------------------------------------

    def reshape(self, shape: Sequence[int]) -> Value:
        """Row-major reshape."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        if 0 in shape:
            raise NoGradientError("a tensor is empty")
        return self.emitter.op("Reshape", [self, self.emitter.integers(shape)], shape)

    def transpose(self, perm: Sequence[int]) -> Value:
        """Permute axes: axis i of the result is axis ``perm[i]``."""
        if list(perm) == list(range(self.rank)):
            return self
        shape = tuple(self.shape[p] for p in perm)
        return self.emitter.op("Transpose", [self], shape, perm=[int(p) for p in perm])

    def swapped(self) -> Value:
        """The last two axes exchanged."""
        return self.transpose([*range(self.rank - 2), self.rank - 1, self.rank - 2])

    def expand(self, shape: Sequence[int]) -> Value:
        """Broadcast to a shape."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        return self.emitter.op("Expand", [self, self.emitter.integers(shape)], shape)

    def sum(self, axes: Sequence[int], keepdims: bool = True) -> Value:
        """Sum over axes (non-negative)."""
        axes = [a for a in sorted(axes) if keepdims is False or self.shape[a] != 1]
        if not axes:
            return self
        shape = tuple(1 if a in axes else s for a, s in enumerate(self.shape) if keepdims or a not in axes)
        if self.emitter.opset < 13:
            return self.emitter.op("ReduceSum", [self], shape, axes=axes, keepdims=int(keepdims))
        return self.emitter.op(
            "ReduceSum", [self, self.emitter.integers(axes)], shape, keepdims=int(keepdims)
        )

    def mean(self, axes: Sequence[int]) -> Value:
        """Mean over axes, which stay with size 1."""
        count = prod(self.shape[a] for a in axes)
        return self.sum(axes) * (1.0 / count) if count != 1 else self

    def unbroadcast(self, shape: Sequence[int]) -> Value:
        """Sum over what was broadcast: the adjoint of :meth:`expand`."""
        shape = tuple(shape)
        if self.shape == shape:
            return self
        lead = self.rank - len(shape)
        axes = [a for a, s in enumerate(self.shape) if a < lead or (shape[a - lead] == 1 and s != 1)]
        value = self.sum(axes).reshape(shape) if all(self.shape[a] > 1 for a in axes) else self.sum(axes)
        return value.reshape(shape)

    def slice(self, axis: int, start: int, stop: int, step: int = 1) -> Value:
        """Positions ``start:stop:step`` of an axis, bounds within it."""
        if (start, stop, step) == (0, self.shape[axis], 1):
            return self
        shape = list(self.shape)
        shape[axis] = len(range(start, stop, step))
        e = self.emitter
        if e.opset < 10:
            if step != 1:
                return self.take(np.arange(start, stop, step), axis)
            return e.op("Slice", [self], tuple(shape), axes=[axis], starts=[start], ends=[stop])
        bounds = [e.integers([n]) for n in (start, stop, axis, step)]
        return e.op("Slice", [self, *bounds], tuple(shape))

    def take(self, index: Array, axis: int) -> Value:
        """Positions of an axis, in any order, repeated or not."""
        shape = (*self.shape[:axis], *index.shape, *self.shape[axis + 1 :])
        where = self.emitter.literal(index.astype(np.int64))
        return self.emitter.op("Gather", [self, where], shape, axis=axis)

    def pad(self, axis: int, before: int, after: int) -> Value:
        """Zeros before and behind an axis."""
        zeros = [
            self.emitter.zeros((*self.shape[:axis], size, *self.shape[axis + 1 :])) if size else None
            for size in (before, after)
        ]
        parts = [part for part in (zeros[0], self, zeros[1]) if part is not None]
        return self.emitter.concat(parts, axis)

    def matmul(self, other: Value) -> Value:
        """Matrix product; both of rank 2 and more."""
        lead = np.broadcast_shapes(self.shape[:-2], other.shape[:-2])
        return self.emitter.op("MatMul", [self, other], (*lead, self.shape[-2], other.shape[-1]))
