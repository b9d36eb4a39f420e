"""Masked refit: the best weights of a linear map in which given elements are zero.

As :mod:`graphprune.kernels.refit`, output by output over the elements S that may differ from zero::

    minimise  sum ||x w - y||^2 + penalty ||w - w0||^2    subject to  w = 0 outside S

so ``(A_SS + penalty I) (w - w0)_S = r_S`` with ``r = sum x (y - x w0)``. Each output has an S of its own, hence its own
system: solved by Cholesky where that is cheaper; else by conjugate gradients on all outputs at once, one product with A
an iteration, every residual projected onto its S and scaled by the diagonal of A (Meng et al., ALPS: Improved
optimization for highly sparse one-shot pruning, NeurIPS 2024, section 3.2).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

from graphprune.kernels.gram import GramAccumulator, damped_factor
from graphprune.kernels.refit import Floats, _checked, _gain, _moments, _unexplained, _with_bias

Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: A residual this much smaller than at the beginning ends the iteration.
TOLERANCE = 1e-6


def masked_refit(
    gram: GramAccumulator,
    weight: Floats,
    bias: Floats | None,
    mask: Mask,
    *,
    intercept: bool = True,
    damping: float = 1e-2,
    iterations: int = 100,
) -> tuple[Float64, Float64 | None]:
    """The map with zeros outside a mask that fits best, held towards the map that was.

    The squared error over the samples is never larger than that of the prior, masked, with its best intercept, output
    by output.

    Args:
        gram: Statistics of the inputs ``[n, d]`` and the wanted outputs ``[n, m]``.
        weight: ``[d, m]`` the prior; what lies outside the mask counts as zero.
        bias: ``[m]``, or None for zeros.
        mask: ``[d, m]`` where the weight may differ from zero.
        intercept: The bias is fitted too, free of penalty; else it stays as it is.
        damping: The penalty in units of the mean of the diagonal of the Gram matrix (centred if the bias is fitted).
        iterations: Of conjugate gradients at most. Cholesky goes before where it takes fewer operations than these.

    Returns:
        float64 weight ``[d, m]``, zero outside the mask, and bias ``[m]``: None only if none was given and none was to
        be fitted.

    Raises:
        ValueError: The shapes do not fit, or a statistic is not finite.
    """
    if mask.shape != weight.shape:
        raise ValueError(f"a mask of shape {mask.shape} for a weight of shape {weight.shape}")
    prior = np.where(mask, _checked(gram, weight, None if bias is None else bias), 0.0)
    if not gram.count:
        return prior, None if bias is None else bias.astype(np.float64)
    moments = _moments(gram, bias, intercept)
    if not (np.isfinite(moments.xx.sum()) and np.isfinite(moments.xy.sum())):
        raise ValueError("a Gram matrix of values that are not finite")
    unexplained = _unexplained(moments, prior)
    penalty = damping * float(np.mean(np.diagonal(moments.xx))) if len(prior) else 0.0
    change = masked_solution(moments.xx, unexplained, mask, penalty, iterations)
    gain = _gain(moments, unexplained, change)
    change = np.where(np.isfinite(gain) & (gain < 0), change, 0.0)
    return _with_bias(gram, prior + change, bias, intercept)


def masked_solution(gram: Float64, right: Float64, mask: Mask, penalty: float, iterations: int) -> Float64:
    """``[d, m]``: for each output k, ``(gram + penalty I) x = right[:, k]`` in the elements of its mask, zero outside.

    Args:
        gram: ``[d, d]`` positive semidefinite.
        right: ``[d, m]``.
        mask: ``[d, m]``.
        penalty: Not negative. Cholesky raises it where a matrix would not factor otherwise.
        iterations: Of conjugate gradients at most; Cholesky is taken where it needs fewer operations.
    """
    operations = float(np.sum(mask.sum(axis=0, dtype=np.float64) ** 3)) / 3
    if operations <= 2.0 * iterations * mask.size * len(mask):
        return _by_cholesky(gram, right, mask, penalty)
    return _by_gradients(gram, right, mask, penalty, iterations)


def _by_cholesky(gram: Float64, right: Float64, mask: Mask, penalty: float) -> Float64:
    solution = np.zeros(right.shape)
    for output in range(right.shape[1]):
        kept = np.flatnonzero(mask[:, output])
        part = gram[np.ix_(kept, kept)]
        mean = float(np.mean(np.diagonal(part))) if len(kept) else 0.0
        if mean <= 0:  # nothing was seen of what stays
            continue
        factor, _ = damped_factor(part, penalty / mean)
        solution[kept, output] = scipy.linalg.cho_solve(
            (factor, True), right[kept, output], check_finite=False
        )
    return solution


def _by_gradients(gram: Float64, right: Float64, mask: Mask, penalty: float, iterations: int) -> Float64:
    diagonal = np.diagonal(gram) + penalty
    scale = np.where(
        mask, np.divide(1.0, diagonal, out=np.zeros(len(gram)), where=diagonal > 0)[:, None], 0.0
    )
    solution = np.zeros(right.shape)
    residual = np.where(mask, right, 0.0)
    direction = scale * residual
    energy = np.einsum("dm,dm->m", residual, direction)
    least = TOLERANCE**2 * energy
    for _ in range(iterations):
        going = np.flatnonzero(energy > least)  # what has converged would only divide by zero
        if not len(going):
            break
        chosen, along = mask[:, going], direction[:, going]
        image = np.where(chosen, gram @ along + penalty * along, 0.0)
        curvature = np.einsum("dm,dm->m", along, image)
        step = np.divide(energy[going], curvature, out=np.zeros(len(going)), where=curvature > 0)
        solution[:, going] += step * along
        residual[:, going] -= step * image
        scaled = scale[:, going] * residual[:, going]
        after = np.einsum("dm,dm->m", residual[:, going], scaled)
        direction[:, going] = scaled + after / energy[going] * along
        energy[going] = np.where(curvature > 0, after, 0.0)
    return solution
