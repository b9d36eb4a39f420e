"""Choosing: how many labels each group loses, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from graphprune.analysis import Analysis, operands_of
from graphprune.errors import NothingToPruneError, OptionError
from graphprune.graph import Tensor
from graphprune.groups import Group
from graphprune.labels import varying_axes
from graphprune.plan import Masks
from graphprune.scores import Scores

#: Groups of at least this many labels are rounded by default.
ROUNDED_FROM = 32
#: To a multiple of this.
ROUND_TO = 8


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        channels: Fraction of every free group to remove, in [0, 1).
        round_to: What stays of a group is a multiple of this; None means 8 for groups of 32 and more.
        residual: Also cut groups whose removal changes a statistic.
        include: Cut only groups that touch a node or tensor matching one of these globs.
        exclude: Leave groups alone that touch a node or tensor matching one of these globs.
        channels_for: Glob -> fraction, for groups that touch a matching node or tensor; wins over ``channels``.
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
                raise OptionError(f"the ratio for {what} is {ratio!r}; give the fraction to remove, at least 0, below 1")
        if self.round_to is not None and self.round_to < 1:
            raise OptionError(f"round_to is {self.round_to}; give a positive number (1 turns rounding off)")


def names_of(analysis: Analysis, groups: Sequence[Group]) -> list[set[str]]:
    """For each group the names of the weights that it cuts and of the nodes that read them, or make its tensors."""
    owner = np.full(len(analysis.atoms), -1, dtype=np.int64)
    for index, group in enumerate(groups):
        owner[group.labels] = index
    names: list[set[str]] = [{group.name} for group in groups]
    for tensor in analysis.colourings:
        around = {tensor.name}
        if tensor.value is not None and tensor.value.name:
            around.add(tensor.value.name)
        if tensor.constant:
            around |= {op.name for op, _ in operands_of(tensor)}
        for labels in analysis.labellings(tensor):
            for index in np.unique(owner[labels[labels > 0]]).tolist():
                names[index] |= around
    return names


def _match(pattern: str, names: Sequence[set[str]]) -> list[bool]:
    hits = [any(fnmatchcase(name, pattern) for name in group) for group in names]
    if not any(hits):
        raise OptionError(f"the glob {pattern!r} matches no node or tensor that a group touches")
    return hits


def ratios(analysis: Analysis, groups: Sequence[Group], request: Request) -> list[float | None]:
    """The ratio for each group; None where it must not be cut."""
    names = names_of(analysis, groups)
    included = [not request.include] * len(groups)
    for pattern in request.include:
        included = [a or b for a, b in zip(included, _match(pattern, names), strict=True)]
    for pattern in request.exclude:
        included = [a and not b for a, b in zip(included, _match(pattern, names), strict=True)]
    wanted: list[float | None] = [request.channels if there else None for there in included]
    for pattern, ratio in request.channels_for.items():
        for index, hit in enumerate(_match(pattern, names)):
            if hit and not (groups[index].name != pattern and _nested_under(groups[index], pattern, names)):
                wanted[index] = ratio
    for index, group in enumerate(groups):
        if group.frozen or (group.statistical and not request.residual):
            wanted[index] = None
    return wanted


def _nested_under(group: Group, pattern: str, names: Sequence[set[str]]) -> bool:
    """A pattern that is the exact name of some group means that group alone."""
    return "*" not in pattern and "?" not in pattern and any(pattern in n for n in names) and group.name != pattern and any(
        pattern == other for other in [pattern] if other.endswith("]") or "]/" in other
    )


def keep_count(group: Group, ratio: float, round_to: int | None) -> int:
    """How many of ``group.unit`` equal parts stay."""
    unit, size = group.unit, group.size
    row = max(len(block) for block in group.blocks)
    step = round_to if round_to is not None else (ROUND_TO if size >= ROUNDED_FROM else 1)
    target = (1 - ratio) * unit
    # Head dimensions are rounded head by head where a head is wide enough; else the whole width counts.
    width = row if row >= ROUNDED_FROM else size
    fitting = [k for k in range(1, unit + 1) if (k * width // unit) % step == 0]
    if not fitting:
        return unit
    return min(fitting, key=lambda k: (abs(k - target), k))


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


def choose(analysis: Analysis, groups: Sequence[Group], scores: Scores, request: Request) -> npt.NDArray[np.int32]:
    """Pick the labels to remove: in each group the ones of lowest score, equally many in each block.

    Of groups that overlap (heads, head dimensions) the finest is cut, so that the ratio holds once and not twice;
    one that ``channels_for`` names comes first.

    Raises:
        NothingToPruneError: No group is free.
        OptionError: A glob matches nothing.
    """
    wanted = ratios(analysis, groups, request)
    if not any(ratio is not None for ratio in wanted):
        raise NothingToPruneError(_why_nothing(groups, request))
    overlaps = _overlaps(analysis, groups)
    named = {
        index
        for pattern in request.channels_for
        for index, hit in enumerate(_match(pattern, names_of(analysis, groups)))
        if hit and wanted[index] == request.channels_for[pattern]
    }
    order = sorted(
        (i for i, ratio in enumerate(wanted) if ratio is not None),
        key=lambda i: (i not in named, -groups[i].size, i),
    )
    cut: dict[int, npt.NDArray[np.int32]] = {}
    for index in order:
        ratio = wanted[index]
        if ratio is None or overlaps.get(index, set()) & cut.keys():
            continue
        gone = _weakest(groups[index], scores, keep_count(groups[index], ratio, request.round_to))
        if len(gone):
            cut[index] = gone
    return _mend(analysis, groups, cut, scores)


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
        for tensor, _ in faults:
            touching = _touching(analysis, tensor, cut)
            mask = masks.mask(tensor)
            single = [i for i in touching if len(groups[i].blocks) == 1]
            if mask is not None and not mask.any() and single:
                index = max(single, key=lambda i: float(scores[cut[i]].max()))
                strongest = cut[index][np.argmax(scores[cut[index]])]
                cut[index] = cut[index][cut[index] != strongest]
                if not len(cut[index]):
                    del cut[index]
            elif touching:
                del cut[min(touching, key=lambda i: groups[i].size)]
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
