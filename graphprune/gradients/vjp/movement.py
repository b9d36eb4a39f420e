"""Ops that move elements: reshaping, permuting, taking, joining, repeating."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.gradients.vjp.emit import Array, Emitter, NoGradientError, Shape, Value
from graphprune.gradients.vjp.site import Adjoints, Site, vjp

#: Repeated positions are summed by so many Gathers at most; by a product with a 0-1 matrix above.
MAX_GATHERS = 8


def put(g: Value, index: npt.NDArray[np.int64], size: int, axis: int) -> Value:
    """The adjoint of ``take(index, axis)`` of an axis of ``size`` positions: positions taken several times are summed.

    -1 in the index is a position that no source position filled.
    """
    used = index >= 0
    if not used.any():
        return g.emitter.zeros((*g.shape[:axis], size, *g.shape[axis + 1 :]))
    if not used.all():
        g, index = _some(g, np.flatnonzero(used), axis), index[used]
    if (np.diff(index) == 1).all():
        return g.pad(axis, int(index[0]), size - int(index[-1]) - 1)
    repeats = np.bincount(index, minlength=size)
    if repeats.max() > MAX_GATHERS:
        return _product(g, np.equal.outer(index, np.arange(size)), axis)
    # Row k of the table says where the k-th use of each source position stands; a zero stands behind the end.
    table = np.full((repeats.max(), size), len(index))
    order = np.argsort(index, kind="stable")
    starts = np.cumsum(repeats) - repeats
    table[np.arange(len(index)) - starts[index[order]], index[order]] = order
    if (table == len(index)).any():
        g = g.pad(axis, 0, 1)
    return g.emitter.total([g.take(row, axis) for row in table])


def _some(g: Value, positions: npt.NDArray[np.int64], axis: int) -> Value:
    if (np.diff(positions) == 1).all():
        return g.slice(axis, int(positions[0]), int(positions[-1]) + 1)
    return g.take(positions, axis)


def _product(g: Value, matrix: Array, axis: int) -> Value:
    """Multiply an axis by a matrix ``[old, new]``."""
    last = [a for a in range(g.rank) if a != axis] + [axis]
    moved = g.transpose(last)
    flat = moved.reshape((-1 if 0 in moved.shape else prod(moved.shape[:-1]), moved.shape[-1]))
    made = flat.matmul(g.emitter.lift(matrix.astype(np.float64)))
    back = [last.index(a) for a in range(g.rank)]
    return made.reshape((*moved.shape[:-1], matrix.shape[1])).transpose(back)


@vjp("Reshape Flatten Squeeze Unsqueeze")
def _reshape(s: Site) -> Adjoints:
    return {0: s.g.reshape(s.shape())}


@vjp("Transpose")
def _transpose(s: Site) -> Adjoints:
    perm = s.attribute("perm") or list(range(len(s.shape())))[::-1]
    return {0: s.g.transpose(np.argsort(perm).tolist())}


@vjp("Expand")
def _expand(s: Site) -> Adjoints:
    return {0: s.g.unbroadcast(s.shape())}


@vjp("Concat")
def _concat(s: Site) -> Adjoints:
    axis = s.axis(1)
    stops = np.cumsum([s.shape(slot)[axis] for slot in range(len(s.op.inputs))])
    return {
        slot: s.g.slice(axis, int(stops[slot] - s.shape(slot)[axis]), int(stops[slot])) for slot in s.wanted
    }


@vjp("Split")
def _split(s: Site) -> Adjoints:
    parts = [
        s.e.zeros(s.y(slot).shape) if grad is None else grad
        for slot, grad in enumerate(s.grads)
        if s.op.outputs[slot] is not None
    ]
    if len(parts) != len(s.op.outputs):
        raise NoGradientError("an output has no name")
    return {0: s.e.concat(parts, s.axis(0))}


@vjp("Slice")
def _slice(s: Site) -> Adjoints:
    shape = s.shape()
    starts, ends = s.integers(1, "starts"), s.integers(2, "ends")
    if starts is None or ends is None:
        raise NoGradientError("its bounds are missing")
    axes = s.integers(3, "axes") or list(range(len(starts)))
    steps = s.integers(4) or [1] * len(starts)
    # Undone from the last to the first: each sees the sizes that it made.
    g = s.g
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis %= len(shape)
        index = np.arange(shape[axis], dtype=np.int64)[
            slice(start, None if step < 0 and end < -shape[axis] else end, step)
        ]
        g = put(g, index, shape[axis], axis)
    return {0: g}


@vjp("Gather")
def _gather(s: Site) -> Adjoints:
    axis, shape = s.axis(0), s.shape()
    source = s.tensor(1)
    places = s.shape(1)
    g = s.g.reshape((*shape[:axis], prod(places), *shape[axis + 1 :]))
    if source is not None and (source.constant or source.data is not None):
        index = np.asarray(s.literal(1), dtype=np.int64).ravel()
        return {0: put(g, np.where(index < 0, index + shape[axis], index), shape[axis], axis)}
    # The index is known at run time only: a product with its 0-1 matrix.
    depth = s.e.literal(np.asarray(shape[axis], dtype=np.int64))
    hot = s.e.op(
        "OneHot",
        [s.x(1).reshape([prod(places)]), depth, s.e.lift(np.array([0.0, 1.0]))],
        (prod(places), shape[axis]),
    )
    first = [axis, *(a for a in range(g.rank) if a != axis)]
    moved = g.transpose(first)
    made = hot.transpose([1, 0]).matmul(moved.reshape((moved.shape[0], prod(moved.shape[1:]))))
    back = [first.index(a) for a in range(g.rank)]
    return {0: made.reshape((shape[axis], *moved.shape[1:])).transpose(back)}


def scatter_sum(e: Emitter, shape: Shape, index: Value, g: Value, axis: int) -> Value:
    """Zeros of ``shape`` to which elements are added at ``index`` along an axis."""
    if e.opset < 16:
        raise NoGradientError("scattering sums needs opset 16: convert the model to opset 16 or newer")
    return e.op("ScatterElements", [e.zeros(shape), index, g], shape, axis=axis, reduction="add")


@vjp("GatherElements")
def _gather_elements(s: Site) -> Adjoints:
    return {0: scatter_sum(s.e, s.shape(), s.x(1), s.g, s.axis(0))}


@vjp("GatherND")
def _gather_nd(s: Site) -> Adjoints:
    if s.attribute("batch_dims", 0):
        raise NoGradientError("batch_dims is not 0")
    if s.e.opset < 16:
        raise NoGradientError("scattering sums needs opset 16: convert the model to opset 16 or newer")
    return {0: s.e.op("ScatterND", [s.e.zeros(s.shape()), s.x(1), s.g], s.shape(), reduction="add")}


@vjp("ScatterElements ScatterND")
def _scatter(s: Site) -> Adjoints:
    if s.attribute("reduction", "none") not in ("none", b"none"):
        raise NoGradientError("its reduction is not 'none'")
    nd = s.op.op_type == "ScatterND"
    extra: dict[str, Any] = {} if nd else {"axis": s.axis(0)}
    found = {}
    if s.wants(0):
        found[0] = s.e.op(s.op.op_type, [s.g, s.x(1), s.e.zeros(s.shape(2))], s.shape(), **extra)
    if s.wants(2):
        found[2] = s.e.op("GatherND" if nd else "GatherElements", [s.g, s.x(1)], s.shape(2), **extra)
    return found


@vjp("Pad")
def _pad(s: Site) -> Adjoints:
    shape = s.shape()
    pads = s.integers(1, "pads") or []
    axes = s.integers(3) if s.has(3) else None
    axes = [a % len(shape) for a in axes] if axes is not None else list(range(len(shape)))
    mode = s.attribute("mode", "constant")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    g = s.g
    for position, axis in enumerate(axes):
        before, after = pads[position], pads[position + len(axes)]
        if before or after:
            g = put(g, _padded(shape[axis], before, after, mode), shape[axis], axis)
    return {0: g}


def _padded(size: int, before: int, after: int, mode: str) -> npt.NDArray[np.int64]:
    """Which source position stands at each position of a padded axis; -1 where none does."""
    index = np.arange(-before, size + after, dtype=np.int64)
    inside = (index >= 0) & (index < size)
    if mode == "constant":
        return np.where(inside, index, -1)
    if mode == "edge":
        return np.clip(index, 0, size - 1)
    if mode == "wrap":
        return index % size
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        folded = index % period
        return np.where(folded >= size, period - folded, folded)
    raise NoGradientError(f"its mode is {mode!r}")


@vjp("Tile")
def _tile(s: Site) -> Adjoints:
    shape = s.shape()
    repeats = s.integers(1) or []
    split = [n for pair in zip(repeats, shape, strict=True) for n in pair]
    return {0: s.g.reshape(split).sum(range(0, 2 * len(shape), 2), keepdims=False)}


def blocks(value: Value, size: int, mode: str, *, to_space: bool) -> Value:
    """DepthToSpace or SpaceToDepth of an (n, c, h, w) value."""
    n, c, h, w = value.shape
    b = size
    if to_space:
        deep = c // (b * b)
        if mode == "CRD":
            return (
                value.reshape((n, deep, b, b, h, w))
                .transpose([0, 1, 4, 2, 5, 3])
                .reshape((n, deep, h * b, w * b))
            )
        return (
            value.reshape((n, b, b, deep, h, w))
            .transpose([0, 3, 4, 1, 5, 2])
            .reshape((n, deep, h * b, w * b))
        )
    apart = value.reshape((n, c, h // b, b, w // b, b))
    perm = [0, 1, 3, 5, 2, 4] if mode == "CRD" else [0, 3, 5, 1, 2, 4]
    return apart.transpose(perm).reshape((n, c * b * b, h // b, w // b))


@vjp("DepthToSpace SpaceToDepth")
def _depth_to_space(s: Site) -> Adjoints:
    mode = s.attribute("mode", "DCR")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    size = int(s.attribute("blocksize"))
    return {0: blocks(s.g, size, mode, to_space=s.op.op_type == "SpaceToDepth")}


@vjp("CumSum")
def _cumsum(s: Site) -> Adjoints:
    back = 1 - int(s.attribute("reverse", 0))
    exclusive = int(s.attribute("exclusive", 0))
    return {0: s.e.op("CumSum", [s.g, s.x(1)], s.shape(), reverse=back, exclusive=exclusive)}


@vjp("Trilu")
def _trilu(s: Site) -> Adjoints:
    inputs = [s.g, s.x(1)] if s.has(1) else [s.g]
    return {0: s.e.op("Trilu", inputs, s.shape(), upper=int(s.attribute("upper", 1)))}


@vjp("TopK")
def _top_k(s: Site) -> Adjoints:
    return {0: scatter_sum(s.e, s.shape(), s.y(1), s.g, s.axis(-1))}
