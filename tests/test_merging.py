"""Merging against least squares on samples, and against covariances written out; Gaussian moments against samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.kernels import gaussian
from graphprune.kernels.merging import (
    MOST_SCALED,
    linear_covariance,
    linear_variance,
    matching_scale,
    merging_coefficients,
)

Array = npt.NDArray[Any]


def covariance(size: int, seed: int, rank: int | None = None) -> Array:
    root = np.random.default_rng(seed).standard_normal((rank or size + 2, size))
    return np.asarray(root.T @ root)


@given(st.integers(2, 7), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_coefficients_are_those_of_least_squares(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((50, size)) @ rng.standard_normal((size, size))
    kept, removed = np.split(rng.permutation(size), [size // 2])
    found = merging_coefficients(rows.T @ rows, kept, removed)
    wanted = np.linalg.lstsq(rows[:, kept], rows[:, removed], rcond=None)[0]
    error = ((rows[:, removed] - rows[:, kept] @ found) ** 2).sum()
    least = ((rows[:, removed] - rows[:, kept] @ wanted) ** 2).sum()
    assert least <= error * (1 + 1e-12)
    assert error <= least + 1e-5 * (rows[:, removed] ** 2).sum()


def test_a_multiple_of_a_kept_input_is_merged_into_that_one_alone() -> None:
    moments = covariance(4, 3)
    mixing = np.zeros((4, 6))
    mixing[:, :4] = np.eye(4)
    mixing[1, 4] = 2.5
    mixing[3, 5] = -0.3
    found = merging_coefficients(mixing.T @ moments @ mixing, np.arange(4), np.array([4, 5]))
    assert np.allclose(found, mixing[:, 4:], atol=1e-4)


def test_uncorrelated_inputs_are_not_merged() -> None:
    assert not merging_coefficients(np.diag([1.0, 2.0, 3.0]), np.array([0, 1]), np.array([2])).any()


def test_kept_inputs_that_never_vary_take_nothing_over() -> None:
    moments = np.array([[0.0, 0.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 1.0]])
    found = merging_coefficients(moments, np.array([0, 1]), np.array([2]))
    assert np.allclose(found, [[0.0], [0.5]], atol=1e-5)
    assert merging_coefficients(moments, np.array([0]), np.array([1, 2])).tolist() == [[0.0, 0.0]]


def test_kept_inputs_that_are_equal_share_what_they_take_over() -> None:
    found = merging_coefficients(np.ones((3, 3)), np.array([0, 1]), np.array([2]))
    assert np.allclose(found, 0.5, atol=1e-5)


def test_pairs_that_contradict_each_other_give_finite_coefficients() -> None:
    moments = np.array(
        [[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]]
    )  # no covariance: an eigenvalue below 0
    assert np.linalg.eigvalsh(moments)[0] < 0
    whole = np.block([[moments, np.full((3, 1), 0.5)], [np.full((1, 3), 0.5), np.ones((1, 1))]])
    assert np.isfinite(merging_coefficients(whole, np.arange(3), np.array([3]))).all()


@pytest.mark.parametrize(
    ("groups", "channels", "taps", "outputs"), [(1, 4, 1, 3), (1, 3, 4, 5), (2, 2, 3, 2), (5, 1, 4, 2)]
)
def test_covariance_of_linear_maps_is_the_one_written_out(
    groups: int, channels: int, taps: int, outputs: int
) -> None:
    """Against the covariance of all features, most of it zero."""
    rng = np.random.default_rng(groups * 10 + taps)
    matrices = rng.standard_normal((groups, channels * taps, outputs))
    moments = covariance(groups * channels, 1)
    channel = np.repeat(np.arange(groups * channels), taps).reshape(groups, -1)
    place = np.tile(np.arange(taps), groups * channels).reshape(groups, -1)
    features = groups * channels * taps
    whole = moments[np.ix_(channel.ravel(), channel.ravel())] * (place.ravel()[:, None] == place.ravel())
    maps = np.zeros((features, groups * outputs))
    for group in range(groups):
        rows = slice(group * channels * taps, (group + 1) * channels * taps)
        maps[rows, group * outputs : (group + 1) * outputs] = matrices[group]
    wanted = maps.T @ whole @ maps
    assert np.allclose(linear_covariance(matrices, moments, channel, place), wanted)
    assert np.allclose(linear_variance(matrices, moments, channel, place).ravel(), np.diagonal(wanted))


def test_outputs_are_scaled_to_their_variance_and_not_without_end() -> None:
    found = matching_scale(np.array([4.0, 1.0, 1.0, 0.0, 1.0]), np.array([1.0, 2.0, 0.0, 1.0, 1e-9]))
    assert found.tolist() == [2.0, 1.0, 1.0, 1.0, MOST_SCALED]


# -- functions of Gaussian variables --------------------------------------------------------------------------------

MEANS = np.array([-1.5, 0.0, 0.4, 2.0])
DEVIATIONS = np.array([1.0, 0.5, 2.0, 0.8])


def test_quadrature_of_a_relu_agrees_with_the_closed_form() -> None:
    values = np.maximum(gaussian.on_nodes(MEANS, DEVIATIONS), 0)
    assert np.allclose(gaussian.expectation(values), gaussian.rectified_mean(MEANS, DEVIATIONS), atol=4e-5)
    assert gaussian.rectified_mean(np.array([-1.0, 3.0]), np.zeros(2)).tolist() == [0.0, 3.0]


@pytest.mark.parametrize("name", ["relu", "silu", "clip", "leaky", "square"])
def test_moments_of_pairs_agree_with_samples(name: str) -> None:
    """Monte Carlo: 300,000 samples of correlated Gaussians, five standard errors."""
    functions: dict[str, Callable[[Array], Array]] = {
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "clip": lambda x: np.clip(x, 0, 1),
        "leaky": lambda x: np.where(x > 0, x, 0.1 * x),
        "square": lambda x: x * x,
    }
    function = functions[name]
    root = np.random.default_rng(5).standard_normal((4, 4))
    root /= np.linalg.norm(root, axis=1, keepdims=True)
    z = np.random.default_rng(6).standard_normal((300_000, 4)) @ root.T
    samples = function(MEANS + DEVIATIONS * z)
    values = function(gaussian.on_nodes(MEANS, DEVIATIONS))
    spread = samples.std(axis=0)
    assert (np.abs(gaussian.expectation(values) - samples.mean(axis=0)) < 0.01 * spread).all()
    found = gaussian.covariance(values, root @ root.T)
    kurtosis = ((samples - samples.mean(axis=0)) ** 4).mean(axis=0) / spread**4
    tolerance = 0.01 * np.sqrt(np.outer(kurtosis, kurtosis)) ** 0.5 * np.outer(spread, spread)
    # Beyond ORDER terms, all of what is left is taken to correlate as the next term does.
    rest = 0.01 * np.outer(spread, spread)
    assert (np.abs(found - np.cov(samples.T)) < tolerance + rest).all()


def test_functions_of_one_variable_that_are_proportional_correlate_fully() -> None:
    """A channel that is a multiple of another one stays so behind a ReLU: the tail of the series is not lost."""
    values = np.maximum(gaussian.on_nodes(np.array([0.5, 1.5]), np.array([1.0, 3.0])), 0)
    found = gaussian.covariance(values, np.ones((2, 2)))
    assert np.isclose(found[0, 1], 3 * found[0, 0], rtol=1e-9)
    assert np.isclose(found[1, 1], 9 * found[0, 0], rtol=1e-9)
