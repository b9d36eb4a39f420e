"""What a contraction reads, feature by feature."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphprune.kernels.merging import linear_covariance, linear_variance
from graphprune.layers.contractions import Contraction, find_contraction
from graphprune.repair.moments.signals import MAX_CHANNELS, Channels, Float64, Ints, Signal

#: Covariances of a layer's outputs are worked out with so many multiplications at most; above, only variances.
MAX_PRODUCTS = 1 << 37
#: Correlation of a channel with itself one position further. (CIFAR-10 ResNet-20, errors of the repaired network's
#: logits in units of their variance with 0 / .3 / .6 / .8: .24 .23 .22 .22 at 10 %, .70 .67 .66 .65 at 30 % of the
#: inner channels.)
NEIGHBOURS = 0.5


@dataclass(frozen=True)
class Features:
    """What a contraction reads, feature by feature.

    Attributes:
        moments: Of the channels.
        channel: int ``[g, features]``.
        place: int ``[g, features]``; features of different places are taken as uncorrelated, but for ``taps``.
        share: ``[g, features]``; at which part of all positions the feature is read: less than one where a kernel
            reaches over the border, and sees zeros.
        taps: ``[taps, taps]`` a root of the correlations between a kernel's taps; None for one tap.
    """

    moments: Channels
    channel: Ints
    place: Ints
    share: Float64
    taps: Float64 | None = None

    def _mixed(self, matrices: Float64) -> Float64:
        """Weights on uncorrelated places that give the same covariances as those on correlated ones."""
        if self.taps is None:
            return matrices
        groups, features, outputs = matrices.shape
        count = len(self.taps)
        by_tap = matrices.reshape(groups, features // count, count, outputs)
        return np.asarray(np.einsum("gcto,tq->gcqo", by_tap, self.taps).reshape(matrices.shape))

    def covariance_of(self, matrices: Float64) -> Float64:
        """``[outputs, outputs]`` covariance of all outputs of ``matrices`` ``[g, features, outputs]``."""
        moments = self.moments.covariance
        cost = len(np.unique(self.place)) * len(moments) * (len(moments) + matrices.shape[2])
        if cost * len(matrices) * matrices.shape[2] > MAX_PRODUCTS:
            return np.diag(self.variance_of(matrices).ravel())
        return linear_covariance(self._mixed(matrices), moments, self.channel, self.place)

    def variance_of(self, matrices: Float64) -> Float64:
        """``[g, outputs]`` the variances alone."""
        return linear_variance(self._mixed(matrices), self.moments.covariance, self.channel, self.place)


def features_of(contraction: Contraction, signal: Signal | None) -> Features | None:
    """What is known of the features that a contraction reads.

    Args:
        contraction: An op of the twin, its sizes those before pruning.
        signal: Its input; None where nothing is known: then it is assumed white.

    Returns:
        None where the channels do not lie along the axis that is summed over, or are too many.
    """
    x, weight = contraction.input.shape, contraction.weight_tensor.shape
    if x is None or weight is None:
        return None
    conv = contraction.op.kind == "Conv"
    axis = 1 if conv else len(x) - (2 if getattr(contraction.form, "transposed_activation", False) else 1)
    if signal is None:
        if x[axis] > MAX_CHANNELS:
            return None
        size = x[axis]
        signal = Signal.of(Channels(np.zeros(size), np.eye(size), np.zeros(size, dtype=bool)), axis)
    if signal.axis != axis or len(signal.channel) != x[axis]:
        return None
    if not conv:
        return Features(signal.moments, signal.channel[None], signal.place[None], np.ones((1, x[axis])))
    groups = x[1] // weight[1]
    share = _tap_shares(contraction, x)
    taps = len(share)
    channel = np.repeat(signal.channel, taps).reshape(groups, -1)
    place = np.repeat(signal.place * taps, taps) + np.tile(np.arange(taps), x[1])
    return Features(
        signal.moments,
        channel,
        place.reshape(groups, -1),
        np.tile(share, x[1]).reshape(groups, -1),
        _tap_root(weight[2:]) if taps > 1 else None,
    )


def _tap_root(kernel: tuple[int, ...]) -> Float64:
    """A root of the correlations between the taps of a kernel, `NEIGHBOURS` to the power of their distance."""
    place = np.stack(np.meshgrid(*map(np.arange, kernel), indexing="ij"), axis=-1).reshape(-1, len(kernel))
    distance = np.sqrt(((place[:, None] - place) ** 2).sum(axis=-1))
    return np.linalg.cholesky(NEIGHBOURS**distance)


def _tap_shares(contraction: Contraction, x: tuple[int, ...]) -> Float64:
    """For each tap of a kernel the part of all windows in which it lies inside of the input."""
    op = contraction.op
    single = find_contraction(op, {**op.attributes, "group": 1})
    weight = contraction.weight_tensor.shape or ()
    if not isinstance(single, Contraction):
        return np.ones(int(np.prod(weight[2:])))
    rows = single.form.rows(np.ones((1, 1, *x[2:]), dtype=np.float32), (1, 1, *weight[2:]))
    return np.asarray(rows[0].mean(axis=0, dtype=np.float64))
