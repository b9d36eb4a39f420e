"""Rewriting: carry a plan out on the model itself.

What each op needs is collected first, as edits keyed by node, and made afterwards, so that rules always see the model
as it was. Weights are compacted by their masks; literals and attributes follow from the rules. Arithmetic on shapes
that stays in the graph goes on in the *original* sizes: Shape is corrected where it reads a pruned tensor, and the op
that consumes the sizes gets them scaled.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.axes.analysis import Analysis, operands_of
from graphprune.axes.flow import Operand, SignatureFlow
from graphprune.axes.signature import View
from graphprune.constants import ConstantChanges
from graphprune.errors import PlanError
from graphprune.graph import Op, Tensor
from graphprune.kernels.box import Mask, box_of_parts, compact
from graphprune.model.splice import Splicer, base_name
from graphprune.plan import Masks
from graphprune.rules.registry import Refusal, find_rule, tensor_at

Array = npt.NDArray[Any]


@dataclass
class Edits:
    """What is to be done to one node."""

    attributes: dict[str, Any] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    constants: dict[int, Array] = field(default_factory=dict)
    scaled: dict[int, tuple[Sequence[int], Sequence[int]]] = field(default_factory=dict)
    gathered: dict[int, list[tuple[int, npt.NDArray[np.int64]]]] = field(default_factory=dict)
    restored: dict[int, tuple[Sequence[int], Sequence[int], Array | None]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any((self.attributes, self.dropped, self.constants, self.scaled, self.gathered, self.restored))


@dataclass(frozen=True)
class _Compaction:
    """What is left of one constant (a :class:`graphprune.constants.Change`)."""

    parts: Sequence[Mask]
    shape: tuple[int, ...]

    @property
    def key(self) -> Hashable:
        return tuple((part.shape, part.tobytes()) for part in self.parts)

    def apply(self, array: Array) -> Array:
        return compact(array, *self.parts)


class OpChange:
    """The view of one op that rules get (:class:`graphprune.rules.registry.Change`)."""

    def __init__(self, op: Op, analysis: Analysis, masks: Masks) -> None:
        self.op = op
        self.edits = Edits()
        self._masks = masks
        flows = analysis.flows[op.index]
        self._flows = [] if isinstance(flows, Refusal) else [f for f in flows if isinstance(f, SignatureFlow)]

    def _tensor(self, operand: Operand) -> Tensor:
        tensor = tensor_at(self.op, operand)
        if tensor is None or tensor.shape is None:
            raise PlanError(f"{self.op.kind} {self.op.name!r} lacks an operand whose size it needs")
        return tensor

    def old(self, operand: Operand) -> tuple[int, ...]:
        return self._tensor(operand).shape or ()

    def new(self, operand: Operand) -> tuple[int, ...]:
        return self._masks.shape(self._tensor(operand))

    def kept(self, operand: Operand) -> Mask:
        tensor = self._tensor(operand)
        mask = self._masks.mask(tensor)
        return np.ones((1,) * len(tensor.shape or ()), dtype=bool) if mask is None else mask

    def known(self, slot: int) -> Array | None:
        tensor = self.op.inputs[slot] if slot < len(self.op.inputs) else None
        return None if tensor is None or tensor.dynamic else tensor.data

    def factor_sizes(self, factor: str) -> tuple[int, int]:
        """Sizes before and after; all operands that bear the factor must agree.

        Raises:
            PlanError: They do not: a rule or the analysis is wrong.
        """
        after: dict[int, str] = {}
        before = 0
        for flow in self._flows:
            for view in flow.signature.views:
                if factor in view.factors:
                    before = flow.signature.sizes[factor]
                    operand = Operand(view.is_output, view.slot)
                    sizes = self._view_sizes(flow, view)
                    after[sizes[view.factors.index(factor)]] = str(operand)
        if len(after) > 1:
            raise PlanError(f"{self.op.kind} {self.op.name!r}: the sizes of {factor!r} would differ: {after}")
        return before, next(iter(after), before)

    def new_size(self, factor: str) -> int:
        """Size of a factor after."""
        return self.factor_sizes(factor)[1]

    def _view_sizes(self, flow: SignatureFlow, view: View) -> tuple[int, ...]:
        sizes = tuple(flow.signature.sizes[name] for name in view.factors)
        parts = self._masks.parts(self._tensor(Operand(view.is_output, view.slot)))
        if not parts:
            return sizes
        box = box_of_parts([spread_mask(part, flow, view) for part in parts], sizes)
        if box is None:
            raise PlanError(f"{self.op.kind} {self.op.name!r}: what is left of an operand is ragged")
        return box

    def check(self) -> None:
        """Every factor has one new size."""
        for flow in self._flows:
            for factor in flow.signature.sizes:
                self.factor_sizes(factor)

    def set_attribute(self, name: str, value: int | float | str | Sequence[int]) -> None:
        self.edits.attributes[name] = value

    def remove_attribute(self, name: str) -> None:
        if name in self.op.attributes:
            self.edits.dropped.add(name)

    def set_input(self, slot: int, array: Array) -> None:
        self.edits.constants[slot] = array

    def scale_input(self, slot: int, new: Sequence[int], old: Sequence[int]) -> None:
        if list(new) != list(old):
            self.edits.scaled[slot] = (list(new), list(old))

    def gather_input(self, slot: int, axis: int, index: npt.NDArray[np.int64]) -> None:
        self.edits.gathered.setdefault(slot, []).append((axis, index))

    def restore_output(self, slot: int, new: Sequence[int], old: Sequence[int]) -> None:
        if list(new) == list(old):
            return
        tensor = self.op.outputs[slot] if slot < len(self.op.outputs) else None
        if tensor is not None:
            self.edits.restored[slot] = (list(new), list(old), None if tensor.dynamic else tensor.data)


def spread_mask(mask: Mask, flow: SignatureFlow, view: View) -> Mask:
    """A mask with one dimension a factor of a view; along axes of which nothing is said, any kept element counts."""
    shape: list[int] = []
    for index, axis in enumerate(view.axes):
        if axis.take is not None and mask.shape[index] > 1:
            mask = mask[(slice(None),) * index + (slice(*axis.take),)]
        if axis.factors is None:
            mask = np.asarray(mask.any(axis=index, keepdims=True))
            continue
        sizes = [flow.signature.sizes[name] for name in axis.factors]
        shape += sizes if mask.shape[index] > 1 else [1] * len(sizes)
    return mask.reshape(shape)


def collect(analysis: Analysis, masks: Masks) -> dict[tuple[tuple[ir.Node, ...], ir.Node], Edits]:
    """What each node needs, by (calls around it, node).

    Raises:
        PlanError: The plan cannot be carried out.
    """
    edits: dict[tuple[tuple[ir.Node, ...], ir.Node], Edits] = {}
    changed = set(masks.changed())
    touched = {op.index: op for tensor in changed for op, _ in operands_of(tensor)}
    for index in sorted(touched):
        op = touched[index]
        rule = find_rule(op)
        if rule is None or op.node is None or analysis.is_leaf(op):
            continue
        change = OpChange(op, analysis, masks)
        change.check()
        for attribute, factors in rule.attributes.items():
            sizes = [change.factor_sizes(factor) for factor in factors]
            if any(old != new for old, new in sizes) and (
                attribute in op.attributes or attribute in rule.defaults
            ):
                change.set_attribute(attribute, int(np.prod([new for _, new in sizes])))
        if rule.rewrite is not None:
            rule.rewrite(change)
        if change.edits:
            edits[(op.path, op.node)] = change.edits
    return edits


def functions_to_inline(
    analysis: Analysis, masks: Masks, edits: Iterable[tuple[tuple[ir.Node, ...], ir.Node]]
) -> set[tuple[str, str, str]]:
    """Model-local functions whose bodies would change: each call needs a body of its own."""
    calls = {call for path, _ in edits for call in path}
    for tensor in masks.changed():
        value = tensor.value
        inside = tensor.constant and value is not None and value.producer() is not None
        if inside and any(op.path for op, _ in operands_of(tensor)):
            producer = value.producer() if value is not None else None
            for op, _ in operands_of(tensor):
                if (
                    producer is not None
                    and op.path
                    and producer.graph is (op.node.graph if op.node else None)
                ):
                    calls.update(op.path)
    return {call.op_identifier() for call in calls}


class Rewriter:
    """Makes the edits in place."""

    def __init__(self, analysis: Analysis, masks: Masks) -> None:
        self._analysis = analysis
        self._masks = masks
        self._model = analysis.graph.model
        self._splice = Splicer(self._model)
        self._loose: list[ir.Value] = []

    def run(self, edits: dict[tuple[tuple[ir.Node, ...], ir.Node], Edits]) -> None:
        """Apply all edits, compact all constants, correct stored shapes, remove what nothing reads any more."""
        self._correct_shapes()
        constants = ConstantChanges(self._analysis, self._splice, self._compaction, "pruned")
        constants.run()
        self._loose += constants.loose
        for (_, node), edit in edits.items():
            self._edit(node, edit)
        self._splice.remove_unread(self._loose)

    def _compaction(self, tensor: Tensor) -> _Compaction | None:
        parts = self._masks.parts(tensor)
        return _Compaction(parts, self._masks.shape(tensor)) if parts else None

    # -- nodes --------------------------------------------------------------------------------------------------

    def _edit(self, node: ir.Node, edit: Edits) -> None:
        for name, attribute in edit.attributes.items():
            node.attributes[name] = ir.convenience.convert_attribute(name, attribute)
        for name in edit.dropped:
            node.attributes.pop(name, None)
        for slot, array in edit.constants.items():
            self._set_input(node, slot, self._splice.constant(node, f"{base_name(node)}_{slot}", array))
        for slot, (new, old) in edit.scaled.items():
            self._set_input(node, slot, self._scaled(node, node.inputs[slot], new, old))
        for slot, takes in edit.gathered.items():
            for axis, index in takes:
                source = node.inputs[slot]
                taken = self._splice.constant(node, f"{base_name(node)}_index", index)
                gathered = self._splice.insert(node, "Gather", [source, taken], {"axis": axis}, like=source)
                self._set_input(node, slot, gathered)
        for slot, (new, old, contents) in edit.restored.items():
            self._restore(node, node.outputs[slot], new, old, contents)

    def _set_input(self, node: ir.Node, slot: int, value: ir.Value) -> None:
        if slot >= len(node.inputs):
            node.resize_inputs(slot + 1)
        old = node.inputs[slot]
        node.replace_input_with(slot, value)
        if old is not None:
            self._loose.append(old)

    def _scaled(
        self, node: ir.Node, value: ir.Value | None, new: Sequence[int], old: Sequence[int]
    ) -> ir.Value:
        """Entries times new / old; -1, 0 and 1 have meanings of their own (infer, copy, broadcast)."""
        base = f"{base_name(node)}_scale"
        times = self._splice.integers(node, base, new)
        parts = self._splice.integers(node, base, old)
        one = self._splice.integers(node, base, 1)
        multiplied = self._splice.insert(node, "Mul", [value, times], like=value)
        divided = self._splice.insert(node, "Div", [multiplied, parts], like=value)
        positive = self._splice.insert(node, "Greater", [value, one])
        positive.type = ir.TensorType(ir.DataType.BOOL)
        return self._splice.insert(node, "Where", [positive, divided, value], like=value)

    def _restore(
        self, node: ir.Node, value: ir.Value, new: Sequence[int], old: Sequence[int], contents: Array | None
    ) -> None:
        """Readers of a size get the original one: a constant where it is known, else computed from the new one."""
        readers = list(value.uses())
        is_output = value.is_graph_output()
        if contents is not None and not is_output:
            if readers:
                constant = self._splice.constant(
                    node, f"{value.name}_original", np.asarray(contents, dtype=np.int64)
                )
                for reader, index in readers:
                    reader.replace_input_with(index, constant)
            self._loose.append(value)
            return
        base = f"{base_name(node)}_original"
        scalar = node.op_type == "Size"
        times = self._splice.integers(node, base, old[0] if scalar else old)
        parts = self._splice.integers(node, base, new[0] if scalar else new)
        divided = self._splice.insert(node, "Div", [None, parts], like=value, after=True)
        multiplied = self._splice.insert(node, "Mul", [value, times], like=value, after=True)
        producer = divided.producer()
        assert producer is not None
        producer.replace_input_with(0, multiplied)
        for reader, index in readers:
            reader.replace_input_with(index, divided)
        if is_output:
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            for position, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[position] = divided
            name, value.name = value.name, self._splice.fresh(f"{value.name}_new")
            divided.name = name
            divided.shape = value.shape

    # -- tidying ------------------------------------------------------------------------------------------------

    def _correct_shapes(self) -> None:
        """Stored shapes follow; dimensions that did not change keep their names."""
        for tensor in self._masks.changed():
            value = tensor.value
            if value is None or value.shape is None or value.type is None or tensor.shape is None:
                continue
            new = self._masks.shape(tensor)
            dims: list[Any] = list(value.shape.dims)
            if len(dims) != len(new):
                value.shape = None
                continue
            for axis, (before, after) in enumerate(zip(tensor.shape, new, strict=True)):
                if before != after:
                    dims[axis] = after if isinstance(dims[axis], int) else None
            value.shape = ir.Shape(dims)
        self._forget_untaken()

    def _forget_untaken(self) -> None:
        """Drop the shapes stored in branches that are never taken: they read pruned tensors, and nobody walked them."""
        walked = {op.node for op in self._analysis.graph.ops}
        for graph in self._model.graph.subgraphs():
            nodes = list(graph)
            if nodes and not any(node in walked for node in nodes if node.op_type != "Constant"):
                for value in (*(o for node in nodes for o in node.outputs), *graph.outputs):
                    value.shape = None
