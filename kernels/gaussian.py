"""Moments of functions of Gaussian variables, by themselves and in pairs.

A function f of ``X = mean + deviation z`` with z standard normal is held as its values on fixed nodes of z, one row a
variable. Expectations are then weighted sums, and so are its Hermite coefficients ``a_k = E[f(X) He_k(z)] / sqrt(k!)``,
from which Mehler's formula gives the covariance of two such functions whose variables correlate by r::

    cov(f(X), g(Y)) = sum over k >= 1 of r^k a_k b_k

(Mehler 1866; for wide networks: Daniely, Frostig & Singer, Toward Deeper Understanding of Neural Networks, NeurIPS
2016, section 4). The series is cut after `ORDER` terms; what they leave of the variances goes into one term more, so
that variables with r = 1 and proportional values correlate fully after it too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.special

Float64 = npt.NDArray[np.float64]

#: Terms of Mehler's series.
ORDER = 12
#: Nodes reach so many standard deviations to both sides; what lies beyond is rarer than 1e-15.
REACH = 8.0
#: Evenly spaced: the trapezoidal rule is exact to rounding for smooth functions, and off by 2e-5 at the kink of a ReLU.
STEPS = 1024

NODES: Float64 = np.linspace(-REACH, REACH, STEPS + 1)
WEIGHTS: Float64 = np.exp(-(NODES**2) / 2)
WEIGHTS /= WEIGHTS.sum()


def _polynomials() -> Float64:
    """``[order + 1, nodes]`` normalised Hermite polynomials, by their recurrence."""
    rows = [np.ones_like(NODES), NODES]
    for k in range(1, ORDER):
        rows.append((NODES * rows[k] - np.sqrt(k) * rows[k - 1]) / np.sqrt(k + 1))
    return np.stack(rows)


_PROJECTION: Float64 = (_polynomials() * WEIGHTS).T


def on_nodes(mean: Float64, deviation: Float64) -> Float64:
    """``[n, nodes]`` the variables themselves.

    Args:
        mean, deviation: ``[n]``.
    """
    return np.asarray(mean[:, None] + deviation[:, None] * NODES)


def expectation(values: Float64) -> Float64:
    """``[n]`` means of functions given on the nodes, ``[n, nodes]``."""
    return np.asarray(values @ WEIGHTS)


def covariance(values: Float64, correlation: Float64) -> Float64:
    """``[n, n]`` covariance of functions of Gaussian variables, each of its own.

    Args:
        values: ``[n, nodes]`` the functions on the nodes.
        correlation: ``[n, n]`` of the variables.
    """
    coefficients = values @ _PROJECTION
    centred = values - coefficients[:, :1]
    variance = (centred * centred) @ WEIGHTS
    correlation = np.clip(correlation, -1.0, 1.0)
    power, total = np.ones_like(correlation), np.zeros_like(correlation)
    for k in range(1, ORDER + 1):
        power = power * correlation
        total += power * np.outer(coefficients[:, k], coefficients[:, k])
    rest = np.sqrt(np.maximum(variance - (coefficients[:, 1:] ** 2).sum(axis=1), 0.0))
    total += power * correlation * np.outer(rest, rest)
    np.fill_diagonal(total, variance)
    return total


def rectified_mean(mean: Float64, deviation: Float64) -> Float64:
    """``E[max(X, 0)]`` in closed form: ``deviation phi(h) + mean Phi(h)`` with ``h = mean / deviation``.

    Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019, section
    4.2.1 and appendix C.
    """
    mean, deviation = np.broadcast_arrays(np.asarray(mean, np.float64), np.asarray(deviation, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.where(deviation > 0, mean / deviation, np.inf * np.sign(mean))
    density = np.exp(-(h**2) / 2) / np.sqrt(2 * np.pi)
    return np.where(
        deviation > 0,
        deviation * density + mean * scipy.special.ndtr(np.where(np.isnan(h), 0.0, h)),
        np.maximum(mean, 0.0),
    )
