"""Saliency from what the readers of a group lose: ThiNet, LASSO selection, structured optimal brain surgeon.

The readers of a group are the contractions that sum over it. Each sees its input's second moments (centred: a bias
takes up what is constant), gathered on the calibration's inputs in the unpruned network. Errors of readers are added in
units of the variance of their outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from graphprune.axes.groups import Group
from graphprune.axes.labels import Labels
from graphprune.calibration import Array
from graphprune.gradients.gates import find_gates
from graphprune.graph import Op
from graphprune.kernels import obs, selection
from graphprune.kernels.gram import GramAccumulator
from graphprune.kernels.saliency import sums_by_label
from graphprune.layers.execution import Piece
from graphprune.layers.statistics import BATCH, Reader, find_readers, gather, nodes_before
from graphprune.scores.evidence import Evidence, Needs, Scores
from graphprune.scores.weights import L2

#: Damping of Gram matrices, relative to the mean of their diagonals.
DAMPING = 1e-2


@dataclass(frozen=True)
class GroupReader:
    """One product of one reader, as a group sees it.

    Attributes:
        reader: The contraction.
        product: Which of its products (conv groups).
        covariance: float64 ``[features, features]`` of its input.
        mean: float64 ``[features]`` of its input.
        features: For each label of the group the features that bear it.
        scale: One over the variance of the outputs of all products of the reader.
    """

    reader: Reader
    product: int
    covariance: Array
    mean: Array
    features: list[Array]
    scale: float

    @property
    def weight(self) -> Array:
        """float64 ``[features, outputs]``."""
        return np.asarray(self.reader.matrices[self.product])

    def as_obs(self) -> obs.Reader:
        """The reader in the form that the kernel takes."""
        return obs.Reader(self.covariance, self.weight, self.features, self.scale)


def group_readers(evidence: Evidence, score: str) -> Iterator[tuple[Group, list[GroupReader]]]:
    """Each group that may be cut with its readers and their statistics, in no particular order.

    Groups that no contraction with a constant weight reads come with an empty list.
    """
    network = evidence.network
    count = len(network.analysis.atoms)
    owner = np.full(count, -1, dtype=np.int64)
    groups = evidence.groups
    for number, group in enumerate(groups):
        owner[group.labels] = number
    readers = find_readers(network)
    read_by: dict[int, list[Reader]] = {number: [] for number in range(len(groups))}
    for reader in readers:
        hit = {int(n) for labels in reader.labels for n in np.unique(owner[labels]) if n >= 0}
        for number in hit:
            read_by[number].append(reader)
    needed = [reader for reader in readers if any(reader in there for there in read_by.values())]
    waiting = {number: len(there) for number, there in read_by.items()}
    for number, missing in waiting.items():
        if not missing:
            yield groups[number], []
    statistics: dict[int, list[tuple[Array, Array]]] = {}
    gathered = gather(
        network,
        needed,
        evidence.inputs(score),
        GramAccumulator,
        lambda features: 8 * features * features,
        seed=evidence.seed,
        progress=evidence.progress,
    )
    for reader, accumulators in gathered:
        statistics[id(reader)] = [(a.covariance(), a.x / max(a.count, 1)) for a in accumulators]
        for number, there in read_by.items():
            if reader in there:
                waiting[number] -= 1
                if not waiting[number]:
                    yield groups[number], list(_seen_by(groups[number], there, statistics))
        open_readers = {id(r) for number, there in read_by.items() if waiting[number] for r in there}
        for key in [key for key in statistics if key not in open_readers]:
            del statistics[key]


def _seen_by(
    group: Group, readers: Sequence[Reader], statistics: dict[int, list[tuple[Array, Array]]]
) -> Iterator[GroupReader]:
    unit = {int(label): number for number, label in enumerate(group.labels)}
    for reader in readers:
        moments = statistics[id(reader)]
        variance = sum(
            float(np.einsum("dm,dm->", matrix, covariance @ matrix))
            for matrix, (covariance, _) in zip(reader.matrices, moments, strict=True)
        )
        for product, (covariance, mean) in enumerate(moments):
            features: list[list[int]] = [[] for _ in unit]
            for labels in reader.labels:
                for feature, label in enumerate(labels[product].tolist()):
                    if label in unit:
                        features[unit[label]].append(feature)
            if any(features):
                arrays = [np.array(sorted(f), dtype=np.int64) for f in features]
                yield GroupReader(
                    reader, product, covariance, mean, arrays, 1 / variance if variance else 0.0
                )


def removal_order(
    group: Group, readers: Sequence[GroupReader], keep: int = 1, weights_at: Sequence[int] = ()
) -> obs.Removal:
    """The order in which structured OBS removes a group's labels (positions in ``group.labels``).

    Args:
        group: The group.
        readers: Its readers; at least one.
        keep: How many of ``group.unit`` parts are left at the end.
        weights_at: Numbers of labels at which corrected weights are wanted.
    """
    starts = np.cumsum([0] + [len(block) for block in group.blocks])
    blocks = [np.arange(a, b) for a, b in pairwise(starts)]
    lengths = {len(block) for block in blocks}
    tied = blocks if len(lengths) == 1 else None
    left = keep * len(blocks) if tied is not None else keep
    return obs.remove_greedily(
        [reader.as_obs() for reader in readers], left, blocks=tied, weights_at=weights_at, damping=DAMPING
    )


class _Reconstruction:
    """Scores from the readers' statistics; groups without readers are scored by :func:`product_energies`."""

    needs: ClassVar[Needs] = "activations"
    name: ClassVar[str]

    def judge(self, group: Group, readers: Sequence[GroupReader]) -> Array:
        """Score the labels of a group, float64 ``[size]``."""
        raise NotImplementedError

    def __call__(self, evidence: Evidence) -> Scores:
        scores = L2()(evidence)
        unread = []
        for group, readers in group_readers(evidence, self.name):
            if readers:
                scores[group.labels] = self.judge(group, readers)
            else:
                unread.append(group)
        if unread:
            labels = np.concatenate([group.labels for group in unread])
            scores[labels] = product_energies(evidence, labels, self.name)[labels]
        return scores


def product_energies(evidence: Evidence, labels: Labels, score: str) -> Scores:
    """What labels contribute to products of two activations, such as the queries and keys of attention.

    A product ``sum_d q_id k_jd`` loses ``q_id k_jd`` with label d: over all i and j that is ``|q_d|^2 |k_d|^2``.
    Nothing can be corrected there, and products of different labels are taken to be uncorrelated. An operand alone
    counts with its energy.

    Args:
        evidence: The network and its inputs.
        labels: The labels to judge.
        score: The criterion's name, for its complaint.

    Returns:
        float64 ``[number of atoms]``; zero for labels that no op of the main graph consumes.
    """
    network = evidence.network
    analysis, count = network.analysis, len(network.analysis.atoms)
    chosen = np.zeros(count, dtype=bool)
    chosen[labels] = True
    inside = set(network.model.graph)
    consumers = [gate.op for gate in find_gates(analysis, chosen) if gate.op.node in inside]
    operands: dict[Op, list[tuple[str, Labels]]] = {}
    for op in dict.fromkeys(consumers):
        for slot, tensor in enumerate(op.inputs):
            if tensor is None or tensor.constant or op.node is None:
                continue
            value = op.node.inputs[slot]
            for borne in analysis.labellings(tensor):
                if value is not None and value.name and chosen[borne].any():
                    operands.setdefault(op, []).append((value.name, np.where(chosen[borne], borne, 0)))
    names = list(dict.fromkeys(name for there in operands.values() for name, _ in there))
    piece = Piece(network.model, nodes_before(network.model, names), names)
    total = np.zeros(count)
    for feeds in evidence.inputs(score).batches(BATCH):
        held = {**feeds, **piece.run(feeds)}
        for there in operands.values():
            product = np.ones(count)
            for name, borne in there:
                product *= sums_by_label(np.asarray(held[name]), borne, count, 2)
            total += product
    return total


def contributions(group: Group, readers: Sequence[GroupReader]) -> Array:
    """Products of what the labels contribute to the readers' outputs, float64 ``[size, size]``."""
    total = np.zeros((group.size, group.size))
    for reader in readers:
        unit_of = np.full(len(reader.covariance), -1, dtype=np.int64)
        for unit, features in enumerate(reader.features):
            unit_of[features] = unit
        there = np.flatnonzero(unit_of >= 0)
        total += reader.scale * selection.contributions(
            reader.covariance[np.ix_(there, there)], reader.weight[there], unit_of[there], units=group.size
        )
    return total


class StructuredOBS(_Reconstruction):
    """Structured optimal brain surgeon: the readers' error after the best correction of the weights that stay.

    Labels are removed greedily; a label's score is the accumulated error when it goes (:mod:`graphprune.kernels.obs`;
    Hassibi & Stork, NeurIPS 1992; Kurtic, Frantar & Alistarh, ZipLM, NeurIPS 2023, section 3).
    """

    name = "obs"

    def judge(self, group: Group, readers: Sequence[GroupReader]) -> Array:
        removal = removal_order(group, readers, keep=0)
        scores = np.full(group.size, np.inf)
        scores[removal.order] = removal.errors
        finite = scores[np.isfinite(scores)]
        return np.where(np.isfinite(scores), scores, finite.max(initial=0.0))


class ThiNet(_Reconstruction):
    """ThiNet: the readers' error without any correction, the sum of what is removed.

    Labels are removed greedily; a label's score is the accumulated error when it goes (Luo, Wu & Lin, ThiNet, ICCV
    2017, section 3.2, equation 6).
    """

    name = "thinet"

    def judge(self, group: Group, readers: Sequence[GroupReader]) -> Array:
        order, errors = selection.thinet(contributions(group, readers))
        scores = np.zeros(group.size)
        # An error may shrink when contributions cancel; the order is what counts.
        scores[order] = np.maximum.accumulate(errors) + 1e-12 * np.arange(len(order))
        return scores


class Lasso(_Reconstruction):
    """LASSO channel selection: the penalty at which a label's coefficient becomes non-zero.

    (He, Zhang & Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.1, equation 2.)
    """

    name = "lasso"

    def judge(self, group: Group, readers: Sequence[GroupReader]) -> Array:
        return np.asarray(selection.lasso_path(contributions(group, readers)))
