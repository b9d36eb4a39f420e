"""Coupling groups: labels that are interchangeable, and how many of each may go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd

import numpy as np
import numpy.typing as npt

from graphprune.axes.analysis import Analysis
from graphprune.axes.labels import Labels
from graphprune.axes.members import Inventory, Member, Place, Spread, own_axis, position, rows_of, spreads_of

__all__ = ["Group", "Member", "find_groups"]


@dataclass(eq=False)
class Group:
    """Positions that are cut by one decision.

    Attributes:
        name: Unique; the first weight that the group cuts, and the axis. A coarser cut of the same axis (heads, where
            the head dimensions are a group too) says how: ``/12x64`` is 12 pieces of 64.
        blocks: Labels, one array a block. Blocks must lose equal fractions (heads that keep equally many
            dimensions); within a block any label may go.
        frozen: Why nothing of it may be removed; None if it is free.
        statistical: Which statistic removal changes; None if removal is exact.
        index: Its position among the groups of the analysis.
        inventory: Where all groups lie.
    """

    name: str
    blocks: list[Labels]
    frozen: str | None = None
    statistical: str | None = None
    index: int = field(default=0, repr=False)
    inventory: Inventory | None = field(default=None, repr=False)

    @cached_property
    def labels(self) -> Labels:
        """All labels, block by block."""
        return np.concatenate(self.blocks)

    @property
    def size(self) -> int:
        """Number of labels: the most positions that could be told apart."""
        return sum(len(block) for block in self.blocks)

    @cached_property
    def unit(self) -> int:
        """Fractions k / unit of every block are whole numbers of labels."""
        return gcd(*(len(block) for block in self.blocks))

    @property
    def members(self) -> list[Member]:
        """The axes that it cuts, in the order of the graph."""
        return [] if self.inventory is None else self.inventory.members[self.index]

    @property
    def parameters(self) -> int:
        """Parameters that bear one of its labels."""
        return 0 if self.inventory is None else self.inventory.parameters[self.index]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the contractions along whose factors it lies."""
        return 0 if self.inventory is None else self.inventory.macs[self.index]

    def __str__(self) -> str:
        if self.frozen:
            state = f"frozen: {self.frozen}"
        else:
            state = f"statistical: {self.statistical}" if self.statistical else "free"
        lines = [f"{self.name}: {self.size} ({state})"]
        lines += [f"    {m.tensor}[{m.axis}] {m.role}" for m in self.members]
        return "\n".join(lines)


def find_groups(analysis: Analysis) -> list[Group]:
    """Partition all labels into groups, in the order of the graph.

    Labels are interchangeable where they cover equally many elements of each row of each labelling (found by hashing);
    those are a block. Blocks that meet in a labelling of several rows are one group: each row must keep equally many.
    """
    spreads = spreads_of(analysis)
    matrices = distinct_rows(analysis, spreads)
    groups = [Group("", blocks) for blocks in _tied(analysis, matrices, _blocks(analysis, matrices))]
    owner = np.full(len(analysis.atoms), -1, dtype=np.int32)
    frozen, statistical = _flags(analysis)
    for index, group in enumerate(groups):
        labels = group.labels
        owner[labels] = index
        reasons = labels[frozen[labels]], labels[statistical[labels]]
        group.frozen = analysis.atoms.frozen(int(reasons[0][0])) if len(reasons[0]) else None
        group.statistical = analysis.atoms.statistical(int(reasons[1][0])) if len(reasons[1]) else None
    inventory = Inventory(analysis, spreads, owner, len(groups))
    for index, group in enumerate(groups):
        group.index, group.inventory = index, inventory
    _name(groups, inventory)
    return groups


def _flags(analysis: Analysis) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """For each label whether it is frozen, and whether it is statistical."""
    every = np.arange(len(analysis.atoms), dtype=np.int32)
    return analysis.atoms.is_frozen(every), analysis.atoms.is_statistical(every)


def distinct_rows(analysis: Analysis, spreads: Sequence[Spread]) -> list[Labels]:
    """Every labelling of every tensor, and of what ops see of it in parts, as a matrix; equal ones once."""
    matrices = {(spread.rows.shape, spread.rows.tobytes()): spread.rows for spread in spreads}
    for _, _, labels in analysis.partial_labellings():
        rows = rows_of(labels, own_axis(labels))
        matrices.setdefault((rows.shape, rows.tobytes()), rows)
    return list(matrices.values())


def _blocks(analysis: Analysis, matrices: Sequence[Labels]) -> list[Labels]:
    """Interchangeable labels, in the order of their first."""
    footprint = np.zeros(len(analysis.atoms), dtype=np.uint64)
    seen = np.zeros(len(footprint), dtype=bool)
    seen[0] = True
    mixer = np.random.default_rng(20240501)
    for rows in matrices:
        height, width = rows.shape
        salts = np.asarray(mixer.integers(1, 2**63, size=height, dtype=np.uint64))
        code = np.repeat(np.arange(height, dtype=np.int64), width) * len(footprint) + rows.ravel()
        cells, number = np.unique(code, return_counts=True)
        with np.errstate(over="ignore"):
            weights = salts[cells // len(footprint)] * (
                number.astype(np.uint64) * np.uint64(2) + np.uint64(1)
            )
            np.add.at(footprint, cells % len(footprint), weights)
        seen[cells % len(footprint)] = True
    present = np.flatnonzero(seen)[1:]  # without 0, which is no label
    frozen, statistical = _flags(analysis)
    kinds = np.stack(
        [footprint[present], frozen[present].astype(np.uint64), statistical[present].astype(np.uint64)]
    )
    _, first, kind = np.unique(kinds, axis=1, return_index=True, return_inverse=True)
    kind = kind.ravel()
    order = np.argsort(kind, kind="stable")
    pieces = np.split(present[order], np.flatnonzero(np.diff(kind[order])) + 1) if len(present) else []
    return [pieces[i].astype(np.int32) for i in np.argsort(first)]


def _tied(analysis: Analysis, matrices: Sequence[Labels], blocks: list[Labels]) -> list[list[Labels]]:
    """Blocks that meet in a labelling of several rows."""
    block_of = np.full(len(analysis.atoms), -1, dtype=np.int64)
    for index, members in enumerate(blocks):
        block_of[members] = index
    parent = list(range(len(blocks)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for rows in matrices:
        if len(rows) == 1:
            continue
        met = np.unique(block_of[rows])
        roots = sorted({root(int(b)) for b in met if b >= 0})
        for other in roots[1:]:
            parent[other] = roots[0]
    grouped: dict[int, list[Labels]] = {}
    for index, members in enumerate(blocks):
        grouped.setdefault(root(index), []).append(members)
    return list(grouped.values())


def _name(groups: Sequence[Group], inventory: Inventory) -> None:
    """Name each group after the first weight that it cuts, vectors (a bias) only if there is no other."""
    first: dict[int, tuple[tuple[bool, bool, tuple[int, int]], Spread, Place]] = {}
    for spread, there in zip(inventory.spreads, inventory.groups_in, strict=True):
        rank, place = min(((_rank(place), place) for place in spread.places), key=lambda item: item[0])
        for index in there:
            if index not in first or rank < first[index][0]:
                first[index] = rank, spread, place
    by_base: dict[str, list[int]] = {}
    for index in range(len(groups)):
        place = first[index][2]
        by_base.setdefault(f"{place.tensor.name}[{place.axis}]", []).append(index)
    for base, indices in by_base.items():
        finest = max(groups[index].size for index in indices)
        taken: dict[str, int] = {}
        for index in indices:
            name, group = base, groups[index]
            covered = _covered(first[index][1], inventory.owner, index)
            if group.size < finest and covered > group.size and covered % group.size == 0:
                name = f"{base}/{group.size}x{covered // group.size}"
            taken[name] = taken.get(name, 0) + 1
            group.name = name if taken[name] == 1 else f"{name}/{taken[name]}"


def _rank(place: Place) -> tuple[bool, bool, tuple[int, int]]:
    tensor = place.tensor
    return not tensor.constant, len(tensor.shape or ()) < 2, position(tensor)


def _covered(spread: Spread, owner: npt.NDArray[np.int32], group: int) -> int:
    """How many positions of the own axis a group covers, in the first row that it covers any of."""
    covered = (owner[spread.rows] == group).sum(axis=1)
    return int(covered[covered > 0][0])
