"""Moment rules of elementwise ops: run on quadrature nodes, or combined as if independent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphprune.graph import Op
from graphprune.graph.evaluate import run_onnxruntime, run_reference
from graphprune.kernels import gaussian
from graphprune.repair.moments.registry import Found, Site, rule
from graphprune.repair.moments.signals import Array, Channels, Float64, Signal
from graphprune.rules.elementwise import BROADCAST, UNARY


def _elementwise(site: Site) -> Found:
    """The op itself on the quadrature nodes, where all that it reads is one function of one Gaussian and constants."""
    rank = len(site.out_shape)
    given = [signal for signal in site.signals if signal is not None]
    if not given or rank < 2:
        return None
    for tensor, signal in zip(site.op.inputs, site.signals, strict=True):
        if tensor is not None and not tensor.constant and signal is None:
            return None
    axes = {
        signal.axis + rank - len(site.shape(slot))
        for slot, signal in enumerate(site.signals)
        if signal is not None
    }
    first = given[0]
    if len(axes) > 1 or any(
        not np.array_equal(s.channel, first.channel) or not np.array_equal(s.place, first.place)
        for s in given
    ):
        return None
    if any(signal.base is not first.base for signal in given):
        return _independent(site, given, axes.pop())
    axis = axes.pop()
    values = _on_nodes(site, axis, rank)
    if values is None or not np.isfinite(values).all():
        return None
    return replace(first, axis=axis, values=values)


def _on_nodes(site: Site, axis: int, rank: int) -> Float64 | None:
    """``[c, nodes]`` the op's result, on nodes that lie along an axis of the tensor other than the channels'."""
    other = 0 if axis else 1
    order = [1, 0] if axis < other else [0, 1]
    arrays: list[Array | None] = []
    for slot, tensor in enumerate(site.op.inputs):
        signal = site.signals[slot]
        if tensor is None:
            arrays.append(None)
            continue
        if signal is None:
            constant = site.constant(slot)
            if constant is None:
                return None
            skip = rank - constant.ndim
            if any(size != 1 and skip + i != axis for i, size in enumerate(constant.shape)):
                return None  # it differs from position to position
            arrays.append(constant)
            continue
        if tensor.dtype is None:
            return None
        block = np.expand_dims(signal.on_nodes.T, tuple(i for i in range(rank) if i not in (axis, other)))
        arrays.append(
            (block if order == [0, 1] else np.swapaxes(block, axis, other)).astype(tensor.dtype.numpy())
        )
    result = _single(site.op, arrays)
    if result is None or result.ndim != rank:
        return None
    if result.size != result.shape[axis] * result.shape[other] or result.shape[other] != len(gaussian.NODES):
        return None
    flat = np.moveaxis(result, (axis, other), (0, 1)).reshape(result.shape[axis], -1)
    signals = [signal for signal in site.signals if signal is not None]
    return flat.astype(np.float64) if len(flat) == len(signals[0].base.mean) else None


def _single(op: Op, arrays: list[Array | None]) -> Array | None:
    """One op on arrays of other sizes than the twin's."""
    for run in (run_onnxruntime, run_reference):
        try:
            return run(op, arrays)[0]
        except Exception:
            continue
    return None


def _independent(site: Site, given: list[Signal], axis: int) -> Found:
    """Sums and products of different Gaussians, as if these were independent."""
    if site.op.kind not in ("Add", "Sub", "Sum", "Mul") or len(given) < len(site.op.inputs):
        return None
    total = given[0].moments
    for signal in given[1:]:
        total = _combined(site.op.kind, total, signal.moments)
    return Signal(total, axis, given[0].channel, given[0].place)


def _combined(kind: str, a: Channels, b: Channels) -> Channels:
    known = a.known & b.known
    if kind == "Mul":
        covariance = (
            a.covariance * b.covariance
            + a.covariance * np.outer(b.mean, b.mean)
            + b.covariance * np.outer(a.mean, a.mean)
        )
        return Channels(a.mean * b.mean, covariance, known)
    return Channels(a.mean - b.mean if kind == "Sub" else a.mean + b.mean, a.covariance + b.covariance, known)


for _kind in (*UNARY.split(), *BROADCAST.split()):
    rule(_kind)(_elementwise)


@rule("Identity Cast Dropout")
def _same(site: Site) -> Found:
    output = site.op.outputs[0]
    if output is None or output.dtype is None or not output.dtype.is_floating_point():
        return None
    if site.op.kind == "Dropout" and len(site.op.inputs) > 2:
        training = site.tensor(2)
        if training is not None and (training.data is None or bool(training.data.any())):
            return None
    return site.signal
