"""Coupling groups: labels that are interchangeable, and how many of each may go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd

import numpy as np
import numpy.typing as npt

from graphprune.analysis import Analysis
from graphprune.graph import Tensor
from graphprune.labels import Labels, varying_axes


@dataclass(frozen=True, slots=True)
class Member:
    """One axis of one tensor that a group cuts.

    Attributes:
        tensor: Name of the tensor.
        axis: The axis that shrinks.
        role: ``pass-through``, ``contracted`` or ``normalised`` in the op that reads it as a weight; ``activation``.
        is_constant: It is a weight rather than an activation.
    """

    tensor: str
    axis: int
    role: str
    is_constant: bool


@dataclass(eq=False)
class Group:
    """Positions that are cut by one decision.

    Attributes:
        name: Unique; the first weight that the group cuts, and the axis.
        blocks: Labels, one array a block. Blocks must lose equal fractions (heads that keep equally many
            dimensions); within a block any label may go.
        frozen: Why nothing of it may be removed; None if it is free.
        statistical: Which statistic removal changes; None if removal is exact.
        members: The axes that it cuts.
        parameters: Parameters that bear one of its labels.
        macs: Multiply-accumulates of the contractions along its axes.
    """

    name: str
    blocks: list[Labels]
    frozen: str | None = None
    statistical: str | None = None
    members: list[Member] = field(default_factory=list)
    parameters: int = 0
    macs: int = 0

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

    def __str__(self) -> str:
        state = f"frozen: {self.frozen}" if self.frozen else f"statistical: {self.statistical}" if self.statistical else "free"
        lines = [f"{self.name}: {self.size} ({state})"]
        lines += [f"    {m.tensor}[{m.axis}] {m.role}" for m in self.members]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Cell:
    """A distinct labelling: its own axis last, one row a context."""

    rows: Labels
    tensors: tuple[Tensor, ...]


def rows_of(labels: Labels) -> Labels:
    """A labelling as a matrix: one row a context, the own axis along the columns."""
    varying = varying_axes(labels)
    own = varying[-1] if varying else labels.ndim - 1
    return np.moveaxis(labels, own, -1).reshape(-1, labels.shape[own])


def distinct_rows(analysis: Analysis) -> Iterator[Labels]:
    """Every labelling of every tensor as a matrix, equal ones once."""
    seen: set[tuple[tuple[int, ...], bytes]] = set()
    for tensor in analysis.colourings:
        for labels in analysis.labellings(tensor):
            rows = rows_of(labels)
            key = (rows.shape, rows.tobytes())
            if key not in seen:
                seen.add(key)
                yield rows


def find_groups(analysis: Analysis) -> list[Group]:
    """Partition all labels into groups, in the order of the graph."""
    count = len(analysis.atoms)
    footprint = np.zeros(count, dtype=np.uint64)
    parent = np.arange(count, dtype=np.int64)
    ties: list[npt.NDArray[np.int64]] = []
    mixer = np.random.default_rng(20240501)
    for rows in distinct_rows(analysis):
        height = len(rows)
        row_index = np.repeat(np.arange(height, dtype=np.int64), rows.shape[1])
        code = row_index * count + rows.ravel()
        code = code[rows.ravel() > 0]
        cells, multiplicity = np.unique(code, return_counts=True)
        labels = cells % count
        salts = mixer.integers(1, 2**63, size=height, dtype=np.uint64)
        with np.errstate(over="ignore"):
            np.add.at(footprint, labels, salts[cells // count] * (multiplicity.astype(np.uint64) * np.uint64(2) + np.uint64(1)))
        if height > 1:
            ties.append(np.unique(labels))
    present = analysis.labels().astype(np.int64)
    blocks: dict[tuple[int, bool, bool], list[int]] = {}
    frozen = analysis.atoms.is_frozen(present.astype(np.int32))
    for label, is_frozen in zip(present.tolist(), frozen.tolist(), strict=True):
        is_statistical = analysis.atoms.statistical(label) is not None
        blocks.setdefault((int(footprint[label]), is_frozen, is_statistical), []).append(label)
    block_list = list(blocks.values())
    block_of = np.zeros(count, dtype=np.int64)
    for index, members in enumerate(block_list):
        block_of[members] = index
    parent = np.arange(len(block_list))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for tied in ties:
        roots = sorted({root(int(b)) for b in np.unique(block_of[tied])})
        for other in roots[1:]:
            parent[other] = roots[0]
    grouped: dict[int, list[Labels]] = {}
    for index, members in enumerate(block_list):
        grouped.setdefault(root(index), []).append(np.asarray(members, dtype=np.int32))
    groups = [Group("", blocks) for blocks in grouped.values()]
    _describe(analysis, groups)
    return groups


def _describe(analysis: Analysis, groups: Sequence[Group]) -> None:
    """Fill in names, members, reasons and sizes."""
    owner = np.full(len(analysis.atoms), -1, dtype=np.int64)
    for index, group in enumerate(groups):
        owner[group.labels] = index
        for label in group.labels.tolist():
            group.frozen = group.frozen or analysis.atoms.frozen(label)
            group.statistical = group.statistical or analysis.atoms.statistical(label)
    for tensor in sorted(analysis.colourings, key=lambda t: (t.producer.index if t.producer else -1)):
        for labels in analysis.labellings(tensor):
            varying = varying_axes(labels)
            if not varying:
                continue
            marked = labels > 0
            found, counts = np.unique(owner[labels[marked]], return_counts=True)
            repeat = tensor_size(tensor) // labels.size
            for index, number in zip(found.tolist(), counts.tolist(), strict=True):
                group = groups[index]
                role = "weight" if tensor.constant else "activation"
                group.members.append(Member(tensor.name, varying[-1], role, tensor.constant))
                if tensor.constant and tensor.producer is None:
                    group.parameters += number * repeat
    names: dict[str, int] = {}
    for group in groups:
        weights = [m for m in group.members if m.is_constant] or group.members
        base = f"{weights[0].tensor}[{weights[0].axis}]" if weights else "unnamed"
        names[base] = names.get(base, 0) + 1
        group.name = base if names[base] == 1 else f"{base}/{names[base]}"


def tensor_size(tensor: Tensor) -> int:
    """Number of elements of a tensor of known shape."""
    return int(np.prod(tensor.shape or (), dtype=np.int64))
