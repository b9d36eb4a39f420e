"""Refit against scipy's least squares over the samples themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.kernels.gram import GramAccumulator
from graphprune.kernels.refit import matched_variance, refit, refit_validated, training_error

Array = npt.NDArray[Any]


def problem(
    n: int, d: int, m: int, seed: int = 0, *, noise: float = 0.3
) -> tuple[Array, Array, Array, Array]:
    """Correlated inputs with a mean, wanted outputs, a prior that is off, and its bias."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ (np.eye(d) + 0.5 * rng.standard_normal((d, d))) + 2
    true = rng.standard_normal((d, m))
    y = x @ true + 1 + noise * rng.standard_normal((n, m))
    return x, y, true + 0.2 * rng.standard_normal((d, m)), rng.standard_normal(m)


def gathered(x: Array, y: Array) -> GramAccumulator:
    gram = GramAccumulator(x.shape[1], y.shape[1])
    gram.add(x, y)
    return gram


def squares(x: Array, y: Array, weight: Array, bias: Array | None) -> Array:
    residual = x @ weight + (0.0 if bias is None else bias) - y
    return np.asarray((residual * residual).sum(axis=0))


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_without_damping_it_is_least_squares(intercept: bool, has_bias: bool) -> None:
    x, y, prior, b = problem(60, 7, 4)
    bias = b if has_bias else None
    weight, fitted = refit(gathered(x, y), prior, bias, intercept=intercept, damping=0.0)
    if intercept:
        wanted = scipy.linalg.lstsq(np.c_[x, np.ones(60)], y)[0]
        assert fitted is not None
        assert np.allclose(np.r_[weight, fitted[None]], wanted, atol=1e-9)
    else:
        assert np.allclose(weight, scipy.linalg.lstsq(x, y - (0.0 if bias is None else bias))[0], atol=1e-9)
        assert fitted is bias or np.array_equal(fitted, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("n", [60, 5])  # more and fewer samples than features
def test_damped_it_is_the_augmented_system(intercept: bool, n: int) -> None:
    x, y, prior, bias = problem(n, 7, 4)
    damping = 0.05
    weight, fitted = refit(gathered(x, y), prior, bias, intercept=intercept, damping=damping)
    centred = x - x.mean(axis=0) if intercept else x
    penalty = damping * (centred * centred).sum() / 7
    # Rows sqrt(penalty) (W - W0) = 0 below the samples; the column of ones makes the intercept, free of penalty.
    above = np.c_[x, np.ones(n)] if intercept else x
    below = np.sqrt(penalty) * np.eye(7, above.shape[1])
    target = y if intercept else y - bias
    wanted = scipy.linalg.lstsq(np.r_[above, below], np.r_[target, np.sqrt(penalty) * prior])[0]
    assert np.allclose(weight, wanted[:7], atol=1e-9)
    assert fitted is not None
    assert np.allclose(fitted, wanted[7] if intercept else bias, atol=1e-9)


@given(
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 999),
    st.sampled_from([1e-3, 0.1]),
)
@settings(deadline=None)
def test_no_perturbation_lowers_the_objective(n: int, d: int, m: int, seed: int, damping: float) -> None:
    x, y, prior, bias = problem(n, d, m, seed)
    weight, fitted = refit(gathered(x, y), prior, bias, damping=damping)
    assert fitted is not None
    centred = x - x.mean(axis=0)
    penalty = damping * (centred * centred).sum() / d

    def objective(w: Array, b: Array) -> float:
        return float(squares(x, y, w, b).sum() + penalty * ((w - prior) ** 2).sum())

    rng = np.random.default_rng(seed)
    lowest = objective(weight, fitted)
    for size in (1e-3, 1e-1, 1.0):
        dw, db = size * rng.standard_normal(weight.shape), size * rng.standard_normal(fitted.shape)
        assert objective(weight + dw, fitted + db) >= lowest * (1 - 1e-9)


@given(
    st.integers(0, 8),
    st.integers(1, 6),
    st.integers(0, 999),
    st.sampled_from([0.0, 1e-8, 1e-2, 10.0]),
    st.booleans(),
)
@settings(deadline=None)
def test_never_worse_than_the_prior(n: int, d: int, seed: int, damping: float, intercept: bool) -> None:
    """Even with fewer samples than features, features that are always zero or twins, and no damping."""
    x, y, prior, bias = problem(n, d, 2, seed)
    x[:, : d // 3] = 0
    x[:, d // 3 : d // 2] = x[:, -1:]
    weight, fitted = refit(gathered(x, y), prior, bias, intercept=intercept, damping=damping)
    assert fitted is not None
    assert np.isfinite(weight).all()
    assert np.isfinite(fitted).all()
    best = (y - x @ prior).mean(axis=0) if intercept and n else bias
    before = squares(x, y, prior, best)
    assert (squares(x, y, weight, fitted) <= before * (1 + 1e-9) + 1e-9 * (y * y).sum(axis=0)).all()


def test_a_prior_that_is_right_stays() -> None:
    x, _, prior, bias = problem(40, 6, 3)
    weight, fitted = refit(gathered(x, x @ prior + bias), prior, bias)
    assert fitted is not None
    assert np.allclose(weight, prior, atol=1e-12)
    assert np.allclose(fitted, bias, atol=1e-12)


def test_what_was_never_active_keeps_its_prior() -> None:
    x, y, prior, bias = problem(40, 6, 3)
    x[:, 2] = 0
    weight, _ = refit(gathered(x, y), prior, bias)
    assert np.array_equal(weight[2], prior[2])
    weight, fitted = refit(gathered(np.zeros_like(x), y), prior, bias)
    assert np.array_equal(weight, prior)
    assert fitted is not None
    assert np.allclose(fitted, y.mean(axis=0))


def test_nothing_seen_changes_nothing() -> None:
    _, _, prior, bias = problem(1, 6, 3)
    weight, fitted = refit(GramAccumulator(6, 3), prior, bias)
    assert np.array_equal(weight, prior)
    assert fitted is not None
    assert np.array_equal(fitted, bias)
    assert refit(GramAccumulator(6, 3), prior, None, intercept=False)[1] is None


@pytest.mark.parametrize("has_bias", [True, False])
def test_training_error_is_that_of_the_samples(has_bias: bool) -> None:
    x, y, prior, b = problem(30, 5, 3)
    bias = b if has_bias else None
    assert np.allclose(training_error(gathered(x, y), prior, bias), squares(x, y, prior, bias), rtol=1e-10)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_damping_is_the_best_on_what_was_held_out(intercept: bool, seed: int) -> None:
    x, y, prior, bias = problem(40, 25, 3, seed, noise=2.0)
    train, held_out = gathered(x[:28], y[:28]), gathered(x[28:], y[28:])
    dampings = (1e-6, 1e-3, 1e-2, 0.1, 1.0, 10.0)
    errors = {}
    for damping in dampings:
        fit = refit(train, prior, bias, intercept=intercept, damping=damping)
        errors[damping] = squares(x[28:], y[28:], *fit).sum()
    alone = (y[:28] - x[:28] @ prior).mean(axis=0) if intercept else bias
    errors[np.inf] = squares(x[28:], y[28:], prior, alone).sum()
    best = min(errors, key=errors.__getitem__)
    weight, fitted, chosen = refit_validated(
        train, held_out, prior, bias, intercept=intercept, dampings=dampings, pooled=False
    )
    assert chosen == best
    assert squares(x[28:], y[28:], weight, fitted).sum() == pytest.approx(errors[best])
    weight, fitted, chosen = refit_validated(
        train, held_out, prior, bias, intercept=intercept, dampings=dampings
    )
    assert chosen == best
    if best < np.inf:
        wanted, wanted_bias = refit(gathered(x, y), prior, bias, intercept=intercept, damping=best)
        assert wanted_bias is not None
        assert fitted is not None
        assert np.allclose(weight, wanted)
        assert np.allclose(fitted, wanted_bias)


def test_a_fit_to_noise_is_not_taken() -> None:
    """Outputs that have nothing to do with the inputs: the prior of zeros is the best there is."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 20)), rng.standard_normal((60, 2))
    prior = np.zeros((20, 2))
    weight, fitted, damping = refit_validated(gathered(x[:40], y[:40]), gathered(x[40:], y[40:]), prior, None)
    assert damping == np.inf
    assert not weight.any()
    assert fitted is not None
    assert np.allclose(fitted, y.mean(axis=0))


@pytest.mark.parametrize("empty", [0, 1])
def test_one_set_without_samples(empty: int) -> None:
    x, y, prior, bias = problem(40, 6, 3)
    sets = [gathered(x, y), gathered(x, y)]
    sets[empty] = GramAccumulator(6, 3)
    weight, _, damping = refit_validated(sets[0], sets[1], prior, bias, dampings=(1.0, 1e-3, 0.1))
    assert damping == 0.1
    assert np.allclose(weight, refit(gathered(x, y), prior, bias, damping=0.1)[0])


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="6 inputs and 3 outputs"):
        refit(GramAccumulator(6, 3), np.zeros((5, 3)), None)
    with pytest.raises(ValueError, match="6 inputs and 3 outputs"):
        refit(GramAccumulator(6, 3), np.zeros((6, 3)), np.zeros(2))
    with pytest.raises(ValueError, match="no damping"):
        refit_validated(GramAccumulator(6, 3), GramAccumulator(6, 3), np.zeros((6, 3)), None, dampings=())


def test_matched_variance_gives_the_moments_of_the_wanted_outputs() -> None:
    random = np.random.default_rng(3)
    x = random.standard_normal((500, 6)).astype(np.float32)
    y = (x @ random.standard_normal((6, 3)) * [1.0, 2.0, 0.5] + random.standard_normal((500, 3))).astype(
        np.float32
    )
    gram = GramAccumulator(6, 3)
    gram.add(x, y)
    fitted, _ = refit(gram, np.zeros((6, 3)), None)
    weight, bias = matched_variance(gram, fitted)
    made = x @ weight + bias
    np.testing.assert_allclose(made.mean(axis=0), y.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(made.std(axis=0), y.std(axis=0), rtol=1e-4)
    assert (made.std(axis=0) > (x @ fitted).std(axis=0)).all()
