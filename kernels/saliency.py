"""Norms of weights, summed by label."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

#: Elements that are raised to a power at a time: bounds the memory beside the weight itself.
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
    over = tuple(axis for axis, size in enumerate(labels.shape) if size == 1)
    reduced = np.zeros([1 if axis in over else size for axis, size in enumerate(array.shape)])
    rows = max(1, BLOCK // max(1, int(np.prod(array.shape[1:], dtype=np.int64)))) if array.ndim else 1
    for start in range(0, array.shape[0] if array.ndim else 1, rows):
        block = array[start : start + rows] if array.ndim else array
        magnitude = np.abs(block.astype(np.float32, copy=False))
        if power != 1:
            magnitude = magnitude**power if power != 2 else magnitude * magnitude
        part = magnitude.sum(axis=over, keepdims=True, dtype=np.float64)
        if array.ndim and 0 not in over:
            reduced[start : start + rows] = part
        else:
            reduced += part
    weights = np.broadcast_to(reduced, labels.shape).ravel()
    sums = np.asarray(np.bincount(labels.ravel(), weights=weights, minlength=count), dtype=np.float64)
    sums[0] = 0.0
    return sums
