"""What was made sparse, what was not, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphprune.sparsity.pattern import Layout


@dataclass
class WeightReport:
    """One stored weight.

    Attributes:
        name: The initializer.
        node, op: The first op that contracts it.
        shape, dtype: As stored.
        layout: As the op contracts it; None where its uses disagree.
        eligible: It may have the pattern on this target.
        reason: Why it may not.
        unlikely: Why the pattern is not likely to gain time; None if it is.
        tail: Channels at the end that fill no group and stay dense.
        method: How its elements were chosen; None where it was left as it was.
        kept: Share of its magnitude (sum of absolute values) that stays; None where it was left as it was.
        zeros: Fraction of its elements that are zero; None where nobody looked.
        holds: The pattern that it truly holds, as "2:4"; None where nobody looked.
    """

    name: str
    node: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout | None
    eligible: bool
    reason: str | None
    unlikely: str | None = None
    tail: int = 0
    method: str | None = None
    kept: float | None = None
    zeros: float | None = None
    holds: str | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for axis in self.shape:
            count *= axis
        return count

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        layout = self.layout
        return {
            "name": self.name,
            "node": self.node,
            "op": self.op,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "contracted": None if layout is None else layout.contracted,
            "outputs": None if layout is None else layout.outputs,
            "eligible": self.eligible,
            "reason": self.reason,
            "likely_to_gain": self.eligible and self.unlikely is None,
            "unlikely": self.unlikely,
            "dense_tail": self.tail,
            "method": self.method,
            "magnitude_kept": self.kept,
            "zeros": self.zeros,
            "holds": self.holds,
        }


@dataclass
class SparsityReport:
    """Everything that one run did.

    Attributes:
        pattern, target, method: What was asked for.
        weights: In the order of the graph.
        permutation: What reordering the channels gained; None where it was not tried.
        layers: Errors of the contractions that were fitted to inputs.
        notes: What a person should know.
        seconds: By step.
    """

    pattern: str
    target: str
    method: str
    weights: list[WeightReport]
    permutation: dict[str, Any] | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def sparse(self) -> list[WeightReport]:
        """Weights that were given the pattern."""
        return [weight for weight in self.weights if weight.method is not None]

    @property
    def skipped(self) -> list[WeightReport]:
        """Weights that were left as they were."""
        return [weight for weight in self.weights if weight.method is None]

    @property
    def share(self) -> float:
        """Elements of the weights that were given the pattern, as a share of all weights that ops contract."""
        total = sum(weight.size for weight in self.weights)
        return sum(weight.size for weight in self.sparse) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "pattern": self.pattern,
            "target": self.target,
            "method": self.method,
            "weights": [weight.to_dict() for weight in self.weights],
            "permutation": self.permutation,
            "layers": self.layers,
            "notes": self.notes,
            "seconds": {step: round(value, 4) for step, value in self.seconds.items()},
        }
