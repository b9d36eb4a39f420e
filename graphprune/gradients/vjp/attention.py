"""Attention as one op, and rotary positions."""

from __future__ import annotations

from math import sqrt

import numpy as np

from graphprune.gradients.vjp.emit import NoGradientError, Value
from graphprune.gradients.vjp.site import Adjoints, Site, vjp


@vjp("RotaryEmbedding com.microsoft::RotaryEmbedding")
def _rotary(s: Site) -> Adjoints:
    """Pairs are turned by an angle; the adjoint turns them back: the same op with the sine's sign changed."""
    sine = 3 if s.op.domain else 2
    if s.wanted - {0}:
        raise NoGradientError("its tables depend on what is to be removed")
    inputs = [None if tensor is None else s.values(tensor) for tensor in s.op.inputs]
    inputs[0], inputs[sine] = s.g, -s.x(sine)
    return {0: s.e.op(s.op.op_type, inputs, s.shape(), s.op.domain, **dict(s.op.attributes))}


@vjp("Attention")
def _attention(s: Site) -> Adjoints:
    """Y = P V, P = softmax(scale Q K^T + bias); the probabilities are worked out anew."""
    if s.attribute("softcap", 0.0):
        raise NoGradientError("it caps its scores")
    if any(s.has(slot) for slot in (4, 5, 6)):
        raise NoGradientError("it reads a cache")
    if max(s.attribute("left_window_size", -1), s.attribute("right_window_size", -1)) >= 0:
        raise NoGradientError("it looks through a window")
    if s.wanted - {0, 1, 2}:
        raise NoGradientError("its mask depends on what is to be removed")
    heads = [s.attribute("q_num_heads"), s.attribute("kv_num_heads"), s.attribute("kv_num_heads")]
    q, k, v = (_by_head(s.x(slot), heads[slot]) for slot in range(3))
    g = _by_head(s.g, heads[0])
    share = q.shape[1] // k.shape[1]
    scale = float(s.attribute("scale") or 1 / sqrt(q.shape[-1]))
    keys, values = _repeated(k, share), _repeated(v, share)
    p = _probabilities(s, q.matmul(keys.swapped()) * scale)
    found: dict[int, Value] = {}
    if s.wants(2):
        found[2] = _summed(p.swapped().matmul(g), share)
    if s.wanted & {0, 1}:
        at_p = p * g.matmul(values.swapped())
        scores = (at_p - p * at_p.sum([3])) * scale
        if s.wants(0):
            found[0] = scores.matmul(keys)
        if s.wants(1):
            found[1] = _summed(scores.swapped().matmul(q), share)
    return {slot: _as_given(value, s.shape(slot)) for slot, value in found.items()}


def _by_head(x: Value, heads: int | None) -> Value:
    """(b, s, h d) -> (b, h, s, d)."""
    if x.rank == 4:
        return x
    if heads is None:
        raise NoGradientError("it does not say how many heads there are")
    b, s, width = x.shape
    return x.reshape((b, s, heads, width // heads)).transpose([0, 2, 1, 3])


def _as_given(x: Value, shape: tuple[int, ...]) -> Value:
    return x if len(shape) == 4 else x.transpose([0, 2, 1, 3]).reshape(shape)


def _repeated(x: Value, share: int) -> Value:
    """Each head of keys or values serves as many heads of queries, one behind the other."""
    b, h, s, d = x.shape
    if share == 1:
        return x
    return x.reshape((b, h, 1, s, d)).expand((b, h, share, s, d)).reshape((b, h * share, s, d))


def _summed(x: Value, share: int) -> Value:
    """The adjoint of :func:`_repeated`."""
    b, h, s, d = x.shape
    if share == 1:
        return x
    return x.reshape((b, h // share, share, s, d)).sum([2], keepdims=False)


def _probabilities(s: Site, scores: Value) -> Value:
    """Softmax over the last axis, masked."""
    e = s.e
    least = float(np.finfo(e.dtype).min) / 4
    if s.has(3):
        mask, tensor = s.x(3), s.tensor(3)
        if mask.shape[-1] != scores.shape[-1]:
            raise NoGradientError("its mask is shorter than its keys")
        boolean = tensor is not None and tensor.dtype is not None and not tensor.dtype.is_floating_point()
        scores = e.where(mask, scores, least) if boolean else scores + mask
    if s.attribute("is_causal", 0):
        seen = np.tril(np.ones(scores.shape[-2:], dtype=bool))
        scores = e.where(e.literal(seen), scores, least)
    return e.op("Softmax", [scores], scores.shape, axis=3)
