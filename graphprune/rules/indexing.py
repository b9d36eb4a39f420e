"""Ops that pick or place positions: an index that is literal is a move, one that is computed blocks its axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.axes.flow import ChainFlow, Operand, ReshapeFlow, TakeFlow
from graphprune.errors import PlanError
from graphprune.graph import Op
from graphprune.rules.movement import blocked_axes, take
from graphprune.rules.ranks import Index, prefix, ranks
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
        ranges.append(
            (axis, *slice(int(start), int(stop) if stop > -(2**62) else None, int(step)).indices(shape[axis]))
        )
    return ranges


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
    moves = [
        (a, index) for a, index in moves if len(index) != source[a] or (index != np.arange(source[a])).any()
    ]
    if not moves:
        return ReshapeFlow(_INPUT, _OUTPUT, source, target)
    return ChainFlow(tuple(take(_INPUT, _OUTPUT, a, index, source[a]) for a, index in moves))


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
            starts[i] = prefix(change, _INPUT, axis, start)
            stops[i] = prefix(change, _INPUT, axis, stop)
        else:
            before, kept = ranks(change, _INPUT, axis)
            if len(before) > 1:
                raise PlanError(
                    f"{change.op.name!r}: a strided Slice keeps different positions in different rows"
                )
            change.gather_input(0, axis, before[0, index][kept[0, index]])
            starts[i], stops[i], steps[i] = 0, int(kept[0, index].sum()), 1
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
        return TakeFlow(_INPUT, _OUTPUT, axis, flat, shape[axis], tuple(index_shape), literal=True)
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
    if len(before) > 1 and (index.size > 1 or len(np.unique(before[:, flat[0]])) > 1):
        raise PlanError(f"{op.name!r}: its index would differ from row to row of axis {axis}")
    chosen = flat[kept[0, flat]]
    change.set_input(1, before[0, chosen].reshape(new_places).astype(index.dtype))


def _flat_positions(index: npt.NDArray[Any], size: int) -> Index:
    """A literal index along one axis, flat and non-negative."""
    flat = index.astype(np.int64).ravel()
    return np.where(flat < 0, flat + size, flat)


def _new_positions(change: Change, flat: Index, axis: int) -> Index:
    """Where the positions that a literal index names lie now; those that went are left out."""
    before, kept = ranks(change, _INPUT, axis)
    if len(before) > 1:
        raise PlanError(f"{change.op.name!r}: its index would differ from row to row of axis {axis}")
    chosen: Index = before[0, flat[kept[0, flat]]]
    return chosen


def _same_everywhere(op: Op) -> npt.NDArray[Any] | None:
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
        return take(_INPUT, _OUTPUT, axis, _flat_positions(line, data[axis]), data[axis], literal=True)
    source = ["v!" if i == axis else (f"x{i}" if data[i] == index[i] else f"w{i}!") for i in range(len(data))]
    target = ["i!" if i == axis else (f"x{i}" if data[i] == index[i] else f"y{i}!") for i in range(len(data))]
    return f"{' '.join(source)}, {' '.join(target)} -> {' '.join(target)}"


def rewrite_gather_elements(change: Change) -> None:
    line = _same_everywhere(change.op)
    if line is None or (
        change.old(_INPUT) == change.new(_INPUT) and change.old(_OUTPUT) == change.new(_OUTPUT)
    ):
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


def _one_axis_index(op: Op) -> npt.NDArray[Any] | None:
    """The index of a GatherND or ScatterND that is literal and names positions of the first axis; None otherwise."""
    index = known_data(op, 1)
    plain = int(op.attributes.get("batch_dims", 0)) == 0 and shape_of(op, 1)[-1:] == (1,)
    return index if plain and index is not None and index.size else None


def gather_nd(op: Op) -> Description:
    """Leading axes are looked up, trailing ones pass."""
    data, index = shape_of(op, 0), shape_of(op, 1)
    literal = _one_axis_index(op)
    if literal is not None:
        return TakeFlow(
            _INPUT, _OUTPUT, 0, _flat_positions(literal, data[0]), data[0], index[:-1], literal=True
        )
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
    if literal is None or (
        change.old(_INPUT) == change.new(_INPUT) and change.old(_OUTPUT) == change.new(_OUTPUT)
    ):
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
            take(_OUTPUT, update, 0, _flat_positions(literal, data[0]), data[0], literal=True),
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


register("Slice", slice_, rewrite=rewrite_slice, layout=True)
register("Gather", gather, rewrite=rewrite_gather, layout=True)
register("GatherElements", gather_elements, rewrite=rewrite_gather_elements)
register("GatherND", gather_nd, rewrite=rewrite_gather_nd)
register("ScatterElements Scatter", scatter_elements)
register("ScatterND", scatter_nd, rewrite=rewrite_scatter_nd)
register("TensorScatter", tensor_scatter)
