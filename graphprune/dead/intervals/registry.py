"""The table of interval rules, keyed by (domain, op type).

A rule takes a :class:`Site` and returns the bounds of each output; None where it knows nothing of one. Op types
without a rule are unbounded. One of your own::

    @rule("com.acme::Gate")
    def gate(site: Site) -> list[Bounds | None]:
        return [between(site.rank(0), 0.0, 1.0)]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from graphprune.axes.flow import Flow, SignatureFlow
from graphprune.dead.intervals.bounds import Bounds, unknown
from graphprune.graph import Op, Tensor

if TYPE_CHECKING:
    from graphprune.dead.intervals.propagation import Intervals

#: What a rule knows of each output.
Found: TypeAlias = "list[Bounds | None]"
Transfer: TypeAlias = "Callable[[Site], Found]"

_RULES: dict[tuple[str, str], Transfer] = {}


def rule(kinds: str) -> Callable[[Transfer], Transfer]:
    """Register a function for op types separated by blanks, each ``OpType`` or ``domain::OpType``."""

    def add(transfer: Transfer) -> Transfer:
        for kind in kinds.split():
            domain, _, op_type = kind.rpartition("::")
            _RULES["" if domain == "ai.onnx" else domain, op_type] = transfer
        return transfer

    return add


def find_rule(op: Op) -> Transfer | None:
    """The interval rule of an op; None if its type has none."""
    return _RULES.get(("" if op.domain == "ai.onnx" else op.domain, op.op_type))


def registered() -> list[str]:
    """All kinds that have a rule, sorted."""
    return sorted(f"{domain}::{name}" if domain else name for domain, name in _RULES)


class Site:
    """One op as a rule sees it.

    Attributes:
        op: The op.
        flows: How labels flow through it; empty where the label rules refuse.
    """

    def __init__(self, op: Op, flows: list[Flow], intervals: Intervals) -> None:
        self.op = op
        self.flows = flows
        self._intervals = intervals

    def tensor(self, slot: int) -> Tensor | None:
        return self.op.inputs[slot] if slot < len(self.op.inputs) else None

    def has(self, slot: int) -> bool:
        return self.tensor(slot) is not None

    def bounds(self, slot: int) -> Bounds:
        """Bounds of an input that is there."""
        tensor = self.tensor(slot)
        return unknown(0) if tensor is None else self._intervals.of(tensor)

    def all_bounds(self) -> list[Bounds]:
        """Bounds of all inputs that are there."""
        return [self._intervals.of(tensor) for tensor in self.op.inputs if tensor is not None]

    def contents(self, slot: int) -> npt.NDArray[Any] | None:
        """Contents of an input that no graph input influences; None for others."""
        tensor = self.tensor(slot)
        return None if tensor is None or not tensor.constant else self._intervals.contents(tensor)

    def shape(self, slot: int) -> tuple[int, ...]:
        tensor = self.tensor(slot)
        return () if tensor is None else tensor.shape or ()

    def out_shape(self, slot: int = 0) -> tuple[int, ...]:
        tensor = self.op.outputs[slot] if slot < len(self.op.outputs) else None
        return () if tensor is None else tensor.shape or ()

    def rank(self, slot: int = 0) -> int:
        """Rank of an output."""
        return len(self.out_shape(slot))

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.op.attributes.get(name, default)

    @property
    def finite(self) -> bool:
        """True if no input is infinite or NaN because of a constant."""
        return all(self._intervals.finite(tensor) for tensor in self.op.inputs if tensor is not None)

    @property
    def eps(self) -> float:
        """The precision in which the op computes: that of its output's type, or of a narrower operand's."""
        types = [
            t.dtype for t in (*self.op.inputs, *self.op.outputs) if t is not None and t.dtype is not None
        ]
        reals = [dtype.numpy() for dtype in types if dtype.is_floating_point()]
        return max((_eps(dtype) for dtype in reals), default=0.0)

    @property
    def signature(self) -> SignatureFlow | None:
        """The op's one signature, if it has one."""
        found = [flow for flow in self.flows if isinstance(flow, SignatureFlow)]
        return found[0] if len(found) == 1 == len(self.flows) else None


def _eps(dtype: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]
