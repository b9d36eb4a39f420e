"""Ops that move elements: labels make the same moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from graphprune.errors import PlanError
from graphprune.flow import ChainFlow, Flow, Operand, ReshapeFlow, TakeFlow
from graphprune.graph import Op
from graphprune.rules.elementwise import term
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

Index = npt.NDArray[np.int64]
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
    if not named and any(
        n == 1 != o for o, n in zip(change.old(_INPUT), change.new(_INPUT), strict=True)
    ):
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


def _take(source: Operand, target: Operand, axis: int, index: Sequence[int] | Index, size: int) -> TakeFlow:
    return TakeFlow(source, target, axis, np.asarray(index, dtype=np.int64), size)


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
        flows.append(_take(_OUTPUT, Operand(False, slot), axis, np.arange(start, start + size), whole[axis]))
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
        flows.append(_take(_INPUT, Operand(True, slot), axis, np.arange(start, start + size), whole[axis]))
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


def slice_ranges(op: Op) -> list[tuple[int, int, int, int]] | None:
    """(axis, start, stop, step) of a Slice, clamped as ONNX clamps them; None if computed at run time."""
    shape = shape_of(op, 0)
    if op.version < 10:
        starts, ends = op.attributes["starts"], op.attributes["ends"]
        axes, steps = op.attributes.get("axes", range(len(starts))), [1] * len(starts)
    else:
        data = [known_data(op, slot) if has_input(op, slot) else None for slot in (1, 2, 3, 4)]
        if any(has_input(op, slot) and data[slot - 1] is None for slot in (1, 2, 3, 4)):
            return None
        starts, ends = data[0].ravel().tolist(), data[1].ravel().tolist()  # type: ignore[union-attr]
        axes = range(len(starts)) if data[2] is None else data[2].ravel().tolist()
        steps = [1] * len(starts) if data[3] is None else data[3].ravel().tolist()
    ranges = []
    for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True):
        axis = normal_axis(int(axis), len(shape))
        ranges.append((axis, *slice(int(start), int(stop) if stop > -(2**62) else None, int(step)).indices(shape[axis])))
    return ranges


def blocked_axes(op: Op, moved: set[int]) -> str:
    """All axes pass but ``moved``, along which nothing may go."""
    rank = len(shape_of(op, 0))
    source = " ".join(f"x{i}!" if i in moved else f"x{i}" for i in range(rank))
    target = " ".join(f"y{i}!" if i in moved else f"x{i}" for i in range(rank))
    return f"{source}{', ?' * (len(op.inputs) - 1)} -> {target}"


def slice_(op: Op) -> Description:
    source, target = shape_of(op, 0), shape_of(op, 0, output=True)
    ranges = slice_ranges(op)
    if ranges is None:
        # Where it cuts depends on the input or on dynamic sizes; what keeps its size may pass all the same only if
        # the axis is not among those that it cuts, and which those are must be known.
        axes = known_data(op, 3) if has_input(op, 3) else None
        if axes is None:
            return Refusal("where it cuts is computed at run time")
        return blocked_axes(op, {normal_axis(int(a), len(source)) for a in axes.ravel()})
    moves = [(a, np.arange(start, stop, step)) for a, start, stop, step in ranges]
    moves = [(a, index) for a, index in moves if len(index) != source[a] or (index != np.arange(source[a])).any()]
    if not moves:
        return ReshapeFlow(_INPUT, _OUTPUT, source, target)
    return ChainFlow(tuple(_take(_INPUT, _OUTPUT, a, index, source[a]) for a, index in moves))


def ranks(change: Change, operand: Operand, axis: int) -> tuple[Index, npt.NDArray[np.bool_]]:
    """Where each position of an axis lies after pruning, and whether it is kept.

    Where the kept positions depend on other axes the ranks must not, at the places where they are used: the caller
    checks sizes; rows that vanish as a whole do not count.
    """
    mask = change.kept(operand)
    rows = np.moveaxis(mask, axis, -1).reshape(-1, mask.shape[axis])
    rows = rows[rows.any(axis=1)]
    if mask.shape[axis] == 1:
        size = change.old(operand)[axis]
        return np.arange(size), np.ones(size, dtype=bool)
    before = np.cumsum(rows, axis=1) - rows
    if len(rows) > 1 and (before != before[0]).any():
        return before, rows
    return before[0], rows[0]


def _prefix(change: Change, operand: Operand, axis: int, stop: int) -> int:
    """How many of the first ``stop`` positions of an axis are kept; the same in every row."""
    before, kept = ranks(change, operand, axis)
    counts = np.atleast_2d(before + kept)[:, stop - 1] if stop else np.zeros(1, dtype=np.int64)
    if (counts != counts[0]).any():
        raise PlanError(f"{change.op.name!r}: the rows of axis {axis} keep different numbers before {stop}")
    return int(counts[0])


def rewrite_slice(change: Change) -> None:
    """Ranges move to where their positions lie now; strided ones become a Gather of ranks."""
    ranges = slice_ranges(change.op)
    if ranges is None:
        return
    old, new = change.old(_INPUT), change.new(_INPUT)
    starts = [r[1] for r in ranges]
    stops = [r[2] for r in ranges]
    steps = [r[3] for r in ranges]
    changed = False
    for i, (axis, start, stop, step) in enumerate(ranges):
        if old[axis] == new[axis]:
            continue
        changed = True
        index = np.arange(start, stop, step)
        if len(index) == 0:
            starts[i], stops[i], steps[i] = 0, 0, 1
        elif step == 1:
            starts[i] = _prefix(change, _INPUT, axis, start)
            stops[i] = _prefix(change, _INPUT, axis, stop)
        else:
            before, kept = ranks(change, _INPUT, axis)
            if before.ndim > 1:
                raise PlanError(f"{change.op.name!r}: a strided Slice keeps different positions in different rows")
            change.gather_input(0, axis, before[index][kept[index]])
            starts[i], stops[i], steps[i] = 0, int(kept[index].sum()), 1
    if not changed:
        return
    if change.op.version < 10:
        change.set_attribute("starts", starts)
        change.set_attribute("ends", stops)
        return
    literal = change.op.inputs[1]
    dtype = literal.data.dtype if literal is not None and literal.data is not None else np.dtype(np.int64)
    stops = [stop if stop >= 0 else -(2**31) + 1 for stop in stops]
    change.set_input(1, np.asarray(starts, dtype=dtype))
    change.set_input(2, np.asarray(stops, dtype=dtype))
    change.set_input(3, np.asarray([r[0] for r in ranges], dtype=dtype))
    if any(step != 1 for step in steps) or has_input(change.op, 4):
        change.set_input(4, np.asarray(steps, dtype=dtype))


def gather(op: Op) -> Description:
    """By a literal index: a move. By computed indices: a look-up, which is a product with a one-hot matrix."""
    shape, index_shape = shape_of(op, 0), shape_of(op, 1)
    axis = normal_axis(int(op.attributes.get("axis", 0)), len(shape))
    index = known_data(op, 1)
    if index is not None and not (index < -shape[axis]).any():
        flat = np.where(index < 0, index + shape[axis], index).ravel().astype(np.int64)
        return TakeFlow(_INPUT, _OUTPUT, axis, flat, shape[axis], tuple(index_shape))
    lead = [f"x{i}" for i in range(axis)]
    rest = [f"x{i}" for i in range(axis + 1, len(shape))]
    places = [f"i{i}" for i in range(len(index_shape))]
    return f"{' '.join([*lead, 'v!', *rest])}, {' '.join(places)} -> {' '.join([*lead, *places, *rest])}"


def rewrite_gather(change: Change) -> None:
    """A literal index names ranks among what is kept, and loses the entries whose positions went."""
    index = change.known(1)
    if index is None:
        return
    op = change.op
    axis = normal_axis(int(op.attributes.get("axis", 0)), len(change.old(_INPUT)))
    new_places = change.new(_OUTPUT)[axis : axis + index.ndim]
    if change.old(_INPUT)[axis] == change.new(_INPUT)[axis] and new_places == index.shape:
        return
    size = change.old(_INPUT)[axis]
    flat = np.where(index < 0, index + size, index).ravel()
    before, kept = ranks(change, _INPUT, axis)
    if before.ndim > 1:
        if (index.size > 1) or len({int(row[flat[0]]) for row in before}) > 1:
            raise PlanError(f"{op.name!r}: its index would differ from row to row of axis {axis}")
        before, kept = before[0], kept[0]
    chosen = flat[kept[flat]]
    change.set_input(1, before[chosen].reshape(new_places).astype(index.dtype))


def _flat_positions(index: npt.NDArray[np.generic], size: int) -> Index:
    """A literal index along one axis, flat and non-negative."""
    flat = index.astype(np.int64).ravel()
    return np.where(flat < 0, flat + size, flat)


def _new_positions(change: Change, flat: Index, axis: int) -> Index:
    """Where the positions that a literal index names lie now; those that went are left out."""
    before, kept = ranks(change, _INPUT, axis)
    if before.ndim > 1:
        raise PlanError(f"{change.op.name!r}: its index would differ from row to row of axis {axis}")
    return before[flat[kept[flat]]]


def _same_everywhere(op: Op) -> npt.NDArray[np.generic] | None:
    """The index of a GatherElements that is literal and differs along its axis only; None otherwise."""
    data, index = shape_of(op, 0), known_data(op, 1)
    axis = normal_axis(int(op.attributes.get("axis", 0)), len(data))
    if index is None or index.size == 0:
        return None
    line = index[tuple(slice(None) if i == axis else slice(0, 1) for i in range(index.ndim))]
    same_sizes = all(index.shape[i] == data[i] for i in range(len(data)) if i != axis)
    return line.ravel() if same_sizes and bool((index == line).all()) else None


def gather_elements(op: Op) -> Description:
    """Along one axis by computed indices; the others pass where data and indices have equal size."""
    data, index = shape_of(op, 0), shape_of(op, 1)
    axis = normal_axis(int(op.attributes.get("axis", 0)), len(data))
    line = _same_everywhere(op)
    if line is not None:
        return _take(_INPUT, _OUTPUT, axis, _flat_positions(line, data[axis]), data[axis])
    source = ["v!" if i == axis else (f"x{i}" if data[i] == index[i] else f"w{i}!") for i in range(len(data))]
    target = ["i!" if i == axis else (f"x{i}" if data[i] == index[i] else f"y{i}!") for i in range(len(data))]
    return f"{' '.join(source)}, {' '.join(target)} -> {' '.join(target)}"


def rewrite_gather_elements(change: Change) -> None:
    line = _same_everywhere(change.op)
    if line is None or (change.old(_INPUT) == change.new(_INPUT) and change.old(_OUTPUT) == change.new(_OUTPUT)):
        return
    axis = normal_axis(int(change.op.attributes.get("axis", 0)), len(change.old(_INPUT)))
    flat = _new_positions(change, _flat_positions(line, change.old(_INPUT)[axis]), axis)
    shape = [-1 if i == axis else 1 for i in range(len(change.new(_OUTPUT)))]
    change.set_input(1, np.broadcast_to(flat.reshape(shape), change.new(_OUTPUT)).astype(line.dtype))


def scatter_elements(op: Op) -> str:
    """As GatherElements; what is written has the shape of the indices, the result that of the data."""
    data, index = shape_of(op, 0), shape_of(op, 1)
    axis = normal_axis(int(op.attributes.get("axis", 0)), len(data))
    source = ["v!" if i == axis else (f"x{i}" if data[i] == index[i] else f"w{i}!") for i in range(len(data))]
    update = ["i!" if i == axis else (f"x{i}" if data[i] == index[i] else f"y{i}!") for i in range(len(data))]
    return f"{' '.join(source)}, {' '.join(update)}, {' '.join(update)} -> {' '.join(source)}"


def _one_axis_index(op: Op) -> npt.NDArray[np.generic] | None:
    """The index of a GatherND or ScatterND that is literal and names positions of the first axis; None otherwise."""
    index = known_data(op, 1)
    plain = int(op.attributes.get("batch_dims", 0)) == 0 and shape_of(op, 1)[-1:] == (1,)
    return index if plain and index is not None and index.size else None


def gather_nd(op: Op) -> Description:
    """Leading axes are looked up, trailing ones pass."""
    data, index = shape_of(op, 0), shape_of(op, 1)
    literal = _one_axis_index(op)
    if literal is not None:
        return TakeFlow(_INPUT, _OUTPUT, 0, _flat_positions(literal, data[0]), data[0], index[:-1])
    batch, depth = int(op.attributes.get("batch_dims", 0)), index[-1]
    lead = [f"b{i}" for i in range(batch)]
    looked = [f"v{i}!" for i in range(depth)]
    rest = [f"x{i}" for i in range(batch + depth, len(data))]
    places = [f"i{i}" for i in range(batch, len(index) - 1)]
    return (
        f"{' '.join([*lead, *looked, *rest])}, {' '.join([*lead, *places, '_'])}"
        f" -> {' '.join([*lead, *places, *rest])}"
    )


def rewrite_gather_nd(change: Change) -> None:
    literal = _one_axis_index(change.op)
    if literal is None or (change.old(_INPUT) == change.new(_INPUT) and change.old(_OUTPUT) == change.new(_OUTPUT)):
        return
    flat = _new_positions(change, _flat_positions(literal, change.old(_INPUT)[0]), 0)
    places = change.new(_OUTPUT)[: literal.ndim - 1]
    change.set_input(1, flat.reshape(*places, 1).astype(literal.dtype))


def scatter_nd(op: Op) -> Description:
    """Where the index is computed its axes are blocked; where it is literal, what is written goes with its place."""
    data, index = shape_of(op, 0), shape_of(op, 1)
    literal = _one_axis_index(op)
    update = Operand(False, 2)
    if literal is not None and literal.ndim == 2:
        return [
            ReshapeFlow(_INPUT, _OUTPUT, data, data),
            _take(_OUTPUT, update, 0, _flat_positions(literal, data[0]), data[0]),
        ]
    depth = index[-1]
    looked = [f"v{i}!" for i in range(depth)]
    rest = [f"x{i}" for i in range(depth, len(data))]
    places = [f"i{i}!" for i in range(len(index) - 1)]
    whole = " ".join([*looked, *rest])
    return f"{whole}, {' '.join([*places, '_'])}, {' '.join([*places, *rest])} -> {whole}"


def rewrite_scatter_nd(change: Change) -> None:
    literal = _one_axis_index(change.op)
    if literal is None or literal.ndim != 2 or change.old(_INPUT) == change.new(_INPUT):
        return
    flat = _new_positions(change, _flat_positions(literal, change.old(_INPUT)[0]), 0)
    change.set_input(1, flat.reshape(-1, 1).astype(literal.dtype))


def tensor_scatter(op: Op) -> str:
    """A cache written along one axis."""
    rank = len(shape_of(op, 0))
    axis = normal_axis(int(op.attributes.get("axis", -2)), rank)
    cache = " ".join(f"x{i}!" if i == axis else f"x{i}" for i in range(rank))
    update = " ".join("u!" if i == axis else f"x{i}" for i in range(rank))
    return f"{cache}, {update}, x0 -> {cache}"


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
    return ChainFlow(tuple(_take(_INPUT, _OUTPUT, *move) for move in moves))


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
            begin[axis] = _prefix(change, _OUTPUT, axis, begin[axis])
            end[axis] = new[axis] - _prefix(change, _OUTPUT, axis, inner)
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
register("Slice", slice_, rewrite=rewrite_slice, layout=True)
register("Gather", gather, rewrite=rewrite_gather, layout=True)
register("GatherElements", gather_elements, rewrite=rewrite_gather_elements)
register("GatherND", gather_nd, rewrite=rewrite_gather_nd)
register("ScatterElements Scatter", scatter_elements)
register("ScatterND", scatter_nd, rewrite=rewrite_scatter_nd)
register("TensorScatter", tensor_scatter)
register("Pad", pad, rewrite=rewrite_pad)
register("Shape Size", shape_only, rewrite=restore_shape)
register("ReverseSequence", reverse_sequence)
register("Trilu", trilu)
