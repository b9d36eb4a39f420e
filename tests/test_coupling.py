"""The coupling graph, the chains that are read off it, and what groups say of themselves."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import networkx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphprune
from graphprune import Group, Network, OptionError, analyze, coupling_graph
from graphprune.axes.coupling import Node, Why, why
from graphprune.axes.groups import find_groups
from graphprune.axes.signature import Role
from graphprune.rules.registry import find_rule

from .patterns import PATTERNS, Pattern

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)


@functools.cache
def analysed(pattern: Pattern) -> tuple[Network, networkx.Graph[Node]]:
    network = analyze(pattern.build().model, input_shapes=pattern.input_shapes)
    return network, coupling_graph(network)


def nodes_of(group: Group) -> set[Node]:
    return {(member.tensor, member.axis) for member in group.members}


def weight(name: str, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape)
    return numpy_helper.from_array(values.astype(np.float32), name)


def model(
    nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], x: list[int], y: list[int]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def chain(answer: Why) -> list[str]:
    """A chain in short: tensors with axes, and op types between them."""
    steps: list[str] = []
    for link in answer.chain:
        steps += [] if link.kind is None else [link.kind]
        steps.append(f"{link.tensor}[{link.axis}]")
    return steps


# -- laws -------------------------------------------------------------------------------------------------------


@every_pattern
def test_groups_are_what_the_ops_connect(pattern: Pattern) -> None:
    """The labels of a group flow along the edges: each group that is free is connected, and each edge within groups."""
    network, graph = analysed(pattern)
    for group in network.groups:
        nodes = nodes_of(group)
        assert nodes <= set(graph), "a member that the graph lacks"
        if group.frozen:
            continue  # labels that are known to be frozen are not carried on: parts of it may not have met

        def carries(a: Node, b: Node, name: str = group.name) -> bool:
            return name in graph.edges[a, b]["groups"]

        parts = list(
            networkx.connected_components(networkx.subgraph_view(graph.subgraph(nodes), filter_edge=carries))
        )
        assert len(parts) == 1, (group.name, parts)
    for a, b, edge in graph.edges(data=True):
        assert edge["groups"], "an edge that carries nothing"
        assert set(edge["groups"]) <= set(graph.nodes[a]["groups"]) & set(graph.nodes[b]["groups"])
        assert a[0] != b[0], "an op ties operands, not the axes of one"
        assert edge["op"]
        assert edge["kind"]
        assert edge["via"]


@every_pattern
def test_the_graph_is_no_larger_than_the_network(pattern: Pattern) -> None:
    network, graph = analysed(pattern)
    operands = [
        len(tensor.shape or ())
        for op in network.analysis.graph.ops
        for tensor in (*op.inputs, *op.outputs)
        if tensor is not None
    ]
    assert graph.number_of_edges() <= sum(operands)
    assert graph.number_of_nodes() <= sum(operands) + len(network.analysis.graph.tensors)


@every_pattern
def test_any_two_members_of_a_free_group_have_a_chain(pattern: Pattern) -> None:
    network, graph = analysed(pattern)
    free = next((g for g in network.groups if not g.frozen and len(nodes_of(g)) > 1), None)
    if free is None:
        assert all(g.frozen or len(nodes_of(g)) == 1 for g in network.groups)
        return
    first, *_, last = (f"{m.tensor}[{m.axis}]" for m in free.members)
    answer, back = why(network, first, last), why(network, last, first)
    assert answer.group is not None
    assert len(answer.chain) == len(back.chain)
    for a, b in itertools.pairwise(answer.chain):
        edge = graph.edges[(a.tensor, a.axis), (b.tensor, b.axis)]
        assert (b.op, b.kind, b.via) == (edge["op"], edge["kind"], edge["via"])
        assert answer.group.name in edge["groups"]


@every_pattern
def test_groups_count_no_parameter_twice(pattern: Pattern) -> None:
    network, _ = analysed(pattern)
    names = [group.name for group in network.groups]
    assert len(set(names)) == len(names)
    total = sum(
        value.const_value.size
        for graph in network.model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    ) + sum(
        tensor.data.size
        for tensor in network.analysis.graph.tensors
        if tensor.constant and tensor.data is not None
    )
    contractions = {
        op.index for op in network.analysis.graph.ops if (rule := find_rule(op)) is not None and rule.macs
    }
    roles = {role.value for role in Role} | {"activation"}
    for group in network.groups:
        assert 0 <= group.parameters <= total
        assert group.macs == 0 or contractions
        assert {member.role for member in group.members} <= roles
        assert all((member.role == "activation") != member.is_constant for member in group.members)


@every_pattern
def test_groups_partition_the_labels(pattern: Pattern) -> None:
    network, _ = analysed(pattern)
    labels = np.concatenate([np.zeros(0, dtype=np.int32), *(group.labels for group in network.groups)])
    assert len(np.unique(labels)) == len(labels)
    assert np.array_equal(np.sort(labels), network.analysis.labels())
    for group in network.groups:
        frozen = network.analysis.atoms.is_frozen(group.labels)
        assert bool(frozen.any()) == (group.frozen is not None)
        statistical = network.analysis.atoms.is_statistical(group.labels)
        assert bool(statistical.any()) == (group.statistical is not None)


def test_groups_are_found_again() -> None:
    network, _ = analysed(PATTERNS[0])
    again = find_groups(network.analysis)
    assert [group.name for group in again] == [group.name for group in network.groups]
    for one, other in zip(again, network.groups, strict=True):
        assert np.array_equal(one.labels, other.labels)


# -- roles, names, costs ----------------------------------------------------------------------------------------


@functools.cache
def block() -> Network:
    """A linear layer of transposed weight, a LayerNorm, fused query-key-value heads read apart, a classifier."""
    nodes = [
        helper.make_node("Transpose", ["w_in"], ["w_in_t"], "flip", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "w_in_t"], ["h"], "project"),
        helper.make_node("LayerNormalization", ["h", "scale", "shift"], ["normed"], "norm"),
        helper.make_node("MatMul", ["normed", "w_up"], ["up"], "widen"),
        helper.make_node("Reshape", ["up", "split"], ["heads"], "by_head"),
        helper.make_node("Transpose", ["heads"], ["first"], "heads_first", perm=[0, 2, 1, 3]),
        helper.make_node("Transpose", ["heads"], ["flipped"], "keys", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["first", "flipped"], ["scores"], "attend"),
        helper.make_node("MatMul", ["scores", "first"], ["mixed"], "mix"),
        helper.make_node("Transpose", ["mixed"], ["last"], "heads_last", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["last", "join"], ["joined"], "from_heads"),
        helper.make_node("MatMul", ["joined", "w_out"], ["y"], "out"),
    ]
    weights = [
        weight("w_in", 12, 6),
        weight("scale", 12),
        weight("shift", 12),
        weight("w_up", 12, 20),
        weight("w_out", 20, 5),
        numpy_helper.from_array(np.array([0, 0, 4, 5]), "split"),
        numpy_helper.from_array(np.array([0, 0, 20]), "join"),
    ]
    return analyze(model(nodes, weights, [2, 3, 6], [2, 3, 5]))


def group_named(network: Network, name: str) -> Group:
    return next(group for group in network.groups if group.name == name)


def test_roles() -> None:
    weights = {(m.tensor, m.axis): m.role for g in block().groups for m in g.members if m.is_constant}
    assert weights["w_in", 0] == "pass-through"  # seen through the Transpose that turns it
    assert weights["w_in", 1] == "contracted"
    assert weights["scale", 0] == weights["shift", 0] == "normalised"
    assert weights["w_up", 0] == "contracted"
    assert weights["w_up", 1] == "pass-through"
    assert weights["w_out", 0] == "contracted"


def test_names_and_sizes_of_two_cuts_of_one_axis() -> None:
    dimensions, heads = group_named(block(), "w_up[1]"), group_named(block(), "w_up[1]/4x5")
    assert (dimensions.size, len(dimensions.blocks), dimensions.unit) == (20, 4, 5)
    assert (heads.size, len(heads.blocks)) == (4, 1)
    assert dimensions.parameters == heads.parameters == 12 * 20 + 20 * 5


def test_macs_are_those_of_the_contractions_along_it() -> None:
    rows = 2 * 3
    attention = 2 * (2 * 4 * 3 * 3 * 5)
    dimensions = group_named(block(), "w_up[1]")
    assert dimensions.macs == rows * 12 * 20 + attention + rows * 20 * 5
    stream = next(group for group in block().groups if group.statistical)
    assert stream.macs == rows * 6 * 12 + rows * 12 * 20


def test_a_group_prints_itself() -> None:
    text = str(group_named(block(), "w_up[1]"))
    assert text.splitlines()[0] == "w_up[1]: 20 (free)"
    assert "    w_out[0] contracted" in text.splitlines()


def test_members_along_two_axes_of_one_weight_are_counted_once() -> None:
    """A recurrent layer's state: its recurrent weight is cut along both axes."""
    nodes = [
        helper.make_node("RNN", ["x", "w", "r"], ["", "state"], "rnn", hidden_size=6),
        helper.make_node("Squeeze", ["state", "zero"], ["flat"], "squeeze"),
        helper.make_node("MatMul", ["flat", "v"], ["y"], "out"),
    ]
    weights = [weight("w", 1, 6, 3), weight("r", 1, 6, 6), weight("v", 6, 4)]
    weights.append(numpy_helper.from_array(np.array([0]), "zero"))
    network = analyze(model(nodes, weights, [5, 2, 3], [2, 4]))
    (state,) = (group for group in network.groups if not group.frozen)
    recurrent = {(m.axis, m.role) for m in state.members if m.tensor == "r"}
    assert recurrent == {(1, "pass-through"), (2, "contracted")}
    assert state.parameters == 18 + 36 + 24


# -- why --------------------------------------------------------------------------------------------------------


def test_a_chain_through_reshapes_and_transposes() -> None:
    answer = why(block(), "w_up", "w_out")
    assert answer.group is group_named(block(), "w_up[1]")
    assert chain(answer) == [
        "w_up[1]", "MatMul", "up[2]", "Reshape", "heads[3]", "Transpose", "first[3]", "MatMul", "mixed[3]",
        "Transpose", "last[3]", "Reshape", "joined[2]", "MatMul", "w_out[0]",
    ]  # fmt: skip
    assert answer.chain[2].via == "20 -> 4 x 5"
    assert answer.chain[-1].via == "factor k, contracted"


def test_a_shared_tensor_ties_no_groups_that_do_not_meet() -> None:
    """Two layers into one Concat: one tensor bears both groups, and no chain leads from one to the other."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["left"], "make_a"),
        helper.make_node("MatMul", ["x", "b"], ["right"], "make_b"),
        helper.make_node("Concat", ["left", "right"], ["both"], "join", axis=1),
        helper.make_node("MatMul", ["both", "c"], ["y"], "out"),
    ]
    network = analyze(
        model(nodes, [weight("a", 3, 4), weight("b", 3, 6), weight("c", 10, 2)], [2, 3], [2, 2])
    )
    graph = coupling_graph(network)
    assert networkx.has_path(graph, ("a", 1), ("b", 1))
    answer = why(network, "a[1]", "b[1]")
    assert answer.group is None
    assert answer.chain == ()
    assert str(answer).splitlines() == [
        "a[1] and b[1] are not tied",
        "  a[1] is in group a[1] of 4 (free)",
        "  b[1] is in group b[1] of 6 (free)",
    ]
    assert chain(why(network, "a[1]", "c")) == [
        "a[1]",
        "MatMul",
        "left[1]",
        "Concat",
        "both[1]",
        "MatMul",
        "c[0]",
    ]
    # The input ties them along their other axis.
    assert chain(why(network, "a", "b")) == ["a[0]", "MatMul", "x[1]", "MatMul", "b[0]"]


def test_names_stand_for_all_uses_of_a_shared_constant() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["one"], "make_a"),
        helper.make_node("Add", ["one", "bias"], ["two"], "bias_a"),
        helper.make_node("MatMul", ["two", "b"], ["three"], "make_b"),
        helper.make_node("Add", ["three", "bias"], ["four"], "bias_b"),
        helper.make_node("MatMul", ["four", "c"], ["y"], "out"),
    ]
    weights = [weight("a", 3, 8), weight("bias", 8), weight("b", 8, 8), weight("c", 8, 2)]
    network = analyze(model(nodes, weights, [2, 3], [2, 2]))
    assert chain(why(network, "bias", "a[1]"))[-3:] == ["one[1]", "MatMul", "a[1]"]
    assert chain(why(network, "bias", "c[0]"))[-3:] == ["four[1]", "MatMul", "c[0]"]
    assert why(network, "a[1]", "c[0]").group is None


def test_negative_axes_and_brackets_in_names() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w[0]"], ["h"], "make"),
        helper.make_node("MatMul", ["h", "v"], ["y"], "out"),
    ]
    network = analyze(model(nodes, [weight("w[0]", 3, 4), weight("v", 4, 2)], [2, 3], [2, 2]))
    expected = ["w[0][1]", "MatMul", "h[1]", "MatMul", "v[0]"]
    for first in ("w[0]", "w[0][1]", "w[0][-1]"):
        assert chain(why(network, first, "v[-2]")) == expected


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("w_upp", "did you mean 'w_up'"),
        ("w_up[2]", "'w_up' has 2 axes, and no axis 2"),
        ("qqqq", "inspect MODEL -v"),
    ],
)
def test_names_that_the_model_lacks(asked: str, says: str) -> None:
    with pytest.raises(OptionError, match=says.replace("[", r"\[")):
        why(block(), asked, "w_up")


def test_a_tensor_that_no_label_reaches() -> None:
    answer = why(block(), "scores[2]", "w_up[1]")
    assert answer.group is None
    assert (
        str(answer).splitlines()[1] == "  scores[2] is in no group: no label reaches it, it keeps all it has"
    )


def test_a_network_without_groups() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], "relu")]
    network = analyze(model(nodes, [], [2, 3], [2, 3]))
    assert network.groups == []
    assert coupling_graph(network).number_of_nodes() == 0
    assert why(network, "x", "y").group is None


def test_exported() -> None:
    exported: Any = graphprune.coupling_graph
    assert exported is coupling_graph
    assert isinstance(block(), graphprune.Network)
