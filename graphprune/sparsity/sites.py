"""The weights of a model that an op sums over: where each is stored, how it is laid out there, who reads it.

A stored weight is followed from the op back through Transpose, Squeeze, Unsqueeze, Cast, Identity, QuantizeLinear and
DequantizeLinear, and through calls of the model's functions. No contents are read but zero points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from graphprune.model.nodes import python_value, stored_tensor, subgraphs
from graphprune.sparsity.contracted import Weight, contracted_weights
from graphprune.sparsity.pattern import Layout

#: Element types whose zeros and magnitudes are known; everything else is packed or no number.
ELEMENT_TYPES = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
        ir.DataType.INT8,
        ir.DataType.UINT8,
    }
)
#: Ops whose result does not hang on the contents of what they read.
_SIZES = {"Shape", "Size"}
#: Ops that only carry a weight: what is zero before is zero behind.
_CARRIERS = {
    "Identity",
    "Cast",
    "CastLike",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "QuantizeLinear",
    "DequantizeLinear",
}


@dataclass(frozen=True, slots=True)
class Use:
    """One op that reads a stored weight, directly or behind a Transpose or the like.

    Attributes:
        node: The op's name, or what it makes where it has none; "output" for a graph's output.
        op: Its type.
        layout: The stored weight as this op contracts it; None where it does not.
        reason: Why there is no layout; None where there is one.
        left: The weight is the left operand of a product.
    """

    node: str
    op: str
    layout: Layout | None
    reason: str | None = None
    left: bool = False


@dataclass(eq=False, slots=True)
class Site:
    """A stored weight that at least one op contracts.

    Attributes:
        value: What holds it: an initializer, or the output of a Constant node.
        uses: Everything that reads it.
        layout: How all its uses contract it; None where that differs.
        reason: Why it cannot be given a pattern in place; None where it can.
    """

    value: ir.Value
    uses: tuple[Use, ...]
    layout: Layout | None
    reason: str | None = None

    @property
    def name(self) -> str:
        return self.value.name or ""

    @property
    def tensor(self) -> ir.TensorProtocol:
        """What is stored."""
        tensor = stored_tensor(self.value)
        assert tensor is not None
        return tensor

    @property
    def dtype(self) -> ir.DataType:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape.numpy())

    @property
    def use(self) -> Use:
        """The first op that contracts it, or else the first that was to."""
        return next((use for use in self.uses if use.layout is not None), self.uses[0])


@dataclass(frozen=True, slots=True)
class _Stored:
    """A stored weight as an op sees it: ``axes[i]`` is the stored axis that its axis ``i`` is; None: added."""

    value: ir.Value
    axes: tuple[int | None, ...]
    obstacle: str | None = None


#: What a function's inputs are at one call.
_Scope: TypeAlias = "Mapping[ir.Value, _Stored | None]"


@dataclass
class _Walk:
    """Collects, for every stored weight, its uses."""

    model: ir.Model
    uses: dict[ir.Value, list[Use]] = field(default_factory=dict)

    def graph(self, graph: ir.Graph | ir.Function, scope: _Scope, calls: tuple[str, ...]) -> None:
        seen: dict[ir.Value, _Stored | None] = dict(scope)
        for node in graph:
            for inner in subgraphs(node):
                self.graph(inner, seen, calls)
            if _is_carrier(node):
                continue
            function = self.model.functions.get(node.op_identifier())
            if function is not None:
                if str(node.op_identifier()) not in calls:  # no call may lead back to itself
                    given = [None if value is None else self.stored(value, seen) for value in node.inputs]
                    given += [None] * (len(function.inputs) - len(given))
                    inputs = dict(zip(function.inputs, given, strict=False))
                    self.graph(function, inputs, (*calls, str(node.op_identifier())))
                continue
            self.node(node, seen)
        for value in graph.outputs:
            stored = self.stored(value, seen)
            if stored is not None and not calls:
                self.uses.setdefault(stored.value, []).append(
                    Use("output", "", None, "it is an output of the graph")
                )

    def node(self, node: ir.Node, seen: dict[ir.Value, _Stored | None]) -> None:
        operands = [None if value is None else self.stored(value, seen) for value in node.inputs]
        if not any(operands):
            return
        attributes = {
            name: python_value(value)
            for name, value in node.attributes.items()
            if not value.is_ref() and value.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        }
        weights = {
            weight.slot: weight for weight in contracted_weights(node.domain, node.op_type, attributes)
        }
        if not weights and all(stored for stored, value in zip(operands, node.inputs, strict=True) if value):
            return  # of constants alone: whoever reads the result reads them
        name = node.name or next((o.name for o in node.outputs if o.name), "") or node.op_type
        for slot, stored in enumerate(operands):
            if stored is None:
                continue
            weight = weights.get(slot)
            found: Layout | str
            if weight is None:
                found = f"{node.op_type} {name!r} reads it too, which does not sum over it"
            else:
                found = self.layout(stored, weight, operands, int(attributes.get("group", 1)))
            use = (
                Use(name, node.op_type, found, left=weight is not None and weight.other > slot)
                if isinstance(found, Layout)
                else Use(name, node.op_type, None, found)
            )
            self.uses.setdefault(stored.value, []).append(use)

    def layout(
        self, stored: _Stored, weight: Weight, operands: list[_Stored | None], group: int
    ) -> Layout | str:
        """The stored weight as an op contracts it, or why not."""
        if stored.obstacle is not None:
            return stored.obstacle
        if weight.other < len(operands) and operands[weight.other] is not None:
            return "it is multiplied with another constant"
        rank = len(stored.axes)
        if rank < weight.least_rank:
            return f"it has {rank} axes, where a weight has {weight.least_rank}"
        zero = weight.zero_point
        if zero is not None and zero < len(operands) and _zero_point(operands[zero]):
            return "its zero point is not 0: a zero of the weight is not stored as one"
        tensor = stored_tensor(stored.value)
        if tensor is None:
            return "its contents are not stored as one tensor"
        shape = tuple(tensor.shape.numpy())
        axis, along = stored.axes[weight.axis], stored.axes[weight.outputs]
        if axis is None or along is None:
            return "its axes of one element were added, and the op sums over one"
        outputs = shape[along]
        split = group if weight.grouped else 1
        if shape[axis] % split:
            return f"its axis of {shape[axis]} does not fall into {split} groups"
        made = outputs if weight.grouped or group == 1 else outputs // group
        place = (0, prod(shape[along + 1 : axis]) * split) if along < axis else (2, prod(shape[along + 1 :]))
        return Layout(prod(shape[:axis]) * split, shape[axis] // split, prod(shape[axis + 1 :]), made, *place)

    def stored(self, value: ir.Value, seen: dict[ir.Value, _Stored | None]) -> _Stored | None:
        """The stored weight that a value is but for the order of its axes; None if it is computed."""
        if value not in seen:
            seen[value] = self._stored(value, seen)
        return seen[value]

    def _stored(self, value: ir.Value, seen: dict[ir.Value, _Stored | None]) -> _Stored | None:
        tensor = stored_tensor(value)
        if tensor is not None:
            return _Stored(value, tuple(range(len(tensor.shape))))
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return None
        if not _is_carrier(node):
            return self._computed(node, seen)
        source = self.stored(node.inputs[0], seen)
        if source is None or source.obstacle is not None:
            return source
        if node.op_type == "Transpose":
            order = node.attributes.get("perm")
            axes = list(reversed(range(len(source.axes)))) if order is None else list(order.as_ints())
            return _Stored(source.value, tuple(source.axes[axis] for axis in axes))
        if node.op_type in ("Unsqueeze", "Squeeze"):
            return self._resized(node, source, seen)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.inputs) > 2 and node.inputs[2]:
            zero = self.stored(node.inputs[2], seen)
            if zero is None or _zero_point(zero):
                obstacle = "its zero point is not 0: a zero of the weight is not stored as one"
                return _Stored(source.value, source.axes, obstacle)
        return source

    def _resized(self, node: ir.Node, source: _Stored, seen: dict[ir.Value, _Stored | None]) -> _Stored:
        """Axes of one element more or fewer."""
        given = node.attributes.get("axes")
        places = list(given.as_ints()) if given is not None else None
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            constant = self.stored(node.inputs[1], seen)
            tensor = None if constant is None or constant.obstacle else stored_tensor(constant.value)
            places = None if tensor is None else [int(place) for place in tensor.numpy().ravel()]
        axes = list(source.axes)
        if places is None:
            return _Stored(
                source.value, source.axes, f"{node.op_type} {node.name!r} computes the weight from it"
            )
        if node.op_type == "Unsqueeze":
            rank = len(axes) + len(places)
            for place in sorted(place % rank for place in places):
                axes.insert(place, None)
        else:
            gone = {place % len(axes) for place in places}
            axes = [axis for place, axis in enumerate(axes) if place not in gone]
        return _Stored(source.value, tuple(axes))

    def _computed(self, node: ir.Node, seen: dict[ir.Value, _Stored | None]) -> _Stored | None:
        """What an op makes of constants alone: the largest of them, with the op as the obstacle."""
        if node.op_type in _SIZES or subgraphs(node) or node.op_identifier() in self.model.functions:
            return None
        sources = [self.stored(value, seen) for value in node.inputs if value is not None]
        constants = [source for source in sources if source is not None]
        if len(constants) < len(sources):
            return None
        largest = max(constants, key=_elements)
        return _Stored(
            largest.value, largest.axes, f"{node.op_type} {node.name!r} computes the weight from it"
        )


def _elements(stored: _Stored) -> int:
    tensor = stored_tensor(stored.value)
    return 0 if tensor is None else tensor.size


def _is_carrier(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx", "com.microsoft") and node.op_type in _CARRIERS


def _zero_point(stored: _Stored | None) -> bool:
    """True unless an operand is missing or a constant of zeros."""
    if stored is None:
        return False
    tensor = stored_tensor(stored.value)
    return tensor is None or bool(np.any(tensor.numpy().astype(np.int64) != 0))


def find_sites(model: ir.Model) -> list[Site]:
    """All stored weights that an op sums over, in the order of the graph.

    Args:
        model: Not changed. Subgraphs and functions are looked into.

    Returns:
        The weights; ``reason`` says what stands against a pattern whoever runs the model. What a runtime asks for on
        top says :mod:`graphprune.sparsity.eligibility`.
    """
    walk = _Walk(model)
    walk.graph(model.graph, {}, ())
    sites = []
    for value, uses in walk.uses.items():
        layouts = {use.layout for use in uses if use.layout is not None}
        if not layouts:
            if all(use.reason and "reads it too" in use.reason for use in uses):
                continue  # no op that contracts has anything to do with it
            sites.append(Site(value, tuple(uses), None, uses[0].reason))
            continue
        sites.append(Site(value, tuple(uses), *_agreed(value, uses, layouts)))
    return sites


def _agreed(value: ir.Value, uses: list[Use], layouts: set[Layout]) -> tuple[Layout | None, str | None]:
    other = next((use for use in uses if use.layout is None), None)
    if len(layouts) > 1:
        names = " and ".join(repr(use.node) for use in uses if use.layout is not None)
        return None, f"{names} sum over different axes of it"
    layout = next(iter(layouts))
    if other is not None:
        return layout, other.reason
    tensor = stored_tensor(value)
    assert tensor is not None
    if tensor.dtype not in ELEMENT_TYPES:
        return layout, f"elements of type {tensor.dtype.name} are not rewritten"
    if 0 in layout.shape:
        return layout, "it is empty"
    return layout, None
