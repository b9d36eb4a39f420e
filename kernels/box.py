"""Boxes: when what is left of a tensor is again a tensor.

A mask over a tensor can be compacted if all its non-empty slices along the leading axis compact to the same box, and
so on inwards. Then the rest is ``array[mask].reshape(box(mask))``, in row-major order; and because row-major order is
what Reshape keeps, compacting before or after a Reshape is the same wherever both sides are boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def by_axis(parts: Sequence[Mask]) -> dict[int, Mask] | None:
    """One mask an axis where each part depends on one axis at most; None where one depends on several.

    Weights are cut along their axes one by one, nearly always; then nothing of the weight's size need be formed.
    """
    masks: dict[int, Mask] = {}
    for part in parts:
        axes = [axis for axis, size in enumerate(part.shape) if size > 1]
        if len(axes) > 1:
            return None
        for axis in axes:
            masks[axis] = masks[axis] & part.ravel() if axis in masks else part.ravel()
        if not axes and not part.all():
            return None
    return masks


def combined(parts: Sequence[Mask]) -> Mask:
    """What all parts keep."""
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    return mask


def box_of_parts(parts: Sequence[Mask], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The box of all parts together, each of which broadcasts against ``shape``; None if there is none."""
    masks = by_axis(parts)
    if masks is None:
        return broadcast_box(combined(parts), shape)
    if not all(mask.any() for mask in masks.values()):
        return (0,) * len(shape)
    return tuple(int(masks[axis].sum()) if axis in masks else size for axis, size in enumerate(shape))


def compact(array: npt.NDArray[Any], *parts: Mask) -> npt.NDArray[Any]:
    """What is left of ``array`` where all parts (which broadcast against it) hold, as a box.

    Raises:
        ValueError: It is no box.
    """
    masks = by_axis(parts)
    if masks is None:
        whole = combined(parts)
        sizes = broadcast_box(whole, array.shape)
        if sizes is None:
            raise ValueError("the mask does not compact to a box")
        factors = separable(whole)
        if factors is None:
            return np.asarray(array[np.broadcast_to(whole, array.shape)].reshape(sizes))
        masks = {axis: factor for axis, factor in enumerate(factors) if factor.size > 1}
    for axis, mask in masks.items():
        if not mask.all():
            array = array.compress(mask, axis=axis)
    return np.ascontiguousarray(array)
