"""Interval rules of ops that move elements: bounds make the same moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.axes.flow import ChainFlow, Operand, ReshapeFlow, SignatureFlow, TakeFlow, reshape_blocks
from graphprune.dead.intervals.bounds import Bounds, along, bounds, exactly, hull, normal, unknown
from graphprune.dead.intervals.contraction import join_axes, spread, view_of
from graphprune.dead.intervals.registry import Found, Site, rule
from graphprune.rules.registry import normal_axis

Array = npt.NDArray[Any]


def reshaped(part: Bounds, source: tuple[int, ...], target: tuple[int, ...]) -> Bounds:
    """Row-major reshape; axes on which nothing depends stay of size 1 where they can."""
    expanded: list[int] = []
    final: list[int] = []
    for old, new in reshape_blocks(source, target):
        if all(part.lo.shape[axis] == 1 for axis in old):
            expanded += [1] * len(old)
            final += [1] * len(new)
        else:
            expanded += [source[axis] for axis in old]
            final += [target[axis] for axis in new]
    return normal(part.each(lambda array: np.broadcast_to(array, expanded).reshape(final)))


def taken(part: Bounds, flow: TakeFlow, filling: Bounds | None) -> Bounds:
    """``take`` along one axis; positions that no element fills hold ``filling``."""
    axis, index = flow.axis, flow.index
    holes = index < 0
    if part.lo.shape[axis] == 1 and not holes.any():
        result = part
    else:
        at = np.where(holes, 0, index) if part.lo.shape[axis] > 1 else np.zeros(len(index), dtype=np.int64)
        result = normal(part.each(lambda array: array.take(at, axis=axis)))
        if holes.any():
            fill = filling if filling is not None else unknown(0)
            result = _filled(result, holes, axis, fill, len(index))
    if flow.places is None:
        return result
    dims = flow.places if result.lo.shape[axis] > 1 else (1,) * len(flow.places)
    return result.each(lambda array: array.reshape((*array.shape[:axis], *dims, *array.shape[axis + 1 :])))


def _filled(part: Bounds, holes: Array, axis: int, fill: Bounds, size: int) -> Bounds:
    shape = [size if i == axis else n for i, n in enumerate(part.lo.shape)]
    where = holes.reshape([-1 if i == axis else 1 for i in range(part.ndim)])
    arrays = [
        np.where(where, filler.reshape((1,) * part.ndim), np.broadcast_to(array, shape))
        for array, filler in zip((part.lo, part.hi, part.value), (fill.lo, fill.hi, fill.value), strict=True)
    ]
    return bounds(arrays[0], arrays[1], arrays[2], finite=part.finite and fill.finite)


def moved(site: Site, filling: Bounds | None = None) -> Found:
    """What the flows of the op say: indexing and reshaping of the first input."""
    found: Found = [None] * len(site.op.outputs)
    source = site.bounds(0)
    for flow in site.flows:
        if isinstance(flow, ReshapeFlow):
            found[flow.target.slot] = reshaped(source, flow.source_shape, flow.target_shape)
        elif isinstance(flow, TakeFlow):
            found[flow.target.slot] = taken(source, flow, filling)
        elif isinstance(flow, ChainFlow):
            part = source
            for step in flow.steps:
                part = taken(part, step, filling)
            found[flow.steps[0].target.slot] = part
    return found


@rule("Reshape Flatten Squeeze Unsqueeze Split")
def movement(site: Site) -> Found:
    return moved(site)


@rule("Slice")
def slice_(site: Site) -> Found:
    """A range that is not known may be any."""
    if any(isinstance(flow, SignatureFlow) for flow in site.flows):
        return [along(site.bounds(0), range(site.rank()))]
    return moved(site)


@rule("Gather")
def gather(site: Site) -> Found:
    """A look-up may find any position of the axis."""
    if any(isinstance(flow, TakeFlow) for flow in site.flows):
        return moved(site)
    if not site.flows:
        return [None]
    axis = normal_axis(int(site.attribute("axis", 0)), len(site.shape(0)))
    part = along(site.bounds(0), [axis])
    ones = (1,) * len(site.shape(1))
    return [part.each(lambda array: array.reshape((*array.shape[:axis], *ones, *array.shape[axis + 1 :])))]


@rule("Pad")
def pad(site: Site) -> Found:
    """Other modes than constant repeat what is there."""
    if str(site.attribute("mode", "constant")) != "constant":
        return [along(site.bounds(0), range(site.rank()))]
    filling = exactly(np.asarray(float(site.attribute("value", 0.0))))
    if site.has(2):
        filling = site.bounds(2)
        if filling.lo.size != 1:
            return [None]
    if any(isinstance(flow, SignatureFlow) for flow in site.flows) or not site.flows:
        one = filling.reshape((1,) * site.rank())
        return [hull([along(site.bounds(0), range(site.rank())), one])]
    return moved(site, filling)


@rule("Concat")
def concat(site: Site) -> Found:
    shape = site.out_shape()
    axis = normal_axis(int(site.attribute("axis", 1)), len(shape))
    parts, sizes = [], []
    for slot in range(len(site.op.inputs)):
        if site.has(slot):
            parts.append(site.bounds(slot))
            sizes.append(site.shape(slot)[axis])
    whole = np.broadcast_shapes(
        *([1 if i == axis else n for i, n in enumerate(part.lo.shape)] for part in parts)
    )

    def joined(name: str) -> Array:
        return np.concatenate(
            [
                np.broadcast_to(getattr(part, name), [size if i == axis else n for i, n in enumerate(whole)])
                for part, size in zip(parts, sizes, strict=True)
            ],
            axis=axis,
        )

    return [bounds(joined("lo"), joined("hi"), joined("value"), finite=all(part.finite for part in parts))]


@rule("Transpose")
def transpose(site: Site) -> Found:
    order: Sequence[int] = site.attribute("perm") or list(range(site.rank()))[::-1]
    return [site.bounds(0).each(lambda array: array.transpose(order))]


@rule("Expand")
def expand(site: Site) -> Found:
    part, rank = site.bounds(0), site.rank()
    lead = (1,) * (rank - part.ndim)
    return [part.each(lambda array: array.reshape(lead + array.shape))]


@rule("Tile")
def tile(site: Site) -> Found:
    source, target = site.shape(0), site.out_shape()
    part = site.bounds(0)
    repeats = [t // s if n > 1 else 1 for s, t, n in zip(source, target, part.lo.shape, strict=True)]
    return [normal(part.each(lambda array: np.tile(array, repeats)))]


@rule("ConstantOfShape")
def filled(site: Site) -> Found:
    value = np.asarray(site.attribute("value", np.zeros(1, np.float32))).reshape((1,) * site.rank())
    return [exactly(value)]


@rule("Trilu")
def triangle(site: Site) -> Found:
    """An element, or zero."""
    zero = exactly(np.zeros((1,) * site.rank()))
    return [hull([site.bounds(0), zero])]


@rule("ReverseSequence")
def reverse(site: Site) -> Found:
    return [along(site.bounds(0), [int(site.attribute("time_axis", 0))])]


@rule("DepthToSpace SpaceToDepth")
def exchange(site: Site) -> Found:
    """A channel's elements are those of the channels that it is made of."""
    flow = site.signature
    if flow is None:
        return [None]
    source, target = view_of(flow, Operand(False, 0)), view_of(flow, Operand(True, 0))
    part = spread(flow, source, site.bounds(0)) if source is not None else None
    if source is None or target is None or part is None:
        return [None]
    return [normal(part.each(lambda array: join_axes(array, source.factors, target, flow)))]
