"""Which axes of an op's operands correspond to each other.

Labels say which *elements* go together; this says along which *axes* an op carries them, for people: the coupling
graph and the roles of members are read off it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphprune.axes.flow import (
    ChainFlow,
    Flow,
    Operand,
    ReshapeFlow,
    SignatureFlow,
    TakeFlow,
    reshape_blocks,
)
from graphprune.axes.signature import Role
from graphprune.graph import Op
from graphprune.rules.registry import tensor_at

#: An axis of an operand.
Place = tuple[Operand, int]


@dataclass(frozen=True, slots=True)
class Tie:
    """Axes of the operands of one op along which labels move together.

    Attributes:
        places: The axes, outputs first: the first one stands in the middle.
        via: What carries the labels, in words.
    """

    places: tuple[Place, ...]
    via: str


def ties_of(op: Op, flows: Sequence[Flow]) -> Iterator[Tie]:
    """The corresponding axes of an op's operands: about as many as the operands have axes."""
    for flow in flows:
        if isinstance(flow, SignatureFlow):
            yield from _signature_ties(flow)
        elif isinstance(flow, TakeFlow):
            yield from _take_ties((flow,), _rank(op, flow.source))
        elif isinstance(flow, ChainFlow):
            yield from _take_ties(flow.steps, _rank(op, flow.steps[0].source))
        elif isinstance(flow, ReshapeFlow):
            yield from _reshape_ties(flow)
        else:  # a flow of the user's own: it does not say which axes
            places = ((operand, axis) for operand in flow.operands() for axis in range(_rank(op, operand)))
            yield Tie(tuple(sorted(places, reverse=True)), type(flow).__name__)


def _rank(op: Op, operand: Operand) -> int:
    tensor = tensor_at(op, operand)
    return 0 if tensor is None or tensor.shape is None else len(tensor.shape)


def _signature_ties(flow: SignatureFlow) -> Iterator[Tie]:
    by_factor: dict[str, dict[Place, None]] = {}
    views = flow.signature.views
    for view in [*(v for v in views if v.is_output), *(v for v in views if not v.is_output)]:
        for index, axis in enumerate(view.axes):
            for name in axis.factors or ():
                by_factor.setdefault(name, {})[(Operand(view.is_output, view.slot), index)] = None
    for name, places in by_factor.items():
        if len(places) > 1 and flow.signature.sizes[name] > 1:
            role = flow.signature.role(name)
            yield Tie(tuple(places), f"factor {name}" + ("" if role is Role.PASS else f", {role.value}"))


def _take_ties(steps: Sequence[TakeFlow], rank: int) -> Iterator[Tie]:
    """Indexing keeps all axes but those that a step replaces by the axes of its index."""
    taken = {step.axis for step in steps}
    for axis in range(rank):
        places = [axis]
        for step in steps:
            places = [after for before in places for after in _after(step, before)]
        if places:
            via = f"positions of axis {axis} are taken" if axis in taken else f"axis {axis} is kept"
            yield Tie((*((steps[-1].target, place) for place in places), (steps[0].source, axis)), via)


def _after(step: TakeFlow, axis: int) -> list[int]:
    count = 1 if step.places is None else len(step.places)
    if axis < step.axis:
        return [axis]
    if axis == step.axis:
        return list(range(axis, axis + count))
    return [axis + count - 1]


def _reshape_ties(flow: ReshapeFlow) -> Iterator[Tie]:
    for source_axes, target_axes in reshape_blocks(flow.source_shape, flow.target_shape):
        left = [flow.source_shape[a] for a in source_axes if flow.source_shape[a] > 1]
        right = [flow.target_shape[a] for a in target_axes if flow.target_shape[a] > 1]
        if left and right:
            via = f"{_product(left)} -> {_product(right)}" if left != right else f"{left[0]} unchanged"
            # The side with fewer axes in the middle: parts of one axis meet in the whole.
            whole, parts = (target_axes, source_axes), (source_axes, target_axes)
            first, second = whole if len(right) <= len(left) else parts
            ends = (flow.target, flow.source) if first is target_axes else (flow.source, flow.target)
            yield Tie((*((ends[0], a) for a in first), *((ends[1], a) for a in second)), via)


def _product(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
