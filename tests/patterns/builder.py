"""A few lines of builder, so that a pattern reads like the network it is taken from.

Every weight is random and named, every bias is random, BatchNorm statistics are random: on zeros a wrong coupling
passes unseen. A batch of two is the default, because a batch of one hides merges of the batch with another axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

MS = "com.microsoft"
Pairs = tuple[tuple[str, int], ...]


class Built(NamedTuple):
    """A pattern's model, one set of inputs for it, and the names of the initializers that are weights."""

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    weights: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Pattern:
    """One graph and what pruning half of every free group must do to it.

    `shrinks` and `frozen` name an axis of an initializer or, where the initializer is computed away, of a value.
    `oracle` says how the masked original can be had by zeroing initializers alone: "weights" zeroes the removed
    elements of contraction operands; "everything" zeroes those of biases and tables too, which a product of two
    activations needs; "none" where masking is not zeroing (normalised axes, folded weights).
    `differ` lists pairs of axes whose kept positions must not be the same: they look coupled and are not.
    """

    name: str
    graph: Callable[[Builder], Any]
    shrinks: Pairs
    frozen: tuple[tuple[str, int, str], ...]
    residual: bool
    opset: int
    oracle: str
    input_shapes: dict[str, tuple[int, ...]]
    differ: tuple[tuple[tuple[str, int], tuple[str, int]], ...]

    def build(self) -> Built:
        builder = Builder(self.name, self.opset)
        self.graph(builder)
        return builder.finish()


def pairs(text: str) -> Pairs:
    """ "a.w:0 b.w:1" -> (("a.w", 0), ("b.w", 1))."""
    split = (item.rsplit(":", 1) for item in text.split())
    return tuple((name, int(axis)) for name, axis in split)


def family() -> tuple[
    list[Pattern], Callable[..., Callable[[Callable[[Builder], Any]], Callable[[Builder], Any]]]
]:
    """A list of patterns, and the decorator that declares a graph as one more of them.

    Decorators stack: a graph with a normalised axis is declared twice, without and with `residual`.
    """
    patterns: list[Pattern] = []

    def declare(
        shrinks: str,
        frozen: dict[str, str] | None = None,
        *,
        residual: bool = False,
        opset: int = 18,
        oracle: str = "weights",
        input_shapes: dict[str, tuple[int, ...]] | None = None,
        differ: str = "",
    ) -> Callable[[Callable[[Builder], Any]], Callable[[Builder], Any]]:
        def register(graph: Callable[[Builder], Any]) -> Callable[[Builder], Any]:
            fixed = tuple((*pairs(key)[0], why) for key, why in (frozen or {}).items())
            apart = pairs(differ)
            patterns.append(
                Pattern(
                    graph.__name__ + ("_residual" if residual else ""),
                    graph,
                    pairs(shrinks),
                    fixed,
                    residual,
                    opset,
                    "none" if residual else oracle,
                    input_shapes or {},
                    tuple(zip(apart[::2], apart[1::2], strict=True)),
                )
            )
            return graph

        return register

    return patterns, declare


class Builder:
    """Collects nodes and initializers. Methods take and return value names."""

    def __init__(self, name: str, opset: int, parent: Builder | None = None) -> None:
        self.name, self.opset, self.parent = name, opset, parent
        self.root: Builder = parent.root if parent else self
        self.nodes: list[onnx.NodeProto] = []
        self.outputs: list[str] = []
        if parent is None:
            self.rng = np.random.default_rng(sum(map(ord, name)))
            self.counter = 0
            self.initializers: dict[str, np.ndarray] = {}
            self.weights: list[str] = []
            self.inputs: list[onnx.ValueInfoProto] = []
            self.feeds: dict[str, np.ndarray] = {}
            self.functions: list[onnx.FunctionProto] = []
            self.output_shapes: dict[str, Sequence[int | str]] = {}

    # -- values ----------------------------------------------------------------------------------------------------

    def fresh(self, stem: str) -> str:
        self.root.counter += 1
        return f"{stem}_{self.root.counter}"

    def input(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str = "float32",
        high: int = 2,
        dims: Sequence[int | str] = (),
    ) -> str:
        """A graph input, fed with normal noise, or with integers below `high`; `dims` names the dynamic ones."""
        rng = self.root.rng
        value = rng.standard_normal(shape) if dtype.startswith("float") else rng.integers(0, high, shape)
        self.root.feeds[name] = np.asarray(value).astype(dtype)
        code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.root.inputs.append(helper.make_tensor_value_info(name, code, list(dims or shape)))
        return name

    def const(self, value: Any, name: str = "") -> str:
        """An initializer that is a literal, not a weight. Python integers are int64, floats are float32."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        name = name or self.fresh("const")
        self.root.initializers[name] = array
        return name

    def weight(self, name: str, *shape: int, fan: int = 0, value: np.ndarray | None = None) -> str:
        """A named random weight with standard deviation fan ** -0.5 (fan: what is summed over; all but axis 0)."""
        if value is None:
            deviation = (fan or max(1, int(np.prod(shape[1:])))) ** -0.5
            value = self.root.rng.standard_normal(shape) * deviation
        self.root.weights.append(name)
        return self.const(value, name)

    def vector(self, name: str, *shape: int, mean: float = 0.0) -> str:
        """A bias, a scale or a slope: normal noise of deviation .4 about `mean`."""
        return self.weight(name, value=mean + 0.4 * self.root.rng.standard_normal(shape))

    def positive(self, name: str, *shape: int) -> str:
        return self.weight(name, value=self.root.rng.uniform(0.5, 1.5, shape))

    def op(self, kind: str, *inputs: Any, out: str = "", domain: str = "", **attributes: Any) -> str:
        """A node with one output, whose name (`out` where given) it returns.

        Inputs that are not names become literals; None leaves an optional input out.
        """
        result = out or self.fresh(kind.lower())
        self.node(kind, inputs, [result], domain, attributes)
        return result

    def ops(self, kind: str, count: int, *inputs: Any, domain: str = "", **attributes: Any) -> list[str]:
        """A node with several outputs."""
        results = [self.fresh(kind.lower()) for _ in range(count)]
        self.node(kind, inputs, results, domain, attributes)
        return results

    def node(
        self, kind: str, inputs: Sequence[Any], outputs: list[str], domain: str, attributes: dict[str, Any]
    ) -> None:
        names = ["" if i is None else i if isinstance(i, str) else self.const(i) for i in inputs]
        self.nodes.append(
            helper.make_node(kind, names, outputs, f"node_{outputs[0]}", domain=domain, **attributes)
        )

    def ms(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """A node of com.microsoft."""
        return self.op(kind, *inputs, domain=MS, **attributes)

    # -- layers: weights are <name>.w and <name>.b, the output is called <name> --------------------------------------

    def conv(
        self,
        name: str,
        x: str,
        cin: int,
        cout: int,
        k: int = 3,
        group: int = 1,
        stride: int = 1,
        rank: int = 2,
    ) -> str:
        """Conv with bias and 'same' padding; 1-D with rank=1. Weights (cout, cin / group, k, ...)."""
        w = self.weight(f"{name}.w", cout, cin // group, *[k] * rank)
        b = self.vector(f"{name}.b", cout)
        pads, strides = [k // 2] * 2 * rank, [stride] * rank
        return self.op(
            "Conv", x, w, b, out=name, kernel_shape=[k] * rank, pads=pads, strides=strides, group=group
        )

    def deconv(self, name: str, x: str, cin: int, cout: int, group: int = 1) -> str:
        """ConvTranspose that doubles the image. Weights (cin, cout / group, 2, 2)."""
        w = self.weight(f"{name}.w", cin, cout // group, 2, 2, fan=cin // group)
        b = self.vector(f"{name}.b", cout)
        return self.op("ConvTranspose", x, w, b, out=name, kernel_shape=[2, 2], strides=[2, 2], group=group)

    def linear(self, name: str, x: str, cin: int, cout: int) -> str:
        """MatMul and Add, as TorchScript writes a Linear on tokens. Weights (cin, cout)."""
        product = self.op("MatMul", x, self.weight(f"{name}.w", cin, cout, fan=cin))
        return self.op("Add", product, self.vector(f"{name}.b", cout), out=name)

    def gemm(self, name: str, x: str, cin: int, cout: int) -> str:
        """Gemm with transB, as a Linear on (batch, features). Weights (cout, cin)."""
        w = self.weight(f"{name}.w", cout, cin)
        return self.op("Gemm", x, w, self.vector(f"{name}.b", cout), out=name, transB=1)

    def batch_norm(self, name: str, x: str, c: int) -> str:
        scale, bias = self.vector(f"{name}.scale", c, mean=1), self.vector(f"{name}.bias", c)
        mean, var = self.vector(f"{name}.mean", c), self.positive(f"{name}.var", c)
        return self.op("BatchNormalization", x, scale, bias, mean, var, out=name)

    def layer_norm(self, name: str, x: str, c: int) -> str:
        scale, bias = self.vector(f"{name}.scale", c, mean=1), self.vector(f"{name}.bias", c)
        return self.op("LayerNormalization", x, scale, bias, out=name, axis=-1)

    def cbr(self, name: str, x: str, cin: int, cout: int, **keywords: int) -> str:
        """Conv, BatchNorm, ReLU: weights <name>.w, <name>.b and <name>_bn.*."""
        return self.relu(self.batch_norm(f"{name}_bn", self.conv(name, x, cin, cout, **keywords), cout))

    # -- short names for what every graph is full of ------------------------------------------------------------------

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def sigmoid(self, x: str) -> str:
        return self.op("Sigmoid", x)

    def silu(self, x: str) -> str:
        return self.mul(x, self.sigmoid(x))

    def gelu(self, x: str) -> str:
        """As TorchScript writes it: x / 2 * (1 + erf(x / sqrt 2))."""
        half = self.mul(x, self.const(0.5))
        return self.mul(half, self.add(self.op("Erf", self.op("Div", x, 2**0.5)), self.const(1.0)))

    def add(self, x: str, y: str, out: str = "") -> str:
        return self.op("Add", x, y, out=out)

    def mul(self, x: str, y: str, out: str = "") -> str:
        return self.op("Mul", x, y, out=out)

    def matmul(self, x: str, y: str, out: str = "") -> str:
        return self.op("MatMul", x, y, out=out)

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, list(shape))

    def transpose(self, x: str, *perm: int, out: str = "") -> str:
        return self.op("Transpose", x, out=out, perm=perm)

    def concat(self, *values: str, axis: int = 1, out: str = "") -> str:
        return self.op("Concat", *values, out=out, axis=axis)

    def split(self, x: str, *sizes: int, axis: int = 1) -> list[str]:
        return self.ops("Split", len(sizes), x, list(sizes), axis=axis)

    def slice(self, x: str, axis: int, start: int, end: int, step: int = 1) -> str:
        return self.op("Slice", x, [start], [end], [axis], [step])

    def gather(self, x: str, index: Any, axis: int) -> str:
        return self.op("Gather", x, np.asarray(index), axis=axis)

    def lookup(self, table: str, ids: str) -> str:
        """Rows of `table` at positions that are known at run time only."""
        return self.op("Gather", table, ids, axis=0)

    def pool(self, x: str) -> str:
        """Global average pool and flatten: (n, c, h, w) -> (n, c)."""
        return self.op("Flatten", self.op("GlobalAveragePool", x), axis=1)

    # -- how most graphs begin and end -------------------------------------------------------------------------------

    def stem(self, c: int, size: int = 8) -> str:
        """An image (2, 3, size, size) through Conv `stem` and a ReLU: (2, c, size, size)."""
        return self.relu(self.conv("stem", self.input("x", (2, 3, size, size)), 3, c))

    def tokens(self, c: int, length: int = 6) -> str:
        """Tokens (2, length, 10) through Linear `embed`: (2, length, c)."""
        return self.linear("embed", self.input("x", (2, length, 10)), 10, c)

    def head(self, x: str, c: int) -> None:
        """A 1x1 Conv `head` to 4 channels that is the output."""
        self.output(self.conv("head", x, c, 4, k=1))

    def token_head(self, x: str, c: int) -> None:
        """A Linear `head` to 5 features that is the output."""
        self.output(self.linear("head", x, c, 5))

    def vector_head(self, x: str, c: int) -> None:
        """A Gemm `head` on (batch, c) to 5 features that is the output."""
        self.output(self.gemm("head", x, c, 5))

    # -- whole graphs ------------------------------------------------------------------------------------------------

    def output(self, x: str, dims: Sequence[int | str] = ()) -> None:
        self.outputs.append(x)
        if dims:
            self.root.output_shapes[x] = dims

    def body(self, name: str) -> Builder:
        """A builder for the body of an If, Loop or Scan; initializers stay with the outer graph."""
        return Builder(name, self.opset, self)

    def subgraph(
        self, inputs: Iterable[tuple[str, int, Sequence[int] | None]] = (), own: Iterable[str] = ()
    ) -> onnx.GraphProto:
        """The body as a GraphProto; inputs are (name, element type, shape); outputs are float unless they are bool.

        The initializers named in `own` move from the outer graph into the body.
        """
        values = [helper.make_tensor_value_info(*item) for item in inputs]
        outputs = [
            helper.make_tensor_value_info(
                o, TensorProto.BOOL if o.startswith("cond") else TensorProto.FLOAT, None
            )
            for o in self.outputs
        ]
        inner = [tensor(name, self.root.initializers.pop(name)) for name in own]
        return helper.make_graph(self.nodes, self.name, values, outputs, inner)

    def finish(self) -> Built:
        """The model, with output types and shapes taken from one run in ONNX Runtime."""
        outputs = [helper.make_empty_tensor_value_info(o) for o in self.outputs]
        initializers = [tensor(k, v) for k, v in self.initializers.items()]
        graph = helper.make_graph(self.nodes, self.name, self.inputs, outputs, initializers)
        opsets = [
            helper.make_opsetid("", self.opset),
            helper.make_opsetid(MS, 1),
            helper.make_opsetid("local", 1),
        ]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=self.functions)
        used = {n.domain for n in graph.node} | {""}
        del model.opset_import[:]
        model.opset_import.extend(o for o in opsets if o.domain in used)
        results = run(model, self.feeds)
        for value, array in zip(graph.output, results, strict=True):
            dims = self.output_shapes.get(value.name, array.shape)
            code = helper.np_dtype_to_tensor_dtype(array.dtype)
            value.CopyFrom(helper.make_tensor_value_info(value.name, code, list(dims)))
        del model.graph.output[:]
        model.graph.output.extend(graph.output)
        return Built(model, self.feeds, tuple(self.weights))


def tensor(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(value.copy(order="C"), name)


def run(
    model: onnx.ModelProto, feeds: dict[str, np.ndarray], names: Sequence[str] | None = None
) -> list[np.ndarray]:
    """All outputs (or the named ones) of a model in ONNX Runtime, one thread, without graph optimisation."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(names, feeds))
