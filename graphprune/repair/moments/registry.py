"""The table of moment rules, keyed by op kind (``domain::OpType``, the domain left out for ONNX's own).

A rule takes a :class:`Site` and returns what it knows of the op's outputs: one signal, a list of them, or None. Of op
types without a rule nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from graphprune.graph import Op, Tensor
from graphprune.repair.moments.signals import Array, Signal

#: The contents of a constant operand, as the original model has them.
Contents: TypeAlias = Callable[[Op, int], Array]
Found: TypeAlias = "Signal | list[Signal | None] | None"
Transfer: TypeAlias = "Callable[[Site], Found]"
_RULES: dict[str, Transfer] = {}


def rule(kinds: str) -> Callable[[Transfer], Transfer]:
    """Register a function for op kinds separated by blanks."""

    def add(transfer: Transfer) -> Transfer:
        _RULES.update((kind, transfer) for kind in kinds.split())
        return transfer

    return add


def find_rule(op: Op) -> Transfer | None:
    """The moment rule of an op; None if its kind has none."""
    return _RULES.get(op.kind)


@dataclass(frozen=True)
class Site:
    """One op as a rule sees it.

    Attributes:
        op: The op of the twin.
        signals: What is known of each input.
        contents: Reads constants.
    """

    op: Op
    signals: list[Signal | None]
    contents: Contents

    def tensor(self, slot: int) -> Tensor | None:
        return self.op.inputs[slot] if slot < len(self.op.inputs) else None

    def constant(self, slot: int) -> Array | None:
        """An operand whose contents are known; None for others. Shape arithmetic counts: the twin's sizes are fixed."""
        tensor = self.tensor(slot)
        if tensor is None:
            return None
        if tensor.data is not None:
            return tensor.data
        return self.contents(self.op, slot) if tensor.constant else None

    def shape(self, slot: int = 0) -> tuple[int, ...]:
        """An input's shape."""
        tensor = self.tensor(slot)
        return () if tensor is None else tensor.shape or ()

    @property
    def out_shape(self) -> tuple[int, ...]:
        output = self.op.outputs[0]
        return () if output is None else output.shape or ()

    @property
    def signal(self) -> Signal | None:
        """What is known of the first input."""
        return self.signals[0] if self.signals else None
