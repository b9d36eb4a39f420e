"""The packed form and its file: exact round trips, and nothing that a damaged file can do."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from graphprune.kernels.nm import bit_patterns, nm_mask
from graphprune.kernels.packed import index_bits, pack, packed_sizes, unpack

Array = npt.NDArray[Any]

DTYPES = [
    np.dtype(t)
    for t in (
        *("f8", "f4", "f2", ml_dtypes.bfloat16),
        *(
            ml_dtypes.float8_e4m3fn,
            ml_dtypes.float8_e4m3fnuz,
            ml_dtypes.float8_e5m2,
            ml_dtypes.float8_e5m2fnuz,
        ),
        *("i1", "i4", "u1"),
    )
]
PATTERNS = st.integers(1, 32).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m)))


@st.composite
def sparse_bits(draw: st.DrawFn, pattern: tuple[int, int]) -> Array:
    """Any bit patterns, NaN and -0 included, of which n of each m (or fewer) are not +0."""
    n, m = pattern
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.tuples(st.integers(0, 4), st.integers(0, 70), st.integers(0, 5)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits = generator.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    if draw(st.booleans()):
        bits[..., :-1] = 0
        bits[..., -1] &= 0x80  # zeros of both signs
    bits = np.ascontiguousarray(bits).view(f"u{dtype.itemsize}")[..., 0]
    bits[generator.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.9]))] = 0
    mask = nm_mask(generator.random(shape), n, m)
    return np.where(mask, bits, 0).astype(bits.dtype).view(dtype)


@given(st.data(), PATTERNS)
@settings(max_examples=300, deadline=None)
def test_round_trip_is_exact_to_the_bit(data: st.DataObject, pattern: tuple[int, int]) -> None:
    array = data.draw(sparse_bits(pattern))
    values, indices = pack(array, *pattern)
    shape: tuple[int, int, int] = array.shape
    assert values.dtype == array.dtype
    assert (values.shape, indices.size) == packed_sizes(shape, *pattern)
    restored = unpack(values, indices, shape, *pattern)
    assert restored.dtype == array.dtype
    np.testing.assert_array_equal(bit_patterns(restored), bit_patterns(array))


@pytest.mark.parametrize("shape", [(3, 1_400_002, 1), (1, 514, 4096), (700, 96, 9)], ids=str)
def test_large_arrays_go_in_strips(shape: tuple[int, int, int]) -> None:
    array = np.random.default_rng(0).integers(1, 100, shape).astype(np.int8)
    array[~nm_mask(array, 3, 5)] = 0
    np.testing.assert_array_equal(unpack(*pack(array, 3, 5), shape, 3, 5), array)


def test_indices_are_bits_from_the_lowest_on() -> None:
    array = np.zeros((1, 12, 1), np.float32)
    array[0, [1, 3, 6, 7, 8, 10], 0] = [1, 2, 3, 4, 5, 6]
    values, indices = pack(array, 2, 4)
    np.testing.assert_array_equal(values.ravel(), [1, 2, 3, 4, 5, 6])
    expected = [1, 3, 2, 3, 0, 2]
    number = sum(place << (2 * k) for k, place in enumerate(expected))
    assert int.from_bytes(indices.tobytes(), "little") == number
    assert [index_bits(m) for m in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32)] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_values_follow_the_layout() -> None:
    array = np.array([[1, 0], [0, 2], [3, 4], [5, 6]], np.int8).reshape(1, 4, 2)
    array[0, 2] = 0
    values, indices = pack(array, 2, 4)
    np.testing.assert_array_equal(values, [[[1, 2], [5, 6]]])
    assert indices.tolist() == [0 | 1 << 2 | 3 << 4 | 3 << 6]


def test_what_cannot_be_restored_is_refused() -> None:
    for extra in (1.0, -0.0, np.nan):
        array = np.array([1, extra, 2, 0], np.float32).reshape(1, 4, 1)
        with pytest.raises(ValueError, match="does not hold 2:4"):
            pack(array, 2, 4)
    with pytest.raises(ValueError, match="no pattern"):
        pack(array, 5, 4)
    with pytest.raises(ValueError, match="outer, contracted, inner"):
        pack(array[0], 2, 4)


@pytest.mark.parametrize(("n", "m", "byte"), [(2, 4, 0b0101), (2, 4, 0b0001), (2, 3, 0b1100)])
def test_damaged_indices_are_refused(n: int, m: int, byte: int) -> None:
    with pytest.raises(ValueError, match="damaged"):
        unpack(np.ones((1, n, 1)), np.array([byte], np.uint8), (1, m, 1), n, m)


def test_parts_that_do_not_fit_are_refused() -> None:
    values, indices = pack(np.ones((1, 4, 1), np.float32), 4, 4)
    bad: tuple[tuple[Array, Array], ...] = (
        (values[:, 1:], indices),
        (values, indices[:0]),
        (values, indices.astype(np.int16)),
    )
    for some, others in bad:
        with pytest.raises(ValueError, match="where 4:4 of"):
            unpack(some, others, (1, 4, 1), 4, 4)
