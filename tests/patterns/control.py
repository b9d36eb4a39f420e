"""Subgraphs, functions, and shapes that are known at run time only."""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, TensorProto, helper

from .builder import Builder, family

PATTERNS, pattern = family()

FLOAT = TensorProto.FLOAT
OUTPUT = "a graph output keeps its shape"
INPUT = "a graph input keeps its shape"


@pattern("stem.w:0 left.w:0 left.w:1 right.w:0 right.w:1 head.w:1")
def if_with_outer_weights(b: Builder) -> None:
    """Both branches read the outer feature and outer weights; what they return is one group."""
    x = b.stem(16)
    branches = {}
    for name in ("left", "right"):
        body = b.body(name)
        body.output(body.relu(body.conv(name, x, 16, 12)))
        branches[name] = body.subgraph()
    y = b.op("If", b.input("flag", (), "bool"), then_branch=branches["left"], else_branch=branches["right"])
    b.head(y, 12)


@pattern("stem.w:0 a.w:0 a.w:1 c.w:0 c.w:1 head.w:1")
def if_with_hidden_layers(b: Builder) -> None:
    """One branch returns the outer feature as it is, the other a residual block over it."""
    x = b.stem(16)
    same, block = b.body("same"), b.body("block")
    same.output(same.op("Identity", x))
    block.output(block.add(x, block.conv("c", block.relu(block.conv("a", x, 16, 24)), 24, 16)))
    y = b.op("If", b.input("flag", (), "bool"), then_branch=same.subgraph(), else_branch=block.subgraph())
    b.head(b.relu(y), 16)


@pattern("stem.w:0 a.w:0 a.w:1 c.w:0 c.w:1 head.w:1")
def if_with_weights_of_its_own(b: Builder) -> None:
    """The branch's initializers lie in its subgraph, as TorchScript puts them."""
    x = b.stem(16)
    same, block = b.body("same"), b.body("block")
    same.output(same.op("Identity", x))
    block.output(block.conv("c", block.relu(block.conv("a", x, 16, 24)), 24, 16))
    inner = block.subgraph(own=("a.w", "a.b", "c.w", "c.b"))
    b.head(
        b.relu(b.op("If", b.input("flag", (), "bool"), then_branch=inner, else_branch=same.subgraph())), 16
    )


@pattern("embed.w:1 w.w:0 w.w:1 w.b:0 u.w:1 u.b:0 head.w:1", {"u.w:0": INPUT})
def loop_carries_a_state(b: Builder) -> None:
    """Three steps of h = tanh(h W + x U): the state's width is both axes of W."""
    x = b.gather(b.tokens(16), 0, 1)
    drive = b.linear("u", b.input("y", (2, 8)), 8, 16)
    body = b.body("step")
    h = body.op("Tanh", body.add(body.linear("w", "h_in", 16, 16), drive))
    body.output(body.op("Identity", "cond_in", out="cond_out"))
    body.output(h)
    inputs = [("i", TensorProto.INT64, []), ("cond_in", TensorProto.BOOL, []), ("h_in", FLOAT, [2, 16])]
    y = b.op("Loop", np.asarray(3), np.asarray(True), x, body=body.subgraph(inputs))
    b.vector_head(y, 16)


@pattern("embed.w:1 w1.w:0 w1.w:1 w2.w:0 w2.w:1 head.w:0")
def loop_with_scan_output(b: Builder) -> None:
    """The state passes a hidden layer of the body; every step's state is stacked as a scan output."""
    x = b.gather(b.tokens(16), 0, 1)
    body = b.body("step")
    h = body.add("h_in", body.linear("w2", body.relu(body.linear("w1", "h_in", 16, 24)), 24, 16))
    body.output(body.op("Identity", "cond_in", out="cond_out"))
    body.output(h)
    body.output(body.op("Tanh", h))
    inputs = [("i", TensorProto.INT64, []), ("cond_in", TensorProto.BOOL, []), ("h_in", FLOAT, [2, 16])]
    y = b.ops("Loop", 2, np.asarray(3), None, x, body=body.subgraph(inputs))[1]
    b.token_head(y, 16)


@pattern("embed.w:1 w.w:1 r.w:0 r.w:1 h0:1 head.w:0")
def scan_as_a_recurrent_cell(b: Builder) -> None:
    x = b.transpose(b.tokens(12), 1, 0, 2)
    body = b.body("cell")
    body.output(
        body.op("Tanh", body.add(body.linear("w", "x_in", 12, 16), body.linear("r", "h_in", 16, 16)), out="h")
    )
    body.output(body.op("Identity", "h"))
    graph = body.subgraph([("h_in", FLOAT, [2, 16]), ("x_in", FLOAT, [2, 12])])
    y = b.ops("Scan", 2, b.vector("h0", 2, 16), x, body=graph, num_scan_inputs=1)[1]
    b.token_head(y, 16)


@pattern("embed.w:1 w1:0 w1:1 w2:0 w2:1 w3:0 w3:1 w4:0 w4:1 head.w:0", oracle="everything")
def model_local_function_called_twice(b: Builder) -> None:
    """A residual MLP as a function of its weights: each call has hidden units of its own."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["hb"]),
        helper.make_node("LeakyRelu", ["hb"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["y"]),
        helper.make_node("Add", ["x", "y"], ["z"]),
    ]
    nodes[2].attribute.append(helper.make_attribute_ref("alpha", AttributeProto.FLOAT))
    opset = [helper.make_opsetid("", b.opset)]
    b.functions.append(
        helper.make_function("local", "Mlp", ["x", "w", "b", "v"], ["z"], nodes, opset, ["alpha"])
    )
    x = b.tokens(16)
    for first, second, hidden in (("w1", "w2", 24), ("w3", "w4", 32)):
        w, v = b.weight(first, 16, hidden, fan=16), b.weight(second, hidden, 16, fan=hidden)
        x = b.op("Mlp", x, w, b.vector(f"{first}.b", hidden), v, domain="local", alpha=0.1)
    b.token_head(x, 16)


DYNAMIC = {"x": (2, 3, 8, 8)}


def dynamic_stem(b: Builder, c: int) -> str:
    x = b.input("x", (2, 3, 8, 8), dims=("batch", 3, "height", "width"))
    return b.relu(b.conv("stem", x, 3, c))


def size_of(b: Builder, x: str, axis: int) -> str:
    """One dimension of x as a vector of one: Shape, Gather, Unsqueeze."""
    return b.op("Unsqueeze", b.op("Gather", b.op("Shape", x), np.asarray(axis), axis=0), [0])


@pattern("stem.w:0 fc.w:1 fc.w:0 head.w:1", input_shapes=DYNAMIC)
def shape_computed_at_run_time(b: Builder) -> None:
    """view(x.shape[0], -1), the batch dynamic; the width of the pooled feature stays a literal elsewhere."""
    x = b.op("GlobalAveragePool", dynamic_stem(b, 16))
    x = b.op("Reshape", x, b.concat(size_of(b, x, 0), b.const([16]), axis=0))
    b.output(b.gemm("head", b.relu(b.gemm("fc", x, 16, 12)), 12, 5), dims=("batch", 5))


@pattern("stem.w:0 fc.w:0 fc.w:1 c1.w:1 c1.w:0 head.w:1", input_shapes=DYNAMIC)
def channels_computed_at_run_time(b: Builder) -> None:
    """b, c, h, w = x.shape; tokens and back: the channel count in the second Reshape is a computed one."""
    x = dynamic_stem(b, 16)
    n, c, h, w = (size_of(b, x, axis) for axis in range(4))
    y = b.transpose(b.op("Reshape", x, b.concat(n, c, b.const([-1]), axis=0)), 0, 2, 1)
    y = b.transpose(b.relu(b.linear("fc", y, 16, 16)), 0, 2, 1)
    y = b.add(x, b.op("Reshape", y, b.concat(n, c, h, w, axis=0)))
    y = b.relu(b.conv("c1", y, 16, 12))
    b.output(b.conv("head", y, 12, 4, k=1), dims=("batch", 4, "height", "width"))


@pattern("stem.w:0 c1.w:1 c1.w:0 c2.w:1 head.w:1", input_shapes=DYNAMIC)
def shuffle_computed_at_run_time(b: Builder) -> None:
    """A channel shuffle whose c // groups is a division in the graph."""
    x = b.conv("c1", dynamic_stem(b, 16), 16, 24)
    n, c, h, w = (size_of(b, x, axis) for axis in range(4))
    groups = b.const([4])
    y = b.op("Reshape", x, b.concat(n, groups, b.op("Div", c, groups), h, w, axis=0))
    y = b.op("Reshape", b.transpose(y, 0, 2, 1, 3, 4), b.concat(n, c, h, w, axis=0))
    y = b.relu(b.conv("c2", y, 24, 16))
    b.output(b.conv("head", y, 16, 4, k=1), dims=("batch", 4, "height", "width"))


@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1", input_shapes=DYNAMIC)
def upsample_to_the_size_of_another(b: Builder) -> None:
    """FPN's Resize: sizes are the batch and channels of one tensor with the image of another, by Shape and Slice."""
    x = dynamic_stem(b, 16)
    y = b.op("MaxPool", b.relu(b.conv("c1", x, 16, 16)), kernel_shape=[2, 2], strides=[2, 2])
    sizes = b.concat(b.slice(b.op("Shape", y), 0, 0, 2), b.slice(b.op("Shape", x), 0, 2, 4), axis=0)
    y = b.op("Resize", y, None, None, sizes, mode="nearest")
    b.output(b.conv("head", b.add(x, y), 16, 4, k=1), dims=("batch", 4, "height", "width"))


@pattern("embed.w:1 q.w:1 k.w:1 v.w:1 o.w:0", oracle="everything", input_shapes={"x": (2, 6, 10)})
def attention_with_dynamic_length(b: Builder) -> None:
    """Heads are split by (batch, length, 4, -1), both first sizes computed; so is the scale."""
    x = b.linear("embed", b.input("x", (2, 6, 10), dims=("batch", "length", 10)), 10, 24)
    n, s = size_of(b, x, 0), size_of(b, x, 1)

    def heads(name: str) -> str:
        shape = b.concat(n, s, b.const([4]), b.const([-1]), axis=0)
        return b.transpose(b.op("Reshape", b.linear(name, x, 24, 32), shape), 0, 2, 1, 3)

    q, k, v = heads("q"), heads("k"), heads("v")
    width = b.op("Sqrt", b.op("Cast", size_of(b, q, 3), to=1))
    weights = b.op("Softmax", b.op("Div", b.matmul(q, b.transpose(k, 0, 1, 3, 2)), width), axis=-1)
    y = b.transpose(b.matmul(weights, v), 0, 2, 1, 3)
    y = b.op("Reshape", y, b.concat(n, s, b.const([32]), axis=0))
    b.output(b.linear("head", b.linear("o", y, 32, 24), 24, 5), dims=("batch", "length", 5))


@pattern("stem.w:0 c1.w:0 c1.w:1 head.w:1")
def constants_in_nodes(b: Builder) -> None:
    """Weights in Constant nodes and a bias by ConstantOfShape: neither is an initializer."""
    x = b.stem(16)
    weight = b.op("Identity", b.weight("c1.w", 12, 16, 3, 3))
    bias = b.op("ConstantOfShape", b.const([12]), value=helper.make_tensor("value", FLOAT, [1], [0.25]))
    x = b.relu(b.op("Conv", x, weight, bias, kernel_shape=[3, 3], pads=[1] * 4))
    scale = helper.make_tensor("value", FLOAT, [12, 1, 1], b.rng.uniform(0.5, 1.5, 12).tolist())
    b.head(b.mul(x, b.op("Constant", value=scale)), 12)
