"""Moment rules of ops that fix moments, and of those that average over space."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphprune.layers.contractions import Contraction, find_contraction
from graphprune.repair.moments.features import features_of
from graphprune.repair.moments.registry import Found, Site, rule
from graphprune.repair.moments.signals import MAX_CHANNELS, Channels, Float64, Signal


@rule("Conv Gemm MatMul")
def _linear(site: Site) -> Found:
    contraction = find_contraction(site.op)
    if not isinstance(contraction, Contraction):
        return None
    found = features_of(contraction, site.signals[contraction.activation])
    output = contraction.output.shape
    if found is None or output is None:
        return None
    weight = np.asarray(site.constant(contraction.weight), dtype=np.float64)
    form = contraction.form
    matrices = form.arrange(weight) * form.scale
    outputs = matrices.shape[0] * matrices.shape[2]
    if outputs > MAX_CHANNELS:
        return None
    moments = found.moments
    mean = np.einsum("gfo,gf->go", matrices, found.share * moments.mean[found.channel]).ravel()
    covariance = found.covariance_of(matrices)
    unknown = (matrices != 0) & ~moments.known[found.channel][:, :, None]
    if contraction.bias_tensor is not None and contraction.bias is not None:
        bias = site.constant(contraction.bias)
        if bias is None or bias.size not in (1, outputs):
            return None
        mean = mean + float(site.op.attributes.get("beta", 1.0)) * bias.astype(np.float64).ravel()
    if site.op.kind == "Conv":
        axis = 1
    else:
        axis = len(output) - (2 if getattr(form, "transposed_result", False) else 1)
    return Signal.of(Channels(mean, covariance, ~unknown.any(axis=1).ravel()), axis)


@rule("BatchNormalization")
def _batch_norm(site: Site) -> Found:
    """Mean ``beta`` and deviation ``|gamma|`` (less what epsilon takes), whatever comes in; filters correlate it."""
    scale, shift, _, variance = (site.constant(slot) for slot in range(1, 5))
    rank = len(site.shape())
    if scale is None or shift is None or variance is None or rank < 2:
        return None
    if site.op.attributes.get("training_mode", 0) or len(scale) > MAX_CHANNELS:
        return None
    variance = np.maximum(variance.astype(np.float64), 0.0)
    part = np.sqrt(variance / (variance + float(site.op.attributes.get("epsilon", 1e-5))))
    return _normalised(site, scale.astype(np.float64) * part, shift.astype(np.float64))


@rule("InstanceNormalization")
def _instance_norm(site: Site) -> Found:
    """Mean ``beta`` and deviation ``|gamma|`` in each sample."""
    scale, shift = site.constant(1), site.constant(2)
    if scale is None or shift is None or len(scale) > MAX_CHANNELS:
        return None
    return _normalised(site, scale.astype(np.float64), shift.astype(np.float64))


def _normalised(site: Site, scale: Float64, shift: Float64) -> Signal:
    signal = site.signal
    correlation = np.eye(len(scale))
    if signal is not None and signal.axis == 1 and signal.plain and len(signal.channel) == len(scale):
        correlation = signal.moments.correlation.copy()
        np.fill_diagonal(correlation, 1.0)
    covariance = correlation * np.outer(scale, scale)
    return Signal.of(Channels(shift, covariance, np.ones(len(scale), dtype=bool)), 1)


@rule("GlobalAveragePool AveragePool ReduceMean Resize Upsample")
def _averaged(site: Site) -> Found:
    """The mean stays; so do, as positions of one sample are alike, the covariances."""
    signal, rank = site.signal, len(site.shape())
    if signal is None:
        return None
    axis = signal.axis
    if site.op.kind == "ReduceMean":
        axes = site.constant(1) if len(site.op.inputs) > 1 else site.op.attributes.get("axes")
        reduced = [int(i) % rank for i in (range(rank) if axes is None else np.asarray(axes).ravel())]
        if axis in reduced:
            return None
        if not site.op.attributes.get("keepdims", 1):
            axis -= sum(i < axis for i in reduced)
    elif len(site.out_shape) != rank or site.shape()[axis] != site.out_shape[axis]:
        return None
    averaged = signal.moments
    if site.op.kind == "AveragePool" and _zeros_count(site):
        averaged = replace(averaged, known=np.zeros_like(averaged.known))
    return Signal(averaged, axis, signal.channel, signal.place)


def _zeros_count(site: Site) -> bool:
    padded = site.op.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    padded = padded or any(site.op.attributes.get("pads") or ())
    return padded and bool(site.op.attributes.get("count_include_pad", 0))


@rule("MaxPool GlobalMaxPool LpPool")
def _largest(site: Site) -> Found:
    """The mean rises by an amount that no stored statistic tells; channels that were alike stay so."""
    signal = site.signal
    if signal is None or len(site.out_shape) != len(site.shape()):
        return None
    moments = signal.moments
    moments = replace(moments, known=np.zeros_like(moments.known))
    found = Signal(moments, signal.axis, signal.channel, signal.place)
    return [found]
