"""N:M masks: the n largest of every m consecutive weights along a contracted axis, exactly and at the speed of memory.

Arrays are ``[outer, contracted, inner]``; groups of m run along the middle axis, and what is left over at its end,
``contracted % m`` elements, stays dense. Magnitudes are compared by bit pattern: with its sign bit cleared, a float of
any IEEE-like format is an integer that orders as its magnitude does, so no format is ever rounded to another.

An element stays when it *wins* against at least m - n others of its group; of two equals the one with the lower index
wins. In memory the opponents i and i + d of all groups lie the same distance apart, so one comparison of an array with
itself, shifted, decides them all: m - 1 comparisons of contiguous memory decide everything, for any n, m and layout.
Work goes in blocks that stay in the cache from the magnitudes to the masked copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import floor, prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Slices: TypeAlias = tuple[slice, slice, slice, slice]

#: Largest m: wins are counted in bytes, and indices within a group fit five bits.
LARGEST_M = 32
#: Elements of a block: their magnitudes, wins and mask lie in a second-level cache together.
BLOCK = 1 << 17
#: Runs of inner that are worth being rearranged.
STRIPE = 64


@dataclass(frozen=True, slots=True)
class _Format:
    """How the bits of a number give its magnitude.

    Attributes:
        magnitude: Bits of the magnitude of a float; None for integers, which are two's complement if ``signed``.
        largest: Rank above which a pattern is no number.
        nan: The one pattern that is no number, in formats that use negative zero for it.
    """

    magnitude: int | None = None
    largest: int | None = None
    nan: int | None = None
    signed: bool = False

    @property
    def compared(self) -> str:
        """Kind of integer to compare ranks as: where the top bit is clear, signed ones, which are faster on AVX2."""
        return "u" if self.magnitude is None else "i"


# IEEE 754-2019; bfloat16; OCP 8-bit Floating Point Specification 1.0 for e4m3fn (no infinity, S.1111.111 is NaN)
# and e5m2 (as IEEE); Noune et al., 8-bit Numerical Formats for Deep Neural Networks, 2022, for fnuz (-0 is NaN).
_FORMATS = {
    "float64": _Format(0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "float32": _Format(0x7FFF_FFFF, 0x7F80_0000),
    "float16": _Format(0x7FFF, 0x7C00),
    "bfloat16": _Format(0x7FFF, 0x7F80),
    "float8_e4m3fn": _Format(0x7F, 0x7E),
    "float8_e5m2": _Format(0x7F, 0x7C),
    "float8_e4m3fnuz": _Format(0x7F, nan=0x80),
    "float8_e5m2fnuz": _Format(0x7F, nan=0x80),
    **{f"int{bits}": _Format(signed=True) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": _Format() for bits in (8, 16, 32, 64)},
}


def _format(dtype: np.dtype[Any]) -> _Format:
    found = _FORMATS.get(dtype.name)
    if found is None or not dtype.isnative:
        raise ValueError(f"magnitudes of {dtype} cannot be ordered; of these they can: {', '.join(_FORMATS)}")
    return found


def bit_patterns(array: Array) -> Array:
    """The same memory as unsigned integers of the elements' size."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _ranks_into(bits: Array, form: _Format, out: Array) -> None:
    """Write ranks of bit patterns (any strides) into unsigned integers of their shape.

    Raises:
        ValueError: There is a NaN.
    """
    signed = np.dtype(f"i{bits.dtype.itemsize}")
    bad: bool | np.bool_ = False
    if form.magnitude is None:
        if form.signed:
            np.absolute(
                bits.view(signed), out=out.view(signed)
            )  # |-128| wraps to -128, which is 128 unsigned
        else:
            np.copyto(out, bits)
        return
    np.bitwise_and(bits, np.array(form.magnitude, bits.dtype), out=out)
    if form.nan is not None:
        bad = (bits == form.nan).any()
    elif form.largest is not None and out.size:
        bad = out.view(signed).max() > form.largest
    if bad:
        raise ValueError("there is a NaN among the weights, whose magnitude has no order")


def ranks(array: Array) -> Array:
    """Unsigned integers of the array's shape and item size that order as the magnitudes of its elements do.

    Equal magnitudes have equal ranks (-0 and 0 as well) and larger ones larger ranks, exactly: no arithmetic is done.

    Args:
        array: float64/32/16, bfloat16, float8 e4m3fn, e4m3fnuz, e5m2, e5m2fnuz (of ml_dtypes), or integers.

    Raises:
        ValueError: There is a NaN, or the dtype is none of these.

    >>> ranks(np.array([-128, 127, 0, -1], dtype=np.int8))
    array([128, 127,   0,   1], dtype=uint8)
    """
    bits = bit_patterns(array)
    out = np.empty(array.shape, bits.dtype)
    _ranks_into(bits, _format(array.dtype), out)
    return out


def _check(array: Array, n: int, m: int) -> None:
    if array.ndim != 3:
        raise ValueError(f"an array of shape {array.shape} where [outer, contracted, inner] is wanted")
    if not 1 <= n <= m <= LARGEST_M:
        raise ValueError(f"{n}:{m} is no pattern: 1 <= n <= m <= {LARGEST_M} is wanted")


def _groups(array: Array, m: int, whole: bool) -> Array:
    """``[a, b, m, inner]`` view of the full groups; all of them along b if ``whole``: contiguous and without a tail."""
    outer, contracted, inner = array.shape
    if whole:
        return array.reshape(1, outer * (contracted // m), m, inner)
    return array[:, : contracted - contracted % m].reshape(outer, contracted // m, m, inner)


def _whole(m: int, *arrays: Array) -> bool:
    return all(array.shape[1] % m == 0 and array.flags.c_contiguous for array in arrays)


def _blocks(shape: tuple[int, ...], elements: int) -> list[Slices]:
    """Parts of ``[a, b, m, inner]`` that have about so many elements; no group is cut."""
    a, b, m, inner = shape
    width = min(max(elements // m, 1), inner)
    deep = min(max(elements // (m * width), 1), b) if width == inner else 1
    high = min(max(elements // (m * width * deep), 1), a) if deep == b else 1
    return [
        (slice(i, min(i + high, a)), slice(j, min(j + deep, b)), slice(0, m), slice(k, min(k + width, inner)))
        for i in range(0, a, high)
        for j in range(0, b, deep)
        for k in range(0, inner, width)
    ]


def _elements(part: Slices) -> int:
    return prod(cut.stop - cut.start for cut in part)


@lru_cache(maxsize=16)
def _places(size: int, distance: int, m: int) -> tuple[Array, tuple[Mask, ...]]:
    """Each element's place in its group, and which of those so far apart as 1, 2, ... m - 1 places share one.

    The latter is empty where there is one group only. Kept: a stream has thousands of blocks of one size.
    """
    place = (np.arange(size) // distance % m).astype(np.uint8)
    if size <= m * distance:
        return place, ()
    return place, tuple(place[: size - d * distance] < m - d for d in range(1, m))


class _Tournament:
    """Decides blocks of one size, whose neighbours lie ``distance`` apart.

    Args:
        n, m: The pattern.
        distance: From an element to the next of its group.
        scores: ``[groups * m * distance]`` where the scores will lie.
    """

    def __init__(self, n: int, m: int, distance: int, scores: Array) -> None:
        size = len(scores)
        # An element has won against all before it, until comparisons say otherwise.
        self.start, inside = _places(size, distance, m)
        self.wins, self.mask = np.empty(size, np.uint8), np.empty(size, np.bool_)
        self.least = np.uint8(m - n)
        beats = np.empty(size, np.bool_)
        self.rounds: list[tuple[Array, Array, Array, Mask | None, Array, Array]] = []
        for d in range(1, m):
            pairs = slice(0, size - d * distance), slice(d * distance, size)
            valid = inside[d - 1] if inside else None
            first, second = (self.wins[p] for p in pairs)
            self.rounds.append((scores[pairs[0]], scores[pairs[1]], beats[pairs[0]], valid, first, second))

    def play(self) -> Mask:
        """The mask of what lies in the scores; the next call overwrites it."""
        np.copyto(self.wins, self.start)
        for first, second, beats, valid, first_wins, second_wins in self.rounds:
            np.greater_equal(first, second, out=beats)
            if valid is not None:
                np.bitwise_and(beats, valid, out=beats)
            counted = beats.view(np.uint8)
            np.add(first_wins, counted, out=first_wins)
            np.subtract(second_wins, counted, out=second_wins)
        return np.greater_equal(self.wins, self.least, out=self.mask)


class _Tournaments:
    """Memory for blocks, and their masks; each thread has its own.

    Where inner is long, a block ``[a, b, m, width]`` lies as ``[m, a, b, width]``: then no comparison is of elements of
    different groups. Where it is short, rearranging would cost more than those.

    Args:
        n, m: The pattern.
        parts: The blocks that will come.
        dtype: What their ranks or scores are held in.
    """

    def __init__(self, n: int, m: int, parts: list[Slices], dtype: npt.DTypeLike) -> None:
        self.n, self.m = n, m
        self.buffer = np.empty(max(map(_elements, parts)), dtype)
        self._games: dict[tuple[int, ...], _Tournament] = {}

    @staticmethod
    def _arranged(flat: Array, shape: tuple[int, ...]) -> Array:
        a, b, m, width = shape
        if width < STRIPE:
            return flat.reshape(shape)
        return flat.reshape(m, a, b, width).transpose(1, 2, 0, 3)

    def scores(self, shape: tuple[int, ...]) -> Array:
        """Where to write the ranks or scores of a block of that shape."""
        return self._arranged(self.buffer[: prod(shape)], shape)

    def mask(self, shape: tuple[int, ...]) -> Mask:
        """The mask of what lies in :meth:`scores`; the next call overwrites it."""
        game = self._games.get(shape)
        if game is None:
            a, b, _, width = shape
            distance = width if width < STRIPE else a * b * width
            game = self._games[shape] = _Tournament(self.n, self.m, distance, self.buffer[: prod(shape)])
        return self._arranged(game.play(), shape)


def _in_threads(work: Callable[[list[Slices]], None], parts: list[Slices], threads: int) -> None:
    """Run it over shares of the parts, each in a thread of its own."""
    if threads < 1:
        raise ValueError(f"threads is {threads}; give a positive number")
    threads = min(threads, len(parts))
    if threads == 1:
        work(parts)
        return
    shares = [parts[i * len(parts) // threads : (i + 1) * len(parts) // threads] for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, shares))


def nm_mask(scores: Array, n: int, m: int, *, threads: int = 1, block: int = BLOCK) -> Mask:
    """Keep the n largest of every m scores along the middle axis, ties by the lowest index; the tail stays.

    Args:
        scores: ``[outer, contracted, inner]`` ranks (:func:`ranks`) or scores such as Wanda's, the larger the better;
            integers or floats, compared as they are (not by magnitude).
        n, m: At most n of m consecutive ones stay, 1 <= n <= m <= 32.
        threads: NumPy releases the lock while it compares, so that many blocks go at once.
        block: Elements that are decided at a time.

    Returns:
        ``[outer, contracted, inner]``; exactly n of each full group and all of the ``contracted % m`` last ones.

    Raises:
        ValueError: There is a NaN, or the pattern or the shape is none.

    >>> nm_mask(np.array([3, 1, 3, 3, 9]).reshape(1, 5, 1), 2, 4).ravel()
    array([ True, False,  True, False,  True])
    """
    _check(scores, n, m)
    if scores.dtype.kind == "V":  # of ml_dtypes: float32 holds them all
        scores = scores.astype(np.float32)
    if scores.dtype.kind not in "biuf":
        raise ValueError(f"scores of {scores.dtype} have no order; give integers or floats")
    if scores.dtype.kind == "f" and np.isnan(scores).any():
        raise ValueError("there is a NaN among the scores, which has no order")
    mask = np.ones(scores.shape, np.bool_)
    whole = _whole(m, scores)
    read, write = _groups(scores, m, whole), _groups(mask, m, whole)

    def work(parts: list[Slices]) -> None:
        games = _Tournaments(n, m, parts, scores.dtype)
        for part in parts:
            source = read[part]
            np.copyto(games.scores(source.shape), source)
            write[part] = games.mask(source.shape)

    if read.size and n < m:
        _in_threads(work, _blocks(read.shape, block), threads)
    return mask


def sparsify(
    array: Array, n: int, m: int, *, out: Array | None = None, threads: int = 1, block: int = BLOCK
) -> Array:
    """Zero all but the n largest magnitudes of every m along the middle axis, ties by the lowest index.

    What stays keeps its bits, the tail of ``contracted % m`` elements included; the others become +0.

    Args:
        array: ``[outer, contracted, inner]`` of a dtype of :func:`ranks`; any strides.
        n, m: 1 <= n <= m <= 32.
        out: Written to, of the array's shape and dtype; it may be the array itself, and must not overlap it otherwise.
            After an error its contents are undefined.
        threads: NumPy releases the lock while it works, so that many blocks go at once.
        block: Elements that go from magnitudes to the masked copy at a time.

    Returns:
        ``out``, or a new array.

    Raises:
        ValueError: There is a NaN, or the pattern, the shape or the dtype is none.

    >>> sparsify(np.array([3.0, -1.0, -3.0, 3.0, 9.0]).reshape(1, 5, 1), 2, 4).ravel()
    array([ 3.,  0., -3.,  0.,  9.])
    """
    _check(array, n, m)
    bits, form = bit_patterns(array), _format(array.dtype)
    if out is None:
        out = np.empty(array.shape, array.dtype)
    elif out.shape != array.shape or out.dtype != array.dtype:
        raise ValueError(f"out is {out.dtype} {out.shape} where {array.dtype} {array.shape} is wanted")
    target = bit_patterns(out)
    whole = _whole(m, array, out)
    read, write = _groups(bits, m, whole), _groups(target, m, whole)

    def work(parts: list[Slices]) -> None:
        games = _Tournaments(n, m, parts, np.dtype(f"{form.compared}{array.dtype.itemsize}"))
        for part in parts:
            source = read[part]
            _ranks_into(source, form, games.scores(source.shape).view(bits.dtype))
            # False is 0 and True is 1: integer arithmetic on bit patterns leaves +0 or the pattern.
            np.multiply(source, games.mask(source.shape), out=write[part])

    full = array.shape[1] - array.shape[1] % m
    tail = bits[:, full:]
    _ranks_into(tail, form, np.empty(tail.shape, bits.dtype))
    target[:, full:] = tail
    if read.size:
        _in_threads(work, _blocks(read.shape, block), threads)
    return out


def _chunks(array: Array, elements: int = 1 << 20) -> Iterator[tuple[slice, slice]]:
    """Parts of ``[outer, contracted, inner]`` of about so many elements, cut along the first two axes."""
    outer, contracted, inner = array.shape
    deep = max(elements // max(inner, 1), 1)
    high = max(elements // max(contracted * inner, 1), 1)
    for i in range(0, outer, high):
        for j in range(0, contracted, deep):
            yield slice(i, i + high), slice(j, j + deep)


def most_nonzero(array: Array, m: int) -> int:
    """The largest number of nonzeros in any full group of m: the n of the n:m that truly holds.

    Args:
        array: ``[outer, contracted, inner]`` of a dtype of :func:`ranks`. A NaN is no zero; -0 is one. The tail of
            ``contracted % m`` elements does not count.
        m: 1 <= m <= 32.

    Raises:
        ValueError: The shape, m or the dtype is none.

    >>> most_nonzero(np.array([1, 0, 0, -2, 5, 5, 5]).reshape(1, 7, 1), 4)
    2
    """
    _check(array, m, m)
    form = _format(array.dtype)
    bits = bit_patterns(array)
    groups = _groups(bits, m, _whole(m, array))
    most = 0
    for part in _blocks(groups.shape, BLOCK) if groups.size else []:
        block = groups[part]
        if form.nan is None and form.magnitude is not None:
            block = np.bitwise_and(block, form.magnitude)
        count = np.zeros(block[:, :, 0].shape, np.uint8)
        for i in range(m):
            count += block[:, :, i] != 0
        most = max(most, int(count.max()))
        if most == m:
            break
    return most


def magnitude(array: Array, mask: Mask | None = None) -> float:
    """Sum of the absolute values of what a mask keeps, or of all, in float64.

    Args:
        array: ``[outer, contracted, inner]``, any real dtype.
        mask: Of its shape.
    """
    total = 0.0
    for part in _chunks(array):
        values = np.abs(array[part].astype(np.float64))
        total += float(values.sum() if mask is None else values.sum(where=mask[part]))
    return total


def kept(array: Array, mask: Mask) -> float:
    """Share of the magnitude that a mask keeps; 1 for an array of zeros."""
    whole = magnitude(array)
    return magnitude(array, mask) / whole if whole else 1.0


def floor_of(fraction: float, size: int) -> int:
    """``floor(fraction * size)`` of the fraction that is meant: .29 of 100 is 29, though the float is a bit less."""
    product = fraction * size
    nearest = round(product)
    return nearest if abs(product - nearest) <= 4 * np.finfo(np.float64).eps * nearest else floor(product)


def unstructured_bound(array: Array, density: float) -> float:
    """The largest share of the magnitude that any mask of that density keeps: what no pattern can exceed.

    Args:
        array: ``[outer, contracted, inner]`` of a dtype of :func:`ranks`, finite.
        density: A mask keeps at most ``floor(density * size)`` elements; 0 to 1.

    Returns:
        0 to 1; 1 for an array of zeros.

    Raises:
        ValueError: There is a NaN, or the density or the dtype is none.

    >>> unstructured_bound(np.array([4.0, -3.0, 2.0, 1.0]).reshape(1, 4, 1), 0.5)
    0.7
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density:g}; give 0 to 1")
    whole = magnitude(array)
    if not whole:
        return 1.0
    order = ranks(array).ravel()
    count = floor_of(density, order.size)
    if 0 < count < order.size:
        order.partition(order.size - count)
    largest = order[order.size - count :]
    # Without its sign bit a float's rank is the pattern of its magnitude; an integer's rank is the magnitude.
    values = largest if _format(array.dtype).magnitude is None else largest.view(array.dtype)
    return min(magnitude(values.reshape(1, -1, 1)) / whole, 1.0)
