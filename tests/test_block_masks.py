"""Masks of blocks and without a pattern, against loops."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from graphprune.kernels.block_masks import Outputs, fraction_block_mask, nm_block_mask, unstructured_mask
from graphprune.kernels.nm import floor_of, nm_mask

Array = npt.NDArray[Any]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Outputs, int, int]:
    """Scores, where their outputs lie, and the rows and columns of a block."""
    axis = draw(st.sampled_from([0, 2]))
    before, count, step = draw(st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 3)))
    contracted, other = draw(st.integers(1, 13)), draw(st.integers(1, 3))
    side = before * count * step
    shape = (side, contracted, other) if axis == 0 else (other, contracted, side)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        scores = generator.standard_normal(shape).astype(np.float32)
    else:
        scores = generator.integers(-2, 3, shape).astype(np.int8)
    return scores, Outputs(axis, count, step), draw(st.integers(1, 4)), draw(st.integers(1, 4))


def members(shape: tuple[int, ...], outputs: Outputs) -> dict[tuple[int, ...], dict[tuple[int, int], Any]]:
    """By position of everything else: by output and contracted element, the index into the array."""
    found: dict[tuple[int, ...], dict[tuple[int, int], Any]] = {}
    for index in np.ndindex(*shape):
        place, other = index[outputs.axis], index[2 - outputs.axis]
        output = place // outputs.step % outputs.count
        rest = (place // outputs.step // outputs.count, place % outputs.step)
        key = (*rest, other) if outputs.axis == 0 else (other, *rest)
        found.setdefault(key, {})[output, index[1]] = index
    return found


def blocks_of(scores: Array, outputs: Outputs, rows: int, cols: int) -> dict[tuple[int, ...], list[Any]]:
    """``(row, column, *rest)`` of each whole block: the indices of its elements."""
    result = {}
    for rest, at in members(scores.shape, outputs).items():
        for row in range(outputs.count // rows):
            for col in range(scores.shape[1] // cols):
                result[(row, col, *rest)] = [
                    at[row * rows + i, col * cols + j] for i in range(rows) for j in range(cols)
                ]
    return result


@given(cases(), st.sampled_from([(1, 2), (2, 4), (2, 3), (1, 1)]))
@settings(max_examples=200, deadline=None)
def test_nm_of_blocks(case: tuple[Array, Outputs, int, int], pattern: tuple[int, int]) -> None:
    scores, outputs, rows, cols = case
    n, m = pattern
    blocks = blocks_of(scores, outputs, rows, cols)
    expected = np.ones(scores.shape, bool)
    total = {key: sum(abs(float(scores[i])) for i in indices) for key, indices in blocks.items()}
    wide = scores.shape[1] // cols
    for row, col, *rest in blocks:
        if col % m == 0 and col + m <= wide:
            group = [(row, c, *rest) for c in range(col, col + m)]
            for key in sorted(group, key=lambda k: -round(total[k], 9))[
                n:
            ]:  # sorted() keeps the order of ties
                for index in blocks[key]:
                    expected[index] = False
    np.testing.assert_array_equal(nm_block_mask(scores, n, m, rows, cols, outputs), expected)


@given(cases(), st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.7, 1.0]))
@settings(max_examples=200, deadline=None)
def test_fraction_of_blocks(case: tuple[Array, Outputs, int, int], fraction: float) -> None:
    scores, outputs, rows, cols = case
    blocks = blocks_of(scores, outputs, rows, cols)
    total = {key: sum(abs(float(scores[i])) for i in indices) for key, indices in blocks.items()}
    order = sorted(blocks)  # by output, contracted element, rest
    order.sort(key=lambda k: -round(total[k], 9))
    expected = np.ones(scores.shape, bool)
    count = floor_of(fraction, len(blocks))
    for key in order[len(order) - count :]:
        for index in blocks[key]:
            expected[index] = False
    np.testing.assert_array_equal(fraction_block_mask(scores, fraction, rows, cols, outputs), expected)


@pytest.mark.parametrize("axis", [0, 2])
def test_blocks_of_one_element_are_plain_masks(axis: int) -> None:
    scores = np.abs(np.random.default_rng(0).standard_normal((6, 17, 8)))
    outputs = Outputs(axis, 2)
    np.testing.assert_array_equal(nm_block_mask(scores, 2, 4, 1, 1, outputs), nm_mask(scores, 2, 4))
    np.testing.assert_array_equal(
        fraction_block_mask(scores, 0.7, 1, 1, outputs), unstructured_mask(scores, 0.7)
    )


def test_large_weights_go_in_strips() -> None:
    scores = np.random.default_rng(0).standard_normal((1024, 2048, 1)).astype(np.float32)
    mask = nm_block_mask(scores, 1, 2, 4, 1, Outputs(0, 1024))
    sums = np.abs(scores[..., 0].astype(np.float64)).reshape(256, 4, 1024, 2).sum(axis=1)
    expected = np.repeat(np.stack([sums[..., 0] >= sums[..., 1], sums[..., 0] < sums[..., 1]], -1), 4, axis=0)
    np.testing.assert_array_equal(mask[..., 0].reshape(expected.shape), expected)


@given(
    st.lists(st.integers(0, 5), max_size=60),
    st.sampled_from([0.0, 0.1, 0.29, 1 / 3, 0.5, 0.999, 1.0]),
    st.sampled_from([np.uint8, np.float64, ml_dtypes.bfloat16]),
)
@settings(max_examples=200, deadline=None)
def test_unstructured_removes_exactly_the_fraction(values: list[int], fraction: float, dtype: Any) -> None:
    mask = unstructured_mask(np.array(values, dtype), fraction)
    count = floor_of(fraction, len(values))
    order = sorted(range(len(values)), key=lambda i: -values[i])
    expected = np.ones(len(values), bool)
    expected[order[len(values) - count :]] = False
    np.testing.assert_array_equal(mask, expected)


def test_bad_arguments_are_refused() -> None:
    scores = np.ones((4, 8, 2))
    outputs = Outputs(0, 4)
    with pytest.raises(ValueError, match="does not hold 3 outputs"):
        nm_block_mask(scores, 1, 2, 2, 1, Outputs(0, 3))
    with pytest.raises(ValueError, match="no place for outputs"):
        nm_block_mask(scores, 1, 2, 2, 1, Outputs(1, 4))
    with pytest.raises(ValueError, match="positive"):
        nm_block_mask(scores, 1, 2, 0, 1, outputs)
    with pytest.raises(ValueError, match="no pattern"):
        nm_block_mask(scores, 3, 2, 1, 1, outputs)
    with pytest.raises(ValueError, match="give 0 to 1"):
        fraction_block_mask(scores, -0.1, 1, 1, outputs)
    with pytest.raises(ValueError, match="outer, contracted, inner"):
        nm_block_mask(scores[0], 1, 2, 1, 1, outputs)
    scores[1, 1, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        nm_block_mask(scores, 1, 2, 2, 1, outputs)
    with pytest.raises(ValueError, match="NaN"):
        unstructured_mask(scores, 0.5)
