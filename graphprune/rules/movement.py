"""Ops that move elements: labels make the same moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from graphprune.axes.flow import ChainFlow, Flow, Operand, ReshapeFlow, TakeFlow
from graphprune.errors import PlanError
from graphprune.graph import Op
from graphprune.rules.elementwise import term
from graphprune.rules.ranks import Index, prefix
from graphprune.rules.registry import (
    Change,
    Description,
    Refusal,
    has_input,
    known_data,
    normal_axis,
    register,
    shape_of,
)

_INPUT, _OUTPUT = Operand(False, 0), Operand(True, 0)


def resize_to(change: Change, slot: int, operand: Operand, axes: Sequence[int] | None = None) -> None:
    """Make the shape-like integer input at ``slot`` say an operand's new sizes (of ``axes``, by default all)."""
    old, new = list(change.old(operand)), list(change.new(operand))
    if axes is not None:
        old, new = [old[a] for a in axes], [new[a] for a in axes]
    if old == new:
        return
    literal = change.known(slot)
    if literal is None:
        change.scale_input(slot, new, old)
        return
    entries = literal.astype(np.int64).ravel().copy()
    offset = len(old) - len(entries)  # an Expand may name fewer axes than its output has
    for i in range(len(entries)):
        if old[offset + i] != new[offset + i] and entries[i] != -1 and (entries[i] > 1 or offset == 0):
            entries[i] = new[offset + i]
    if not np.array_equal(entries, literal.ravel()):
        change.set_input(slot, entries.astype(literal.dtype))


def reshape(op: Op) -> Description:
    if 0 in shape_of(op, 0):
        return Refusal("it has no elements")
    return ReshapeFlow(_INPUT, _OUTPUT, shape_of(op, 0), shape_of(op, 0, output=True))


def rewrite_reshape(change: Change) -> None:
    """A 0 copies the input's size at its place; where the sizes differ after pruning it is spelled out."""
    old, new = change.old(_OUTPUT), change.new(_OUTPUT)
    source = change.new(_INPUT)
    literal = change.known(1)
    if literal is None or old == new:
        if old != new:
            change.scale_input(1, new, old)
        return
    entries = literal.astype(np.int64).ravel().copy()
    for i, entry in enumerate(entries.tolist()):
        if entry == 0 and i < len(source) and source[i] == new[i]:
            continue
        if old[i] != new[i] and entry != -1:
            entries[i] = new[i]
    if not np.array_equal(entries, literal.ravel()):
        change.set_input(1, entries.astype(literal.dtype))


def rewrite_reshape_attribute(change: Change) -> None:
    """Before opset 5 the shape was an attribute."""
    if change.op.version >= 5:
        rewrite_reshape(change)
        return
    old, new, source = change.old(_OUTPUT), change.new(_OUTPUT), change.new(_INPUT)
    if old != new:
        entries = list(change.op.attributes["shape"])
        for i, entry in enumerate(entries):
            copied = entry == 0 and i < len(source) and source[i] == new[i]
            if old[i] != new[i] and entry != -1 and not copied:
                entries[i] = new[i]
        change.set_attribute("shape", entries)


def check_squeeze(change: Change) -> None:
    """A Squeeze that names no axes would take away an axis that shrank to one."""
    named = "axes" in change.op.attributes or has_input(change.op, 1)
    if not named and any(n == 1 != o for o, n in zip(change.old(_INPUT), change.new(_INPUT), strict=True)):
        raise PlanError(f"Squeeze {change.op.name!r} names no axes, and an axis of its input shrank to one")


def transpose(op: Op) -> str:
    rank = len(shape_of(op, 0))
    order = op.attributes.get("perm", list(range(rank))[::-1])
    return f"{' '.join(f'x{i}' for i in range(rank))} -> {' '.join(f'x{i}' for i in order)}"


def expand(op: Op) -> str:
    """Broadcasting to a literal shape."""
    whole = shape_of(op, 0, output=True)
    return f"{term(shape_of(op, 0), whole)}, ? -> {term(whole, whole)}"


def filled(op: Op) -> str:
    """A constant of a computed shape: any part of it may go."""
    whole = shape_of(op, 0, output=True)
    return f"? -> {term(whole, whole)}"


def tile(op: Op) -> str:
    """Repetition r of an axis x."""
    source, target = shape_of(op, 0), shape_of(op, 0, output=True)
    inputs, outputs = [], []
    for i, (old, new) in enumerate(zip(source, target, strict=True)):
        inputs.append("1" if old == 1 != new else f"x{i}")
        outputs.append(f"x{i}" if old in (1, new) else f"(r{i} x{i})")
    return f"{' '.join(inputs)}, ? -> {' '.join(outputs)}"


def rewrite_tile(change: Change) -> None:
    old = [t // s for s, t in zip(change.old(_INPUT), change.old(_OUTPUT), strict=True)]
    new = [t // s for s, t in zip(change.new(_INPUT), change.new(_OUTPUT), strict=True)]
    if old == new:
        return
    if change.known(1) is None:
        change.scale_input(1, new, old)
    else:
        change.set_input(1, np.asarray(new, dtype=np.int64))


def take(
    source: Operand,
    target: Operand,
    axis: int,
    index: Sequence[int] | Index,
    size: int,
    *,
    literal: bool = False,
) -> TakeFlow:
    """Indexing along one axis (see :class:`graphprune.axes.flow.TakeFlow`)."""
    return TakeFlow(source, target, axis, np.asarray(index, dtype=np.int64), size, literal=literal)


def concat(op: Op) -> Description:
    """Each input is a range of the output."""
    whole = shape_of(op, 0, output=True)
    axis = normal_axis(int(op.attributes.get("axis", 1)), len(whole))
    flows: list[Flow] = []
    start = 0
    for slot, tensor in enumerate(op.inputs):
        if tensor is None:
            continue
        size = shape_of(op, slot)[axis]
        flows.append(take(_OUTPUT, Operand(False, slot), axis, np.arange(start, start + size), whole[axis]))
        start += size
    return flows


def split(op: Op) -> Description:
    """Each output is a range of the input."""
    whole = shape_of(op, 0)
    axis = normal_axis(int(op.attributes.get("axis", 0)), len(whole))
    flows: list[Flow] = []
    start = 0
    for slot, tensor in enumerate(op.outputs):
        if tensor is None:
            return Refusal("one of its outputs has no name, so that its size is not known")
        size = shape_of(op, slot, output=True)[axis]
        flows.append(take(_INPUT, Operand(True, slot), axis, np.arange(start, start + size), whole[axis]))
        start += size
    return flows


def rewrite_split(change: Change) -> None:
    axis = normal_axis(int(change.op.attributes.get("axis", 0)), len(change.old(_INPUT)))
    outputs = [Operand(True, slot) for slot in range(len(change.op.outputs))]
    old = [change.old(o)[axis] for o in outputs]
    new = [change.new(o)[axis] for o in outputs]
    if old == new:
        return
    if change.op.version < 13:
        change.set_attribute("split", new)
        return
    if has_input(change.op, 1) and change.known(1) is None:
        change.scale_input(1, new, old)
        return
    change.remove_attribute("num_outputs")
    change.set_input(1, np.asarray(new, dtype=np.int64))


def blocked_axes(op: Op, moved: set[int]) -> str:
    """All axes pass but ``moved``, along which nothing may go."""
    rank = len(shape_of(op, 0))
    source = " ".join(f"x{i}!" if i in moved else f"x{i}" for i in range(rank))
    target = " ".join(f"y{i}!" if i in moved else f"x{i}" for i in range(rank))
    return f"{source}{', ?' * (len(op.inputs) - 1)} -> {target}"


def pad_amounts(op: Op) -> tuple[list[int], list[int]] | None:
    """Begin and end amounts of every axis; None if computed at run time."""
    rank = len(shape_of(op, 0))
    if op.version < 11:
        pads = list(op.attributes.get("pads", op.attributes.get("paddings", [])))
    else:
        data = known_data(op, 1)
        if data is None:
            return None
        pads = data.ravel().tolist()
    begin, end = [0] * rank, [0] * rank
    axes = known_data(op, 3) if has_input(op, 3) else None
    named = [normal_axis(int(a), rank) for a in axes.ravel()] if axes is not None else list(range(rank))
    for i, axis in enumerate(named):
        begin[axis], end[axis] = int(pads[i]), int(pads[i + len(named)])
    return begin, end


def pad(op: Op) -> Description:
    """Constant padding along an axis: positions that no input fills. Other modes repeat positions: blocked."""
    shape = shape_of(op, 0)
    amounts = pad_amounts(op)
    if amounts is None:
        source, target = shape, shape_of(op, 0, output=True)
        # Amounts computed at run time are zero where the sizes agree only by accident: trust dynamic sizes alone.
        if has_input(op, 3) or source == target:
            return Refusal("how much it pads is computed at run time")
        return blocked_axes(op, {i for i, (s, t) in enumerate(zip(source, target, strict=True)) if s != t})
    begin, end = amounts
    padded = [i for i in range(len(shape)) if begin[i] or end[i]]
    if str(op.attributes.get("mode", "constant")) != "constant" or any(
        begin[i] < 0 or end[i] < 0 for i in padded
    ):
        return blocked_axes(op, set(padded))
    moves = tuple(
        (i, np.concatenate([np.full(begin[i], -1), np.arange(shape[i]), np.full(end[i], -1)]), shape[i])
        for i in padded
    )
    if not moves:
        return ReshapeFlow(_INPUT, _OUTPUT, shape, shape)
    return ChainFlow(tuple(take(_INPUT, _OUTPUT, *move) for move in moves))


def rewrite_pad(change: Change) -> None:
    """Amounts shrink with what they are later added to (ResNet's option A)."""
    amounts = pad_amounts(change.op)
    old, new = change.old(_OUTPUT), change.new(_OUTPUT)
    if amounts is None or old == new:
        return
    begin, end = list(amounts[0]), list(amounts[1])
    for axis in range(len(old)):
        if old[axis] != new[axis] and (begin[axis] or end[axis]):
            inner = old[axis] - amounts[1][axis]
            begin[axis] = prefix(change, _OUTPUT, axis, begin[axis])
            end[axis] = new[axis] - prefix(change, _OUTPUT, axis, inner)
    if (begin, end) == amounts:
        return
    if change.op.version < 11:
        change.set_attribute("pads", begin + end)
        return
    axes = change.known(3) if has_input(change.op, 3) else None
    named = [normal_axis(int(a), len(old)) for a in axes.ravel()] if axes is not None else range(len(old))
    change.set_input(1, np.asarray([begin[a] for a in named] + [end[a] for a in named], dtype=np.int64))


def shape_only(op: Op) -> str:
    """Shape and Size read no element."""
    return "S* -> ?"


def restore_shape(change: Change) -> None:
    """Whoever computes with sizes goes on to compute with the original ones (an attention scale among them)."""
    old, new = change.old(_INPUT), change.new(_INPUT)
    if old == new:
        return
    if change.op.op_type == "Size":
        change.restore_output(0, [int(np.prod(new))], [int(np.prod(old))])
        return
    start, end = int(change.op.attributes.get("start", 0)), change.op.attributes.get("end")
    part = slice(start, None if end is None else int(end))
    change.restore_output(0, new[part], old[part])


def reverse_sequence(op: Op) -> str:
    rank = len(shape_of(op, 0))
    time, batch = int(op.attributes.get("time_axis", 0)), int(op.attributes.get("batch_axis", 1))
    marks = {time: "!", batch: "="}
    text = " ".join(f"x{i}{marks.get(i, '')}" for i in range(rank))
    return f"{text}, ? -> {text}"


def trilu(op: Op) -> str:
    rank = len(shape_of(op, 0))
    text = " ".join(f"x{i}!" if i >= rank - 2 else f"x{i}" for i in range(rank))
    return f"{text}, ? -> {text}"


def _resize_output(slot: int) -> Callable[[Change], None]:
    return lambda change: resize_to(change, slot, _OUTPUT)


register("Reshape", reshape, rewrite=rewrite_reshape_attribute, layout=True)
register("Flatten Unsqueeze", reshape, layout=True)
register("Squeeze", reshape, rewrite=check_squeeze, layout=True)
register("Transpose", transpose, layout=True)
register("Expand", expand, rewrite=_resize_output(1), layout=True)
register("ConstantOfShape", filled, rewrite=_resize_output(0))
register("Tile", tile, rewrite=rewrite_tile, layout=True)
register("Concat", concat, layout=True)
register("Split", split, rewrite=rewrite_split, layout=True)
register("Pad", pad, rewrite=rewrite_pad)
register("Shape Size", shape_only, rewrite=restore_shape)
register("ReverseSequence", reverse_sequence)
register("Trilu", trilu)
