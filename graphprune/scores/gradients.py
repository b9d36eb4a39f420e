"""Saliency from gradients on the calibration's inputs (see :mod:`graphprune.gradients.saliency` for the loss)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphprune.gradients.saliency import Loss, Rows, gate_gradients, weight_fisher
from graphprune.scores.evidence import Evidence, Needs, Scores


@dataclass(frozen=True)
class _Gradients:
    """A mean over samples.

    Attributes:
        loss: What is differentiated.
    """

    loss: Loss = "auto"
    needs: ClassVar[Needs] = "gradients"

    def _mean(self, evidence: Evidence, rows: Iterator[Rows]) -> Scores:
        total = np.zeros(len(evidence.network.analysis.atoms))
        count = 0
        for batch in rows:
            total += batch.sum(axis=0)
            count += len(batch)
        return total / max(count, 1)

    def _gates(self, evidence: Evidence, name: str) -> Iterator[Rows]:
        return gate_gradients(
            evidence.network,
            evidence.inputs(name),
            groups=evidence.groups,
            loss=self.loss,
            seed=evidence.seed,
            progress=evidence.progress,
        )


@dataclass(frozen=True)
class Taylor(_Gradients):
    """The first-order change of the loss, ``mean_n |dL_n / dg_l|``.

    g_l is the label's gate: 1, and 0 when the label is removed, so that -dL/dg is what the first-order expansion says
    of its removal (Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017,
    section 2.2, there for a feature map; with gates: Molchanov et al., Importance Estimation for Neural Network
    Pruning, 2019, section 3.1). A label is one gate at all its consumers, so that its parts are summed before the
    absolute value is taken. Absolute values are taken sample by sample: gradients of a trained network nearly cancel
    over the samples.
    """

    def __call__(self, evidence: Evidence) -> Scores:
        return self._mean(evidence, (np.abs(rows) for rows in self._gates(evidence, "taylor")))


@dataclass(frozen=True)
class Fisher(_Gradients):
    """The second-order change of the loss, ``1 / (2 N) sum_n (dL_n / dg_l) ** 2``.

    The Hessian's diagonal at the gates is replaced by the empirical Fisher information (Theis et al., Faster gaze
    prediction with dense networks and Fisher pruning, 2018, section 2; over coupled channels, whose gate is one: Liu
    et al., Group Fisher Pruning, 2021, section 3). Without labels it is the Gauss-Newton matrix of the distance between
    the outputs of the original and of the pruned network.
    """

    def __call__(self, evidence: Evidence) -> Scores:
        return self._mean(evidence, (0.5 * rows**2 for rows in self._gates(evidence, "fisher")))


@dataclass(frozen=True)
class OBD(_Gradients):
    """Optimal brain damage, ``1/2 sum_w h_ww w ** 2`` over the weights that bear the label.

    LeCun et al., Optimal Brain Damage, 1990, section 2.2, summed over the coupled weights; h is the diagonal of their
    empirical Fisher matrix, ``h_ww = 1/N sum_n (dL_n / dw) ** 2``, in the place of the second derivatives that the
    paper propagates. Weights count as independent, which those of a channel are not: :class:`Fisher` takes the channel
    as one.
    """

    def __call__(self, evidence: Evidence) -> Scores:
        rows = weight_fisher(
            evidence.network,
            evidence.inputs("obd"),
            groups=evidence.groups,
            loss=self.loss,
            seed=evidence.seed,
            progress=evidence.progress,
        )
        return self._mean(evidence, (0.5 * batch for batch in rows))
