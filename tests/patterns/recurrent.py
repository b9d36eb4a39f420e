"""Recurrent networks: the hidden size goes from the gates' weights, the recurrence, the biases and the states."""

from __future__ import annotations

from typing import Any

import numpy as np

from .builder import Builder, family

PATTERNS, pattern = family()

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
INPUT = "a graph input keeps its shape"
OUTPUT = "a graph output keeps its shape"


def layer(
    b: Builder,
    kind: str,
    name: str,
    x: str,
    cin: int,
    hidden: int,
    *extra: Any,
    both: bool = False,
    **kw: Any,
) -> list[str]:
    """One layer on (s, b, cin): [Y, Y_h, ...]. Weights <name>.w, <name>.r, <name>.b with a direction axis first."""
    directions, gates = 1 + both, GATES[kind]
    w = b.weight(f"{name}.w", directions, gates * hidden, cin, fan=cin)
    r = b.weight(f"{name}.r", directions, gates * hidden, hidden, fan=hidden)
    bias = b.vector(f"{name}.b", directions, 2 * gates * hidden)
    direction = kw.pop("direction", "bidirectional" if both else "forward")
    outs = 3 if kind == "LSTM" else 2
    return b.ops(kind, outs, x, w, r, bias, *extra, hidden_size=hidden, direction=direction, **kw)


def sequence(b: Builder, c: int) -> str:
    """(2, 5, 10) through Linear `embed`, then time first: (5, 2, c)."""
    return b.transpose(b.op("Tanh", b.linear("embed", b.input("x", (2, 5, 10)), 10, c)), 1, 0, 2)


def last(b: Builder, x: str, c: int) -> None:
    """The last step of (s, b, c) through the head."""
    b.vector_head(b.gather(x, -1, 0), c)


@pattern("embed.w:1 l1.w:1 l1.w:2 l1.r:1 l1.r:2 l1.b:1 head.w:1")
def gru(b: Builder) -> None:
    y, _ = layer(b, "GRU", "l1", sequence(b, 12), 12, 16, linear_before_reset=1)
    last(b, b.op("Squeeze", y, [1]), 16)


@pattern("embed.w:1 l1.w:1 l1.w:2 l1.r:1 l1.r:2 l1.b:1 head.w:1")
def gru_reset_first(b: Builder) -> None:
    y, _ = layer(b, "GRU", "l1", sequence(b, 12), 12, 16, linear_before_reset=0, direction="reverse")
    b.vector_head(b.gather(b.op("Squeeze", y, [1]), 0, 0), 16)


@pattern("embed.w:1 l1.w:1 l1.w:2 l1.r:1 l1.r:2 l1.b:1 h0:2 c0:2 head.w:1")
def lstm(b: Builder) -> None:
    """With learnt first states, and zeros for the cell's."""
    states = (None, b.vector("h0", 1, 2, 16), b.vector("c0", 1, 2, 16))
    y, _, _ = layer(b, "LSTM", "l1", sequence(b, 12), 12, 16, *states)
    last(b, b.op("Squeeze", y, [1]), 16)


@pattern("embed.w:1 l1.w:1 l1.r:2 l1.p:1 head.w:1")
def lstm_with_peepholes(b: Builder) -> None:
    zeros = b.const(np.zeros((1, 2, 16), np.float32))
    extra = (None, zeros, zeros, b.vector("l1.p", 1, 48))
    y, _, _ = layer(b, "LSTM", "l1", sequence(b, 12), 12, 16, *extra)
    last(b, b.op("Squeeze", y, [1]), 16)


@pattern("embed.w:1 l1.w:1 l1.w:2 l1.r:1 l1.r:2 head.w:1")
def rnn_last_state(b: Builder) -> None:
    """What is read is Y_h, not Y."""
    _, h = layer(b, "RNN", "l1", sequence(b, 12), 12, 16, activations=["Tanh"])
    b.vector_head(b.op("Squeeze", h, [0]), 16)


BIDIRECTIONAL = "embed.w:1 l1.w:1 l1.w:2 l1.r:1 l1.r:2 l1.b:1 head.w:1"


@pattern(BIDIRECTIONAL)
def bidirectional_gru(b: Builder) -> None:
    """Each direction has hidden units of its own: (s, d, b, h) -> (s, b, d h)."""
    y, _ = layer(b, "GRU", "l1", sequence(b, 12), 12, 16, both=True, linear_before_reset=1)
    last(b, b.reshape(b.transpose(y, 0, 2, 1, 3), 5, 2, 32), 32)


@pattern(BIDIRECTIONAL + " l2.w:1 l2.w:2 l2.r:1 l2.r:2 l2.b:1")
def stacked_bidirectional_lstm(b: Builder) -> None:
    """torch's nn.LSTM(num_layers=2, bidirectional=True): the second layer reads both directions of the first."""
    x = sequence(b, 12)
    for name, cin in (("l1", 12), ("l2", 32)):
        y = layer(b, "LSTM", name, x, cin, 16, both=True)[0]
        x = b.reshape(b.transpose(y, 0, 2, 1, 3), 0, 0, -1)
    last(b, x, 32)


@pattern("embed.w:1 l1.w:1 l1.w:2 l1.r:1 l1.r:2 l2.w:1 l2.w:2 l2.r:1 l2.r:2 l2.b:1 head.w:1")
def stacked_lstm(b: Builder) -> None:
    x = b.op("Squeeze", layer(b, "LSTM", "l1", sequence(b, 12), 12, 16)[0], [1])
    last(b, b.op("Squeeze", layer(b, "LSTM", "l2", x, 16, 12)[0], [1]), 12)


@pattern("embed.w:1 l1.w:2", {"l1.w:1": OUTPUT, "l1.r:2": OUTPUT})
def state_is_an_output(b: Builder) -> None:
    """A streaming model: the last state leaves the graph, so the hidden size stays."""
    y, h = layer(b, "GRU", "l1", sequence(b, 12), 12, 16)
    last(b, b.op("Squeeze", y, [1]), 16)
    b.output(h)


@pattern("c1.w:0 l1.w:2 l1.w:1 head.w:1")
def crnn(b: Builder) -> None:
    """Text recognition: a conv's channels and rows become the features of a recurrent layer."""
    x = b.relu(b.conv("c1", b.input("x", (2, 3, 4, 5)), 3, 8))
    x = b.transpose(b.reshape(x, 2, 32, 5), 2, 0, 1)
    last(b, b.op("Squeeze", layer(b, "GRU", "l1", x, 32, 16)[0], [1]), 16)


@pattern("embed.w:1 first.w:1 l1.w:1 l1.r:1 l1.r:2 head.w:1")
def first_state_from_a_linear(b: Builder) -> None:
    x = sequence(b, 12)
    state = b.op("Tanh", b.linear("first", b.gather(x, 0, 0), 12, 16))
    y, _ = layer(b, "GRU", "l1", x, 12, 16, None, b.op("Unsqueeze", state, [0]))
    last(b, b.op("Squeeze", y, [1]), 16)
