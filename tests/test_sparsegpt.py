"""SparseGPT against Optimal Brain Surgeon by explicit inverses, and against all masks there are."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.kernels.sparsegpt import inverse_factor, largest_of_groups, sparsegpt, wanda_scores

Array = npt.NDArray[Any]


def problem(features: int, outputs: int, seed: int = 0, samples: int = 80) -> tuple[Array, Array, Array]:
    """A weight, correlated inputs of unequal scales, and their Gram matrix."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, features)) @ (
        np.eye(features) + 0.6 * rng.standard_normal((features,) * 2)
    )
    x *= rng.lognormal(0, 0.7, features)
    return rng.standard_normal((features, outputs)), x, x.T @ x


def lost(change: Array, hessian: Array) -> Array:
    """``[outputs]`` what the outputs lose."""
    return np.asarray(np.einsum("dm,de,em->m", change, hessian, change))


def damped(hessian: Array, damping: float) -> Array:
    return np.asarray(hessian + damping * np.trace(hessian) / len(hessian) * np.eye(len(hessian)))


def surgeon(weight: Array, hessian: Array, n: int, groups: list[list[int]], one_by_one: bool) -> Array:
    """One output pruned group by group; what is passed is frozen, and the Hessian of what is left inverted anew."""
    weight = weight.astype(np.float64).copy()
    left = [feature for group in groups for feature in group]
    left += [feature for feature in range(len(weight)) if feature not in left]
    for group in groups:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        places = [left.index(feature) for feature in group]
        if one_by_one:
            # The paper's score: the inverse's diagonal once the features before, and those of the group, are passed.
            scores = []
            for feature in group:
                behind = left[left.index(feature) :]
                scores.append(weight[feature] ** 2 / np.linalg.inv(hessian[np.ix_(behind, behind)])[0, 0])
            gone = sorted(np.argsort(-np.array(scores), kind="stable")[n:].tolist())
            for number, feature in enumerate(group):
                if number in gone:
                    now = np.linalg.inv(hessian[np.ix_(left, left)])
                    weight[left] -= now[:, 0] * weight[feature] / now[0, 0]
                    weight[feature] = 0.0
                left.remove(feature)
            continue
        best, change = np.inf, np.zeros(len(left))
        for pruned in combinations(range(len(group)), len(group) - n):
            rows = [places[i] for i in pruned]
            if not rows:
                best = 0.0
                continue
            solved = np.linalg.solve(inverse[np.ix_(rows, rows)], weight[[left[row] for row in rows]])
            cost = float(weight[[left[row] for row in rows]] @ solved)
            if cost < best:
                best, change, lost_rows = cost, -inverse[:, rows] @ solved, rows
        weight[left] += change
        if best > 0:
            weight[[left[row] for row in lost_rows]] = 0.0
        left = [feature for feature in left if feature not in group]
    return weight


PATTERNS = [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 3)]


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("block", [4, 8, 128])
def test_it_is_optimal_brain_surgery_in_order(n: int, m: int, block: int, one_by_one: bool) -> None:
    weight, _, hessian = problem(18, 3)
    new, mask = sparsegpt(weight, hessian, n, m, damping=0.01, block=block, one_by_one=one_by_one)
    groups = [list(range(at, at + m)) for at in range(0, 18 - 18 % m, m)]
    for output in range(3):
        wanted = surgeon(weight[:, output], damped(hessian, 0.01), n, groups, one_by_one)
        np.testing.assert_allclose(new[:, output], wanted, rtol=0, atol=1e-9 * abs(weight).max())
        assert np.array_equal(mask[:, output], wanted != 0)


def test_features_of_a_group_may_lie_apart() -> None:
    """A convolution's groups run along the channels; taps lie between them."""
    weight, _, hessian = problem(15, 4, seed=3)
    groups = np.array([[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
    new, mask = sparsegpt(weight, hessian, 2, 4, groups=groups)
    order = np.r_[groups.ravel(), 12, 13, 14]
    there, kept = sparsegpt(weight[order], hessian[np.ix_(order, order)], 2, 4)
    np.testing.assert_allclose(new[order], there, rtol=0, atol=1e-12)
    assert np.array_equal(mask[order], kept)
    assert mask[12:].all()
    assert not np.array_equal(new[12:], weight[12:])  # dense features make up for what goes


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (5, 8)])
def test_one_group_is_pruned_in_the_best_way_there_is(n: int, m: int) -> None:
    """Against least squares on the samples for every mask; dense features behind the group are fitted too."""
    weight, x, hessian = problem(m + 3, 5, seed=1)
    new, mask = sparsegpt(weight, hessian, n, m, groups=np.arange(m)[None], damping=0.0)
    for output in range(5):
        wanted = x @ weight[:, output]
        errors = {}
        for kept in combinations(range(m), n):
            columns = [*kept, *range(m, m + 3)]
            fitted = scipy.linalg.lstsq(x[:, columns], wanted)[0]
            errors[kept] = float(np.sum((x[:, columns] @ fitted - wanted) ** 2))
        best = min(errors, key=lambda kept: errors[kept])
        assert tuple(np.flatnonzero(mask[:m, output])) == best
        found = float(lost(new[:, [output]] - weight[:, [output]], hessian)[0])
        assert found == pytest.approx(errors[best], rel=1e-6)


def test_too_many_ways_are_judged_one_by_one() -> None:
    weight, _, hessian = problem(32, 2, seed=2)
    first, second = (sparsegpt(weight, hessian, 8, 16, one_by_one=flag)[0] for flag in (False, True))
    assert np.array_equal(first, second)


@given(
    st.sampled_from([*PATTERNS, (4, 4)]),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(0, 999),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_laws(pattern: tuple[int, int], features: int, outputs: int, seed: int, one_by_one: bool) -> None:
    """At most n of every m stay, the tail stays, what goes is zero; unchanged outputs where nothing has to go."""
    n, m = pattern
    weight, _, hessian = problem(features, outputs, seed, samples=1 + seed % 40)
    new, mask = sparsegpt(weight, hessian, n, m, one_by_one=one_by_one)
    assert new.dtype == np.float64
    assert np.isfinite(new).all()
    assert (new[~mask] == 0).all()
    whole = features - features % m
    assert (mask[:whole].reshape(-1, m, outputs).sum(axis=1) == n).all()
    assert mask[whole:].all()
    if n == m or features < m:
        assert np.array_equal(new, weight)


@given(st.integers(0, 999), st.sampled_from([0.0, 0.5]))
@settings(max_examples=40, deadline=None)
def test_no_output_loses_more_than_by_the_same_mask_uncorrected(seed: int, damping: float) -> None:
    """Each group is made up for in the best way, given those before: the damped loss only falls below zeroing's.

    Zeroing loses w_S^T H_SS w_S over all that goes, cross terms between groups included, so the law is stated where it
    holds: for the first group alone.
    """
    weight, _, hessian = problem(12, 6, seed)
    groups = np.arange(4)[None]
    new, mask = sparsegpt(weight, hessian, 2, 4, groups=groups, damping=damping)
    objective = damped(hessian, damping)
    by_magnitude = largest_of_groups(abs(weight), 2, groups)
    found = lost(new - weight, objective)
    for zeroed in (mask, by_magnitude):
        assert (found <= lost(np.where(zeroed, 0.0, -weight), objective) * (1 + 1e-9)).all()


@pytest.mark.parametrize("seed", range(5))
def test_much_less_is_lost_than_by_magnitude(seed: int) -> None:
    weight, _, hessian = problem(64, 48, seed, samples=400)
    groups = np.arange(64).reshape(-1, 4)
    by_magnitude = largest_of_groups(abs(weight), 2, groups)
    zeroed = lost(np.where(by_magnitude, 0.0, weight), hessian).sum()
    single, joint = (
        lost(sparsegpt(weight, hessian, 2, 4, one_by_one=flag)[0] - weight, hessian).sum()
        for flag in (True, False)
    )
    assert joint < single < 0.7 * zeroed


def test_without_correlations_it_is_magnitude_over_scale() -> None:
    """A diagonal Hessian: nothing makes up for anything, and the score is w^2 times the diagonal."""
    rng = np.random.default_rng(0)
    weight, diagonal = rng.standard_normal((16, 7)), rng.uniform(0.1, 3, 16)
    groups = np.arange(16).reshape(-1, 4)
    wanted = largest_of_groups(weight**2 * diagonal[:, None], 2, groups)
    for one_by_one in (False, True):
        new, mask = sparsegpt(weight, np.diag(diagonal), 2, 4, damping=0.0, one_by_one=one_by_one)
        assert np.array_equal(mask, wanted)
        np.testing.assert_allclose(new, np.where(wanted, weight, 0), rtol=0, atol=1e-12)
    assert np.array_equal(largest_of_groups(wanda_scores(weight, diagonal), 2, groups), wanted)


def test_inputs_that_are_always_zero() -> None:
    weight = np.arange(1.0, 9.0).reshape(8, 1)
    new, mask = sparsegpt(weight, np.zeros((8, 8)), 2, 4)
    assert np.array_equal(mask.ravel(), [False, False, True, True] * 2)
    assert np.array_equal(new, weight * mask)
    hessian = np.diag([0.0, 4.0, 0.0, 4.0, 1.0, 1.0, 0.0, 0.0])
    _, mask = sparsegpt(weight, hessian, 2, 4)
    assert np.array_equal(mask.ravel(), [False, True, False, True, True, True, False, False])


def test_equals_go_by_their_place() -> None:
    for one_by_one in (False, True):
        _, mask = sparsegpt(np.ones((8, 2)), np.eye(8), 2, 4, one_by_one=one_by_one)
        assert np.array_equal(mask, np.tile([[True], [True], [False], [False]], (2, 2)))


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_inverse_factor(damping: float) -> None:
    _, _, hessian = problem(9, 1)
    factor = inverse_factor(hessian, damping)
    assert np.array_equal(factor, np.triu(factor))
    objective = damped(hessian, damping)
    for start in range(9):
        part = factor[start:, start:]
        np.testing.assert_allclose(part.T @ part @ objective[start:, start:], np.eye(9 - start), atol=1e-8)


def test_masks_of_groups_against_all_patterns() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (14, 9)).astype(np.float64)  # many equals
    groups = rng.permutation(14)[:12].reshape(3, 4)
    mask = largest_of_groups(scores, 2, groups)
    for group, output in product(groups, range(9)):
        best = max(
            combinations(range(4), 2),
            key=lambda kept: (scores[group[list(kept)], output].sum(), [-k for k in kept]),
        )
        assert np.flatnonzero(mask[group, output]).tolist() == list(best)
    assert mask[np.setdiff1d(np.arange(14), groups)].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": np.eye(7)}, "a Hessian of shape"),
        ({"n": 5}, "5 of every 4"),
        ({"n": 0}, "0 of every 4"),
        ({"groups": np.array([[0, 1, 2]])}, "where .groups, 4. is expected"),
        ({"groups": np.array([[0, 1, 2, 2]])}, "share no feature"),
        ({"groups": np.array([[0, 1, 2, 8]])}, "lie in 0 to 7"),
        ({"matrix": np.full((8, 1), np.nan)}, "a weight that is not finite"),
        ({"hessian": np.full((8, 8), np.inf)}, "not finite"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"matrix": np.ones((8, 1)), "hessian": np.eye(8), "n": 2, "m": 4, **change}
    with pytest.raises(ValueError, match=message):
        sparsegpt(**arguments)


def test_wanda_scores() -> None:
    weight, x, hessian = problem(6, 3)
    scores = wanda_scores(weight, np.diagonal(hessian))
    for j, k in product(range(6), range(3)):
        assert scores[j, k] == pytest.approx(abs(weight[j, k]) * np.linalg.norm(x[:, j]))
    with pytest.raises(ValueError, match="squares for a weight"):
        wanda_scores(weight, np.ones(5))
