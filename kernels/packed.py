"""N:M weights without their zeros: the n values of every m, and their places in a few bits each.

Arrays are ``[outer, contracted, inner]`` as everywhere. With g full groups and a tail of t elements along the middle
axis, the packed values are ``[outer, g * n + t, inner]``: n of each group in order of their places, then the tail as it
is. Their places within the groups, ``[outer, g * n, inner]`` numbers of ``ceil(log2 m)`` bits, follow each other in
row-major order, lowest bit first, and fill bytes from the lowest bit on: for 2:4 four to a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.kernels.nm import bit_patterns, nm_mask

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

#: Elements that are packed at a time, a multiple of 8.
CHUNK = 1 << 18


def index_bits(m: int) -> int:
    """Bits that a place in a group of m takes: 2 for 2:4."""
    return (m - 1).bit_length()


def packed_sizes(shape: tuple[int, int, int], n: int, m: int) -> tuple[tuple[int, int, int], int]:
    """Shape of the values and number of bytes of the indices of a packed ``[outer, contracted, inner]`` array.

    Raises:
        ValueError: The pattern is none.

    >>> packed_sizes((2, 9, 3), 2, 4)
    ((2, 5, 3), 6)
    """
    if not 1 <= n <= m <= 32:
        raise ValueError(f"{n}:{m} is no pattern: 1 <= n <= m <= 32 is wanted")
    outer, contracted, inner = shape
    groups, tail = divmod(contracted, m)
    places = outer * groups * n * inner
    return (outer, groups * n + tail, inner), -(-places * index_bits(m) // 8)


def _to_bits(places: Bytes, bits: int) -> Bytes:
    """Numbers of so many bits each, one after another in bytes."""
    flat = places.reshape(-1, 1)
    packed = np.empty(-(-len(flat) * bits // 8), np.uint8)
    for start in range(0, len(flat), CHUNK):  # a multiple of 8 numbers, so that chunks begin with a byte
        part = flat[start : start + CHUNK]
        at = start * bits // 8
        each = np.packbits(np.unpackbits(part, axis=1, count=bits, bitorder="little"), bitorder="little")
        packed[at : at + len(each)] = each
    return packed


def _from_bits(packed: Bytes, bits: int, count: int) -> Bytes:
    places = np.zeros(count, np.uint8)
    for start in range(0, count if bits else 0, CHUNK):
        stop = min(start + CHUNK, count)
        part = packed[start * bits // 8 : -(-stop * bits // 8)]
        each = np.unpackbits(part, count=(stop - start) * bits, bitorder="little").reshape(-1, bits)
        places[start:stop] = np.packbits(each, axis=1, bitorder="little")[:, 0]
    return places


def pack(array: Array, n: int, m: int) -> tuple[Array, Bytes]:
    """Leave out what n:m says is zero.

    Where a group has fewer than n nonzeros, zeros are kept as well, those with the lowest index.

    Args:
        array: ``[outer, contracted, inner]``, any dtype of 1, 2, 4 or 8 bytes, NaN included.
        n, m: 1 <= n <= m <= 32.

    Returns:
        Values ``[outer, groups * n + tail, inner]`` in the array's dtype, and indices, uint8 ``[bytes]``.

    Raises:
        ValueError: A group has more than n elements other than +0 (-0 is one: it could not be restored), or an argument
            does not fit.

    >>> values, indices = pack(np.array([0, 5, 0, 7], np.int8).reshape(1, 4, 1), 2, 4)
    >>> values.ravel(), indices
    (array([5, 7], dtype=int8), array([13], dtype=uint8))
    """
    if array.ndim != 3:
        raise ValueError(f"an array of shape {array.shape} where [outer, contracted, inner] is wanted")
    outer, contracted, inner = array.shape
    (_, length, _), _ = packed_sizes((outer, contracted, inner), n, m)
    groups = contracted // m
    values = np.empty((outer, length, inner), array.dtype)
    places = np.empty((outer, groups * n, inner), np.uint8)
    values[:, groups * n :] = array[:, groups * m :]
    numbers = np.arange(m, dtype=np.uint8)
    for rows, start, stop in _strips((outer, groups, m, inner)):
        part = array[rows, start * m : stop * m]
        filled = bit_patterns(part) != 0
        stays = nm_mask(filled, n, m)
        if (filled & ~stays).any():
            raise ValueError(
                f"a group of {m} has more than {n} elements other than +0: it does not hold {n}:{m}"
            )
        stays, part = _places_last(stays, m), _places_last(part, m)
        to, shape = slice(start * n, stop * n), (*part.shape[:3], n)
        _places_last(values[rows, to], n)[...] = part[stays].reshape(shape)
        _places_last(places[rows, to], n)[...] = np.broadcast_to(numbers, stays.shape)[stays].reshape(shape)
    return values, _to_bits(places, index_bits(m))


def _strips(shape: tuple[int, int, int, int]) -> Iterator[tuple[slice, int, int]]:
    """Parts of ``[outer, groups, m, inner]`` of about `CHUNK` elements: rows, and from which group to which."""
    outer, groups, m, inner = shape
    deep = max(CHUNK // max(m * inner, 1), 1)
    high = max(CHUNK // max(m * inner * groups, 1), 1)
    for row in range(0, outer if inner else 0, high):
        for start in range(0, groups, deep):
            yield slice(row, row + high), start, min(start + deep, groups)


def _places_last(strip: Array, size: int) -> Array:
    """``[rows, groups, inner, size]`` view of a strip ``[rows, groups * size, inner]``."""
    rows, length, inner = strip.shape
    return np.swapaxes(strip.reshape(rows, length // size, size, inner), 2, 3)


def unpack(values: Array, indices: Bytes, shape: tuple[int, int, int], n: int, m: int) -> Array:
    """The array that :func:`pack` was given, to the bit.

    Args:
        values, indices: What it returned.
        shape: ``(outer, contracted, inner)`` of the array.
        n, m: The pattern.

    Raises:
        ValueError: They do not fit each other, or the places of a group do not ascend within it.
    """
    wanted, size = packed_sizes(shape, n, m)
    if values.shape != wanted or indices.shape != (size,) or indices.dtype != np.uint8:
        raise ValueError(
            f"values {values.shape} and indices {indices.dtype} {indices.shape} where {n}:{m} of {shape} has "
            f"{wanted} and uint8 {(size,)}"
        )
    outer, contracted, inner = shape
    groups = contracted // m
    array = np.zeros(shape, values.dtype)
    array[:, groups * m :] = values[:, groups * n :]
    places = _from_bits(indices, index_bits(m), outer * groups * n * inner).reshape(outer, groups * n, inner)
    for rows, start, stop in _strips((outer, groups, m, inner)):
        of = slice(start * n, stop * n)
        which = _places_last(places[rows, of], n)
        if (which[..., -1] >= m).any() or (which[..., 1:] <= which[..., :-1]).any():
            raise ValueError(
                f"the indices of a group do not ascend from 0 to {m - 1}: the packed form is damaged"
            )
        target = _places_last(array[rows, start * m : stop * m], m)
        np.put_along_axis(target, which.astype(np.intp), _places_last(values[rows, of], n), axis=3)
    return array
