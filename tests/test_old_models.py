"""Old files: opsets before Where, initializers listed among the inputs, shapes and splits in attributes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphprune


def network(opset: int, ir_version: int, listed: bool, element: int = TensorProto.FLOAT) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    dtype = helper.tensor_dtype_to_np_dtype(element)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.3).astype(dtype)

    weights = {
        "w1": weight(24, 3, 3, 3), "b1": weight(24), "scale": weight(24), "shift": weight(24), "mean": weight(24),
        "var": np.abs(weight(24)) + dtype.type(0.5), "w2": weight(16, 24, 3, 3), "fc": weight(16, 5), "fb": weight(5),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "w2"], ["d"]),
        helper.make_node("Sigmoid", ["d"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["p"]),
        helper.make_node("Flatten", ["p"], ["q"]),
        helper.make_node("Gemm", ["q", "fc", "fb"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", element, ["n", 3, 8, 8])]
    if listed:
        inputs += [helper.make_tensor_value_info(name, element, w.shape) for name, w in weights.items()]
    outputs = [helper.make_tensor_value_info("y", element, ["n", 5])]
    stored = [numpy_helper.from_array(w, name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "old", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


@pytest.mark.parametrize(
    ("opset", "ir_version", "listed", "element"),
    [
        (7, 3, True, TensorProto.FLOAT),
        (8, 3, True, TensorProto.FLOAT),
        (9, 4, False, TensorProto.FLOAT),
        (12, 6, True, TensorProto.FLOAT),
        (17, 8, False, TensorProto.FLOAT16),
    ],
)
def test_a_model_of_its_time_is_halved(opset: int, ir_version: int, listed: bool, element: int) -> None:
    model = network(opset, ir_version, listed, element)
    pruned, report = graphprune.prune(model, 0.5, round_to=1)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in pruned.graph.initializer}
    assert shapes["w1"] == (12, 3, 3, 3)
    assert shapes["w2"] == (8, 12, 3, 3)
    assert shapes["fc"] == (8, 5)
    assert (report.output_change or 0) > 0
    if listed:
        declared = {
            value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in pruned.graph.input
        }
        assert all(tuple(declared[name]) == shape for name, shape in shapes.items())
    session = onnxruntime.InferenceSession(pruned.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.zeros((3, 3, 8, 8), dtype=helper.tensor_dtype_to_np_dtype(element))
    assert session.run(None, {"x": x})[0].shape == (3, 5)
