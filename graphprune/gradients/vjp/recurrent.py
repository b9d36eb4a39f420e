"""Recurrent layers: back-propagation through time as a loop inside the graph.

The layer's own results give all hidden states, so that all gates are worked out at once; only what depends on the next
step runs in a loop (a Scan). Directions are separate layers over the same input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphprune.gradients.vjp.emit import NoGradientError, Shape, Value
from graphprune.gradients.vjp.site import Adjoints, Site, vjp

#: Activations of one direction that the rules below are the derivatives of.
_DEFAULTS = {"RNN": ["tanh"], "GRU": ["sigmoid", "tanh"], "LSTM": ["sigmoid", "tanh", "tanh"]}


@dataclass(frozen=True)
class _Layer:
    """One direction: time runs forward along axis 0 of ``x`` and ``h``."""

    x: Value  # S B I
    before: Value  # S B H: the hidden state that each step starts from
    h: Value  # S B H: and the one that it gives
    w: Value  # q H I
    r: Value  # q H H
    wb: Value  # q H
    rb: Value  # q H
    g: Value  # S B H: adjoint of h, step by step
    last: Value  # B H: adjoint of the last h
    c0: Value | None = None
    c_last: Value | None = None

    @property
    def hidden(self) -> int:
        return self.h.shape[-1]

    def gates(self, value: Value, count: int) -> list[Value]:
        """Split the last axis."""
        return [value.slice(value.rank - 1, k * self.hidden, (k + 1) * self.hidden) for k in range(count)]

    def rows(self, weight: Value, start: int, stop: int) -> Value:
        """Gates ``start`` to ``stop`` of a weight."""
        return weight.slice(0, start * self.hidden, stop * self.hidden)


@dataclass(frozen=True)
class _Back:
    """Adjoints of one direction."""

    at_x: Value  # S B qH: of what is added to x W^T
    w: Value
    r: Value
    wb: Value
    rb: Value
    h0: Value
    c0: Value | None = None


def _outer(left: Value, right: Value) -> Value:
    """Sum over steps and samples of ``left^T right``."""
    flat = [v.reshape((v.shape[0] * v.shape[1], v.shape[2])) for v in (left, right)]
    return flat[0].transpose([1, 0]).matmul(flat[1])


def _total(value: Value) -> Value:
    return value.sum([0, 1], keepdims=False)


def _rnn(a: _Layer) -> _Back:
    slope = 1.0 - a.h * a.h

    def body(states: list[Value], slices: list[Value]) -> tuple[list[Value], list[Value]]:
        z = (slices[0] + states[0]) * slices[1]
        return [z.matmul(a.r)], [z]

    (h0,), (z,) = a.x.emitter.scan([a.last], [a.g, slope], body, reverse=True)
    return _Back(z, _outer(z, a.x), _outer(z, a.before), _total(z), _total(z), h0)


def _lstm(a: _Layer) -> _Back:
    assert a.c0 is not None
    assert a.c_last is not None
    e = a.x.emitter
    z = a.x.matmul(a.w.transpose([1, 0])) + a.before.matmul(a.r.transpose([1, 0])) + a.wb + a.rb
    i, o, f, n = a.gates(z, 4)
    i, o, f, n = i.apply("Sigmoid"), o.apply("Sigmoid"), f.apply("Sigmoid"), n.apply("Tanh")

    def forward(states: list[Value], slices: list[Value]) -> tuple[list[Value], list[Value]]:
        c = slices[0] * states[0] + slices[1]
        return [c], [c]

    _, (c,) = e.scan([a.c0], [f, i * n], forward)
    steps = c.shape[0]
    first = a.c0.reshape((1, *a.c0.shape))
    before = e.concat([first, c.slice(0, 0, steps - 1)], 0) if steps > 1 else first
    t = c.apply("Tanh")
    slopes = [
        o * (1.0 - t * t),
        n * i * (1.0 - i),
        t * o * (1.0 - o),
        before * f * (1.0 - f),
        i * (1.0 - n * n),
    ]

    def body(states: list[Value], slices: list[Value]) -> tuple[list[Value], list[Value]]:
        g, by_cell, by_i, by_o, by_f, by_n, keep = slices
        h = g + states[0]
        cell = h * by_cell + states[1]
        back = g.emitter.concat([cell * by_i, h * by_o, cell * by_f, cell * by_n], 1)
        return [back.matmul(a.r), cell * keep], [back]

    (h0, c0), (back,) = e.scan([a.last, a.c_last], [a.g, *slopes, f], body, reverse=True)
    return _Back(back, _outer(back, a.x), _outer(back, a.before), _total(back), _total(back), h0, c0)


def _gru(a: _Layer, *, after: bool) -> _Back:
    """``after``: the reset gate is applied behind the product with the recurrent weight."""
    e = a.x.emitter
    x = a.x.matmul(a.w.transpose([1, 0])) + a.wb
    inner = a.before.matmul(a.r.transpose([1, 0])) + a.rb
    (xz, xr, xn), (hz, hr, hn) = a.gates(x, 3), a.gates(inner, 3)
    z, r = (xz + hz).apply("Sigmoid"), (xr + hr).apply("Sigmoid")
    own = a.rows(a.r, 2, 3)
    if after:
        n = (xn + r * hn).apply("Tanh")
        reset = hn * r * (1.0 - r)
    else:
        bias = a.rb.slice(0, 2 * a.hidden, 3 * a.hidden)
        n = (xn + (r * a.before).matmul(own.transpose([1, 0])) + bias).apply("Tanh")
        reset = a.before * r * (1.0 - r)
    slopes = [(a.before - n) * z * (1.0 - z), (1.0 - z) * (1.0 - n * n), reset, r, z]

    def body(states: list[Value], slices: list[Value]) -> tuple[list[Value], list[Value]]:
        g, by_z, by_n, by_r, gate, keep = slices
        h = g + states[0]
        dz, dn = h * by_z, h * by_n
        join = g.emitter.concat
        if after:
            dr, inside = dn * by_r, dn * gate
            back = h * keep + join([dz, dr, inside], 1).matmul(a.r)
        else:
            inside = dn.matmul(own)
            dr = inside * by_r
            back = h * keep + join([dz, dr], 1).matmul(a.rows(a.r, 0, 2)) + inside * gate
        return [back], [join([dz, dr, dn], 1)]

    (h0,), (back,) = e.scan([a.last], [a.g, *slopes], body, reverse=True)
    dz, dr, dn = a.gates(back, 3)
    if after:
        recurrent = e.concat([dz, dr, dn * r], 2)
        by_r = _outer(recurrent, a.before)
    else:
        recurrent = back
        by_r = e.concat([_outer(e.concat([dz, dr], 2), a.before), _outer(dn, r * a.before)], 0)
    return _Back(back, _outer(back, a.x), by_r, _total(back), _total(recurrent), h0)


def _check(s: Site, kind: str, directions: int) -> None:
    names = s.attribute("activations")
    if names is not None:
        spelled = [(n.decode() if isinstance(n, bytes) else str(n)).lower() for n in names]
        if spelled != _DEFAULTS[kind] * directions:
            raise NoGradientError(f"its activations are {', '.join(spelled)}")
    if s.attribute("clip") is not None:
        raise NoGradientError("it clips its gates")
    if s.attribute("input_forget", 0):
        raise NoGradientError("it couples its input and forget gates")
    if kind == "LSTM" and s.has(7):
        raise NoGradientError("it has peepholes")
    if s.has(4):
        steps = s.shape()[1 if s.attribute("layout", 0) else 0]
        lengths = s.literal(4)
        if lengths is None or not (lengths == steps).all():
            raise NoGradientError("its sequences have lengths of their own")


@vjp("RNN GRU LSTM")
def _recurrent(s: Site) -> Adjoints:
    kind, e = s.op.op_type, s.e
    w, r = s.x(1), s.x(2)
    directions, hidden = w.shape[0], r.shape[2]
    _check(s, kind, directions)
    batch_first = bool(s.attribute("layout", 0))
    x = s.x().transpose([1, 0, 2]) if batch_first else s.x()
    steps, batch, _ = x.shape
    cell = kind == "LSTM"

    def state(slot: int) -> Value:
        """An initial state, D B H."""
        if not s.has(slot):
            return e.zeros((directions, batch, hidden))
        return s.x(slot).transpose([1, 0, 2]) if batch_first else s.x(slot)

    def grad(slot: int, shape: Shape, perm: list[int]) -> Value:
        found = s.grads[slot] if slot < len(s.grads) else None
        if found is None:
            return e.zeros(shape)
        return found.transpose(perm) if batch_first else found

    whole = (steps, directions, batch, hidden)
    outer = grad(0, whole, [1, 2, 0, 3])
    outer_last = grad(1, whole[1:], [1, 0, 2])
    outer_cell = grad(2, whole[1:], [1, 0, 2])
    states, cells = state(5), state(6) if cell else None
    y = _states(s, whole, batch_first)
    results = []
    for d in range(directions):
        backward = d == 1 or s.attribute("direction", "forward") in ("reverse", b"reverse")

        def ordered(value: Value, flip: bool = backward) -> Value:
            return value.take(np.arange(steps)[::-1], 0) if flip and steps > 1 else value

        def part(value: Value, axis: int = 0, d: int = d) -> Value:
            return value.slice(axis, d, d + 1).reshape((*value.shape[:axis], *value.shape[axis + 1 :]))

        h = ordered(part(y, 1))
        h0 = part(states)
        first = h0.reshape((1, *h0.shape))
        bias = part(s.x(3)) if s.has(3) else e.zeros((2 * w.shape[1],))
        layer = _Layer(
            ordered(x),
            e.concat([first, h.slice(0, 0, steps - 1)], 0) if steps > 1 else first,
            h,
            part(w),
            part(r),
            bias.slice(0, 0, w.shape[1]),
            bias.slice(0, w.shape[1], 2 * w.shape[1]),
            ordered(part(outer, 1)),
            part(outer_last),
            part(cells) if cells is not None else None,
            part(outer_cell) if cell else None,
        )
        if kind == "GRU":
            back = _gru(layer, after=bool(s.attribute("linear_before_reset", 0)))
        else:
            back = _lstm(layer) if cell else _rnn(layer)
        results.append((back, ordered(back.at_x.matmul(layer.w))))
    return _assembled(s, [b for b, _ in results], [x for _, x in results], batch_first)


def _states(s: Site, shape: Shape, batch_first: bool) -> Value:
    """All hidden states, S D B H; the layer is run again where they are no result of it."""
    if s.op.outputs[0] is not None:
        y = s.y()
    else:
        inputs = [None if tensor is None else s.values(tensor) for tensor in s.op.inputs]
        stored = (shape[2], shape[0], shape[1], shape[3]) if batch_first else shape
        y = s.e.op(s.op.op_type, inputs, stored, **dict(s.op.attributes))
    return y.transpose([1, 2, 0, 3]) if batch_first else y


def _assembled(s: Site, backs: list[_Back], xs: list[Value], batch_first: bool) -> Adjoints:
    """Adjoints of the op's inputs from those of its directions."""

    def stacked(values: list[Value]) -> Value:
        return s.e.concat([v.reshape((1, *v.shape)) for v in values], 0)

    x = xs[0] if len(xs) == 1 else s.e.total(xs)
    found = {
        0: x.transpose([1, 0, 2]) if batch_first else x,
        1: stacked([b.w for b in backs]),
        2: stacked([b.r for b in backs]),
        3: stacked([s.e.concat([b.wb, b.rb], 0) for b in backs]),
        5: stacked([b.h0 for b in backs]),
    }
    cells = [b.c0 for b in backs if b.c0 is not None]
    if cells:
        found[6] = stacked(cells)
    for slot in (5, 6):
        if batch_first and slot in found:
            found[slot] = found[slot].transpose([1, 0, 2])
    return found
