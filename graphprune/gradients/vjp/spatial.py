"""Pooling and resizing."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from graphprune.gradients.vjp.contraction import Window, window_of
from graphprune.gradients.vjp.emit import Array, NoGradientError, Value
from graphprune.gradients.vjp.site import Adjoints, Site, vjp
from graphprune.graph import Op, Tensor
from graphprune.graph.evaluate import run_onnxruntime


def _fitted(s: Site) -> Window:
    """The pool's window with padding behind each axis as its output needs it: rounding up adds, down takes away."""
    inside, outside = s.shape()[2:], s.y().shape[2:]
    w = window_of(s, s.attribute("kernel_shape"), inside, outside)
    ends = tuple(
        (o - 1) * t + r + 1 - i - b
        for i, o, t, r, b in zip(inside, outside, w.strides, w.reach, w.begins, strict=True)
    )
    return Window(w.kernel, w.strides, w.dilations, w.begins, ends)


def _layout(w: Window, group: int = 1) -> dict[str, Any]:
    return {
        "kernel_shape": list(w.kernel),
        "strides": list(w.strides),
        "dilations": list(w.dilations),
        "pads": [*w.begins, *(max(0, end) for end in w.ends)],
        "group": group,
    }


def _gathered(s: Site, g: Value, kernels: Array, w: Window) -> Value:
    """Carry ``(n c, filters, *outside)`` back to the input's space and shape."""
    shape = s.shape()
    used = [i + min(0, end) for i, end in zip(shape[2:], w.ends, strict=True)]
    made = s.e.op("ConvTranspose", [g, s.e.lift(kernels)], (g.shape[0], 1, *used), **_layout(w))
    for axis, (size, short) in enumerate(zip(shape[2:], used, strict=True), 2):
        made = made.pad(axis, 0, size - short)
    return made.reshape(shape)


def _cells(w: Window, inside: tuple[int, ...], outside: tuple[int, ...]) -> Array:
    """How many positions of the input each window covers."""
    total = np.ones(())
    for axis, (i, o) in enumerate(zip(inside, outside, strict=True)):
        first = np.arange(o)[:, None] * w.strides[axis] - w.begins[axis]
        at = first + np.arange(w.kernel[axis]) * w.dilations[axis]
        total = np.multiply.outer(total, ((at >= 0) & (at < i)).sum(axis=1))
    return total


@vjp("AveragePool")
def _average_pool(s: Site) -> Adjoints:
    w = _fitted(s)
    shape, outside = s.shape(), s.y().shape[2:]
    cells = _cells(w, shape[2:], outside)
    # What the runtime divides by, padding counted or not, follows from the mean that it finds of ones.
    source = Tensor("x", None, (1, 1, *shape[2:]))
    ones = np.ones((1, 1, *shape[2:]), dtype=np.float32)
    op = Op("AveragePool", "", s.op.version, s.op.attributes, [source], [source])
    (means,) = run_onnxruntime(op, [ones])
    divisor = np.rint(cells / np.maximum(np.asarray(means, dtype=np.float64)[0, 0], 1e-9))
    share = s.g * (1.0 / np.maximum(divisor, 1))
    flat = share.reshape((prod(shape[:2]), 1, *outside))
    return {0: _gathered(s, flat, np.ones((1, 1, *w.kernel)), w)}


@vjp("MaxPool")
def _max_pool(s: Site) -> Adjoints:
    shape, out = s.shape(), s.y().shape
    w = _fitted(s)
    apart = all(t >= r + 1 for t, r in zip(w.strides, w.reach, strict=True))
    if s.e.opset >= 16 or (apart and s.e.opset >= 11):
        kept = {n: v for n, v in s.op.attributes.items() if n != "storage_order"}
        _, index = s.e.ops("MaxPool", [s.x()], [out, out], **kept)
        extra: dict[str, Any] = {} if apart else {"reduction": "add"}
        flat = s.e.zeros((prod(shape),))
        inputs = [flat, index.reshape((prod(out),)), s.g.reshape((prod(out),))]
        return {0: s.e.op("ScatterElements", inputs, flat.shape, axis=0, **extra).reshape(shape)}
    # Scattering sums came with opset 16. Before: one filter for each position of the window.
    count = prod(w.kernel)
    filters = np.eye(count).reshape(count, 1, *w.kernel)
    x = s.x().reshape((prod(shape[:2]), 1, *shape[2:]))
    for axis, end in enumerate(w.ends, 2):
        x = x.slice(axis, 0, x.shape[axis] + min(0, end))
    kernels, outside = s.e.lift(filters), out[2:]
    seen = s.e.op("Conv", [x, kernels], (x.shape[0], count, *outside), **_layout(w))
    inside = s.e.op(
        "Conv", [s.e.lift(np.ones((1, 1, *x.shape[2:]))), kernels], (1, count, *outside), **_layout(w)
    )
    hit = seen.equals(s.y().reshape((x.shape[0], 1, *outside))).cast() * inside
    share = hit * (s.g.reshape((x.shape[0], 1, *outside)) / hit.sum([1]))
    return {0: _gathered(s, share, filters, w)}


# -- resizing -------------------------------------------------------------------------------------------------------


def _matrix(s: Site, axis: int) -> Array:
    """What the op does along one axis, as a matrix ``[old, new]``: its results for unit vectors."""
    shape, out = s.shape(), s.y().shape
    rank, size = len(shape), shape[axis]
    batch = 0 if axis else 1
    # Unit vectors lie along an axis that is not resized; the others have size 1.
    probe = [size if a in (axis, batch) else 1 for a in range(rank)]
    wanted = [out[axis] if a == axis else size if a == batch else 1 for a in range(rank)]
    eye = np.eye(size, dtype=np.float32).reshape(probe)
    attributes = {
        n: v for n, v in s.op.attributes.items() if n not in ("axes", "keep_aspect_ratio_policy", "scales")
    }
    scales = _scales(s)
    # Before version 13 inputs that are not used are empty rather than missing.
    empty = np.zeros(0, dtype=np.float32) if s.op.version < 13 else None
    inputs: list[Array | None] = [eye]
    if scales is not None:
        factors = np.asarray([scales[a] if a == axis else 1 for a in range(rank)], dtype=np.float32)
        inputs += [factors] if s.op.op_type == "Upsample" or s.op.version < 11 else [empty, factors]
    else:
        inputs += [empty, empty, np.asarray(wanted, dtype=np.int64)]
    tensors: list[Tensor | None] = [
        None if a is None else Tensor(f"i{k}", None, a.shape) for k, a in enumerate(inputs)
    ]
    result = Tensor("o0", None, tuple(wanted))
    op = Op(s.op.op_type, "", s.op.version, attributes, tensors, [result])
    (made,) = run_onnxruntime(op, inputs)
    matrix = np.asarray(made).reshape([wanted[a] for a in sorted((axis, batch))])
    return matrix if batch < axis else matrix.T


def _scales(s: Site) -> Array | None:
    """Scales for all axes; None where the op is given sizes."""
    if s.op.op_type == "Upsample" and s.op.version < 9:
        raise NoGradientError("its version is below 9: convert the model to a newer opset")
    scales = s.literal(1 if s.op.version < 11 or s.op.op_type == "Upsample" else 2)
    if scales is None or not scales.size:
        return None
    axes = s.attribute("axes")
    if axes is None:
        return scales
    whole = np.ones(len(s.shape()), dtype=np.float32)
    whole[[a % len(whole) for a in axes]] = scales
    return whole


@vjp("Resize Upsample")
def _resize(s: Site) -> Adjoints:
    """Every mode is linear and separable: along each axis the adjoint is multiplied by that axis' matrix."""
    mode = s.attribute("coordinate_transformation_mode", "half_pixel")
    if mode in ("tf_crop_and_resize", b"tf_crop_and_resize"):
        raise NoGradientError("it crops")
    g = s.g
    for axis, (old, new) in enumerate(zip(s.shape(), s.y().shape, strict=True)):
        if old == new == 1:
            continue
        matrix = _matrix(s, axis) if old != new else None
        if matrix is None:
            continue
        last = [a for a in range(g.rank) if a != axis] + [axis]
        moved = g.transpose(last)
        made = moved.reshape((prod(moved.shape[:-1]), new)).matmul(s.e.lift(matrix.T.astype(np.float64)))
        g = made.reshape((*moved.shape[:-1], old)).transpose([last.index(a) for a in range(g.rank)])
    return {0: g}
