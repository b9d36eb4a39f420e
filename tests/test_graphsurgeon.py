"""graphsurgeon Graphs at the boundary: there and back, and a list of what that loses."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphprune
from graphprune.errors import ModelError, OptionError

gs = pytest.importorskip("onnx_graphsurgeon", reason="onnx_graphsurgeon is not installed")

WEIGHT = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16)


def network() -> onnx.ModelProto:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="fc"),
            helper.make_node("Relu", ["a"], ["y"], name="act"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 16))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 8))],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def answer(model: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


def test_there_and_back_without_loss(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph, losses = graphprune.to_graphsurgeon(network())
        assert losses == []
        model, losses = graphprune.from_graphsurgeon(graph)
    assert losses == []
    assert isinstance(graph, gs.Graph)
    assert [node.name for node in model.graph] == ["fc", "act"]
    np.testing.assert_array_equal(answer(ir.to_proto(model)), np.maximum(X @ WEIGHT, 0))


def test_external_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    onnx.save(
        network(),
        tmp_path / "net.onnx",
        save_as_external_data=True,
        location="net.data",
        size_threshold=0,
    )
    monkeypatch.chdir(tmp_path / "elsewhere")  # nothing is found beside the working directory
    graph, losses = graphprune.to_graphsurgeon(tmp_path / "net.onnx")
    assert losses == []
    (tmp_path / "net.data").unlink()
    np.testing.assert_array_equal(graph.tensors()["w"].values, WEIGHT)
    np.testing.assert_array_equal(answer(gs.export_onnx(graph)), np.maximum(X @ WEIGHT, 0))


def test_what_a_graph_cannot_hold_is_listed() -> None:
    model = network()
    helper.set_model_props(model, {"licence": "free"})
    model.graph.node[0].doc_string = "the first"
    model.domain = "org.example"
    _, losses = graphprune.to_graphsurgeon(model)
    assert losses == [
        "the model's metadata_props",
        "the model's domain and version",
        "doc strings and metadata_props of nodes",
    ]


def test_a_type_that_changes_is_listed() -> None:
    """graphsurgeon 0.6.1 writes float8_e4m3fnuz as FLOAT8E4M3FN."""
    graph, _ = graphprune.to_graphsurgeon(network())
    constant = gs.Constant("eight", np.ones(4, ir.DataType.FLOAT8E4M3FNUZ.numpy()))
    output = gs.Variable("cast", dtype=np.float32, shape=[4])
    graph.nodes.append(gs.Node("Cast", attrs={"to": TensorProto.FLOAT}, inputs=[constant], outputs=[output]))
    graph.outputs.append(output)
    graph.opset = 19
    _, losses = graphprune.from_graphsurgeon(graph)
    (loss,) = losses
    assert "'eight'" in loss


def test_the_graph_is_not_changed() -> None:
    graph = gs.import_onnx(network())
    before = gs.export_onnx(graph).SerializeToString()
    model, _ = graphprune.from_graphsurgeon(graph)
    model.graph.initializers["w"].const_value = ir.tensor(WEIGHT * 0)
    assert gs.export_onnx(graph).SerializeToString() == before


def test_other_objects_are_refused() -> None:
    with pytest.raises(OptionError, match=r"type ModelProto is no onnx_graphsurgeon.Graph"):
        graphprune.from_graphsurgeon(network())
    with pytest.raises(OptionError, match="not supported"):
        graphprune.to_graphsurgeon(3)
    broken = gs.import_onnx(network())
    broken.nodes[0].op = "NoSuchOp"
    with pytest.raises(ModelError):
        graphprune.from_graphsurgeon(broken)


def test_without_graphsurgeon_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    for convert in (graphprune.to_graphsurgeon, graphprune.from_graphsurgeon):
        with pytest.raises(OptionError, match=r"install graphprune\[graphsurgeon\]"):
            convert(network())
