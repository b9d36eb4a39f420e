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
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
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
        if size > 1:
            first = labels.take([0], axis=axis)
            if (labels == first).all():
                labels = first
    return labels


def varying_axes(labels: Labels) -> tuple[int, ...]:
    """Axes along which labels differ, in order; a 0 differs from nothing.

    Where nothing differs but some elements bear no label (one label on a part of the tensor), the last axis that
    tells labelled from unlabelled elements is returned alone.
    """
    full = [axis for axis, size in enumerate(labels.shape) if size > 1]
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
    shape = np.broadcast_shapes(left.shape, right.shape)
    if int(np.prod(shape)) > MAX_ELEMENTS:
        return
    a = np.broadcast_to(left, shape).ravel()
    b = np.broadcast_to(right, shape).ravel()
    if _bijective(a, b):  # the usual case, at a tenth of the price
        atoms.union(a, b)
        return
    a_labels, a_index, a_counts = np.unique(a, return_inverse=True, return_counts=True)
    b_labels, b_index, b_counts = np.unique(b, return_inverse=True, return_counts=True)
    code = a_index.astype(np.int64) * len(b_labels) + b_index
    pairs, counts = np.unique(code, return_counts=True)
    i, j = pairs // len(b_labels), pairs % len(b_labels)
    same = (counts == a_counts[i]) & (counts == b_counts[j])
    atoms.union(a_labels[i[same]], b_labels[j[same]])


def _bijective(a: Labels, b: Labels) -> bool:
    """True if equal labels of one array meet equal labels of the other, both ways, at the same elements."""
    size = int(max(a.max(), b.max())) + 1
    forth, back = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int32)
    forth[a], back[b] = b, a
    return bool((forth[a] == b).all() and (back[b] == a).all() and ((a > 0) == (b > 0)).all())


def merged(left: Labels, right: Labels) -> Labels | None:
    """Join two labellings of one tensor that agree wherever both speak; None if they do not agree.

    Two that speak of different elements (pieces of a Concat) are joined when they shrink the same axis.
    """
    shape = np.broadcast_shapes(left.shape, right.shape)
    if int(np.prod(shape)) > MAX_ELEMENTS:
        return None
    a, b = np.broadcast_to(left, shape), np.broadcast_to(right, shape)
    both = (a > 0) & (b > 0)
    if both.any():
        if not np.array_equal(a[both], b[both]):
            return None
    elif varying_axes(left)[-1:] != varying_axes(right)[-1:]:
        return None
    return compress(np.where(a > 0, a, b))


class Colouring:
    """All labellings of one tensor."""

    __slots__ = ("labellings", "shape")

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.labellings: list[Labels] = []

    def add(self, atoms: Atoms, labels: Labels, limit: int) -> bool:
        """Add one labelling; return True if it told something new.

        Labels that cover the same elements as one known before are united with it. A label that alone covers the
        whole tensor freezes: removing it would leave nothing.
        """
        labels = compress(atoms.find(labels))
        if not labels.any():
            return False
        if labels.size == 1:
            atoms.freeze(labels, "it is all there is along its axis")
            return False
        for known in self.labellings:
            if known.shape == labels.shape and np.array_equal(atoms.find(known), labels):
                return False
        for known in self.labellings:
            unite_identical(atoms, atoms.find(known), labels)
        labels = compress(atoms.find(labels))
        for index, known in enumerate(self.labellings):
            known = atoms.find(known)
            joined = merged(known, labels)
            if joined is not None:
                if joined.shape == known.shape and np.array_equal(joined, known):
                    return False
                self.labellings[index] = joined
                return True
        if len(self.labellings) >= limit:
            atoms.freeze(labels, f"more than {limit} ways to cut one tensor meet here")
            return False
        self.labellings.append(labels)
        return True

    def tidy(self, atoms: Atoms) -> None:
        """Bring all labellings up to date with the unions made since; join those that agree by now."""
        current, self.labellings = self.labellings, []
        for labels in current:
            self.add(atoms, labels, limit=len(current))


def distinct(labellings: Iterable[Labels]) -> Labels:
    """Return the sorted labels that occur, without 0."""
    parts = [np.unique(labels) for labels in labellings]
    if not parts:
        return np.zeros(0, dtype=np.int32)
    labels = np.unique(np.concatenate(parts))
    return labels[labels > 0]
