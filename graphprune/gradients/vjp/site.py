"""The table of vector-Jacobian products, keyed by (domain, op type).

A rule takes a :class:`Site` and returns, for each input slot that is wanted, what the op adds to the adjoint of that
input: the Jacobian's transpose times the adjoint of the output. Shapes are numbers (the twin's), so that a rule says
what it means in a line or two. Elementwise ops of one operand are given by their derivative alone::

    elementwise("Tanh", lambda x, y, s: 1 - y * y)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from graphprune.gradients.vjp.emit import Array, Emitter, NoGradientError, Shape, Value
from graphprune.graph import Op, Tensor
from graphprune.graph.evaluate import evaluate_constant


@dataclass(frozen=True)
class Site:
    """One op of the forward graph, as its rule sees it.

    Attributes:
        op: The op.
        e: Where nodes are written.
        grads: Adjoint of each output, of the output's full shape; None where the loss does not depend on it.
        wanted: Input slots whose adjoint somebody needs.
        values: The forward value of a tensor.
    """

    op: Op
    e: Emitter
    grads: list[Value | None]
    wanted: frozenset[int]
    values: Callable[[Tensor], Value]

    @property
    def g(self) -> Value:
        """The adjoint of the only output that matters.

        Raises:
            NoGradientError: The loss depends on another output.
        """
        first, *others = self.grads
        if first is None or any(other is not None for other in others):
            raise NoGradientError("the loss depends on an output other than the first")
        return first

    def tensor(self, slot: int) -> Tensor | None:
        """The tensor at an input; None where it is missing."""
        return self.op.inputs[slot] if slot < len(self.op.inputs) else None

    def has(self, slot: int) -> bool:
        """True if an optional input is present."""
        return self.tensor(slot) is not None

    def x(self, slot: int = 0) -> Value:
        """The forward value of an input."""
        tensor = self.tensor(slot)
        if tensor is None:
            raise NoGradientError(f"input {slot} is missing")
        return self.values(tensor)

    def y(self, slot: int = 0) -> Value:
        """The forward value of an output."""
        tensor = self.op.outputs[slot]
        if tensor is None:
            raise NoGradientError(f"output {slot} is missing")
        return self.values(tensor)

    def shape(self, slot: int = 0) -> Shape:
        """The shape of an input."""
        return self.x(slot).shape

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        value = self.op.attributes.get(name)
        return default if value is None else value

    def literal(self, slot: int) -> Array | None:
        """The contents of an input; None where it is missing.

        Raises:
            NoGradientError: They depend on the model's inputs.
        """
        tensor = self.tensor(slot)
        if tensor is None:
            return None
        if tensor.data is not None:
            return tensor.data
        if not tensor.constant:
            raise NoGradientError(f"input {slot} depends on the model's inputs")
        return np.asarray(evaluate_constant(tensor))

    def integers(self, slot: int, name: str = "") -> list[int] | None:
        """Integers that are an input in new opsets and an attribute in old ones; None where neither is there."""
        found = self.attribute(name) if name else None
        if found is None:
            found = self.literal(slot)
        return None if found is None else [int(i) for i in np.ravel(found)]

    def axis(self, default: int | None = None, name: str = "axis") -> int:
        """An attribute that names an axis of the first input, non-negative."""
        value = self.attribute(name, default)
        if value is None:
            raise NoGradientError(f"it has no attribute {name!r}")
        return int(value) % max(len(self.shape()), 1)

    def wants(self, slot: int) -> bool:
        """True if somebody needs the adjoint of an input."""
        return slot in self.wanted


#: What a rule returns: contributions by input slot.
Adjoints: TypeAlias = Mapping[int, Value]
Rule: TypeAlias = Callable[[Site], Adjoints]
#: The derivative of an elementwise op, from its operand, its result and its site.
Derivative: TypeAlias = "Callable[[Value, Value, Site], Value | float]"

_RULES: dict[tuple[str, str], Rule] = {}


def _key(kind: str) -> tuple[str, str]:
    domain, _, op_type = kind.rpartition("::")
    return ("" if domain == "ai.onnx" else domain, op_type)


def vjp(kinds: str) -> Callable[[Rule], Rule]:
    """Give op types (separated by blanks, each ``OpType`` or ``domain::OpType``) a rule; a later one replaces it."""

    def register(rule: Rule) -> Rule:
        for kind in kinds.split():
            _RULES[_key(kind)] = rule
        return rule

    return register


def elementwise(kinds: str, derivative: Derivative) -> None:
    """Give elementwise ops of one operand a rule: the adjoint times the derivative."""

    def rule(s: Site) -> Adjoints:
        return {0: s.g * derivative(s.x(), s.y(), s)} if s.wants(0) else {}

    vjp(kinds)(rule)


def constant(kinds: str) -> None:
    """Ops whose derivative is zero wherever it exists."""
    vjp(kinds)(lambda _: {})


def find_vjp(op: Op) -> Rule | None:
    """The rule of an op; None if its type has none."""
    return _RULES.get(_key(op.kind))


def differentiable() -> list[str]:
    """All kinds that have a rule, sorted."""
    return sorted(f"{domain}::{name}" if domain else name for domain, name in _RULES)
