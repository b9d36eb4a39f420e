"""Selection by reconstruction error, against brute force and against what an optimum must satisfy."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from graphprune.kernels.selection import contributions, lasso_knots, lasso_path, thinet

Array = npt.NDArray[np.float64]


def outputs_by_unit(x: Array, weight: Array, unit_of: npt.NDArray[np.int64], units: int) -> Array:
    """What each unit contributes, ``[units, samples, outputs]``, by running each alone."""
    return np.stack([(x * (unit_of == unit)) @ weight for unit in range(units)])


def gram_of(seed: int, units: int, samples: int = 30) -> Array:
    """The Gram matrix of random contributions that overlap."""
    rng = np.random.default_rng(seed)
    y = (
        rng.standard_normal((units, samples)) @ rng.standard_normal((samples, samples))
        + rng.standard_normal()
    )
    return np.asarray(y @ y.T)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_contributions_by_running_each_unit_alone(
    seed: int, units: int, each: int, outputs: int, unowned: int
) -> None:
    rng = np.random.default_rng(seed)
    unit_of = rng.permutation(np.r_[np.repeat(np.arange(units), each), np.full(unowned, -1)])
    x, weight = rng.standard_normal((11, len(unit_of))), rng.standard_normal((len(unit_of), outputs))
    y = outputs_by_unit(x, weight, unit_of, units).reshape(units, -1)
    np.testing.assert_allclose(contributions(x.T @ x, weight, unit_of), y @ y.T, rtol=1e-9, atol=1e-9)


def test_contributions_in_small_blocks_and_with_units_that_have_no_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    unit_of = np.array([3, 0, 3, 0, 1, 1, 3])
    x, weight = rng.standard_normal((9, 7)), rng.standard_normal((7, 4))
    y = outputs_by_unit(x, weight, unit_of, 5).reshape(5, -1)
    monkeypatch.setattr("graphprune.kernels.selection.BLOCK", 10)
    found = contributions((x.T @ x).astype(np.float32), weight, unit_of, 5)
    np.testing.assert_allclose(found, y @ y.T, rtol=1e-5, atol=1e-5)
    assert not found[4].any()
    assert contributions(np.ones((2, 2)), np.ones((2, 1)), np.array([-1, -1]), 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_thinet_takes_the_unit_that_leaves_the_least(seed: int) -> None:
    C = gram_of(seed, 7)
    order, errors = thinet(C)
    gone: list[int] = []
    for unit, error in zip(order.tolist(), errors.tolist(), strict=True):
        by_next = {i: C[np.ix_([*gone, i], [*gone, i])].sum() for i in range(7) if i not in gone}
        assert by_next[unit] == pytest.approx(min(by_next.values()), rel=1e-9)
        assert error == pytest.approx(by_next[unit], rel=1e-9, abs=1e-9)
        gone.append(unit)
    assert sorted(gone) == list(range(7))


def test_thinet_sees_that_two_units_cancel() -> None:
    y = np.array([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, 0, 2]])
    order, errors = thinet(y @ y.T)
    best = min(
        float(np.square(y[list(pair)].sum(axis=0)).sum()) for pair in itertools.combinations(range(4), 2)
    )
    assert best == 0
    assert order.tolist() == [2, 3, 0, 1]  # greedy: cancelling pairs are found once the single ones are gone
    np.testing.assert_allclose(errors, [1, 5, 14, 5])


def check_optimal(C: Array, b: Array, penalty: float, slack: float = 1e-7) -> None:
    """At any optimum the gradient is balanced where b is not zero, and too small to move it where it is."""
    gradient = 2 * C @ (b - 1)
    slack *= 2 * float(np.abs(C.sum(axis=1)).max())
    assert (np.abs(gradient) <= penalty + slack).all()
    np.testing.assert_allclose(gradient[b != 0], -penalty * np.sign(b[b != 0]), atol=slack)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 30))
def test_path_satisfies_the_optimality_conditions(seed: int, units: int, samples: int) -> None:
    """At every knot and between them; with fewer samples than units some units depend on others."""
    C = gram_of(seed, units, samples)
    knots = list(lasso_knots(C))
    assert knots[0].penalty == pytest.approx(2 * float(np.abs(C.sum(axis=1)).max()))
    assert not knots[0].scales.any()
    assert knots[-1].penalty <= knots[0].penalty * 1e-5 * (1 + 1e-9)
    for knot in knots:
        check_optimal(C, knot.scales, knot.penalty)
    for before, after in itertools.pairwise(knots):
        assert before.penalty >= after.penalty
        check_optimal(C, (before.scales + after.scales) / 2, (before.penalty + after.penalty) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_path_against_a_general_optimiser(seed: int) -> None:
    C = gram_of(seed, 6)
    knots = list(lasso_knots(C))
    penalty = 0.1 * knots[0].penalty

    def objective(split: Array) -> float:
        b = split[:6] - split[6:]  # positive and negative part: the 1-norm is smooth there
        return float((1 - b) @ C @ (1 - b) + penalty * split.sum())

    def gradient(split: Array) -> Array:
        g = 2 * C @ (split[:6] - split[6:] - 1)
        return np.asarray(np.r_[g + penalty, -g + penalty])

    result = minimize(
        objective,
        np.full(12, 0.1),
        jac=gradient,
        bounds=[(0, None)] * 12,
        options={"ftol": 1e-15, "gtol": 1e-12},
    )
    before, after = next((a, b) for a, b in itertools.pairwise(knots) if b.penalty <= penalty)
    share = (before.penalty - penalty) / (before.penalty - after.penalty)
    b = before.scales + share * (after.scales - before.scales)
    assert objective(np.r_[np.maximum(b, 0), np.maximum(-b, 0)]) == pytest.approx(result.fun, rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_score_is_the_penalty_that_a_unit_withstands(seed: int) -> None:
    C = gram_of(seed, 8)
    scores, knots = lasso_path(C), list(lasso_knots(C))
    for unit, score in enumerate(scores):
        seen = [a.penalty for a, b in itertools.pairwise(knots) if a.scales[unit] or b.scales[unit]]
        assert score == pytest.approx(max(seen))


def test_independent_units_withstand_twice_their_energy() -> None:
    energy = np.array([5.0, 1.0, 3.0, 0.0, 3.0])
    np.testing.assert_allclose(lasso_path(np.diag(energy)), 2 * energy, rtol=1e-12)


def test_path_keeps_one_of_two_copies() -> None:
    rng = np.random.default_rng(3)
    y = rng.standard_normal((5, 40))
    y = np.concatenate([y, y[:1]])
    scores = lasso_path(y @ y.T)
    assert min(scores[0], scores[5]) == 0 < max(scores[0], scores[5])
    assert (scores[1:5] > 0).all()


def test_units_that_never_come_in_are_ranked_by_what_is_left_of_them() -> None:
    scores = lasso_path(np.diag([1.0, 1e-6, 3e-6, 0.0]))
    assert scores[0] > scores[2] > scores[1] > scores[3] == 0


def test_nothing_contributes() -> None:
    assert lasso_path(np.zeros((3, 3))).tolist() == [0, 0, 0]
    assert lasso_path(np.zeros((0, 0))).tolist() == []
    order, errors = thinet(np.zeros((2, 2)))
    assert sorted(order.tolist()) == [0, 1]
    assert errors.tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(6))
def test_path_through_copies_and_sums_in_float32(seed: int) -> None:
    """Channels behind a ReLU, some copied or dead, and a Gram matrix that rounding left indefinite."""
    rng = np.random.default_rng(seed)
    y = np.maximum(rng.standard_normal((60, 40)) + 1, 0)
    y = np.concatenate([y, y[:30], np.zeros((5, 40))]).astype(np.float32)
    C = (y @ y.T).astype(np.float64)
    assert np.linalg.eigvalsh(C)[0] < 0
    for knot in lasso_knots(C):
        check_optimal(C, knot.scales, knot.penalty, slack=1e-5)
    scores = lasso_path(C)
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()
    assert not scores[90:].any()
