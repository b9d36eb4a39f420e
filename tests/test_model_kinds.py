"""Kinds of models: paths, protos, IR models and GraphSurgeon graphs come back as what they were."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from graphprune import model as gm
from graphprune.errors import ModelError, OptionError
from tests.model_files import WEIGHT, external, network, rich_network, run, weight, written


def test_each_kind_comes_back_and_is_not_changed(tmp_path: Path) -> None:
    proto = rich_network()
    path = written(tmp_path / "m.onnx", proto)
    intermediate = ir.from_proto(proto)
    for given_model, kind in (
        (path, ir.Model),
        (str(path), ir.Model),
        (proto, onnx.ModelProto),
        (intermediate, ir.Model),
    ):
        before = path.read_bytes(), proto.SerializeToString(), ir.to_proto(intermediate).SerializeToString()
        model, same_kind = gm.as_ir(given_model)
        mangle(model)
        assert isinstance(same_kind(model), kind)
        assert before == (
            path.read_bytes(),
            proto.SerializeToString(),
            ir.to_proto(intermediate).SerializeToString(),
        )


def mangle(model: ir.Model) -> None:
    """Change whatever a rewrite might change, then serialize, which makes onnx_ir rename tensors."""
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            value.name = f"renamed_{value.name}"
            value.metadata_props["changed"] = "yes"
        for node in graph:
            node.name = f"renamed_{node.name}"
            node.attributes["changed"] = ir.AttrInt64("changed", 1)
            node.metadata_props["changed"] = "yes"
            for output in node.outputs:
                output.name = f"renamed_{output.name}"
                output.shape = ir.Shape([1, 2])
                output.dtype = ir.DataType.INT8
    for function in model.functions.values():
        function[0].outputs[0].name = "renamed"
    model.graph.inputs[0].dtype = ir.DataType.INT8
    model.graph.inputs[0].shape = ir.Shape([1, 3, 9, 9])
    model.metadata_props["changed"] = "yes"
    model.graph.opset_imports["changed"] = 1
    ir.to_proto(model)


def test_copies_share_weights_and_nothing_else(tmp_path: Path) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))
    before = ir.to_proto(model).SerializeToString()
    duplicate = gm.copy(model)
    assert duplicate.meta == model.meta
    old, new = (m.graph.initializers["w"].const_value for m in (model, duplicate))
    assert old is not None
    assert new is not None
    assert np.shares_memory(old.numpy(), new.numpy())
    mangle(duplicate)
    assert ir.to_proto(model).SerializeToString() == before


def test_an_external_proto_is_looked_for_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = external(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="missing"):
        gm.as_ir(proto)
    monkeypatch.chdir(tmp_path)
    model, same_kind = gm.as_ir(proto)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)  # type: ignore[union-attr]
    assert weight(same_kind(model)).data_location == T.EXTERNAL


def test_an_ir_model_is_checked_too(tmp_path: Path) -> None:
    external(tmp_path / "m.onnx")
    model = ir.load(tmp_path / "m.onnx")
    duplicate, _ = gm.as_ir(model)
    with pytest.raises(OptionError, match="never overwritten"):
        gm.save(duplicate, tmp_path / "m.onnx.data")
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(ModelError, match="missing"):
        gm.as_ir(model)
    bad = ir.from_proto(network())
    bad.graph[1].op_type = "Rely"
    with pytest.raises(ModelError, match="Rely"):
        gm.as_ir(bad)
    unsorted = ir.from_proto(network())
    first = unsorted.graph[0]
    unsorted.graph.remove(first)
    unsorted.graph.append(first)
    with pytest.raises(ModelError, match="topological"):
        gm.as_ir(unsorted)


def test_other_kinds_are_refused() -> None:
    for thing in (None, 3, b"bytes", network().graph, {"graph": 1}):
        with pytest.raises(
            OptionError, match=r"give a path, an onnx.ModelProto, an onnx_ir.Model or an onnx_graph"
        ):
            gm.as_ir(thing)


def test_graphsurgeon_graphs_come_back(tmp_path: Path) -> None:
    gs = pytest.importorskip("onnx_graphsurgeon", reason="onnx_graphsurgeon is not installed")
    proto = network(producer_name="someone")
    graph = gs.import_onnx(proto)
    before = gs.export_onnx(graph).SerializeToString()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, same_kind = gm.as_ir(graph)
        result = same_kind(model)
    mangle(model)
    assert gs.export_onnx(graph).SerializeToString() == before
    assert isinstance(result, gs.Graph)
    assert model.producer_name == "someone"
    onnx.save(gs.export_onnx(result), tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(tmp_path / "out.onnx"), run(written(tmp_path / "m.onnx", proto)))


def test_graphsurgeon_constants_are_not_repeated_in_branches() -> None:
    gs = pytest.importorskip("onnx_graphsurgeon", reason="onnx_graphsurgeon is not installed")
    branches = [
        h.make_graph(
            [h.make_node(op, ["x", "w"], [op])],
            op,
            [],
            [h.make_tensor_value_info(op, T.FLOAT, [64, 3, 3, 3])],
        )
        for op in ("Add", "Mul")
    ]
    graph = h.make_graph(
        [h.make_node("If", ["flag"], ["z"], then_branch=branches[0], else_branch=branches[1])],
        "net",
        [h.make_tensor_value_info("flag", T.BOOL, []), h.make_tensor_value_info("x", T.FLOAT, [64, 3, 3, 3])],
        [h.make_tensor_value_info("z", T.FLOAT, [64, 3, 3, 3])],
        [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(WEIGHT, "w2")],
    )
    graph.node.append(h.make_node("Identity", ["w"], ["copy"]))
    graph.output.append(h.make_tensor_value_info("copy", T.FLOAT, [64, 3, 3, 3]))
    proto = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    model, same_kind = gm.as_ir(gs.import_onnx(proto))
    assert [list(g.initializers) for g in model.graphs()] == [["w"], [], []]
    onnx.checker.check_model(gs.export_onnx(same_kind(model)))


def test_a_type_that_graphsurgeon_changes_is_named() -> None:
    """graphsurgeon 0.6.1 writes float8_e4m3fnuz as FLOAT8E4M3FN."""
    gs = pytest.importorskip("onnx_graphsurgeon", reason="onnx_graphsurgeon is not installed")
    graph = gs.import_onnx(network())
    constant = gs.Constant("eight", np.ones(4, ir.DataType.FLOAT8E4M3FNUZ.numpy()))
    output = gs.Variable("cast", dtype=np.float32, shape=[4])
    graph.nodes.append(gs.Node("Cast", attrs={"to": T.FLOAT}, inputs=[constant], outputs=[output]))
    graph.outputs.append(output)
    graph.opset = 19
    with pytest.warns(gm.ConversionWarning, match="'eight'"):
        gm.as_ir(graph)


def test_importing_is_light() -> None:
    """No ONNX before the first model: ``graphprune --help`` must not wait for it."""
    script = "import sys, graphprune.model; sys.exit(int('onnx' in sys.modules or 'onnx_ir' in sys.modules))"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_graphsurgeon_cannot_hold_is_named() -> None:
    gs = pytest.importorskip("onnx_graphsurgeon", reason="onnx_graphsurgeon is not installed")
    model, same_kind = gm.as_ir(gs.import_onnx(network()))
    model.metadata_props["pruned"] = "yes"
    model.graph[0].doc_string = "first"
    with pytest.warns(gm.ConversionWarning, match="metadata_props; doc strings and metadata_props of nodes"):
        same_kind(model)
