"""Saliency from what the readers of a label see: magnitude, variance and sparsity of activations, and Wanda.

The readers of a group are the contractions that sum over it; a feature of a reader is one entry of the rows that it
multiplies (an input feature; of a convolution a channel at a kernel position, with the padding's zeros, which are
alike for all channels). Moments of each feature are gathered on the calibration's inputs in the unpruned network.

A label may have many features in one reader (kernel positions, what a Flatten makes of a channel) and several readers.
Where a criterion is a mean, it is the mean over the label's features in each reader, and then over the readers that
see the label, each counting the same: readers look at the same activation, and a kernel of 3 x 3 tells no more of it
than one of 1 x 1. Where a criterion is a sum over weights, it is the sum over all readers.

Groups that no contraction with a constant weight reads are scored by :class:`graphprune.scores.weights.L2`. In a group
that some reader sees, a label that none sees scores zero.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from graphprune.calibration import Array
from graphprune.kernels.moments import FeatureMoments
from graphprune.layers.statistics import Reader, find_readers, gather
from graphprune.scores.evidence import Evidence, Needs, Scores
from graphprune.scores.weights import L2

#: Bytes of the moments of one feature.
FEATURE_BYTES = 40


class _Activation:
    """Gathers moments and brings what a criterion makes of them from features to labels."""

    needs: ClassVar[Needs] = "activations"
    name: ClassVar[str]
    #: A mean over a label's features and readers; else a sum.
    averaged: ClassVar[bool] = True

    def judge(self, moments: FeatureMoments, weight: Array) -> Array:
        """What each feature is worth to one product of a reader.

        Args:
            moments: Of the features, ``[d]``.
            weight: float64 ``[d, m]``.

        Returns:
            float64 ``[d]``.
        """
        raise NotImplementedError

    def __call__(self, evidence: Evidence) -> Scores:
        count = len(evidence.network.analysis.atoms)
        wanted = np.zeros(count, dtype=bool)
        for group in evidence.groups:
            wanted[group.labels] = True
        readers = [
            reader
            for reader in find_readers(evidence.network)
            if any(wanted[labels].any() for labels in reader.labels)
        ]
        total, seen_by = np.zeros(count), np.zeros(count)
        gathered = gather(
            evidence.network,
            readers,
            evidence.inputs(self.name),
            FeatureMoments,
            lambda features: FEATURE_BYTES * features,
            seed=evidence.seed,
            progress=evidence.progress,
        )
        for reader, moments in gathered:
            sums, features = self._by_label(reader, moments, count)
            total += sums / np.maximum(features, 1) if self.averaged else sums
            seen_by += features > 0
        scores = L2()(evidence)
        for group in evidence.groups:
            readers_of = seen_by[group.labels]
            if readers_of.any():
                worth = total[group.labels]
                scores[group.labels] = worth / np.maximum(readers_of, 1) if self.averaged else worth
        return scores

    def _by_label(self, reader: Reader, moments: list[FeatureMoments], count: int) -> tuple[Array, Array]:
        """The sum of what its features are worth for each label, and how many there are."""
        worth = np.concatenate([self.judge(m, w) for m, w in zip(moments, reader.matrices, strict=True)])
        sums, features = np.zeros(count), np.zeros(count)
        for labels in reader.labels:
            sums += np.bincount(labels.ravel(), weights=worth, minlength=count)
            features += np.bincount(labels.ravel(), minlength=count)
        return sums, features


class MeanAbsolute(_Activation):
    """Mean absolute activation, ``mean |x|`` over samples and positions.

    (Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017, section 2.2, the
    criterion "activation"; there without the absolute value, since they measure behind a ReLU.) Means over features and
    readers: see the module.
    """

    name = "mean-abs"

    def judge(self, moments: FeatureMoments, weight: Array) -> Array:
        return moments.mean_absolute


class Variance(_Activation):
    """Variance of the activation, ``mean (x - mean x)^2`` over samples and positions.

    A bias makes good the loss of a channel that is nearly constant (Polyak & Wolf, Channel-level acceleration of deep
    face representations, 2015, "inbound pruning", by the variance of what a channel contributes; Molchanov et al.,
    2017, section 2.2, by the activation's own deviation). Means over features and readers: see the module.
    """

    name = "variance"

    def judge(self, moments: FeatureMoments, weight: Array) -> Array:
        return moments.variance


class APoZ(_Activation):
    """One minus the average percentage of zeros: ``1 - mean (x == 0)`` over samples and positions.

    (Hu et al., Network Trimming: A Data-Driven Neuron Pruning Approach, 2016, equation 1; they remove what has the
    *most* zeros, so that the score is the rest.) Tells channels apart only behind an activation that makes exact zeros.
    Means over features and readers: see the module.
    """

    name = "apoz"

    def judge(self, moments: FeatureMoments, weight: Array) -> Array:
        return 1 - moments.zeros


class Wanda(_Activation):
    """Wanda, summed over structures: ``sum |W_fo| * |x_f|_2`` over all weights of all readers that bear the label.

    (Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023, equation 1, for one weight.)
    The norm of feature f is its root mean square, that is the paper's divided by the root of the number of rows: within
    a reader this changes nothing, and readers of larger images, which have more rows, do not outweigh the others.
    """

    name = "wanda"
    averaged = False

    def judge(self, moments: FeatureMoments, weight: Array) -> Array:
        return np.asarray(np.sqrt(moments.mean_square) * np.abs(weight).sum(axis=1))
