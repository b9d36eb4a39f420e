"""README's promise: one line makes an op of your own prunable; without it the op freezes what it touches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphprune
from graphprune.rules import register
from graphprune.rules.registry import _RULES


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    before = dict(_RULES)
    yield
    _RULES.clear()
    _RULES.update(before)


def network() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"w1": (24, 3, 3, 3), "scale": (24,), "shift": (24,), "w2": (16, 24, 3, 3)}
    stored = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["p"]),
        helper.make_node("ScaleShift", ["p", "scale", "shift"], ["q"], domain="com.acme"),
        helper.make_node("Conv", ["q", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "custom",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16, 4, 4])],
        stored,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.acme", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_without_a_rule_the_op_freezes_and_says_so() -> None:
    groups = {group.name: group for group in graphprune.analyze(network()).groups}
    assert "there is no rule for com.acme::ScaleShift" in (groups["w1[0]"].frozen or "")
    with pytest.raises(graphprune.NothingToPruneError, match=r"com\.acme::ScaleShift"):
        graphprune.prune(network(), 0.5, include=["w1"])


def test_one_line_makes_it_prunable() -> None:
    register("com.acme::ScaleShift", "n c S*, c, c -> n c S*")
    pruned, _ = graphprune.prune(network(), 0.5, verify=False)  # ONNX Runtime does not know the op
    shapes = {tensor.name: tuple(tensor.dims) for tensor in pruned.graph.initializer}
    assert shapes == {"w1": (12, 3, 3, 3), "scale": (12,), "shift": (12,), "w2": (16, 12, 3, 3)}


def test_a_rule_that_contradicts_the_op_freezes_with_the_reason() -> None:
    register("com.acme::ScaleShift", "n c S*, c c, c -> n c S*")
    groups = {group.name: group for group in graphprune.analyze(network()).groups}
    assert "input 1 has rank 1, the term has 2 axes" in (groups["w1[0]"].frozen or "")


def test_what_cannot_be_verified_is_not_returned() -> None:
    register("com.acme::ScaleShift", "n c S*, c, c -> n c S*")
    with pytest.raises(graphprune.VerificationError, match="no-verify"):
        graphprune.prune(network(), 0.5)
