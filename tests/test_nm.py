"""N:M masks against brute force over all patterns, for every dtype and layout; laws by generated arrays."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from graphprune.kernels.nm import (
    BLOCK,
    bit_patterns,
    floor_of,
    kept,
    magnitude,
    most_nonzero,
    nm_mask,
    ranks,
    sparsify,
    unstructured_bound,
)

Array = npt.NDArray[Any]

FLOATS = [np.dtype(t) for t in ("f8", "f4", "f2", ml_dtypes.bfloat16)]
FP8 = [
    np.dtype(t)
    for t in (
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e5m2fnuz,
    )
]
INTEGERS = [np.dtype(t) for t in ("i1", "i2", "i4", "u1")]
DTYPES = FLOATS + FP8 + INTEGERS
PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 6), (3, 5), (4, 4), (1, 1), (1, 7)]


def exact(value: Any) -> Fraction | float:
    """The magnitude without rounding."""
    number = float(value)  # exact: float64 holds every dtype tested here
    return abs(Fraction(number)) if np.isfinite(number) else abs(number)


def brute_force(array: Array, n: int, m: int) -> npt.NDArray[np.bool_]:
    """The mask of the largest exact sum among all patterns; of equal ones the first in order of indices."""
    mask = np.ones(array.shape, bool)
    outer, contracted, inner = array.shape
    patterns = list(combinations(range(m), n))
    for o in range(outer):
        for g in range(contracted // m):
            for i in range(inner):
                group = [exact(v) for v in array[o, g * m : (g + 1) * m, i]]
                # Infinite magnitudes count before finite ones.
                sums = [
                    (
                        sum(group[k] == float("inf") for k in p),
                        sum(v for k in p if (v := group[k]) != float("inf")),
                    )
                    for p in patterns
                ]
                best = patterns[sums.index(max(sums))]
                mask[o, g * m : (g + 1) * m, i] = [k in best for k in range(m)]
    return mask


def is_nan(array: Array) -> npt.NDArray[np.bool_]:
    if array.dtype.kind in "iu":
        return np.zeros(array.shape, bool)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return np.isnan(array.astype(np.float64))


def from_bits(bits: Array, dtype: np.dtype[Any]) -> Array:
    """Any patterns as numbers; NaN replaced by what is left without its top bits."""
    array = bits.view(dtype).copy()
    array[is_nan(array)] = np.ones((), dtype)
    return array


@st.composite
def arrays(draw: st.DrawFn, wide: bool = False) -> Array:
    """``[outer, contracted, inner]`` of any kind of contents: all patterns, few values, half zeros, both zeros."""
    dtype = draw(st.sampled_from(DTYPES))
    inner = st.one_of(st.integers(1, 4), st.sampled_from([63, 64, 67]) if wide else st.nothing())
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 17), inner))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["patterns", "normal", "tied", "zeros", "signed zeros"]))
    if kind == "patterns":
        raw = generator.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
        return from_bits(raw.view(f"u{dtype.itemsize}")[..., 0].copy(), dtype)
    if dtype.kind in "iu":
        low = 0 if dtype.kind == "u" else -100
        array = generator.integers(low, 101, shape).astype(dtype)
    else:
        array = generator.standard_normal(shape).astype(dtype)
    if kind == "tied":
        array = generator.integers(0 if dtype.kind == "u" else -2, 3, shape).astype(dtype)
    elif kind != "normal":
        array[generator.random(shape) < 0.5] = 0
    if kind == "signed zeros" and dtype.kind not in "iu" and dtype not in FP8[1::2]:
        array[generator.random(shape) < 0.3] = np.array(-0.0).astype(dtype)
    return array


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_order_as_exact_magnitudes_do(dtype: np.dtype[Any]) -> None:
    if dtype.itemsize <= 2:  # all there are
        bits = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    else:
        generator = np.random.default_rng(0)
        bits = generator.integers(0, 256, (20000, dtype.itemsize), dtype=np.uint8)
        bits[:10000, : dtype.itemsize - 2] = 0  # denormal and tied ones as well
        bits[:100, -2:] = 0
        bits = bits.view(f"u{dtype.itemsize}")[:, 0]
    array = from_bits(bits, dtype)
    values = np.abs(array.astype(np.float64))  # exact
    found = ranks(array)
    assert found.dtype == bits.dtype
    order = np.argsort(values, kind="stable")
    with np.errstate(invalid="ignore"):  # between infinities
        steps = np.diff(values[order])
    along = found[order].astype(object)
    assert all((b > a) if step > 0 else (a == b) for a, b, step in zip(along, along[1:], steps, strict=False))


@given(arrays(), st.sampled_from(PATTERNS))
@settings(max_examples=400, deadline=None)
def test_masks_are_those_of_brute_force(array: Array, pattern: tuple[int, int]) -> None:
    n, m = pattern
    expected = brute_force(array, n, m)
    np.testing.assert_array_equal(nm_mask(ranks(array), n, m), expected)
    result = sparsify(array, n, m)
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(bit_patterns(result), np.where(expected, bit_patterns(array), 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 24, 1), (1, 24, 5), (3, 23, 9), (2, 7, 3), (2, 9, 70)], ids=str)
def test_every_dtype_in_every_layout(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(1)
    array = (generator.standard_normal(shape) * 20).astype(dtype)
    expected = brute_force(array, 2, 4)
    np.testing.assert_array_equal(
        bit_patterns(sparsify(array, 2, 4)), np.where(expected, bit_patterns(array), 0)
    )


@given(
    arrays(),
    st.integers(1, 32).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    st.integers(1, 200),
)
@settings(max_examples=300, deadline=None)
def test_laws(array: Array, pattern: tuple[int, int], block: int) -> None:
    n, m = pattern
    result = sparsify(array, n, m, block=block)
    bits = bit_patterns(result)
    np.testing.assert_array_equal(
        bits, bit_patterns(sparsify(array, n, m)), "it depends on the size of blocks"
    )
    np.testing.assert_array_equal(bits, bit_patterns(sparsify(array, n, m, threads=3, block=block)))
    np.testing.assert_array_equal(bits, bit_patterns(sparsify(result, n, m)), "it is not idempotent")
    mask = nm_mask(ranks(array), n, m, block=block)
    np.testing.assert_array_equal(bits, np.where(mask, bit_patterns(array), 0), "what stays has changed")

    outer, contracted, inner = array.shape
    full = contracted - contracted % m
    groups = mask[:, :full].reshape(outer, -1, m, inner)
    assert (groups.sum(axis=2) == n).all()
    assert mask[:, full:].all()
    nonzero = (ranks(result) != 0)[:, :full].reshape(groups.shape).sum(axis=2)
    before = (ranks(array) != 0)[:, :full].reshape(groups.shape).sum(axis=2)
    np.testing.assert_array_equal(nonzero, np.minimum(before, n))
    assert most_nonzero(result, m) == (nonzero.max() if nonzero.size else 0) <= n
    assert most_nonzero(array, m) == (before.max() if before.size else 0)

    permutation = np.random.default_rng(0).permutation(full // m)
    along = np.arange(full).reshape(-1, m)[permutation].ravel()
    shuffled = np.concatenate([array[:, along], array[:, full:]], axis=1)
    expected = np.concatenate([result[:, along], result[:, full:]], axis=1)
    np.testing.assert_array_equal(bit_patterns(sparsify(shuffled, n, m)), bit_patterns(expected))


@given(arrays(), st.sampled_from(PATTERNS))
@settings(max_examples=100, deadline=None)
def test_memory_order_does_not_matter(array: Array, pattern: tuple[int, int]) -> None:
    expected = bit_patterns(sparsify(array, *pattern))
    fortran = np.asfortranarray(array)
    np.testing.assert_array_equal(bit_patterns(sparsify(fortran, *pattern)), expected)
    wide = np.repeat(array, 2, axis=2)[:, :, ::2]
    out = np.empty((*array.shape[:2], array.shape[2] + 1), array.dtype)[:, :, 1:]
    assert sparsify(wide, *pattern, out=out) is out
    np.testing.assert_array_equal(bit_patterns(out), expected)
    sparsify(array, *pattern, out=array)
    np.testing.assert_array_equal(bit_patterns(array), expected)


@pytest.mark.parametrize("shape", [(300, 1024, 1), (1, 1024, 300), (30, 1025, 9), (1, 12, 40000)], ids=str)
def test_blocks_and_threads_at_full_size(shape: tuple[int, int, int]) -> None:
    array = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    assert array.size > 2 * BLOCK
    outer, contracted, inner = shape
    full = contracted - contracted % 4
    groups = np.abs(array[:, :full]).reshape(outer, -1, 4, inner)
    assert (np.diff(np.sort(groups, axis=2), axis=2) > 0).mean() > 0.999
    order = np.argsort(-groups, axis=2, kind="stable")
    expected = np.ones(shape, bool)
    np.put_along_axis(expected[:, :full].reshape(groups.shape), order[:, :, 2:], False, axis=2)
    expected[:, :full] = (np.argsort(order, axis=2) < 2).reshape(outer, full, inner)
    for threads in (1, 2):
        np.testing.assert_array_equal(sparsify(array, 2, 4, threads=threads), np.where(expected, array, 0))
        np.testing.assert_array_equal(nm_mask(np.abs(array), 2, 4, threads=threads), expected)


def test_scores_are_compared_as_they_are() -> None:
    scores = np.array([-5.0, 1.0, 0.5, -1.0]).reshape(1, 4, 1)
    np.testing.assert_array_equal(nm_mask(scores, 2, 4).ravel(), [False, True, True, False])
    half = scores.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(nm_mask(half, 2, 4).ravel(), [False, True, True, False])


@pytest.mark.parametrize("dtype", FLOATS + FP8, ids=str)
@pytest.mark.parametrize("place", [2, 8], ids=["in a group", "in the tail"])
def test_nan_is_refused(dtype: np.dtype[Any], place: int) -> None:
    array = np.ones((1, 9, 1), dtype)
    array[0, place, 0] = np.array(np.nan).astype(dtype)
    assert is_nan(array).sum() == 1
    for call in (lambda: sparsify(array, 2, 4), lambda: ranks(array), lambda: nm_mask(array, 2, 4)):
        with pytest.raises(ValueError, match="NaN"):
            call()
    assert most_nonzero(np.where(np.arange(9).reshape(1, 9, 1) == place, array, np.zeros((), dtype)), 4) == (
        place < 8
    )


def test_infinity_is_the_largest() -> None:
    array = np.array([np.inf, 3e38, -np.inf, 1], np.float32).reshape(1, 4, 1)
    np.testing.assert_array_equal(sparsify(array, 2, 4).ravel(), [np.inf, 0, -np.inf, 0])


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 0, 3), (2, 8, 0), (2, 3, 3)], ids=str)
def test_without_a_full_group_nothing_changes(shape: tuple[int, int, int]) -> None:
    array = np.ones(shape, np.float32)
    np.testing.assert_array_equal(sparsify(array, 2, 4), array)
    assert nm_mask(array, 2, 4).all()
    assert most_nonzero(array, 4) == 0


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (2, 33), (-1, 2)])
def test_what_is_no_pattern_is_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="no pattern"):
        sparsify(np.ones((1, 66, 1)), n, m)


def test_bad_arguments_are_refused() -> None:
    array = np.ones((1, 8, 1), np.float32)
    with pytest.raises(ValueError, match="outer, contracted, inner"):
        sparsify(array[0], 2, 4)
    with pytest.raises(ValueError, match="out is float64"):
        sparsify(array, 2, 4, out=np.ones(array.shape))
    with pytest.raises(ValueError, match="threads is 0"):
        sparsify(array, 2, 4, threads=0)
    with pytest.raises(ValueError, match="complex64"):
        sparsify(array.astype(np.complex64), 2, 4)
    with pytest.raises(ValueError, match="cannot be ordered"):
        sparsify(array.astype(">f4"), 2, 4)
    with pytest.raises(ValueError, match="density"):
        unstructured_bound(array, 1.5)


@given(arrays())
@settings(max_examples=100, deadline=None)
def test_magnitude_in_float64(array: Array) -> None:
    values = np.abs(array.astype(np.float64))
    if not np.isfinite(values.sum()):
        return
    mask = np.random.default_rng(0).random(array.shape) < 0.5
    assert magnitude(array) == pytest.approx(values.sum(), rel=1e-12)
    assert magnitude(array, mask) == pytest.approx(values[mask].sum(), rel=1e-12)
    assert 0 <= kept(array, mask) <= 1


@given(arrays(), st.sampled_from(PATTERNS))
@settings(max_examples=150, deadline=None)
def test_no_mask_keeps_more_than_the_bound(array: Array, pattern: tuple[int, int]) -> None:
    values = np.sort(np.abs(array.astype(np.float64)).ravel())[::-1]
    if not np.isfinite(values.sum()):
        return
    n, m = pattern
    bound = unstructured_bound(array, n / m)
    count = values.size * n // m
    share = values[:count].sum() / values.sum() if values.sum() else 1.0
    assert bound == pytest.approx(share, rel=1e-12)
    if array.shape[1] % m == 0:
        assert kept(array, nm_mask(ranks(array), n, m)) <= bound * (1 + 1e-12)


def test_fractions_are_meant_as_written() -> None:
    assert int(0.29 * 100) == 28
    assert floor_of(0.29, 100) == 29
    assert floor_of(0.5, 3) == 1
    assert floor_of(1 / 3, 3) == 1
    assert floor_of(0.7, 2**31) == 2**31 * 7 // 10
    assert all(floor_of(k / m, m * 1001) == k * 1001 for m in range(1, 200) for k in range(m + 1))
