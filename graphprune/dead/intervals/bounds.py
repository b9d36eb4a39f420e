"""Bounds: between which values each element of a tensor lies, whatever the model's inputs are.

Arithmetic on bounds is outward: floating-point addition and multiplication are monotone in each operand, so that the
rounded result of an op lies between the rounded results at the ends of its operands' intervals, whatever the order of
summation (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., sections 2.2 and 4.2). An end is
computed in float64 and moved outward by what the runtime may round: see :func:`slack`.

An element that comes out the same for all inputs is *fixed*, and its value is known apart from the interval, because
the interval of a fixed element has the width of its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: Bounds with more elements than this are joined along their longest axis.
MAX_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Bounds:
    """What is known of a tensor's elements.

    The three arrays have one shape, of the tensor's rank, that broadcasts against the tensor's: an axis has size 1
    where nothing depends on it.

    Attributes:
        lo, hi: float64; every element lies in [lo, hi], as the runtime rounds it. Infinite where nothing is known.
        value: float64; what an element is for all inputs, up to rounding; NaN where that is not known.
        finite: No element is infinite or NaN because of a constant that is. (Inputs are assumed to be finite, and the
            model not to overflow on them.)
    """

    lo: Floats
    hi: Floats
    value: Floats
    finite: bool = True

    @cached_property
    def zero(self) -> Bools:
        """Which elements are zero for all inputs, exactly; none where zero times an element might be NaN."""
        return np.asarray((self.lo == 0) & (self.hi == 0))

    @cached_property
    def fixed(self) -> Bools:
        """Which elements are the same for all inputs, up to rounding."""
        return np.asarray(~np.isnan(self.value))

    @property
    def ndim(self) -> int:
        return self.lo.ndim

    def each(self, move: Callable[[Floats], Floats]) -> Bounds:
        """The same elements elsewhere: a move applied to the three arrays."""
        return Bounds(move(self.lo), move(self.hi), move(self.value), self.finite)

    def reshape(self, shape: Sequence[int]) -> Bounds:
        """The three arrays in another shape of as many elements."""
        return self.each(lambda array: array.reshape(shape))


def bounds(lo: Floats, hi: Floats, value: Floats | None = None, *, finite: bool = True) -> Bounds:
    """Bounds in normal form: one shape, no NaN at the ends, size 1 where nothing varies.

    Args:
        lo, hi: Ends; NaN counts as infinite.
        value: What fixed elements are; NaN elsewhere. Where the ends meet, that is the value.
        finite: See :class:`Bounds`.
    """
    if value is None:
        value = np.full((1,) * lo.ndim, np.nan)
    shape = np.broadcast_shapes(lo.shape, hi.shape, value.shape)
    lo = np.where(np.isnan(lo), -np.inf, lo)
    hi = np.where(np.isnan(hi), np.inf, hi)
    value = np.where(lo == hi, lo, value)
    whole = Bounds(
        np.broadcast_to(lo, shape), np.broadcast_to(hi, shape), np.broadcast_to(value, shape), finite
    )
    return normal(whole)


def unknown(rank: int, *, finite: bool = True) -> Bounds:
    """Bounds that say nothing."""
    shape = (1,) * rank
    return Bounds(np.full(shape, -np.inf), np.full(shape, np.inf), np.full(shape, np.nan), finite)


def between(rank: int, lo: float, hi: float, *, finite: bool = True) -> Bounds:
    """All elements lie in one interval."""
    shape = (1,) * rank
    return bounds(np.full(shape, lo), np.full(shape, hi), finite=finite)


def exactly(array: npt.NDArray[np.generic]) -> Bounds:
    """The bounds of a constant."""
    real = np.asarray(array, dtype=np.float64)
    return bounds(real, real, real, finite=bool(np.isfinite(real).all()))


def hull(parts: Sequence[Bounds]) -> Bounds:
    """An element is that of any of the parts."""
    first = parts[0]
    lo, hi, value = first.lo, first.hi, first.value
    for part in parts[1:]:
        lo, hi = np.minimum(lo, part.lo), np.maximum(hi, part.hi)
        value = np.where(value == part.value, value, np.nan)
    return bounds(lo, hi, value, finite=all(part.finite for part in parts))


def along(part: Bounds, axes: Sequence[int]) -> Bounds:
    """An element is any along the axes, which have size 1 in the result."""
    axes = tuple(axis for axis in axes if part.lo.shape[axis] > 1)
    if not axes:
        return part
    value = part.value.max(axis=axes, keepdims=True)  # NaN where any is
    value = np.where(part.value.min(axis=axes, keepdims=True) == value, value, np.nan)
    return bounds(
        part.lo.min(axis=axes, keepdims=True),
        part.hi.max(axis=axes, keepdims=True),
        value,
        finite=part.finite,
    )


def slack(magnitude: Floats, eps: float, terms: float) -> Floats:
    """How far rounding may move a sum: ``terms * eps`` of the sum of its terms' magnitudes.

    Higham (2002), section 4.2: the error of a sum of n terms in any order is at most ``(n - 1) u / (1 - (n - 1) u)`` of
    the sum of their magnitudes, and each product adds one rounding. ``eps`` is twice u, which covers the denominator.
    """
    return magnitude * (eps * terms)


def widened(lo: Floats, hi: Floats, eps: float, units: float) -> tuple[Floats, Floats]:
    """Ends moved outward by so many units of their own precision; a zero stays zero."""
    with np.errstate(invalid="ignore"):
        return lo - np.abs(lo) * (eps * units), hi + np.abs(hi) * (eps * units)


def normal(part: Bounds) -> Bounds:
    """Bounds in normal form (see :func:`bounds`)."""
    return _limited(_compressed(part))


def _compressed(part: Bounds) -> Bounds:
    lo, hi, value = part.lo, part.hi, part.value
    for axis, size in enumerate(lo.shape):
        if size < 2:
            continue
        head = (slice(None),) * axis + (slice(0, 1),)
        same = (
            bool((lo == lo[head]).all())
            and bool((hi == hi[head]).all())
            and bool(((value == value[head]) | (np.isnan(value) & np.isnan(value[head]))).all())
        )
        if same:
            lo, hi, value = lo[head], hi[head], value[head]
    if lo is part.lo:
        return part
    return Bounds(lo.copy(), hi.copy(), value.copy(), part.finite)


def _limited(part: Bounds) -> Bounds:
    while prod(part.lo.shape) > MAX_ELEMENTS:
        part = along(part, [int(np.argmax(part.lo.shape))])
    return part
