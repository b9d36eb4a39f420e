"""Graphs on which something was wrong once, each the smallest that showed it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphprune
from graphprune.graph import Op
from graphprune.verification.difference import TOLERANCE, difference, least_scale


def model(text: str, **weights: tuple[int, ...]) -> onnx.ModelProto:
    """A graph from ONNX text, with random weights of the given shapes as initializers."""
    rng = np.random.default_rng(0)
    parsed = ir.from_onnx_text('<ir_version: 8, opset_import: ["": 17]> ' + text)
    for name, shape in weights.items():
        tensor = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        value = next(v for node in parsed.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value, value.type, value.shape = tensor, ir.TensorType(tensor.dtype), ir.Shape(shape)
        parsed.graph.register_initializer(value)
    proto: onnx.ModelProto = ir.to_proto(parsed)
    return proto


MENDED = {
    "an index on an axis that ragged labels depend on": model(
        """agraph (float[2, 5, 8] x) => (float[2, 5, 4] y) {
            shape = Constant <value = int64[4] {2, 5, 3, 8}> ()
            index = Constant <value = int64[1, 1] {1}> ()
            axes = Constant <value = int64[1] {0}> ()
            h = MatMul(x, w1)
            split = Reshape(h, shape)
            heads = Transpose <perm = [2, 0, 1, 3]> (split)
            one = GatherND(heads, index)
            two = Squeeze(one, axes)
            y = MatMul(two, w2)
        }""",
        w1=(8, 24),
        w2=(8, 4),
    ),
    "a weight that a constant expression reads as well": model(
        """agraph (float[2, 8] x) => (float[2, 4] y) {
            table = MatMul(positions, w1)
            moved = Tanh(table)
            h = MatMul(x, w1)
            joined = Add(h, moved)
            r = Relu(joined)
            y = MatMul(r, w2)
        }""",
        positions=(1, 8),
        w1=(8, 12),
        w2=(12, 4),
    ),
    "a constant expression that stays whole though its weight is cut": model(
        """agraph (float[2, 8] x) => (float[2, 4] y, float[2, 12] z) {
            two = Constant <value = int64[2] {2, 12}> ()
            table = MatMul(positions, w1)
            z = Expand(table, two)
            h = MatMul(x, w1)
            r = Relu(h)
            y = MatMul(r, w2)
        }""",
        positions=(1, 8),
        w1=(8, 12),
        w2=(12, 4),
    ),
    "two layers that begin with the same zeros": model(
        """agraph (float[2, 6] x) => (float[2, 4] y) {
            shape = Constant <value = int64[2] {2, 12}> ()
            zeros = ConstantOfShape (shape)
            h = MatMul(x, w1)
            a = Max(h, zeros)
            g = MatMul(a, w2)
            b = Max(g, zeros)
            y = MatMul(b, w3)
        }""",
        w1=(6, 12),
        w2=(12, 12),
        w3=(12, 4),
    ),
    "a table of positions longer than the sequence": model(
        """agraph (float[2, 3, 6] x) => (float[2, 3, 4] y) {
            first = Constant <value = int64[3] {0, 1, 2}> ()
            position = Gather <axis = 0> (table, first)
            h = MatMul(x, w1)
            s = Add(h, position)
            r = Relu(s)
            y = MatMul(r, w2)
        }""",
        table=(9, 12),
        w1=(6, 12),
        w2=(12, 4),
    ),
    "steps along two axes of one Slice": model(
        """agraph (float[2, 4, 4] x) => (float[2, 2, 3] y) {
            starts = Constant <value = int64[2] {11, 1}> ()
            ends = Constant <value = int64[2] {-100, -100}> ()
            axes = Constant <value = int64[2] {2, 0}> ()
            steps = Constant <value = int64[2] {-2, -1}> ()
            h = MatMul(x, w1)
            s = Slice(h, starts, ends, axes, steps)
            r = Relu(s)
            y0 = MatMul(r, w2)
            a = Constant <value = int64[1] {0}> ()
            b = Constant <value = int64[1] {2}> ()
            c = Constant <value = int64[1] {1}> ()
            y = Slice(y0, a, b, c)
        }""",
        w1=(4, 12),
        w2=(6, 3),
    ),
}


@pytest.mark.parametrize("name", MENDED)
@pytest.mark.parametrize("seed", range(4))
def test_pruned_equals_the_masked_original(name: str, seed: int) -> None:
    _, report = graphprune.prune(MENDED[name], 0.5, round_to=1, score="random", seed=seed)
    assert report.max_error is not None
    assert report.max_error < 1e-5
    assert report.macs_after < report.macs_before


def test_shared_zeros_couple_nothing() -> None:
    _, report = graphprune.prune(MENDED["two layers that begin with the same zeros"], 0.5, round_to=1)
    assert len(report.plan.cuts) == 2


def test_shared_zeros_stay_shared_where_nothing_is_cut() -> None:
    pruned, _ = graphprune.prune(
        MENDED["two layers that begin with the same zeros"], channels_for={"w1": 0.5}, round_to=1
    )
    fills = [node for node in pruned.graph.node if node.op_type == "ConstantOfShape"]
    assert len(fills) == 1  # the other is a stored constant by now
    pruned, _ = graphprune.prune(MENDED["a table of positions longer than the sequence"], 0.5, round_to=1)
    assert not [node for node in pruned.graph.node if node.op_type == "ConstantOfShape"]


def test_a_branch_that_is_never_taken_may_read_what_is_cut() -> None:
    def branch(op_type: str) -> onnx.GraphProto:
        out = onnx.helper.make_tensor_value_info(op_type, onnx.TensorProto.FLOAT, [2, 12])
        return onnx.helper.make_graph([onnx.helper.make_node(op_type, ["h"], [op_type])], op_type, [], [out])

    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((6, 12)).astype(np.float32),
        "w2": rng.standard_normal((12, 4)).astype(np.float32),
        "always": np.asarray(True),
    }
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w1"], ["h"]),
            onnx.helper.make_node(
                "If", ["always"], ["r"], then_branch=branch("Relu"), else_branch=branch("Identity")
            ),
            onnx.helper.make_node("MatMul", ["r", "w2"], ["y"]),
        ],
        "branches",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 6])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 4])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    branches = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    pruned, report = graphprune.prune(branches, 0.5, round_to=1)
    assert {t.name: list(t.dims) for t in pruned.graph.initializer}["w1"] == [6, 6]
    assert report.max_error is not None


def test_what_a_bounded_function_rounds_away_is_no_difference() -> None:
    op = Op("Sigmoid", "", 13, {}, [], [])
    expected = np.full(3, 2e-9, dtype=np.float32)
    assert difference(expected, expected + np.float32(1.2e-7), least_scale(op)) <= TOLERANCE
    assert difference(expected, expected + np.float32(1e-5), least_scale(op)) > TOLERANCE
    assert difference(expected, expected + np.float32(1.2e-7), least_scale(None)) > TOLERANCE
