"""A network without some of its residual branches is exact, valid, and smaller."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphprune
from graphprune.calibration import Calibration
from graphprune.depth.blocks import Branch
from graphprune.depth.measures import measure_branches
from graphprune.depth.removal import ResidualNetwork
from graphprune.passes.remove_blocks import RemoveBlocksPass, remove_blocks
from tests.residual import (
    CONVOLUTIONAL,
    WIDTH,
    calibration,
    convolutional,
    found,
    image_calibration,
    macs,
    relu,
    run,
    stack,
    stack_oracle,
    weights,
)
from tests.twins import parse


def test_branch_of_a_residual_cnn_is_removed() -> None:
    model = convolutional()
    report = remove_blocks(model, 1, calibration=image_calibration())
    assert [block.parameters for block in report.removed] == [2 * 4 * 4 * 9]
    assert "k1" not in model.graph.initializers
    assert "k2" not in model.graph.initializers
    # The first stage is the ReLU of its input.
    x = np.random.default_rng(3).standard_normal((2, 4, 8, 8)).astype(np.float32)
    rest = parse(
        CONVOLUTIONAL[: CONVOLUTIONAL.index("c1 =")]
        + "t1 = Relu(x)"
        + CONVOLUTIONAL[CONVOLUTIONAL.index("t1 = Relu(s1)") + len("t1 = Relu(s1)") :],
        **{
            name: value.const_value.numpy()
            for name, value in convolutional().graph.initializers.items()
            if value.const_value is not None and name not in ("k1", "k2")
        },
    )
    np.testing.assert_array_equal(run(model, {"x": x})["y"], run(rest, {"x": x})["y"])


@pytest.mark.parametrize("by", ["cosine", "error", "refit"])
def test_the_planted_branch_goes_first(by: Any) -> None:
    model, w = stack()
    report = remove_blocks(model, 1, calibration=calibration(), by=by)
    assert report.max_error == 0.0
    assert report.by == by
    assert len(report.kept) == 2
    assert max(report.kept.values()) > 100 * report.removed[0].score
    x = np.random.default_rng(7).standard_normal((5, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(run(model, {"x": x})["y"], stack_oracle(w, x, (2,)), rtol=1e-4, atol=1e-5)
    assert sorted(model.graph.initializers) == ["head", "v1", "v3", "w1", "w3"]
    assert report.parameters_before - report.parameters_after == report.removed[0].parameters == 2 * WIDTH**2
    assert report.macs_after == macs(model)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("by", ["cosine", "error", "refit"])
def test_several_branches_against_numpy(by: Any, count: int) -> None:
    model, w = stack()
    sums = {branch.name: k for k, branch in enumerate(found(model), 1)}
    report = remove_blocks(model, count, calibration=calibration(), by=by)
    without = tuple(sums[block.name] for block in report.removed)
    assert without[0] == 2
    x = np.random.default_rng(7).standard_normal((5, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(run(model, {"x": x})["y"], stack_oracle(w, x, without), rtol=1e-4, atol=1e-5)


NESTED = """agraph (float[2, 6] x) => (float[2, 6] y) {
    a = MatMul(x, w1)  g = MatMul(a, w2)  t = Add(a, g)  f = MatMul(t, w3)  s = Add(x, f)  y = MatMul(s, head)
}"""


def test_a_branch_goes_with_those_inside_it() -> None:
    model = parse(NESTED, **weights("w1 w2 w3 head"))
    inner, outer = found(model)
    assert outer.contains(inner)
    assert not inner.contains(outer)
    arrays = weights("w1 w2 w3 head")
    arrays["w3"] *= 1e-4  # the outer one matters least: both are gone then
    model = parse(NESTED, **arrays)
    report = remove_blocks(model, 1, calibration=Calibration({"x": calibration(2).inputs["x"]}, {}, 2))
    assert [block.name for block in report.removed] == [outer.name]
    assert report.kept == {}
    assert list(model.graph.initializers) == ["head"]
    # Two can go as well: the inner one first, or there would not be a second.
    model = parse(NESTED, **arrays)
    report = remove_blocks(model, 2, calibration=Calibration({"x": calibration(2).inputs["x"]}, {}, 2))
    assert [block.name for block in report.removed] == [inner.name, outer.name]
    assert list(model.graph.initializers) == ["head"]


def test_outputs_keep_their_names() -> None:
    model = parse(
        """agraph (float[N, 6] x) => (float[N, 6] s, float[N, 6] t, float[N, 6] y) {
            s = Relu(x)  f = MatMul(s, w)  t = Add(s, f)  g = MatMul(t, v)  y = Add(g, t)
        }""",
        **weights("w v"),
    )
    remove_blocks(model, 2, calibration=calibration())
    x = calibration().inputs["x"][:3]
    results = run(model, {"x": x})
    assert list(results) == ["s", "t", "y"]
    for result in results.values():
        np.testing.assert_array_equal(result, relu(x))


def test_an_input_may_be_all_that_is_left() -> None:
    model = parse(
        """agraph (float[N, 6] x) => (float[N, 6] y) {
            f = MatMul(x, w)  s = Add(x, f)  g = MatMul(s, v)  y = Add(s, g)
        }""",
        **weights("w v"),
    )
    remove_blocks(model, 2, calibration=calibration())
    x = calibration().inputs["x"][:]
    np.testing.assert_array_equal(run(model, {"x": x})["y"], x)
    assert not model.graph.initializers


def test_metadata_stays() -> None:
    model, _ = stack()
    model.metadata_props["author"] = "somebody"
    next(iter(model.graph)).metadata_props["scope"] = "first"
    remove_blocks(model, 1, calibration=calibration())
    assert model.metadata_props["author"] == "somebody"
    assert next(iter(model.graph)).metadata_props["scope"] == "first"


def test_a_weight_that_two_branches_read_stays_until_both_are_gone() -> None:
    text = """agraph (float[N, 6] x) => (float[N, 6] y) {
        f1 = MatMul(x, w)  s1 = Add(x, f1)  f2 = MatMul(s1, w)  s2 = Add(s1, f2)  y = MatMul(s2, head)
    }"""
    model = parse(text, **weights("w head"))
    assert [branch.parameters for branch in found(model)] == [0, 0]
    report = remove_blocks(model, 1, calibration=calibration())
    assert report.parameters_after == report.parameters_before
    assert "w" in model.graph.initializers
    remove_blocks(model, 1, calibration=calibration())
    assert sorted(model.graph.initializers) == ["head"]


def test_initializers_that_are_inputs_go_as_inputs() -> None:
    model, _ = stack()
    proto = ir.to_proto(model)
    proto.ir_version = 3
    proto.opset_import[0].version = 8
    del proto.opset_import[1:]
    for tensor in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, 1, tensor.dims))
    old = ir.from_proto(proto)
    remove_blocks(old, 1, calibration=calibration())
    left = ["x", "w1", "v1", "w3", "v3", "head"]
    assert sorted(value.name or "" for value in old.graph.inputs) == sorted(left)
    assert run(old, {"x": calibration().inputs["x"][:2]})["y"].shape == (2, WIDTH)


def test_infinities_in_a_removed_branch_do_not_come_through() -> None:
    model = parse(
        """agraph (float[N, 6] x) => (float[N, 6] y) {
            f1 = MatMul(x, w)  s1 = Add(x, f1)  d = Div(s1, zero)  f2 = MatMul(d, v)  y = Add(s1, f2)
        }""",
        zero=np.array(0, np.float32),
        **weights("w v"),
    )
    network = ResidualNetwork.of(model)
    scores = measure_branches(network, calibration())
    first, second = network.removable
    assert np.isfinite(scores[first])
    assert scores[second] == float("inf")  # last to go
    report = remove_blocks(model, 2, calibration=calibration())
    assert [block.name for block in report.removed] == [first.name, second.name]
    assert report.max_error == 0.0
    x = calibration().inputs["x"][:]
    np.testing.assert_array_equal(run(model, {"x": x})["y"], x)


def test_control_flow_in_a_branch_goes_with_it() -> None:
    model = parse(
        """agraph (float[2, 6] x, bool c) => (float[2, 6] y) {
            a = MatMul(x, w)
            h = If(c) <then_branch = yes () => (float[2, 6] p) { p = MatMul(a, v) },
                       else_branch = no () => (float[2, 6] q) { q = Relu(a) }>
            f = MatMul(h, u)  s = Add(x, f)  y = MatMul(s, eye)
        }""",
        eye=np.eye(WIDTH, dtype=np.float32),
        **weights("w v u"),
    )
    x = calibration(2).inputs["x"][:]
    remove_blocks(model, 1, calibration=Calibration({"x": x}, {"c": np.array(True)}, 2))
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert list(model.graph.initializers) == ["eye"]
    np.testing.assert_array_equal(run(model, {"x": x, "c": np.array(True)})["y"], x)


FUNCTIONS = """agraph (float[N, 6] x) => (float[N, 6] y) {
    s1 = local.layer(x, w1, v1)  s2 = local.layer(s1, w2, v2)  r = local.act(s2)  y = MatMul(r, head)
}
<domain: "local", opset_import: ["" : 18, "local" : 1]>
layer (s, w, v) => (o) { a = MatMul(s, w)  b = local.act(a)  f = MatMul(b, v)  o = Add(s, f) }
<domain: "local", opset_import: ["" : 18]>
act (i) => (o) { o = Relu(i) }
"""


def test_a_function_that_holds_a_branch_is_inlined() -> None:
    w = weights("w1 v1 w2 v2 head")
    w["v1"] *= 1e-3
    model = parse(FUNCTIONS, **w)
    assert [branch.result.name for branch in found(model)] != []
    report = remove_blocks(model, 1, calibration=calibration())
    assert report.max_error == 0.0
    assert sorted(model.graph.initializers) == ["head", "v2", "w2"]
    assert [function.name for function in model.functions.values()] == ["act"]  # no sum in it: left as it is
    x = calibration().inputs["x"][:]
    expected = relu(x + relu(x @ w["w2"]) @ w["v2"]) @ w["head"]
    np.testing.assert_allclose(run(model, {"x": x})["y"], expected, rtol=1e-4, atol=1e-5)


def test_a_function_around_a_branch_goes_when_nothing_calls_it() -> None:
    model = parse(
        """agraph (float[N, 6] x) => (float[N, 6] y) {
            f = local.mlp(x, w, v)  s = Add(f, x)  y = MatMul(s, head)
        }
        <domain: "local", opset_import: ["" : 18]>
        mlp (s, w, v) => (o) { a = MatMul(s, w)  b = Relu(a)  o = MatMul(b, v) }
        """,
        **weights("w v head"),
    )
    remove_blocks(model, 1, calibration=calibration())
    assert not model.functions
    assert [node.op_type for node in model.graph] == ["MatMul"]


def fused(op: str, opset: int, stream: str, bias: bool = True, dtype: str = "float") -> ir.Model:
    """A sum fused with its normalisation, its result read by a post-norm (`y`) or pre-norm (`z`) stream."""
    operands = {"SkipLayerNormalization": "x, f, g, b", "SkipSimplifiedLayerNormalization": "x, f, g"}[op]
    operands += ", c" if bias else ""
    outputs = "n, , , z" if stream == "z" else "n"
    results = f"{dtype}[N, 3, 6] y" + (f", {dtype}[N, 3, 6] z" if stream == "z" else "")
    text = f"""<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    agraph ({dtype}[N, 3, 6] x) => ({results}) {{
        f = MatMul(x, w)  {outputs} = com.microsoft.{op}<epsilon = 1e-3>({operands})  y = MatMul(n, head)
    }}"""
    generator = np.random.default_rng(0)
    proto = onnx.parser.parse_model(text)
    kind = np.float16 if dtype == "float16" else np.float32
    vectors = {name: generator.standard_normal(WIDTH) for name in "gbc"[: 3 if bias else 2]}
    if op == "SkipSimplifiedLayerNormalization":
        del vectors["b"]
    for name, array in {**weights("w head"), **vectors}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(kind), name))
    return ir.from_proto(proto)


@pytest.mark.parametrize("stream", ["y", "z"])
@pytest.mark.parametrize(
    ("op", "opset", "left"),
    [
        ("SkipLayerNormalization", 17, "LayerNormalization"),
        ("SkipLayerNormalization", 14, "SkipLayerNormalization"),
        ("SkipSimplifiedLayerNormalization", 17, "SkipSimplifiedLayerNormalization"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_sum_leaves_its_normalisation(
    op: str, opset: int, left: str, stream: str, bias: bool
) -> None:
    model = fused(op, opset, stream, bias)
    arrays = {
        n: v.const_value.numpy() for n, v in model.graph.initializers.items() if v.const_value is not None
    }
    x = np.random.default_rng(3).standard_normal((4, 3, WIDTH)).astype(np.float32)
    report = remove_blocks(model, 1, calibration=Calibration({"x": x}, {}))
    assert report.max_error is not None
    assert report.max_error < 1e-5
    assert {node.op_type for node in model.graph} - {"Identity"} == {left, "MatMul"}
    assert "c" not in model.graph.initializers  # the branch's bias goes with it
    exact = x.astype(np.float64)
    if op == "SkipLayerNormalization":
        exact = exact - exact.mean(-1, keepdims=True)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-3) * arrays["g"] + arrays.get("b", 0)
    results = run(model, {"x": x})
    np.testing.assert_allclose(results["y"], exact @ arrays["head"], rtol=1e-4, atol=1e-5)
    if stream == "z":
        np.testing.assert_array_equal(results["z"], x)


def test_a_fused_sum_without_a_counterpart_cannot_be_removed() -> None:
    (branch,) = found(fused("SkipSimplifiedLayerNormalization", 17, "y", dtype="float16"))
    assert branch.obstacle is not None
    assert "half precision" in branch.obstacle


def test_more_than_there_are() -> None:
    model, _ = stack()
    names = ", ".join(branch.name for branch in found(model))
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(
        graphprune.OptionError, match=rf"cannot remove 4 .* has 3 that can be removed: {names}"
    ):
        remove_blocks(model, 4, calibration=calibration())
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(
    ("options", "message"), [({"count": -1}, "0 or more"), ({"count": 1, "by": "size"}, "unknown measure")]
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    model, _ = stack()
    with pytest.raises(graphprune.OptionError, match=message):
        remove_blocks(model, **options, calibration=calibration())


def test_none_to_remove_changes_nothing() -> None:
    model, _ = stack()
    before = ir.to_proto(model).SerializeToString()
    result = RemoveBlocksPass(0)(model)
    assert not result.modified
    assert ir.to_proto(model).SerializeToString() == before


def test_a_result_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without = ResidualNetwork.without

    def swapped(self: ResidualNetwork, branches: Iterable[Branch]) -> ir.Model:
        """The branch stays, and the stream goes."""
        return without(self, [Branch(b.op, b.dropped, b.kept, b.source) for b in branches])

    monkeypatch.setattr(ResidualNetwork, "without", swapped)
    model, _ = stack()
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(graphprune.VerificationError, match="output 'y' without the branches"):
        remove_blocks(model, 1, calibration=calibration())
    assert ir.to_proto(model).SerializeToString() == before


def test_the_report_as_json() -> None:
    model, _ = stack()
    report = remove_blocks(model, 2, calibration=calibration())
    told = json.loads(json.dumps(report.to_dict()))
    assert [block["score"] for block in told["removed"]] == [block.score for block in report.removed]
    assert told["parameters"]["after"] == report.parameters_after
