"""Plans: which labels of which group go, and what that leaves of every tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.axes.analysis import Analysis
from graphprune.axes.groups import Group
from graphprune.axes.labels import Labels
from graphprune.errors import PlanError
from graphprune.graph import Tensor
from graphprune.kernels.box import Mask, box, box_of_parts, by_axis, combined

#: Version of the plan file's format.
FORMAT = 1


@dataclass(frozen=True)
class Cut:
    """What one group loses.

    Attributes:
        group: The group's name.
        size: The group's number of labels, to notice a plan made for another model.
        removed: Positions within the group's labels, ascending.
    """

    group: str
    size: int
    removed: tuple[int, ...]


@dataclass
class Plan:
    """A value: which positions of which group go.

    Attributes:
        cuts: One entry for each group that loses something.
        parts: By initializer name, what is kept: bool arrays that broadcast against the initializer's shape; an
            element stays where all of them hold.
        shapes: By initializer name, its shape before.
    """

    cuts: list[Cut]
    parts: dict[str, list[Mask]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def masks(self) -> dict[str, Mask]:
        """By initializer name, what is kept: one bool array that broadcasts against the initializer's shape."""
        return {name: combined(parts) for name, parts in self.parts.items()}

    @property
    def kept(self) -> dict[str, dict[int, npt.NDArray[np.int64]]]:
        """By initializer name and axis, the kept positions; only where the axes are cut independently."""
        result: dict[str, dict[int, npt.NDArray[np.int64]]] = {}
        for name, parts in self.parts.items():
            masks = by_axis(parts)
            if masks is not None:
                result[name] = {axis: np.flatnonzero(mask) for axis, mask in sorted(masks.items())}
        return result

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold.

        ``initializers`` serves training code: for each weight the kept positions of each axis, or, where the axes
        are not cut independently, the flat positions of the kept elements and the shape that they take.
        """
        kept = self.kept
        initializers: dict[str, Any] = {}
        for name, parts in self.parts.items():
            if name in kept:
                initializers[name] = {"axes": {str(a): p.tolist() for a, p in kept[name].items()}}
            else:
                whole = np.broadcast_to(combined(parts), self.shapes[name])
                initializers[name] = {
                    "elements": np.flatnonzero(whole.ravel()).tolist(),
                    "shape": list(box_of_parts(parts, self.shapes[name]) or ()),
                }
        return {
            "graphprune_plan": FORMAT,
            "groups": [{"name": c.group, "size": c.size, "removed": list(c.removed)} for c in self.cuts],
            "initializers": initializers,
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """Read what :meth:`to_dict` gave; masks are worked out when the plan is applied to its model.

        Raises:
            PlanError: The data are no plan.
        """
        try:
            if data["graphprune_plan"] != FORMAT:
                raise PlanError(
                    f"the plan has format {data['graphprune_plan']!r}; this version reads {FORMAT}"
                )
            cuts = [
                Cut(str(entry["name"]), int(entry["size"]), tuple(sorted({int(i) for i in entry["removed"]})))
                for entry in data["groups"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is no plan of graphprune: {error!r}") from error
        return Plan(cuts)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: The file cannot be read or is no plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read the plan {str(path)!r}: {error}") from error
        if not isinstance(data, dict):
            raise PlanError(f"{str(path)!r} is no plan of graphprune")
        return Plan.from_dict(data)

    def removed_labels(self, groups: Iterable[Group]) -> npt.NDArray[np.int32]:
        """The labels that the plan removes, in the analysis that made ``groups``.

        Raises:
            PlanError: A group is missing, frozen, or of another size.
        """
        by_name = {group.name: group for group in groups}
        parts = [np.zeros(0, dtype=np.int32)]
        for cut in self.cuts:
            group = by_name.get(cut.group)
            if group is None:
                raise PlanError(f"the plan cuts group {cut.group!r}, which the model does not have")
            if group.size != cut.size:
                raise PlanError(
                    f"the plan cuts group {cut.group!r} of {cut.size}; in this model it has {group.size}"
                )
            if group.frozen:
                raise PlanError(f"the plan cuts group {cut.group!r}, which is frozen: {group.frozen}")
            if cut.removed and not 0 <= cut.removed[0] <= cut.removed[-1] < group.size:
                raise PlanError(f"the plan removes positions outside group {cut.group!r} of {group.size}")
            parts.append(group.labels[list(cut.removed)])
        return np.concatenate(parts)


class Masks:
    """What a set of removed labels leaves of every tensor."""

    def __init__(self, analysis: Analysis, removed: npt.NDArray[np.int32]) -> None:
        self.analysis = analysis
        self._gone = np.zeros(len(analysis.atoms), dtype=bool)
        self._gone[removed] = True
        self._parts: dict[Tensor, list[Mask]] = {}
        self._shapes: dict[Tensor, tuple[int, ...]] = {}

    def kept(self, labels: Labels) -> Mask:
        """Which elements one labelling keeps; broadcasts as the labelling does."""
        return ~self._gone[labels]

    def parts(self, tensor: Tensor) -> list[Mask]:
        """What is kept of a tensor, one array for each labelling that loses something; empty where all is kept."""
        if tensor not in self._parts:
            found = (self.kept(labels) for labels in self.analysis.labellings(tensor))
            self._parts[tensor] = [part for part in found if not part.all()]
        return self._parts[tensor]

    def mask(self, tensor: Tensor) -> Mask | None:
        """What is kept of a tensor; None where all is."""
        parts = self.parts(tensor)
        return combined(parts) if parts else None

    def is_empty(self, tensor: Tensor) -> bool:
        """True if nothing is left of a tensor."""
        parts = self.parts(tensor)
        return bool(parts) and 0 in (box_of_parts(parts, tensor.shape or ()) or ())

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of a tensor after.

        Raises:
            PlanError: What is left is no box, or nothing is left.
        """
        if tensor.shape is None:
            raise PlanError(f"the shape of {tensor.name!r} is not known")
        if tensor not in self._shapes:
            parts = self.parts(tensor)
            shape = box_of_parts(parts, tensor.shape) if parts else tensor.shape
            if shape is None:
                raise PlanError(f"what is left of tensor {tensor.name!r} has rows of different lengths")
            if parts and 0 in shape:
                raise PlanError(f"nothing would be left of tensor {tensor.name!r}")
            self._shapes[tensor] = shape
        return self._shapes[tensor]

    def changed(self) -> list[Tensor]:
        """Tensors that lose something."""
        return [tensor for tensor in self.analysis.colourings if self.parts(tensor)]

    def faults(self) -> list[tuple[Tensor, str]]:
        """Tensors of which no box, or nothing, is left."""
        found = []
        for tensor in self.changed():
            try:
                self.shape(tensor)
            except PlanError as error:
                found.append((tensor, str(error)))
        for tensor, part, _ in self.analysis.partial_labellings():
            mask = self.mask(tensor)
            seen = part(mask) if mask is not None else None
            if seen is not None and box(seen) is None:
                found.append(
                    (tensor, f"what an op reads of tensor {tensor.name!r} has rows of different lengths")
                )
        return found


def make_plan(
    analysis: Analysis, groups: Sequence[Group], removed: npt.NDArray[np.int32]
) -> tuple[Plan, Masks]:
    """State a set of removed labels as a plan, with the masks of all initializers."""
    gone = np.zeros(len(analysis.atoms), dtype=bool)
    gone[removed] = True
    cuts = [
        Cut(group.name, group.size, tuple(np.flatnonzero(gone[group.labels]).tolist()))
        for group in groups
        if gone[group.labels].any()
    ]
    masks = Masks(analysis, removed)
    plan = Plan(cuts)
    for tensor in masks.changed():
        if tensor.constant and tensor.producer is None and tensor.value is not None:
            name = tensor.value.name or tensor.name
            plan.parts[name] = masks.parts(tensor)
            plan.shapes[name] = tensor.shape or ()
    return plan, masks
