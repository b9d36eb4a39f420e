"""Choosing: how many labels each group loses, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import networkx
import numpy as np
import numpy.typing as npt

from graphprune.axes.analysis import Analysis, operands_of
from graphprune.axes.groups import Group
from graphprune.axes.labels import varying_axes
from graphprune.choice.rounding import keep_count
from graphprune.errors import NothingToPruneError, OptionError, PlanError
from graphprune.graph import Tensor
from graphprune.plan import Masks
from graphprune.scores.evidence import Scores
from graphprune.scores.weights import weights_of

#: A way to cut that reaches this share of the most weights that any reaches is good enough to be preferred.
COVERED = 0.9
#: Up to this many overlapping groups all ways to cut are compared.
MAX_ENUMERATED = 16


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        channels: Fraction of every free group to remove, in [0, 1).
        round_to: What stays of a group is a multiple of this; None means 8 for groups of 32 and more.
        residual: Also cut groups whose removal changes a statistic.
        include: Cut only groups that touch a node or tensor matching one of these globs.
        exclude: Leave groups alone that touch a node or tensor matching one of these globs.
        channels_for: Glob -> fraction, for groups that a matching layer makes; wins over ``channels``.
    """

    channels: float = 0.0
    round_to: int | None = None
    residual: bool = False
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    channels_for: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, ratio in [("channels", self.channels), *self.channels_for.items()]:
            if not (isinstance(ratio, int | float) and 0 <= ratio < 1 and math.isfinite(ratio)):
                raise OptionError(
                    f"the ratio for {what} is {ratio!r}; give the fraction to remove, at least 0, below 1"
                )
        if self.round_to is not None and self.round_to < 1:
            raise OptionError(f"round_to is {self.round_to}; give a positive number (1 turns rounding off)")

    def with_channels(self, ratio: float) -> Request:
        """The same request for another ratio."""
        return replace(self, channels=ratio)


def names_of(analysis: Analysis, groups: Sequence[Group], *, makers: bool = False) -> list[set[str]]:
    """For each group the names of the weights that it cuts and of the nodes that read them, and of its activations.

    With ``makers`` only of weights that make or keep the group's positions, not of those that sum over them.
    """
    tensors = {tensor.name: tensor for tensor in analysis.colourings}
    names: list[set[str]] = []
    for group in groups:
        found = {group.name}
        for member in group.members:
            tensor = tensors[member.tensor]
            if makers and not (member.is_constant and member.role == "pass-through"):
                continue
            found.add(tensor.name)
            if tensor.value is not None and tensor.value.name:
                found.add(tensor.value.name)
            if tensor.constant:
                found |= {op.name for op, _ in operands_of(tensor)}
        names.append(found)
    return names


def _match(pattern: str, names: Sequence[set[str]]) -> list[bool]:
    hits = [any(name == pattern or fnmatchcase(name, pattern) for name in group) for group in names]
    if not any(hits):
        raise OptionError(f"the glob {pattern!r} matches no node or tensor that a group touches")
    return hits


def ratios(analysis: Analysis, groups: Sequence[Group], request: Request) -> list[float | None]:
    """The ratio for each group; None where it must not be cut."""
    if not (request.include or request.exclude or request.channels_for):
        return [None if _kept_whole(group, request) else request.channels for group in groups]
    names = names_of(analysis, groups)
    included = [not request.include] * len(groups)
    for pattern in request.include:
        included = [a or b for a, b in zip(included, _match(pattern, names), strict=True)]
    for pattern in request.exclude:
        included = [a and not b for a, b in zip(included, _match(pattern, names), strict=True)]
    wanted: list[float | None] = [request.channels if there else None for there in included]
    for index, ratio in _named(analysis, groups, request).items():
        wanted[index] = ratio
    return [
        None if _kept_whole(group, request) else ratio for group, ratio in zip(groups, wanted, strict=True)
    ]


def _kept_whole(group: Group, request: Request) -> bool:
    return group.frozen is not None or (group.statistical is not None and not request.residual)


def _named(analysis: Analysis, groups: Sequence[Group], request: Request) -> dict[int, float]:
    """The groups that ``channels_for`` speaks of: those that a matching layer makes."""
    if not request.channels_for:
        return {}
    names = names_of(analysis, groups, makers=True)
    return {
        index: ratio
        for pattern, ratio in request.channels_for.items()
        for index, hit in enumerate(_match(pattern, names))
        if hit
    }


def _overlaps(analysis: Analysis, groups: Sequence[Group]) -> dict[int, set[int]]:
    """Groups that cut the same axis of the same tensor in two ways (heads, and dimensions within heads)."""
    owner = np.full(len(analysis.atoms), -1, dtype=np.int64)
    for index, group in enumerate(groups):
        owner[group.labels] = index
    overlaps: dict[int, set[int]] = {}
    for tensor in analysis.colourings:
        labellings = analysis.labellings(tensor)
        for i, first in enumerate(labellings):
            for second in labellings[i + 1 :]:
                if varying_axes(first)[-1:] != varying_axes(second)[-1:]:
                    continue
                a, b = np.broadcast_arrays(owner[first], owner[second])
                pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
                for left, right in pairs.T.tolist():
                    if left != right and left >= 0 and right >= 0:
                        overlaps.setdefault(left, set()).add(right)
                        overlaps.setdefault(right, set()).add(left)
    return overlaps


def cuttable(analysis: Analysis, groups: Sequence[Group], request: Request) -> list[float | None]:
    """The ratio for each group that may be cut, None for the others; of groups that overlap one way to cut stays.

    Raises:
        NothingToPruneError: No group is free.
        OptionError: A glob matches nothing.
    """
    wanted = ratios(analysis, groups, request)
    if not any(ratio is not None for ratio in wanted):
        raise NothingToPruneError(_why_nothing(groups, request))
    named = {index for index in _named(analysis, groups, request) if wanted[index] is not None}
    candidates = {
        index
        for index, ratio in enumerate(wanted)
        if ratio is not None and keep_count(groups[index], ratio, request.round_to) < groups[index].unit
    }
    kept = _without_overlaps(analysis, groups, candidates, named)
    return [ratio if index in kept else None for index, ratio in enumerate(wanted)]


def choose(
    analysis: Analysis, groups: Sequence[Group], scores: Scores, kept: Sequence[int | None]
) -> npt.NDArray[np.int32]:
    """Pick the labels to remove: in each group the ones of lowest score, equally many in each block.

    Args:
        analysis: The analysis.
        groups: Its groups.
        scores: What each label is worth.
        kept: For each group how many of its ``unit`` equal parts stay; None: all of them.
    """
    cut = {
        index: gone
        for index, keep in enumerate(kept)
        if keep is not None and len(gone := _weakest(groups[index], scores, keep))
    }
    return _mend(analysis, groups, cut, scores)


def _without_overlaps(
    analysis: Analysis, groups: Sequence[Group], candidates: set[int], named: set[int]
) -> set[int]:
    """Of groups that overlap keep one way to cut, so that a ratio holds once and not twice.

    Of all ways to pick groups that do not overlap, those that reach the most weights are good; among the good ones
    the finest is taken (head dimensions leave more choice than heads). So heads go where some of their dimensions
    may not, and dimensions where they all may.
    """
    overlaps = _overlaps(analysis, groups)
    conflicts: networkx.Graph[int] = networkx.Graph()
    conflicts.add_nodes_from(sorted(candidates))
    conflicts.add_edges_from(
        (i, j) for i in sorted(candidates) for j in overlaps.get(i, ()) if j in candidates
    )
    for index in named:
        if index in conflicts:
            conflicts.remove_nodes_from(
                [j for j in overlaps.get(index, ()) if j not in named and j in conflicts]
            )
    reach = _reach(analysis)
    kept: set[int] = set()
    for component in networkx.connected_components(conflicts):
        ways = _independent(conflicts.subgraph(component), groups)
        reached = [sum(float(reach[groups[i].labels].sum()) for i in way) for way in ways]
        good = [(way, r) for way, r in zip(ways, reached, strict=True) if r >= COVERED * max(reached)]
        kept |= max(good, key=lambda pair: (sum(groups[i].size for i in pair[0]), pair[1], sorted(pair[0])))[
            0
        ]
    return kept | (candidates & named)


def _independent(conflicts: networkx.Graph[int], groups: Sequence[Group]) -> list[set[int]]:
    """All largest sets of groups without overlaps; where groups are many, one set, picked finest first."""
    if len(conflicts) <= MAX_ENUMERATED:
        return [set(clique) for clique in networkx.find_cliques(networkx.complement(conflicts))]
    taken: set[int] = set()
    for index in sorted(conflicts, key=lambda i: (-groups[i].size, i)):
        if not taken & set(conflicts[index]):
            taken.add(index)
    return [taken]


def _reach(analysis: Analysis) -> npt.NDArray[np.float64]:
    """How many elements of weights bear each label."""
    reach = np.zeros(len(analysis.atoms))
    for tensor in weights_of(analysis):
        for labels in analysis.labellings(tensor):
            repeat = math.prod(tensor.shape or ()) / labels.size
            reach += repeat * np.bincount(labels.ravel(), minlength=len(reach))
    reach[0] = 0
    return reach


def _weakest(group: Group, scores: Scores, keep: int) -> npt.NDArray[np.int32]:
    gone = []
    for block in group.blocks:
        count = len(block) - keep * len(block) // group.unit
        ranked = block[np.lexsort((block, scores[block]))]
        gone.append(ranked[:count])
    return np.concatenate(gone)


def _mend(
    analysis: Analysis, groups: Sequence[Group], cut: dict[int, npt.NDArray[np.int32]], scores: Scores
) -> npt.NDArray[np.int32]:
    """Take back cuts that would leave a tensor empty or ragged.

    An emptied tensor gets its strongest label back where that is a group of one block (RexNet's partial residuals);
    whatever else is at fault gives up the coarsest group that touches the tensor.
    """
    while True:
        removed = np.concatenate([np.zeros(0, dtype=np.int32), *cut.values()])
        masks = Masks(analysis, removed)
        faults = masks.faults()
        if not faults:
            return removed
        for tensor, fault in faults:
            touching = _touching(analysis, tensor, cut)
            single = [i for i in touching if len(groups[i].blocks) == 1]
            if masks.is_empty(tensor) and single:
                index = max(single, key=lambda i: float(scores[cut[i]].max()))
                strongest = cut[index][np.argmax(scores[cut[index]])]
                cut[index] = cut[index][cut[index] != strongest]
                if not len(cut[index]):
                    del cut[index]
            elif touching:
                del cut[min(touching, key=lambda i: groups[i].size)]
            else:
                raise PlanError(fault)
            break


def _touching(analysis: Analysis, tensor: Tensor, cut: Mapping[int, npt.NDArray[np.int32]]) -> list[int]:
    there = {int(label) for labels in analysis.labellings(tensor) for label in np.unique(labels)}
    return [index for index, labels in cut.items() if there & set(labels.tolist())]


def _why_nothing(groups: Sequence[Group], request: Request) -> str:
    if not groups:
        return "the model has no weights that a channel could be removed from"
    statistical = sum(1 for group in groups if group.statistical and not group.frozen)
    hint = f"; {statistical} would be free with --residual" if statistical and not request.residual else ""
    reasons = sorted({group.frozen for group in groups if group.frozen})
    example = f" (for example: {reasons[0]})" if reasons else ""
    return f"none of the {len(groups)} groups may be cut{example}{hint}"
