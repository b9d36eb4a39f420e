"""Gram matrices gathered in a stream, against float64 over all samples at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.kernels.gram import ROWS, GramAccumulator, damped_factor

Array = npt.NDArray[Any]


def samples(
    n: int, d: int, m: int, *, mean: float, seed: int, dtype: type = np.float64
) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = mean + rng.standard_normal((n, d))
    y = 3 * mean + x @ rng.standard_normal((d, m)) + 0.1 * rng.standard_normal((n, m))
    return x.astype(dtype), y.astype(dtype)


def assert_sums(gram: GramAccumulator, x: Array, y: Array, rtol: float) -> None:
    """Every accessor against its definition in float64; each sum against the scale of its terms."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    n = len(x)
    assert gram.count == n
    dx, dy = x - x.mean(axis=0), y - y.mean(axis=0)
    raw, centred = gram.moments(centred=False), gram.moments(centred=True)
    for got, wanted in (
        (gram.x, x.sum(axis=0)),
        (gram.y, y.sum(axis=0)),
        (gram.xx, x.T @ x),
        (gram.xy, x.T @ y),
        (gram.yy, (y * y).sum(axis=0)),
        (raw.xx, x.T @ x),
        (raw.xy, x.T @ y),
        (raw.yy, (y * y).sum(axis=0)),
        (centred.xx, dx.T @ dx),
        (centred.xy, dx.T @ dy),
        (centred.yy, (dy * dy).sum(axis=0)),
        (centred.x, x.mean(axis=0)),
        (centred.y, y.mean(axis=0)),
        (gram.covariance(), dx.T @ dx / n),
    ):
        assert np.allclose(got, wanted, rtol=0, atol=rtol * max(1e-9, float(np.abs(wanted).max())))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(sum),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0.0, 10.0]),
    st.integers(0, 99),
)
@settings(deadline=None)
def test_sums_whatever_the_blocks(blocks: list[int], d: int, m: int, mean: float, seed: int) -> None:
    x, y = samples(sum(blocks), d, m, mean=mean, seed=seed)
    gram = GramAccumulator(d, m)
    start = 0
    for rows in blocks:
        gram.add(x[start : start + rows], y[start : start + rows])
        start += rows
    assert_sums(gram, x, y, 1e-12)


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 99))
@settings(deadline=None)
def test_merging_is_seeing_both(n: int, more: int, seed: int) -> None:
    x, y = samples(n + more, 3, 2, mean=5.0, seed=seed)
    first, second = GramAccumulator(3, 2), GramAccumulator(3, 2)
    first.add(x[:n], y[:n])
    second.add(x[n:], y[n:])
    before = second.xx.copy()
    both = first.copy()
    both.merge(second)
    if n + more:
        assert_sums(both, x, y, 1e-12)
    assert first.count == n
    assert np.array_equal(second.xx, before)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("order", ["C", "F"])
def test_float32_blocks_are_good_to_six_digits(mean: float, order: Any) -> None:
    x, y = samples(3 * ROWS + 17, 20, 3, mean=mean, seed=1, dtype=np.float32)
    gram = GramAccumulator(20, 3)
    gram.add(np.asarray(x, order=order), np.asarray(y, order=order))
    assert_sums(gram, x, y, 2e-6)


def test_float32_drowns_without_the_shift() -> None:
    """What the shift is for: raw float32 products of the same data have lost the deviations."""
    x, _ = samples(ROWS, 20, 1, mean=1000.0, seed=1, dtype=np.float32)
    exact = np.cov(x.astype(np.float64).T, bias=True)
    mean = x.mean(axis=0, dtype=np.float64)
    raw = (x.T @ x).astype(np.float64) / len(x) - np.outer(mean, mean)
    gram = GramAccumulator(20)
    gram.add(x)
    assert np.abs(raw - exact).max() > 1e-2
    assert np.abs(gram.covariance() - exact).max() < 1e-5


def test_nothing_seen() -> None:
    gram = GramAccumulator(2, 1)
    assert not gram.covariance().any()
    assert not gram.moments(centred=True).yy.any()


@pytest.mark.parametrize(
    ("x", "y"),
    [((4, 3), None), ((4, 2), (4, 1)), ((4, 3), (3, 1)), ((4, 3), (4, 2)), ((3,), (3, 1))],
)
def test_shapes_that_do_not_fit(x: tuple[int, ...], y: tuple[int, ...] | None) -> None:
    with pytest.raises(ValueError, match="is gathered"):
        GramAccumulator(3, 1).add(np.zeros(x), None if y is None else np.zeros(y))


def test_outputs_that_nobody_gathers() -> None:
    with pytest.raises(ValueError, match="is gathered"):
        GramAccumulator(3).add(np.zeros((4, 3)), np.zeros((4, 0)))


def test_statistics_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="do not merge"):
        GramAccumulator(3).merge(GramAccumulator(4))


def test_factor_of_a_damped_gram() -> None:
    x, _ = samples(40, 6, 1, mean=0.0, seed=0)
    gram = x.T @ x
    untouched = gram.copy()
    factor, penalty = damped_factor(gram, 0.1)
    assert penalty == pytest.approx(0.1 * np.trace(gram) / 6)
    assert np.allclose(factor @ factor.T, gram + penalty * np.eye(6))
    assert np.array_equal(gram, untouched)


@pytest.mark.parametrize("tilt", [0.0, 1e-7])
def test_factor_where_rounding_has_left_no_positive_matrix(tilt: float) -> None:
    x, _ = samples(5, 30, 1, mean=0.0, seed=0)  # rank 5 of 30
    gram = x.T @ x - tilt * np.trace(x.T @ x) / 30 * np.eye(30)
    factor, penalty = damped_factor(gram, 0.0)
    assert tilt * np.trace(gram) / 30 <= penalty <= 1e-4 * np.trace(gram) / 30
    assert np.allclose(factor @ factor.T, gram + penalty * np.eye(30), atol=1e-10)


def test_factor_of_zeros() -> None:
    factor, penalty = damped_factor(np.zeros((3, 3)), 0.1)
    assert np.array_equal(factor, np.eye(3))
    assert penalty == 1.0


@pytest.mark.parametrize("where", [(0, 0), (1, 0)])
def test_factor_of_what_is_not_finite(where: tuple[int, int]) -> None:
    gram = np.eye(3)
    gram[where] = gram[where[::-1]] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        damped_factor(gram, 0.1)
