"""Random valid graphs made of what networks are made of, drawn by hypothesis.

A graph grows from its inputs: each step draws a block that fits one of the values there are. Values are images
``[N, C, H, W]``, sequences ``[N, S, D]`` or vectors ``[N, D]``. All weights, biases and statistics are random; the
batch is two.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

BATCH = 2
WIDTHS = (2, 3, 4, 6, 8)
#: More elements than this in one value, and the value is not grown any further.
MOST = 4096


@dataclass
class Grower:
    """A graph under construction; methods named after blocks take and return value names."""

    choose: Callable[[Sequence[Any]], Any]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    convolutions: list[tuple[str, str, int, int]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    # -- pieces -------------------------------------------------------------------------------------------------

    def pick(self, options: Any) -> Any:
        """One of some options."""
        return self.choose(list(options))

    def weight(self, *shape: int, low: float | None = None) -> str:
        """A random weight; positive from ``low`` on where that is given."""
        name = f"w{len(self.weights)}"
        array = self.rng.standard_normal(shape)
        array = array if low is None else np.abs(array) + low
        self.weights[name] = array.astype(np.float32)
        return name

    def literal(self, *values: int) -> str:
        """An int64 vector."""
        name = f"l{len(self.weights)}"
        self.weights[name] = np.asarray(values, dtype=np.int64)
        return name

    def number(self, value: float) -> str:
        """A float scalar."""
        name = f"c{len(self.weights)}"
        self.weights[name] = np.asarray(value, dtype=np.float32)
        return name

    def many(self, op: str, inputs: list[str], shapes: list[tuple[int, ...]], **attributes: Any) -> list[str]:
        """A node with several outputs of these shapes."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(len(shapes))]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"{op}_{len(self.nodes)}", **attributes))
        self.shapes.update(zip(names, shapes, strict=True))
        self.used.update(inputs)
        return names

    def op(self, op: str, *inputs: str, shape: tuple[int, ...], **attributes: Any) -> str:
        """A node with one output."""
        return self.many(op, list(inputs), [shape], **attributes)[0]

    def same(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node whose output has its first input's shape."""
        return self.op(op, *inputs, shape=self.shapes[inputs[0]], **attributes)

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.literal(*shape), shape=shape)

    def transpose(self, x: str, *order: int) -> str:
        return self.op("Transpose", x, shape=tuple(self.shapes[x][a] for a in order), perm=order)

    def others(self, shape: tuple[int, ...]) -> list[str]:
        """Values of that shape, latest first."""
        return [name for name, known in reversed(self.shapes.items()) if known == shape]

    # -- images -------------------------------------------------------------------------------------------------

    def conv(self, x: str, width: int | None = None, groups: int = 1, kernel: int | None = None) -> str:
        n, c, h, w = self.shapes[x]
        width = width or self.pick(WIDTHS)
        kernel = kernel or self.pick((1, 3))
        names = [self.weight(width, c // groups, kernel, kernel)]
        names += [self.weight(width)] if self.pick((True, False)) else []
        if groups == 1:
            self.convolutions.append((names[0], names[-1] if len(names) > 1 else "", c, kernel))
        pads = [kernel // 2] * 4
        return self.op("Conv", x, *names, shape=(n, width, h, w), group=groups, pads=pads)

    def grouped_conv(self, x: str) -> str:
        c = self.shapes[x][1]
        groups = self.pick([g for g in (2, 3, 4, c) if c % g == 0] or [1])
        return self.conv(x, groups * self.pick((1, 2, 3)), groups)

    def conv_again(self, x: str) -> str:
        """A convolution with the weights of another."""
        n, c, h, w = self.shapes[x]
        fitting = [known for known in self.convolutions if known[2] == c]
        if not fitting:
            return self.conv(x)
        weight, bias, _, kernel = self.pick(fitting)
        names = [weight, bias] if bias else [weight]
        return self.op(
            "Conv", x, *names, shape=(n, self.weights[weight].shape[0], h, w), pads=[kernel // 2] * 4
        )

    def conv_transpose(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        width = self.pick(WIDTHS)
        return self.op(
            "ConvTranspose",
            x,
            self.weight(c, width, 2, 2),
            self.weight(width),
            shape=(n, width, 2 * h, 2 * w),
            strides=[2, 2],
        )

    def batch_norm(self, x: str) -> str:
        c = self.shapes[x][1]
        return self.same(
            "BatchNormalization", x, self.weight(c), self.weight(c), self.weight(c), self.weight(c, low=0.5)
        )

    def instance_norm(self, x: str) -> str:
        c = self.shapes[x][1]
        return self.same("InstanceNormalization", x, self.weight(c), self.weight(c))

    def group_norm(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        groups = self.pick([g for g in (1, 2, 3, 4) if c % g == 0])
        folded = self.reshape(x, n, groups, -1)
        self.shapes[folded] = (n, groups, c * h * w // groups)
        ones, zeros = self.weight(groups), self.weight(groups)
        back = self.reshape(self.same("InstanceNormalization", folded, ones, zeros), n, c, h, w)
        scaled = self.same("Mul", back, self.weight(c, 1, 1))
        return self.same("Add", scaled, self.weight(1, c, 1, 1))

    def pool(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        if h < 2 or w < 2:
            return self.activation(x)
        op = self.pick(("MaxPool", "AveragePool"))
        return self.op(op, x, shape=(n, c, h // 2, w // 2), kernel_shape=[2, 2], strides=[2, 2])

    def resize(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        return self.op(
            "Resize", x, "", "", self.literal(n, c, 2 * h, 2 * w), shape=(n, c, 2 * h, 2 * w), mode="nearest"
        )

    def shuffle(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        groups = self.pick([g for g in (2, 3, 4) if c % g == 0] or [1])
        split = self.reshape(x, n, groups, c // groups, h, w)
        return self.reshape(self.transpose(split, 0, 2, 1, 3, 4), n, c, h, w)

    def squeeze_excite(self, x: str) -> str:
        n, c, _, _ = self.shapes[x]
        pooled = self.op("GlobalAveragePool", x, shape=(n, c, 1, 1))
        hidden = self.same("Relu", self.conv(pooled, kernel=1))
        return self.same("Mul", x, self.same("Sigmoid", self.conv(hidden, c, kernel=1)))

    def depth_to_space(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        if c % 4:
            x, c = self.conv(x, 8), 8
        mode = self.pick(("CRD", "DCR"))
        return self.op("DepthToSpace", x, shape=(n, c // 4, 2 * h, 2 * w), blocksize=2, mode=mode)

    def space_to_depth(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        if h % 2 or w % 2:
            return self.activation(x)
        return self.op("SpaceToDepth", x, shape=(n, 4 * c, h // 2, w // 2), blocksize=2)

    def pad_channels(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        before, after = self.pick((0, 1, 2)), self.pick((1, 2))
        return self.op(
            "Pad", x, self.literal(0, before, 0, 0, 0, after, 0, 0), shape=(n, c + before + after, h, w)
        )

    def global_pool(self, x: str) -> str:
        n, c, _, _ = self.shapes[x]
        pooled = self.op(self.pick(("GlobalAveragePool", "GlobalMaxPool")), x, shape=(n, c, 1, 1))
        return self.op("Flatten", pooled, shape=(n, c))

    def mean_over_space(self, x: str) -> str:
        n, c, _, _ = self.shapes[x]
        return self.op("ReduceMean", x, self.literal(2, 3), shape=(n, c), keepdims=0)

    def flatten(self, x: str) -> str:
        shape = self.shapes[x]
        if len(shape) == 4 and self.pick((True, False)):
            x = self.transpose(x, 0, 2, 3, 1)
        return self.op("Flatten", x, shape=(shape[0], int(np.prod(shape[1:]))))

    def to_sequence(self, x: str) -> str:
        n, c, h, w = self.shapes[x]
        return self.transpose(self.reshape(x, n, c, h * w), 0, 2, 1)

    # -- any rank: the axis of channels is 1 for images, the last one otherwise ---------------------------------------

    def axis(self, x: str) -> int:
        return 1 if len(self.shapes[x]) == 4 else len(self.shapes[x]) - 1

    def resized(self, x: str, size: int) -> tuple[int, ...]:
        """The shape of ``x`` with another number of channels."""
        axis = self.axis(x)
        return (*self.shapes[x][:axis], size, *self.shapes[x][axis + 1 :])

    def layer(self, x: str, width: int | None = None) -> str:
        """Whatever makes new channels of the old ones."""
        return self.conv(x, width) if len(self.shapes[x]) == 4 else self.linear(x, width)

    def activation(self, x: str) -> str:
        kind = self.pick(("Relu", "Sigmoid", "Tanh", "silu", "prelu", "Clip", "shift"))
        if kind == "silu":
            return self.same("Mul", x, self.same("Sigmoid", x))
        if kind in ("prelu", "shift"):
            c = self.shapes[x][self.axis(x)]
            slope = self.weight(c, 1, 1) if len(self.shapes[x]) == 4 else self.weight(c)
            return self.same("PRelu" if kind == "prelu" else "Sub", x, slope)
        if kind == "Clip":
            return self.same("Clip", x, self.number(-0.5), self.number(0.7))
        return self.same(kind, x)

    def join(self, x: str) -> str:
        """With another value of the same shape, or a new one."""
        other = self.pick([*self.others(self.shapes[x])[:4], ""]) or self.layer(
            x, self.shapes[x][self.axis(x)]
        )
        return self.same(self.pick(("Add", "Mul", "Max", "Sub")), x, other)

    def concat(self, x: str) -> str:
        axis = self.axis(x)
        fitting = [
            name
            for name, shape in reversed(self.shapes.items())
            if len(shape) == len(self.shapes[x]) and self.resized(x, shape[axis]) == shape
        ]
        pieces = [x, *(self.pick(fitting[:5]) for _ in range(self.pick((1, 2))))]
        size = sum(self.shapes[piece][axis] for piece in pieces)
        return self.op("Concat", *pieces, shape=self.resized(x, size), axis=axis)

    def split(self, x: str) -> str:
        """In two, perhaps unevenly; the pieces go on apart, or gate one another."""
        axis = self.axis(x)
        size = self.shapes[x][axis]
        first = self.pick(range(1, size)) if size > 1 else 0
        if not first:
            return self.activation(x)
        parts = (first, size - first)
        one, two = self.many(
            "Split", [x, self.literal(*parts)], [self.resized(x, part) for part in parts], axis=axis
        )
        if parts[0] == parts[1] and self.pick((True, False)):
            return self.same("Mul", one, self.same("Sigmoid", two))
        return str(self.pick((one, two)))

    def slice(self, x: str) -> str:
        axis = self.axis(x)
        size = self.shapes[x][axis]
        step = self.pick((1, 1, 2)) if size > 2 else 1
        start = self.pick(range(size))
        stop = self.pick(range(start + 1, size + 1))
        new = len(range(start, stop, step))
        literals = [self.literal(v) for v in (start, stop, axis, step)]
        return self.op("Slice", x, *literals, shape=self.resized(x, new))

    def gather(self, x: str) -> str:
        axis = self.axis(x)
        size = self.shapes[x][axis]
        left = list(range(size))
        index = [left.pop(self.pick(range(len(left)))) for _ in range(self.pick(range(1, size + 1)))]
        if self.pick((True, False)):
            index = [*index, index[0]]
        return self.op("Gather", x, self.literal(*index), shape=self.resized(x, len(index)), axis=axis)

    def tile(self, x: str) -> str:
        axis, shape = self.axis(x), self.shapes[x]
        repeats = [2 if a == axis else 1 for a in range(len(shape))]
        return self.op("Tile", x, self.literal(*repeats), shape=self.resized(x, 2 * shape[axis]))

    def maxout(self, x: str) -> str:
        """The greatest of each pair of channels."""
        shape, axis = self.shapes[x], self.axis(x)
        if shape[axis] % 2:
            x = self.layer(x, 4)
            shape = self.shapes[x]
        half = shape[axis] // 2
        inner = self.pick((axis, axis + 1))  # pairs lie side by side, or half the channels apart
        pairs = (2, half) if inner == axis else (half, 2)
        split = self.reshape(x, *shape[:axis], *pairs, *shape[axis + 1 :])
        return self.op("ReduceMax", split, self.literal(inner), shape=self.resized(x, half), keepdims=0)

    # -- sequences and vectors ----------------------------------------------------------------------------------------

    def linear(self, x: str, width: int | None = None) -> str:
        *lead, d = self.shapes[x]
        width = width or self.pick(WIDTHS)
        if len(lead) == 1 and self.pick((True, False)):
            turned = self.pick((True, False))
            weight = self.weight(*((width, d) if turned else (d, width)))
            return self.op("Gemm", x, weight, self.weight(width), shape=(*lead, width), transB=int(turned))
        product = self.op("MatMul", x, self.weight(d, width), shape=(*lead, width))
        return self.same("Add", product, self.weight(width)) if self.pick((True, False)) else product

    def layer_norm(self, x: str) -> str:
        d = self.shapes[x][-1]
        return self.same("LayerNormalization", x, self.weight(d), self.weight(d), axis=-1)

    def einsum(self, x: str) -> str:
        d, width = self.shapes[x][-1], self.pick(WIDTHS)
        weight = self.weight(width, d)
        return self.op("Einsum", x, weight, shape=(*self.shapes[x][:-1], width), equation="...d,ed->...e")

    def attention(self, x: str) -> str:
        """Multi-head attention, query, key and value apart or fused in either order of heads and kinds."""
        n, s, _ = self.shapes[x]
        heads, d = self.pick((1, 2, 3)), self.pick((2, 4))
        e = heads * d
        kind = self.pick(("apart", "kinds first", "heads first"))
        if kind == "apart":
            kv_heads = self.pick([k for k in (1, heads) if heads % k == 0])
            q, k, v = (
                self.transpose(self.reshape(self.linear(x, count * d), n, s, count, d), 0, 2, 1, 3)
                for count in (heads, kv_heads, kv_heads)
            )
        else:
            width = self.linear(x, 3 * e)
            kinds_first = kind == "kinds first"
            five = self.reshape(width, n, s, *((3, heads, d) if kinds_first else (heads, 3, d)))
            order = (2, 0, 3, 1, 4) if kinds_first else (3, 0, 2, 1, 4)
            turned = self.transpose(five, *order)
            q, k, v = (
                self.op("Gather", turned, self.scalar(i), shape=(n, heads, s, d), axis=0) for i in range(3)
            )
        k = self.transpose(k, 0, 1, 3, 2)
        scores = self.op("MatMul", q, k, shape=(n, heads, s, s))
        scaled = self.same("Mul", scores, self.number(0.5))
        mixed = self.op("MatMul", self.same("Softmax", scaled, axis=-1), v, shape=(n, heads, s, d))
        return self.linear(self.reshape(self.transpose(mixed, 0, 2, 1, 3), n, s, e))

    def scalar(self, value: int) -> str:
        name = f"l{len(self.weights)}"
        self.weights[name] = np.asarray(value, dtype=np.int64)
        return name

    def recurrent(self, x: str) -> str:
        n, s, d = self.shapes[x]
        kind, h, directions = self.pick(("LSTM", "GRU", "RNN")), self.pick((2, 3, 4)), self.pick((1, 2))
        q = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
        names = [self.weight(directions, q * h, d), self.weight(directions, q * h, h)]
        names += [self.weight(directions, 2 * q * h)] if self.pick((True, False)) else []
        direction = "bidirectional" if directions == 2 else "forward"
        y = self.op(
            kind,
            self.transpose(x, 1, 0, 2),
            *names,
            shape=(s, directions, n, h),
            hidden_size=h,
            direction=direction,
        )
        return self.reshape(self.transpose(y, 2, 0, 1, 3), n, s, directions * h)

    def mean_over_places(self, x: str) -> str:
        n, _, d = self.shapes[x]
        return self.op("ReduceMean", x, self.literal(1), shape=(n, d), keepdims=0)

    def first_place(self, x: str) -> str:
        n, _, d = self.shapes[x]
        return self.op("Gather", x, self.scalar(0), shape=(n, d), axis=1)

    def to_image(self, x: str) -> str:
        n, s, d = self.shapes[x]
        return self.reshape(self.transpose(x, 0, 2, 1), n, d, s, 1)

    # -- growing --------------------------------------------------------------------------------------------------

    def grow(self, least: int, most: int) -> None:
        """Add between ``least`` and ``most`` blocks, each on one of the latest values."""
        for _ in range(self.pick(range(least, most + 1))):
            small = [n for n, shape in self.shapes.items() if np.prod(shape) <= MOST and len(shape) in BLOCKS]
            x = self.pick(small[-6:][::-1])
            block = self.pick(BLOCKS[len(self.shapes[x])])
            getattr(self, block)(x)

    def finish(self) -> onnx.ModelProto:
        """Values that nothing reads become outputs, through a last layer or as they are."""
        leaves = [name for name in self.shapes if name not in self.used and name not in self.inputs]
        outputs = [self.layer(leaf) if self.pick(range(4)) else leaf for leaf in leaves[-3:]]
        inner = [name for name in self.shapes if name in self.used and name not in self.inputs]
        if inner and self.pick(range(8)) == 7:
            outputs.append(self.pick(inner))
        return self.model(outputs)

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "generated",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shapes[name])
                for name in self.inputs
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shapes[name]) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])


ANY = (
    "layer",
    "layer",
    "layer",
    "activation",
    "join",
    "join",
    "concat",
    "split",
    "slice",
    "gather",
    "tile",
    "maxout",
)
#: Blocks by the rank of the value that they take.
BLOCKS: dict[int, tuple[str, ...]] = {
    4: (
        *ANY,
        *(
            "conv",
            "grouped_conv",
            "grouped_conv",
            "conv_again",
            "conv_transpose",
            "batch_norm",
            "instance_norm",
        ),
        *("group_norm", "pool", "resize", "shuffle", "squeeze_excite", "depth_to_space", "space_to_depth"),
        *("pad_channels", "global_pool", "mean_over_space", "flatten", "to_sequence"),
    ),
    3: (
        *ANY,
        *("layer_norm", "einsum", "attention", "attention", "recurrent", "mean_over_places", "first_place"),
        *("to_image", "flatten"),
    ),
    2: (*ANY, "layer_norm", "einsum"),
}

INPUTS = {"image": (BATCH, 3, 4, 4), "sequence": (BATCH, 5, 4), "vector": (BATCH, 6)}


def grown(choose: Callable[[Sequence[Any]], Any], least: int, most: int) -> onnx.ModelProto:
    """A model with one or two inputs, grown by choices."""
    grower = Grower(choose)
    for name in grower.pick([["image"], ["image"], ["sequence"], ["vector"], ["image", "sequence"]]):
        grower.inputs.append(name)
        grower.shapes[name] = INPUTS[name]
        grower.layer(name)
    grower.grow(least, most)
    return grower.finish()


@st.composite
def small_graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Every choice is drawn, so that what fails gets smaller."""
    return grown(lambda options: draw(st.sampled_from(options)), 1, 8)


def large_graph(seed: int) -> onnx.ModelProto:
    """All choices are equally likely."""
    return grown(random.Random(seed).choice, 6, 16)


def graphs() -> st.SearchStrategy[onnx.ModelProto]:
    """Random models, small and large."""
    return st.one_of(small_graphs(), st.builds(large_graph, st.integers(0, 1 << 30)))
