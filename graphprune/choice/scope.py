"""Scope: how a fraction to remove is spread over the groups.

``local`` takes the fraction from each group. ``global`` ranks the labels of all groups together. ``isomorphic`` ranks
together only labels of groups of the same structure: what their scores mean depends on what the group is made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.axes.analysis import operands_of
from graphprune.axes.groups import Group
from graphprune.choice.rounding import allowed_counts, nearest_count
from graphprune.errors import OptionError
from graphprune.graph import Op, Tensor
from graphprune.scores.evidence import Scores

Counts: TypeAlias = npt.NDArray[np.int64]

#: Names of the scopes of this module.
SCOPES = ("local", "global", "isomorphic")
#: How many ops and tensors apart what tells structures from each other may lie.
ROUNDS = 4


def keep_counts(
    groups: Sequence[Group],
    scores: Scores,
    ratio_by_group: Sequence[float | None],
    scope: str = "local",
    keep_at_least: float = 0.1,
    round_to: int | None = None,
) -> list[int]:
    """For each group how many of its ``unit`` equal parts stay.

    - ``local``: each group loses its ratio, rounded.
    - ``global``: groups of the same ratio are one pool. Scores are divided by their group's mean (Fang et al.,
      DepGraph, 2023, section 3.3); the k-th weakest parts of all blocks of a group go together and count as the mean
      of their labels. Of a pool's parts the lowest go, as many as bring the labels removed nearest to the ratio.
    - ``isomorphic``: likewise, with one pool for each ratio and structure (Fang et al., Isomorphic Pruning, 2024,
      section 3.2; see :func:`structures`).

    Sizes that stay are multiples as :func:`allowed_counts` says; in ``global`` and ``isomorphic`` the parts between
    two of them go together, so that rounding does not change a pool's total by more than half of the largest such
    step. Where floors bind, the other groups of the pool lose more, as far as they can.

    Args:
        groups: The groups.
        scores: float64 ``[number of atoms]``: what each label is worth.
        ratio_by_group: For each group the fraction to remove, in [0, 1); None where nothing may go.
        scope: One of :data:`SCOPES`.
        keep_at_least: What stays of every group, in [0, 1]; rounded up to a part, and one part stays always.
        round_to: What stays of a group is a multiple of this; None means 8 for groups of 32 and more.

    Returns:
        Numbers between 1 and ``group.unit``; ``group.unit`` where nothing goes.

    Raises:
        OptionError: There is no such scope, or the floor is no fraction.
    """
    if scope not in SCOPES:
        raise OptionError(f"unknown scope {scope!r}; there are {', '.join(SCOPES)}")
    if not 0 <= keep_at_least <= 1:
        raise OptionError(
            f"keep_at_least is {keep_at_least!r}; give the fraction that every group keeps, 0 to 1"
        )
    kept = [group.unit for group in groups]
    ratios = {index: ratio for index, ratio in enumerate(ratio_by_group) if ratio}
    allowed = {index: allowed_counts(groups[index], round_to, keep_at_least) for index in ratios}
    if scope == "local":
        for index, ratio in ratios.items():
            kept[index] = nearest_count(allowed[index], (1 - ratio) * kept[index])
        return kept
    alike = structures(groups) if scope == "isomorphic" else [""] * len(groups)
    pools: dict[tuple[float, str], list[int]] = {}
    for index, ratio in ratios.items():
        pools.setdefault((ratio, alike[index]), []).append(index)
    for (ratio, _), members in pools.items():
        counts = _share([groups[i] for i in members], scores, ratio, [allowed[i] for i in members])
        for index, count in zip(members, counts, strict=True):
            kept[index] = count
    return kept


def _share(groups: list[Group], scores: Scores, ratio: float, allowed: list[Counts]) -> list[int]:
    """What stays of each group of a pool, which together lose ``ratio`` of their labels, the lowest first."""
    worth, labels, owner = [], [], []
    for index, (group, counts) in enumerate(zip(groups, allowed, strict=True)):
        ranked = ranked_parts(group, scores)
        mean = float(ranked.mean())
        ranked = ranked / mean if mean > 0 else ranked
        # From the whole group down from one allowed count to the next.
        stops = group.unit - np.r_[group.unit, counts[counts < group.unit][::-1]]
        total = np.concatenate([np.zeros(1), np.cumsum(ranked)])[stops]
        taken = np.diff(stops)
        # Means of what is taken in turn rise; rounding errors must not put a step before the one that it follows.
        worth.append(np.maximum.accumulate(np.diff(total) / np.maximum(taken, 1)))
        labels.append(taken * (group.size // group.unit))
        owner.append(np.full(len(taken), index))
    order = np.argsort(np.concatenate(worth), kind="stable")
    removed = np.concatenate([np.zeros(1), np.cumsum(np.concatenate(labels)[order])])
    target = ratio * sum(group.size for group in groups)
    steps = int(np.argmin(np.abs(removed - target)))
    lost = np.bincount(np.concatenate(owner)[order[:steps]], minlength=len(groups))
    return [
        group.unit if not n else int(counts[counts < group.unit][-n])
        for group, counts, n in zip(groups, allowed, lost.tolist(), strict=True)
    ]


def ranked_parts(group: Group, scores: Scores) -> npt.NDArray[np.float64]:
    """The mean score of each of a group's ``unit`` parts, weakest first: the k-th weakest of every block together."""
    parts = [np.sort(scores[block]).reshape(group.unit, -1) for block in group.blocks]
    return np.asarray(np.concatenate(parts, axis=1).mean(axis=1))


def structures(groups: Sequence[Group]) -> list[str]:
    """For each group what it is made of, as a hash: equal for groups of the same structure, whatever their size.

    A group's structure is the graph of the tensors that it cuts and of the ops around them: tensors by rank, by the
    axes that are cut and in which role, and by whether they are constant; ops by kind. Names, sizes, attributes and
    the order of an op's operands do not count. Graphs are compared by Weisfeiler and Lehman's colour refinement
    (Shervashidze et al., Weisfeiler-Lehman Graph Kernels, 2011, section 3.1).
    """
    analysis = next((g.inventory.analysis for g in groups if g.inventory is not None), None)
    tensors = {} if analysis is None else {tensor.name: tensor for tensor in analysis.colourings}
    return [_structure(group, tensors) for group in groups]


def _structure(group: Group, tensors: Mapping[str, Tensor]) -> str:
    cuts: dict[Tensor, list[str]] = {}
    for member in group.members:
        cuts.setdefault(tensors[member.tensor], []).append(f"{member.axis} {member.role}")
    colours: dict[Tensor | Op, str] = {
        tensor: _hash("constant" if tensor.constant else "", str(len(tensor.shape or ())), *sorted(axes))
        for tensor, axes in cuts.items()
    }
    edges: list[tuple[Tensor, Op, bool]] = []
    for tensor in cuts:
        for op, operand in operands_of(tensor):
            colours.setdefault(op, op.kind)
            edges.append((tensor, op, operand.is_output))
    for _ in range(ROUNDS):
        around: dict[Tensor | Op, list[str]] = {node: [] for node in colours}
        for tensor, op, is_output in edges:
            around[tensor].append(f"{is_output} {colours[op]}")
            around[op].append(f"{is_output} {colours[tensor]}")
        colours = {node: _hash(colour, *sorted(around[node])) for node, colour in colours.items()}
    return _hash(*sorted(colours.values()))


def _hash(*words: str) -> str:
    return hashlib.blake2b("\n".join(words).encode(), digest_size=16).hexdigest()
