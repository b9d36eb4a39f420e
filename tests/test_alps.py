"""ALPS' masks against all masks there are, and against SparseGPT's."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.kernels.alps import alps_mask
from graphprune.kernels.masked_refit import masked_solution
from graphprune.kernels.sparsegpt import largest_of_groups, sparsegpt

Array = npt.NDArray[Any]


def problem(features: int, outputs: int, seed: int, samples: int = 200) -> tuple[Array, Array]:
    """A weight, and the Gram matrix of correlated inputs of unequal scales."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, features)) @ (
        np.eye(features) + 0.6 * rng.standard_normal((features,) * 2)
    )
    x *= rng.lognormal(0, 0.7, features)
    return rng.standard_normal((features, outputs)), x.T @ x


def left_over(weight: Array, hessian: Array, mask: Array) -> Array:
    """``[outputs]`` what is lost with the best weights for a mask."""
    fitted = masked_solution(hessian, hessian @ weight, mask, 0.0, 10**9)
    return np.asarray(np.einsum("dm,de,em->m", fitted - weight, hessian, fitted - weight))


def runs(features: int, m: int) -> Array:
    return np.arange(features - features % m).reshape(-1, m)


def test_it_is_near_the_best_of_all_masks() -> None:
    """Two groups of four: 36 masks an output, each with least squares."""
    lost: dict[str, list[Array]] = {"alps": [], "sparsegpt": [], "magnitude": [], "best": []}
    ways = [list(kept) for kept in combinations(range(4), 2)]
    for seed in range(10):
        weight, hessian = problem(8, 12, seed)
        masks = {
            "alps": alps_mask(weight, hessian, 2, runs(8, 4)),
            "sparsegpt": sparsegpt(weight, hessian, 2, 4)[1],
            "magnitude": largest_of_groups(abs(weight), 2, runs(8, 4)),
        }
        for name, mask in masks.items():
            lost[name].append(left_over(weight, hessian, mask))
        root = scipy.linalg.cholesky(hessian)
        errors = []
        for first, second in product(ways, ways):
            kept = [*first, *(4 + k for k in second)]
            fitted = root[:, kept] @ scipy.linalg.lstsq(root[:, kept], root @ weight)[0]
            errors.append(np.square(fitted - root @ weight).sum(axis=0))
        lost["best"].append(np.min(errors, axis=0))
    found, best = np.concatenate(lost["alps"]), np.concatenate(lost["best"])
    assert (found >= best * (1 - 1e-9)).all()
    assert (found <= best * (1 + 1e-9)).mean() > 0.6  # the very best
    above = {name: float(np.sum(parts) / np.sum(best)) for name, parts in lost.items()}
    assert above["alps"] < 1.2
    assert above["alps"] < above["sparsegpt"] < above["magnitude"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_less_is_lost_than_by_sparsegpt(n: int, m: int, seed: int) -> None:
    weight, hessian = problem(96, 40, seed, samples=600)
    _, passed = sparsegpt(weight, hessian, n, m)
    mask = alps_mask(weight, hessian, n, runs(96, m))
    assert left_over(weight, hessian, mask).sum() < 0.95 * left_over(weight, hessian, passed).sum()


@given(
    st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 4), (1, 2), (4, 8)]),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_n_of_every_m_stay(pattern: tuple[int, int], features: int, outputs: int, seed: int) -> None:
    n, m = pattern
    weight, hessian = problem(features, outputs, seed, samples=1 + seed % 40)
    mask = alps_mask(weight, hessian, n, runs(features, m))
    whole = features - features % m
    assert (mask[:whole].reshape(-1, m, outputs).sum(axis=1) == n).all()
    assert mask[whole:].all()


@given(st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_units_of_the_inputs_do_not_matter(seed: int) -> None:
    """Powers of two change no digit: a channel that is measured otherwise, its weight with it, is the same channel."""
    weight, hessian = problem(12, 5, seed)
    units = np.exp2(np.random.default_rng(seed).integers(-3, 4, 12))
    mask = alps_mask(weight, hessian, 2, runs(12, 4))
    assert np.array_equal(
        mask, alps_mask(weight / units[:, None], hessian * np.outer(units, units), 2, runs(12, 4))
    )
    assert np.array_equal(mask, alps_mask(-4 * weight, 16 * hessian, 2, runs(12, 4)))


def test_groups_may_lie_apart() -> None:
    weight, hessian = problem(12, 5, 3)
    groups = np.array([[0, 3, 6, 9], [1, 4, 7, 10]])
    order = np.r_[groups.ravel(), 2, 5, 8, 11]
    mask = alps_mask(weight, hessian, 2, groups)
    there = alps_mask(weight[order], hessian[np.ix_(order, order)], 2, runs(8, 4))
    assert np.array_equal(mask[order], there)
    assert mask[[2, 5, 8, 11]].all()


def test_without_correlations_it_is_magnitude_times_length() -> None:
    rng = np.random.default_rng(0)
    weight, diagonal = rng.standard_normal((16, 7)), rng.uniform(0.1, 3, 16)
    wanted = largest_of_groups(abs(weight) * np.sqrt(diagonal)[:, None], 2, runs(16, 4))
    assert np.array_equal(alps_mask(weight, np.diag(diagonal), 2, runs(16, 4)), wanted)


def test_inputs_that_are_always_zero() -> None:
    weight = np.arange(1.0, 9.0).reshape(8, 1)
    silent = alps_mask(weight, np.zeros((8, 8)), 2, runs(8, 4))
    assert np.array_equal(silent.ravel(), [False, False, True, True] * 2)
    mask = alps_mask(weight, np.diag([0.0, 4.0, 0.0, 4.0, 1.0, 1.0, 0.0, 0.0]), 2, runs(8, 4))
    assert np.array_equal(mask.ravel(), [False, True, False, True, True, True, False, False])


def test_what_does_not_fit() -> None:
    weight, hessian = problem(8, 2, 0)
    with pytest.raises(ValueError, match="a Hessian of shape"):
        alps_mask(weight, hessian[:7, :7], 2, runs(8, 4))
    with pytest.raises(ValueError, match="not finite"):
        alps_mask(np.where(weight > 0, np.nan, weight), hessian, 2, runs(8, 4))
