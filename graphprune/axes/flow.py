"""How labels move through an op.

Three kinds of flow are enough for every op. A :class:`SignatureFlow` carries labels between operands that share a
factor; a :class:`TakeFlow` is indexing along one axis (Slice, Split, Concat, Gather, Pad, Tile); a
:class:`ReshapeFlow` is row-major reshaping. Each works in both directions, and each turns what cannot be told apart
on the other side into unions, and what cannot be removed at all into freezes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from graphprune.axes.labels import MAX_ELEMENTS, Atoms, Labels, compress, unite_along, varying_axes
from graphprune.axes.signature import Role, Signature, View


class Operand(NamedTuple):
    """One operand of an op: ``inputs[slot]`` or ``outputs[slot]``."""

    is_output: bool
    slot: int


class Flow(Protocol):
    """A relation between operands of one op along which labels move."""

    def reversible(self, labels: Labels) -> bool:
        """True if what the flow makes of a labelling tells it nothing when it is pushed back."""

    def operands(self) -> tuple[Operand, ...]:
        """The operands that the flow relates."""

    def push(
        self, atoms: Atoms, source: Operand, labels: Labels, where: str
    ) -> Iterator[tuple[Operand, Labels]]:
        """Carry a labelling of ``source`` to the other operands.

        Args:
            atoms: The union-find; unions and freezes that the op demands are made in it.
            source: The operand that bears the labelling.
            labels: The labelling; representatives, compressed.
            where: Names the op in reasons.
        """


def _too_large(atoms: Atoms, labels: Labels, shape: tuple[int, ...], where: str) -> bool:
    if prod(shape) <= MAX_ELEMENTS:
        return False
    atoms.freeze(labels, f"labels at {where} would take {prod(shape):,} elements, more than {MAX_ELEMENTS:,}")
    return True


@dataclass(frozen=True)
class SignatureFlow:
    """Labels move along the factors that two operands share."""

    signature: Signature

    def reversible(self, labels: Labels) -> bool:
        # Uniting along an axis spreads labels to elements that bore none.
        return self._symmetric and bool(labels.all())

    @cached_property
    def _symmetric(self) -> bool:
        """True if each operand has one view, and the op sums over a factor in all operands or in none."""
        views = self.signature.views
        return len({(view.is_output, view.slot) for view in views}) == len(views) and not any(
            self.signature.role(name) is Role.PASS for view in views for name in view.summed
        )

    @cached_property
    def _views(self) -> tuple[tuple[Operand, View], ...]:
        return tuple((Operand(view.is_output, view.slot), view) for view in self.signature.views)

    def operands(self) -> tuple[Operand, ...]:
        return tuple(dict.fromkeys(operand for operand, _ in self._views))

    def push(
        self, atoms: Atoms, source: Operand, labels: Labels, where: str
    ) -> Iterator[tuple[Operand, Labels]]:
        for operand, view in self._views:
            if operand == source:
                yield from self._push_view(atoms, view, labels, where)

    def _push_view(
        self, atoms: Atoms, view: View, labels: Labels, where: str
    ) -> Iterator[tuple[Operand, Labels]]:
        by_factor = self.to_factors(atoms, view, labels, where)
        if by_factor is None:
            return
        names = view.factors
        varying = varying_axes(by_factor)
        if not varying:
            if by_factor.any():
                atoms.freeze(by_factor, f"{where}: it is all there is along the axis")
            return
        own = names[varying[-1]]
        role = self.signature.role(own)
        if role in (Role.BLOCKED, Role.SEPARATE):
            atoms.freeze(
                by_factor, f"{where}: nothing may be removed along {own!r} of {self.signature.text!r}"
            )
            return
        if role is Role.NORMALISED:
            atoms.mark_statistical(by_factor, f"{where}: normalised over {own!r} of {self.signature.text!r}")
        for operand, target in self._views:
            if target is view or own not in target.factors:
                continue
            carried = self._collapse(atoms, by_factor, names, own, target)
            built = self.from_factors(carried, names, target)
            if built is None:
                atoms.freeze(labels, f"labels at {where} would take more than {MAX_ELEMENTS:,} elements")
                return
            yield operand, built

    def to_factors(self, atoms: Atoms, view: View, labels: Labels, where: str) -> Labels | None:
        """Spread an operand's labelling over the view's factors: one dimension a factor, in the view's order."""
        shape: list[int] = []
        for index, axis in enumerate(view.axes):
            size = labels.shape[index]
            if axis.take is not None and size > 1:
                labels = labels[(slice(None),) * index + (slice(*axis.take),)]
                size = labels.shape[index]
            if axis.factors is None:
                if size > 1:
                    if varying_axes(labels)[-1:] == (index,):
                        if not self._spoken_of(view, index):
                            atoms.freeze(labels, f"{where}: nothing may be removed along axis {index}")
                        return None
                    labels = unite_along(atoms, labels, index)
                continue
            sizes = [self.signature.sizes[name] for name in axis.factors]
            shape += sizes if size > 1 else [1] * len(sizes)
        return compress(labels.reshape(shape)) if labels.any() else None

    def spread(self, view: View, array: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """An array that broadcasts against an operand, with one dimension a factor of a view.

        None where it depends on an axis of which the view says nothing.
        """
        shape: list[int] = []
        for index, axis in enumerate(view.axes):
            size = array.shape[index]
            if axis.factors is None:
                if size > 1:
                    return None
                continue
            if axis.take is not None and size > 1:
                array = array[(slice(None),) * index + (slice(*axis.take),)]
            sizes = [self.signature.sizes[name] for name in axis.factors]
            shape += sizes if size > 1 else [1] * len(sizes)
        return array.reshape(shape)

    def _spoken_of(self, view: View, index: int) -> bool:
        """True if another view of the same operand says what the axis is made of."""
        return any(
            other.axes[index].factors is not None
            for other in self.signature.views
            if (other.is_output, other.slot) == (view.is_output, view.slot)
        )

    def _collapse(
        self, atoms: Atoms, labels: Labels, names: tuple[str, ...], own: str, target: View
    ) -> Labels:
        """Unite along each factor on which the labels may not depend in the target."""
        order = target.factors
        for index, name in enumerate(names):
            if name == own or labels.shape[index] == 1:
                continue
            role = self.signature.role(name)
            mixed = role in (Role.BLOCKED, Role.CONTRACTED, Role.NORMALISED) or name in target.summed
            if mixed or name not in order or order.index(name) > order.index(own):
                labels = unite_along(atoms, labels, index)
        return labels

    def from_factors(self, labels: Labels, names: tuple[str, ...], target: View) -> Labels | None:
        """Build the target's labelling from an array with one dimension a factor of ``names``."""
        present = [names.index(name) if name in names else -1 for name in target.factors]
        kept = [labels.shape[p] if p >= 0 else 1 for p in present]
        if sum(size > 1 for size in kept) > 1:  # otherwise there is no order to change
            labels = labels.transpose(
                [p for p in present if p >= 0] + [i for i in range(len(names)) if i not in present]
            )
        array = labels.reshape(kept)  # the factors that the target lacks have size 1 by now
        full: list[int] = []
        final: list[int] = []
        position = 0
        for axis in target.axes:
            count = len(axis.factors or ())
            dims = kept[position : position + count]
            position += count
            if all(d == 1 for d in dims):
                full += dims
                final.append(1)
            else:
                sizes = [self.signature.sizes[name] for name in axis.factors or ()]
                full += sizes
                final.append(prod(sizes))
        if prod(full) > MAX_ELEMENTS:
            return None
        if full != kept:
            array = np.broadcast_to(array, full)
        array = array.reshape(final)
        for index, axis in enumerate(target.axes):
            if axis.take is not None:
                array = self._embed(array, index, axis.take, target)
        return array

    def _embed(self, array: Labels, index: int, take: tuple[int, int], target: View) -> Labels:
        """Place a view of some positions of an axis into the whole axis; the other positions bear no label."""
        start, stop = take
        whole = max(
            other.axes[index].take[1]  # type: ignore[index]
            for other in self.signature.views
            if (other.is_output, other.slot) == (target.is_output, target.slot) and other.axes[index].take
        )
        shape = list(array.shape)
        shape[index] = whole
        result = np.zeros(shape, dtype=np.int32)
        result[(slice(None),) * index + (slice(start, stop),)] = array
        return result


def _axis_slice(axis: int, what: Any) -> tuple[Any, ...]:
    return (slice(None),) * axis + (what,)


@dataclass(frozen=True)
class TakeFlow:
    """``target = source.take(index, axis)``; -1 in the index is a position that no source position fills.

    Attributes:
        source, target: The operands; their sizes are equal but along ``axis``.
        axis: The axis, non-negative.
        index: int64, flat.
        size: ``source.shape[axis]``.
        places: Shape that the index has in the target, where it replaces the axis (a Gather by a scalar or a
            matrix); None where it is flat.
        literal: The index is stored as it is (a Gather), so that it must read the same in every row; a range (a Slice)
            need only have as many positions before it in every row.
    """

    source: Operand
    target: Operand
    axis: int
    index: npt.NDArray[np.int64]
    size: int
    places: tuple[int, ...] | None = None
    literal: bool = False

    def operands(self) -> tuple[Operand, ...]:
        return (self.source, self.target)

    def reversible(self, labels: Labels) -> bool:
        return self.monotone and self.rowwise

    @cached_property
    def monotone(self) -> bool:
        """True if the order of positions is kept and none is repeated."""
        used = self.index[self.index >= 0]
        return bool((np.diff(used) > 0).all())

    @cached_property
    def rowwise(self) -> bool:
        """True if each row may keep its own positions: the index is a range, and is written as one."""
        used = self.index[self.index >= 0]
        return not self.literal and bool((np.diff(used) == 1).all())

    def push(
        self, atoms: Atoms, source: Operand, labels: Labels, where: str
    ) -> Iterator[tuple[Operand, Labels]]:
        if source == self.target:
            yield self.source, self._backward(atoms, self._uniform(atoms, self._joined(labels)))
        if source == self.source:
            yield self.target, self._spread(self._forward(self._uniform(atoms, labels)))

    def _uniform(self, atoms: Atoms, labels: Labels) -> Labels:
        """Where one index serves all rows, the labels that it moves must not depend on rows."""
        varying = varying_axes(labels)
        if varying and self.axis == varying[-1] and not self.rowwise:
            for context in varying[:-1]:
                labels = unite_along(atoms, labels, context)
        return labels

    def _spread(self, labels: Labels) -> Labels:
        """From a flat index axis to the axes of ``places``."""
        if self.places is None:
            return labels
        dims = self.places if labels.shape[self.axis] > 1 else (1,) * len(self.places)
        return compress(labels.reshape(*labels.shape[: self.axis], *dims, *labels.shape[self.axis + 1 :]))

    def _joined(self, labels: Labels) -> Labels:
        """From the axes of ``places`` to a flat index axis."""
        if self.places is None:
            return labels
        stop = self.axis + len(self.places)
        head, dims, tail = labels.shape[: self.axis], labels.shape[self.axis : stop], labels.shape[stop:]
        if all(size == 1 for size in dims):
            return labels.reshape(*head, 1, *tail)
        whole = np.broadcast_to(labels, (*head, *self.places, *tail))
        return whole.reshape(*head, len(self.index), *tail)

    def _forward(self, labels: Labels) -> Labels:
        holes = self.index < 0
        if labels.shape[self.axis] == 1:
            if not holes.any():
                return labels
            shape = list(labels.shape)
            shape[self.axis] = len(self.index)
            labels = np.broadcast_to(labels, shape).copy()
        else:
            labels = labels.take(np.where(holes, 0, self.index), axis=self.axis)
        labels[_axis_slice(self.axis, holes)] = 0
        return compress(labels)

    def _backward(self, atoms: Atoms, labels: Labels) -> Labels:
        positions = np.flatnonzero(self.index >= 0)
        used = self.index[positions]
        shape = list(labels.shape)
        shape[self.axis] = self.size
        if labels.shape[self.axis] == 1:
            if len(np.unique(used)) == self.size:
                return labels
            labels = np.broadcast_to(labels, [*shape[: self.axis], len(self.index), *shape[self.axis + 1 :]])
        labels = labels.take(positions, axis=self.axis)
        result = np.zeros(shape, dtype=np.int32)
        result[_axis_slice(self.axis, used)] = labels
        if self.monotone:
            return compress(result)
        # A position taken several times bears one label.
        atoms.union(result.take(used, axis=self.axis), labels)
        return compress(atoms.find(result))


@dataclass(frozen=True, slots=True)
class ChainFlow:
    """Indexing along several axes at once: one :class:`TakeFlow` after another."""

    steps: tuple[TakeFlow, ...]

    def reversible(self, labels: Labels) -> bool:
        return all(step.monotone and step.rowwise for step in self.steps)

    def operands(self) -> tuple[Operand, ...]:
        return self.steps[0].operands()

    def push(
        self, atoms: Atoms, source: Operand, labels: Labels, where: str
    ) -> Iterator[tuple[Operand, Labels]]:
        forward = source == self.steps[0].source
        operand = source
        for step in self.steps if forward else self.steps[::-1]:
            operand, labels = next(iter(step.push(atoms, source, labels, where)))
        yield operand, labels


@dataclass(frozen=True, slots=True)
class ReshapeFlow:
    """Row-major reshape between two operands of equally many elements."""

    source: Operand
    target: Operand
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]

    def reversible(self, labels: Labels) -> bool:
        return True

    def operands(self) -> tuple[Operand, ...]:
        return (self.source, self.target)

    def push(
        self, atoms: Atoms, source: Operand, labels: Labels, where: str
    ) -> Iterator[tuple[Operand, Labels]]:
        if source == self.source:
            yield from self._push(atoms, self.source_shape, self.target_shape, self.target, labels, where)
        if source == self.target:
            yield from self._push(atoms, self.target_shape, self.source_shape, self.source, labels, where)

    @staticmethod
    def _push(
        atoms: Atoms,
        from_shape: tuple[int, ...],
        to_shape: tuple[int, ...],
        operand: Operand,
        labels: Labels,
        where: str,
    ) -> Iterator[tuple[Operand, Labels]]:
        expanded: list[int] = []
        final: list[int] = []
        for from_axes, to_axes in reshape_blocks(from_shape, to_shape):
            if all(labels.shape[a] == 1 for a in from_axes):
                expanded += [1] * len(from_axes)
                final += [1] * len(to_axes)
            else:
                expanded += [from_shape[a] for a in from_axes]
                final += [to_shape[a] for a in to_axes]
        if not _too_large(atoms, labels, tuple(expanded), where):
            yield operand, compress(np.broadcast_to(labels, expanded).reshape(final))


def reshape_blocks(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Split the axes of two shapes of equal size into the shortest runs of equal products, in order.

    >>> reshape_blocks((2, 12, 5), (2, 3, 4, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        left: list[int] = []
        right: list[int] = []
        size_left = size_right = 1
        if i < len(a):
            left, size_left, i = [i], a[i], i + 1
        if j < len(b) and (a[left[0]] != 1 or b[j] == 1 if left else True):
            right, size_right, j = [j], b[j], j + 1
        while size_left != size_right:
            if size_left < size_right and i < len(a):
                left, size_left, i = [*left, i], size_left * a[i], i + 1
            elif j < len(b):
                right, size_right, j = [*right, j], size_right * b[j], j + 1
            else:
                raise ValueError(f"shapes {a} and {b} differ in size")
        blocks.append((left, right))
    return blocks
