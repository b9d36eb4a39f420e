"""The static twin: If, Loop and Scan laid out flat."""

from __future__ import annotations

from graphprune.graph import TWIN_DOMAIN
from graphprune.graph.twin import build_twin
from tests.twins import check, kinds, named, parse, twin

BRANCHES = """
        y = If (c) <
            then_branch = yes () => (float[n,m] a) { a = Mul(x, w) },
            else_branch = no () => (float[n,m] b) { t = Relu(x)
                                                   b = Add(t, w) }
        >
"""


def test_if_with_a_known_condition() -> None:
    graph = twin(
        "g (float[2,3] x) => (float[2,3] y) <float[3] w = {1, 2, 3}, bool c = {0}> {" + BRANCHES + "}",
    )
    assert kinds(graph) == ["Relu", "Add", "Join"]
    join = graph.ops[-1]
    assert join.domain == TWIN_DOMAIN
    assert join.inputs == [graph.ops[1].outputs[0]]
    assert join.node is not None
    assert join.node.op_type == "If"
    assert graph.outputs[0].shape == (2, 3)


def test_if_with_an_unknown_condition() -> None:
    graph = twin("g (float[2,3] x, bool c) => (float[2,3] y) <float[3] w = {1, 2, 3}> {" + BRANCHES + "}")
    assert kinds(graph) == ["Mul", "Relu", "Add", "Join"]
    assert graph.ops[-1].inputs == [graph.ops[0].outputs[0], graph.ops[2].outputs[0]]
    assert [tensor.name for tensor in graph.tensors if tensor.name.startswith("w")] == ["w#0", "w#1"]


def test_if_whose_condition_depends_on_a_dynamic_dimension() -> None:
    graph = twin(
        """g (float[batch,3] x) => (float[batch,3] y) <float[3] w = {1, 2, 3}, int64 zero = {0}, int64 two = {2}> {
        s = Shape(x)
        n = Gather(s, zero)
        c = Equal(n, two)
"""
        + BRANCHES
        + "}"
    )
    assert kinds(graph)[-4:] == ["Mul", "Relu", "Add", "Join"]
    assert len(graph.ops[-1].inputs) == 2
    assert named(graph, "c").dynamic


def test_if_whose_condition_is_the_same_at_all_sizes() -> None:
    graph = twin(
        """g (float[batch,3] x) => (float[batch,3] y) <float[3] w = {1, 2, 3}, int64 one = {1}, int64 three = {3}> {
        s = Shape(x)
        n = Gather(s, one)
        c = Equal(n, three)
"""
        + BRANCHES
        + "}"
    )
    assert kinds(graph)[-2:] == ["Mul", "Join"]
    assert not named(graph, "c").dynamic


def test_branches_of_different_shapes() -> None:
    model = parse(
        """g (float[2,3] x, bool c) => (float[n] y) <int64[1] flat = {-1}, int64[1] axis = {0}> {
        y = If (c) <
            then_branch = yes () => (float[n] a) { a = Reshape(x, flat) },
            else_branch = no () => (float[n] b) { b = ReduceSum <keepdims = 0> (x, axis) }
        >
    }"""
    )
    graph = build_twin(model)
    check(graph)
    # One run (with a true condition) shows one of the two.
    assert graph.outputs[0].shape == (6,)
    assert graph.outputs[0].dynamic


LOOP = """g (float[2,3] x) => (float[2,3] y, float[n,2,3] all)
        <float[3] w = {1, 2, 3}, int64 trips = {5}, bool go = {1}> {
        y, all = Loop (trips, go, x) <
            body = step (int64 i, bool c, float[2,3] h) => (bool d, float[2,3] u, float[2,3] v) {
                d = Identity(c)
                u = Add(h, w)
                v = Relu(u)
            }
        >
    }"""


def test_loop() -> None:
    graph = twin(LOOP)
    assert kinds(graph) == ["Join", "Identity", "Add", "Relu", "Stack"]
    join, add, relu, stack = (graph.ops[k] for k in (0, 2, 3, 4))
    assert join.inputs == [graph.inputs[0], add.outputs[0]]
    assert join.outputs == [add.inputs[0], graph.outputs[0]]
    assert stack.attributes == {"axis": 0}
    assert stack.inputs == relu.outputs
    assert [tensor.shape for tensor in graph.outputs] == [(2, 3), (5, 2, 3)]
    assert not graph.outputs[1].dynamic
    number = named(graph, "i")
    assert (number.shape, number.constant, number.data) == ((), False, None)
    assert all(not tensor.constant for op in graph.ops for tensor in op.outputs if tensor is not None)


def test_loop_of_unknown_length() -> None:
    text = LOOP.replace("(float[2,3] x)", "(float[2,3] x, int64 trips)").replace(" int64 trips = {5},", "")
    graph = twin(text)
    assert graph.outputs[1].shape == (4, 2, 3)
    assert [tensor.dynamic for tensor in graph.outputs] == [False, True]


def test_loop_that_changes_a_shape() -> None:
    graph = twin(
        """g (float[1,3] x, float[2] z) => (float[n,3] y, float[2] w) <int64 trips = {3}, bool go = {1}> {
        y, w = Loop (trips, go, x, z) <
            body = step (int64 i, bool c, float[m,3] h, float[2] k) => (bool c, float[m,3] u, float[2] v) {
                u = Concat <axis = 0> (h, x)
                v = Relu(k)
            }
        >
    }"""
    )
    assert kinds(graph) == ["Join", "Join", "Concat", "Relu"]
    assert named(graph, "h").shape is None
    assert named(graph, "k").shape == (2,)
    assert named(graph, "y").shape == (4, 3)
    assert len([op for op in graph.ops if op.op_type == "Relu"]) == 1


def test_scan() -> None:
    graph = twin(
        """g (float[4] s, float[2,7,4] x) => (float[4] y, float[2,4,7] all) {
        y, all = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [-1],
            body = step (float[4] h, float[2,4] e) => (float[4] u, float[2,4] v) {
                v = Add(h, e)
                zero = Constant <value_int = 0> ()
                u = Gather(v, zero)
            }
        > (s, x)
    }"""
    )
    assert kinds(graph) == ["Join", "Unstack", "Add", "Gather", "Stack"]
    unstack, stack = graph.ops[1], graph.ops[4]
    assert (unstack.attributes, stack.attributes) == ({"axis": 1}, {"axis": 2})
    assert unstack.inputs == [graph.inputs[1]]
    assert named(graph, "e").shape == (2, 4)
    assert [tensor.shape for tensor in graph.outputs] == [(4,), (2, 4, 7)]


def test_captures_of_other_ops_with_bodies_are_inputs() -> None:
    graph = twin(
        """g (seq(float[2]) x, float[2] k) => (seq(float[2]) y) {
        y = SequenceMap <body = each (float[2] e) => (float[2] r) { r = Add(e, k) }> (x)
    }"""
    )
    assert graph.ops[0].inputs == graph.inputs
