"""N:M masks by alternating directions: all groups of a linear map at once, not one after another.

SparseGPT (:mod:`graphprune.kernels.sparsegpt`) freezes what it has passed. Here every group is chosen again in each
round, in sight of all others: the best W for ``||X W - X W0||^2`` alone and the nearest D of the pattern alone are
found by turns, and a growing penalty draws the two together (ADMM)::

    W <- (H + rho I)^-1 (H W0 - V + rho D)
    D <- W + V / rho, the n largest of each group
    V <- V + rho (W - D)

on inputs that were scaled to equal lengths. It ends when no element of the mask changes any more. Weights for the mask
are another matter (:func:`graphprune.kernels.masked_refit.masked_refit`): at the end they are not yet the best.

Meng et al., ALPS: Improved optimization for highly sparse one-shot pruning for large language models, NeurIPS 2024,
section 3.1 and algorithm 1; the mask of SparseGPT that they begin with changes nothing here and is left out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

from graphprune.kernels.sparsegpt import largest_of_groups

Float64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.integer]

#: The penalty at first, and by how much it grows a round: slower growth finds better masks and takes longer.
PENALTY = 0.1
GROWTH = 1.05
#: Rounds at most, and before it may end.
MOST_ROUNDS = 150
LEAST_ROUNDS = 10
#: Inputs shorter than this part of the longest are not scaled up further: they say nothing.
LEAST_LENGTH = 1e-6


def alps_mask(
    matrix: Floats,
    hessian: Floats,
    n: int,
    groups: Ints,
    *,
    penalty: float = PENALTY,
    growth: float = GROWTH,
    rounds: int = MOST_ROUNDS,
) -> Mask:
    """The elements of a linear map that are to stay, so that its results on the samples change little.

    Args:
        matrix: ``[features, outputs]``.
        hessian: ``[features, features]`` Gram matrix of the inputs, in any unit.
        n: How many weights of a group stay, for each output.
        groups: ``[groups, m]`` the features of each group; features in none stay dense.
        penalty: ``rho`` of the first round, where the inputs have length 1.
        growth: By how much it grows each round.
        rounds: At most.

    Returns:
        ``[features, outputs]``: n of every group, and all of what is in no group.

    Raises:
        ValueError: The shapes do not fit, or a number is not finite.
    """
    features = len(matrix)
    if hessian.shape != (features, features):
        raise ValueError(f"a Hessian of shape {hessian.shape} for a weight of shape {matrix.shape}")
    if not (np.isfinite(hessian).all() and np.isfinite(matrix).all()):
        raise ValueError("a Hessian or a weight that is not finite")
    lengths = np.sqrt(np.maximum(np.diagonal(hessian), 0.0))
    longest = float(lengths.max(initial=0.0))
    if not longest or n >= groups.shape[1]:
        return largest_of_groups(np.abs(matrix), n, groups)
    lengths = np.maximum(lengths, LEAST_LENGTH * longest)
    # float32 is enough for what is only compared, and twice as fast.
    scaled = (hessian / np.outer(lengths, lengths)).astype(np.float32)
    weight = (matrix * lengths[:, None]).astype(np.float32)
    values, vectors = scipy.linalg.eigh(scaled, check_finite=False)
    values = np.maximum(values, 0.0)
    wanted = scaled @ weight
    chosen, dual = weight, np.zeros_like(weight)
    mask = np.zeros(matrix.shape, dtype=bool)
    rho = np.float32(penalty)
    for number in range(rounds):
        turned = vectors.T @ (wanted - dual + rho * chosen)
        free = vectors @ (turned / (values + rho)[:, None])
        drawn = free + dual / rho
        before, mask = mask, largest_of_groups(np.abs(drawn), n, groups)
        if number >= LEAST_ROUNDS and np.array_equal(before, mask):
            break
        chosen = np.where(mask, drawn, np.float32(0))
        dual += rho * (free - chosen)
        rho *= np.float32(growth)
    return mask
