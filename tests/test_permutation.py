"""The search for channel permutations: its prices against brute force, its result against the whole matrix."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.kernels.permutation import _Block, comparators, kept_by_stripe, search_permutation

Array = npt.NDArray[Any]

patterns = st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (2, 3), (5, 7), (16, 32)])


def kept(matrix: Array, n: int, m: int) -> float:
    """What an N:M mask keeps, by sorting every group."""
    groups = np.abs(matrix.astype(np.float64)).reshape(len(matrix), matrix.shape[1] // m, m)
    return float(np.sort(groups, axis=-1)[..., m - n :].sum())


def gap_closed(matrix: Array, n: int, m: int, found: float) -> float:
    """The part of the way from the unpermuted mask to the best mask without a pattern."""
    flat = np.sort(np.abs(matrix.astype(np.float64)).ravel())
    bound = float(flat[flat.size - flat.size * n // m :].sum())
    before = kept(matrix, n, m)
    return (found - before) / (bound - before)


def normal(rows: int, columns: int, seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("m", range(1, 33))
def test_sorting_network_sorts(m: int) -> None:
    """Every order of zeros and ones, so every order (Knuth's zero-one principle); random ones where those are many."""
    if m <= 12:
        values = np.asarray(list(itertools.product([0.0, 1.0], repeat=m)), dtype=np.float32)
    else:
        values = np.random.default_rng(m).standard_normal((2000, m)).astype(np.float32)
    for i, j in comparators(m):
        values[:, [i, j]] = np.sort(values[:, [i, j]], axis=1)
    assert (np.diff(values, axis=1) >= 0).all()


@given(patterns, st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_kept_by_stripe(pattern: tuple[int, int], stripes: int, rows: int, seed: int) -> None:
    n, m = pattern
    matrix = normal(rows, stripes * m, seed)
    columns = np.ascontiguousarray(np.abs(matrix).T).reshape(stripes, m, rows)
    by_hand = [kept(matrix[:, i * m : (i + 1) * m], n, m) for i in range(stripes)]
    assert kept_by_stripe(columns, n) == pytest.approx(by_hand)


@given(patterns, st.integers(2, 4), st.integers(1, 6), st.integers(0, 99), st.booleans())
@settings(deadline=None)
def test_table_prices_every_swap(
    pattern: tuple[int, int], stripes: int, rows: int, seed: int, ties: bool
) -> None:
    """Against making each swap, before and after some swaps were made."""
    n, m = pattern
    matrix = normal(rows, stripes * m, seed)
    if ties:
        matrix = np.round(matrix)
    block = _Block(np.ascontiguousarray(np.abs(matrix).T), n, m)
    random = np.random.default_rng(seed)
    for _ in range(2):
        gains = block.gains()
        now = kept(matrix[:, block.order], n, m)
        for _ in range(20):
            a, b = random.integers(0, stripes * m, 2)
            if a // m == b // m:
                assert gains[a, b] == -np.inf
                continue
            order = block.order.copy()
            order[[a, b]] = order[[b, a]]
            assert gains[a, b] == pytest.approx(kept(matrix[:, order], n, m) - now, abs=1e-4)
        block.swap([(0, m)])


@given(patterns, st.integers(1, 6), st.integers(0, 8), st.integers(0, 99), st.integers(0, 3))
@settings(deadline=None)
def test_search_gives_a_permutation_that_is_never_worse(
    pattern: tuple[int, int], stripes: int, rows: int, seed: int, sweeps: int
) -> None:
    n, m = pattern
    matrix = np.round(normal(rows, stripes * m, seed), 1)
    before = matrix.copy()
    order, value = search_permutation(matrix, n, m, sweeps=sweeps, seed=seed)
    assert (matrix == before).all()
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(stripes * m))
    assert value == pytest.approx(kept(matrix[:, order], n, m))
    assert value >= kept(matrix, n, m) - 1e-6 * abs(value)


def test_search_depends_on_the_seed_only() -> None:
    matrix = normal(32, 64, 0)
    one, other = (search_permutation(matrix, 2, 4, sweeps=20, seed=5)[0] for _ in range(2))
    assert (one == other).all()
    assert not (one == search_permutation(matrix, 2, 4, sweeps=20, seed=6)[0]).all()


@pytest.mark.parametrize("seed", range(4))
def test_search_finds_the_best_of_small_matrices(seed: int) -> None:
    """8 columns have 35 ways to be two stripes of 4, 6 columns 15 ways to be three of 2."""
    for n, m, columns in ((2, 4, 8), (1, 2, 6), (1, 3, 6)):
        matrix = normal(5, columns, seed)
        best = max(kept(matrix[:, list(p)], n, m) for p in itertools.permutations(range(columns)))
        assert search_permutation(matrix, n, m, sweeps=40)[1] == pytest.approx(best)


@pytest.mark.parametrize("seed", range(10))
def test_gap_on_gaussian_weights(seed: int) -> None:
    """64 x 128, 2:4: at least 35 % of the gap to unstructured, by greedy swaps alone; annealing adds to it."""
    matrix = normal(64, 128, seed)
    greedy = gap_closed(matrix, 2, 4, search_permutation(matrix, 2, 4, sweeps=1)[1])
    annealed = gap_closed(matrix, 2, 4, search_permutation(matrix, 2, 4, sweeps=60)[1])
    assert 0.35 < greedy <= annealed
    assert annealed > 0.45


def test_columns_of_unequal_size_are_spread() -> None:
    """All large columns in the first half: N:M throws half of them away, and need not."""
    matrix = np.abs(normal(16, 64, 1)) + np.where(np.arange(64) < 32, 10, 0).astype(np.float32)
    order, value = search_permutation(matrix, 2, 4, sweeps=1)
    assert ((order < 32).reshape(-1, 4).sum(axis=1) == 2).all()
    assert value >= 10 * 32 * 16


def test_wide_matrices_are_searched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stripe is met, though no table holds all of them."""
    from graphprune.kernels import permutation

    matrix = normal(64, 256, 2)
    monkeypatch.setattr(permutation, "TABLE_WORK", 64 * 64 * 64)
    order, value = search_permutation(matrix, 2, 4, sweeps=12)
    assert value == pytest.approx(kept(matrix[:, order], 2, 4))
    assert (order != np.arange(256)).reshape(-1, 4).any(axis=1).mean() > 0.9
    assert gap_closed(matrix, 2, 4, value) > 0.35


def test_time_limit_and_progress() -> None:
    heard: list[float] = []
    start = time.perf_counter()
    search_permutation(normal(64, 128, 0), 2, 4, seconds=0.2, progress=heard.append)
    assert time.perf_counter() - start < 2
    assert heard == sorted(heard)
    assert heard[-1] == 1


@pytest.mark.parametrize(
    ("shape", "n", "m", "limits"),
    [
        ((4, 10), 2, 4, {"sweeps": 1}),
        ((4,), 2, 4, {"sweeps": 1}),
        ((4, 8), 5, 4, {"sweeps": 1}),
        ((4, 8), 0, 4, {"sweeps": 1}),
        ((4, 8), 2, 4, {}),
    ],
)
def test_bad_arguments(shape: tuple[int, ...], n: int, m: int, limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"pattern|stripes|limit"):
        search_permutation(np.zeros(shape), n, m, **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    matrix = normal(4, 8, 0)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        search_permutation(matrix, 2, 4, sweeps=1)


def test_half_precision_and_nothing_to_do() -> None:
    import ml_dtypes

    matrix = normal(8, 16, 0).astype(ml_dtypes.bfloat16)
    order, value = search_permutation(matrix, 2, 4, sweeps=2)
    assert value == pytest.approx(kept(matrix.astype(np.float32)[:, order], 2, 4))
    for n, m, shape in ((4, 4, (3, 8)), (2, 4, (3, 4)), (2, 4, (0, 8)), (2, 4, (3, 0))):
        order, _ = search_permutation(normal(*shape, 0), n, m, sweeps=3)
        assert (order == np.arange(shape[1])).all()
