"""What the precision pass lowers: each of its rules on a network made for it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.errors import OptionError
from graphprune.model import as_ir
from graphprune.passes.cast_precision import cast_precision
from graphprune.precision.formats import DENIED, EXACT, FORMATS, find_format
from graphprune.precision.typing import find_schema

from .precision_networks import (
    BRAIN,
    FLOAT,
    HALF,
    cast,
    chain,
    dense,
    names,
    network,
    norm,
    reasons,
    result_types,
    session,
    types,
    weight,
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


@pytest.mark.parametrize(("rows", "low"), [(10, False), (9000, True)])
def test_large_tables_are_stored_low_wherever_they_are_read(rows: int, low: bool) -> None:
    """An embedding whose rows go into a float32 op at once: what counts is the memory that it takes."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"], "gather"),
        helper.make_node("LpNormalization", ["a"], ["b"], "norm"),
        dense("first", "b", "y"),
    ]
    constants = {"table": weight(rows, 8), "first.w": weight(8, 8)}
    model, _ = cast(network(nodes, constants, {"ids": (3,)}))
    assert types(model)["table"] == (HALF if low else FLOAT)


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
