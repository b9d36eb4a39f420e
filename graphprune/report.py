"""What a run did, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphprune.axes.groups import Group
    from graphprune.plan import Plan
    from graphprune.repair.refit import RepairReport


@dataclass
class Report:
    """The result of one run.

    Attributes:
        parameters_before, parameters_after: Weights stored.
        macs_before, macs_after: Multiply-accumulates at the sizes of the twin.
        bytes_before, bytes_after: Size of the model as a file.
        groups: All coupling groups, frozen ones included.
        plan: What was removed.
        max_error: Largest difference from the masked original, relative to the output's scale; None if not verified.
        output_change: Largest change of an output against the original, relative to the output's scale; None if not
            measured.
        inputs: What it was measured on.
        latency: Where a latency was asked for: what the tables foretold, and what was measured, as fractions of the
            original's.
        repaired: What was refitted, layer by layer; None if nothing was.
        input_shapes: The sizes at which the network was analysed and compared.
        seconds: Wall time of each step.
        notes: Whatever the user should know.
    """

    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    groups: list[Group]
    plan: Plan
    bytes_before: int = 0
    bytes_after: int = 0
    max_error: float | None = None
    output_change: float | None = None
    inputs: str = "random input"
    latency: tuple[float, float] | None = None
    repaired: RepairReport | None = None
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def groups_pruned(self) -> int:
        """Number of groups that lost something."""
        return len(self.plan.cuts)

    @property
    def groups_frozen(self) -> int:
        """Number of groups of which nothing may be removed."""
        return sum(group.frozen is not None for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "macs": {"before": self.macs_before, "after": self.macs_after},
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "groups": [group_to_dict(group) for group in self.groups],
            "pruned": [
                {"group": cut.group, "size": cut.size, "removed": len(cut.removed)} for cut in self.plan.cuts
            ],
            "max_error": self.max_error,
            "output_change": self.output_change,
            "inputs": self.inputs,
            "latency": None
            if self.latency is None
            else {"foretold": self.latency[0], "measured": self.latency[1]},
            "repaired": None if self.repaired is None else self.repaired.to_dict(),
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "seconds": self.seconds,
            "notes": self.notes,
        }


def group_to_dict(group: Group) -> dict[str, Any]:
    """A group as JSON can hold it."""
    return {
        "name": group.name,
        "size": group.size,
        "blocks": len(group.blocks),
        "frozen": group.frozen,
        "statistical": group.statistical,
        "parameters": group.parameters,
        "macs": group.macs,
        "members": [
            {"tensor": m.tensor, "axis": m.axis, "role": m.role, "weight": m.is_constant}
            for m in group.members
        ],
    }
