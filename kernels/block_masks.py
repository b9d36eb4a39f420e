"""Masks whose unit is a block of weights, and masks without a pattern.

Arrays are ``[outer, contracted, inner]``. A block of ``rows x cols`` takes ``rows`` neighbouring outputs and ``cols``
neighbouring elements of the contracted axis, at one position of everything else (a kernel's tap, a batch). Where the
outputs lie is said by :class:`Outputs`: along outer for a Conv or a Gemm with transB, along inner for a MatMul or a
ConvTranspose. What does not fill a block, the ``outputs % rows`` last outputs and ``contracted % cols`` last elements,
stays dense, and so do the last blocks that do not fill a group of m.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.kernels.nm import floor_of, nm_mask

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]

#: Elements that are raised to float64 at a time.
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where neighbouring outputs lie: an axis that is ``[before, count, step]``.

    Attributes:
        axis: 0 for outer, 2 for inner.
        count: How many belong together; of one conv group, no block reaches into another.
        step: From one to the next along the axis: 1, or the number of taps for a ConvTranspose's ``[C, K, R, S]``.
    """

    axis: int
    count: int
    step: int = 1


def _by_output(array: Array, outputs: Outputs) -> Array:
    """``[count, contracted, ...]`` view.

    Raises:
        ValueError: The outputs do not fill the axis.
    """
    if array.ndim != 3:
        raise ValueError(f"an array of shape {array.shape} where [outer, contracted, inner] is wanted")
    if outputs.axis not in (0, 2) or min(outputs.count, outputs.step) < 1:
        raise ValueError(f"{outputs} is no place for outputs: axis 0 or 2, count and step from 1 on")
    size = array.shape[outputs.axis]
    unit = outputs.count * outputs.step
    if size % unit:
        raise ValueError(
            f"an axis of {size} does not hold {outputs.count} outputs at steps of {outputs.step}"
        )
    outer, contracted, inner = array.shape
    split = (size // unit, outputs.count, outputs.step)
    if outputs.axis == 0:
        return np.moveaxis(array.reshape(*split, contracted, inner), (1, 3), (0, 1))
    return np.moveaxis(array.reshape(outer, contracted, *split), (3, 1), (0, 1))


def _in_blocks(array: Array, rows: int, cols: int, outputs: Outputs) -> Array:
    """``[R, rows, C, cols, ...]`` view of all whole blocks."""
    if min(rows, cols) < 1:
        raise ValueError(f"blocks of {rows}x{cols}; give positive sizes")
    view = _by_output(array, outputs)
    high, wide = view.shape[0] // rows, view.shape[1] // cols
    return view[: high * rows, : wide * cols].reshape(high, rows, wide, cols, *view.shape[2:])


def _sums(blocks: Array) -> Float64:
    """``[R, C, rest]`` magnitudes of blocks ``[R, rows, C, cols, ...]``, in float64."""
    high, _, wide, _, *rest = blocks.shape
    sums = np.empty((high, wide, *rest))
    strip = max(CHUNK // max(blocks[:1].size, 1), 1)
    for start in range(0, high, strip):
        part = np.abs(blocks[start : start + strip].astype(np.float64))
        sums[start : start + strip] = part.sum(axis=(1, 3))
    if np.isnan(sums).any():
        raise ValueError("there is a NaN among the scores, which has no order")
    return sums.reshape(high, wide, prod(rest))


def _spread(chosen: Mask, shape: tuple[int, ...], rows: int, cols: int, outputs: Outputs) -> Mask:
    """The mask of the elements of an array of that shape, from that of its blocks, ``[R, C, rest]``."""
    mask = np.ones(shape, np.bool_)
    blocks = _in_blocks(mask, rows, cols, outputs)
    high, _, wide, _, *rest = blocks.shape
    blocks[...] = chosen.reshape(high, 1, wide, 1, *rest)
    return mask


def nm_block_mask(scores: Array, n: int, m: int, rows: int, cols: int, outputs: Outputs) -> Mask:
    """Keep the n blocks of largest magnitude of every m along the contracted axis, ties by the lowest index.

    Args:
        scores: ``[outer, contracted, inner]`` weights, or scores such as Wanda's; any real dtype. A block's score is
            the sum of their absolute values, in float64.
        n, m: The pattern of blocks, 1 <= n <= m <= 32.
        rows, cols: A block has so many outputs and so many contracted elements.
        outputs: Where outputs lie.

    Returns:
        ``[outer, contracted, inner]``.

    Raises:
        ValueError: There is a NaN, or an argument does not fit.

    >>> scores = np.array([[3, 0, 1, 1], [0, 1, 3, 1]]).reshape(2, 4, 1)
    >>> nm_block_mask(scores, 1, 2, 2, 1, Outputs(axis=0, count=2))[..., 0].astype(int)
    array([[1, 0, 1, 0],
           [1, 0, 1, 0]])
    """
    chosen = nm_mask(_sums(_in_blocks(scores, rows, cols, outputs)), n, m)
    return _spread(chosen, scores.shape, rows, cols, outputs)


def fraction_block_mask(scores: Array, fraction: float, rows: int, cols: int, outputs: Outputs) -> Mask:
    """Remove ``floor(fraction * blocks)`` of the whole blocks, those of least magnitude, wherever they lie.

    Of equal ones those with the highest index go: by output first, then by contracted element.

    Args:
        scores: ``[outer, contracted, inner]`` as for :func:`nm_block_mask`.
        fraction: 0 to 1.
        rows, cols: A block has so many outputs and so many contracted elements.
        outputs: Where outputs lie.

    Raises:
        ValueError: There is a NaN, or an argument does not fit.
    """
    chosen = unstructured_mask(_sums(_in_blocks(scores, rows, cols, outputs)), fraction)
    return _spread(chosen, scores.shape, rows, cols, outputs)


def unstructured_mask(scores: Array, fraction: float) -> Mask:
    """Remove exactly ``floor(fraction * size)`` elements, those of the lowest scores; of equal ones the last.

    Args:
        scores: Ranks or scores of any shape, integers or floats, compared as they are (not by magnitude).
        fraction: 0 to 1; meant as it is written, so that .29 of 100 is 29.

    Returns:
        What stays, of their shape.

    Raises:
        ValueError: There is a NaN, or the fraction is none.

    >>> unstructured_mask(np.array([2, 1, 1, 3]), 0.25)
    array([ True,  True, False,  True])
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction of {fraction:g}; give 0 to 1")
    if scores.dtype.kind == "V":  # of ml_dtypes: float32 holds them all
        scores = scores.astype(np.float32)
    if scores.dtype.kind not in "biuf":
        raise ValueError(f"scores of {scores.dtype} have no order; give integers or floats")
    if scores.dtype.kind == "f" and np.isnan(scores).any():
        raise ValueError("there is a NaN among the scores, which has no order")
    flat = scores.ravel()
    count = floor_of(fraction, flat.size)
    if count == 0:
        return np.ones(scores.shape, np.bool_)
    threshold = np.partition(flat, count - 1)[count - 1]
    mask: Mask = flat > threshold
    tied = np.flatnonzero(flat == threshold)
    mask[tied[: flat.size - count - np.count_nonzero(mask)]] = True
    result: Mask = mask.reshape(scores.shape)
    return result
