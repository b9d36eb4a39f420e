"""Propagation: seed labels at weights and push them through all ops until nothing new is learnt."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.axes.flow import (
    ChainFlow,
    Flow,
    Operand,
    ReshapeFlow,
    SignatureFlow,
    TakeFlow,
    reshape_blocks,
)
from graphprune.axes.labels import MAX_ELEMENTS, Atoms, Colouring, Labels, distinct, varying_axes
from graphprune.axes.signature import Role, Signature, View
from graphprune.graph import Graph, Op, Tensor
from graphprune.rules.registry import Refusal, find_rule, flows_of, tensor_at

#: Takes an array that broadcasts against a tensor to the part that an op sees; None where it sees nothing of it.
Partial: TypeAlias = Callable[[npt.NDArray[Any]], "npt.NDArray[Any] | None"]

#: Labellings that one tensor may bear. Five is the most that was seen on 230 exported networks.
MAX_LABELLINGS = 12


class Origin(NamedTuple):
    """The flow that brought a labelling to an operand of an op: it learns nothing when it is told in return."""

    op: Op
    operand: Operand
    flow: Flow

    def is_at(self, op: Op, operand: Operand, flow: Flow) -> bool:
        return self.op is op and self.flow is flow and self.operand == operand


class Analysis:
    """Which elements of which tensors can only go together, and which cannot go at all.

    Attributes:
        graph: The twin.
        atoms: The union-find over labels.
        colourings: Labellings by tensor; tensors that bear none are absent.
        flows: Flows, or the refusal, by op index.
    """

    def __init__(self, graph: Graph, *, open_boundary: bool = False) -> None:
        """Analyse a twin.

        Args:
            graph: The twin.
            open_boundary: Label the axes of the graph's inputs as well, and let labels reach its outputs: for
                testing rules on single ops. The plan then also says which positions of inputs and outputs go.
        """
        self.graph = graph
        self.atoms = Atoms()
        self.colourings: dict[Tensor, Colouring] = {}
        self._open = open_boundary
        self._waiting: set[Tensor] = set()
        self._queue: list[tuple[int, int, Tensor]] = []
        self._ticket = 0
        self._where = [f"{op.kind} {op.name!r}" for op in graph.ops]
        self.flows: list[list[Flow] | Refusal] = [self._flows_of(op) for op in graph.ops]
        self._flow_at: list[dict[Operand, list[Flow]]] = [self._index(flows) for flows in self.flows]
        self._seed_weights()
        self._run()
        self._seed_uncovered()
        self._run()
        self._seed_prefixes()
        self._run()
        self._label_unread_rows()
        self._run()
        self._sweep()

    @staticmethod
    def _flows_of(op: Op) -> list[Flow] | Refusal:
        """Flows of an op. What is computed from constants alone is a leaf, unless elements are only moved."""
        flows = flows_of(op)
        if op.inputs and all(t is None or t.constant for t in op.inputs):
            rule = find_rule(op)
            if rule is None or not rule.layout or isinstance(flows, Refusal):
                return []
        return flows

    @staticmethod
    def _index(flows: list[Flow] | Refusal) -> dict[Operand, list[Flow]]:
        at: dict[Operand, list[Flow]] = {}
        if not isinstance(flows, Refusal):
            for flow in flows:
                for operand in dict.fromkeys(flow.operands()):
                    at.setdefault(operand, []).append(flow)
        return at

    def is_leaf(self, op: Op) -> bool:
        """True if the op's outputs are computed from constants and pruned as constants."""
        return (
            not self.flows[op.index] and bool(op.inputs) and all(t is None or t.constant for t in op.inputs)
        )

    # -- adding labels ------------------------------------------------------------------------------------------

    def _add(self, tensor: Tensor, labels: Labels, origin: Origin | None = None) -> None:
        if tensor.shape is None:
            self.atoms.freeze(labels, f"the shape of {tensor.name!r} is not known")
            return
        colouring = self.colourings.get(tensor)
        if colouring is None:
            colouring = self.colourings[tensor] = Colouring(tensor.shape)
        if not colouring.add(self.atoms, labels, MAX_LABELLINGS, origin):
            return
        self._freeze_at_border(tensor, colouring.labellings)
        self._wait(tensor)

    def _wait(self, tensor: Tensor) -> None:
        if tensor not in self._waiting:
            self._waiting.add(tensor)
            rank = tensor.producer.index if tensor.producer is not None else -1
            self._ticket += 1
            heapq.heappush(self._queue, (rank, self._ticket, tensor))

    def _freeze_at_border(self, tensor: Tensor, labellings: list[Labels]) -> None:
        reason = None
        if tensor.is_output and not self._open:
            reason = f"it is visible in the model's output {tensor.name!r}"
        elif tensor.is_input and not self._open:
            reason = f"it is part of the model's input {tensor.name!r}"
        elif tensor.producer is None and not tensor.constant and not tensor.is_input:
            reason = f"nothing in the graph makes {tensor.name!r}"
        if reason is not None:
            for labels in labellings:
                self.atoms.freeze(labels, reason)

    def _run(self) -> None:
        while self._queue:
            _, _, tensor = heapq.heappop(self._queue)
            self._waiting.discard(tensor)
            self._push(tensor, self.colourings[tensor])

    def _push(self, tensor: Tensor, colouring: Colouring) -> None:
        """Carry on what the ops around a tensor do not know yet."""
        for entry in list(colouring.entries):
            colouring.refresh(self.atoms)
            if entry.carried:
                continue
            entry.carried = True
            if self.atoms.all_frozen(entry.labels):
                continue
            for op, operand in operands_of(tensor):
                self._push_through(op, operand, entry.labels, entry.origin)
        colouring.refresh(self.atoms)
        if not all(entry.carried for entry in colouring.entries):
            self._wait(tensor)

    def _push_through(self, op: Op, operand: Operand, labels: Labels, origin: object) -> None:
        """Carry a labelling of one operand of an op to the op's other operands."""
        flows = self.flows[op.index]
        if not flows and self.is_leaf(op):
            return
        where = self._where[op.index]
        if isinstance(flows, Refusal):
            self.atoms.freeze(labels, f"{where}: {flows.reason}")
            return
        at = self._flow_at[op.index].get(operand, ())
        if not at:
            self.atoms.freeze(labels, f"{where}: nothing may be removed from its {_spell(operand)}")
        for flow in at:
            if isinstance(origin, Origin) and origin.is_at(op, operand, flow):
                continue
            reversible = flow.reversible(labels)
            for target, carried in flow.push(self.atoms, operand, labels, where):
                other = tensor_at(op, target)
                if other is not None:
                    self._add(other, carried, Origin(op, target, flow) if reversible else None)

    # -- seeds --------------------------------------------------------------------------------------------------

    def _signatures(self) -> Iterator[tuple[Op, Signature]]:
        for op, flows in zip(self.graph.ops, self.flows, strict=True):
            if not isinstance(flows, Refusal):
                for flow in flows:
                    if isinstance(flow, SignatureFlow):
                        yield op, flow.signature

    def _seed(self, op: Op, signature: Signature, view: View, factors: list[str]) -> None:
        """Give every position of the product of ``factors`` a label of its own, in one operand."""
        size = prod(signature.sizes[name] for name in factors)
        tensor = tensor_at(op, Operand(view.is_output, view.slot))
        if tensor is None or not 1 < size <= MAX_ELEMENTS:
            return
        shape = [signature.sizes[name] if name in factors else 1 for name in view.factors]
        labels = self.atoms.new(size).reshape(shape)
        built = SignatureFlow(signature).from_factors(labels, view.factors, view)
        if built is not None:
            self._add(tensor, built)

    def _seed_weights(self) -> None:
        """The output factors of all contraction weights, all at once: one after another would be quadratic."""
        if self._open:
            self._seed_inputs()
        for op, signature in self._signatures():
            for view, tensor in weight_views(op, signature):
                made = [
                    name
                    for name in view.factors
                    if signature.role(name) is Role.PASS
                    and name not in view.summed
                    and tensor.shape is not None
                ]
                if made:
                    self._seed(op, signature, view, made)

    def _seed_inputs(self) -> None:
        for tensor in self.graph.inputs:
            for axis, size in enumerate(tensor.shape or ()):
                if 1 < size <= MAX_ELEMENTS:
                    shape = [size if i == axis else 1 for i in range(len(tensor.shape or ()))]
                    self._add(tensor, self.atoms.new(size).reshape(shape))

    def _seed_uncovered(self) -> None:
        """Contracted positions of weights that no label has reached: what feeds them is made of constants."""
        for op, signature in self._signatures():
            for view, tensor in weight_views(op, signature):
                for name in view.factors:
                    if signature.role(name) is Role.CONTRACTED and signature.sizes[name] > 1:
                        self._seed_gaps(op, signature, view, tensor, name)

    def _seed_gaps(self, op: Op, signature: Signature, view: View, tensor: Tensor, name: str) -> None:
        flow = SignatureFlow(signature)
        index = view.factors.index(name)
        covered = np.zeros(signature.sizes[name], dtype=bool)
        colouring = self.colourings.get(tensor)
        for labels in colouring.labellings if colouring is not None else ():
            spread = flow.to_factors(self.atoms, view, self.atoms.find(labels), op.name)
            if spread is not None and index in varying_axes(spread):
                others = tuple(i for i in range(spread.ndim) if i != index)
                covered |= (spread > 0).all(axis=others)
        gaps = np.flatnonzero(~covered)
        if len(gaps) > 1:
            labels = np.zeros(len(covered), dtype=np.int32)
            labels[gaps] = self.atoms.new(len(gaps))
            shape = [len(covered) if i == index else 1 for i in range(len(view.factors))]
            built = flow.from_factors(labels.reshape(shape), view.factors, view)
            if built is not None:
                self._add(tensor, built)

    def _seed_prefixes(self) -> None:
        """Where a labelled axis is a product, its leading factors may go as a whole: heads, groups, maxout units."""
        for op, flows in zip(self.graph.ops, self.flows, strict=True):
            if isinstance(flows, Refusal):
                continue
            for flow in flows:
                if isinstance(flow, ReshapeFlow):
                    self._seed_reshape_prefixes(op, flow)
                elif isinstance(flow, SignatureFlow):
                    self._seed_view_prefixes(op, flow.signature)

    def _seed_view_prefixes(self, op: Op, signature: Signature) -> None:
        done: set[tuple[str, ...]] = set()
        for view in signature.views:
            for index, axis in enumerate(view.axes):
                factors = [n for n in axis.factors or () if signature.sizes[n] > 1]
                for stop in range(1, len(factors)):
                    prefix = tuple(factors[:stop])
                    blocked = any(signature.role(n) in (Role.BLOCKED, Role.SEPARATE) for n in prefix)
                    if prefix in done or blocked or not self._varies(op, view, index):
                        continue
                    done.add(prefix)
                    self._seed(op, signature, view, list(prefix))

    def _varies(self, op: Op, view: View, axis: int) -> bool:
        tensor = tensor_at(op, Operand(view.is_output, view.slot))
        colouring = self.colourings.get(tensor) if tensor is not None else None
        return colouring is not None and any(labels.shape[axis] > 1 for labels in colouring.labellings)

    def _seed_reshape_prefixes(self, op: Op, flow: ReshapeFlow) -> None:
        for split, whole, split_shape, whole_shape in (
            (flow.target, flow.source, flow.target_shape, flow.source_shape),
            (flow.source, flow.target, flow.source_shape, flow.target_shape),
        ):
            tensor, other = tensor_at(op, split), tensor_at(op, whole)
            colouring = self.colourings.get(other) if other is not None else None
            if colouring is None or tensor is None:
                continue
            for whole_axes, split_axes in reshape_blocks(whole_shape, split_shape):
                parts = [a for a in split_axes if split_shape[a] > 1]
                if len(parts) < 2 or not any(
                    labels.shape[a] > 1 for labels in colouring.labellings for a in whole_axes
                ):
                    continue
                for stop in range(1, len(parts)):
                    shape = [s if a in parts[:stop] else 1 for a, s in enumerate(split_shape)]
                    if prod(shape) <= MAX_ELEMENTS:
                        self._add(tensor, self.atoms.new(prod(shape)).reshape(shape))

    def _label_unread_rows(self) -> None:
        """Rows of a table that nothing reads are cut as the rows that are read.

        A table of positions longer than the sequence, zeros for all layers of which one reads its slice: columns go
        as a whole, or what is left would be no box.
        """
        for tensor, colouring in list(self.colourings.items()):
            if not (_is_fill(tensor.producer) if tensor.producer is not None else tensor.constant):
                continue
            for labels in list(colouring.labellings):
                whole = labels = self.atoms.find(labels)
                varying = varying_axes(labels)
                for axis in range(labels.ndim):
                    if axis not in varying:
                        whole = whole.max(axis=axis, keepdims=True)
                if whole.shape != labels.shape:
                    self._add(tensor, whole)

    def _sweep(self) -> None:
        """Push everything once more until no union is made: a late union can move a labelling's own axis."""
        while True:
            events = self.atoms.events
            for tensor, colouring in list(self.colourings.items()):
                colouring.tidy(self.atoms)
                self._freeze_at_border(tensor, colouring.labellings)
                self._push(tensor, colouring)
            self._run()
            if self.atoms.events == events:
                return

    # -- reading ------------------------------------------------------------------------------------------------

    def labellings(self, tensor: Tensor) -> list[Labels]:
        """The labellings of a tensor, representatives."""
        colouring = self.colourings.get(tensor)
        if colouring is None:
            return []
        colouring.refresh(self.atoms)
        return colouring.labellings

    def partial_labellings(self) -> Iterator[tuple[Tensor, Partial, Labels]]:
        """Labellings of tensors as ops see them in parts, which must be boxes too.

        An axis that is a product of factors is one axis to a tensor and several to the op: each conv group, each head
        keeps equally many. A Slice that starts behind a ragged part needs that part to be equally long in each row.
        """
        for op, at in zip(self.graph.ops, self._flow_at, strict=True):
            for operand, flows in at.items():
                tensor = tensor_at(op, operand)
                if tensor is None or tensor not in self.colourings:
                    continue
                for part in [p for flow in flows for p in parts_of(flow, operand)]:
                    for labels in self.labellings(tensor):
                        seen = part(labels)
                        if seen is not None and len(varying_axes(seen)) > 1:
                            yield tensor, part, seen

    def labels(self) -> Labels:
        """All labels that occur, sorted."""
        return distinct(labels for tensor in self.colourings for labels in self.labellings(tensor))


def _is_fill(op: Op) -> bool:
    """True if all elements of the op's output are the same by construction."""
    source = op.inputs[0] if op.inputs else None
    if op.op_type == "Expand":
        return source is not None and source.constant and prod(source.shape or ()) == 1
    return op.op_type == "ConstantOfShape"


def parts_of(flow: Flow, operand: Operand) -> Iterator[Partial]:
    """The parts of an operand that a flow sees apart from the operand as a whole."""
    if isinstance(flow, SignatureFlow):
        for view in flow.signature.views:
            if (view.is_output, view.slot) == operand and any(
                sum(flow.signature.sizes[n] > 1 for n in axis.factors or ()) > 1 for axis in view.axes
            ):
                yield partial(flow.spread, view)
    elif isinstance(flow, TakeFlow):
        if operand == flow.source and flow.index.size and flow.index[0] > 0:
            yield partial(_leading, flow.axis, int(flow.index[0]))
    elif isinstance(flow, ChainFlow):
        for step in flow.steps:
            yield from parts_of(step, operand)


def _leading(axis: int, stop: int, array: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    return array[(slice(None),) * axis + (slice(0, stop),)] if array.shape[axis] > 1 else None


def operands_of(tensor: Tensor) -> Iterator[tuple[Op, Operand]]:
    """Every place where a tensor stands: as an output of its producer, as an input of its readers."""
    if tensor.producer is not None:
        for slot, output in enumerate(tensor.producer.outputs):
            if output is tensor:
                yield tensor.producer, Operand(True, slot)
    for op, slot in tensor.uses:
        yield op, Operand(False, slot)


def weight_views(op: Op, signature: Signature) -> Iterator[tuple[View, Tensor]]:
    """The constant operands of a contraction, view by view."""
    in_outputs = {name for view in signature.views if view.is_output for name in view.factors}
    for view in signature.views:
        tensor = tensor_at(op, Operand(view.is_output, view.slot))
        if view.is_output or tensor is None or not tensor.constant:
            continue
        if any(name not in in_outputs for name in view.factors):
            yield view, tensor


def _spell(operand: Operand) -> str:
    return f"{'output' if operand.is_output else 'input'} {operand.slot}"
