"""Labels: which elements of which tensors can only go together.

A *label* is a positive integer, an atom of one union-find for the whole graph. A *labelling* of a tensor is an int32
array that broadcasts against the tensor's shape: each dimension has size 1 (labels do not depend on it) or the tensor's
full size. An element is removed when its label is removed; 0 says nothing about an element. A tensor may bear several
labellings (heads and head dimensions): an element goes when any of its labels goes.

The last axis along which labels vary is the labelling's *own* axis: the one that shrinks. Earlier varying axes are its
*context*: which positions go may depend on them, how many may not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int32]

#: A labelling with more elements than this is not carried on; its labels freeze.
MAX_ELEMENTS = 1 << 22


class Atoms:
    """Union-find over labels, with a reason for each class that must not be removed.

    Classes only ever grow and only ever lose freedom, so any order of operations ends.
    """

    def __init__(self) -> None:
        self._size = 1  # atom 0 is "no label"
        self._parent: Labels = np.zeros(1024, dtype=np.int32)
        # At representatives: an index into the reasons, 0 where there is none.
        self._frozen: Labels = np.zeros(1024, dtype=np.int32)
        self._statistical: Labels = np.zeros(1024, dtype=np.int32)
        self._reasons = [""]
        #: Counts unions and freezes; unchanged means that nothing was learnt.
        self.events = 0
        #: Counts unions; unchanged means that what was a representative still is one.
        self.unions = 0

    def __len__(self) -> int:
        return self._size

    def new(self, count: int) -> Labels:
        """Return ``count`` fresh labels."""
        start, self._size = self._size, self._size + count
        if self._size > len(self._parent):
            extra = max(self._size, 2 * len(self._parent)) - len(self._parent)
            self._parent = np.pad(self._parent, (0, extra))
            self._frozen = np.pad(self._frozen, (0, extra))
            self._statistical = np.pad(self._statistical, (0, extra))
        labels = np.arange(start, self._size, dtype=np.int32)
        self._parent[start : self._size] = labels
        return labels

    def find(self, labels: Labels) -> Labels:
        """Return the representative of each label; same shape."""
        roots = self._parent.take(labels)
        while True:
            above = self._parent.take(roots)
            if (above == roots).all():
                return roots
            self._parent[labels] = above
            roots = above

    def union(self, left: Labels, right: Labels) -> None:
        """Unite ``left[i]`` with ``right[i]`` for every i (broadcast); pairs with a 0 are passed over."""
        pairs = (left > 0) & (right > 0) & (left != right)
        if not pairs.any():
            return
        left, right = np.broadcast_arrays(left, right)
        a, b = left[pairs], right[pairs]
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            low, high = np.minimum(a[differ], b[differ]), np.maximum(a[differ], b[differ])
            self.events += 1
            self.unions += 1
            # Of several candidates for one root the smallest wins; what is not yet united is so in the next round.
            np.minimum.at(self._parent, high, low)
            roots = self.find(high)
            for notes in (self._frozen, self._statistical):
                np.maximum.at(notes, roots, notes[high])
            a, b = low, high

    def _note(self, notes: Labels, labels: Labels, reason: str) -> None:
        roots = self.find(labels)
        fresh = roots[(roots > 0) & (notes[roots] == 0)]
        if fresh.size:
            self._reasons.append(reason)
            notes[fresh] = len(self._reasons) - 1
            self.events += 1

    def freeze(self, labels: Labels, reason: str) -> None:
        """Nothing that bears one of these labels may be removed, because of ``reason``."""
        self._note(self._frozen, labels, reason)

    def mark_statistical(self, labels: Labels, reason: str) -> None:
        """Removing one of these labels changes a statistic (a mean, a softmax), named by ``reason``."""
        self._note(self._statistical, labels, reason)

    def frozen(self, label: int) -> str | None:
        """Why the label is frozen; None if it is free."""
        return self._reason(self._frozen, label)

    def statistical(self, label: int) -> str | None:
        """Which statistic removal would change; None if removal is exact."""
        return self._reason(self._statistical, label)

    def _reason(self, notes: Labels, label: int) -> str | None:
        index = int(notes[self.find(np.asarray([label], dtype=np.int32))[0]])
        return self._reasons[index] if index else None

    def is_frozen(self, labels: Labels) -> npt.NDArray[np.bool_]:
        """For each label, whether it is frozen."""
        return self._frozen[self.find(labels)] > 0

    def is_statistical(self, labels: Labels) -> npt.NDArray[np.bool_]:
        """For each label, whether removal would change a statistic."""
        return self._statistical[self.find(labels)] > 0

    def all_frozen(self, labels: Labels) -> bool:
        """True if no label of the array is free."""
        roots = self.find(labels)
        return bool(((roots == 0) | (self._frozen[roots] > 0)).all())


def compress(labels: Labels) -> Labels:
    """Reduce to size 1 each axis along which the array is constant."""
    for axis, size in enumerate(labels.shape):
        if size > 1 and labels.size:
            last = (0,) * axis + (-1,) + (0,) * (labels.ndim - axis - 1)
            if labels[last] != labels[(0,) * labels.ndim]:
                continue  # the usual case
            first = labels[(slice(None),) * axis + (slice(0, 1),)]
            if (labels == first).all():
                labels = first.copy()  # a view would keep the whole array alive
    return labels


def varying_axes(labels: Labels) -> tuple[int, ...]:
    """Axes along which labels differ, in order; a 0 differs from nothing.

    Where nothing differs but some elements bear no label (one label on a part of the tensor), the last axis that
    tells labelled from unlabelled elements is returned alone.
    """
    full = [axis for axis, size in enumerate(labels.shape) if size > 1]
    if len(full) < 2:
        return tuple(full)
    lows = np.where(labels == 0, np.iinfo(np.int32).max, labels)
    axes = tuple(a for a in full if (labels.max(axis=a) > lows.min(axis=a)).any())
    return axes or tuple(full[-1:])


def unite_along(atoms: Atoms, labels: Labels, axis: int) -> Labels:
    """Unite all labels along ``axis`` and return the array with that axis reduced to size 1."""
    if labels.shape[axis] == 1:
        return labels
    representative = labels.max(axis=axis, keepdims=True)
    atoms.union(labels, np.broadcast_to(representative, labels.shape))
    return atoms.find(representative)


def unite_identical(atoms: Atoms, left: Labels, right: Labels) -> None:
    """Unite each label of ``left`` with the label of ``right`` that covers the same elements, if there is one."""
    if not any(a > 1 and b > 1 for a, b in zip(left.shape, right.shape, strict=True)):
        return  # they vary along different axes: no label of one covers just what a label of the other does
    shape = _common_shape(left, right)
    if prod(shape) > MAX_ELEMENTS:
        return
    a = np.broadcast_to(left, shape).ravel()
    b = np.broadcast_to(right, shape).ravel()
    if ((a != b) & (a > 0) & (b > 0)).any():  # not so for the pieces of a Concat
        same = _alone(a, b) & _alone(b, a)
        atoms.union(a[same], b[same])


def _alone(a: Labels, b: Labels) -> npt.NDArray[np.bool_]:
    """For each element whether all elements with its label in ``a`` bear one label in ``b``."""
    met = np.zeros(int(a.max()) + 1, dtype=np.int32)
    met[a] = b
    other = met[a] != b
    if not other.any():
        return np.ones(a.shape, dtype=bool)
    several = np.zeros(len(met), dtype=bool)
    several[a[other]] = True
    result: npt.NDArray[np.bool_] = ~several[a]
    return result


def _common_shape(left: Labels, right: Labels) -> tuple[int, ...]:
    return tuple(max(a, b) for a, b in zip(left.shape, right.shape, strict=True))


def merged(left: Labels, right: Labels) -> Labels | None:
    """Join two labellings of one tensor that agree wherever both speak; None if they do not agree.

    Two that speak of different elements (pieces of a Concat) are joined when they shrink the same axis.
    """
    first = (0,) * left.ndim
    if 0 != left[first] != right[first] != 0:
        return None  # the usual case: heads and head dimensions
    shape = _common_shape(left, right)
    if prod(shape) > MAX_ELEMENTS:
        return None
    a, b = np.broadcast_to(left, shape), np.broadcast_to(right, shape)
    both = (a > 0) & (b > 0)
    if both.any():
        if ((a != b) & both).any():
            return None
    elif varying_axes(left)[-1:] != varying_axes(right)[-1:]:
        return None
    return compress(np.maximum(a, b))


@dataclass(eq=False, slots=True)
class Labelling:
    """One labelling of a tensor, and how far it has been carried.

    Attributes:
        labels: Representatives, compressed.
        origin: What brought it here; None where it was seeded, or joined from several.
        carried: The ops around the tensor know of it. Labels that were renamed since need not be carried again;
            labels that were united with each other must be.
    """

    labels: Labels
    origin: object = None
    carried: bool = False


class Colouring:
    """All labellings of one tensor."""

    __slots__ = ("_age", "_tidy_age", "entries", "shape")

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.entries: list[Labelling] = []
        # The number of unions when the labels were last brought up to date, and when they were last tidied.
        self._age = self._tidy_age = -1

    @property
    def labellings(self) -> list[Labels]:
        """The arrays alone."""
        return [entry.labels for entry in self.entries]

    def refresh(self, atoms: Atoms) -> None:
        """Replace labels by their representatives."""
        if self._age == atoms.unions:
            return
        for entry in self.entries:
            found = atoms.find(entry.labels)
            if not (found == entry.labels).all():
                if not _alone(found, entry.labels).all():
                    found, entry.carried = compress(found), False
                entry.labels, entry.origin = found, None
        self._age = atoms.unions

    def add(self, atoms: Atoms, labels: Labels, limit: int, origin: object = None) -> bool:
        """Add one labelling; return True if it told something new.

        Labels that cover the same elements as one known before are united with it. A label that alone covers the
        whole tensor freezes: removing it would leave nothing.
        """
        labels = compress(atoms.find(labels))
        if labels.size == 1:
            atoms.freeze(labels, "it is all there is along its axis")
            return False
        self.refresh(atoms)
        if any(_equal(entry.labels, labels) for entry in self.entries) or not labels.any():
            return False
        before = atoms.unions
        for entry in self.entries:
            self.refresh(atoms)
            unite_identical(atoms, entry.labels, labels)
        if atoms.unions != before:
            self.refresh(atoms)
            labels = compress(atoms.find(labels))
        for entry in self.entries:
            joined = merged(entry.labels, labels)
            if joined is not None:
                if _equal(joined, entry.labels):
                    return False
                entry.labels, entry.carried = joined, False
                entry.origin = origin if _equal(joined, labels) else None
                self._tidy_age = -1
                return True
        if len(self.entries) >= limit:
            atoms.freeze(labels, f"more than {limit} ways to cut one tensor meet here")
            return False
        self.entries.append(Labelling(labels, origin))
        self._tidy_age = -1
        return True

    def tidy(self, atoms: Atoms) -> None:
        """Bring all labellings up to date with the unions made since; join those that agree by now."""
        if self._tidy_age == atoms.unions:
            return
        self.refresh(atoms)
        if len(self.entries) > 1 or not all(entry.carried for entry in self.entries):
            before, self.entries = self.entries, []
            for entry in before:
                self.add(atoms, entry.labels, limit=len(before))
            for entry in self.entries:
                entry.carried = any(old.carried and _equal(old.labels, entry.labels) for old in before)
        self._tidy_age = atoms.unions


def _equal(left: Labels, right: Labels) -> bool:
    return left is right or (left.shape == right.shape and bool((left == right).all()))


def distinct(labellings: Iterable[Labels]) -> Labels:
    """Return the sorted labels that occur, without 0."""
    parts = [np.unique(labels) for labels in labellings]
    if not parts:
        return np.zeros(0, dtype=np.int32)
    labels = np.unique(np.concatenate(parts))
    return labels[labels > 0]
