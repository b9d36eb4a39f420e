"""Small networks for the tests of the precision pass, and what they are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from graphprune.calibration import Calibration
from graphprune.model import as_ir, to_proto
from graphprune.passes.cast_precision import PrecisionReport, cast_precision

FLOAT, HALF, BRAIN = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


def network(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, np.ndarray] | None = None,
    inputs: Mapping[str, Sequence[int | str]] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
    **graph: Any,
) -> onnx.ModelProto:
    """A model of some nodes; inputs are float32 unless their names begin with an i."""
    infos = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name.startswith("i") else FLOAT, shape)
        for name, shape in (inputs or {"x": (2, 16)}).items()
    ]
    made = helper.make_graph(
        list(nodes),
        "network",
        infos,
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
        **graph,
    )
    opsets = [helper.make_opsetid("", opset)]
    if any(node.domain for node in nodes):
        opsets += [helper.make_opsetid(domain, 1) for domain in {n.domain for n in nodes if n.domain}]
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    inferred = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.output}
    for output in model.graph.output:
        output.CopyFrom(inferred[output.name])
        if not output.type.tensor_type.HasField("shape"):
            output.CopyFrom(helper.make_tensor_value_info(output.name, FLOAT, ("rows", "columns")))
    return model


def weight(*shape: int) -> np.ndarray:
    """Random, and the same for the same shape."""
    return np.asarray(np.random.default_rng(shape).standard_normal(shape) / np.sqrt(shape[0]), np.float32)


def dense(name: str, x: str, y: str) -> onnx.NodeProto:
    """A product with the constant ``name.w``."""
    return helper.make_node("MatMul", [x, f"{name}.w"], [y], name)


def cast(
    model: onnx.ModelProto, precision: str = "fp16", **options: Any
) -> tuple[onnx.ModelProto, PrecisionReport]:
    """The model in low precision, checked and, where ONNX Runtime can, loaded."""
    made, _ = as_ir(model)
    report = cast_precision(made, precision, **options)
    proto = to_proto(made)
    onnx.checker.check_model(proto, full_check=True)
    if precision == "fp16":
        session(proto)
    return proto, report


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of all values of the main graph, as ONNX's own inference finds them."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(bare, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def result_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of what each named node makes."""
    known = types(model)
    return {node.name: known[node.output[0]] for node in model.graph.node if node.name}


def names(report: PrecisionReport) -> set[str]:
    """The nodes that compute in the low format."""
    return {lowered.node for lowered in report.lowered}


def reasons(report: PrecisionReport) -> dict[str, str]:
    return {kept.node: kept.reason for kept in report.kept}


def chain() -> onnx.ModelProto:
    return network(
        [dense("first", "x", "a"), helper.make_node("Relu", ["a"], ["b"], "relu"), dense("second", "b", "y")],
        {"first.w": weight(16, 32), "second.w": weight(32, 8)},
    )


def norm(epsilon: float) -> onnx.ModelProto:
    """A product, divided by its root mean square, and another product."""
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("Mul", ["a", "a"], ["square"], "square"),
        helper.make_node("ReduceMean", ["square", "axis"], ["mean"], "mean"),
        helper.make_node("Add", ["mean", "epsilon"], ["more"], "add"),
        helper.make_node("Sqrt", ["more"], ["root"], "sqrt"),
        helper.make_node("Div", ["a", "root"], ["b"], "div"),
        dense("second", "b", "y"),
    ]
    constants = {
        "first.w": weight(16, 8),
        "second.w": weight(8, 8),
        "axis": np.array([-1]),
        "epsilon": np.array(epsilon, np.float32),
    }
    return network(nodes, constants)


def squares() -> onnx.ModelProto:
    """A network that squares large values, and scales them down again."""
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("Mul", ["a", "a"], ["square"], "square"),
        helper.make_node("Mul", ["square", "small"], ["b"], "shrink"),
        dense("second", "b", "y"),
    ]
    constants = {
        "first.w": weight(16, 8),
        "second.w": weight(8, 8),
        "small": np.array(1e-3, np.float32),
    }
    return network(nodes, constants, {"x": ("batch", 16)})


def given(scale: float, samples: int = 24) -> Calibration:
    x = np.random.default_rng(1).standard_normal((samples, 16)).astype(np.float32) * np.float32(scale)
    return Calibration({"x": x}, {})


def cancelling() -> onnx.ModelProto:
    """``x + 1000 - 1000``: the roundings of the sum are as large as what comes out."""
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("Add", ["a", "much"], ["b"], "add"),
        helper.make_node("Sub", ["b", "much"], ["c"], "sub"),
        dense("second", "c", "d"),
        helper.make_node("Relu", ["d"], ["e"], "relu"),
        dense("third", "e", "y"),
    ]
    constants = {f"{name}.w": weight(16, 16) for name in ("first", "second", "third")}
    return network(nodes, constants | {"much": np.array(1000, np.float32)})


def with_if(branch_scale: float = 1.0) -> onnx.ModelProto:
    def branch(name: str, scale: float) -> onnx.GraphProto:
        nodes = [
            dense("inner", "a", f"{name}_b"),
            helper.make_node("Mul", [f"{name}_b", f"{name}_scale"], [f"{name}_c"], f"{name}_mul"),
            helper.make_node("Mul", [f"{name}_c", f"{name}_c"], [f"{name}_y"], f"{name}_square"),
        ]
        output = helper.make_tensor_value_info(f"{name}_y", FLOAT, None)
        own = [numpy_helper.from_array(np.array(scale, np.float32), f"{name}_scale")]
        return helper.make_graph(nodes, name, [], [output], own)

    nodes = [
        dense("first", "x", "a"),
        helper.make_node("ReduceSum", ["x"], ["s"], "sum", keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["positive"], "greater"),
        helper.make_node(
            "If", ["positive"], ["b"], "if", then_branch=branch("then", branch_scale), else_branch=branch("else", 1)
        ),
        dense("second", "b", "y"),
    ]  # fmt: skip
    constants = {
        "first.w": weight(16, 8),
        "inner.w": weight(8, 8),
        "second.w": weight(8, 8),
        "zero": np.array(0, np.float32),
    }
    return network(nodes, constants, {"x": ("batch", 16)})
