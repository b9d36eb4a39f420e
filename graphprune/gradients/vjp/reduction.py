"""Reductions, softmax, and ops that divide by statistics."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from graphprune.gradients.vjp.emit import NoGradientError, Value
from graphprune.gradients.vjp.site import Adjoints, Site, vjp


def _axes(s: Site) -> list[int]:
    axes = s.integers(1, "axes")
    rank = len(s.shape())
    if not axes:
        return [] if s.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(a % rank for a in axes)


def _kept(s: Site, value: Value) -> Value:
    """A reduced value with its axes back, of size 1."""
    axes = _axes(s)
    return value.reshape([1 if a in axes else n for a, n in enumerate(s.shape())])


@vjp("ReduceSum")
def _reduce_sum(s: Site) -> Adjoints:
    return {0: _kept(s, s.g).expand(s.shape())}


@vjp("ReduceMean")
def _reduce_mean(s: Site) -> Adjoints:
    count = prod(s.shape()[a] for a in _axes(s))
    return {0: (_kept(s, s.g) * (1 / count)).expand(s.shape())}


@vjp("ReduceMax ReduceMin GlobalMaxPool")
def _reduce_extremum(s: Site) -> Adjoints:
    """The gradient goes to the extremum; where several elements are it, they share it."""
    axes = list(range(2, len(s.shape()))) if s.op.op_type == "GlobalMaxPool" else _axes(s)
    shape = [1 if a in axes else n for a, n in enumerate(s.shape())]
    hit = s.x().equals(s.y().reshape(shape)).cast()
    return {0: hit * (s.g.reshape(shape) / hit.sum(axes))}


@vjp("ReduceProd")
def _reduce_prod(s: Site) -> Adjoints:
    return {0: _kept(s, s.g * s.y()) / s.x()}


@vjp("ReduceL1")
def _reduce_l1(s: Site) -> Adjoints:
    return {0: _kept(s, s.g) * s.x().apply("Sign")}


@vjp("ReduceL2")
def _reduce_l2(s: Site) -> Adjoints:
    return {0: s.x() * _kept(s, s.g / s.y())}


@vjp("ReduceSumSquare")
def _reduce_sum_square(s: Site) -> Adjoints:
    return {0: s.x() * _kept(s, s.g * 2.0)}


@vjp("ReduceLogSum")
def _reduce_log_sum(s: Site) -> Adjoints:
    return {0: _kept(s, s.g / s.y().apply("Exp")).expand(s.shape())}


@vjp("ReduceLogSumExp")
def _reduce_log_sum_exp(s: Site) -> Adjoints:
    return {0: _kept(s, s.g) * (s.x() - _kept(s, s.y())).apply("Exp")}


@vjp("GlobalAveragePool")
def _global_average(s: Site) -> Adjoints:
    return {0: (s.g * (1 / prod(s.shape()[2:]))).expand(s.shape())}


# -- softmax --------------------------------------------------------------------------------------------------------


def softmax_axes(s: Site) -> list[int]:
    """The axes over which a Softmax runs: all from ``axis`` on before opset 13."""
    rank = len(s.shape())
    return list(range(s.axis(1), rank)) if s.op.version < 13 and not s.op.domain else [s.axis(-1)]


@vjp("Softmax")
def _softmax(s: Site) -> Adjoints:
    y, g = s.y(), s.g
    share = g * y
    return {0: share - y * share.sum(softmax_axes(s))}


@vjp("LogSoftmax")
def _log_softmax(s: Site) -> Adjoints:
    return {0: s.g - s.y().apply("Exp") * s.g.sum(softmax_axes(s))}


# -- normalisation --------------------------------------------------------------------------------------------------


def standardised(x: Value, axes: Sequence[int], epsilon: float, *, centred: bool) -> tuple[Value, Value]:
    """``(x - mean) / deviation`` over axes, and ``1 / deviation``; without the mean where not ``centred``."""
    middle = x - x.mean(axes) if centred else x
    inverse = 1.0 / ((middle * middle).mean(axes) + epsilon).apply("Sqrt")
    return middle * inverse, inverse


def standardise_vjp(g: Value, unit: Value, inverse: Value, axes: Sequence[int], *, centred: bool) -> Value:
    """The adjoint of x under :func:`standardised`, from that of its result (Ba et al., Layer Normalization, 2016)."""
    left = g - unit * (g * unit).mean(axes)
    return (left - g.mean(axes) if centred else left) * inverse


@vjp("LayerNormalization RMSNormalization SimplifiedLayerNormalization")
def _layer_norm(s: Site) -> Adjoints:
    return _scaled_norm(s, s.x(), [0], 1, 2, s.g)


@vjp("com.microsoft::SkipLayerNormalization com.microsoft::SkipSimplifiedLayerNormalization")
def _skip_layer_norm(s: Site) -> Adjoints:
    """norm(x + skip + bias): the sum may be a second result."""
    simplified = "Simplified" in s.op.op_type
    bias = 3 if simplified else 4
    terms = [slot for slot in (0, 1, bias) if s.has(slot)]
    x = s.x()
    for slot in terms[1:]:
        x = x + s.x(slot)
    first, *others = s.grads
    summed = others[2] if len(others) > 2 else None
    if any(other is not None for other in others[:2]):
        raise NoGradientError("the loss depends on a statistic that it gives")
    if first is None:
        return {} if summed is None else {slot: summed.unbroadcast(s.shape(slot)) for slot in s.wanted}
    found = dict(_scaled_norm(s, x, terms, 2, -1 if simplified else 3, first))
    if summed is not None:
        found = {
            slot: g + summed.unbroadcast(s.shape(slot)) if slot in terms else g for slot, g in found.items()
        }
    return found


def _scaled_norm(s: Site, x: Value, terms: list[int], scale: int, bias: int, g: Value) -> Adjoints:
    axis = s.attribute("axis", -1) % x.rank
    axes = list(range(axis, x.rank))
    centred = "RMS" not in s.op.op_type and "Simplified" not in s.op.op_type
    unit, inverse = standardised(x, axes, s.attribute("epsilon", 1e-5), centred=centred)
    found: dict[int, Value] = {}
    if s.wanted & set(terms):
        inner = g * s.x(scale) if s.has(scale) else g
        adjoint = standardise_vjp(inner, unit, inverse, axes, centred=centred)
        found = {slot: adjoint.unbroadcast(s.shape(slot)) for slot in terms if s.wants(slot)}
    if s.wants(scale):
        found[scale] = (g * unit).unbroadcast(s.shape(scale))
    if s.wants(bias):
        found[bias] = g.unbroadcast(s.shape(bias))
    return found


@vjp("GroupNormalization InstanceNormalization")
def _group_norm(s: Site) -> Adjoints:
    shape = s.shape()
    channels = shape[1]
    groups = int(s.attribute("num_groups", channels))
    split = (shape[0], groups, channels // groups * prod(shape[2:]))
    unit, inverse = standardised(s.x().reshape(split), [2], s.attribute("epsilon", 1e-5), centred=True)
    found: dict[int, Value] = {}
    if s.wants(0):
        scale = s.x(1).reshape((channels, *[1] * (len(shape) - 2)))
        inner = (s.g * scale).reshape(split)
        found[0] = standardise_vjp(inner, unit, inverse, [2], centred=True).reshape(shape)
    others = [0, *range(2, len(shape))]
    if s.wants(1):
        found[1] = (s.g * unit.reshape(shape)).sum(others, keepdims=False)
    if s.wants(2):
        found[2] = s.g.sum(others, keepdims=False)
    return found


@vjp("BatchNormalization")
def _batch_norm(s: Site) -> Adjoints:
    if s.attribute("training_mode", 0) or sum(output is not None for output in s.op.outputs) > 1:
        raise NoGradientError("it is in training mode: export the model for inference")
    rank = len(s.shape())
    across = [1, s.shape(1)[0], *[1] * (rank - 2)] if rank > 1 else [s.shape(1)[0]]
    inverse = 1.0 / (s.x(4) + s.attribute("epsilon", 1e-5)).apply("Sqrt")
    found: dict[int, Value] = {}
    if s.wants(0):
        found[0] = s.g * (s.x(1) * inverse).reshape(across)
    others = [a for a in range(rank) if a != (1 if rank > 1 else 0)]
    if s.wants(1) or s.wants(3) or s.wants(4):
        middle = (s.x() - s.x(3).reshape(across)) * s.g
        moved = middle.sum(others, keepdims=False) * inverse
        if s.wants(1):
            found[1] = moved
        if s.wants(4):
            found[4] = moved * s.x(1) * inverse * inverse * -0.5
    if s.wants(2) or s.wants(3):
        summed = s.g.sum(others, keepdims=False)
        found[2], found[3] = summed, -(summed * s.x(1) * inverse)
    return found


@vjp("LpNormalization")
def _lp_norm(s: Site) -> Adjoints:
    axes = [s.axis(-1)]
    if s.attribute("p", 2) == 1:
        x = s.x()
        size = x.apply("Abs").sum(axes)
        return {0: (s.g - x.apply("Sign") * (s.g * s.y()).sum(axes)) / size}
    x, y = s.x(), s.y()
    length = (x * x).sum(axes).apply("Sqrt")
    return {0: (s.g - y * (s.g * y).sum(axes)) / length}


@vjp("MeanVarianceNormalization")
def _mean_variance(s: Site) -> Adjoints:
    axes = [a % len(s.shape()) for a in s.attribute("axes", [0, 2, 3])]
    unit, inverse = standardised(s.x(), axes, 1e-9, centred=True)
    return {0: standardise_vjp(s.g, unit, inverse, axes, centred=True)}


@vjp("LRN")
def _lrn(s: Site) -> Adjoints:
    """y = x d^-beta, d = bias + alpha / size * S(x^2) with S the sum over a window of channels."""
    size = int(s.attribute("size"))
    alpha, beta, bias = s.attribute("alpha", 1e-4), s.attribute("beta", 0.75), s.attribute("bias", 1.0)
    x, g = s.x(), s.g
    channels = x.shape[1]
    window = np.zeros((channels, channels))
    for c in range(channels):
        window[c, max(0, c - (size - 1) // 2) : min(channels, c + size // 2 + 1)] = 1

    def over(matrix: np.ndarray, value: Value) -> Value:
        flat = value.reshape((value.shape[0], channels, prod(value.shape[2:])))
        return x.emitter.lift(matrix).matmul(flat).reshape(value.shape)

    d = over(window, x * x) * (alpha / size) + bias
    spread = over(window.T, g * x * d.power(-beta - 1.0))
    return {0: g * d.power(-beta) - x * spread * (2 * alpha * beta / size)}
