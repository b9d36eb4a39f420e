"""Weights made sparse: what is written is the original with the smallest elements zero, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.errors import OptionError, SparsityError, VerificationError
from graphprune.model import as_ir, copy, load, save, staged
from graphprune.model.stream import StreamedTensor, reading, stretches
from graphprune.sparsity.eligibility import find_target
from graphprune.sparsity.inspection import inspect_sparsity, require
from graphprune.sparsity.pattern import NM, Layout, Unstructured, parse_block
from graphprune.sparsity.proof import check_file
from graphprune.sparsity.sparsify import Sparsifier, SparsitySettings

Array = np.ndarray[Any, Any]
ANY = "any"


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def network(dtype: Any = np.float32, channels: int = 16) -> onnx.ModelProto:
    """A convolution, a depthwise one, a product and a Gemm; constants that nobody sums over."""
    weights = {
        "conv.w": normal(32, channels, 3, 3),
        "depthwise.w": normal(32, 1, 3, 3),
        "conv.b": normal(32),
        "product.w": normal(32, 64),
        "gemm.w": normal(24, 64),
        "gemm.b": normal(24),
    }
    cast = {name: array.astype(dtype) for name, array in weights.items()}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Conv", ["x", "conv.w", "conv.b"], ["a"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "depthwise.w"], ["b"], "depthwise", group=32),
        helper.make_node("GlobalAveragePool", ["b"], ["c"], "pool"),
        helper.make_node("Flatten", ["c"], ["d"], "flat"),
        helper.make_node("MatMul", ["d", "product.w"], ["e"], "product"),
        helper.make_node("Gemm", ["e", "gemm.w", "gemm.b"], ["y"], "gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", channels, 6, 6])],
        [helper.make_tensor_value_info("y", kind, ["n", 24])],
        [numpy_helper.from_array(array, name) for name, array in cast.items()],
    )
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name="me"
    )
    made.metadata_props.add(key="k", value="v")
    return made


def contents(model: ir.Model) -> dict[str, Array]:
    return {v.name or "": v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value}


def brute(array: Array, axis: int, n: int, m: int) -> Array:
    """Each group's best choice by trying all, the first of equals in the order of indices."""
    made = array.copy()
    lines = np.moveaxis(made, axis, -1)
    for index in np.ndindex(lines.shape[:-1]):
        line = lines[index]
        for start in range(0, len(line) - m + 1, m):
            group = [abs(float(value)) for value in line[start : start + m]]
            best = max(itertools.combinations(range(m), n), key=lambda chosen: sum(group[i] for i in chosen))
            for i in range(m):
                if i not in best:
                    line[start + i] = 0
    return made


def run(model: ir.Model, path: Path, **options: Any) -> tuple[Sparsifier, dict[str, Array]]:
    """Make sparse, write, prove; what the file holds."""
    pattern = options.pop("pattern", NM(2, 4))
    sparsifier = Sparsifier(model, SparsitySettings(pattern, **options))
    sparsifier.run()
    with staged(model, path) as file:
        sparsifier.check(file.path)
        file.commit()
    return sparsifier, contents(load(path))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("external", [False, True])
def test_the_smallest_go_and_nothing_else_changes(tmp_path: Path, dtype: Any, external: bool) -> None:
    proto = network(dtype)
    save(ir.from_proto(proto), tmp_path / "in.onnx", external_data=external)
    source, _ = as_ir(str(tmp_path / "in.onnx"))
    before = {name: array.copy() for name, array in contents(source).items()}
    sparsifier, found = run(copy(source), tmp_path / "out.onnx")
    for name, axis in (("conv.w", 1), ("product.w", 0), ("gemm.w", 1)):
        assert np.array_equal(found[name], brute(before[name], axis, 2, 4)), name
        assert found[name].dtype == np.dtype(dtype)
    for name in ("depthwise.w", "conv.b", "gemm.b"):
        assert found[name].tobytes() == before[name].tobytes()
    assert {name: array.tobytes() for name, array in contents(source).items()} == {
        name: array.tobytes() for name, array in before.items()
    }
    written = onnx.load(tmp_path / "out.onnx")
    assert written.producer_name == "me"
    assert [(prop.key, prop.value) for prop in written.metadata_props] == [("k", "v")]
    assert written.opset_import == proto.opset_import
    assert {entry.name for entry in sparsifier.report.sparse} == {"conv.w", "product.w", "gemm.w"}
    for entry in sparsifier.report.sparse:
        absolute = np.abs(before[entry.name].astype(np.float64))
        kept = np.abs(found[entry.name].astype(np.float64)).sum() / absolute.sum()
        assert entry.kept == pytest.approx(kept, rel=1e-4)
        assert entry.holds == "2:4"


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (1, 2), (4, 8), (3, 5), (7, 16), (1, 1)])
def test_any_pattern(tmp_path: Path, n: int, m: int) -> None:
    proto = network()
    model = ir.from_proto(proto)
    before = contents(ir.from_proto(proto))
    sparsifier, found = run(model, tmp_path / "out.onnx", pattern=NM(n, m), target=ANY)
    assert np.array_equal(found["product.w"], brute(before["product.w"], 0, n, m))
    assert np.array_equal(found["gemm.w"], brute(before["gemm.w"], 1, n, m))
    tails = {entry.name: entry.tail for entry in sparsifier.report.sparse}
    assert tails["product.w"] == 32 % m
    assert bool(sparsifier.report.notes) == any(tails.values())


def test_a_tail_is_refused_where_that_is_asked_for() -> None:
    model = ir.from_proto(network(channels=18))
    sparsifier = Sparsifier(model, SparsitySettings(NM(2, 4), ANY, tail="refuse"))
    reasons = {entry.name: entry.reason for entry in sparsifier.report.weights}
    assert "does not divide its input channels: 2 are left over" in str(reasons["conv.w"])
    assert reasons["product.w"] is None


@pytest.mark.parametrize(
    "pattern", [NM(2, 4, (4, 1)), Unstructured(0.7), Unstructured(0.5, (4, 1)), NM(1, 2, (2, 2))]
)
def test_relatives(tmp_path: Path, pattern: NM | Unstructured) -> None:
    proto = network()
    before = contents(ir.from_proto(proto))
    _, found = run(ir.from_proto(proto), tmp_path / "out.onnx", pattern=pattern, target=ANY)
    for name in ("conv.w", "product.w", "gemm.w"):
        zeros = np.count_nonzero(found[name] == 0) / found[name].size
        assert zeros == pytest.approx(1 - pattern.density, abs=0.01)
        stay = found[name] != 0
        assert np.array_equal(found[name][stay], before[name][stay])
    if pattern.block == (4, 1):  # 4 outputs go together: rows of a Gemm's, columns of a product's weight
        gemm, product = found["gemm.w"].reshape(6, 4, 64), found["product.w"].reshape(32, 16, 4)
        assert ((gemm == 0).all(axis=1) | (gemm != 0).all(axis=1)).all()
        assert ((product == 0).all(axis=2) | (product != 0).all(axis=2)).all()


def test_targets_say_which_weights_and_why_not() -> None:
    model = ir.from_proto(network(channels=20))
    entries = {e.name: e for e in Sparsifier(model, SparsitySettings(NM(2, 4))).report.weights}
    assert entries["conv.w"].reason == "20 input channels are no multiple of 16, as tensorrt needs"
    assert "depthwise" in str(entries["depthwise.w"].reason)
    assert entries["product.w"].eligible
    assert "small" in str(entries["product.w"].unlikely)
    with pytest.raises(OptionError, match="only for 2:4"):
        SparsitySettings(NM(1, 4))
    with pytest.raises(OptionError, match="no target 'tpu'"):
        find_target("tpu", NM(2, 4))


def test_globs_choose_weights() -> None:
    def eligible(**globs: Any) -> set[str]:
        report = Sparsifier(ir.from_proto(network()), SparsitySettings(NM(2, 4), **globs)).report
        return {entry.name for entry in report.weights if entry.eligible}

    assert eligible(include=["gemm*"]) == {"gemm.w"}
    assert eligible(exclude=["product"]) == {"conv.w", "gemm.w"}  # a node's name serves too
    with pytest.raises(OptionError, match="matches no weight"):
        eligible(include=["nothing*"])


def test_no_weight_is_an_error_with_the_reasons() -> None:
    with pytest.raises(SparsityError, match=r"12 input channels .*conv\.w"):
        Sparsifier(ir.from_proto(network(channels=12)), SparsitySettings(NM(2, 4), include=["conv.w"]))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "wanda"},
        {"refit": True},
        {"method": "sparsegpt"},
        {"method": "alps"},
    ],
)
def test_what_needs_inputs_says_so(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="--calib"):
        Sparsifier(ir.from_proto(network()), SparsitySettings(NM(2, 4), **settings))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: NM.parse("4:2"),
        lambda: NM.parse("2/4"),
        lambda: NM.parse("0:4"),
        lambda: NM.parse("2:64"),
        lambda: Unstructured(1.0),
        lambda: Unstructured(0.0),
        lambda: parse_block("4"),
        lambda: parse_block("0x1"),
        lambda: SparsitySettings(NM(2, 4), tail="round"),
        lambda: SparsitySettings(NM(2, 4), method="best"),
        lambda: SparsitySettings(NM(2, 4, (4, 1)), ANY, permute=True),
        lambda: SparsitySettings(Unstructured(0.5), ANY, method="sparsegpt"),
        lambda: SparsitySettings(NM(2, 4), permute_seconds=0.0),
    ],
)
def test_bad_options(wrong: Any) -> None:
    with pytest.raises(OptionError):
        wrong()


# -- the proof ----------------------------------------------------------------------------------------------------


def tampered(tmp_path: Path, changes: Mapping[str, Array]) -> None:
    """Prove a file in which some tensors were changed after it was written."""
    model = ir.from_proto(network())
    sparsifier = Sparsifier(model, SparsitySettings(NM(2, 4)))
    sparsifier.run()
    path = tmp_path / "out.onnx"
    save(model, path)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name in changes:
            tensor.CopyFrom(numpy_helper.from_array(changes[tensor.name], tensor.name))
    onnx.save(proto, path)
    sparsifier.check(path)


def test_the_proof_passes_what_is_right(tmp_path: Path) -> None:
    tampered(tmp_path, {})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("product.w", lambda w: w, "nonzeros in a group"),
        (
            "product.w",
            lambda w: np.where(w == w.max(), w * np.float32(1.0000002), 0),
            "itself nor zero",
        ),
        ("gemm.b", lambda w: w + 1, "what it was"),
        ("depthwise.w", lambda w: w * 0, "what it was"),
        ("gemm.w", lambda w: w[:, :32], "another type or shape"),
        ("gemm.w", lambda w: w.astype(np.float64), "another type or shape"),
    ],
)
def test_the_proof_finds_what_is_wrong(tmp_path: Path, name: str, change: Any, message: str) -> None:
    before = contents(ir.from_proto(network()))
    with pytest.raises(VerificationError, match=message):
        tampered(tmp_path, {name: change(before[name])})


def test_a_missing_tensor_is_found(tmp_path: Path) -> None:
    model = ir.from_proto(network())
    other = ir.from_proto(network())
    del other.graph.initializers["gemm.b"]
    with pytest.raises(VerificationError, match="5 tensors where 6"):
        check_file(other, model, {}, {}, {}, NM(2, 4))


# -- inspection ---------------------------------------------------------------------------------------------------


def test_inspection_sees_what_truly_holds(tmp_path: Path) -> None:
    model = ir.from_proto(network())
    dense = inspect_sparsity(model, NM(2, 4))
    assert {entry.holds for entry in dense.weights if entry.eligible} == {"dense"}
    with pytest.raises(SparsityError, match="3 of 3 weights do not hold 2:4"):
        require(dense, NM(2, 4))
    run(model, tmp_path / "out.onnx", exclude=["gemm.w"])
    partly = inspect_sparsity(load(tmp_path / "out.onnx"), NM(2, 4))
    assert {entry.name: entry.holds for entry in partly.weights if entry.eligible} == {
        "conv.w": "2:4",
        "product.w": "2:4",
        "gemm.w": "dense",
    }
    assert {round(entry.zeros or 0, 2) for entry in partly.weights} == {0.0, 0.5}
    with pytest.raises(SparsityError, match=r"1 of 3 weights do not hold 2:4: gemm\.w \(dense\)"):
        require(partly, NM(2, 4))


def test_a_stricter_pattern_holds_the_looser_one(tmp_path: Path) -> None:
    model = ir.from_proto(network())
    run(model, tmp_path / "out.onnx", pattern=NM(1, 4), target=ANY)
    report = inspect_sparsity(load(tmp_path / "out.onnx"), NM(2, 4))
    assert {entry.holds for entry in report.weights if entry.eligible} == {"1:4"}
    require(report, NM(2, 4))


def test_nothing_to_require_it_of_is_an_error() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    proto = helper.make_model(helper.make_graph(nodes, "g", infos[:1], infos[1:]))
    with pytest.raises(SparsityError, match="nothing to require"):
        require(inspect_sparsity(ir.from_proto(proto), NM(2, 4)), NM(2, 4))


# -- streaming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Layout(6, 8, 5, 6), Layout(1, 10, 7, 7, 2), Layout(3, 9, 1, 3)])
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("elements", [1, 7, 40, 1000])
def test_stretches_hold_whole_groups_and_cover_all(layout: Layout, m: int, elements: int) -> None:
    size = int(np.prod(layout.shape))
    position = 0
    for start, stop in layout.stretches(m, elements):
        assert start == position
        position = stop
        outer, contracted, inner = layout.view(start, stop)
        assert outer * contracted * inner == stop - start
        last = (stop // layout.inner) % layout.contracted == 0
        assert contracted % m == 0 or last
        assert (start // layout.inner) % layout.contracted % m == 0
    assert position == size


def test_a_streamed_tensor_is_the_same_by_chunks_and_as_a_whole(tmp_path: Path) -> None:
    array = normal(100, 37)
    path = tmp_path / "data"
    path.write_bytes(b"head" + array.tobytes())
    source = ir.ExternalTensor(
        "data", 4, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name="t", base_dir=tmp_path
    )

    def change(start: int, stop: int, elements: Array) -> None:
        elements *= np.arange(start, stop) % 3

    streamed = StreamedTensor(source, list(stretches(array.size, 100)), change)
    wanted = (array.ravel() * (np.arange(array.size) % 3)).astype(np.float32)
    assert b"".join(bytes(chunk) for chunk in streamed.chunks()) == wanted.tobytes()
    assert streamed.numpy().tobytes() == wanted.tobytes()
    assert streamed.tobytes() == wanted.tobytes()
    with reading(source) as read:
        part = np.empty(5, np.float32)
        read(array.size - 5, part)
    assert np.array_equal(part, array.ravel()[-5:])
