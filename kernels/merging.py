"""Merging: what removed inputs of a linear map gave, taken over by kept inputs that are like them.

With the covariance C of the inputs, the best linear prediction of removed ones from kept ones is ``x_R ~ A^T x_K + a``
with ``A = C_KK^-1 C_KR`` and ``a = mean_R - A^T mean_K``. So the rows of a weight that read removed inputs are added,
times A, to the rows that read kept ones, and a goes into the bias. An input that is a multiple of a kept one is merged
into that one alone, exactly; others are spread over those that resemble them.

Sources: Kim et al., Neuron Merging: Compensating for Pruned Neurons, NeurIPS 2020 (one kept neuron by the cosine of the
filters); Srinivas & Babu, Data-free Parameter Pruning for Deep Neural Networks, BMVC 2015. Here all kept ones at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Added to the diagonal of the kept inputs' correlations: enough for a Cholesky factor of what is singular.
DAMPING = 1e-6
#: Outputs are scaled up to this factor to have their variance back.
MOST_SCALED = 3.0


def merging_coefficients(moments: Float64, kept: Ints, removed: Ints) -> Float64:
    """``[kept, removed]`` coefficients of the best prediction of removed inputs from kept ones.

    Args:
        moments: ``[c, c]`` covariance, or second moments where there is to be no shift; positive semidefinite.
        kept, removed: Indices into it.
    """
    result = np.zeros((len(kept), len(removed)))
    scale = np.sqrt(np.maximum(np.diagonal(moments), 0.0))
    live = scale[kept] > 0
    if not live.any() or not len(removed):
        return result
    chosen = kept[live]
    among = moments[np.ix_(chosen, chosen)] / np.outer(scale[chosen], scale[chosen])
    across = moments[np.ix_(chosen, removed)] / scale[chosen][:, None]
    among.flat[:: len(among) + 1] += DAMPING
    try:
        found = scipy.linalg.cho_solve(scipy.linalg.cho_factor(among, lower=True), across)
    except scipy.linalg.LinAlgError:  # rounding, or pairs that contradict each other
        values, vectors = scipy.linalg.eigh(among)
        found = vectors @ ((vectors.T @ across) / np.maximum(values, DAMPING)[:, None])
    result[live] = found / scale[chosen][:, None]
    return result


def linear_covariance(matrices: Float64, covariance: Float64, channel: Ints, place: Ints) -> Float64:
    """``[outputs, outputs]`` covariance of what linear maps give; features of different places are uncorrelated.

    Args:
        matrices: ``[g, features, outputs]``; the outputs of all maps are taken together, map by map.
        covariance: ``[c, c]`` of the channels.
        channel, place: ``[g, features]`` of each feature; no two features of a map agree in both.
    """
    groups, features, outputs = matrices.shape
    total = groups * outputs
    if groups > 1 and (channel == channel[:, :1]).all() and (place == place[:1]).all():
        # One channel each: the covariance of the channels, times the products of their filters.
        filters = np.swapaxes(matrices, 1, 2).reshape(total, features)
        own = np.repeat(channel[:, 0], outputs)
        return np.asarray(covariance[np.ix_(own, own)] * (filters @ filters.T))
    result = np.zeros((total, total))
    column = np.arange(total).reshape(groups, outputs)
    for each in np.unique(place):
        group, feature = np.nonzero(place == each)
        block = np.zeros((len(covariance), total))
        block[channel[group, feature][:, None], column[group]] = matrices[group, feature]
        result += block.T @ (covariance @ block)
    return result


def linear_variance(matrices: Float64, covariance: Float64, channel: Ints, place: Ints) -> Float64:
    """``[g, outputs]`` the diagonal of :func:`linear_covariance`, at a part of its cost."""
    result = np.zeros((len(matrices), matrices.shape[2]))
    for group, matrix in enumerate(matrices):
        for each in np.unique(place[group]):
            at = place[group] == each
            own = channel[group, at]
            result[group] += np.einsum("fo,fo->o", matrix[at], covariance[np.ix_(own, own)] @ matrix[at])
    return result


def matching_scale(wanted: Float64, found: Float64) -> Float64:
    """What outputs are multiplied with to have the variance wanted: at least 1, at most `MOST_SCALED`."""
    sound = (wanted > 0) & (found > 0)
    ratio = np.divide(wanted, found, out=np.ones_like(wanted), where=sound)
    return np.asarray(np.clip(np.sqrt(ratio), 1.0, MOST_SCALED))
