"""Boxes: when what is left of a tensor is again a tensor.

A mask over a tensor can be compacted if all its non-empty slices along the leading axis compact to the same box, and
so on inwards. Then the rest is ``array[mask].reshape(box(mask))``, in row-major order; and because row-major order is
what Reshape keeps, compacting before or after a Reshape is the same wherever both sides are boxes.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


def box(mask: Mask) -> tuple[int, ...] | None:
    """Sizes of the box that a mask compacts to; None if it does not.

    >>> box(np.array([[True, False, True], [False, True, True]]))
    (2, 2)
    >>> box(np.array([[True, True, True], [False, True, True]])) is None
    True
    """
    sizes: list[int] = []
    for _ in range(mask.ndim):
        counts = mask.sum(axis=-1)
        kept = counts[counts > 0]
        if kept.size == 0:
            return (0,) * mask.ndim
        if (kept != kept.flat[0]).any():
            return None
        sizes.append(int(kept.flat[0]))
        mask = counts > 0
    return tuple(reversed(sizes))


def broadcast_box(mask: Mask, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The box of a mask that broadcasts against ``shape``: axes on which it does not depend keep their size."""
    sizes = box(mask)
    if sizes is None:
        return None
    return tuple(
        full if dim == 1 and size == 1 else size
        for dim, size, full in zip(mask.shape, sizes, shape, strict=True)
    )


def separable(mask: Mask) -> tuple[Mask, ...] | None:
    """One mask an axis, if the mask is their outer product; None otherwise."""
    if not mask.any():
        return None
    factors = tuple(
        np.asarray(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        for axis in range(mask.ndim)
    )
    outer: Mask = factors[0] if factors else np.ones((), dtype=bool)
    for factor in factors[1:]:
        outer = outer[..., None] & factor
    return factors if bool((outer == mask).all()) else None


def compact(array: npt.NDArray[Any], mask: Mask) -> npt.NDArray[Any]:
    """What is left of ``array`` where ``mask`` (which broadcasts against it) holds, as a box.

    Raises:
        ValueError: The mask does not compact to a box.
    """
    sizes = broadcast_box(mask, array.shape)
    if sizes is None:
        raise ValueError("the mask does not compact to a box")
    factors = separable(mask)
    if factors is not None:
        for axis, factor in enumerate(factors):
            if factor.size > 1 and not factor.all():
                array = array.compress(factor, axis=axis)
        return np.ascontiguousarray(array)
    return array[np.broadcast_to(mask, array.shape)].reshape(sizes)


def kept_count(mask: Mask, shape: tuple[int, ...]) -> int:
    """How many elements of a tensor of that shape a broadcasting mask keeps."""
    repeats = prod(full // dim for dim, full in zip(mask.shape, shape, strict=True) if dim)
    return int(mask.sum()) * int(repeats)
