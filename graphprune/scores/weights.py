"""Saliency from weights alone."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from graphprune.analysis import Analysis
from graphprune.evaluate import evaluate_constant
from graphprune.graph import Tensor
from graphprune.kernels.saliency import sums_by_label
from graphprune.scores.evidence import Evidence, Needs, Scores


def weights_of(analysis: Analysis) -> list[Tensor]:
    """Real-valued weights that bear labels, running means and variances left out: they are no parameters."""
    found = []
    for tensor in analysis.colourings:
        if not tensor.constant or (tensor.producer is not None and not analysis.is_leaf(tensor.producer)):
            continue
        if tensor.dtype is None or not (tensor.dtype.is_floating_point() or tensor.dtype.is_integer()):
            continue
        if tensor.uses and all(
            op.op_type == "BatchNormalization" and slot in (3, 4) for op, slot in tensor.uses
        ):
            continue
        found.append(tensor)
    return found


class Magnitude:
    """The p-norm of all weights that a label touches, on the side that makes it and on the side that reads it.

    ``(sum |w| ** p) ** (1 / p)`` over the elements of every weight that bear the label (Li et al., Pruning Filters
    for Efficient ConvNets, 2017, section 3.1, summed over the coupled weights as in Fang et al., DepGraph, 2023,
    section 3.3).
    """

    needs: ClassVar[Needs] = "weights"
    power: ClassVar[float]

    def __call__(self, evidence: Evidence) -> Scores:
        analysis = evidence.network.analysis
        count = len(analysis.atoms)
        total = np.zeros(count)
        for tensor in weights_of(analysis):
            array = evaluate_constant(tensor)
            for labels in analysis.labellings(tensor):
                total += sums_by_label(array, labels, count, self.power)
        return np.asarray(total ** (1 / self.power), dtype=np.float64)


class L1(Magnitude):
    """The 1-norm (see :class:`Magnitude`)."""

    power = 1


class L2(Magnitude):
    """The 2-norm (see :class:`Magnitude`)."""

    power = 2


class Random:
    """Uniform in [0, 1): the baseline that any criterion has to beat."""

    needs: ClassVar[Needs] = "weights"

    def __call__(self, evidence: Evidence) -> Scores:
        return np.random.default_rng(evidence.seed).random(len(evidence.network.analysis.atoms))
