"""Dead positions: labels whose removal changes nothing.

Removing labels equals masking them (see :mod:`graphprune.masked`): whatever sums over a removed position reads zero
there. That changes nothing where, at every op that sums over the position,

- what is masked is zero already, or what it is multiplied with is: an all-zero filter, a ReLU that is never positive,
  rows of a weight that are all zero;
- or what the product goes into is dead itself (rows that are zero in all filters that stay), or is multiplied by a
  stored zero later (:mod:`graphprune.dead.unread`);
- or the position holds a constant, whose share of the sum is a constant too, and can be added to the bias. Where a
  convolution pads, its share is less at the borders: then it is taken over by another position that holds a constant,
  the *carrier*, whose weights become ``W[:, carrier] + W[:, dead] * (c_dead / c_carrier)``.

The dead labels are the greatest set for which all that holds: labels start out dead, and live where an op needs them,
until nothing changes. So units that only feed each other die together. Positions that stay keep their values exactly,
by induction over the graph, so that bounds worked out on the original hold for what is left of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from graphprune.axes.analysis import Analysis
from graphprune.axes.groups import Group
from graphprune.axes.labels import Labels
from graphprune.dead.contribution import Contraction, Reading, Step, labels_where
from graphprune.dead.intervals import Intervals
from graphprune.dead.unread import Unread
from graphprune.errors import PlanError
from graphprune.graph import Tensor
from graphprune.plan import Masks

Bools = npt.NDArray[np.bool_]


@dataclass
class Dead:
    """What can go, and what had to stay.

    Attributes:
        removed: int32, the labels.
        stayed: For each label that contributes nothing, or nothing but a constant, and stays: why.
        steps: The ops that sum over something, in the order of the graph.
    """

    removed: Labels
    stayed: dict[int, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


def find_dead(analysis: Analysis, groups: Sequence[Group], intervals: Intervals) -> Dead:
    """The largest set of free labels that contribute nothing, such that what is left of every tensor is a box.

    Args:
        analysis: The analysed twin.
        groups: Its groups; frozen and statistical ones are left alone.
        intervals: Bounds of its tensors.
    """
    return _Search(analysis, groups, intervals).run()


class _Search:
    def __init__(self, analysis: Analysis, groups: Sequence[Group], intervals: Intervals) -> None:
        self._analysis = analysis
        self._intervals = intervals
        self._groups = [group for group in groups if not group.frozen and not group.statistical]
        self._dead: Bools = np.zeros(len(analysis.atoms), dtype=bool)
        for group in self._groups:
            self._dead[group.labels] = True
        self._stayed: dict[int, str] = {}
        self._steps = list(steps_of(analysis, intervals, self._dead))
        self._strength = np.zeros(len(self._dead))
        for step in self._steps:
            step.add_strength(self._strength)
        # Where labellings cross, one label may cover all that another one does: heads, and their dimensions.
        self._crossed = [t for t in analysis.colourings if len(analysis.labellings(t)) > 1]
        self._crossing = np.zeros_like(self._dead)
        for tensor in self._crossed:
            self._crossing |= self._labels_on(tensor)

    def run(self) -> Dead:
        self._settle()
        while self._balance() or self._carry() or self._mend():
            self._settle()
        self._explain()
        return Dead(np.flatnonzero(self._dead).astype(np.int32), self._stayed, self._steps)

    def _explain(self) -> None:
        """Say where a constant ends that nothing could be done about: at borders, or among other elements."""
        free = np.zeros_like(self._dead)
        for group in self._groups:
            free[group.labels] = True
        for op in self._analysis.graph.ops:
            inputs = [t for t in op.inputs if t is not None and not t.constant and t.shape is not None]
            outputs = [t for t in op.outputs if t is not None and not t.constant and t.shape is not None]
            before = [label for tensor in inputs for label in self._fixed(tensor, free)]
            if before:
                after = {label for tensor in outputs for label in self._fixed(tensor, free)}
                there = np.zeros_like(self._dead)
                for tensor in outputs:
                    there |= self._labels_on(tensor)
                for label in before:
                    if label not in after and there[label] and not self._dead[label]:
                        self._stayed.setdefault(label, f"its constant does not stay one past {op.name!r}")

    def _fixed(self, tensor: Tensor, free: Bools) -> list[int]:
        """Free labels that bear nothing but constants, other than zero, in a tensor."""
        part = self._intervals.of(tensor)
        if not part.fixed.any():
            return []
        found: list[int] = []
        for labels in self._analysis.labellings(tensor):
            if free[labels].any():
                loose = set(labels_where(labels, ~part.fixed).tolist())
                held = set(labels_where(labels, part.fixed & ~part.zero).tolist())
                found += [label for label in held - loose if free[label]]
        return found

    def _settle(self) -> None:
        """Labels live where an op needs them, until nothing changes; what lives late makes earlier labels live."""
        while True:
            before = int(self._dead.sum())
            for step in reversed(self._steps):
                if not step.concerns(self._dead):
                    continue
                live, reasons = step.needed(self._dead)
                self._stayed.update((label, why) for label, why in reasons.items() if self._dead[label])
                self._dead[live] = False
            if int(self._dead.sum()) == before:
                return

    def _keep(self, labels: Iterable[int], reason: str) -> None:
        for label in labels:
            self._dead[label] = False
            self._stayed[label] = reason

    # -- what is left must be boxes --------------------------------------------------------------------------------

    def _balance(self) -> bool:
        """In each group all blocks lose the same fraction, and keep something; true if a label was kept."""
        changed = False
        coarser = np.zeros_like(self._dead)
        for group in sorted(self._groups, key=lambda g: (g.size, g.index)):
            if not self._dead[group.labels].any():
                continue
            # Where heads go as a whole, their dimensions need not go as well.
            crossing = self._crossing[group.labels].any() and coarser.any()
            covered = self._covered(coarser) if crossing else np.zeros_like(self._dead)
            coarser[group.labels] = True
            self._dead[group.labels[covered[group.labels]]] = False
            blocks = [block for block in group.blocks if not covered[block].all()]
            dead = [block[self._dead[block]] for block in blocks]
            fraction = min(
                (len(gone) * group.unit // len(block) for gone, block in zip(dead, blocks, strict=True)),
                default=0,
            )
            fraction = min(fraction, group.unit - 1)
            for gone, block in zip(dead, blocks, strict=True):
                spare = len(gone) - fraction * len(block) // group.unit
                if spare:
                    strongest = gone[np.lexsort((gone, -self._strength[gone]))][:spare]
                    whole = len(gone) == len(block)
                    self._keep(
                        strongest.tolist(),
                        "something of it must stay"
                        if whole and spare == len(block) // group.unit
                        else "the group's other parts must keep as many",
                    )
                    changed = True
        return changed

    def _covered(self, coarser: Bools) -> Bools:
        """Labels of which every element goes with another label, one of those given."""
        met, left = np.zeros_like(self._dead), np.zeros_like(self._dead)
        for tensor in self._crossed:
            labellings = self._analysis.labellings(tensor)
            gone = [(self._dead & coarser)[labels] for labels in labellings]
            for i, labels in enumerate(labellings):
                others = [g for j, g in enumerate(gone) if j != i]
                by_others = others[0]
                for other in others[1:]:
                    by_others = by_others | other
                met[labels] = True
                if by_others.any():
                    whole, by_others = np.broadcast_arrays(labels, by_others)
                    left[whole[~by_others]] = True
                else:
                    left[labels] = True
        return np.asarray(met & ~left)

    def _carry(self) -> bool:
        """Each padded convolution that loses constants keeps one; true if a label was kept."""
        for step in reversed(self._steps):
            if isinstance(step, Contraction) and step.concerns(self._dead):
                carriers = step.wanted_carriers(self._dead)
                if carriers:
                    self._keep(
                        carriers, f"it carries the others' constant past the padding of {step.op.name!r}"
                    )
                    return True
        return False

    def _mend(self) -> bool:
        """Take back what would leave a tensor empty or ragged; true if there was something."""
        masks = Masks(self._analysis, np.flatnonzero(self._dead).astype(np.int32))
        faults = masks.faults()
        if not faults:
            return False
        tensor, fault = faults[0]
        there = self._labels_on(tensor)
        touching = [g for g in self._groups if (self._dead[g.labels] & there[g.labels]).any()]
        if not touching:
            raise PlanError(fault)
        single = [g for g in touching if len(g.blocks) == 1]
        if masks.is_empty(tensor) and single:
            gone = np.concatenate([g.labels[self._dead[g.labels]] for g in single])
            self._keep([int(gone[np.argmax(self._strength[gone])])], fault)
        else:
            group = min(touching, key=lambda g: g.size)
            self._keep(group.labels[self._dead[group.labels]].tolist(), fault)
        return True

    def _labels_on(self, tensor: Tensor) -> Bools:
        there = np.zeros_like(self._dead)
        for labels in self._analysis.labellings(tensor):
            there[labels] = True
        return there


def steps_of(analysis: Analysis, intervals: Intervals, candidates: Bools) -> Iterator[Step]:
    """The ops that sum over something that bears one of the candidate labels, in the order of the graph."""
    unread = Unread(analysis.graph, intervals)
    for op in analysis.graph.ops:
        if analysis.is_leaf(op):
            continue
        yield from Reading.of(op, analysis, intervals, unread, candidates)
