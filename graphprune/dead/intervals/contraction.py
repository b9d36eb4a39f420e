"""Interval rules of convolutions and matrix products.

A sum of products with constant weights has its upper end where operands with positive weights are at their upper ends
and those with negative weights at their lower ones (Moore, Kearfott, Cloud, *Introduction to Interval Analysis*,
section 7.1). Where the weight is zero the operand does not count, bounded or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from string import ascii_letters
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.axes.flow import Operand, SignatureFlow
from graphprune.axes.signature import View
from graphprune.dead.intervals.bounds import Bounds, Floats, along, bounds, slack, unknown, widened
from graphprune.dead.intervals.elementwise import added, multiplied
from graphprune.dead.intervals.registry import Found, Site, rule
from graphprune.graph import Tensor

#: Weights are looked at in parts of so many elements, in float64.
CHUNK = 1 << 22
#: Roundings beside those of the sum: of a scale, of a narrower sum's conversion.
EXTRA_TERMS = 4
#: Units of precision by which the sum of a Softmax may miss one.
SHARE_UNITS = 32


@dataclass(frozen=True)
class Product:
    """Which operands of a contraction are multiplied.

    Attributes:
        left, right: Input slots.
        bias: Input slot of what is added; None where there is none.
        spatial: The first operand is seen through windows.
    """

    left: int
    right: int
    bias: int | None = None
    spatial: bool = False


#: Ops whose result is a sum of products of two operands, plus a bias, possibly put through a function.
PRODUCTS: dict[str, Product] = {
    "Conv": Product(0, 1, 2, spatial=True),
    "ConvTranspose": Product(0, 1, 2, spatial=True),
    "MatMul": Product(0, 1),
    "Gemm": Product(0, 1, 2),
    "Einsum": Product(0, 1),
    "com.microsoft::FusedMatMul": Product(0, 1),
    "com.microsoft::FusedConv": Product(0, 1, 2, spatial=True),
    "com.microsoft::FusedGemm": Product(0, 1, 2),
}
#: Of these only the product is known, not what becomes of it.
_APPLY_A_FUNCTION = ("com.microsoft::FusedConv", "com.microsoft::FusedGemm")


def pads(site_attributes: Any, op_type: str) -> bool:
    """True if a window may reach over the border, or (in a transposed convolution) covers some positions only."""
    automatic = str(site_attributes.get("auto_pad", "NOTSET"))
    if op_type == "ConvTranspose":
        return True
    return automatic.startswith("SAME") or any(site_attributes.get("pads", ()))


def view_of(flow: SignatureFlow, operand: Operand) -> View | None:
    """The one view of an operand."""
    views = [v for v in flow.signature.views if (v.is_output, v.slot) == operand]
    return views[0] if len(views) == 1 else None


def spread(flow: SignatureFlow, view: View, part: Bounds) -> Bounds | None:
    """Bounds with one axis a factor of a view; None where they depend on an axis of which the view says nothing."""
    lo, hi, value = (flow.spread(view, array) for array in (part.lo, part.hi, part.value))
    return None if lo is None or hi is None or value is None else Bounds(lo, hi, value, part.finite)


def join_axes(
    array: npt.NDArray[Any], factors: Sequence[str], view: View, flow: SignatureFlow
) -> npt.NDArray[Any]:
    """From one axis a factor to the axes of an operand; factors that are missing do not matter."""
    present = [f for f in view.factors if f in factors]
    array = array.transpose([factors.index(f) for f in present])
    dims = iter(array.shape)
    by_factor = [next(dims) if f in factors else 1 for f in view.factors]
    array = array.reshape(by_factor)
    full, final, position = [], [], 0
    for axis in view.axes:
        count = len(axis.factors or ())
        own = by_factor[position : position + count]
        sizes = [flow.signature.sizes[f] for f in axis.factors or ()]
        position += count
        if all(size == 1 for size in own):
            full += own
            final.append(1)
        else:
            full += sizes
            final.append(prod(sizes))
    return np.broadcast_to(array, full).reshape(final)


@dataclass(frozen=True)
class _Sum:
    """Sums of products over the factors of two operands that the result lacks."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    result: tuple[str, ...]

    def __call__(self, a: Floats, b: Floats) -> Floats:
        letter = dict(zip(dict.fromkeys((*self.left, *self.right)), ascii_letters, strict=False))
        left, right, result = (
            "".join(letter[f] for f in factors) for factors in (self.left, self.right, self.result)
        )
        total: Floats = np.einsum(f"{left},{right}->{result}", a, b)
        return total


def contract(
    x: Bounds, positive: Floats, negative: Floats, total: _Sum, eps: float, terms: float
) -> tuple[Floats, Floats, Floats]:
    """Ends and values of ``sum(x * w)`` for constant weights, whose positive and negative parts are given.

    x is of full size along the summed factors. The ends are moved outward by the rounding of a sum of so many terms.
    """
    ends = []
    for up, low in ((x.lo, x.hi), (x.hi, x.lo)):  # which end a positive weight, and a negative one, meets
        endless = np.isinf(up), np.isinf(low)
        up, low = np.where(endless[0], 0, up), np.where(endless[1], 0, low)
        end = total(up, positive) + total(low, negative)
        room = slack(total(np.abs(up), positive) - total(np.abs(low), negative), eps, terms)
        if endless[0].any() or endless[1].any():
            reached = total(endless[0].astype(np.float64), positive) - total(
                endless[1].astype(np.float64), negative
            )
            room = np.where(reached > 0, np.inf, room)
        ends.append((end, room))
    value = total(np.where(x.fixed, x.value, 0), positive + negative)
    if not x.fixed.all():
        value = np.where(total((~x.fixed).astype(np.float64), positive - negative) > 0, np.nan, value)
    return ends[0][0] - ends[0][1], ends[1][0] + ends[1][1], value


def _part(where: tuple[slice, ...], array: Floats) -> Floats:
    return array[where]


def _chunks(w: npt.NDArray[Any], factors: Sequence[str], kept: Sequence[str]) -> Iterator[tuple[int, slice]]:
    """Parts of a weight along its longest factor that the result has."""
    axes = [i for i, f in enumerate(factors) if f in kept]
    if not axes or w.size <= CHUNK:
        yield -1, slice(None)
        return
    axis = max(axes, key=lambda i: w.shape[i])
    step = max(1, CHUNK * w.shape[axis] // w.size)
    for start in range(0, w.shape[axis], step):
        yield axis, slice(start, start + step)


def _with_constant(
    x: Bounds,
    fx: tuple[str, ...],
    w: npt.NDArray[Any],
    fw: tuple[str, ...],
    fo: tuple[str, ...],
    eps: float,
    terms: int,
) -> tuple[Bounds, tuple[str, ...]]:
    """The product with a constant; also the factors of the result's axes."""
    result = tuple(f for f in fo if f in fx or f in fw)
    # A kernel's positions are in the weight alone: they are added up first.
    alone = tuple(i for i, f in enumerate(fw) if f not in fx and f not in result)
    names = tuple(f for f in fw if f in fx or f in result)
    total = _Sum(fx, names, result)
    parts = []
    where = -1
    for axis, part in _chunks(w, fw, result):
        where = axis
        lead = (slice(None),) * max(axis, 0)
        weights = np.asarray(w[(*lead, part)], dtype=np.float64)
        own = x
        if axis >= 0 and fw[axis] in fx and x.lo.shape[fx.index(fw[axis])] > 1:
            at = (slice(None),) * fx.index(fw[axis])
            own = x.each(partial(_part, (*at, part)))
        positive = np.maximum(weights, 0).sum(axis=alone)
        negative = np.minimum(weights, 0).sum(axis=alone)
        parts.append(contract(own, positive, negative, total, eps, terms))
    if where < 0:
        lo, hi, value = parts[0]
    else:
        at_axis = result.index(fw[where])
        lo, hi, value = (np.concatenate([part[i] for part in parts], axis=at_axis) for i in range(3))
    return Bounds(lo, hi, value, x.finite), result


def _of_both(
    a: Bounds,
    fa: tuple[str, ...],
    b: Bounds,
    fb: tuple[str, ...],
    fo: tuple[str, ...],
    eps: float,
    terms: int,
) -> tuple[Bounds, tuple[str, ...]]:
    """The product of two activations: as wide as their magnitudes allow."""
    result = tuple(f for f in fo if f in fa or f in fb)
    total = _Sum(fa, fb, result)
    most = [np.maximum(np.abs(part.lo), np.abs(part.hi)) for part in (a, b)]
    finite = [np.where(np.isinf(m), 0, m) for m in most]
    reach = total(finite[0], finite[1])
    reach = reach + slack(reach, eps, terms)
    endless = [np.isinf(m).astype(np.float64) for m in most]
    some = [(m > 0).astype(np.float64) for m in most]
    reach = np.where(total(endless[0], some[1]) + total(some[0], endless[1]) > 0, np.inf, reach)
    signed = [((part.lo < 0).astype(np.float64), (part.hi > 0).astype(np.float64)) for part in (a, b)]
    below = total(signed[0][0], signed[1][1]) + total(signed[0][1], signed[1][0])
    above = total(signed[0][1], signed[1][1]) + total(signed[0][0], signed[1][0])
    value = total(np.where(a.fixed, a.value, 0), np.where(b.fixed, b.value, 0))
    loose = [(~part.fixed).astype(np.float64) for part in (a, b)]
    moving = total(loose[0], some[1]) + total(some[0], loose[1])
    lo, hi = np.where(below > 0, -reach, 0.0), np.where(above > 0, reach, 0.0)
    return Bounds(lo, hi, np.where(moving > 0, np.nan, value), a.finite and b.finite), result


def _full(part: Bounds, factors: tuple[str, ...], summed: Sequence[str], sizes: dict[str, int]) -> Bounds:
    """Of full size along summed factors."""
    shape = [sizes[f] if f in summed else size for f, size in zip(factors, part.lo.shape, strict=True)]
    return part.each(lambda array: np.broadcast_to(array, shape))


def product(site: Site, kind: Product) -> Bounds | None:
    """Bounds of the sum of products, before a bias; None where they cannot be told."""
    flow = site.signature
    if flow is None:
        return None
    out = view_of(flow, Operand(True, 0))
    views = [view_of(flow, Operand(False, slot)) for slot in (kind.left, kind.right)]
    if out is None or views[0] is None or views[1] is None or len(site.op.outputs) != 1:
        return None
    sizes = dict(flow.signature.sizes)
    contents = [site.contents(slot) for slot in (kind.left, kind.right)]
    parts: list[Bounds] = []
    factors: list[tuple[str, ...]] = []
    for slot, view, array in zip((kind.left, kind.right), views, contents, strict=True):
        assert view is not None
        if array is not None:
            parts.append(unknown(0))
            factors.append(view.factors)
            continue
        part = spread(flow, view, site.bounds(slot))
        if part is None:
            return None
        names = view.factors
        if kind.spatial and slot == kind.left:
            hulled = [i for i, f in enumerate(names) if f not in out.factors and f not in _of(views[1])]
            part = along(part, hulled)
            kept = [i for i in range(len(names)) if i not in hulled]
            part = part.reshape([part.lo.shape[i] for i in kept])
            names = tuple(names[i] for i in kept)
            if pads(site.op.attributes, site.op.op_type):
                part = _or_zero(part)
        parts.append(part)
        factors.append(names)
    summed = [f for f in dict.fromkeys((*factors[0], *factors[1])) if f not in out.factors]
    terms = prod(sizes[f] for f in summed) + EXTRA_TERMS
    constant = next((i for i in (1, 0) if contents[i] is not None), None)
    mixed = _mixture(site, kind, parts, factors, summed, terms) if constant is None else None
    if mixed is not None:
        found, result = mixed, tuple(f for f in factors[kind.right] if f not in summed)
    elif constant is None:
        a, b = (_full(p, f, summed, sizes) for p, f in zip(parts, factors, strict=True))
        found, result = _of_both(a, factors[0], b, factors[1], out.factors, site.eps, terms)
    else:
        view, other = views[constant], 1 - constant
        array = contents[constant]
        assert array is not None
        assert view is not None
        weights = flow.spread(view, array)
        if weights is None or not np.isfinite(weights).all():
            return unknown(site.rank(), finite=False)
        activation = _full(parts[other], factors[other], summed, sizes)
        found, result = _with_constant(
            activation, factors[other], weights, factors[constant], out.factors, site.eps, terms
        )
    if not found.finite:
        return unknown(site.rank(), finite=False)
    lo, hi, value = (join_axes(array, result, out, flow) for array in (found.lo, found.hi, found.value))
    return bounds(lo, hi, value)


def _mixture(
    site: Site,
    kind: Product,
    parts: list[Bounds],
    factors: list[tuple[str, ...]],
    summed: Sequence[str],
    terms: int,
) -> Bounds | None:
    """Shares of one times elements: what comes out lies between the elements. None where they are no shares of one."""
    if (
        (kind.left, kind.right) != (0, 1)
        or list(summed) != [factors[0][-1]]
        or not sums_to_one(site.tensor(0))
    ):
        return None
    axis = factors[1].index(summed[0])
    elements = along(parts[1], [axis])
    elements = elements.reshape([size for i, size in enumerate(elements.lo.shape) if i != axis])
    lo, hi = widened(elements.lo, elements.hi, site.eps, terms + SHARE_UNITS)
    return Bounds(lo, hi, elements.value, elements.finite)


def sums_to_one(tensor: Tensor | None) -> bool:
    """True for the result of a Softmax over the last axis."""
    op = tensor.producer if tensor is not None else None
    while op is not None and op.kind in ("Identity", "Dropout") and op.inputs[0] is not None:
        op = op.inputs[0].producer
    if op is None or op.kind != "Softmax" or op.inputs[0] is None or op.inputs[0].shape is None:
        return False
    axis = int(op.attributes.get("axis", -1 if op.version >= 13 else 1))
    return axis in (-1, len(op.inputs[0].shape) - 1)


def _of(view: View | None) -> tuple[str, ...]:
    return () if view is None else view.factors


def _or_zero(part: Bounds) -> Bounds:
    """What a window sees at a border: the element, or zero."""
    return Bounds(
        np.minimum(part.lo, 0), np.maximum(part.hi, 0), np.where(part.value == 0, 0, np.nan), part.finite
    )


def contraction(site: Site) -> Found:
    """Product, scale and bias."""
    kind = PRODUCTS[site.op.kind]
    found = product(site, kind)
    if found is None or site.op.kind in _APPLY_A_FUNCTION or not _is_real(site):
        return [None]
    alpha = float(site.attribute("alpha", 1.0))
    if alpha != 1:
        found = multiplied(found, _scalar(alpha, found.ndim), site.eps)
    if kind.bias is not None and site.has(kind.bias):
        bias = _bias(site, kind.bias)
        beta = float(site.attribute("beta", 1.0))
        if beta != 1:
            bias = multiplied(bias, _scalar(beta, bias.ndim), site.eps)
        found = added(found, bias, site.eps)
    return [found]


def _bias(site: Site, slot: int) -> Bounds:
    """A bias as it is added: a convolution's lies along axis 1."""
    part = site.bounds(slot)
    rank = site.rank()
    shape = list(part.lo.shape)
    if PRODUCTS[site.op.kind].spatial:
        shape = [1, shape[0], *[1] * (rank - 2)]
    else:
        shape = [1] * (rank - len(shape)) + shape
    return part.reshape(shape)


def _scalar(value: float, rank: int) -> Bounds:
    array = np.full((1,) * rank, value)
    return Bounds(array, array, array)


def _is_real(site: Site) -> bool:
    output = site.op.outputs[0]
    return output is not None and output.dtype is not None and output.dtype.is_floating_point()


for _kind in PRODUCTS:
    rule(_kind)(contraction)
