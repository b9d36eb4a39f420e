"""The precision pass: each of its rules on a network made for it, judged by what is written and by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.calibration import Calibration
from graphprune.errors import OptionError, VerificationError
from graphprune.graph.twin import build_twin
from graphprune.model import as_ir, load, save, to_proto
from graphprune.passes.cast_precision import CastPrecisionPass, PrecisionReport, cast_precision
from graphprune.precision import comparison as comparisons
from graphprune.precision.choice import Chooser
from graphprune.precision.elements import element_types
from graphprune.precision.formats import DENIED, EXACT, FORMATS, Format, find_format
from graphprune.precision.typing import find_schema

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


# -- the formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_what_ml_dtypes_says(name: str) -> None:
    low = find_format(name)
    info = ml_dtypes.finfo(low.dtype.numpy())  # type: ignore[no-untyped-call]
    assert low.greatest == float(info.max)
    assert low.roundoff == float(info.eps) / 2
    dtype = low.dtype.numpy()
    with np.errstate(over="ignore"):
        edge = np.array([low.first_infinite, low.last_zero], np.float32)
        inside = np.nextafter(edge, np.array([0, 1], np.float32))
        assert np.isinf(edge[:1].astype(dtype)).all()
        assert np.isfinite(inside[:1].astype(dtype)).all()
    assert float(edge[1:].astype(dtype)[0]) == 0
    assert float(inside[1:].astype(dtype)[0]) > 0


def test_unknown_precision() -> None:
    with pytest.raises(OptionError, match="no precision 'int4'; there are fp16, bf16"):
        cast(chain(), "int4")


def test_bounds_grow_with_depth_and_with_the_roundoff() -> None:
    half, brain = find_format("fp16"), find_format("bf16")
    assert half.bound(16) == 4 * half.bound(1)
    assert brain.bound(5) == 8 * half.bound(5)


@pytest.mark.parametrize("kind", sorted({*DENIED, *EXACT}))
def test_tables_name_ops_that_exist(kind: str) -> None:
    domain, _, op_type = kind.rpartition("::")
    version = 1 if domain else onnx.defs.onnx_opset_version()
    assert find_schema(op_type, version, domain) is not None


# -- what is lowered -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "low"), [("fp16", HALF), ("bf16", BRAIN)])
def test_a_chain_is_lowered_between_two_casts(precision: str, low: int) -> None:
    model, report = cast(chain(), precision)
    assert [node.op_type for node in model.graph.node] == ["Cast", "MatMul", "Relu", "MatMul", "Cast"]
    found = types(model)
    assert (found["x"], found["y"]) == (FLOAT, FLOAT)
    assert found["first.w"] == found["second.w"] == low
    assert names(report) == {"first", "relu", "second"}
    assert not report.kept
    assert (report.casts, report.weights, report.doubled) == (2, 2, 0)
    assert report.bytes_after * 2 == report.bytes_before
    assert 0 < report.max_error["y"] <= report.bounds["y"]
    assert bool(report.runtime_error) == (precision == "fp16")


def test_weights_are_rounded_to_nearest_and_zeros_stay() -> None:
    original = chain()
    array = numpy_helper.to_array(original.graph.initializer[0]).copy()
    array.reshape(-1, 4)[:, :2] = 0  # 2:4
    original.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "first.w"))
    model, _ = cast(original)
    found = numpy_helper.to_array(model.graph.initializer[0])
    np.testing.assert_array_equal(found, array.astype(np.float16))
    assert not found.reshape(-1, 4)[:, :2].any()


def test_io() -> None:
    model, report = cast(chain(), io=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Relu", "MatMul"]
    found = types(model)
    assert (found["x"], found["y"]) == (HALF, HALF)
    assert report.casts == 0
    made = session(model).run(
        None, {"x": np.random.default_rng(7).standard_normal((2, 16)).astype(np.float16)}
    )[0]
    assert made.dtype == np.float16


def test_io_casts_an_output_that_is_made_in_float32() -> None:
    nodes = [dense("first", "x", "a"), helper.make_node("Sin", ["a"], ["y"], "sin")]
    model, _ = cast(network(nodes, {"first.w": weight(16, 8)}), io=True)
    assert types(model)["y"] == HALF
    assert result_types(model)["sin"] == FLOAT


def test_denied_by_the_caller() -> None:
    by_type, report = cast(chain(), deny=["Relu"])
    assert result_types(by_type)["relu"] == FLOAT
    assert "denied" in reasons(report)["relu"]
    by_name, _ = cast(chain(), deny=["sec*"])
    assert result_types(by_name)["second"] == FLOAT
    assert result_types(by_name)["first"] == HALF
    with pytest.raises(OptionError, match="matches 'nothing'"):
        cast(chain(), deny=["nothing"])


def test_denied_by_the_table() -> None:
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("CumSum", ["a", "axis"], ["b"], "sum"),
        dense("second", "b", "y"),
    ]
    constants = {"first.w": weight(16, 8), "second.w": weight(8, 8), "axis": np.array(1)}
    model, report = cast(network(nodes, constants))
    assert result_types(model)["sum"] == FLOAT
    assert reasons(report)["sum"] == DENIED["CumSum"]


def test_scales_of_a_resize_stay_float32() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv"),
        helper.make_node("Resize", ["a", "", "scales"], ["y"], "resize", mode="linear"),
    ]
    constants = {"w": weight(4, 3, 1, 1), "scales": np.array([1, 1, 1.7, 2.3], np.float32)}
    model, _ = cast(network(nodes, constants, {"x": (1, 3, 6, 6)}))
    found = types(model)
    assert result_types(model)["resize"] == HALF
    assert (found["w"], found["scales"]) == (HALF, FLOAT)


def test_outputs_typed_by_an_attribute_stay() -> None:
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("Shape", ["a"], ["shape"], "shape"),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], "ones", value=helper.make_tensor("", FLOAT, [1], [1])),
        helper.make_node("Cast", ["a"], ["wide"], "wide", to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["wide"], ["narrow"], "narrow", to=FLOAT),
        helper.make_node("EyeLike", ["a"], ["eye"], "eye", dtype=FLOAT),
        helper.make_node("Sum", ["ones", "narrow", "eye", "a"], ["b"], "sum"),
        dense("second", "b", "y"),
    ]  # fmt: skip
    model, _ = cast(network(nodes, {"first.w": weight(16, 8), "second.w": weight(8, 8)}))
    found = result_types(model)
    assert [found[name] for name in ("ones", "narrow", "eye")] == [FLOAT] * 3
    assert [found[name] for name in ("first", "sum", "second")] == [HALF] * 3


def test_a_schema_that_lacks_the_type_says_since_when_it_has_it() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv"),
        helper.make_node("Relu", ["a"], ["y"], "relu"),
    ]
    constants, inputs = {"w": weight(4, 3, 1, 1)}, {"x": (1, 3, 6, 6)}
    _, report = cast(network(nodes, constants, inputs), "bf16")
    assert not report.lowered
    assert reasons(report)["conv"] == "Conv of opset 18 does not take bfloat16; from opset 22 on it does"
    _, report = cast(network(nodes, constants, inputs, opset=22), "bf16")
    assert names(report) == {"conv", "relu"}


def test_contributed_ops_by_their_schemas_and_others_not_at_all() -> None:
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("FusedMatMul", ["a", "w"], ["y"], "fused", domain="com.microsoft"),
    ]
    constants = {"first.w": weight(16, 8), "w": weight(8, 8)}
    model, _ = cast(network(nodes, constants))
    assert types(model)["w"] == HALF
    made, _ = as_ir(
        network([*nodes[:1], helper.make_node("Own", ["a"], ["y"], "own", domain="com.acme")], constants)
    )
    report = cast_precision(made, "fp16", verify=False)
    assert reasons(report)["own"] == "the schema of com.acme::Own is not known"
    assert any("ranges were not measured" in note for note in report.notes)
    assert "first" in names(report)


def test_islands_without_a_contraction_stay() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "relu"),
        helper.make_node("Sin", ["a"], ["b"], "sin"),
        helper.make_node("Relu", ["b"], ["c"], "island"),
        helper.make_node("Sin", ["c"], ["y"], "last"),
    ]
    _, report = cast(network(nodes))
    assert not report.lowered
    assert "no contraction" in reasons(report)["island"]


# -- one cast a value ------------------------------------------------------------------------------------------------


def test_one_cast_a_value_and_type() -> None:
    nodes = [
        *(dense(name, "x", name.upper()) for name in "abc"),
        helper.make_node("Sum", ["A", "B", "C"], ["s"], "sum"),
        *(helper.make_node("LpNormalization", ["s"], [f"s{turn}"], f"norm{turn}") for turn in range(3)),
        helper.make_node("Sum", ["s0", "s1", "s2"], ["t"], "again"),
        dense("d", "t", "y"),
    ]
    constants = {f"{name}.w": weight(16, 8) for name in "abc"} | {"d.w": weight(8, 8)}
    model, report = cast(network(nodes, constants))
    casts = [(node.input[0], node.attribute[0].i) for node in model.graph.node if node.op_type == "Cast"]
    assert len(set(casts)) == len(casts) == report.casts
    # x down once, s up once, three norms down, the output up
    assert sorted(casts) == sorted(
        [("x", HALF), ("s", FLOAT), *((f"s{k}", HALF) for k in range(3)), (casts[-1])]
    )


def test_a_weight_read_in_both_formats_is_stored_in_both() -> None:
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("Mul", ["a", "shared"], ["b"], "scale"),
        helper.make_node("Sin", ["b"], ["c"], "sin"),
        helper.make_node("Mul", ["c", "shared"], ["d"], "low"),
        dense("second", "d", "y"),
    ]
    shared = weight(8)
    model, report = cast(
        network(nodes, {"first.w": weight(16, 8), "second.w": weight(8, 8), "shared": shared})
    )
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(stored["shared"], shared)
    np.testing.assert_array_equal(stored["shared_fp16"], shared.astype(np.float16))
    assert report.doubled == 1
    assert set(stored) == {"first.w", "second.w", "shared", "shared_fp16"}


def test_constants_in_nodes_and_initializers_that_are_inputs() -> None:
    nodes = [
        helper.make_node("Constant", [], ["two"], "constant", value_floats=[0.3] * 8),
        dense("first", "x", "a"),
        helper.make_node("Mul", ["a", "two"], ["y"], "mul"),
    ]
    original = network(nodes, {"first.w": weight(16, 8)}, {"x": (2, 16), "first.w": (16, 8)}, opset=12)
    model, _ = cast(original)
    assert types(model)["two"] == HALF
    assert result_types(model)["mul"] == HALF
    assert types(model)["x"] == FLOAT
    old = onnx.ModelProto()
    old.CopyFrom(
        network(nodes[1:2], {"first.w": weight(16, 8)}, {"x": (2, 16), "first.w": (16, 8)}, ("a",), 8)
    )
    old.ir_version = 3
    model, _ = cast(old)
    assert types(model)["first.w"] == HALF


def test_output_that_is_read_too_keeps_name_and_type() -> None:
    nodes = [dense("first", "x", "y"), dense("second", "y", "z")]
    model, _ = cast(network(nodes, {"first.w": weight(16, 8), "second.w": weight(8, 8)}, outputs=("y", "z")))
    assert [output.name for output in model.graph.output] == ["y", "z"]
    assert [types(model)[name] for name in "yz"] == [FLOAT, FLOAT]
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 3


# -- constants that do not survive -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("epsilon", "survives"), [(1e-5, True), (1e-6, True), (1e-9, False), (1e-12, False)])
def test_epsilons(epsilon: float, survives: bool) -> None:
    model, report = cast(norm(epsilon))
    found = result_types(model)
    assert found["add"] == (HALF if survives else FLOAT)
    # what follows may be as small as the epsilon, and must not be taken for 0 either
    assert found["sqrt"] == found["div"] == found["add"]
    assert found["second"] == HALF
    if not survives:
        assert reasons(report)["add"] == f"its constant 'epsilon' ({epsilon:.3g}) would become 0 in float16"
    _, brain = cast(norm(epsilon), "bf16")
    assert "add" in names(brain)


def test_a_row_of_zeros_through_a_small_epsilon_stays_finite() -> None:
    """Lowered, the epsilon would vanish and 0 / 0 come out."""
    model, _ = cast(norm(1e-12))
    x = np.random.default_rng(7).standard_normal((2, 16)).astype(np.float32)
    x[1] = 0
    assert np.isfinite(session(model).run(None, {"x": x})[0]).all()


def test_weights_beyond_the_range() -> None:
    large = weight(16, 8)
    large[3, 3] = 1e5
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("Tanh", ["a"], ["b"], "tanh"),
        dense("second", "b", "y"),
    ]
    model, report = cast(network(nodes, {"first.w": large, "second.w": weight(8, 8)}))
    assert types(model)["first.w"] == FLOAT
    assert "1e+05, beyond the range of float16" in reasons(report)["first"]
    _, brain = cast(network(nodes, {"first.w": large, "second.w": weight(8, 8)}), "bf16")
    assert "first" in names(brain)


def masked(least: float) -> onnx.ModelProto:
    """Scores, masked with a large negative number, their softmax, and a product with it."""
    nodes = [
        dense("scores", "x", "a"),
        helper.make_node("Sub", ["one", "mask"], ["inverse"], "inverse"),
        helper.make_node("Mul", ["inverse", "least"], ["bias"], "bias"),
        helper.make_node("Add", ["a", "bias"], ["b"], "add"),
        helper.make_node("Softmax", ["b"], ["c"], "softmax"),
        dense("values", "c", "y"),
    ]
    constants = {
        "scores.w": weight(16, 8),
        "values.w": weight(8, 8),
        "one": np.array(1, np.float32),
        "least": np.array(least, np.float32),
    }
    return network(nodes, constants, {"x": (2, 16), "mask": (2, 8)})


def test_masks_of_the_least_float_stay_float32_to_the_softmax() -> None:
    """Even where no calibration input is masked: a row that is masked as a whole must not become NaN."""
    model, report = cast(masked(float(np.finfo(np.float32).min)))
    found = result_types(model)
    assert [found[name] for name in ("bias", "add", "softmax")] == [FLOAT] * 3
    assert [found[name] for name in ("scores", "values")] == [HALF] * 2
    assert "may read numbers beyond the range of float16 from 'bias'" in reasons(report)["softmax"]
    x = np.random.default_rng(7).standard_normal((2, 16)).astype(np.float32)
    made = session(model).run(None, {"x": x, "mask": np.zeros((2, 8), np.float32)})[0]
    assert np.isfinite(made).all()


def test_masks_within_the_range_are_lowered() -> None:
    model, _ = cast(masked(-10000.0))
    assert result_types(model)["softmax"] == HALF


def test_bounds_of_a_clip_may_be_infinite() -> None:
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("Clip", ["a", "zero", "top"], ["b"], "clip"),
        dense("second", "b", "y"),
    ]
    constants = {
        "first.w": weight(16, 8),
        "second.w": weight(8, 8),
        "zero": np.array(0, np.float32),
        "top": np.array(np.finfo(np.float32).max),
    }
    model, _ = cast(network(nodes, constants))
    assert result_types(model)["clip"] == HALF


# -- exact arithmetic ------------------------------------------------------------------------------------------------


def test_what_leads_to_an_angle_stays() -> None:
    """A rotary table: positions times frequencies. At position 3000 float16 would be off by a radian."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["positions"], "positions", to=FLOAT),
        helper.make_node("Unsqueeze", ["positions", "last"], ["column"], "column"),
        helper.make_node("MatMul", ["column", "frequencies"], ["angles"], "angles"),
        helper.make_node("Concat", ["angles", "angles"], ["both"], "both", axis=-1),
        helper.make_node("Cos", ["both"], ["cosines"], "cos"),
        dense("first", "x", "a"),
        helper.make_node("Mul", ["a", "cosines"], ["b"], "rotate"),
        dense("second", "b", "y"),
    ]
    constants = {
        "last": np.array([-1]),
        "frequencies": np.array([[1, 0.1, 0.01, 0.001]], np.float32),
        "first.w": weight(16, 8),
        "second.w": weight(8, 8),
    }
    model, report = cast(network(nodes, constants, {"x": (5, 16), "ids": (5,)}))
    found = result_types(model)
    assert [found[name] for name in ("column", "angles", "both", "cos")] == [FLOAT] * 4
    assert [found[name] for name in ("first", "rotate", "second")] == [HALF] * 3
    assert reasons(report)["angles"] == "an angle is computed from it (Cos 'cos')"


def test_what_an_index_is_computed_from_stays() -> None:
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("Sigmoid", ["a"], ["b"], "sigmoid"),
        helper.make_node("Mul", ["b", "size"], ["c"], "scale"),
        helper.make_node("Floor", ["c"], ["d"], "floor"),
        helper.make_node("Cast", ["d"], ["index"], "cast", to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["rows"], "gather"),
        helper.make_node("Mul", ["rows", "a"], ["e"], "mul"),
        dense("second", "e", "y"),
    ]
    constants = {
        "first.w": weight(16, 8),
        "second.w": weight(8, 8),
        "size": np.array(4000, np.float32),
        "table": np.ones(4001, np.float32),
    }
    model, report = cast(network(nodes, constants))
    found = result_types(model)
    assert [found[name] for name in ("scale", "floor")] == [FLOAT] * 2
    assert found["sigmoid"] == HALF
    assert "an index is computed from it" in reasons(report)["floor"]


# -- ranges ----------------------------------------------------------------------------------------------------------


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


def test_overflow_is_found_on_calibration_inputs() -> None:
    _, report = cast(squares(), calibration=given(1.0))
    assert "square" in names(report)
    original = squares()
    model, report = cast(original, calibration=given(200.0))
    found = result_types(model)
    assert [found[name] for name in ("square", "shrink")] == [FLOAT] * 2
    assert [found[name] for name in ("first", "second")] == [HALF] * 2
    # the value that is named is the greatest of all batches, not of the first
    x = np.asarray(given(200.0).inputs["x"])
    top = float(((x @ numpy_helper.to_array(original.graph.initializer[0])) ** 2).max())
    assert f"'square' reaches {top:.4g}, more than half the range of float16" == reasons(report)["square"]
    _, brain = cast(squares(), "bf16", calibration=given(200.0))
    assert "square" in names(brain)


def test_random_inputs_are_said_to_be_random() -> None:
    _, report = cast(chain())
    assert any("random inputs" in note for note in report.notes)
    _, report = cast(chain(), calibration=given(1.0, 2))
    assert not report.notes


# -- verification ----------------------------------------------------------------------------------------------------


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


def test_nodes_that_do_harm_are_found_and_kept() -> None:
    model, report = cast(cancelling())
    found = result_types(model)
    assert [found[name] for name in ("add", "sub")] == [FLOAT] * 2
    assert [found[name] for name in ("second", "third")] == [HALF] * 2
    assert reasons(report)["sub"] == "lowered, it leaves 'y' off by more than the bound"
    assert report.max_error["y"] <= report.bounds["y"]
    _, without = cast(cancelling(), verify=False)
    assert "sub" in names(without)
    assert not without.max_error


def test_it_is_refused_if_nothing_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.precision.formats.BOUND_FACTOR", 1e-9)
    made, _ = as_ir(chain())
    before = to_proto(made).SerializeToString()
    with pytest.raises(VerificationError, match=r"output 'y' in float16 is off by .* no choice of nodes"):
        cast_precision(made, "fp16")
    assert to_proto(made).SerializeToString() == before


def rounded(array: np.ndarray, low: Format) -> np.ndarray:
    return array.astype(low.dtype.numpy()).astype(np.float32)


def test_emulation_rounds_every_result() -> None:
    """The emulation equals NumPy with a rounding behind every op; ONNX Runtime's float16 does not."""
    w = [weight(16, 16), weight(16, 16)]
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("Exp", ["a"], ["b"]),
        helper.make_node("Log", ["b"], ["c"]),
        dense("second", "c", "y"),
    ]
    original, _ = as_ir(network(nodes, {"first.w": w[0], "second.w": w[1]}))
    x = np.random.default_rng(7).standard_normal((2, 16)).astype(np.float32)
    for low in FORMATS.values():
        twin = build_twin(original)
        chooser = Chooser(original, twin, low)
        with comparisons.Comparison(original, twin, chooser.types, low, io=False) as comparison:
            candidate, _ = comparison.lowered(chooser.settle())
            reference = comparison.run_original([{"x": x}], [], 1)
            found = comparison.errors(reference, candidate, {"y": 1.0})["y"]

        exact = np.log(np.exp(x @ w[0])) @ w[1]
        a = rounded(rounded(x, low) @ rounded(w[0], low), low)
        logs = rounded(np.log(rounded(np.exp(a), low)), low)
        expected = rounded(logs @ rounded(w[1], low), low)
        assert found == pytest.approx(float(np.abs(expected - exact).max() / np.abs(exact).max()), rel=0.02)


def test_outputs_behind_a_jump_are_judged_by_what_enters_it() -> None:
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("TopK", ["a", "k"], ["top", "which"], "top"),
        helper.make_node("Gather", ["table", "which"], ["y"], "gather"),
    ]
    # two columns that are equal but for less than float16 tells apart
    w = weight(16, 8)
    w[:, 4:] = w[:, :4] * (1 + 1e-5)
    table = np.arange(8, dtype=np.float32)
    model, report = cast(network(nodes, {"first.w": w, "table": table, "k": np.array([1])}))
    assert result_types(model)["first"] == HALF
    assert report.max_error["a"] <= report.bounds["a"]


# -- subgraphs and functions -----------------------------------------------------------------------------------------


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


def bodies(model: onnx.ModelProto) -> dict[str, onnx.GraphProto]:
    node = next(node for node in model.graph.node if node.op_type == "If")
    return {attribute.name: attribute.g for attribute in node.attribute}


def test_bodies_are_lowered_inside_and_float32_at_their_borders() -> None:
    model, _ = cast(with_if(), calibration=given(1.0))
    for body in bodies(model).values():
        assert body.node[-1].op_type == "Cast"
        assert body.node[-1].attribute[0].i == FLOAT
        assert sum(node.op_type == "Cast" for node in body.node) == 1  # the captured value comes down outside
    assert types(model)["inner.w"] == HALF


def test_overflow_inside_a_body_is_seen() -> None:
    """Each branch is measured on the inputs that lead into it."""
    x = np.asarray(given(1.0).inputs["x"])
    both = np.concatenate([x * np.sign(x.sum()), -x * np.sign(x.sum())])  # eight samples make a batch
    _, report = cast(with_if(1e3), calibration=Calibration({"x": both}, {}))
    kept = reasons(report)
    assert "reaches" in kept["then_square"]
    assert "else_square" in names(report)


def test_overflow_in_a_loop_is_seen_at_its_last_step() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["keep"], ["keep_on"]),
            dense("inner", "state", "a"),
            helper.make_node("Mul", ["a", "eight"], ["next"], "grow"),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("keep", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("keep_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
    )

    def looped(steps: int) -> onnx.ModelProto:
        nodes = [
            dense("first", "x", "a0"),
            helper.make_node("Loop", ["steps", "", "a0"], ["b"], "loop", body=body),
            helper.make_node("Mul", ["b", "tiny"], ["y"], "shrink"),
        ]
        constants = {
            "first.w": weight(16, 8),
            "inner.w": np.eye(8, dtype=np.float32),
            "eight": np.array(8, np.float32),
            "tiny": np.array(1e-4, np.float32),
            "steps": np.array(steps),
        }
        return network(nodes, constants)

    _, few = cast(looped(2))
    assert "grow" in names(few)
    _, many = cast(looped(6))
    assert "'next' reaches" in reasons(many)["grow"]


def test_functions_are_inlined() -> None:
    body = helper.make_function(
        "local",
        "block",
        ["a"],
        ["c"],
        [helper.make_node("Relu", ["a"], ["b"], "relu"), helper.make_node("Sin", ["b"], ["c"], "sin")],
        [helper.make_opsetid("", 18)],
    )
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("block", ["a"], ["b"], "call", domain="local"),
        dense("second", "b", "y"),
    ]
    original = network(nodes, {"first.w": weight(16, 8), "second.w": weight(8, 8)})
    original.functions.append(body)
    model, _ = cast(original)
    assert not model.functions
    ops = [node.op_type for node in model.graph.node]
    assert ops == ["Cast", "MatMul", "Relu", "Cast", "Sin", "Cast", "MatMul", "Cast"]


# -- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [chain, cancelling, lambda: norm(1e-12), with_if, squares])
@pytest.mark.parametrize("io", [False, True])
def test_twice_is_once_and_always_the_same(make: Any, io: bool) -> None:
    original = make()
    options: dict[str, Any] = {"io": io, "calibration": given(200.0, 4)} if make is squares else {"io": io}
    first, _ = cast(original, **options)
    again, _ = cast(original, **options)
    assert first.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
    if not io:
        twice, report = cast(first, **options)
        assert not report.lowered
        assert twice.SerializeToString(deterministic=True) == first.SerializeToString(deterministic=True)


def test_external_weights_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that lies in a file is converted when the result is written, and never held as a whole."""
    array = np.random.default_rng(7).standard_normal((16, 300_000)).astype(np.float32)
    nodes = [dense("first", "x", "a"), helper.make_node("ReduceMean", ["a", "axis"], ["y"], "mean")]
    source = network(nodes, {"first.w": array, "axis": np.array([1])})
    made, _ = as_ir(source)
    save(made, tmp_path / "source.onnx", external_data=True)
    model = load(tmp_path / "source.onnx")

    def refuse(self: ir.ExternalTensor) -> np.ndarray:
        if self.nbytes > 1 << 20:
            raise AssertionError("the whole weight was read at once")
        return original(self)

    report = cast_precision(model, "fp16")
    original = ir.ExternalTensor.numpy
    monkeypatch.setattr(ir.ExternalTensor, "numpy", refuse)
    save(model, tmp_path / "half.onnx")
    monkeypatch.undo()
    assert names(report) == {"first", "mean"}
    half = onnx.load(str(tmp_path / "half.onnx"))
    np.testing.assert_array_equal(numpy_helper.to_array(half.graph.initializer[0]), array.astype(np.float16))
    assert (tmp_path / "half.onnx.data").stat().st_size < 0.51 * (
        tmp_path / "source.onnx.data"
    ).stat().st_size


def test_the_pass_composes_and_reports() -> None:
    made, _ = as_ir(chain())
    step = CastPrecisionPass("bf16")
    result = ir.passes.Sequential(step)(made)
    assert result.modified
    assert step.report is not None
    found = step.report.to_dict()
    assert found["lowered"] == {"MatMul": 2, "Relu": 1}
    assert any("emulation" in note for note in found["notes"])
    assert step.report.contractions == (2, 0)
    assert not step(made).modified


def test_element_types_of_contractions() -> None:
    model, _ = as_ir(chain())
    assert [(c.node, c.weight, c.weight_type, c.is_half) for c in element_types(model)] == [
        ("first", "first.w", "FLOAT", False),
        ("second", "second.w", "FLOAT", False),
    ]
    cast_precision(model, "fp16", deny=["second"])
    found = {c.node: c for c in element_types(model)}
    assert found["first"].is_half
    assert (found["second"].weight_type, found["second"].activation_type) == ("FLOAT", "FLOAT")
