"""Networks to be timed, and times made up for their layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphprune.cost import counted_ops
from graphprune.costs import Widths
from graphprune.costs.layers import Layer, layer_of
from graphprune.network import Network
from graphprune.pipeline import analyze_ir
from tests.twins import parse

CONVS = """
agraph (float[2,3,12,12] x) => (float[2,10] y) {
  c1 = Conv <pads=[1,1,1,1]> (x, w1)
  b1 = BatchNormalization (c1, s1, t1, m1, v1)
  r1 = Relu (b1)
  c2 = Conv <pads=[1,1,1,1]> (r1, w2)
  a2 = Add (c2, r1)
  r2 = Relu (a2)
  p2 = MaxPool <kernel_shape=[2,2], strides=[2,2]> (r2)
  d3 = Conv <group=32, pads=[1,1,1,1]> (p2, w3)
  r3 = Relu (d3)
  g = GlobalAveragePool (r3)
  f = Flatten (g)
  y = Gemm <transB=1> (f, w4, b4)
}
"""


def convs() -> Network:
    rng = np.random.default_rng(0)
    shapes = {"w1": (32, 3, 3, 3), "w2": (32, 32, 3, 3), "w3": (32, 1, 3, 3), "w4": (10, 32), "b4": (10,)}
    shapes |= dict.fromkeys(("s1", "t1", "m1", "v1"), (32,))
    arrays = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}
    return analyze_ir(parse(CONVS, **arrays))


def times_of(layer: Layer, points: Sequence[tuple[int, ...]], threads: int) -> list[float]:
    """A made-up machine: a fixed part, and a product of the sizes; ragged sizes cost half as much again."""
    return [
        1e-5 + 1e-8 * float(np.prod(p)) * 1.5 ** any(n % c.block for n, c in zip(p, layer.cuts, strict=True))
        for p in points
    ]


class Measurer:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, layer: Layer, points: Sequence[tuple[int, ...]], threads: int) -> list[float]:
        self.calls += 1
        return times_of(layer, points, threads)


def first_layer(network: Network) -> Layer:
    widths = Widths(network)
    found = (layer_of(op, widths, block=8) for op in counted_ops(network.analysis))
    return next(layer for layer in found if layer is not None and len(layer.cuts) == 2)
