"""Model files that tests read and write: a small network, one with whatever could be lost, and external data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from graphprune import model as gm
from graphprune.errors import ModelError

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


def weight(proto: onnx.ModelProto) -> onnx.TensorProto:
    tensor: onnx.TensorProto = proto.graph.initializer[0]
    return tensor


def assert_refused(path: Path, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        gm.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text, "where"
    assert says in text, "what"
    assert len(text) < 700
