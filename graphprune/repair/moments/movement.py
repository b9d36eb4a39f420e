"""Moment rules of ops that move elements: they are run on the numbers of channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphprune.graph.evaluate import run_reference
from graphprune.repair.moments.registry import Found, Site, rule
from graphprune.repair.moments.signals import MAX_CHANNELS, Array, Channels, Ints, Signal

#: Ops that move elements are run on the channels' numbers, for tensors up to this size.
MAX_ELEMENTS = 1 << 24


@rule(
    "Reshape Flatten Transpose Squeeze Unsqueeze Slice Split Gather Pad Expand Tile DepthToSpace SpaceToDepth"
)
def _moved(site: Site) -> Found:
    """The op itself on the channels' numbers; where they then lie along one axis, it is known what lies there.

    (Along two, as in the middle of a channel shuffle, nothing is.)
    """
    signal, shape = site.signal, site.shape()
    if signal is None or int(np.prod(shape)) > MAX_ELEMENTS:
        return None
    others = list(shape)
    others[signal.axis] = 1
    place = np.arange(int(np.prod(others))).reshape(others) * (int(signal.place.max(initial=0)) + 1)
    lay = [1] * len(shape)
    lay[signal.axis] = -1
    numbers = [
        np.broadcast_to(signal.channel.reshape(lay), shape),
        place + np.broadcast_to(signal.place.reshape(lay), shape),
    ]
    moved = [_moved_numbers(site, array) for array in numbers]
    if moved[0] is None or moved[1] is None:
        return None
    return [_laid(signal, channel, where) for channel, where in zip(moved[0], moved[1], strict=True)]


def _moved_numbers(site: Site, numbers: Array) -> list[Array] | None:
    arrays: list[Array | None] = [np.ascontiguousarray(numbers)]
    for slot in range(1, len(site.op.inputs)):
        constant = site.constant(slot)
        if constant is None and site.tensor(slot) is not None:
            return None
        arrays.append(constant)
    if site.op.kind == "Pad":
        if site.op.attributes.get("mode", "constant") != "constant" or _filling(site) != 0:
            return None
        filling = np.array(-1, dtype=np.int64)
        if len(arrays) < 2:
            return None  # pads as an attribute, with a float filling: opsets before 11
        arrays = [*arrays[:2], filling, *arrays[3:]]
    try:
        return [np.asarray(array) for array in run_reference(site.op, arrays)]
    except Exception:  # a reference op may raise anything; then nothing is known
        return None


def _filling(site: Site) -> float:
    constant = site.constant(2)
    return 0.0 if constant is None or not constant.size else float(constant.ravel()[0])


def _laid(signal: Signal, channel: Array, place: Array) -> Signal | None:
    """Where channels lie after a move; None if not along one axis."""
    varying = [
        axis
        for axis, size in enumerate(channel.shape)
        if size > 1 and (channel != np.take(channel, [0], axis=axis)).any()
    ]
    if len(varying) > 1 or not channel.size:
        return None
    axis = varying[0] if varying else min(signal.axis, channel.ndim - 1)
    line = tuple(slice(None) if i == axis else 0 for i in range(channel.ndim))
    return _reindexed(signal, axis, channel[line].astype(np.int64), place[line].astype(np.int64))


def _reindexed(signal: Signal, axis: int, channel: Ints, place: Ints) -> Signal | None:
    """A signal with other channels at its positions; -1: zeros."""
    if len(channel) == len(signal.base.mean) and np.array_equal(channel, np.arange(len(channel))):
        return replace(signal, axis=axis, channel=channel, place=np.zeros_like(channel))
    moments = signal.moments
    holes = channel < 0
    if not holes.any() and len(np.unique(channel)) < len(channel):
        return replace(signal, axis=axis, channel=channel, place=place)
    if len(np.unique(channel[~holes])) < int((~holes).sum()):
        return None
    index = np.where(holes, 0, channel)
    mean = np.where(holes, 0.0, moments.mean[index])
    covariance = np.where(holes[:, None] | holes, 0.0, moments.covariance[np.ix_(index, index)])
    base = Channels(mean, covariance, moments.known[index] | holes)
    if signal.values is None:
        return Signal.of(base, axis)
    # The function goes on; its Gaussian is taken along.
    inner = signal.base
    inner = Channels(
        np.where(holes, 0.0, inner.mean[index]),
        np.where(holes[:, None] | holes, 0.0, inner.covariance[np.ix_(index, index)]),
        base.known,
    )
    values = np.where(holes[:, None], 0.0, signal.values[index])
    return replace(Signal.of(inner, axis), values=values)


@rule("Concat")
def _joined(site: Site) -> Found:
    """Channels side by side, those of different inputs independent."""
    rank = len(site.out_shape)
    axis = int(site.op.attributes.get("axis", 1)) % max(rank, 1)
    given = [signal for signal in site.signals if signal is not None]
    if not given or len(given) < len(site.signals) or any(s.axis != axis or not s.plain for s in given):
        return None
    parts = [signal.moments for signal in given]
    sizes = np.cumsum([0, *(len(part.mean) for part in parts)])
    if sizes[-1] > MAX_CHANNELS:
        return None
    covariance = np.zeros((int(sizes[-1]), int(sizes[-1])))
    for start, stop, part in zip(sizes, sizes[1:], parts, strict=False):
        covariance[start:stop, start:stop] = part.covariance
    return Signal.of(
        Channels(
            np.concatenate([part.mean for part in parts]),
            covariance,
            np.concatenate([part.known for part in parts]),
        ),
        axis,
    )
