"""The table of op rules, keyed by (domain, op type).

A rule says how labels flow through an op, which attributes hold factor sizes, and which literals depend on sizes.
For most ops it is one line of signature::

    register("Conv", "n (g c) S!*, (g k) c R!*, (g k) -> n (g k) T!*", attributes={"group": "g"})

and so it is for an op of your own::

    register("com.acme::ScaleShift", "n c S*, c, c -> n c S*")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.axes.flow import Flow, Operand, SignatureFlow
from graphprune.axes.signature import Pattern, bind, parse
from graphprune.errors import RuleError
from graphprune.graph import Op, Tensor

#: What a rule's function may return: a signature's text, with factor sizes where they do not follow from the shapes;
#: flows; or a refusal.
Description: TypeAlias = "str | tuple[str, Mapping[str, int]] | Flow | list[Flow] | Refusal"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Nothing that the op touches may be removed, because of ``reason``."""

    reason: str


class Change(Protocol):
    """What a rule's ``rewrite`` sees of one op and may ask to be changed (see :mod:`graphprune.rewrite`)."""

    op: Op

    def old(self, operand: Operand) -> tuple[int, ...]:
        """Shape of an operand before."""

    def new(self, operand: Operand) -> tuple[int, ...]:
        """Shape of an operand after."""

    def kept(self, operand: Operand) -> npt.NDArray[np.bool_]:
        """Which elements of an operand stay; broadcasts against its old shape."""

    def factor_sizes(self, factor: str) -> tuple[int, int]:
        """Size of a signature's factor before and after."""

    def known(self, slot: int) -> npt.NDArray[Any] | None:
        """Contents of an input where they are the same at every size of the model's dynamic dimensions."""

    def set_attribute(self, name: str, value: int | float | str | Sequence[int]) -> None:
        """Give the node an attribute."""

    def remove_attribute(self, name: str) -> None:
        """Take an attribute away from the node."""

    def set_input(self, slot: int, array: npt.NDArray[Any]) -> None:
        """Feed an input from a new constant."""

    def scale_input(self, slot: int, new: Sequence[int], old: Sequence[int]) -> None:
        """Multiply the positive entries of a shape-like integer input by new / old at run time."""

    def gather_input(self, slot: int, axis: int, index: npt.NDArray[np.int64]) -> None:
        """Take positions along an axis of an input before the op reads it."""

    def restore_output(self, slot: int, new: Sequence[int], old: Sequence[int]) -> None:
        """Make an output that reports sizes report the old ones to whoever reads it."""


Describe: TypeAlias = Callable[[Op], Description]
Rewrite: TypeAlias = Callable[[Change], None]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one op type behaves.

    Attributes:
        describe: The signature's text, or a function of the op that returns it (or other flows, or a refusal).
        attributes: Integer attribute -> factors whose product it holds, such as ``{"group": ("g",)}``.
        defaults: Value of those attributes where the node lacks them. An attribute with neither is worked out from
            the shapes.
        sizes: Factor sizes that the op type fixes.
        rewrite: Adjusts literals and attributes that are no plain factor sizes.
        layout: The op only moves or converts elements; labels flow through it on constants too.
        macs: Multiply-accumulates: products of factors, joined with ``+``; ``all`` is the product of all.
    """

    describe: str | Describe
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    rewrite: Rewrite | None = None
    layout: bool = False
    macs: str = ""


_RULES: dict[tuple[str, str], Rule] = {}


def _key(kind: str) -> tuple[str, str]:
    domain, _, op_type = kind.rpartition("::")
    return ("" if domain == "ai.onnx" else domain, op_type)


def register(
    kinds: str,
    describe: str | Describe,
    *,
    attributes: Mapping[str, str] | None = None,
    defaults: Mapping[str, int] | None = None,
    sizes: Mapping[str, int] | None = None,
    rewrite: Rewrite | None = None,
    layout: bool = False,
    macs: str = "",
) -> None:
    """Give one or more op types a rule; a later one replaces an earlier.

    Args:
        kinds: Op types separated by blanks, each ``OpType`` or ``domain::OpType``.
        describe: The signature (see :mod:`graphprune.axes.signature`), or a function of the op that returns one.
        attributes: Attribute name -> factor, or factors separated by blanks, whose size it holds. The factor's size
            is read from it, and it is rewritten when the factor shrinks.
        defaults: Values of those attributes where a node lacks them.
        sizes: Factor sizes that the op type fixes.
        rewrite: Adjusts literals that depend on sizes (see :class:`Change`).
        layout: The op only moves or converts elements.
        macs: What the op costs, as products of factors such as ``n g c k R* T*``; several are joined with ``+``.

    Raises:
        RuleError: The signature is malformed.
    """
    if isinstance(describe, str):
        parse(describe)
    rule = Rule(
        describe,
        {name: tuple(factors.split()) for name, factors in (attributes or {}).items()},
        defaults or {},
        sizes or {},
        rewrite,
        layout,
        macs,
    )
    for kind in kinds.split():
        _RULES[_key(kind)] = rule


def find_rule(op: Op) -> Rule | None:
    """The rule of an op; None if its type has none."""
    return _RULES.get(("" if op.domain == "ai.onnx" else op.domain, op.op_type))


def registered() -> list[str]:
    """All kinds that have a rule, sorted."""
    return sorted(f"{domain}::{name}" if domain else name for domain, name in _RULES)


def tensor_at(op: Op, operand: Operand) -> Tensor | None:
    """The tensor at an operand; None where it is missing."""
    tensors = op.outputs if operand.is_output else op.inputs
    return tensors[operand.slot] if operand.slot < len(tensors) else None


def shape_of(op: Op, slot: int, *, output: bool = False) -> tuple[int, ...]:
    """Static shape of an operand that the op must have.

    Raises:
        RuleError: The operand is missing or its shape is unknown.
    """
    tensor = tensor_at(op, Operand(output, slot))
    if tensor is None or tensor.shape is None:
        raise RuleError(
            f"{op.kind} {op.name!r}: {'output' if output else 'input'} {slot} is missing or has no shape"
        )
    return tensor.shape


def has_input(op: Op, slot: int) -> bool:
    """True if the optional input is present."""
    return slot < len(op.inputs) and op.inputs[slot] is not None


def known_data(op: Op, slot: int) -> npt.NDArray[Any] | None:
    """Contents of an input where they are known at every size of the dynamic dimensions; None otherwise."""
    tensor = op.inputs[slot] if slot < len(op.inputs) else None
    return None if tensor is None or tensor.dynamic else tensor.data


def normal_axis(axis: int, rank: int) -> int:
    """A non-negative axis."""
    return axis + rank if axis < 0 else axis


def signature_flow(op: Op, text: str, sizes: Mapping[str, int]) -> SignatureFlow:
    """Bind a signature's text to an op's shapes."""
    inputs, outputs = (
        tuple(None if tensor is None else tensor.shape for tensor in tensors)
        for tensors in (op.inputs, op.outputs)
    )
    return _bound(text, inputs, outputs, tuple(sizes.items()))


@lru_cache(maxsize=4096)
def _bound(
    text: str,
    inputs: tuple[tuple[int, ...] | None, ...],
    outputs: tuple[tuple[int, ...] | None, ...],
    sizes: tuple[tuple[str, int], ...],
) -> SignatureFlow:
    """Layers repeat: most ops of a network share their signature with others."""
    return SignatureFlow(bind(parse(text), inputs, outputs, dict(sizes)))


def _sizes(op: Op, rule: Rule) -> dict[str, int]:
    sizes = dict(rule.sizes)
    for attribute, factors in rule.attributes.items():
        value = op.attributes.get(attribute, rule.defaults.get(attribute))
        if value is not None and len(factors) == 1:
            sizes[factors[0]] = int(value)
    return sizes


def _described(op: Op, rule: Rule) -> tuple[str | Flow | list[Flow] | Refusal, dict[str, int]]:
    """What a rule says of an op, and the factor sizes known beforehand."""
    found = rule.describe if isinstance(rule.describe, str) else rule.describe(op)
    if isinstance(found, tuple):
        return found[0], {**_sizes(op, rule), **found[1]}
    return found, _sizes(op, rule)


def _unknown(op: Op, pattern: Pattern | None) -> Tensor | None:
    """An operand of unknown shape; those of which a signature says nothing may be so."""
    for tensors, said in (
        (op.inputs, pattern.inputs if pattern else ()),
        (op.outputs, pattern.outputs if pattern else ()),
    ):
        for slot, tensor in enumerate(tensors):
            silent = slot < len(said) and all(term.axes is None for term in said[slot])
            if tensor is not None and tensor.shape is None and not silent:
                return tensor
    return None


def flows_of(op: Op) -> list[Flow] | Refusal:
    """How labels flow through an op; a refusal where nothing may be removed."""
    rule = find_rule(op)
    if rule is None:
        return Refusal(f"there is no rule for {op.kind}")
    try:
        found, sizes = _described(op, rule)
        if isinstance(found, str):
            # Bound first: that a rule contradicts the op is a better reason than a shape that is missing for it.
            flow, unknown = signature_flow(op, found, sizes), _unknown(op, parse(found))
            return [flow] if unknown is None else Refusal(f"the shape of {unknown.name!r} is not known")
        if not isinstance(found, Refusal) and (unknown := _unknown(op, None)) is not None:
            return Refusal(f"the shape of {unknown.name!r} is not known")
    except RuleError as error:
        return Refusal(str(error))
    if isinstance(found, Refusal):
        return found
    return found if isinstance(found, list) else [found]


def output_shapes(op: Op) -> list[tuple[int, ...] | None] | None:
    """Output shapes as the op's signature gives them; None if they cannot be told.

    For ops of which ONNX itself knows no shape inference. ``op.outputs`` need no shapes.
    """
    rule = find_rule(op)
    if rule is None or any(tensor is not None and tensor.shape is None for tensor in op.inputs):
        return None
    unknown = Op(
        op.op_type, op.domain, op.version, op.attributes, op.inputs, [None] * len(op.outputs), op.node
    )
    try:
        text, sizes = _described(unknown, rule)
        if not isinstance(text, str):
            return None
        pattern = parse(text)
        inputs = [None if tensor is None else tensor.shape for tensor in op.inputs]
        signature = bind(pattern, inputs, [], sizes)
    except RuleError:
        return None
    ranked = {term.starred for terms in pattern.inputs for term in terms if term.starred}
    shapes: list[tuple[int, ...] | None] = []
    for slot in range(len(op.outputs)):
        terms = pattern.outputs[slot] if slot < len(pattern.outputs) else ()
        shape: tuple[int, ...] | None = None
        if terms and terms[0].axes is not None and (terms[0].starred is None or terms[0].starred in ranked):
            shape = _shape_of_term(terms[0].axes, terms[0].starred, signature.sizes)
        shapes.append(shape)
    return shapes


def _shape_of_term(
    axes: Sequence[object], starred: str | None, sizes: Mapping[str, int]
) -> tuple[int, ...] | None:
    shape: list[int] = []
    for axis in axes:
        factors = axis.factors  # type: ignore[attr-defined]
        if factors is None:
            return None
        if starred is not None and factors == (starred,):
            index = 0
            while f"{starred}{index}" in sizes:
                shape.append(sizes[f"{starred}{index}"])
                index += 1
            continue
        if any(name not in sizes for name in factors):
            return None
        shape.append(int(np.prod([sizes[name] for name in factors], dtype=np.int64)))
    return tuple(shape)
