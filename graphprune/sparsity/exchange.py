"""Which positions may trade places: permutations of labels under which a network computes the same.

A permutation of labels moves, in every tensor that bears them, the element with label ``p[a]`` to where label ``a``
lies. In each row of a labelling (its own axis, for one place of its context) the k-th element that bears a label takes
the place of the k-th that bears the other. Constants are reordered so; activations then come out so, because each op
is one of three things:

- It moves elements, and labels move as they do. What is needed is that both sides pair the same elements: true of
  Reshape and of whole rows as soon as both labels lie equally often in every row on both sides; for indexing along the
  labels' own axis it is asked element by element where labels repeat.
- It treats the positions of a factor alike (elementwise ops, a factor that passes through a contraction).
- It sums or takes a statistic over them, and neither depends on their order but by rounding. The ops whose result does
  (:data:`ORDERED`) are named; labels along the axis that they run along trade with none.

Labels that must not go for another reason (an output of the model shows them, an op mixes them by number) do not trade
either: every one of those reasons is one against moving them too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.axes.analysis import Analysis, operands_of
from graphprune.axes.flow import ChainFlow, TakeFlow
from graphprune.axes.groups import distinct_rows
from graphprune.axes.labels import Labels
from graphprune.axes.members import own_axis, rows_of, spreads_of
from graphprune.errors import PlanError
from graphprune.graph import Op, Tensor
from graphprune.rules.registry import Refusal, known_data, normal_axis, shape_of, tensor_at

Array = npt.NDArray[Any]
Hashes = npt.NDArray[np.uint64]


def _running_axis(op: Op) -> int | None:
    data = known_data(op, 1)
    return None if data is None else normal_axis(int(data.ravel()[0]), len(shape_of(op, 0)))


#: Ops to which it matters what lies beside what along an axis from which positions may be removed: for each the axis of
#: its first input (None: any).
ORDERED: dict[str, Callable[[Op], int | None]] = {"CumSum": _running_axis, "LRN": lambda op: 1}
#: Two labellings of one tensor that together span more elements than this are not compared: their labels stay.
MAX_JOINT = 1 << 24


def _mixed(values: npt.NDArray[Any]) -> Hashes:
    """Numbers that look random, equal for equal ones (the finaliser of splitmix64; Steele, Lea and Flood, 2014)."""
    x = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Footprints:
    """One number a label: the sum of what is noted of it. Equal numbers mean equal notes."""

    def __init__(self, labels: int) -> None:
        self.of: Hashes = np.zeros(labels, dtype=np.uint64)
        self._notes = 0

    def note(self, labels: Labels, *facts: npt.NDArray[Any]) -> None:
        """Note, of each element's label, facts about the element: integers that broadcast against ``labels``."""
        self._notes += 1
        code = _mixed(np.asarray(self._notes))
        with np.errstate(over="ignore"):
            for fact in facts:
                code = _mixed(code * np.uint64(3) + fact.astype(np.uint64))
            np.add.at(self.of, labels.ravel(), np.broadcast_to(code, labels.shape).ravel())

    def isolate(self, labels: Labels) -> None:
        """Make each label unlike every other."""
        self._notes += 1
        single = np.unique(labels)
        with np.errstate(over="ignore"):
            self.of[single] += _mixed(_mixed(np.asarray(self._notes)) + single.astype(np.uint64))


def exchange_classes(analysis: Analysis) -> list[Labels]:
    """All classes of two labels and more that may trade places, each in the order of its first occurrence.

    Within a class every permutation preserves what the network computes, up to the order of sums; so do permutations
    of several classes at once.
    """
    prints = _Footprints(len(analysis.atoms))
    spreads = spreads_of(analysis)
    for rows in distinct_rows(analysis, spreads):
        prints.note(rows, np.arange(len(rows))[:, None])
    for tensor in analysis.colourings:
        _note_joint(prints, analysis.labellings(tensor))
    _note_takes(prints, analysis)
    _isolate_ordered(prints, analysis)
    present = analysis.labels()
    present = present[~analysis.atoms.is_frozen(present)]
    _, kind, count = np.unique(prints.of[present], return_inverse=True, return_counts=True)
    order = np.argsort(kind, kind="stable")
    pieces = np.split(present[order], np.cumsum(count)[:-1]) if len(present) else []
    first = _first_occurrence([spread.rows for spread in spreads], len(analysis.atoms))
    classes = [piece[np.argsort(first[piece], kind="stable")] for piece in pieces if len(piece) > 1]
    return sorted(classes, key=lambda labels: int(first[labels[0]]))


def _first_occurrence(matrices: Sequence[Labels], size: int) -> npt.NDArray[np.int64]:
    """For each label a number that grows with where it is met first."""
    first = np.full(size, np.iinfo(np.int64).max)
    at = 0
    for rows in matrices:
        flat = rows.ravel()
        np.minimum.at(first, flat, np.arange(at, at + flat.size))
        at += flat.size
    return first


def _note_joint(prints: _Footprints, labellings: Sequence[Labels]) -> None:
    """What else the elements bear along the axis along which a label would move them: it must stay."""
    for labels in labellings:
        own = own_axis(labels)
        for other in labellings:
            if other is labels or other.shape[own] == 1:
                continue
            if prod(max(a, b) for a, b in zip(labels.shape, other.shape, strict=True)) > MAX_JOINT:
                prints.isolate(labels)
                continue
            seen = _mixed(other)
            for axis, size in enumerate(labels.shape):
                if size == 1 and other.shape[axis] > 1:  # one number for all that the element's slice bears
                    shape = [-1 if i == axis else 1 for i in range(labels.ndim)]
                    salts = _mixed(np.arange(other.shape[axis])).reshape(shape)
                    with np.errstate(over="ignore"):
                        seen = _mixed(seen * salts).sum(axis=axis, keepdims=True, dtype=np.uint64)
            rows = rows_of(labels, own)
            facts = rows_of(np.broadcast_to(seen, labels.shape), own)
            prints.note(rows, np.arange(len(rows))[:, None], occurrences(rows), facts)


def occurrences(rows: Labels) -> npt.NDArray[np.int64]:
    """How often each element's label lies before it in its row; same shape.

    >>> occurrences(np.array([[5, 7, 5, 5, 7]], dtype=np.int32)).tolist()
    [[0, 0, 1, 2, 1]]
    """
    places = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, places, axis=1)
    index = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    begins = np.ones(rows.shape, dtype=bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counts = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    result = np.empty(rows.shape, dtype=np.int64)
    np.put_along_axis(result, places, counts, axis=1)
    return result


def _note_takes(prints: _Footprints, analysis: Analysis) -> None:
    """Where labels repeat along an axis that is indexed: which of a label's elements lands where."""
    for op, flows in zip(analysis.graph.ops, analysis.flows, strict=True):
        if isinstance(flows, Refusal):
            continue
        for flow in flows:
            steps = (
                (flow,) if isinstance(flow, TakeFlow) else flow.steps if isinstance(flow, ChainFlow) else ()
            )
            tensor = tensor_at(op, steps[0].source) if steps else None
            if tensor is not None:
                for labels in analysis.labellings(tensor):
                    _note_steps(prints, steps, labels)


def _note_steps(prints: _Footprints, steps: Sequence[TakeFlow], labels: Labels) -> None:
    for step in steps:
        if labels.shape[step.axis] == 1:
            continue
        holes = step.index < 0
        index = np.where(holes, 0, step.index)
        if own_axis(labels) == step.axis:
            rows = rows_of(labels, step.axis)
            before = occurrences(rows)
            if before[rows > 0].any():
                taken = np.where(holes, 0, rows[:, index])
                prints.note(taken, np.arange(len(rows))[:, None], before[:, index], occurrences(taken))
        labels = labels.take(index, axis=step.axis)
        labels[(slice(None),) * step.axis + (holes,)] = 0


def _isolate_ordered(prints: _Footprints, analysis: Analysis) -> None:
    for op in analysis.graph.ops:
        axis_of = None if op.domain else ORDERED.get(op.op_type)
        tensor = op.inputs[0] if axis_of is not None and op.inputs else None
        if axis_of is None or tensor is None or tensor.shape is None:
            continue
        axis = axis_of(op)
        for labels in analysis.labellings(tensor):
            if axis is None or labels.shape[axis] > 1:
                prints.isolate(labels)


@dataclass(frozen=True)
class Reordering:
    """New places of one tensor's elements (a :class:`graphprune.constants.Change`).

    Attributes:
        shape: The tensor's shape, which stays.
        moves: One entry a labelling that changes: its own axis, and for each place the position along it of the element
            that comes there, int64 that broadcasts against ``shape``.
    """

    shape: tuple[int, ...]
    moves: tuple[tuple[int, npt.NDArray[np.int64]], ...]

    @property
    def key(self) -> Hashable:
        """Equal where the same elements go to the same places."""
        return tuple((axis, index.shape, index.tobytes()) for axis, index in self.moves)

    def apply(self, array: Array) -> Array:
        """The elements in their new places; same shape and type."""
        for axis, index in self.moves:
            if index.size == index.shape[axis]:
                array = array.take(index.ravel(), axis=axis)
            else:
                array = np.take_along_axis(array, index, axis=axis)
        return np.ascontiguousarray(array)


class Exchange:
    """A permutation of labels, and what it makes of every tensor.

    Attributes:
        analysis: The analysis whose labels they are.
        partner: int32 ``[number of atoms]``: for each label the label whose elements come to its places.
    """

    def __init__(self, analysis: Analysis, orders: Iterable[tuple[Labels, Labels]]) -> None:
        """Put a permutation together.

        Args:
            analysis: The analysis.
            orders: Pairs of (labels, labels whose elements come to their places); each pair holds the same labels,
                all of one class of :func:`exchange_classes`, and no two pairs share a label.
        """
        self.analysis = analysis
        self.partner = np.arange(len(analysis.atoms), dtype=np.int32)
        for labels, comers in orders:
            self.partner[labels] = comers
        self._known: dict[Tensor, Reordering | None] = {}

    @property
    def moving(self) -> Labels:
        """The labels that change places."""
        return np.flatnonzero(self.partner != np.arange(len(self.partner))).astype(np.int32)

    def of(self, tensor: Tensor) -> Reordering | None:
        """Where the tensor's elements go; None where they stay.

        Raises:
            PlanError: Labels that are not exchangeable were to be exchanged.
        """
        if tensor not in self._known:
            moves = [
                (own_axis(labels), self._index(tensor, labels))
                for labels in self.analysis.labellings(tensor)
                if (self.partner[labels] != labels).any()
            ]
            self._known[tensor] = Reordering(tensor.shape or (), tuple(moves)) if moves else None
        return self._known[tensor]

    def _index(self, tensor: Tensor, labels: Labels) -> npt.NDArray[np.int64]:
        own = own_axis(labels)
        rows = rows_of(labels, own)
        wanted = self.partner[rows]
        places, sources = (np.argsort(each, axis=1, kind="stable") for each in (wanted, rows))
        if (np.take_along_axis(wanted, places, axis=1) != np.take_along_axis(rows, sources, axis=1)).any():
            raise PlanError(
                f"positions of tensor {tensor.name!r} were to be exchanged that differ in what they bear"
            )
        index = np.empty(rows.shape, dtype=np.int64)
        np.put_along_axis(index, places, sources, axis=1)
        moved = [size for axis, size in enumerate(labels.shape) if axis != own]
        return np.ascontiguousarray(np.moveaxis(index.reshape(*moved, rows.shape[1]), -1, own))

    def moved(self) -> list[Tensor]:
        """Tensors whose elements change places."""
        return [tensor for tensor in self.analysis.colourings if self.of(tensor) is not None]


def functions_bearing(analysis: Analysis, labels: Labels) -> set[tuple[str, str, str]]:
    """Model-local functions that read constants which bear some labels: each call needs constants of its own."""
    wanted = np.zeros(len(analysis.atoms), dtype=bool)
    wanted[labels] = True
    return {
        call.op_identifier()
        for tensor in analysis.colourings
        if tensor.constant
        for op, _ in operands_of(tensor)
        if op.path and any(wanted[each].any() for each in analysis.labellings(tensor))
        for call in op.path
    }
