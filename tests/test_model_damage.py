"""Bad files: each is one ModelError line, takes no memory and leaves its folder alone, whatever its bytes are."""

from __future__ import annotations

import os
import resource
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper as h

from graphprune import model as gm
from graphprune.errors import ModelError
from graphprune.model import wire
from tests.model_files import assert_refused, external, network, rich_network, weight, written

# --- Bad input ---------------------------------------------------------------------------------------------------


def edited(edit: Callable[[onnx.ModelProto], object]) -> bytes:
    proto = network()
    edit(proto)
    return bytes(proto.SerializeToString())


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
