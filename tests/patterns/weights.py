"""How weights reach their operators: shared, transposed, quantised, computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from .builder import Builder, family

PATTERNS, pattern = family()

OUTPUT = "a graph output keeps its shape"
INPUT = "a graph input keeps its shape"


@pattern(
    "stem.w:0 c1.w:0 c1.w:1 c2.w:0 c2.w:1 last.w:1",
    {"last.w:0": OUTPUT},
    differ="c1.w:0 c2.w:0",
)
def one_bias_of_several_layers(b: Builder) -> None:
    """An exporter merged three equal biases into one initializer: that couples nothing, not even to the output."""
    x = b.stem(12)
    bias = b.vector("shared", 16)
    same: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4}
    x = b.relu(b.op("Conv", x, b.weight("c1.w", 16, 12, 3, 3), bias, **same))
    x = b.relu(b.op("Conv", x, b.weight("c2.w", 16, 16, 3, 3), bias, **same))
    b.output(b.op("Conv", x, b.weight("last.w", 16, 16, 3, 3), bias, **same))


@pattern("stem.w:0 c1.w:0 c1.w:1 c2.w:0 c2.w:1 head.w:1", differ="c1.w:0 c2.w:0")
def one_statistic_of_two_norms(b: Builder) -> None:
    """Fresh BatchNorms share a vector of ones and one of zeros in all four of their places."""
    x = b.stem(16)
    ones, zeros = b.positive("bn.scale", 16), b.vector("bn.zeros", 16)
    for name in ("c1", "c2"):
        x = b.op("BatchNormalization", b.conv(name, x, 16, 16), ones, zeros, zeros, ones)
        x = b.relu(x)
    b.head(x, 16)


@pattern("embed.w:1 fc1.w:0 fc1.w:1 fc2.w:0 fc2.w:1 head.w:0")
def transposed_initializer(b: Builder) -> None:
    """MatMul with Transpose(weight): weights (out, in); one bias is the left operand of its Add."""
    x = b.tokens(16)
    x = b.matmul(x, b.transpose(b.weight("fc1.w", 24, 16), 1, 0))
    x = b.relu(b.add(b.vector("fc1.b", 24), x))
    b.token_head(b.matmul(x, b.transpose(b.weight("fc2.w", 16, 24), 1, 0)), 16)


@pattern("fc1.w:0 fc1.b:1 fc2.w:0 fc2.w:1 fc3.w:0", {"fc1.w:1": INPUT, "fc3.w:1": OUTPUT})
def gemm_transposes(b: Builder) -> None:
    """transB, then both transposed from a transposed activation, then the weight as A and transA."""
    x = b.op("Gemm", b.input("x", (4, 10)), b.weight("fc1.w", 16, 10), b.vector("fc1.b", 1, 16), transB=1)
    x = b.transpose(b.relu(x), 1, 0)
    x = b.op("Gemm", x, b.weight("fc2.w", 24, 16), b.vector("fc2.b", 4, 24), transA=1, transB=1, beta=0.5)
    x = b.transpose(b.relu(x), 1, 0)
    b.output(b.op("Gemm", b.weight("fc3.w", 24, 5, fan=24), x, b.vector("fc3.b", 5, 1), transA=1))


@pattern("embed.w:1 w1:2 w2:1 w2:2 head.w:0", {"w1:0": "one matrix a lane, and lanes end in the output"})
def matmul_with_rank_three_constants(b: Builder) -> None:
    """Four lanes with a matrix each: (b, 4, s, c) times (4, c, h), ragged by lane."""
    x = b.op("Unsqueeze", b.tokens(16), [1])
    x = b.relu(b.matmul(x, b.weight("w1", 4, 16, 24, fan=16)))
    x = b.relu(b.matmul(x, b.weight("w2", 4, 24, 12, fan=24)))
    b.token_head(x, 12)


# The other oracle zeroes stored weights, and here the weights that are cut are computed from them.
@pattern("c1.w:0 c1.w:1 stem:1 c2:1 head.w:1", oracle="none")
def weight_norm(b: Builder) -> None:
    """w = g v / |v|, computed in the graph: folded, and pruned like any weight; v and g may be gone."""
    x = b.input("x", (2, 3, 8, 8))

    def conv(name: str, x: str, cin: int, cout: int) -> str:
        v, g = b.weight(f"{name}.v", cout, cin, 3, 3), b.positive(f"{name}.g", cout, 1, 1, 1)
        norm = b.op("Sqrt", b.op("ReduceSum", b.mul(v, v), [1, 2, 3], keepdims=1))
        w = b.mul(v, b.op("Div", g, norm))
        return str(
            b.op("Conv", x, w, b.vector(f"{name}.b", cout), out=name, kernel_shape=[3, 3], pads=[1] * 4)
        )

    x = b.relu(b.conv("c1", b.relu(conv("stem", x, 3, 16)), 16, 16))
    b.head(b.relu(conv("c2", x, 16, 12)), 12)


def quantise(b: Builder, x: str, zero: int = 128, scale: float = 0.05) -> str:
    """A QuantizeLinear and DequantizeLinear pair on an activation, one scale for all of it."""
    parts = b.const(np.float32(scale)), b.const(np.uint8(zero))
    return b.op("DequantizeLinear", b.op("QuantizeLinear", x, *parts), *parts)


def quantised_weight(b: Builder, name: str, *shape: int, axis: int = 0) -> str:
    """int8 values, one scale and one zero point for each position of `axis`, as float by DequantizeLinear."""
    w = b.weight(f"{name}.w", value=b.rng.integers(-127, 128, shape).astype(np.int8))
    scale = b.weight(
        f"{name}.scale", value=b.rng.uniform(0.5, 1.5, shape[axis]) / 73 / np.prod(shape[1:]) ** 0.5
    )
    return str(
        b.op("DequantizeLinear", w, scale, b.const(np.zeros(shape[axis], np.int8), f"{name}.zero"), axis=axis)
    )


@pattern("stem.w:0 stem.scale:0 stem.zero:0 stem.bias:0 c1.w:0 c1.w:1 c1.scale:0 c1.bias:0 head.w:1")
def qdq_per_axis_conv(b: Builder) -> None:
    """int8 weights with a scale a channel, int32 biases with a scale a channel, uint8 activations."""

    def conv(name: str, x: str, cin: int, cout: int) -> str:
        w = quantised_weight(b, name, cout, cin, 3, 3)
        bias = b.weight(f"{name}.bias", value=b.rng.integers(-9000, 9000, cout).astype(np.int32))
        scale = b.weight(f"{name}.bias_scale", value=b.rng.uniform(0.5, 1.5, cout) / 9000)
        bias = b.op("DequantizeLinear", bias, scale, b.const(np.zeros(cout, np.int32)), axis=0)
        return quantise(b, b.relu(b.op("Conv", x, w, bias, kernel_shape=[3, 3], pads=[1] * 4)), zero=0)

    x = quantise(b, b.input("x", (2, 3, 8, 8)))
    b.head(conv("c1", conv("stem", x, 3, 16), 16, 12), 12)


@pattern("fc1.w:0 fc1.w:1 fc1.scale:0 fc2.w:0 fc2.w:1 fc2.scale:0 embed.w:1 head.w:0")
def qdq_matmul(b: Builder) -> None:
    """Weights (in, out): the first has a scale for each output, the second for each input."""
    x = b.relu(b.matmul(quantise(b, b.tokens(16)), quantised_weight(b, "fc1", 16, 24, axis=1)))
    x = b.relu(b.matmul(quantise(b, x), quantised_weight(b, "fc2", 24, 12, axis=0)))
    b.token_head(x, 12)


@pattern("stem.w:0 c1.w:0 c1.w:1 act.scale:0 act.zero:0 head.w:1")
def qdq_per_axis_activation(b: Builder) -> None:
    """A feature quantised with one scale for each of its channels."""
    x = b.conv("c1", b.stem(16), 16, 12)
    scale = b.weight("act.scale", value=b.rng.uniform(0.01, 0.03, 12))
    zero = b.weight("act.zero", value=b.rng.integers(100, 150, 12).astype(np.uint8))
    x = b.op("QuantizeLinear", x, scale, zero, axis=1)
    b.head(b.op("DequantizeLinear", x, scale, zero, axis=1), 12)


@pattern("stem.w:0 scale:1 shift:0 c1.w:1 head.w:1")
def affine_after_conv(b: Builder) -> None:
    """Elementwise constants of three ranks, one of them on the left."""
    x = b.mul(b.vector("scale", 1, 16, 1, 1, mean=1), b.stem(16))
    x = b.op("Sub", b.vector("shift", 16, 1, 1), b.add(x, b.vector("one", 1, 1, 1, 1)))
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


@pattern("stem.w:0 c1.w:0 c1.w:1 c3.w:0 c3.w:1 c2.w:1 head.w:1")
def convolutions_of_one_and_three_dimensions(b: Builder) -> None:
    """A video stem folded to a sequence and back."""
    x = b.relu(b.conv("stem", b.input("x", (2, 3, 4, 4, 4)), 3, 16, rank=3))
    x = b.relu(b.conv("c3", x, 16, 12, rank=3))
    x = b.relu(b.conv("c1", b.reshape(x, 2, 12, 64), 12, 16, rank=1))
    x = b.relu(b.conv("c2", b.reshape(x, 2, 16, 8, 8), 16, 12))
    b.head(x, 12)


@pattern("embed.w:1 table:1 fc.w:0 fc.w:1 head.w:0", {"table:0": "looked up by run-time ids"})
def albert_layer_used_twice(b: Builder) -> None:
    """One residual layer applied twice, and an embedding added to the stream."""
    x = b.add(
        b.tokens(16), b.lookup(b.weight("table", 9, 16, fan=4), b.input("ids", (2, 6), "int64", high=9))
    )
    x = b.add(x, b.op("Tanh", b.linear("fc", x, 16, 16)))
    x = b.add(x, b.op("Tanh", b.add(b.matmul(x, "fc.w"), "fc.b")))
    b.token_head(x, 16)
