"""Widths: every size that a plan changes, as a function of how much each group keeps.

Cutting a group removes equal fractions of its blocks, so what is left of an axis is known before anything is chosen:
an axis of ``size`` positions of which ``count_g`` bear labels of group g keeps

    size - sum_g count_g * (1 - kept_g / unit_g),

and where two groups cut the same positions in two ways (heads, and dimensions within heads), their fractions
multiply. The same holds for the factors of an op's signature. All costs are sums of products of such sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.axes.flow import Operand, SignatureFlow
from graphprune.axes.labels import Labels, compress, varying_axes
from graphprune.axes.signature import View
from graphprune.errors import OptionError
from graphprune.graph import Op, Tensor
from graphprune.rules.registry import Refusal, tensor_at

if TYPE_CHECKING:
    from graphprune.network import Network

#: For each group, how many of its ``unit`` equal parts stay.
Kept: TypeAlias = Sequence[int] | npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Extent:
    """One size and what it becomes.

    Attributes:
        size: The original.
        cells: (number of positions, groups that own them): positions that several groups own stay where all keep
            them. Positions that no group owns always stay.
    """

    size: int
    cells: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def at(self, kept: Kept, units: Sequence[int]) -> int:
        """The size where group g keeps ``kept[g]`` of ``units[g]``."""
        left = float(self.size)
        for count, groups in self.cells:
            share = 1.0
            for group in groups:
                share *= kept[group] / units[group]
            left -= count * (1 - share)
        return round(left)

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups on which it depends, ascending."""
        return tuple(sorted({group for _, groups in self.cells for group in groups}))


class Widths:
    """All sizes of a network's tensors and ops as functions of what the groups keep.

    Each distinct size is an :class:`Extent` with a number; extent 0 is the size 1 of whatever does not change.

    Attributes:
        network: The analysed model.
        units: For each group the number of equal parts that it may lose (``Group.unit``).
        extents: All distinct extents that were asked for so far.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.units: tuple[int, ...] = tuple(group.unit for group in network.groups)
        self.extents: list[Extent] = [Extent(1)]
        self._number: dict[Extent, int] = {self.extents[0]: 0}
        self._owner = np.full(len(network.analysis.atoms), -1, dtype=np.int64)
        for index, group in enumerate(network.groups):
            self._owner[group.labels] = index
        self._factors: dict[Op, dict[str, int]] = {}
        self._axes: dict[Tensor, tuple[int, ...]] = {}
        self._rows: dict[int, tuple[Labels, npt.NDArray[np.int64]]] = {}

    @property
    def full(self) -> npt.NDArray[np.int64]:
        """What nothing removed looks like: every group keeps all its units."""
        return np.array(self.units, dtype=np.int64)

    def checked(self, kept: Kept) -> npt.NDArray[np.int64]:
        """``kept`` as an array.

        Raises:
            OptionError: It has not one entry for each group, or an entry is below 0 or above the group's unit.
        """
        array = np.asarray(kept, dtype=np.int64)
        if array.shape != (len(self.units),):
            raise OptionError(
                f"kept has shape {array.shape}; give one number for each of {len(self.units)} groups"
            )
        wrong = np.flatnonzero((array < 0) | (array > self.full))
        if len(wrong):
            name, unit = self.network.groups[wrong[0]].name, self.units[wrong[0]]
            raise OptionError(f"group {name!r} keeps {array[wrong[0]]}; it can keep 0 to {unit}")
        return array

    # -- extents ------------------------------------------------------------------------------------------------

    def factors(self, op: Op) -> Mapping[str, int]:
        """For each factor of an op's signature the number of its extent; empty where the op has no signature."""
        if op not in self._factors:
            found: dict[str, Extent] = {}
            flows = self.network.analysis.flows[op.index]
            for flow in () if isinstance(flows, Refusal) else flows:
                if isinstance(flow, SignatureFlow):
                    for name, size in flow.signature.sizes.items():
                        found.setdefault(name, Extent(size))
                    for view in flow.signature.views:
                        for name, extent in self._cut_by_view(op, flow, view).items():
                            # All operands agree where a plan can be carried out; the first that is cut tells.
                            if not found[name].cells:
                                found[name] = extent
            self._factors[op] = {name: self._numbered(extent) for name, extent in found.items()}
        return self._factors[op]

    def axes(self, tensor: Tensor) -> tuple[int, ...]:
        """For each axis of a tensor of known shape the number of its extent."""
        if tensor not in self._axes:
            shape = tensor.shape or ()
            labellings = self.network.analysis.labellings(tensor)
            owned: dict[int, list[npt.NDArray[np.int64]]] = {}
            for labels in labellings:
                varying = varying_axes(labels)
                if varying:
                    owned.setdefault(varying[-1], []).append(self._row(labels, varying[-1]))
            self._axes[tensor] = tuple(
                self._numbered(_extent(size, owned.get(axis, []))) for axis, size in enumerate(shape)
            )
        return self._axes[tensor]

    def shape(self, tensor: Tensor, kept: Kept) -> tuple[int, ...]:
        """The shape of a tensor after."""
        return tuple(self.extents[number].at(kept, self.units) for number in self.axes(tensor))

    def size_of(self, op: Op, factor: str, kept: Kept) -> int:
        """The size of a factor of an op after."""
        return self.extents[self.factors(op)[factor]].at(kept, self.units)

    def _numbered(self, extent: Extent) -> int:
        if extent not in self._number:
            self._number[extent] = len(self.extents)
            self.extents.append(extent)
        return self._number[extent]

    def _cut_by_view(self, op: Op, flow: SignatureFlow, view: View) -> dict[str, Extent]:
        """The extents of the factors that labellings of one operand cut."""
        tensor = tensor_at(op, Operand(view.is_output, view.slot))
        if tensor is None:
            return {}
        owned: dict[str, list[npt.NDArray[np.int64]]] = {}
        for labels in self.network.analysis.labellings(tensor):
            spread = _by_factor(labels, flow, view)
            if spread is not None and (varying := varying_axes(spread)):
                name = view.factors[varying[-1]]
                owned.setdefault(name, []).append(self._row(spread, varying[-1]))
        return {name: _extent(flow.signature.sizes[name], rows) for name, rows in owned.items()}

    def _row(self, labels: Labels, axis: int) -> npt.NDArray[np.int64]:
        """The groups along an axis, -1 where none: any row tells, for all rows keep equally many."""
        known = self._rows.get(id(labels))
        if known is not None:
            return known[1]
        rows = np.moveaxis(labels, axis, -1).reshape(-1, labels.shape[axis])
        # A row without labels is one that a part of the tensor keeps: what speaks of the axis is elsewhere.
        row = rows[0] if len(rows) == 1 or rows[0].any() else rows[np.argmax((rows > 0).sum(axis=1))]
        groups: npt.NDArray[np.int64] = self._owner[row]
        self._rows[id(labels)] = labels, groups  # the array is held, so that no other takes its id
        return groups

    # -- all at once --------------------------------------------------------------------------------------------

    def table(self) -> ExtentTable:
        """All extents that were asked for so far, to be evaluated together."""
        return ExtentTable(self.extents, self.units)


class ExtentTable:
    """Many extents, evaluated together: a multilinear function of the groups' shares."""

    def __init__(self, extents: Sequence[Extent], units: Sequence[int]) -> None:
        self._units = np.array(units, dtype=np.float64)
        self._fixed = np.array([e.size - sum(count for count, _ in e.cells) for e in extents], dtype=float)
        cells = [(i, count, groups) for i, e in enumerate(extents) for count, groups in e.cells]
        width = max((len(groups) for _, _, groups in cells), default=1)
        self._extent: Indices = np.array([i for i, _, _ in cells], dtype=np.intp)
        self._count: Floats = np.array([count for _, count, _ in cells], dtype=float)
        # Rows are filled up with a group behind the last one, whose share is 1.
        self._groups: Indices = np.array(
            [[*groups, *[len(units)] * (width - len(groups))] for _, _, groups in cells], dtype=np.intp
        ).reshape(len(cells), width)

    def __len__(self) -> int:
        return len(self._fixed)

    @cached_property
    def _cells_of(self) -> list[Indices]:
        """For each group the cells that it cuts."""
        found: list[list[int]] = [[] for _ in range(len(self._units) + 1)]
        for cell, groups in enumerate(self._groups.tolist()):
            for group in dict.fromkeys(groups):
                found[group].append(cell)
        return [np.array(cells, dtype=np.intp) for cells in found]

    def shares(self, kept: Kept) -> Floats:
        """The fraction that each group keeps, and a 1 behind the last."""
        return np.append(np.asarray(kept, dtype=np.float64) / self._units, 1.0)

    def at(self, kept: Kept) -> Floats:
        """The size of each extent: float64 ``[number of extents]``, whole numbers."""
        cells = self._count * self.shares(kept)[self._groups].prod(axis=1)
        return np.rint(self._fixed + np.bincount(self._extent, cells, minlength=len(self)))

    def changed_by(self, group: int) -> Indices:
        """The extents that depend on a group, ascending."""
        return np.unique(self._extent[self._cells_of[group]])

    def at_levels(self, group: int, levels: Kept, kept: Kept) -> Floats:
        """The size of each extent for each number that one group may keep, the others as in ``kept``.

        Returns:
            float64 ``[number of levels, number of extents]``, whole numbers.
        """
        shares = self.shares(kept)
        cells = self._count * shares[self._groups].prod(axis=1)
        base = self._fixed + np.bincount(self._extent, cells, minlength=len(self))
        mine = self._cells_of[group]
        # Each cell is linear in the share of each of its groups.
        others = np.where(self._groups[mine] == group, 1.0, shares[self._groups[mine]]).prod(axis=1)
        slope = np.bincount(self._extent[mine], self._count[mine] * others, minlength=len(self))
        step = np.asarray(levels, dtype=np.float64) / self._units[group] - shares[group]
        sizes: Floats = np.rint(base + step[:, None] * slope)
        return sizes


def _extent(size: int, rows: Sequence[npt.NDArray[np.int64]]) -> Extent:
    """What an axis of ``size`` becomes that one labelling or more cut; each row tells the group of each position."""
    rows = [row for row in rows if (row >= 0).any()]
    if not rows:
        return Extent(size)
    numbers: dict[tuple[int, ...], int] = {}
    if len(rows) == 1:
        groups, counts = np.unique(rows[0], return_counts=True)
        numbers = {(int(g),): int(c) for g, c in zip(groups, counts, strict=True) if g >= 0}
    else:
        columns, counts = np.unique(np.stack(rows), axis=1, return_counts=True)
        for column, count in zip(columns.T.tolist(), counts.tolist(), strict=True):
            owners = tuple(sorted({group for group in column if group >= 0}))
            if owners:
                numbers[owners] = numbers.get(owners, 0) + count
    return Extent(size, tuple((count, owners) for owners, count in sorted(numbers.items())))


def _by_factor(labels: Labels, flow: SignatureFlow, view: View) -> Labels | None:
    """A labelling with one dimension a factor of a view; None where it cuts an axis of which the view says nothing."""
    own = varying_axes(labels)[-1:]
    for index, axis in enumerate(view.axes):
        if axis.factors is None and labels.shape[index] > 1:
            if own == (index,):
                return None
            labels = labels.max(axis=index, keepdims=True)
    spread: npt.NDArray[Any] | None = flow.spread(view, labels)
    return None if spread is None or not spread.any() else compress(spread)
