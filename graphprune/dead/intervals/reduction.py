"""Interval rules of reductions and of pools."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from graphprune.dead.intervals.bounds import Bounds, Floats, along, between, bounds, slack, widened
from graphprune.dead.intervals.elementwise import FUNCTION_UNITS, magnitude
from graphprune.dead.intervals.registry import Found, Site, rule
from graphprune.rules.reduction import reduced_axes
from graphprune.rules.registry import Refusal


def _without(site: Site, part: Bounds, axes: Sequence[int]) -> Bounds:
    """Reduced axes have size 1, or are gone."""
    if site.attribute("keepdims", 1):
        return part
    shape = [n for axis, n in enumerate(part.lo.shape) if axis not in axes]
    return part.reshape(shape)


def summed(part: Bounds, shape: Sequence[int], axes: Sequence[int], eps: float) -> Bounds:
    """The sum over axes, which have size 1 in the result."""
    times = prod(shape[axis] for axis in axes if part.lo.shape[axis] == 1)
    count = prod(shape[axis] for axis in axes)
    many = tuple(axes)

    def total(array: Floats) -> Floats:
        found: Floats = array.sum(axis=many, keepdims=True) * times
        return found

    lo, hi = total(part.lo), total(part.hi)
    room = [slack(total(np.abs(end)), eps, count) for end in (part.lo, part.hi)]
    return bounds(lo - room[0], hi + room[1], total(part.value), finite=part.finite)


@rule("ReduceSum ReduceMean ReduceL1 ReduceL2 ReduceSumSquare")
def sums(site: Site) -> Found:
    """Sums of elements, of magnitudes, of squares."""
    axes = reduced_axes(site.op)
    if isinstance(axes, Refusal):
        return [None]
    part, kind = site.bounds(0), site.op.op_type
    if kind in ("ReduceL1", "ReduceL2", "ReduceSumSquare"):
        part = magnitude(part)
    if kind in ("ReduceL2", "ReduceSumSquare"):
        lo, hi = widened(part.lo**2, part.hi**2, site.eps, 2)
        part = bounds(lo, hi, part.value**2, finite=part.finite)
    found = summed(part, site.shape(0), axes, site.eps)
    if kind == "ReduceMean":
        count = prod(site.shape(0)[axis] for axis in axes)
        lo, hi = widened(found.lo / count, found.hi / count, site.eps, 2)
        found = bounds(lo, hi, found.value / count, finite=found.finite)
    if kind == "ReduceL2":
        lo, hi = widened(np.sqrt(np.maximum(found.lo, 0)), np.sqrt(found.hi), site.eps, FUNCTION_UNITS)
        found = bounds(lo, hi, np.sqrt(found.value), finite=found.finite)
    return [_without(site, found, axes)]


@rule("ReduceMax ReduceMin")
def extremes(site: Site) -> Found:
    axes = reduced_axes(site.op)
    if isinstance(axes, Refusal):
        return [None]
    part, many = site.bounds(0), tuple(axes)
    pick = np.max if site.op.op_type == "ReduceMax" else np.min
    lo, hi, value = (pick(array, axis=many, keepdims=True) for array in (part.lo, part.hi, part.value))
    return [_without(site, bounds(lo, hi, value, finite=part.finite), axes)]


def _space(site: Site) -> range:
    return range(2, site.rank())


@rule("MaxPool GlobalMaxPool")
def max_pool(site: Site) -> Found:
    """One of the elements; padding is never the greatest."""
    return [along(site.bounds(0), _space(site)), *[None] * (len(site.op.outputs) - 1)]


@rule("AveragePool GlobalAveragePool")
def average_pool(site: Site) -> Found:
    """Between the elements; where padding counts, between them and zero."""
    part = along(site.bounds(0), _space(site))
    count = float(prod(site.attribute("kernel_shape", ())) or 1)
    if site.op.op_type == "GlobalAveragePool":
        count = float(prod(site.shape(0)[2:]))
    elif site.attribute("count_include_pad", 0) and (
        any(site.attribute("pads", ())) or str(site.attribute("auto_pad", "NOTSET")).startswith("SAME")
    ):
        part = bounds(
            np.minimum(part.lo, 0),
            np.maximum(part.hi, 0),
            np.where(part.value == 0, 0, np.nan),
            finite=part.finite,
        )
    lo, hi = widened(part.lo, part.hi, site.eps, count + 2)
    return [bounds(lo, hi, part.value, finite=part.finite)]


@rule("Resize Upsample")
def resize(site: Site) -> Found:
    """Interpolation stays between the elements, but for cubic, which is linear all the same: it keeps what is fixed."""
    axes = [i for i, (s, t) in enumerate(zip(site.shape(0), site.out_shape(), strict=True)) if s != t]
    scaled = any(flow for flow in site.flows)
    if not scaled or str(site.attribute("coordinate_transformation_mode", "")) == "tf_crop_and_resize":
        return [None]
    part = along(site.bounds(0), axes or range(site.rank()))
    mode = str(site.attribute("mode", "nearest"))
    lo, hi = part.lo, part.hi
    if mode != "nearest":
        lo, hi = widened(lo, hi, site.eps, 16)
    if mode == "cubic":
        if site.attribute("exclude_outside", 0):
            return [None]
        lo, hi = np.where(part.fixed, lo, -np.inf), np.where(part.fixed, hi, np.inf)
    return [bounds(lo, hi, part.value, finite=part.finite)]


@rule("LSTM GRU RNN")
def recurrent(site: Site) -> Found:
    """A hidden state is a product of numbers below one, or a tanh, or between that and the state before."""
    given = site.has(5)
    custom = "activations" in site.op.attributes
    if custom or (site.op.op_type == "GRU" and given) or not site.finite:
        return [None] * len(site.op.outputs)
    found: Found = []
    for slot, output in enumerate(site.op.outputs):
        if output is None or slot == 2:
            found.append(None)
            continue
        rank = site.rank(slot)
        reach = 1 + FUNCTION_UNITS * site.eps
        found.append(between(rank, -reach, reach))
    return found
