"""Refit: what is left of a linear map, fitted to what the whole map gave.

After pruning, a map ``y = x W + b`` reads fewer and slightly wrong inputs. Its sliced weight ``W0`` is the best guess
before any data are seen, so the fit is a ridge regression towards it (van Wieringen, Lecture notes on ridge regression,
arXiv:1509.09169, on targets other than zero)::

    minimise  sum ||x W + b - y||^2 + penalty ||W - W0||^2

With ``D = W - W0``, A the Gram matrix of x and ``R = sum x (y - x W0)^T``, the solution is ``(A + penalty I) D = R``;
an intercept that is free takes the means out of both, and then is ``b = mean y - mean x W``. All of it is computed from
a `GramAccumulator`, by Cholesky.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.linalg

from graphprune.kernels.gram import GramAccumulator, Moments, damped_factor

Float64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]

#: An output's deviation is scaled at most so much to match another.
MOST_SCALED = 4.0
#: Dampings tried by `refit_validated`.
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def refit(
    gram: GramAccumulator,
    weight: Floats,
    bias: Floats | None,
    *,
    intercept: bool = True,
    damping: float = 1e-2,
) -> tuple[Float64, Float64 | None]:
    """The map that fits best, held towards the map that was.

    The squared error over the samples is never larger than the prior's with its best intercept, output by output: an
    output that the fit would not improve (by rounding, or because nothing was seen) keeps the prior's weights.

    Args:
        gram: Statistics of the pruned network's inputs ``[n, d]`` and the wanted outputs ``[n, m]``.
        weight: ``[d, m]`` the sliced weight, which is the prior.
        bias: ``[m]``, or None for zeros.
        intercept: The bias is fitted too, free of penalty; else it stays as it is.
        damping: The penalty in units of the mean of the diagonal of the Gram matrix (centred if the bias is fitted).
            Raised where the matrix has no Cholesky factor. With 0 the fit is least squares without a prior.

    Returns:
        float64 weight ``[d, m]``, and bias ``[m]``: None only if none was given and none was to be fitted.

    Raises:
        ValueError: The shapes do not fit, or a statistic is not finite.
    """
    prior = _checked(gram, weight, bias)
    if not gram.count:
        return prior, None if bias is None else bias.astype(np.float64)
    moments = _moments(gram, bias, intercept)
    change = _change(moments, _unexplained(moments, prior), damping)
    return _with_bias(gram, prior + change, bias, intercept)


def refit_validated(
    train: GramAccumulator,
    held_out: GramAccumulator,
    weight: Floats,
    bias: Floats | None,
    *,
    intercept: bool = True,
    dampings: Sequence[float] = DAMPINGS,
    pooled: bool = True,
) -> tuple[Float64, Float64 | None, float]:
    """`refit` with the damping that does best on samples it was not fitted to.

    Args:
        train: Statistics to fit to.
        held_out: Statistics to judge by; without samples, the middle one of ``dampings`` is taken.
        weight, bias, intercept: As of `refit`.
        dampings: Those to try; the prior itself, with its best intercept, is always one more.
        pooled: The final fit is to both sets together, with the damping chosen.

    Returns:
        Weight, bias and the damping: infinity where no fit did better than the prior.

    Raises:
        ValueError: As `refit`, or ``dampings`` is empty.
    """
    if not dampings:
        raise ValueError("no damping to try")
    prior = _checked(train, weight, bias)
    _checked(held_out, weight, bias)
    best = (np.inf, np.zeros_like(prior))
    if not held_out.count or not train.count:
        best = (sorted(dampings)[len(dampings) // 2], best[1])
        pooled = True
    else:
        moments = _moments(train, bias, intercept)
        unexplained = _unexplained(moments, prior)
        judge = _moments(held_out, bias, intercept)
        judged = _unexplained(judge, prior)
        off = (
            judge.y - moments.y - (judge.x - moments.x) @ prior
        )  # what the intercept leaves, before any change
        lowest = judge.count * float(off @ off)
        for damping in sorted(dampings, reverse=True):
            change = _change(moments, unexplained, damping)
            shift = off - (judge.x - moments.x) @ change
            error = float(_gain(judge, judged, change).sum()) + judge.count * float(shift @ shift)
            if error < lowest:
                lowest, best = error, (damping, change)
    damping, change = best
    if pooled:
        both = train.copy()
        both.merge(held_out)
        if damping < np.inf:
            return *refit(both, weight, bias, intercept=intercept, damping=damping), damping
        return *_with_bias(both, prior, bias, intercept), damping
    return *_with_bias(train, prior + change, bias, intercept), damping


def matched_variance(gram: GramAccumulator, weight: Floats) -> tuple[Float64, Float64]:
    """A map scaled, output by output, so that mean and variance over the samples are those of the wanted outputs.

    Args:
        gram: Statistics of inputs and wanted outputs.
        weight: ``[d, m]``.

    Returns:
        float64 weight ``[d, m]`` and bias ``[m]``. Outputs whose variance is zero, or would have to grow more than
        `MOST_SCALED` times, are scaled no further than that.
    """
    moments = gram.moments(centred=True)
    prior = _checked(gram, weight, None)
    variance = np.einsum("dm,dm->m", prior, moments.xx @ prior)
    scale = np.sqrt(np.divide(moments.yy, variance, out=np.ones_like(variance), where=variance > 0))
    scaled = prior * np.minimum(scale, MOST_SCALED)
    return scaled, moments.y - moments.x @ scaled


def training_error(gram: GramAccumulator, weight: Floats, bias: Floats | None) -> Float64:
    """``[m]`` sums of ``(x W + b - y)^2`` over the samples, output by output, from their statistics alone.

    Good to some six digits of the deviation of y, not of the error itself.
    """
    moments = gram.moments(centred=True)
    weight = _checked(gram, weight, bias)
    shift = moments.x @ weight - moments.y + (0.0 if bias is None else bias)
    explained = np.einsum("dm,dm->m", weight, moments.xx @ weight - 2 * moments.xy)
    error: Float64 = np.maximum(moments.yy + explained, 0.0) + moments.count * shift * shift
    return error


def _checked(gram: GramAccumulator, weight: Floats, bias: Floats | None) -> Float64:
    """The prior in float64, once the shapes are right."""
    if weight.shape != (gram.features, gram.outputs) or (bias is not None and bias.shape != (gram.outputs,)):
        raise ValueError(
            f"a weight of shape {weight.shape} and a bias of shape {None if bias is None else bias.shape} "
            f"where the statistics are of {gram.features} inputs and {gram.outputs} outputs"
        )
    return weight.astype(np.float64)


def _moments(gram: GramAccumulator, bias: Floats | None, intercept: bool) -> Moments:
    """Moments of x and of what ``x W`` should be."""
    moments = gram.moments(centred=intercept)
    if intercept or bias is None:
        return moments
    n, b = gram.count, bias.astype(np.float64)
    xy = moments.xy - np.outer(gram.x, b)
    return Moments(n, moments.x, moments.y, moments.xx, xy, moments.yy - 2 * b * gram.y + n * b * b)


def _unexplained(moments: Moments, prior: Float64) -> Float64:
    """``[d, m]`` sum of x times what the prior leaves of y."""
    return np.asarray(moments.xy - moments.xx @ prior)


def _gain(moments: Moments, unexplained: Float64, change: Float64) -> Float64:
    """``[m]`` what a change of the prior adds to the squared error: not a small difference of large sums."""
    return np.asarray(np.einsum("dm,dm->m", change, moments.xx @ change - 2 * unexplained))


def _change(moments: Moments, unexplained: Float64, damping: float) -> Float64:
    """``[d, m]`` by how much the best weight differs from the prior; zeros for outputs that would not gain."""
    factor, _ = damped_factor(moments.xx, damping)
    change: Float64 = scipy.linalg.cho_solve((factor, True), unexplained, check_finite=False)
    gain = _gain(moments, unexplained, change)
    return np.where(np.isfinite(gain) & (gain < 0), change, 0.0)


def _with_bias(
    gram: GramAccumulator, weight: Float64, bias: Floats | None, intercept: bool
) -> tuple[Float64, Float64 | None]:
    """The weight and its bias: the best one, if there is to be an intercept and anything was seen."""
    if not intercept or not gram.count:
        return weight, None if bias is None else bias.astype(np.float64)
    return weight, (gram.y - gram.x @ weight) / gram.count
