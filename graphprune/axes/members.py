"""What the groups cut: which axes of which tensors, in which role, at which cost.

Pruning needs labels only. All this is for people, and worked out when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.axes.analysis import Analysis
from graphprune.axes.flow import Flow, Operand, SignatureFlow
from graphprune.axes.labels import Labels, varying_axes
from graphprune.axes.signature import Role, View
from graphprune.axes.ties import ties_of
from graphprune.cost import macs_of
from graphprune.graph import Op, Tensor
from graphprune.rules.registry import Refusal, find_rule, tensor_at

#: Element types that count as parameters: sizes, indices and flags do not.
_NOT_PARAMETERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING, None}


@dataclass(frozen=True, slots=True)
class Member:
    """One axis of one tensor that a group cuts.

    Attributes:
        tensor: Name of the tensor.
        axis: The axis that shrinks.
        role: For a weight what the op that reads it does along the axis: ``pass-through`` (makes or keeps it),
            ``contracted`` (sums over it), ``normalised`` (takes a statistic over it), ``blocked`` or ``separate``
            (nothing may be removed there); ``activation`` for other tensors.
        is_constant: It is a weight rather than an activation.
    """

    tensor: str
    axis: int
    role: str
    is_constant: bool


class Place(NamedTuple):
    """Where a labelling lies."""

    tensor: Tensor
    axis: int
    labels: Labels


@dataclass(eq=False, slots=True)
class Spread:
    """A distinct labelling and all places where it lies.

    Attributes:
        rows: One row a context, the own axis along the columns.
        places: Axes of tensors; the labelling there is ``rows`` but for the order of its axes.
    """

    rows: Labels
    places: list[Place]


def own_axis(labels: Labels) -> int:
    """The axis that shrinks."""
    varying = varying_axes(labels)
    return varying[-1] if varying else labels.ndim - 1


def rows_of(labels: Labels, own: int) -> Labels:
    """A labelling as a matrix: one row a context, the own axis along the columns."""
    if labels.size == labels.shape[own]:
        return labels.reshape(1, -1)
    return np.moveaxis(labels, own, -1).reshape(-1, labels.shape[own])


def spreads_of(analysis: Analysis) -> list[Spread]:
    """Every labelling of every tensor, equal ones together."""
    found: dict[tuple[tuple[int, ...], bytes], Spread] = {}
    for tensor in analysis.colourings:
        for labels in analysis.labellings(tensor):
            own = own_axis(labels)
            rows = rows_of(labels, own)
            key = (rows.shape, rows.tobytes())
            found.setdefault(key, Spread(rows, [])).places.append(Place(tensor, own, labels))
    return list(found.values())


def position(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor stands in the graph: a constant at its first reader, others at the op that makes them."""
    if tensor.constant and tensor.uses:
        return min((op.index, slot) for op, slot in tensor.uses)
    if tensor.producer is None:
        return (-1, 0)
    return (tensor.producer.index, 1 << 16)


class Inventory:
    """Where the groups of one analysis lie.

    Attributes:
        analysis: The analysis.
        spreads: All distinct labellings.
        owner: int32 ``[number of atoms]``: the index of the group that a label belongs to, -1 if none.
        groups_in: For each spread the groups whose labels it holds, and how many of its elements bear each.
    """

    def __init__(
        self, analysis: Analysis, spreads: list[Spread], owner: npt.NDArray[np.int32], count: int
    ) -> None:
        self.analysis = analysis
        self.spreads = spreads
        self.owner = owner
        self._count = count
        self.groups_in: list[dict[int, int]] = []
        for spread in spreads:
            numbers = np.bincount(owner[spread.rows].ravel() + 1, minlength=1)[1:]
            here = np.flatnonzero(numbers)
            self.groups_in.append(dict(zip(here.tolist(), numbers[here].tolist(), strict=True)))

    def places(self) -> Iterator[tuple[Place, dict[int, int]]]:
        """Every place with its groups."""
        for spread, groups in zip(self.spreads, self.groups_in, strict=True):
            for place in spread.places:
                yield place, groups

    @cached_property
    def on(self) -> dict[Tensor, dict[int, tuple[int, ...]]]:
        """For each tensor, for each of its axes, the groups that cut it."""
        found: dict[Tensor, dict[int, set[int]]] = {}
        for place, groups in self.places():
            found.setdefault(place.tensor, {}).setdefault(place.axis, set()).update(groups)
        return {
            tensor: {axis: tuple(sorted(groups)) for axis, groups in sorted(axes.items())}
            for tensor, axes in found.items()
        }

    @cached_property
    def members(self) -> list[list[Member]]:
        """For each group the axes that it cuts, in the order of the graph."""
        members: list[dict[Member, None]] = [{} for _ in range(self._count)]
        roles = self._roles
        for place, groups in sorted(self.places(), key=lambda item: position(item[0].tensor)):
            tensor, axis, _ = place
            for group in groups:
                if tensor.constant:
                    for role in sorted(roles.get((tensor, axis, group), ())):
                        members[group][Member(tensor.name, axis, role, True)] = None
                else:
                    members[group][Member(tensor.name, axis, "activation", False)] = None
        return [list(of_group) for of_group in members]

    # -- roles --------------------------------------------------------------------------------------------------

    @cached_property
    def _roles(self) -> dict[tuple[Tensor, int, int], set[str]]:
        """For each (weight, axis, group) what the ops that read the weight do along the axis."""
        roles: dict[tuple[Tensor, int, int], set[str]] = {}
        weights = [(place, groups) for place, groups in self.places() if place.tensor.constant]
        # What is computed from constants comes after them: its roles are theirs.
        for (tensor, axis, labels), groups in sorted(
            weights, key=lambda item: -self._made_at(item[0].tensor)
        ):
            for op, slot in tensor.uses:
                if all(t is None or t.constant for t in op.inputs):
                    self._inherit(roles, op, slot, tensor, axis, groups)
                    continue
                role = self._role(op, slot, axis, labels)
                for group in groups:
                    roles.setdefault((tensor, axis, group), set()).add(role)
            for group in groups:
                if not roles.setdefault((tensor, axis, group), set()):
                    roles[tensor, axis, group].add(Role.PASS.value)
        return roles

    @staticmethod
    def _made_at(tensor: Tensor) -> int:
        return -1 if tensor.producer is None else tensor.producer.index

    def _inherit(
        self,
        roles: dict[tuple[Tensor, int, int], set[str]],
        op: Op,
        slot: int,
        tensor: Tensor,
        axis: int,
        groups: dict[int, int],
    ) -> None:
        """Roles of a constant that a layout op (Transpose, Reshape) reads: those of the result."""
        here = (Operand(False, slot), axis)
        for tie in ties_of(op, self.flows(op)):
            if here not in tie.places:
                continue
            for operand, other in tie.places:
                result = tensor_at(op, operand)
                if not operand.is_output or result is None:
                    continue
                for group in groups:
                    roles.setdefault((tensor, axis, group), set()).update(
                        roles.get((result, other, group), ())
                    )

    def flows(self, op: Op) -> list[Flow]:
        """The flows of an op, none where its rule refused."""
        flows = self.analysis.flows[op.index]
        return [] if isinstance(flows, Refusal) else flows

    def _role(self, op: Op, slot: int, axis: int, labels: Labels) -> str:
        flows = self.analysis.flows[op.index]
        if isinstance(flows, Refusal):
            return Role.BLOCKED.value
        for flow in flows:
            if isinstance(flow, SignatureFlow):
                for view in flow.signature.views:
                    if view.is_output or view.slot != slot or view.axes[axis].factors is None:
                        continue
                    factor = _own_factor(view, axis, flow.signature.sizes, labels)
                    role = flow.signature.role(factor) if factor else Role.BLOCKED
                    if role is Role.PASS and factor in view.summed:
                        role = Role.CONTRACTED
                    return role.value
        return Role.PASS.value

    # -- costs --------------------------------------------------------------------------------------------------

    @cached_property
    def parameters(self) -> list[int]:
        """For each group the elements of initializers that bear one of its labels; each initializer once."""
        total = [0] * self._count
        borne: dict[tuple[int, int], list[tuple[Place, int]]] = {}
        for place, groups in self.places():
            tensor = place.tensor
            if not tensor.constant or tensor.producer is not None or tensor.dtype in _NOT_PARAMETERS:
                continue
            repeat = prod(tensor.shape or ()) // place.labels.size
            for group, number in groups.items():
                borne.setdefault((group, id(tensor.value or tensor)), []).append((place, number * repeat))
        for (group, _), places in borne.items():
            if len(places) == 1:
                total[group] += places[0][1]
            else:  # cut along two axes, or in two ways: no element counts twice
                labellings = [place.labels for place, _ in places]
                shape = np.broadcast_shapes(*(labels.shape for labels in labellings))
                hit = np.zeros(shape, dtype=bool)
                for labels in labellings:
                    hit |= self.owner[labels] == group
                total[group] += int(hit.sum()) * (prod(places[0][0].tensor.shape or ()) // hit.size)
        return total

    @cached_property
    def macs(self) -> list[int]:
        """For each group the multiply-accumulates of the contractions along whose factors it lies."""
        total = [0] * self._count
        for op in self.analysis.graph.ops:
            rule = find_rule(op)
            if rule is None or not rule.macs or all(t is None or t.constant for t in op.inputs):
                continue
            cost = macs_of(op, self.analysis)
            operands = [t for t in (*op.inputs, *op.outputs) if t is not None]
            for group in {g for t in operands for groups in self.on.get(t, {}).values() for g in groups}:
                total[group] += cost
        return total


def _own_factor(view: View, axis: int, sizes: Mapping[str, int], labels: Labels) -> str | None:
    """The factor of an operand's axis along which a labelling varies: the last one of those that it does."""
    names = [name for name in view.axes[axis].factors or () if sizes[name] > 1]
    take = view.axes[axis].take
    if len(names) > 1:
        rows = np.moveaxis(labels, axis, -1)
        rows = rows if take is None else rows[..., slice(*take)]
        varying = varying_axes(rows.reshape(-1, *(sizes[name] for name in names)))
        return names[max(varying[-1] - 1, 0)] if varying else None
    return names[0] if names else None
