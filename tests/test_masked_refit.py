"""Masked refit against scipy's least squares over the samples, output by output."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.kernels import masked_refit as module
from graphprune.kernels.gram import GramAccumulator
from graphprune.kernels.masked_refit import masked_refit, masked_solution
from graphprune.kernels.refit import refit

Array = npt.NDArray[Any]


def problem(n: int, d: int, m: int, seed: int = 0) -> tuple[Array, Array, Array, Array, Array]:
    """Inputs with a mean, wanted outputs, a prior, its bias, and a mask."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ (np.eye(d) + 0.4 * rng.standard_normal((d, d))) + 2
    true = rng.standard_normal((d, m))
    y = x @ true + 1 + 0.3 * rng.standard_normal((n, m))
    return x, y, true + 0.2 * rng.standard_normal((d, m)), rng.standard_normal(m), rng.random((d, m)) < 0.5


def gathered(x: Array, y: Array) -> GramAccumulator:
    gram = GramAccumulator(x.shape[1], y.shape[1])
    gram.add(x, y)
    return gram


def squares(x: Array, y: Array, weight: Array, bias: Array | None) -> Array:
    residual = x @ weight + (0.0 if bias is None else bias) - y
    return np.asarray((residual * residual).sum(axis=0))


@pytest.fixture(params=["Cholesky", "gradients"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either way to solve, whatever the sizes say."""
    name: str = request.param

    def solve(gram: Array, right: Array, mask: Array, penalty: float, iterations: int = 2000) -> Array:
        if name == "Cholesky":
            return module._by_cholesky(gram, right, mask, penalty)
        return module._by_gradients(gram, right, mask, penalty, 2000)

    monkeypatch.setattr(module, "masked_solution", solve)
    return name


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_least_squares_over_the_elements_that_stay(way: str, intercept: bool, damping: float) -> None:
    x, y, prior, bias, mask = problem(60, 9, 5)
    weight, fitted = masked_refit(gathered(x, y), prior, bias, mask, intercept=intercept, damping=damping)
    centred = x - x.mean(axis=0) if intercept else x
    penalty = damping * (centred * centred).sum() / 9
    assert fitted is not None
    for k in range(5):
        kept = np.flatnonzero(mask[:, k])
        above = np.c_[x[:, kept], np.ones(60)] if intercept else x[:, kept]
        below = np.sqrt(penalty) * np.eye(len(kept), above.shape[1])
        target = y[:, k] if intercept else y[:, k] - bias[k]
        wanted = scipy.linalg.lstsq(np.r_[above, below], np.r_[target, np.sqrt(penalty) * prior[kept, k]])[0]
        np.testing.assert_allclose(weight[kept, k], wanted[: len(kept)], rtol=0, atol=1e-5)
        assert (weight[~mask[:, k], k] == 0).all()
        assert fitted[k] == pytest.approx(wanted[-1] if intercept else bias[k], abs=1e-4)


@given(
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(0, 999),
    st.booleans(),
    st.integers(1, 4),
)
@settings(max_examples=80, deadline=None)
def test_never_worse_than_the_prior_masked(
    n: int, d: int, m: int, seed: int, intercept: bool, iterations: int
) -> None:
    x, y, prior, bias, mask = problem(n, d, m, seed)
    weight, fitted = masked_refit(
        gathered(x, y), prior, bias, mask, intercept=intercept, damping=1e-3, iterations=iterations
    )
    assert (weight[~mask] == 0).all()
    masked = prior * mask
    best = (y - x @ masked).mean(axis=0) if intercept else bias
    scale = np.square(y).sum(axis=0) + squares(x, y, masked, best)
    assert (squares(x, y, weight, fitted) <= squares(x, y, masked, best) + 1e-9 * scale).all()


def test_with_everything_kept_it_is_the_refit() -> None:
    x, y, prior, bias, _ = problem(60, 9, 5)
    gram = gathered(x, y)
    for intercept in (True, False):
        found = masked_refit(gram, prior, bias, np.ones((9, 5), bool), intercept=intercept, damping=0.01)
        wanted = refit(gram, prior, bias, intercept=intercept, damping=0.01)
        for a, b in zip(found, wanted, strict=True):
            assert a is not None
            assert b is not None
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


def test_both_ways_agree_and_are_both_taken() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 40))
    gram, right, mask = x.T @ x, rng.standard_normal((40, 8)), rng.random((40, 8)) < 0.8
    taken = {}
    for iterations in (1, 1000):
        taken[iterations] = masked_solution(gram, right, mask, 0.1, iterations)
    exact = module._by_cholesky(gram, right, mask, 0.1)
    assert np.array_equal(taken[1000], exact)
    assert not np.allclose(taken[1], exact)  # one step of conjugate gradients
    np.testing.assert_allclose(module._by_gradients(gram, right, mask, 0.1, 200), exact, rtol=0, atol=1e-6)


def test_more_iterations_never_fit_worse() -> None:
    x, y, prior, _, mask = problem(200, 20, 6)
    gram = x.T @ x
    right = x.T @ (y - x @ (prior * mask))
    energies = []
    for iterations in range(12):
        change = module._by_gradients(gram, right, mask, 0.0, iterations)
        energies.append(np.einsum("dm,dm->m", change, gram @ change - 2 * right))
    assert (np.diff(np.array(energies), axis=0) <= 1e-6 * abs(energies[-1])).all()
    assert (energies[-1] < energies[1]).all()


def test_outputs_that_keep_nothing_and_inputs_that_say_nothing(way: str) -> None:
    x, y, prior, bias, mask = problem(60, 9, 5)
    mask[:, 1] = False
    x[:, 4] = 0.0
    weight, fitted = masked_refit(gathered(x, y), prior, bias, mask, damping=0.0)
    assert np.isfinite(weight).all()
    assert fitted is not None
    assert (weight[:, 1] == 0).all()
    assert fitted[1] == pytest.approx(y[:, 1].mean())
    silent, same = masked_refit(
        gathered(np.zeros((5, 9)), np.zeros((5, 5))), prior, bias, mask, intercept=False
    )
    assert np.array_equal(silent, prior * mask)
    assert same is not None
    assert np.array_equal(same, bias)


def test_nothing_seen() -> None:
    _, _, prior, bias, mask = problem(1, 4, 2)
    weight, fitted = masked_refit(GramAccumulator(4, 2), prior, bias, mask)
    assert np.array_equal(weight, prior * mask)
    assert fitted is not None
    assert np.array_equal(fitted, bias)
    assert masked_refit(GramAccumulator(4, 2), prior, None, mask)[1] is None


def test_what_does_not_fit() -> None:
    x, y, prior, bias, mask = problem(20, 4, 2)
    with pytest.raises(ValueError, match="a mask of shape"):
        masked_refit(gathered(x, y), prior, bias, mask[:3])
    with pytest.raises(ValueError, match="4 inputs and 2 outputs"):
        masked_refit(gathered(x, y), prior[:3], bias, mask[:3])
    x[3, 1] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="not finite"):
        masked_refit(gathered(x, y), prior, bias, mask)
