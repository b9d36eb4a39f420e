"""Interval rules of normalisations.

What has been normalised over n elements is at most ``sqrt(n)`` in magnitude, whatever it was: one element would have
to hold all of the variance. Scale and bias do the rest; where the scale is zero the bias is left.
"""

from __future__ import annotations

from math import prod, sqrt

import numpy as np

from graphprune.dead.intervals.bounds import Bounds, Floats, between, bounds
from graphprune.dead.intervals.elementwise import ARITHMETIC_UNITS, added, multiplied, negated
from graphprune.dead.intervals.registry import Found, Site, rule
from graphprune.rules.registry import normal_axis

#: Normalised values may exceed the bound by so much, relatively, for rounding.
_ROOM = 1e-3


def _along_channels(part: Bounds, rank: int) -> Bounds:
    """A vector along axis 1."""
    shape = (1, -1, *[1] * (rank - 2)) if rank > 1 else (-1,)
    return part.reshape(shape)


@rule("BatchNormalization")
def batch_norm(site: Site) -> Found:
    """``(x - mean) * scale / sqrt(var + epsilon) + bias``, with statistics that are stored."""
    if site.attribute("training_mode", 0) or any(site.op.outputs[1:]):
        return [None]
    rank = site.rank()
    scale, bias, mean = (_along_channels(site.bounds(slot), rank) for slot in (1, 2, 3))
    variance = site.contents(4)
    if variance is None:
        return [None]
    spread = np.sqrt(np.asarray(variance, dtype=np.float64) + float(site.attribute("epsilon", 1e-5)))
    inverse = _along_channels(bounds(1 / spread, 1 / spread, 1 / spread), rank)
    inverse = _rounded(inverse, site.eps)
    centred = added(site.bounds(0), negated(mean), site.eps)
    factor = multiplied(scale, inverse, site.eps)
    plain = added(multiplied(centred, factor, site.eps), bias, site.eps)
    # Runtimes also compute x * factor + (bias - mean * factor): what is rounded there may be greater.
    shift = np.maximum(np.abs(mean.lo), np.abs(mean.hi)) * np.maximum(np.abs(factor.lo), np.abs(factor.hi))
    room = shift * (4 * ARITHMETIC_UNITS * site.eps)
    return [bounds(plain.lo - room, plain.hi + room, plain.value, finite=plain.finite)]


def _rounded(part: Bounds, eps: float) -> Bounds:
    room: Floats = np.abs(part.lo) * (ARITHMETIC_UNITS * eps)
    return Bounds(part.lo - room, part.hi + room, part.value, part.finite)


def _normalised(site: Site, count: int) -> Bounds | None:
    """What is multiplied by the scale: normalised over so many elements."""
    if not site.bounds(0).finite:
        return None
    reach = sqrt(count) * (1 + _ROOM)
    return between(site.rank(), -reach, reach)


@rule("LayerNormalization RMSNormalization SimplifiedLayerNormalization")
@rule("com.microsoft::LayerNormalization com.microsoft::SimplifiedLayerNormalization")
def layer_norm(site: Site) -> Found:
    """Scale and bias broadcast."""
    rank = site.rank()
    found = _normalised(site, prod(site.shape(0)[normal_axis(int(site.attribute("axis", -1)), rank) :]))
    if found is None:
        return [None]
    found = multiplied(found, site.bounds(1), site.eps)
    if site.has(2):
        found = added(found, site.bounds(2), site.eps)
    return [found if found.ndim == rank else None]


@rule("InstanceNormalization GroupNormalization")
def channel_norm(site: Site) -> Found:
    """Scale and bias have one entry a channel."""
    shape, rank = site.shape(0), site.rank()
    groups = int(site.attribute("num_groups", shape[1]))
    found = _normalised(site, prod(shape[1:]) // groups)
    if found is None or any(site.shape(slot) != (site.shape(0)[1],) for slot in (1, 2)):
        return [None]
    scale, bias = (_along_channels(site.bounds(slot), rank) for slot in (1, 2))
    return [added(multiplied(found, scale, site.eps), bias, site.eps)]


@rule("Softmax Hardmax")
def shares(site: Site) -> Found:
    """Shares of one; finite also where a mask of minus infinity leaves something."""
    return [between(site.rank(), 0.0, 1.0 + _ROOM)]


@rule("LogSoftmax")
def logarithms(site: Site) -> Found:
    return [between(site.rank(), -np.inf, _ROOM, finite=site.finite)]
