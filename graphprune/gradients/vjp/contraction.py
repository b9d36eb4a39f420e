"""Matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from graphprune.gradients.vjp.emit import NoGradientError, Value
from graphprune.gradients.vjp.site import Adjoints, Site, vjp


@vjp("MatMul com.microsoft::FusedMatMul")
def _matmul(s: Site) -> Adjoints:
    fused = s.op.op_type == "FusedMatMul"
    if fused and (s.attribute("transBatchA", 0) or s.attribute("transBatchB", 0)):
        raise NoGradientError("it transposes batch axes")
    left, right, g = s.x(0), s.x(1), s.g
    if fused:
        g = g * float(s.attribute("alpha", 1.0))
        left = left.swapped() if s.attribute("transA", 0) else left
        right = right.swapped() if s.attribute("transB", 0) else right
    a = left.reshape((1, *left.shape)) if left.rank == 1 else left
    b = right.reshape((*right.shape, 1)) if right.rank == 1 else right
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    g = g.reshape((*lead, a.shape[-2], b.shape[-1]))
    found = {}
    if s.wants(0):
        back = g.matmul(b.swapped()).unbroadcast(a.shape).reshape(left.shape)
        found[0] = back.swapped() if fused and s.attribute("transA", 0) else back
    if s.wants(1):
        if b.rank == 2 and a.rank > 2:  # one product over all rows, rather than one for each batch
            rows = prod(a.shape[:-1])
            back = a.reshape((rows, a.shape[-1])).transpose([1, 0]).matmul(g.reshape((rows, g.shape[-1])))
        else:
            back = a.swapped().matmul(g).unbroadcast(b.shape)
        back = back.reshape(right.shape)
        found[1] = back.swapped() if fused and s.attribute("transB", 0) else back
    return found


@vjp("Gemm com.microsoft::FusedGemm")
def _gemm(s: Site) -> Adjoints:
    if s.op.op_type == "FusedGemm":
        raise NoGradientError("an activation is fused into it: export the model without fusions")
    a, b = s.x(0), s.x(1)
    by_a, by_b = bool(s.attribute("transA", 0)), bool(s.attribute("transB", 0))
    alpha, beta = float(s.attribute("alpha", 1.0)), float(s.attribute("beta", 1.0))
    g = s.g * alpha if alpha != 1 else s.g
    found = {}
    if s.wants(0):
        back = g.matmul(b if by_b else b.swapped())
        found[0] = back.swapped() if by_a else back
    if s.wants(1):
        back = (a if by_a else a.swapped()).matmul(g)
        found[1] = back.swapped() if by_b else back
    if s.wants(2):
        found[2] = (s.g * beta if beta != 1 else s.g).unbroadcast(s.shape(2))
    return found


@vjp("Einsum")
def _einsum(s: Site) -> Adjoints:
    text = s.attribute("equation")
    text = (text.decode() if isinstance(text, bytes) else str(text)).replace(" ", "")
    if "." in text:
        raise NoGradientError("its equation has an ellipsis")
    left, arrow, result = text.partition("->")
    terms = left.split(",")
    if not arrow:
        result = "".join(sorted(c for c in set(left) if c != "," and left.count(c) == 1))
    sizes = {c: n for slot, term in enumerate(terms) for c, n in zip(term, s.shape(slot), strict=True)}
    found = {}
    for slot in s.wanted:
        term = terms[slot]
        if len(set(term)) != len(term):
            raise NoGradientError("its equation takes a diagonal")
        others = [i for i in range(len(terms)) if i != slot]
        reached = set(result).union(*(terms[i] for i in others))
        kept = "".join(c for c in term if c in reached)
        equation = ",".join([result, *(terms[i] for i in others)]) + "->" + kept
        shape = tuple(sizes[c] for c in kept)
        made = s.e.op("Einsum", [s.g, *(s.x(i) for i in others)], shape, equation=equation)
        whole = made.reshape([sizes[c] if c in reached else 1 for c in term])
        found[slot] = whole.expand([sizes[c] for c in term])
    return found


# -- convolutions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """How a kernel moves over space.

    Attributes:
        kernel, strides, dilations: One number an axis.
        begins, ends: Zeros before and behind each axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def reach(self) -> tuple[int, ...]:
        """Positions from the first to the last that the kernel touches at once, less one."""
        return tuple(d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True))


def window_of(s: Site, kernel: Sequence[int], inside: Sequence[int], outside: Sequence[int]) -> Window:
    """The window of an op that takes space ``inside`` to ``outside``, automatic padding worked out."""
    rank = len(kernel)
    strides = tuple(s.attribute("strides") or [1] * rank)
    dilations = tuple(s.attribute("dilations") or [1] * rank)
    mode = s.attribute("auto_pad", "NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode in ("NOTSET", ""):
        pads = list(s.attribute("pads") or [0] * (2 * rank))
    elif mode == "VALID":
        pads = [0] * (2 * rank)
    else:
        before, after = [], []
        for k, d, t, i, o in zip(kernel, dilations, strides, inside, outside, strict=True):
            whole = max((o - 1) * t + d * (k - 1) + 1 - i, 0)
            small, large = whole // 2, whole - whole // 2
            before.append(small if mode == "SAME_UPPER" else large)
            after.append(large if mode == "SAME_UPPER" else small)
        pads = before + after
    return Window(tuple(kernel), strides, dilations, tuple(pads[:rank]), tuple(pads[rank:]))


def _attributes(w: Window, group: int) -> dict[str, Any]:
    return {
        "kernel_shape": list(w.kernel),
        "strides": list(w.strides),
        "dilations": list(w.dilations),
        "pads": [*w.begins, *w.ends],
        "group": group,
    }


def _flipped(weight: Value, group: int) -> Value:
    """(g k) c R -> (g c) k R, each kernel axis reversed."""
    filters, c, *kernel = weight.shape
    k = filters // group
    split = weight.reshape((group, k, c, *kernel)).transpose([0, 2, 1, *range(3, 3 + len(kernel))])
    value = split.reshape((group * c, k, *kernel))
    for axis, size in enumerate(kernel, 2):
        if size > 1:
            value = value.take(np.arange(size)[::-1], axis)
    return value


def spread(g: Value, weight: Value, w: Window, group: int, inside: Sequence[int]) -> Value:
    """The adjoint of a convolution's input: ``g`` carried back through the kernel to space ``inside``.

    Args:
        g: ``(n, g k, *outside)``.
        weight: ``(g k, c, *kernel)``.
        w: The convolution's window.
        group: Number of groups.
        inside: Space of the convolution's input.
    """
    n, _, *outside = g.shape
    c = weight.shape[1] * group
    e = g.emitter
    if all(t == 1 for t in w.strides) or group > 1:
        # A convolution with the flipped kernel, zeros put between the positions of g where there are strides.
        for axis, (t, o) in enumerate(zip(w.strides, outside, strict=True), 2):
            if t > 1:
                wide = g.reshape((*g.shape[: axis + 1], 1, *g.shape[axis + 1 :])).pad(axis + 1, 0, t - 1)
                g = wide.reshape((*g.shape[:axis], o * t, *g.shape[axis + 1 :])).slice(
                    axis, 0, (o - 1) * t + 1
                )
        before = [r - b for r, b in zip(w.reach, w.begins, strict=True)]
        after = [i + r - size - b for i, r, size, b in zip(inside, w.reach, g.shape[2:], before, strict=True)]
        for axis, (b, a) in enumerate(zip(before, after, strict=True), 2):
            g = g.slice(axis, max(0, -b), g.shape[axis] - max(0, -a))
        flat = Window(
            w.kernel,
            (1,) * w.rank,
            w.dilations,
            tuple(max(0, b) for b in before),
            tuple(max(0, a) for a in after),
        )
        return e.op("Conv", [g, _flipped(weight, group)], (n, c, *inside), **_attributes(flat, group))
    missing = [
        i - ((o - 1) * t - b - a + r + 1)
        for i, o, t, b, a, r in zip(inside, outside, w.strides, w.begins, w.ends, w.reach, strict=True)
    ]
    extra: dict[str, Any] = {"output_padding": missing} if any(missing) else {}
    return e.op("ConvTranspose", [g, weight], (n, c, *inside), **_attributes(w, group), **extra)


def correlate(x: Value, g: Value, w: Window, group: int) -> Value:
    """The adjoint of a convolution's weight: ``(g k, c, *kernel)``.

    Args:
        x: ``(n, g c, *inside)``, the convolution's input.
        g: ``(n, g k, *outside)``, the adjoint of its output.
        w: The convolution's window.
        group: Number of groups.
    """
    n, channels, *inside = x.shape
    _, filters, *outside = g.shape
    c, k = channels // group, filters // group
    space = list(range(3, 3 + w.rank))
    # Samples are what is summed over; groups stay groups: (c, g n, inside) with (g k, n, outside).
    left = x.reshape((n, group, c, *inside)).transpose([2, 1, 0, *space]).reshape((c, group * n, *inside))
    right = g.transpose([1, 0, *range(2, 2 + w.rank)])
    sizes = [
        (i + b + a - t * (o - 1) - 1) // d + 1
        for i, b, a, t, o, d in zip(inside, w.begins, w.ends, w.strides, outside, w.dilations, strict=True)
    ]
    turned = Window(tuple(outside), w.dilations, w.strides, w.begins, w.ends)
    made = x.emitter.op("Conv", [left, right], (c, filters, *sizes), **_attributes(turned, group))
    for axis, size in enumerate(w.kernel, 2):
        made = made.slice(axis, 0, size)
    return (
        made.reshape((c, group, k, *w.kernel)).transpose([1, 2, 0, *space]).reshape((filters, c, *w.kernel))
    )


def _bias(s: Site, slot: int) -> dict[int, Value]:
    if not s.wants(slot):
        return {}
    return {slot: s.g.sum([0, *range(2, s.g.rank)], keepdims=False)}


@vjp("Conv")
def _conv(s: Site) -> Adjoints:
    x, weight, g = s.x(), s.x(1), s.g
    group = int(s.attribute("group", 1))
    w = window_of(s, weight.shape[2:], x.shape[2:], g.shape[2:])
    found = _bias(s, 2)
    if s.wants(0):
        found[0] = spread(g, weight, w, group, x.shape[2:])
    if s.wants(1):
        found[1] = correlate(x, g, w, group)
    return found


@vjp("ConvTranspose")
def _conv_transpose(s: Site) -> Adjoints:
    """The transpose of the convolution that takes the output's space to the input's, with the same weight."""
    x, weight, g = s.x(), s.x(1), s.g
    group = int(s.attribute("group", 1))
    kernel, inside, outside = weight.shape[2:], x.shape[2:], g.shape[2:]
    rank = len(kernel)
    strides = tuple(s.attribute("strides") or [1] * rank)
    dilations = tuple(s.attribute("dilations") or [1] * rank)
    mode = s.attribute("auto_pad", "NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode not in ("NOTSET", "", "VALID") or s.attribute("output_shape"):
        raise NoGradientError("its padding is worked out from its output: give it pads")
    pads = tuple(s.attribute("pads") or [0] * (2 * rank))
    begins = pads[:rank]
    # What the convolution does not need of the output's end (output padding) it is given as it is.
    ends = tuple(
        (i - 1) * t + d * (k - 1) + 1 - o - b
        for i, t, d, k, o, b in zip(inside, strides, dilations, kernel, outside, begins, strict=True)
    )
    for axis, end in enumerate(ends, 2):
        g = g.slice(axis, 0, g.shape[axis] + min(0, end))
    w = Window(tuple(kernel), strides, dilations, begins, tuple(max(0, end) for end in ends))
    found = _bias(s, 2)
    if s.wants(0):
        found[0] = s.e.op("Conv", [g, weight], x.shape, **_attributes(w, group))
    if s.wants(1):
        found[1] = correlate(g, x, w, group)
    return found
