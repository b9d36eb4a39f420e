"""What weights say about labels: norms, largest elements, distances between slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

#: Elements that are raised to a power, or multiplied out, at a time: bounds the memory beside the weight itself.
BLOCK = 1 << 22


def sums_by_label(
    array: npt.NDArray[Any], labels: npt.NDArray[np.int32], count: int, power: float
) -> npt.NDArray[np.float64]:
    """``sum |w| ** power`` over the elements that bear each label.

    Args:
        array: Weights, any real dtype, any shape.
        labels: Broadcasts against ``array``; values in ``0 .. count - 1``.
        count: Number of labels.
        power: 1 for L1, 2 for the square of L2.

    Returns:
        float64 ``[count]``; entry 0 (no label) is always zero.
    """

    def total(magnitude: npt.NDArray[Any], over: tuple[int, ...]) -> npt.NDArray[Any]:
        if power == 2:
            magnitude = magnitude * magnitude
        elif power != 1:
            magnitude = magnitude**power
        return np.asarray(magnitude.sum(axis=over, keepdims=True, dtype=np.float64))

    reduced = _reduced(array, labels, total)
    weights = np.broadcast_to(reduced, labels.shape).ravel()
    sums = np.asarray(np.bincount(labels.ravel(), weights=weights, minlength=count), dtype=np.float64)
    sums[0] = 0.0
    return sums


def maxima_by_label(array: npt.NDArray[Any], labels: npt.NDArray[np.int32], count: int) -> Vector:
    """``max |w|`` over the elements that bear each label; arguments and result as in :func:`sums_by_label`."""
    reduced = _reduced(array, labels, lambda m, over: m.max(axis=over, keepdims=True, initial=0), np.maximum)
    maxima = np.zeros(count)
    np.maximum.at(maxima, labels.ravel(), np.broadcast_to(reduced, labels.shape).ravel())
    maxima[0] = 0.0
    return maxima


def _reduced(
    array: npt.NDArray[Any],
    labels: npt.NDArray[np.int32],
    reduce: Callable[[npt.NDArray[Any], tuple[int, ...]], npt.NDArray[Any]],
    join: np.ufunc = np.add,
) -> Vector:
    """``|array|`` reduced, in float64, over the axes on which the labels do not depend, some rows at a time."""
    over = tuple(axis for axis, size in enumerate(labels.shape) if size == 1)
    reduced = np.zeros([1 if axis in over else size for axis, size in enumerate(array.shape)])
    rows = max(1, BLOCK // max(1, int(np.prod(array.shape[1:], dtype=np.int64)))) if array.ndim else 1
    for start in range(0, array.shape[0] if array.ndim else 1, rows):
        block = array[start : start + rows] if array.ndim else array
        part = reduce(np.abs(block.astype(np.float32, copy=False)), over)
        if array.ndim and 0 not in over:
            reduced[start : start + rows] = part
        else:
            join(reduced, part, out=reduced)
    return reduced


def slices_by_label(
    array: npt.NDArray[Any], labels: npt.NDArray[np.int32], wanted: npt.NDArray[np.int32]
) -> npt.NDArray[Any]:
    """The elements that bear each of some labels, in row-major order.

    Args:
        array: Weights, any shape.
        labels: Broadcasts against ``array``.
        wanted: Labels ``[n]``, distinct, each of which occurs in ``labels`` equally often.

    Returns:
        ``[n, m]``, row i the elements with label ``wanted[i]``, in the array's dtype.

    Raises:
        ValueError: The labels do not occur equally often.
    """
    varying = [axis for axis, size in enumerate(labels.shape) if size > 1]
    moved = np.moveaxis(array, varying, range(len(varying)))
    flat = moved.reshape(labels.size, -1)
    order = np.argsort(wanted)
    place = np.searchsorted(wanted[order], labels.ravel())
    found = np.flatnonzero(wanted[order][np.minimum(place, len(wanted) - 1)] == labels.ravel())
    owner = order[place[found]]
    counts = np.bincount(owner, minlength=len(wanted))
    if (counts != counts[0]).any():
        raise ValueError("the labels do not occur equally often")
    return np.asarray(flat[found[np.argsort(owner, kind="stable")]].reshape(len(wanted), -1))


def distance_sums(count: int, parts: Callable[[], Iterable[npt.NDArray[Any]]]) -> Vector:
    """For each of ``count`` vectors the sum of its Euclidean distances to all others.

    Args:
        count: Number of vectors, n.
        parts: Gives the vectors piece by piece: arrays ``[n, m]`` of any real dtype, m of any size, that are side by
            side the vectors. Called more than once where ``n * n`` is more than a block.

    Returns:
        float64 ``[n]``.
    """
    sums = np.zeros(count)
    rows = max(1, 4 * BLOCK // max(1, count))
    for start in range(0, count, rows):
        here = slice(start, start + rows)
        squares = np.zeros((len(sums[here]), count))
        for part in parts():
            columns = max(1, BLOCK // max(1, count))
            for first in range(0, part.shape[1], columns):
                block = part[:, first : first + columns].astype(np.float64)
                norms = np.einsum("nm,nm->n", block, block)
                squares += norms[here, None] + norms - 2 * block[here] @ block.T
        distances = np.sqrt(np.maximum(squares, 0))
        distances[np.arange(len(distances)), np.arange(len(distances)) + start] = 0
        sums[here] = distances.sum(axis=1)
    return sums
