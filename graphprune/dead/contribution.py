"""What each position contributes to the ops that sum over it: nothing, a constant, or something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from graphprune.axes.analysis import Analysis
from graphprune.axes.flow import Operand, SignatureFlow
from graphprune.axes.labels import Labels, varying_axes
from graphprune.axes.signature import View
from graphprune.dead.intervals import Intervals
from graphprune.dead.intervals.contraction import PRODUCTS, Product, pads, spread, view_of
from graphprune.dead.unread import Unread
from graphprune.graph import Op, Tensor
from graphprune.rules.registry import Refusal

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

#: Ops in which two operands are multiplied along a factor, though their result is not the sum of that.
MULTIPLIED: dict[str, Product] = {
    **PRODUCTS,
    "Attention": Product(0, 1),
    "LSTM": Product(0, 1),
    "GRU": Product(0, 1),
    "RNN": Product(0, 1),
}
#: Quantised products: what is zero is the weight's zero point.
ZERO_POINTS: dict[str, tuple[Product, int]] = {
    "QLinearConv": (Product(0, 3), 5),
    "QLinearMatMul": (Product(0, 3), 5),
    "ConvInteger": (Product(0, 1), 3),
    "MatMulInteger": (Product(0, 1), 3),
}


#: These read how large an operand is, not what is in it.
READ_NO_ELEMENT = frozenset(["Shape", "Size"])


class Step(Protocol):
    """One op that sums over something."""

    op: Op

    def concerns(self, dead: Bools) -> bool:
        """True if it sums over a label that is still dead."""

    def needed(self, dead: Bools) -> tuple[Labels, Mapping[int, str]]:
        """Labels that must live because of this op, and for some of them a reason to tell.

        Args:
            dead: bool [number of atoms]; what is dead so far.
        """

    def add_strength(self, strength: Floats) -> None:
        """Raise each label's entry to the magnitude of the constant that it could carry for others."""


@dataclass(eq=False)
class Reading:
    """An operand over which an op sums, of whose partner nothing is known: it is dead where it is zero.

    Attributes:
        op: The op.
        labels: A labelling of the operand that shrinks an axis that is summed over.
        passing: Its other labellings: what goes with their labels goes with the op's results.
        zero: Which elements are zero; broadcasts against the operand.
    """

    op: Op
    labels: Labels
    passing: list[Labels]
    zero: Bools

    @staticmethod
    def of(
        op: Op, analysis: Analysis, intervals: Intervals, unread: Unread, candidates: Bools
    ) -> Iterator[Step]:
        """The readings of one op: one for a product, else one for each operand that is summed over."""
        flows = analysis.flows[op.index]
        if isinstance(flows, Refusal) or op.kind in READ_NO_ELEMENT or unread.all_of(op):
            return
        for flow in flows:
            if not isinstance(flow, SignatureFlow):
                continue
            found = _summed_operands(op, flow, analysis, candidates)
            if not found:
                continue
            product = Contraction.of(op, flow, analysis, intervals, unread) if len(flows) == 1 else None
            slots = () if product is None else (product.kind.left, product.kind.right)
            if product is not None and any(slot in slots for slot, _, _ in found):
                yield product
            for slot, labels, passing in found:
                tensor = op.inputs[slot]
                if slot not in slots and tensor is not None:
                    yield Reading(op, labels, passing, zeros(tensor, op, intervals))

    def concerns(self, dead: Bools) -> bool:
        return bool(dead[self.labels].any())

    def needed(self, dead: Bools) -> tuple[Labels, Mapping[int, str]]:
        inert = self.zero
        for labels in self.passing:
            inert = inert | dead[labels]
        return labels_where(self.labels, ~inert), {}

    def add_strength(self, strength: Floats) -> None:
        """It carries nothing."""


def labels_where(labels: Labels, chosen: Bools) -> Labels:
    """Labels that stand where an array holds that broadcasts with them; no label is none of them."""
    shape = np.broadcast_shapes(labels.shape, chosen.shape)
    # Only axes on which the labels depend matter: any element along the others will do.
    loose = tuple(i for i, size in enumerate(shape) if labels.shape[i] == 1 < chosen.shape[i])
    if loose:
        chosen = np.asarray(chosen.any(axis=loose, keepdims=True))
    whole = np.broadcast_to(labels, np.broadcast_shapes(labels.shape, chosen.shape))
    found = np.unique(whole[np.broadcast_to(chosen, whole.shape)])
    return np.asarray(found[found > 0], dtype=np.int32)


def zeros(tensor: Tensor, op: Op, intervals: Intervals) -> Bools:
    """Which elements of an operand are zero for all inputs; broadcasts against it."""
    none = np.zeros((1,) * len(tensor.shape or ()), dtype=bool)
    if op.op_type in ZERO_POINTS or tensor.dtype is None or not tensor.dtype.is_floating_point():
        return none
    if not all(intervals.finite(t) for t in op.inputs if t is not None):
        return none
    if tensor.constant:
        return _shrunk(np.asarray(intervals.contents(tensor) == 0))
    return intervals.of(tensor).zero


def _shrunk(mask: Bools) -> Bools:
    """A mask that is the same everywhere, as one element."""
    if not mask.any() or mask.all():
        return mask[(slice(0, 1),) * mask.ndim].copy()
    return mask


def _own(
    flow: SignatureFlow, view: View, labels: Labels, analysis: Analysis, op: Op
) -> tuple[str, Labels] | None:
    """The factor that a labelling shrinks, and the labelling with one axis a factor."""
    by_factor = flow.to_factors(analysis.atoms, view, labels, op.name)
    if by_factor is None or not (varying := varying_axes(by_factor)):
        return None
    return view.factors[varying[-1]], by_factor


def _summed_operands(
    op: Op, flow: SignatureFlow, analysis: Analysis, candidates: Bools
) -> list[tuple[int, Labels, list[Labels]]]:
    """(slot, labelling, the operand's labellings that are not summed over) of what an op sums over."""
    found = []
    for slot, tensor in enumerate(op.inputs):
        if tensor is None:
            continue
        summed: list[Labels] = []
        passing: list[Labels] = []
        for labels in analysis.labellings(tensor):
            over = False
            for view in flow.signature.views:
                if not view.is_output and view.slot == slot:
                    own = _own(flow, view, labels, analysis, op)
                    over = over or (own is not None and own[0] in view.summed)
            (summed if over else passing).append(labels)
        found += [(slot, labels, passing) for labels in summed if candidates[labels].any()]
    return found


class Contraction:
    """An op that multiplies two operands and sums over the factors that they share.

    Arrays have one axis a factor, in the order of ``factors``; an axis is of size 1 where nothing depends on it.

    Attributes:
        op: The op.
        kind: Which operands are multiplied.
        flow: Its signature.
        views: The views of the two operands and of the result.
        factors: All factors of these.
        padded: A window may reach over a border, where it sees zeros.
    """

    def __init__(
        self,
        op: Op,
        kind: Product,
        flow: SignatureFlow,
        views: tuple[View, View, View],
        analysis: Analysis,
        intervals: Intervals,
        unread: Unread,
    ) -> None:
        self.op, self.kind, self.flow, self.views = op, kind, flow, views
        self.factors = tuple(dict.fromkeys(f for view in views for f in view.factors))
        self.padded = kind.spatial and pads(op.attributes, op.op_type)
        self._intervals = intervals
        self.tensors = [op.inputs[kind.left], op.inputs[kind.right]]
        self._labels: list[list[Labels]] = []
        for view, tensor in zip(views[:2], self.tensors, strict=True):
            self._labels.append(list(self._placed_labels(view, tensor, analysis, summed=True)))
        output = op.outputs[0]
        self._gone_labels = list(self._placed_labels(views[2], output, analysis, summed=False))
        self._unread = self._unread_results(unread)
        self._zero = [self._zeros(i) for i in range(2)]
        self._held: Floats | None = None
        #: Which operand is a constant, or holds constants where the other does; None if neither.
        self.weight = next((i for i in (1, 0) if (t := self.tensors[i]) is not None and t.constant), None)
        self.constants, self._why = self._constant_values()

    @staticmethod
    def of(
        op: Op, flow: SignatureFlow, analysis: Analysis, intervals: Intervals, unread: Unread
    ) -> Contraction | None:
        """The contraction that an op is; None if it is none."""
        kind = MULTIPLIED.get(op.kind) or ZERO_POINTS.get(op.kind, (None, 0))[0]
        if kind is None or (op.op_type == "Einsum" and len(op.inputs) != 2):
            return None
        views = [view_of(flow, o) for o in (Operand(False, kind.left), Operand(False, kind.right))]
        output = view_of(flow, Operand(True, 0))
        if views[0] is None or views[1] is None or output is None:
            return None
        if any(axis.factors is None for view in (*views, output) if view is not None for axis in view.axes):
            return None
        return Contraction(op, kind, flow, (views[0], views[1], output), analysis, intervals, unread)

    def slot_of(self, side: int) -> int:
        """The input slot of the first or the second operand."""
        return self.kind.right if side else self.kind.left

    # -- arrays over factors -----------------------------------------------------------------------------------------

    def _place(self, array: npt.NDArray[Any], view: View) -> npt.NDArray[Any]:
        """From one axis a factor of a view to one axis a factor of the op."""
        order = [view.factors.index(f) for f in self.factors if f in view.factors]
        shape = [array.shape[view.factors.index(f)] if f in view.factors else 1 for f in self.factors]
        return array.transpose(order).reshape(shape)

    def _axes(self, view: View) -> tuple[int, ...]:
        """The axes of factors that a view lacks."""
        return tuple(i for i, f in enumerate(self.factors) if f not in view.factors)

    def _placed_labels(
        self, view: View, tensor: Tensor | None, analysis: Analysis, *, summed: bool
    ) -> Iterator[Labels]:
        for labels in analysis.labellings(tensor) if tensor is not None else ():
            own = _own(self.flow, view, labels, analysis, self.op)
            if own is not None and (own[0] in view.summed) == summed:
                yield self._place(own[1], view)

    def _unread_results(self, unread: Unread) -> Bools:
        """Results that nothing depends on."""
        output = self.op.outputs[0]
        mask = None if output is None else self.flow.spread(self.views[2], unread.of(output))
        if mask is None or any(self.op.outputs[1:]):
            return np.zeros((1,) * len(self.factors), dtype=bool)
        return self._place(mask, self.views[2])

    def _zeros(self, side: int) -> Bools:
        tensor, view = self.tensors[side], self.views[side]
        assert tensor is not None
        if self.op.kind in ZERO_POINTS:
            mask = self._at_zero_point(side)
        else:
            mask = zeros(tensor, self.op, self._intervals)
        placed = self.flow.spread(view, mask)
        if placed is None:
            return np.zeros((1,) * len(self.factors), dtype=bool)
        placed = self._place(placed, view)
        # What neither the other operand nor the result has (a kernel's positions) need not be kept apart.
        alone = [f for f in view.factors if f not in self.views[1 - side].factors + self.views[2].factors]
        loose = tuple(self.factors.index(f) for f in alone)
        return np.asarray(placed.all(axis=loose, keepdims=True)) if loose else placed

    def _at_zero_point(self, side: int) -> Bools:
        """Weights that are their zero point."""
        tensor = self.tensors[side]
        assert tensor is not None
        none = np.zeros((1,) * len(tensor.shape or ()), dtype=bool)
        slot = ZERO_POINTS[self.op.kind][1]
        zero = self.op.inputs[slot] if slot < len(self.op.inputs) else None
        if side == 0 or not tensor.constant or (zero is not None and not zero.constant):
            return none
        point = np.zeros(()) if zero is None else self._intervals.contents(zero)
        if point.size > 1:
            axis = 0 if self.op.op_type in ("QLinearConv", "ConvInteger") else len(tensor.shape or ()) - 1
            point = point.reshape([-1 if i == axis else 1 for i in range(len(tensor.shape or ()))])
        return _shrunk(np.asarray(self._intervals.contents(tensor) == point.reshape(point.shape or ())))

    def _constant_values(self) -> tuple[Floats | None, dict[int, str]]:
        """What the activation is where it is a constant whose share can be moved; NaN elsewhere.

        Also why that of some labels cannot be. Where both operands are activations (the scores of attention), both must
        hold constants.
        """
        if self.op.kind not in PRODUCTS or not all(self._intervals.finite(t) for t in self.tensors if t):
            return None, {}
        if self.weight is None:
            if self.kind.spatial:
                return None, {}
            values = [self._uniform(side)[0] for side in range(2)]
            if values[0] is None or values[1] is None:
                return None, {}
            self.weight, self._held = 1, np.nan_to_num(values[1])
            return np.where(np.isnan(values[1]), np.nan, values[0]), {}
        uniform, differs = self._uniform(1 - self.weight)
        why: dict[int, str] = {}
        reason = f"its constant at {self.op.name!r} is not the same everywhere"
        for labels in self._labels[1 - self.weight]:
            why.update((label, reason) for label in labels_where(labels, differs).tolist())
        return uniform, why

    def _uniform(self, side: int) -> tuple[Floats | None, Bools]:
        """The constants of an activation, NaN where it holds none that all results see; and where that is why."""
        tensor, view = self.tensors[side], self.views[side]
        nowhere = np.zeros((1,) * len(self.factors), dtype=bool)
        if tensor is None or tensor.constant:
            return None, nowhere
        part = spread(self.flow, view, self._intervals.of(tensor))
        if part is None or not part.fixed.any():
            return None, nowhere
        value = self._place(part.value, view)
        own = tuple(self.factors.index(f) for f in view.factors if f not in self.views[1 - side].factors)
        low, high = value.min(axis=own, keepdims=True), value.max(axis=own, keepdims=True)
        return np.where(low == high, low, np.nan), np.asarray(~np.isnan(low) & (low != high))

    # -- what is needed ----------------------------------------------------------------------------------------------

    def concerns(self, dead: Bools) -> bool:
        return any(dead[labels].any() for side in self._labels for labels in side)

    def _gone(self, dead: Bools) -> Bools:
        """Which results go, or are never read."""
        gone = self._unread
        for labels in self._gone_labels:
            gone = gone | dead[labels]
        return gone

    def _void(self, side: int, dead: Bools) -> Bools:
        """Positions of one operand at which all that it is multiplied with is zero, or goes into results that go."""
        void = self._zero[1 - side] | self._gone(dead)
        return np.asarray(void.all(axis=self._axes(self.views[side]), keepdims=True))

    def _movable(self) -> Bools:
        """Positions whose share is a constant that can be moved."""
        if self.constants is None:
            return np.zeros((1,) * len(self.factors), dtype=bool)
        return np.asarray(np.isfinite(self.constants))

    def needed(self, dead: Bools) -> tuple[Labels, Mapping[int, str]]:
        found = []
        movable = self._movable()
        for side in range(2):
            inert = self._zero[side] | self._void(side, dead) | movable
            found += [labels_where(labels, ~inert) for labels in self._labels[side]]
        live = np.unique(np.concatenate([np.zeros(0, dtype=np.int32), *found]))
        return live, {label: self._why[label] for label in live.tolist() if label in self._why}

    def add_strength(self, strength: Floats) -> None:
        if self.constants is None or not self.padded or self.weight is None:
            return
        size = np.nan_to_num(np.abs(self.constants))
        for labels in self._labels[1 - self.weight]:
            labels, sizes = np.broadcast_arrays(labels, size)
            np.maximum.at(strength, labels.ravel(), sizes.ravel())
        strength[0] = 0

    # -- constants to move -------------------------------------------------------------------------------------------

    def lost(self, dead: Bools) -> Floats | None:
        """The constants whose share must be moved, zero elsewhere; None if there are none."""
        if self.constants is None or self.weight is None:
            return None
        side = 1 - self.weight
        removed = np.zeros((1,) * len(self.factors), dtype=bool)
        for labels in (*self._labels[side], *self._labels[self.weight]):
            removed = removed | dead[labels]
        removed = removed & ~self._void(side, dead)
        # Labels lie on factors that the operands share; what else they depend on is the same for all.
        alone = tuple(i for i, f in enumerate(self.factors) if f not in self.views[self.weight].factors)
        removed = np.asarray(removed.any(axis=alone, keepdims=True))
        lost = np.where(removed, np.nan_to_num(self.constants), 0.0)
        return lost if lost.any() else None

    def lanes(self) -> tuple[int, ...]:
        """The axes along which one position can stand in for another: those that are summed over."""
        return tuple(
            i
            for i, f in enumerate(self.factors)
            if f in self.views[0].factors and f in self.views[1].factors and f not in self.views[2].factors
        )

    def _can_carry(self, dead: Bools) -> Floats:
        """The constants of positions that stay."""
        assert self.constants is not None
        assert self.weight is not None
        removed = np.zeros((1,) * len(self.factors), dtype=bool)
        for side in self._labels:
            for labels in side:
                removed = removed | dead[labels]
        size = np.nan_to_num(np.abs(self.constants))
        return np.where(removed, 0.0, size)

    def wanted_carriers(self, dead: Bools) -> list[int]:
        """Labels that must stay because they alone can carry the constants that would be lost at a border."""
        lost = self.lost(dead) if self.padded else None
        if lost is None or self.weight is None:
            return []
        lanes = self.lanes()
        missing = lost.any(axis=lanes, keepdims=True) & ~self._can_carry(dead).any(axis=lanes, keepdims=True)
        strongest = np.abs(lost) == np.abs(lost).max(axis=lanes, keepdims=True)
        chosen: dict[int, None] = {}
        for labels in (*self._labels[1 - self.weight], *self._labels[self.weight]):
            wide, wanted = np.broadcast_arrays(labels, missing & strongest)
            taken: set[tuple[int, ...]] = set()
            for index in zip(*np.nonzero(wanted & dead[wide]), strict=True):
                lane = tuple(int(i) for axis, i in enumerate(index) if axis not in lanes)
                if lane not in taken:
                    taken.add(lane)
                    chosen[int(wide[index])] = None
        return list(chosen)

    def carriers(self, dead: Bools) -> tuple[Floats, Bools]:
        """For each lane the constant of its carrier, zero where there is none; and where the carriers lie."""
        size = self._can_carry(dead)
        lanes = self.lanes()
        flat = np.moveaxis(size, lanes, range(-len(lanes), 0))
        lead = flat.shape[: -len(lanes)]
        first = np.argmax(flat.reshape(*lead, -1), axis=-1)
        chosen = np.zeros((*lead, int(np.prod(flat.shape[-len(lanes) :]))), dtype=bool)
        np.put_along_axis(chosen, first[..., None], True, axis=-1)
        here = np.moveaxis(chosen.reshape(flat.shape), range(-len(lanes), 0), lanes) & (size > 0)
        assert self.constants is not None
        constant = np.where(here, np.nan_to_num(self.constants), 0.0).sum(axis=lanes, keepdims=True)
        return constant, np.asarray(here)

    def weights(self) -> Floats:
        """The constant operand, with one axis a factor."""
        assert self.weight is not None
        if self._held is not None:
            return self._held
        tensor, view = self.tensors[self.weight], self.views[self.weight]
        assert tensor is not None
        placed = self.flow.spread(view, np.asarray(self._intervals.contents(tensor), dtype=np.float64))
        assert placed is not None
        return np.asarray(self._place(placed, view), dtype=np.float64)
