"""Model in and out: every bad input is one ModelError line, nothing is lost, and writing is atomic."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from graphprune import model as gm
from graphprune.errors import ModelError, OptionError
from graphprune.model import wire

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((64, 3, 3, 3)).astype(
    np.float32
)  # 6912 bytes: above the sizes from which weights are lifted
IMAGE = RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)


def network(**fields: Any) -> onnx.ModelProto:
    """A convolution with a large weight and a bias small enough to stay in the graph."""
    graph = h.make_graph(
        [
            h.make_node("Conv", ["x", "w", "b"], ["y"], name="conv"),
            h.make_node("Relu", ["y"], ["z"], name="relu"),
        ],
        "net",
        [h.make_tensor_value_info("x", T.FLOAT, ["n", 3, 8, 8])],
        [h.make_tensor_value_info("z", T.FLOAT, ["n", 64, 6, 6])],
        [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.arange(64, dtype=np.float32), "b")],
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8, **fields)


def rich_network() -> onnx.ModelProto:
    """A model that uses whatever a round trip could lose."""
    sub = h.make_graph(
        [h.make_node("Add", ["y", "shift"], ["then_out"])],
        "then",
        [],
        [h.make_tensor_value_info("then_out", T.FLOAT, None)],
        [numpy_helper.from_array(np.ones((1, 64, 1, 1), np.float32), "shift")],
    )
    other = h.make_graph(
        [h.make_node("Twice", ["y"], ["else_out"], domain="local", overload="v")],
        "else",
        [],
        [h.make_tensor_value_info("else_out", T.FLOAT, None)],
    )
    twice = h.make_function(
        "local",
        "Twice",
        ["a"],
        ["c"],
        [h.make_node("LeakyRelu", ["a"], ["b"]), h.make_node("Add", ["b", "b"], ["c"])],
        [h.make_opsetid("", 18)],
        overload="v",
        doc_string="doubles",
    )
    twice.node[0].attribute.append(h.make_attribute_ref("alpha", onnx.AttributeProto.FLOAT))
    twice.node[0].attribute[0].ref_attr_name = "slope"
    twice.attribute_proto.append(h.make_attribute("slope", 0.25))
    twice.metadata_props.add(key="function", value="props")
    graph = h.make_graph(
        [
            h.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", doc_string="first"),
            h.make_node("If", ["flag"], ["z"], name="if", then_branch=sub, else_branch=other),
            h.make_node("Cast", ["half"], ["half_out"], to=T.FLOAT),
            h.make_node("DequantizeLinear", ["packed", "scale"], ["int4_out"]),
            h.make_node("Identity", ["words"], ["words_out"]),
        ],
        "net",
        [
            h.make_tensor_value_info("x", T.FLOAT, ["n", 3, None, 8], doc_string="an image"),
            h.make_tensor_value_info("flag", T.BOOL, []),
        ],
        [
            h.make_tensor_value_info("z", T.FLOAT, ["n", 64, None, 6]),
            h.make_tensor_value_info("half_out", T.FLOAT, [4000]),
            h.make_tensor_value_info("int4_out", T.FLOAT, [101, 100]),
            h.make_tensor_value_info("words_out", T.STRING, [2]),
        ],
        [
            numpy_helper.from_array(WEIGHT, "w"),
            numpy_helper.from_array(np.arange(64, dtype=np.float32), "b"),
            h.make_tensor("half", T.BFLOAT16, [4000], np.linspace(-3, 3, 4000)),
            h.make_tensor("packed", T.INT4, [101, 100], (np.arange(10100) % 16 - 8).tolist()),
            h.make_tensor("scale", T.FLOAT, [], [0.5]),
            T(name="words", data_type=T.STRING, dims=[2], string_data=[b"a", b"\xff"]),
        ],
        doc_string="graph doc",
        value_info=[h.make_tensor_value_info("y", T.FLOAT, ["n", 64, None, 6], doc_string="value doc")],
    )
    graph.node[0].metadata_props.add(key="node", value="props")
    graph.metadata_props.add(key="graph", value="props")
    graph.value_info[0].metadata_props.add(key="value", value="props")
    graph.initializer[0].doc_string = "the weight"
    graph.initializer[0].metadata_props.add(key="tensor", value="props")
    annotation = graph.quantization_annotation.add(tensor_name="y")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    model = h.make_model(
        graph,
        functions=[twice],
        opset_imports=[h.make_opsetid("", 21), h.make_opsetid("local", 1)],
        ir_version=10,
        producer_name="someone",
        producer_version="1.2",
        domain="org.example",
        model_version=7,
        doc_string="model doc",
    )
    h.set_model_props(model, {"b": "2", "a": "1"})
    onnx.checker.check_model(model, full_check=True)
    return model


def canonical(proto: onnx.ModelProto) -> bytes:
    """Serialized with map-like lists sorted and packed data as raw data: equal for models that say the same."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    proto.metadata_props.sort(key=lambda entry: entry.key)
    for tensor in proto.graph.initializer:
        if tensor.data_type != T.STRING:
            raw = ir.serde.deserialize_tensor(tensor).tobytes()
            tensor.CopyFrom(
                T(
                    name=tensor.name,
                    dims=tensor.dims,
                    data_type=tensor.data_type,
                    doc_string=tensor.doc_string,
                    metadata_props=tensor.metadata_props,
                    raw_data=raw,
                )
            )
    return bytes(proto.SerializeToString(deterministic=True))


def without_defaults(message: Any) -> Any:
    """The message without optional fields that are present and empty, in place: onnx_ir leaves them out."""
    texts = (
        "name",
        "doc_string",
        "domain",
        "producer_name",
        "producer_version",
        "model_version",
        "dim_param",
    )
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                without_defaults(part)
        elif not field.is_repeated and value == field.default_value and field.name in texts:
            message.ClearField(field.name)
    return message


def written(path: Path, proto: onnx.ModelProto) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def run(path: Path | str) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        None, {"x": IMAGE}
    )[0]


def external(path: Path) -> onnx.ModelProto:
    """Write :func:`network` with its weight in ``<name>.data``; returns the proto that refers to it."""
    onnx.save_model(
        network(), path, save_as_external_data=True, location=path.name + ".data", size_threshold=1024
    )
    return onnx.load(path, load_external_data=False)


# --- Bad input ---------------------------------------------------------------------------------------------------


def edited(edit: Callable[[onnx.ModelProto], object]) -> bytes:
    proto = network()
    edit(proto)
    return bytes(proto.SerializeToString())


def weight(proto: onnx.ModelProto) -> onnx.TensorProto:
    tensor: onnx.TensorProto = proto.graph.initializer[0]
    return tensor


def absurd_dims(proto: onnx.ModelProto) -> None:
    bias = proto.graph.initializer[1]
    bias.ClearField("raw_data")
    del bias.dims[:]
    bias.dims.extend([2**40, 2**40])


def sparse(dims: list[int], indices: list[int], count: int = 2) -> Callable[[onnx.ModelProto], None]:
    def edit(proto: onnx.ModelProto) -> None:
        values = h.make_tensor("b", T.FLOAT, [count], [1.0] * count)
        del proto.graph.initializer[1]
        proto.graph.sparse_initializer.append(
            h.make_sparse_tensor(values, h.make_tensor("", T.INT64, [len(indices)], indices), dims)
        )

    return edit


WHOLE = network().SerializeToString()
BAD_BYTES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "empty"),
    "text": (b"hello, I am not a model\n", "not an ONNX file"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "zip": (b"PK\x03\x04" + bytes(100), "torch.onnx.export"),
    "pickle": (b"\x80\x02}q\x00.", "torch.onnx.export"),
    "ort format": (b"\x18\0\0\0ORTM" + bytes(64), "ORT-format"),
    "html": (b"<!DOCTYPE html><html></html>", "HTML"),
    "truncated in the weights": (WHOLE[:4000], "truncated"),
    "truncated by a byte": (WHOLE[:-1], "truncated"),
    "only a version": (b"\x08\x08", "no nodes"),
    "no nodes": (edited(lambda p: p.graph.ClearField("node")), "no nodes"),
    "ir version": (edited(lambda p: setattr(p, "ir_version", 99)), "IR version 99 is newer"),
    "no ir version": (edited(lambda p: p.ClearField("ir_version")), "not a valid ONNX graph"),
    "opset": (edited(lambda p: setattr(p.opset_import[0], "version", 999)), "opset 999 of domain 'ai.onnx'"),
    "opset twice": (edited(lambda p: p.opset_import.add(domain="", version=17)), "occurs twice"),
    "no opset": (edited(lambda p: p.ClearField("opset_import")), "not a valid ONNX graph"),
    "unknown op": (edited(lambda p: setattr(p.graph.node[1], "op_type", "Rely")), "Rely"),
    "unknown domain": (edited(lambda p: setattr(p.graph.node[1], "domain", "nowhere")), "nowhere"),
    "dangling input": (edited(lambda p: p.graph.node[1].input.__setitem__(0, "gone")), "gone"),
    "unsorted": (edited(lambda p: p.graph.node.reverse()), "topological"),
    "output made twice": (edited(lambda p: p.graph.node[1].output.__setitem__(0, "y")), "single static"),
    "initializer twice": (edited(lambda p: p.graph.initializer.append(weight(p))), "'w' occurs twice"),
    "input twice": (edited(lambda p: p.graph.input.append(p.graph.input[0])), "'x' occurs twice"),
    "nameless initializer": (edited(lambda p: p.graph.initializer[1].ClearField("name")), "not a valid ONNX"),
    "undefined dtype": (edited(lambda p: setattr(weight(p), "data_type", 0)), "element type 0"),
    "unknown dtype": (edited(lambda p: setattr(weight(p), "data_type", 77)), "element type 77"),
    "unknown input dtype": (
        edited(lambda p: setattr(p.graph.input[0].type.tensor_type, "elem_type", 77)),
        "77",
    ),
    "large weight too short": (
        edited(lambda p: setattr(weight(p), "raw_data", weight(p).raw_data[:-4])),
        "needs 6912 bytes and holds 6908",
    ),
    "small weight too long": (
        edited(lambda p: setattr(p.graph.initializer[1], "raw_data", bytes(300))),
        "needs 256 bytes and holds 300",
    ),
    "typed data too short": (
        edited(
            lambda p: p.graph.initializer[1].CopyFrom(T(name="b", data_type=1, dims=[64], float_data=[1]))
        ),
        "needs 64 values and holds 1",
    ),
    "absurd dimensions": (edited(absurd_dims), "holds 0"),
    "negative dimension": (edited(lambda p: weight(p).dims.__setitem__(0, -64)), "negative dimension"),
    "segment": (edited(lambda p: weight(p).segment.CopyFrom(T.Segment(begin=0, end=1))), "segments"),
    "strings as raw data": (
        edited(lambda p: setattr(p.graph.initializer[1], "data_type", 8)),
        "strings as raw",
    ),
    "constant of a wrong size": (
        edited(
            lambda p: p.graph.node.insert(
                0,
                h.make_node(
                    "Constant", [], ["c"], value=T(name="v", data_type=1, dims=[5], raw_data=bytes(8))
                ),
            )
        ),
        "attribute 'value' of Constant",
    ),
    "huge sparse initializer": (edited(sparse([2**20, 2**20], [0, 1])), "dense"),
    "sparse index outside": (edited(sparse([64], [0, 64])), "index outside its shape"),
    "sparse without indices": (edited(sparse([64], [0])), "indices"),
    "sparse attribute": (
        edited(
            lambda p: p.graph.node[1].attribute.append(
                h.make_attribute(
                    "odd",
                    h.make_sparse_tensor(
                        h.make_tensor("v", T.FLOAT, [1], [1.0]), h.make_tensor("", T.INT64, [1], [0]), [2]
                    ),
                )
            )
        ),
        "sparse attribute",
    ),
    "a node's name is no text": (
        WHOLE.replace(b"\x1a\x04conv", b"\x1a\x04co\xffv"),
        "not UTF-8",
    ),
    "the producer is no text": (
        network(producer_name="producer").SerializeToString().replace(b"producer", b"prod\xffcer"),
        "not UTF-8",
    ),
    "two functions of one name": (
        edited(
            lambda p: p.functions.extend(
                [
                    h.make_function(
                        "d", "f", ["a"], ["b"], [h.make_node("Relu", ["a"], ["b"])], [h.make_opsetid("", 17)]
                    )
                ]
                * 2
            )
        ),
        "function ('d', 'f', '') occurs twice",
    ),
}


def assert_refused(path: Path, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        gm.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text, "where"
    assert says in text, "what"
    assert len(text) < 700


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bad_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    data, says = BAD_BYTES[name]
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    assert_refused(path, says)


def test_missing_file_folder_and_device_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.onnx", "no such file")
    assert_refused(tmp_path, "a directory")
    assert_refused(tmp_path / ("x" * 300), "cannot be read")
    with pytest.raises(ModelError, match="not a regular file"):
        gm.load(os.devnull)


def test_a_file_above_2_gb_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse: takes no space
    assert_refused(path, "external data")


def test_claimed_sizes_take_no_memory(tmp_path: Path) -> None:
    """2 to the 82nd bytes by its dimensions, none in the file: refused without allocating."""
    path = tmp_path / "absurd.onnx"
    path.write_bytes(BAD_BYTES["absurd dimensions"][0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(path, "holds 0")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


# --- External data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("location", "gone.data", "is missing"),
        ("location", "../m.onnx.data", "leaves the folder"),
        ("location", "sub/../../m.onnx.data", "leaves the folder"),
        ("location", "/etc/passwd", "absolute"),
        ("location", "C:\\weights", "absolute"),
        ("location", "", "without a location"),
        ("location", ".", "is not a file"),
        ("offset", "1000000", "truncated or belongs to another model"),
        ("offset", "-8", "offset '-8'"),
        ("length", "100", "need 6912"),
        ("length", "many", "many"),
    ],
)
def test_bad_external_data_is_refused(field: str, value: str, says: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "m.onnx"
    proto = external(path)
    (tmp_path / "m.onnx.data").write_bytes((folder / "m.onnx.data").read_bytes())
    (folder / "sub").mkdir()
    entries = weight(proto).external_data
    for entry in [e for e in entries if e.key == field]:
        entries.remove(entry)
    entries.add(key=field, value=value)
    written(path, proto)
    assert_refused(path, says)


def test_truncated_external_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    external(path)
    os.truncate(tmp_path / "m.onnx.data", 5000)
    assert_refused(path, "has 5000")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "m.onnx"
    external(path)
    (folder / "m.onnx.data").rename(tmp_path / "secret")
    (folder / "m.onnx.data").symlink_to(tmp_path / "secret")
    assert_refused(path, "leaves the folder")


def test_model_caches_link_both_files(tmp_path: Path) -> None:
    """blobs/ holds the contents, snapshots/ symbolic links to them, as huggingface_hub lays out its cache."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    external(blobs / "m.onnx")
    for name in ("m.onnx", "m.onnx.data"):
        (blobs / name).rename(blobs / f"hash_{name}")
        (snapshot / name).symlink_to(blobs / f"hash_{name}")
    model = gm.load(snapshot / "m.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)  # type: ignore[union-attr]


def test_hard_linked_external_data_is_read(tmp_path: Path) -> None:
    external(tmp_path / "m.onnx")
    os.link(tmp_path / "m.onnx.data", tmp_path / "backup")
    model = gm.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)  # type: ignore[union-attr]
    gm.save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").exists()


def test_external_data_stays_external(tmp_path: Path) -> None:
    external(tmp_path / "m.onnx")
    gm.save(gm.load(tmp_path / "m.onnx"), tmp_path / "out.onnx")
    proto = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert {e.key: e.value for e in weight(proto).external_data}["location"] == "out.onnx.data"
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    np.testing.assert_array_equal(run(tmp_path / "out.onnx"), run(tmp_path / "m.onnx"))
    gm.save(gm.load(tmp_path / "m.onnx"), tmp_path / "one.onnx", external_data=False)
    assert not (tmp_path / "one.onnx.data").exists()
    np.testing.assert_array_equal(run(tmp_path / "one.onnx"), run(tmp_path / "m.onnx"))


def test_external_attributes_and_empty_tensors(tmp_path: Path) -> None:
    """Constant nodes may keep their tensor in external data; a tensor without elements has no bytes to map."""
    proto = network()
    proto.graph.node.insert(0, h.make_node("Constant", [], ["w"], value=weight(proto)))
    proto.graph.initializer[0].CopyFrom(T(name="none", data_type=T.FLOAT, dims=[0, 3], raw_data=b""))
    onnx.save_model(
        proto,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="d",
        size_threshold=0,
        convert_attribute=True,
    )
    gm.save(gm.load(tmp_path / "m.onnx"), tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(tmp_path / "out.onnx"), run(tmp_path / "m.onnx"))
    (tmp_path / "d").unlink()
    assert_refused(tmp_path / "m.onnx", "missing")


# --- Nothing is lost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [network, rich_network])
@pytest.mark.parametrize("data", [False, True])
def test_round_trip_keeps_everything(make: Callable[[], onnx.ModelProto], data: bool, tmp_path: Path) -> None:
    proto = make()
    gm.save(gm.load(written(tmp_path / "m.onnx", proto)), tmp_path / "out.onnx", external_data=data)
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    assert canonical(onnx.load(tmp_path / "out.onnx")) == canonical(proto)
    assert canonical(gm.as_ir(proto)[1](gm.as_ir(proto)[0])) == canonical(proto)


def test_the_models_in_the_onnx_package_come_back_unchanged(tmp_path: Path) -> None:
    """Exports of PyTorch and Caffe2 from 2017 on. (So do the 1,884 of the operator tests; making those is slow.)"""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
    paths = sorted(folder.rglob("*.onnx"))
    assert len(paths) > 100
    for path in paths:
        gm.save(gm.load(path), tmp_path / "out.onnx")
        before, after = onnx.load(path), onnx.load(tmp_path / "out.onnx")
        for proto in (before, after):
            proto.ParseFromString(canonical(proto))
            without_defaults(proto)
        assert before == after, path


def test_stale_value_info_is_no_error(tmp_path: Path) -> None:
    proto = network()
    proto.graph.value_info.append(h.make_tensor_value_info("y", T.INT8, [1, 2]))
    assert gm.load(written(tmp_path / "m.onnx", proto)).graph.num_nodes() == 2


def test_outputs_of_unknown_rank_are_no_error(tmp_path: Path) -> None:
    """Exporters leave them so, and ONNX Runtime runs them, but onnx.checker asks for a shape."""
    proto = network()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    path = written(tmp_path / "m.onnx", proto)
    assert run(path).shape == (2, 64, 6, 6)
    assert gm.load(path).graph.outputs[0].shape is None


def test_ops_that_only_the_runtime_defines_are_no_error(tmp_path: Path) -> None:
    """ONNX Runtime's optimizer writes SimplifiedLayerNormalization into the standard domain."""
    proto = network()
    proto.graph.node[1].CopyFrom(h.make_node("SimplifiedLayerNormalization", ["y", "s"], ["z"], axis=-1))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(6, np.float32), "s"))
    path = written(tmp_path / "m.onnx", proto)
    assert run(path).shape == (2, 64, 6, 6)
    assert gm.load(path).graph[1].op_type == "SimplifiedLayerNormalization"


def test_the_standard_domain_may_be_spelt_out(tmp_path: Path) -> None:
    proto = network()
    proto.opset_import[0].domain = "ai.onnx"
    assert gm.load(written(tmp_path / "m.onnx", proto)).graph.opset_imports == {"": 17}


@pytest.mark.parametrize("columns", [1, 2])
def test_sparse_initializers_become_dense(columns: int, tmp_path: Path) -> None:
    dense = np.zeros((64, 3, 3, 3), np.float32)
    positions = RNG.choice(dense.size, 100, replace=False)
    positions.sort()
    dense.reshape(-1)[positions] = values = RNG.standard_normal(100).astype(np.float32)
    indices = positions if columns == 1 else np.stack(np.unravel_index(positions, dense.shape), axis=1)
    proto = network()
    del proto.graph.initializer[0]
    proto.graph.sparse_initializer.append(
        h.make_sparse_tensor(
            numpy_helper.from_array(values, "w"),
            numpy_helper.from_array(indices.astype(np.int64)),
            dense.shape,
        )
    )
    path = written(tmp_path / "m.onnx", proto)
    model = gm.load(path)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), dense)  # type: ignore[union-attr]
    gm.save(model, tmp_path / "out.onnx")
    np.testing.assert_allclose(run(tmp_path / "out.onnx"), run(path), atol=1e-6)


def test_sparse_constants_become_dense(tmp_path: Path) -> None:
    proto = network()
    values = h.make_tensor("v", T.FLOAT, [1], [5.0])
    constant = h.make_sparse_tensor(values, h.make_tensor("", T.INT64, [1], [3]), [64])
    del proto.graph.initializer[1]
    proto.graph.node.insert(0, h.make_node("Constant", [], ["b"], sparse_value=constant))
    node = gm.load(written(tmp_path / "m.onnx", proto)).graph[0]
    np.testing.assert_array_equal(
        node.attributes["value"].as_tensor().numpy(), np.eye(64, dtype=np.float32)[3] * 5
    )


def test_training_info_is_reported_as_lost(tmp_path: Path) -> None:
    proto = network()
    proto.training_info.add().algorithm.name = "step"
    with pytest.warns(gm.ConversionWarning, match="training_info"):
        gm.load(written(tmp_path / "m.onnx", proto))


def test_weights_are_views_of_the_file(tmp_path: Path) -> None:
    """A model of 200 MB is loaded and written within 60 MB of additional memory."""
    proto = network()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(50_000_000, np.float32), "large"))
    path = written(tmp_path / "m.onnx", proto)
    script = (
        "import sys, resource, onnx, onnx_ir, onnx.checker\n"
        "from graphprune import model\n"
        "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"
        "before = peak(); m = model.load(sys.argv[1]); loaded = peak()\n"
        "model.save(m, sys.argv[2]); model.save(m, sys.argv[3], external_data=True)\n"
        "print(before, loaded, peak(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    outputs = [str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]
    result = subprocess.run(
        [sys.executable, "-c", script, str(path), *outputs], capture_output=True, text=True, check=True
    )
    before, loaded, after, _ = map(int, result.stdout.split())
    assert loaded - before < 60_000
    assert after - before < 60_000
    assert Path(outputs[0]).stat().st_size == path.stat().st_size


# --- Writing -----------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fails", ["weights", "fsync", "model rename", "data rename"])
def test_a_failure_leaves_everything_as_it_was(
    data: bool, existing: bool, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    model = gm.load(written(source / "m.onnx", network()))
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "m.onnx"
    if existing:
        gm.save(model, target, external_data=True)
        with (folder / "m.onnx.data").open("ab") as file:
            file.write(b"an older file")
    before = files(folder)
    replace = os.replace

    def broken_replace(old: Any, new: Any, **options: Any) -> None:
        if (
            Path(new).name == ("m.onnx" if fails == "model rename" else "m.onnx.data")
            and Path(old).suffix != ".data"
        ):
            raise OSError(28, "No space left on device")
        if fails == "data rename" and Path(old).name == "m.onnx.data":
            raise OSError(28, "No space left on device")
        replace(old, new, **options)

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if fails == "weights":
        monkeypatch.setattr(ir.Tensor, "tobytes", broken)
    elif fails == "fsync":
        monkeypatch.setattr(os, "fsync", broken)
    else:
        monkeypatch.setattr(os, "replace", broken_replace)
    if fails == "data rename" and not data:
        gm.save(model, target, external_data=False)  # no data file, nothing to fail
        return
    with pytest.raises(ModelError, match="No space left"):
        gm.save(model, target, external_data=data)
    assert files(folder) == before
    assert [path for path in folder.iterdir() if path.name not in before] == [], "temporary files are left"


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ir.Tensor, "tobytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gm.save(model, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("data", [False, True])
def test_staged_files_can_be_loaded_and_vanish(data: bool, tmp_path: Path) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))
    target = tmp_path / "out.onnx"
    with gm.staged(model, target, external_data=data) as file:
        assert not target.exists()
        onnx.checker.check_model(file.path, full_check=True)
        expected = run(file.path)
        assert file.size == sum(path.stat().st_size for path in file.path.parent.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    with gm.staged(model, target, external_data=data) as file:
        assert file.commit() == target
    np.testing.assert_array_equal(run(target), expected)
    assert len(list(tmp_path.iterdir())) == (3 if data else 2)
    with gm.staged(model, target, external_data=data) as file:  # replaces an existing pair
        file.commit()
    np.testing.assert_array_equal(run(target), expected)


def test_without_hard_links_the_old_data_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))
    gm.save(model, tmp_path / "out.onnx", external_data=True)
    before = files(tmp_path)

    def unsupported(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    gm.save(model, tmp_path / "out.onnx", external_data=True)
    assert files(tmp_path) == before


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    external(path)
    model = gm.load(path)
    (tmp_path / "soft.onnx").symlink_to(path)
    os.link(path, tmp_path / "hard.onnx")
    (tmp_path / "x.onnx.data").symlink_to(tmp_path / "m.onnx.data")
    before = files(tmp_path)
    for name in ("m.onnx", "soft.onnx", "hard.onnx", "m.onnx.data", "x.onnx"):
        with pytest.raises(OptionError, match="never overwritten"):
            gm.save(model, tmp_path / name)
        with pytest.raises(OptionError, match="never overwritten"):
            gm.save(gm.copy(model), tmp_path / name)
    with (
        pytest.raises(OptionError, match="never overwritten"),
        gm.staged(model, tmp_path / "other.onnx", sources=[tmp_path / "other.onnx"]),
    ):
        pass
    assert files(tmp_path) == before


def test_bad_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))
    with pytest.raises(OptionError, match="a folder"):
        gm.save(model, tmp_path)
    with pytest.raises(OptionError, match="does not exist"):
        gm.save(model, tmp_path / "none" / "out.onnx")
    monkeypatch.setattr(
        "tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(ModelError, match="Permission denied"):
        gm.save(model, tmp_path / "out.onnx")


def test_large_models_get_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))
    monkeypatch.setattr("graphprune.model.write.EXTERNAL_BYTES", 6000)
    gm.save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").exists()
    monkeypatch.setattr("graphprune.model.write.MAXIMUM_MESSAGE", 6000)
    with pytest.raises(OptionError, match="use external data"):
        gm.save(model, tmp_path / "one.onnx", external_data=False)
    monkeypatch.undo()
    monkeypatch.setattr("graphprune.model.wire.MAXIMUM_MESSAGE", 6000)
    with pytest.raises(ModelError, match="2 GB"):
        gm.save(model, tmp_path / "one.onnx", external_data=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "out.onnx", "out.onnx.data"]


def test_a_tensor_that_writes_too_little_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))
    monkeypatch.setattr(wire, "_chunks_of", lambda _: [b"sh", memoryview(b"ort")])
    for data in (False, True):
        with pytest.raises(ModelError, match="5 written"):
            gm.save(model, tmp_path / "out.onnx", external_data=data)
    monkeypatch.undo()
    monkeypatch.setattr(wire, "STREAM_BYTES", 0)  # nothing is too small to be written without a copy
    save = gm.save(model, tmp_path / "streamed.onnx")
    monkeypatch.undo()
    assert save.read_bytes() == gm.save(model, tmp_path / "whole.onnx").read_bytes()


def test_file_size_is_what_is_written(tmp_path: Path) -> None:
    model = gm.load(written(tmp_path / "m.onnx", rich_network()))
    size = gm.save(model, tmp_path / "out.onnx").stat().st_size
    assert gm.file_size(model) == pytest.approx(size, abs=100)


# --- Kinds -------------------------------------------------------------------------------------------------------


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


# --- Damage ------------------------------------------------------------------------------------------------------

DAMAGED = rich_network().SerializeToString()
SKELETON = wire.lift(DAMAGED)[0]


def load_or_refuse(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gm.ConversionWarning)
        try:
            model = gm.load(path)
        except ModelError:
            return
    for value in model.graph.initializers.values():  # what was accepted can be read
        assert value.const_value is not None
        assert value.const_value.numpy().shape == tuple(value.const_value.shape.numpy())


@settings(max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(end=st.integers(0, len(DAMAGED)))
def test_truncations_are_refused_or_loaded(end: int, tmp_path: Path) -> None:
    load_or_refuse(tmp_path / "damaged.onnx", DAMAGED[:end])


@settings(max_examples=400, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, len(SKELETON) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    body=st.sampled_from([DAMAGED, SKELETON, WHOLE]),
)
def test_flipped_bytes_are_refused_or_loaded(
    flips: list[tuple[int, int]], body: bytes, tmp_path: Path
) -> None:
    damaged = bytearray(body)
    for position, byte in flips:
        damaged[position % len(damaged)] = byte
    load_or_refuse(tmp_path / "damaged.onnx", bytes(damaged))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError):
        gm.load(path)


# --- Wire format -------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**63))
def test_varints_round_trip(value: int) -> None:
    encoded = wire.varint(value)
    assert wire.read_varint(encoded, 0, len(encoded)) == (value, len(encoded))


@pytest.mark.parametrize("threshold", [0, 100, 5000, 10**9])
def test_what_is_lifted_is_exactly_the_raw_data(threshold: int) -> None:
    data = rich_network().SerializeToString()
    skeleton, lifted = wire.lift(data, threshold)
    proto = onnx.ModelProto.FromString(skeleton)
    for part in lifted:
        assert part.end - part.start >= threshold
        assert not proto.graph.initializer[part.ordinal].HasField("raw_data")
        proto.graph.initializer[part.ordinal].raw_data = data[part.start : part.end]
    assert proto == rich_network()
