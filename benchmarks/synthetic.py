"""Networks of any size to measure growth on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = [helper.make_opsetid("", 18)]


def _info(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def residual_chain(nodes: int, channels: int = 8, stage: int = 20) -> onnx.ModelProto:
    """A ResNet of about `nodes` nodes: blocks of Conv, Relu, Conv, Add, Relu; every `stage` blocks a new 1x1 Conv.

    Input (1, 3, 4, 4), output (1, 10).
    """
    rng = np.random.default_rng(0)
    body: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def conv(x: str, inputs: int, kernel: int) -> str:
        name = f"conv{len(body)}"
        scale = (2 / (inputs * kernel * kernel)) ** 0.5
        weight = rng.normal(0, scale, (channels, inputs, kernel, kernel)).astype(np.float32)
        bias = rng.normal(0, 0.1, channels).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{name}.weight"))
        weights.append(numpy_helper.from_array(bias, f"{name}.bias"))
        operands = [x, f"{name}.weight", f"{name}.bias"]
        pads = [kernel // 2] * 4
        body.append(helper.make_node("Conv", operands, [name], name=name, pads=pads))
        return name

    def op(kind: str, *operands: str) -> str:
        name = f"{kind.lower()}{len(body)}"
        body.append(helper.make_node(kind, list(operands), [name], name=name))
        return name

    x = op("Relu", conv("image", 3, 3))
    block = 0
    while len(body) < nodes - 3:
        if block % stage == 0:
            x = conv(x, channels, 1)
        y = conv(op("Relu", conv(x, channels, 3)), channels, 3)
        # Scaled down, so that the signal stays finite through ten thousand blocks.
        weights[-2].CopyFrom(
            numpy_helper.from_array(0.01 * numpy_helper.to_array(weights[-2]), weights[-2].name)
        )
        x = op("Relu", op("Add", x, y))
        block += 1
    x = op("Flatten", op("GlobalAveragePool", x))
    weights.append(
        numpy_helper.from_array(rng.normal(0, 0.1, (channels, 10)).astype(np.float32), "head.weight")
    )
    body.append(helper.make_node("MatMul", [x, "head.weight"], ["logits"], name="head"))
    graph = helper.make_graph(
        body, "residual_chain", [_info("image", [1, 3, 4, 4])], [_info("logits", [1, 10])], weights
    )
    return helper.make_model(graph, opset_imports=OPSET, ir_version=10)


def write_perceptron(path: Path, megabytes: int, width: int = 2048) -> None:
    """A chain of Gemm and Relu of about that size, its weights in one external file, written a layer at a time.

    Input (batch, width), output (batch, width). The writer itself holds one layer: what is measured is the reader.
    """
    rng = np.random.default_rng(0)
    layers = max(2, round(megabytes * 1e6 / (4 * width * (width + 1))))
    body: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    x = "x"
    data = path.with_suffix(".data")
    with data.open("wb") as file:

        def store(name: str, array: np.ndarray) -> None:
            padding = -file.tell() % 4096
            file.write(b"\0" * padding)
            offset = file.tell()
            file.write(array.tobytes())
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in _where(data.name, offset, array.nbytes):
                tensor.external_data.add(key=key, value=value)
            weights.append(tensor)

        for layer in range(layers):
            store(
                f"w{layer}",
                rng.standard_normal((width, width), dtype=np.float32) * np.float32((2 / width) ** 0.5),
            )
            store(f"b{layer}", rng.standard_normal(width, dtype=np.float32) * np.float32(0.1))
            out = "y" if layer == layers - 1 else f"h{layer}"
            body.append(helper.make_node("Gemm", [x, f"w{layer}", f"b{layer}"], [out], name=f"gemm{layer}"))
            if layer < layers - 1:
                body.append(helper.make_node("Relu", [out], [f"r{layer}"], name=f"relu{layer}"))
                x = f"r{layer}"
    shape: list[int | str] = ["batch", width]
    graph = helper.make_graph(body, "perceptron", [_info("x", shape)], [_info("y", shape)], weights)
    path.write_bytes(helper.make_model(graph, opset_imports=OPSET, ir_version=10).SerializeToString())


def _where(location: str, offset: int, length: int) -> Iterator[tuple[str, str]]:
    yield "location", location
    yield "offset", str(offset)
    yield "length", str(length)


def macs(path: Path) -> int:
    """Multiply-accumulates of the Conv, Gemm and MatMul nodes by ONNX's own shape inference, for every tool alike.

    Raises
    ------
    ValueError
        where a shape is not static.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    graph = model.graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = [dim.dim_value for dim in dims]
    total = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        left, weight, out = node.input[0], node.input[1], node.output[0]
        if missing := {left, weight, out} - shapes.keys():
            raise ValueError(f"{path}: {node.name}: the shape of {sorted(missing)} is not known")
        if node.op_type == "Conv":
            inner = int(np.prod(shapes[weight][1:]))
        else:
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            inner = shapes[left][-2 if transposed else -1]
        total += int(np.prod(shapes[out])) * inner
    return total
