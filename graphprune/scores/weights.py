"""Saliency from weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from graphprune.axes.analysis import Analysis
from graphprune.axes.groups import Group
from graphprune.axes.labels import Labels
from graphprune.axes.members import own_axis
from graphprune.axes.signature import Role
from graphprune.errors import OptionError
from graphprune.graph import Op, Tensor
from graphprune.graph.evaluate import evaluate_constant
from graphprune.kernels.saliency import distance_sums, maxima_by_label, slices_by_label, sums_by_label
from graphprune.rules.registry import find_rule
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


def _is_vector(tensor: Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape or ()) <= 1


def sums_of_powers(analysis: Analysis, power: float) -> Scores:
    """``sum |w| ** power`` over the elements of every weight that bear each label; float64 ``[number of atoms]``."""
    total = np.zeros(len(analysis.atoms))
    for tensor in weights_of(analysis):
        array = evaluate_constant(tensor)
        for labels in analysis.labellings(tensor):
            total += sums_by_label(array, labels, len(total), power)
    return total


class Magnitude:
    """The p-norm of all weights that a label touches, on the side that makes it and on the side that reads it.

    ``(sum |w| ** p) ** (1 / p)`` over the elements of every weight that bear the label (Li et al., Pruning Filters
    for Efficient ConvNets, 2017, section 3.1, summed over the coupled weights as in Fang et al., DepGraph, 2023,
    section 3.3).
    """

    needs: ClassVar[Needs] = "weights"
    power: ClassVar[float]

    def __call__(self, evidence: Evidence) -> Scores:
        total = sums_of_powers(evidence.network.analysis, self.power)
        return np.asarray(total ** (1 / self.power), dtype=np.float64)


class L1(Magnitude):
    """The 1-norm (see :class:`Magnitude`)."""

    power = 1


class L2(Magnitude):
    """The 2-norm (see :class:`Magnitude`)."""

    power = 2


class LInf:
    """The largest ``|w|`` of all matrices and filters that a label touches.

    The limit of :class:`Magnitude` for large p, but for vectors (biases, scales), which count only where a label
    touches nothing else: they are in another unit, and a BatchNormalization's scale alone is larger than nearly every
    weight. (Inner channels of a CIFAR-10 ResNet-20 cut by 30 %, nothing repaired: 41 % right, 25 % with vectors.)
    """

    needs: ClassVar[Needs] = "weights"

    def __call__(self, evidence: Evidence) -> Scores:
        analysis = evidence.network.analysis
        count = len(analysis.atoms)
        largest = {vector: np.zeros(count) for vector in (False, True)}
        touched = np.zeros(count, dtype=bool)
        for tensor in weights_of(analysis):
            array, vector = evaluate_constant(tensor), _is_vector(tensor)
            for labels in analysis.labellings(tensor):
                np.maximum(largest[vector], maxima_by_label(array, labels, count), out=largest[vector])
                touched[labels] |= not vector
        return np.where(touched, largest[False], largest[True])


class Random:
    """Uniform in [0, 1): the baseline that any criterion has to beat."""

    needs: ClassVar[Needs] = "weights"

    def __call__(self, evidence: Evidence) -> Scores:
        return np.random.default_rng(evidence.seed).random(len(evidence.network.analysis.atoms))


class Lamp:
    """LAMP: squared magnitude over the sum of those in the group that are not smaller.

    ``s_i = m_i / sum {m_j : m_j >= m_i, j in the group}`` (Lee et al., Layer-adaptive Sparsity for the Magnitude-based
    Pruning, 2021, equation 1), where ``m`` is the square of :class:`L2` and takes the place of the paper's single
    weight squared. Within a group it orders as L2 does; across groups it says which share of what would be left a
    label is, so that one threshold serves all groups. Equal magnitudes score equally.
    """

    needs: ClassVar[Needs] = "weights"

    def __call__(self, evidence: Evidence) -> Scores:
        squares = sums_of_powers(evidence.network.analysis, 2)
        scores = np.zeros(len(squares))
        for group in evidence.network.groups:
            size = squares[group.labels]
            ordered = np.sort(size)
            not_smaller = np.cumsum(ordered[::-1])[::-1][np.searchsorted(ordered, size)]
            scores[group.labels] = np.divide(
                size, not_smaller, out=np.zeros(len(size)), where=not_smaller > 0
            )
        return scores


class BatchNormScale:
    """Network Slimming: the scale with which BatchNormalization multiplies what a label makes.

    The mean of ``|gamma|`` over the scales that bear the label (Liu et al., Learning Efficient Convolutional Networks
    through Network Slimming, 2017, section 3). A Mul by a constant vector behind a contraction, with or without a
    constant added in between, is such a scale too: that is how a BatchNormalization looks that an exporter took
    apart, and its vector is then ``gamma / sqrt(variance)``.

    A label without a scale falls back to its L2, times what makes it fit in: in a group of which other labels have a
    scale, their mean ``|gamma|`` over their mean L2; in a group without any, the network's mean ``|gamma|`` over the
    group's mean L2. So it is comparable within its group, and no more than typical across groups.
    """

    needs: ClassVar[Needs] = "weights"

    def __call__(self, evidence: Evidence) -> Scores:
        analysis = evidence.network.analysis
        total, number = np.zeros(len(analysis.atoms)), np.zeros(len(analysis.atoms))
        for tensor in dict.fromkeys(_scales(analysis)):
            array = evaluate_constant(tensor)
            for labels in analysis.labellings(tensor):
                total += sums_by_label(array, labels, len(total), 1)
                number += np.bincount(labels.ravel(), minlength=len(total)) * (array.size / labels.size)
        number[0] = 0
        scaled = number > 0
        if not scaled.any():
            raise OptionError(
                "the score 'bn-scale' finds no scale: the model has no BatchNormalization behind a layer that may be"
                " pruned (exporters fold it into the layer before: export in training mode, or choose another score)"
            )
        scales = np.divide(total, number, out=np.zeros(len(total)), where=scaled)
        magnitude = np.sqrt(sums_of_powers(analysis, 2))
        typical = float(scales[scaled].mean())
        for group in evidence.network.groups:
            labels = group.labels
            there, absent = labels[scaled[labels]], labels[~scaled[labels]]
            wanted = float(scales[there].mean()) if len(there) else typical
            mean = float(magnitude[there if len(there) else labels].mean())
            if mean > 0:
                scales[absent] = magnitude[absent] * (wanted / mean)
        return scales


def _scales(analysis: Analysis) -> Iterator[Tensor]:
    """Constant scales of BatchNormalization, and of what was one."""
    for op in analysis.graph.ops:
        if op.op_type == "BatchNormalization" and not op.domain:
            scale = op.inputs[1]
            if scale is not None and scale.constant:
                yield scale
        elif op.op_type == "Mul" and not op.domain:
            for scale, other in (op.inputs, op.inputs[::-1]):
                if scale is None or other is None or not scale.constant:
                    continue
                if _is_vector(scale) and prod(scale.shape or ()) > 1 and _is_product(other):
                    yield scale


def _is_product(tensor: Tensor) -> bool:
    """True if a contraction with a weight makes it, but for constants that are added."""
    op = tensor.producer
    while op is not None and op.kind in ("Add", "Sub"):
        computed = [t for t in op.inputs if t is not None and not t.constant]
        op = computed[0].producer if len(computed) == 1 else None
    return op is not None and _is_contraction(op)


def _is_contraction(op: Op) -> bool:
    rule = find_rule(op)
    constant = [t.constant for t in op.inputs if t is not None]
    return rule is not None and bool(rule.macs) and any(constant) and not all(constant)


class GeometricMedian:
    """FPGM: how far a filter is from all others; the ones in the middle can be replaced by the rest.

    ``s_i = sum_j |f_i - f_j|_2`` over the labels of the block (He et al., Filter Pruning via Geometric Median, 2019,
    section 3.2, equation 7). The filter of a label is all that bears it in the weights that make or keep the group's
    positions (convolution filters, depthwise ones too, columns of a MatMul); vectors (biases, scales) are left out,
    as in the paper. Where no weight makes a group, the weights that read it take their place, and where there are
    vectors only, these.
    """

    needs: ClassVar[Needs] = "weights"

    def __call__(self, evidence: Evidence) -> Scores:
        analysis = evidence.network.analysis
        scores = np.zeros(len(analysis.atoms))
        owner = np.full(len(scores), -1, dtype=np.int64)
        for index, group in enumerate(evidence.network.groups):
            owner[group.labels] = index
        borne: dict[int, list[tuple[Tensor, Labels]]] = {}
        for tensor in weights_of(analysis):
            for labels in analysis.labellings(tensor):
                for index in np.unique(owner[labels]).tolist():
                    borne.setdefault(index, []).append((tensor, labels))
        for index, group in enumerate(evidence.network.groups):
            makers = _makers(group, borne.get(index, []))
            for block in group.blocks:
                scores[block] = distance_sums(len(block), partial(_filters, makers, block))
        return scores


def _makers(group: Group, borne: list[tuple[Tensor, Labels]]) -> list[tuple[Tensor, Labels]]:
    """The weights that make a group's positions; those that read them where there are none."""
    matrices = [(t, labels) for t, labels in borne if not _is_vector(t)]
    making = {(m.tensor, m.axis) for m in group.members if m.role == Role.PASS.value}
    made = [(t, labels) for t, labels in matrices if (t.name, own_axis(labels)) in making]
    return made or matrices or borne


def _filters(weights: list[tuple[Tensor, Labels]], block: Labels) -> Iterator[npt.NDArray[Any]]:
    for tensor, labels in weights:
        if np.isin(block[0], labels):
            yield slices_by_label(evaluate_constant(tensor), labels, block)
