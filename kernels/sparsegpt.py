"""N:M masks of a linear map that are chosen by what its inputs look like, and weights that make up for what goes.

With ``y = x W``, features along axis 0 of W, each output is pruned by itself: what its column loses is
``delta^T H delta``, H the Gram matrix of x. Optimal Brain Surgeon has the exact answer for one weight, or a block S of
weights, that go (Hassibi and Stork, NeurIPS 1992): the others change by ``-H^-1[:, S] (H^-1[S, S])^-1 w_S``, and
``w_S^T (H^-1[S, S])^-1 w_S`` is lost.

SparseGPT (Frantar and Alistarh, ICML 2023, algorithm 1) makes that affordable by an order: features are passed one
after another, and what has been passed is frozen, so that the inverses of all the Hessians that are left are in one
Cholesky factor, the same for all outputs. Here a group of M is passed at a time, not a feature: all C(M, N) ways to
prune it are compared by what they really lose, kept weights of the group among those that make up for it. Where there
are too many ways, weights of a group are judged one by one, as in the paper.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt
import scipy.linalg

from graphprune.kernels.gram import damped_factor
from graphprune.kernels.nm import nm_mask

Float64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.integer]

#: Ways to prune a group that are all compared; with more, weights are judged one by one.
MOST_PATTERNS = 128


def wanda_scores(matrix: Floats, squares: Floats) -> Float64:
    """``|w| * ||x_j||_2``: what an output loses with a weight, if nothing makes up for it.

    Sun et al., A simple and effective pruning approach for large language models, ICLR 2024, equation 1.

    Args:
        matrix: ``[features, outputs]``.
        squares: ``[features]`` sum of each feature's squares, the diagonal of the Gram matrix that is not centred.

    Returns:
        float64 ``[features, outputs]``.

    Raises:
        ValueError: There is not one square a feature.
    """
    if squares.shape != matrix.shape[:1]:
        raise ValueError(f"{squares.shape} squares for a weight of shape {matrix.shape}")
    norms = np.sqrt(np.maximum(squares.astype(np.float64), 0.0))
    return np.asarray(np.abs(matrix.astype(np.float64)) * norms[:, None])


def largest_of_groups(scores: Floats, n: int, groups: Ints) -> Mask:
    """The mask that keeps the n largest scores of every group, the earlier of equals; all of what is in no group.

    Args:
        scores: ``[features, outputs]``.
        n: How many stay.
        groups: ``[groups, m]`` the features of each group.
    """
    mask = np.ones(scores.shape, dtype=bool)
    mask[groups] = nm_mask(scores[groups], n, groups.shape[1])  # [groups, m, outputs]
    return mask


def sparsegpt(
    matrix: Floats,
    hessian: Floats,
    n: int,
    m: int,
    *,
    groups: Ints | None = None,
    damping: float = 0.01,
    block: int = 128,
    one_by_one: bool = False,
) -> tuple[Float64, Mask]:
    """Prune a linear map to N:M so that its results on the samples change little.

    Args:
        matrix: ``[features, outputs]``.
        hessian: ``[features, features]`` Gram matrix of the inputs, in any unit.
        n: How many weights of a group stay, for each output.
        m: Size of a group.
        groups: ``[groups, m]`` the features of each group, in the order in which groups are passed; by default runs of
            m. Features in no group stay dense, and make up for all groups.
        damping: Added to the diagonal of the Hessian, in units of its mean.
        block: Features after which what is pending reaches the features behind.
        one_by_one: Judge the weights of a group one by one, by ``w^2 / [U]_jj^2`` with U the factor, as the paper does,
            also where all ways could be compared.

    Returns:
        The new matrix, float64, zero wherever the mask is False, and the mask ``[features, outputs]``.

    Raises:
        ValueError: Shapes do not fit, a feature is in two groups, or a number is not finite.
    """
    features, _ = matrix.shape
    if groups is None:
        groups = np.arange(features - features % m).reshape(-1, m)
    _check(matrix, hessian, n, m, groups)
    rest = np.setdiff1d(np.arange(features), groups.ravel())
    order = np.concatenate([groups.ravel(), rest]).astype(np.int64)
    weight = matrix[order].astype(np.float64)
    mask = np.ones(matrix.shape, dtype=bool)
    factor = inverse_factor(hessian[np.ix_(order, order)], damping)
    block = max(m, block - block % m)
    joint = not one_by_one and comb(m, n) <= MOST_PATTERNS
    for start in range(0, groups.size, block):
        stop = min(start + block, groups.size)
        pending = np.zeros((stop - start, weight.shape[1]))
        for at in range(start, stop, m):
            rows = slice(at, at + m)
            step = _jointly if joint else _one_by_one
            kept, lost = step(weight[rows], factor[rows, rows], n)
            mask[rows] = kept
            pending[at - start : at - start + m] = lost
            weight[at:stop] -= factor[rows, at:stop].T @ lost
            weight[rows][~kept] = 0.0
        weight[stop:] -= factor[start:stop, stop:].T @ pending
    back = np.argsort(order)
    return weight[back], mask[back]


def inverse_factor(hessian: Floats, damping: float) -> Float64:
    """Upper U with ``U^T U = (H + penalty I)^-1``: U from row and column j on is that of the features from j on.

    Without the inverse itself: the factor V of ``H = V V^T``, V upper, is the Cholesky factor of H read from its end,
    and U is the inverse of V.
    """
    lower, _ = damped_factor(np.asarray(hessian[::-1, ::-1], dtype=np.float64), damping)
    inverse, info = scipy.linalg.lapack.dtrtri(np.asfortranarray(lower[::-1, ::-1]), lower=0)
    if info:
        raise ValueError("the factor of a Hessian is singular")
    return np.ascontiguousarray(np.triu(inverse))


def _jointly(weight: Float64, factor: Float64, n: int) -> tuple[Mask, Float64]:
    """The best n weights of a group to keep, output by output.

    Args:
        weight: ``[m, outputs]`` as it is by now.
        factor: ``[m, m]`` the group's block of the factor U, so that ``U^T U`` is the inverse Hessian's.
        n: How many stay.

    Returns:
        What is kept, and ``[m, outputs]`` what, multiplied with the transposed rows of U, is to be subtracted.
    """
    m = len(weight)
    # [patterns, m - n], those that leave the first weights first: of equals they win.
    gone = np.array(list(combinations(range(m), m - n))[::-1])
    if not gone.size:
        return np.ones(weight.shape, dtype=bool), np.zeros(weight.shape)
    # E = U_S (U_S^T U_S)^-1 w_S for each S that goes; its square is what is lost.
    columns = np.moveaxis(factor[:, gone], 0, 1)  # [patterns, m, m - n]
    kept = np.ones((len(gone), m), dtype=bool)
    np.put_along_axis(kept, gone, False, axis=1)
    maps = np.zeros((len(gone), m, m))
    np.put_along_axis(maps, gone[:, None], np.swapaxes(np.linalg.pinv(columns), 1, 2), axis=2)
    lost = maps @ weight  # [patterns, m, outputs]
    best = np.argmin(np.einsum("pmk,pmk->pk", lost, lost), axis=0)
    return kept[best].T, np.take_along_axis(lost, best[None, None], axis=0)[0]


def _one_by_one(weight: Float64, factor: Float64, n: int) -> tuple[Mask, Float64]:
    """As `_jointly`, by the scores of the paper, and each weight made up for only by those behind it."""
    m = len(weight)
    diagonal = np.diagonal(factor)
    kept = largest_of_groups(np.square(weight / diagonal[:, None]), n, np.arange(m)[None])
    weight, lost = weight.copy(), np.zeros(weight.shape)
    for j in range(m):
        lost[j] = np.where(kept[j], 0.0, weight[j]) / diagonal[j]
        weight[j + 1 :] -= np.outer(factor[j, j + 1 :], lost[j])
    return kept, lost


def _check(matrix: Floats, hessian: Floats, n: int, m: int, groups: Ints) -> None:
    features = len(matrix)
    if hessian.shape != (features, features):
        raise ValueError(f"a Hessian of shape {hessian.shape} for a weight of shape {matrix.shape}")
    if not 1 <= n <= m:
        raise ValueError(f"{n} of every {m} weights")
    flat = groups.ravel()
    if groups.ndim != 2 or groups.shape[1] != m:
        raise ValueError(f"groups of shape {groups.shape} where [groups, {m}] is expected")
    if len(np.unique(flat)) < len(flat) or (len(flat) and not 0 <= flat.min() <= flat.max() < features):
        raise ValueError(f"groups must share no feature and lie in 0 to {features - 1}")
    if not np.isfinite(matrix).all():
        raise ValueError("a weight that is not finite")
