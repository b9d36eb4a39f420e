"""Reductions and scans along axes, and what picks or counts along an axis."""

from __future__ import annotations

from collections.abc import Callable

from graphprune.graph import Op
from graphprune.rules.registry import (
    Description,
    Refusal,
    has_input,
    known_data,
    normal_axis,
    register,
    shape_of,
)


def reduced_axes(op: Op) -> tuple[int, ...] | Refusal:
    """The axes that a Reduce op reduces, whichever way its opset version spells them."""
    rank = len(shape_of(op, 0))
    axes = op.attributes.get("axes")
    if axes is None and has_input(op, 1):
        data = known_data(op, 1)
        if data is None:
            return Refusal("the axes it reduces are computed at run time")
        axes = data.ravel().tolist()
    if not axes:
        return () if op.attributes.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(normal_axis(int(axis), rank) for axis in axes)


def reduction(mark: str) -> Callable[[Op], Description]:
    """A reduction over its axes; ``mark`` says what removal along a reduced axis means ('' means contraction)."""

    def describe(op: Op) -> Description:
        axes = reduced_axes(op)
        if isinstance(axes, Refusal):
            return axes
        rank = len(shape_of(op, 0))
        source = " ".join(f"x{i}{mark}" if i in axes else f"x{i}" for i in range(rank))
        keep = op.attributes.get("keepdims", 1)
        target = " ".join("1" if i in axes else f"x{i}" for i in range(rank) if keep or i not in axes)
        return f"{source}, ? -> {target}"

    return describe


def along(mark: str, default: int, *, outputs: int = 1) -> Callable[[Op], Description]:
    """All axes pass but the one that ``axis`` names, which bears ``mark``."""

    def describe(op: Op) -> Description:
        rank = len(shape_of(op, 0))
        axis = normal_axis(int(op.attributes.get("axis", default)), rank)
        term = " ".join(f"x{i}{mark}" if i == axis else f"x{i}" for i in range(rank))
        return f"{term} -> {', '.join([term] * outputs)}"

    return describe


def picked(op: Op) -> Description:
    """ArgMax, ArgMin: one position of the axis is named, by its number."""
    rank = len(shape_of(op, 0))
    axis = normal_axis(int(op.attributes.get("axis", 0)), rank)
    source = " ".join(f"x{i}!" if i == axis else f"x{i}" for i in range(rank))
    keep = op.attributes.get("keepdims", 1)
    target = " ".join("1" if i == axis else f"x{i}" for i in range(rank) if keep or i != axis)
    return f"{source} -> {target}"


def top_k(op: Op) -> Description:
    """The k greatest along an axis; which they are depends on the data."""
    rank = len(shape_of(op, 0))
    axis = normal_axis(int(op.attributes.get("axis", -1)), rank)
    source = " ".join(f"x{i}!" if i == axis else f"x{i}" for i in range(rank))
    target = " ".join("k!" if i == axis else f"x{i}" for i in range(rank))
    return f"{source}, ? -> {target}, {target}"


def cumulative(mark: str) -> Callable[[Op], Description]:
    """A running sum sees removed positions as zeros; a running product does not."""

    def describe(op: Op) -> Description:
        data = known_data(op, 1)
        if data is None:
            return Refusal("the axis it runs along is computed at run time")
        rank = len(shape_of(op, 0))
        axis = normal_axis(int(data.ravel()[0]), rank)
        source = " ".join(f"x{i}{mark}" if i == axis else f"x{i}" for i in range(rank))
        target = " ".join(f"x{i}" for i in range(rank))
        return f"{source}, ? -> {target}"

    return describe


def one_hot(op: Op) -> Description:
    """The new axis counts classes: nothing goes along it."""
    rank = len(shape_of(op, 0))
    axis = normal_axis(int(op.attributes.get("axis", -1)), rank + 1)
    factors = [f"x{i}" for i in range(rank)]
    return f"{' '.join(factors)}, ?, ? -> {' '.join([*factors[:axis], 'd!', *factors[axis:]])}"


def softmax(op: Op) -> Description:
    """Over one axis since opset 13; before, over all axes from ``axis`` on."""
    rank = len(shape_of(op, 0))
    if op.version >= 13:
        return along("~", -1)(op)
    axis = normal_axis(int(op.attributes.get("axis", 1)), rank)
    term = " ".join(f"x{i}~" if i >= axis else f"x{i}" for i in range(rank))
    return f"{term} -> {term}"


# Zeros add nothing to these, so removal equals masking.
register("ReduceSum ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum", reduction(""))
# To these a masked element is still an element.
register("ReduceMean ReduceMax ReduceMin ReduceProd ReduceLogSumExp", reduction("~"))
register("Softmax LogSoftmax", softmax)
register("Hardmax", along("!", -1))
register("ArgMax ArgMin", picked)
register("TopK", top_k)
register("CumSum", cumulative("^"))
register("CumProd", cumulative("!"))
register("OneHot", one_hot)
