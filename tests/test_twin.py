"""The static twin: shapes, known contents, functions and control flow laid out flat, dynamic dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.errors import ModelError, OptionError
from graphprune.evaluate import evaluate_constant
from graphprune.graph import TWIN_DOMAIN, Graph, Op, Tensor
from graphprune.measure import measure
from graphprune.twin import build_twin

HEADER = '<ir_version: 9, opset_import: ["" : 18, "local" : 1, "com.microsoft" : 1]>\n'


def parse(text: str, **initializers: np.ndarray[Any, Any]) -> ir.Model:
    """A model from ONNX's text format; arrays given by name become initializers."""
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in initializers.items()
    )
    return ir.from_proto(proto)


def twin(
    text: str, shapes: dict[str, tuple[int, ...]] | None = None, **initializers: np.ndarray[Any, Any]
) -> Graph:
    """The twin of such a model, its invariants checked."""
    graph = build_twin(parse(text, **initializers), shapes)
    check(graph)
    return graph


def check(graph: Graph) -> None:
    """What holds for every twin: unique names, uses and producers that agree with the ops, data that fits its shape."""
    assert len({tensor.name for tensor in graph.tensors}) == len(graph.tensors)
    tensors = set(graph.tensors)
    uses: dict[Tensor, list[tuple[Op, int]]] = {tensor: [] for tensor in graph.tensors}
    for index, op in enumerate(graph.ops):
        assert op.index == index
        for slot, tensor in enumerate(op.inputs):
            if tensor is None:
                continue
            assert tensor in tensors
            uses[tensor].append((op, slot))
            # Only the Join of a loop reads what a later op makes.
            assert (
                tensor.producer is None or tensor.producer.index < index or (op.op_type, slot) == ("Join", 1)
            )
        assert all(tensor is None or (tensor in tensors and tensor.producer is op) for tensor in op.outputs)
    for tensor in graph.tensors:
        assert tensor.uses == uses[tensor]
        if tensor.data is not None:
            assert tensor.data.shape == tensor.shape
            assert tensor.dtype is not None
            assert tensor.data.dtype == tensor.dtype.numpy()


def named(graph: Graph, name: str) -> Tensor:
    """The tensor of this name."""
    return next(tensor for tensor in graph.tensors if tensor.name == name)


def kinds(graph: Graph) -> list[str]:
    """The op types in order."""
    return [op.op_type for op in graph.ops]


# ----- shapes and contents ---------------------------------------------------------------------------------------


def test_shape_arithmetic_is_known() -> None:
    graph = twin(
        """g (float[2,3,4] x) => (float[6,4] y)
        <int64[1] last = {4}, int64 zero = {0}, int64 one = {1}, int64[1] axis = {0}> {
        s = Shape(x)
        a = Gather(s, zero)
        b = Gather(s, one)
        c = Mul(a, b)
        d = Unsqueeze(c, axis)
        t = Concat <axis = 0> (d, last)
        y = Reshape(x, t)
    }"""
    )
    target = named(graph, "t")
    assert target.data is not None
    assert target.data.tolist() == [6, 4]
    assert target.constant
    assert not target.dynamic
    assert graph.outputs[0].shape == (6, 4)
    assert graph.outputs[0].is_output
    assert not graph.outputs[0].constant
    assert graph.notes == []


def test_shape_with_start_and_end_and_size() -> None:
    graph = twin(
        """g (float[2,3,4,5] x) => (int64[n] a, int64 b) {
        a = Shape <start = 1, end = -1> (x)
        b = Size(x)
    }"""
    )
    assert [tensor.data.tolist() for tensor in graph.outputs if tensor.data is not None] == [[3, 4], 120]


def test_contents_stay_within_limits() -> None:
    graph = twin(
        """g (float[1] x) => (float[n] f, int64[m] i, float[k] h) {
        many = Constant <value_ints = [5000]> ()
        too_many = Constant <value_ints = [5000000]> ()
        few = Constant <value_ints = [4096]> ()
        f = ConstantOfShape(many)
        i = ConstantOfShape <value = int64[1] {3}> (many)
        j = ConstantOfShape <value = int64[1] {3}> (too_many)
        h = ConstantOfShape(few)
    }"""
    )
    found = {name: named(graph, name) for name in "fijh"}
    assert found["f"].data is None
    assert found["f"].shape == (5000,)
    assert found["f"].constant
    assert found["i"].data is not None
    assert found["j"].data is None
    assert found["j"].shape == (5_000_000,)
    assert found["h"].data is not None


def test_random_ops_are_not_constant() -> None:
    graph = twin("g () => (float[2] a, float[2] b) { a = RandomNormal <shape = [2]> ()\n b = Relu(a) }")
    assert not graph.outputs[0].constant
    assert not graph.outputs[1].constant
    assert graph.outputs[1].data is None


def test_scales_of_a_resize_are_read() -> None:
    graph = twin(
        """g (float[1,3,8,8] x) => (float[a,b,c,d] y) <float[4] scales = {1, 1, 2, 2}> {
        y = Resize <mode = "nearest"> (x, , scales)
    }"""
    )
    assert graph.outputs[0].shape == (1, 3, 16, 16)
    assert graph.ops[0].inputs[1] is None


def test_attributes_are_python_values() -> None:
    node = helper.make_node(
        "Thing", ["x"], ["y"], domain="custom", i=3, f=0.5, s="text", many=[1, 2], none=[1.0]
    )
    node.attribute.append(helper.make_attribute("t", numpy_helper.from_array(np.arange(3))))
    model = helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        ),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("custom", 4)],
    )
    op = build_twin(ir.from_proto(model)).ops[0]
    array = op.attributes["t"]
    assert isinstance(array, np.ndarray)
    assert array.tolist() == [0, 1, 2]
    rest = {name: value for name, value in op.attributes.items() if name != "t"}
    assert rest == {"i": 3, "f": 0.5, "s": "text", "many": [1, 2], "none": [1.0]}
    assert (op.kind, op.version) == ("custom::Thing", 4)


# ----- constants -------------------------------------------------------------------------------------------------


def test_small_constants_are_not_shared() -> None:
    big = np.ones((40, 40), np.float32)
    graph = twin(
        """g (float[2,40] x) => (float[2,40] y) <float[40] b = {...}> {
        c = Constant <value_floats = [1.0]> ()
        p = MatMul(x, w)
        q = MatMul(p, w)
        r = Add(q, b)
        s = Add(r, b)
        t = Mul(s, c)
        u = Mul(t, c)
        y = Mul(u, long)
    }""".replace(" <float[40] b = {...}>", ""),
        w=big,
        b=np.zeros(40, np.float32),
        long=np.ones(40, np.float32),
    )
    assert [t.name for t in graph.tensors if t.name.startswith("b")] == ["b#0", "b#1"]
    assert [t.name for t in graph.tensors if t.name.startswith("c")] == ["c#0", "c#1"]
    assert len({id(t.value) for t in graph.tensors if t.name.startswith("b")}) == 1
    assert [len(t.uses) for t in graph.tensors if t.name.startswith("w")] == [2]
    assert named(graph, "long").uses[0][1] == 1
    assert "Constant" not in kinds(graph)
    assert all(t.constant and t.producer is None for t in graph.tensors if t.name[0] in "bcw")


def test_a_default_for_an_input_is_a_constant() -> None:
    model = parse("g (float[2] x, float[2] w) => (float[2] y) { y = Add(x, w) }", w=np.ones(2, np.float32))
    graph = build_twin(model)
    assert [tensor.name for tensor in graph.inputs] == ["x"]
    assert named(graph, "w").constant


def test_large_weights_are_never_read() -> None:
    model = parse(
        "g (float[1,64] x) => (float[1,64] y) { t = Transpose(w)\n y = MatMul(x, t) }", w=np.zeros(())
    )

    def read() -> ir.TensorProtocol:
        raise AssertionError("the weight was read")

    lazy = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([128, 64]), name="w")
    model.graph.initializers["w"].const_value = lazy
    model.graph.initializers["w"].shape = ir.Shape([128, 64])
    graph = build_twin(model)
    assert graph.outputs[0].shape == (1, 128)
    assert named(graph, "t").constant


def test_exact_contents_of_large_constants() -> None:
    rng = np.random.default_rng(0)
    v, g = rng.standard_normal((64, 100)).astype(np.float32), rng.standard_normal((64, 1)).astype(np.float32)
    graph = twin(
        """g (float[2,64] x) => (float[2,100] y) {
        axis = Constant <value_ints = [1]> ()
        norm = ReduceL2 <keepdims = 1> (v, axis)
        unit = Div(v, norm)
        w = Mul(g, unit)
        m = com.microsoft.QuickGelu <alpha = 1.0> (w)
        y = MatMul(x, m)
    }""",
        v=v,
        g=g,
    )
    w = named(graph, "w")
    assert w.constant
    assert w.data is None
    expected = g * v / np.linalg.norm(v, axis=1, keepdims=True)
    np.testing.assert_allclose(evaluate_constant(w), expected, rtol=1e-5)
    m = named(graph, "m")
    assert m.constant
    np.testing.assert_allclose(evaluate_constant(m), expected / (1 + np.exp(-expected)), rtol=1e-4, atol=1e-6)
    with pytest.raises(ModelError, match="y: not a constant"):
        evaluate_constant(graph.outputs[0])


def test_a_constant_nobody_can_compute_is_refused() -> None:
    graph = twin(
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { m = local.Mystery(w)\n y = Add(x, m) }",
    )
    with pytest.raises(ModelError, match="cannot be evaluated"):
        evaluate_constant(named(graph, "m"))


def test_the_model_is_not_modified() -> None:
    model = parse(
        """g (float[batch,3] x) => (float[batch,3] y) <float[3] b = {1, 2, 3}> {
        s = Shape(x)
        r = Reshape(x, s)
        y = Add(r, b)
    }"""
    )
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    build_twin(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_unsorted_nodes_are_refused() -> None:
    with pytest.raises(ModelError, match="reads 'a', which no node before it makes"):
        twin("g (float[2] x) => (float[2] y) { y = Relu(a)\n a = Relu(x) }")


# ----- model-local functions -------------------------------------------------------------------------------------

FUNCTIONS = """
<domain: "local", opset_import: ["" : 17, "local" : 1]>
inner <alpha> (x, bias) => (y) {
    a = LeakyRelu <alpha: float = @alpha> (x)
    y = Clip(a, bias)
}
<domain: "local", opset_import: ["" : 17, "local" : 1]>
outer <alpha: float = 0.25> (x, scale, missing) => (y) {
    k = Constant <value_floats = [2.0]> ()
    p = Mul(x, scale)
    q = Mul(p, scale)
    r = Mul(q, k)
    y = local.inner <alpha: float = @alpha> (r, missing)
}
"""


def test_functions_are_inlined() -> None:
    graph = twin(
        """g (float[2,3] x) => (float[2,3] y) <float[3] s = {1, 2, 3}> {
        [one] a = local.outer (x, s)
        [two] y = local.outer <alpha = 0.5> (a, s)
    }"""
        + FUNCTIONS
    )
    assert kinds(graph) == ["Mul", "Mul", "Mul", "LeakyRelu", "Clip"] * 2
    leaky = [op for op in graph.ops if op.op_type == "LeakyRelu"]
    assert [op.attributes["alpha"] for op in leaky] == [0.25, 0.5]
    assert [[call.op_type for call in op.path] for op in leaky] == [["outer", "inner"]] * 2
    assert leaky[0].path[0] is not leaky[1].path[0]
    assert leaky[0].version == 17
    assert leaky[0].node is leaky[1].node
    clip = graph.ops[4]
    assert clip.inputs[1] is None
    # Four uses of s, two in each call, are four tensors of one value; so with k inside the function.
    scales = [tensor for tensor in graph.tensors if tensor.name.startswith("s#")]
    assert len(scales) == 4
    assert len({id(tensor.value) for tensor in scales}) == 1
    assert len([tensor for tensor in graph.tensors if tensor.name.endswith("/k")]) == 2
    assert graph.outputs[0].shape == (2, 3)


def test_a_constant_that_refers_to_the_call() -> None:
    graph = twin(
        """g (float[2,3] x) => (float[3,2] y) { y = local.shaped <to = [3, 2]> (x) }
<domain: "local", opset_import: ["" : 17]>
shaped <to> (x) => (y) {
    target = Constant <value_ints: ints = @to> ()
    y = Reshape(x, target)
}
"""
    )
    assert graph.outputs[0].shape == (3, 2)
    target = graph.ops[0].inputs[1]
    assert target is not None
    np.testing.assert_array_equal(evaluate_constant(target), [3, 2])


def test_a_function_may_return_a_constant_or_its_argument() -> None:
    graph = twin(
        """g (float[2] x) => (float[2] y) {
        a, b = local.both (x)
        y = Add(a, b)
    }
<domain: "local", opset_import: ["" : 17]>
both (x) => (x, k) { k = Constant <value_floats = [2.0, 3.0]> () }
"""
    )
    assert graph.ops[0].inputs[0] is graph.inputs[0]
    assert graph.ops[0].inputs[1] is not None
    assert graph.ops[0].inputs[1].data is not None


# ----- control flow ----------------------------------------------------------------------------------------------

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


# ----- dynamic dimensions ----------------------------------------------------------------------------------------


def test_what_depends_on_a_dynamic_dimension_is_marked() -> None:
    graph = twin(
        """g (float[batch,3] x) => (float[batch,3] y) <float[3] b = {1, 2, 3}, int64 zero = {0}, int64 one = {1}> {
        s = Shape(x)
        n = Gather(s, zero)
        c = Gather(s, one)
        a = Add(x, b)
        y = Relu(a)
    }"""
    )
    assert graph.inputs[0].shape == (2, 3)
    dynamic = {tensor.name for tensor in graph.tensors if tensor.dynamic}
    assert dynamic == {"x", "s", "n", "a", "y"}
    assert not named(graph, "n").constant
    assert not named(graph, "s").constant


def test_sizes_are_chosen_by_role() -> None:
    graph = twin(
        """g (float[N,3,h,w] image, float[N,channels,S] x, int64[N,S] mask, float[1,T] fixed) => (float[N,3,h,w] y) {
        y = Relu(image)
    }"""
    )
    assert [tensor.shape for tensor in graph.inputs] == [(2, 3, 224, 224), (2, 3, 8), (2, 8), (1, 8)]


def test_total_lengths_are_past_plus_sequence() -> None:
    model = parse(
        """g (float[b,s,4] q, float[b,past_s,4] past, float[b,total_s,4] k) => (float[b,t,4] y) {
        y = Concat <axis = 1> (past, q)
        z = Add(y, k)
    }"""
    )
    for value, symbol in zip(model.graph.inputs, ("s", "past_s", "past_s + s"), strict=True):
        value.shape = ir.Shape(["b", symbol, 4])
    graph = build_twin(model)
    assert [tensor.shape for tensor in graph.inputs] == [(2, 8, 4), (2, 6, 4), (2, 14, 4)]
    assert graph.notes == []


def test_a_feature_axis_is_read_off_the_weight() -> None:
    graph = twin(
        "g (float[n,c] x) => (float[n,5] y) { y = MatMul(x, w) }",
        w=np.ones((7, 5), np.float32),
    )
    assert graph.inputs[0].shape == (2, 7)


def test_other_sizes_are_tried() -> None:
    # 8 is too short for this kernel, and the flattened image fits the weight at 64 x 64 only.
    graph = twin(
        """g (float[n,1,t] x, float[n,1,h,w] i) => (float[n,1,u] y, float[n,3] z) {
        y = Conv(x, k)
        f = Flatten(i)
        z = MatMul(f, m)
    }""",
        k=np.ones((1, 1, 3), np.float32),
        m=np.ones((4096, 3), np.float32),
    )
    assert graph.inputs[1].shape == (2, 1, 64, 64)
    graph = twin(
        "g (float[n,1,t] x) => (float[n,1,u] y) { y = Conv(x, k) }", k=np.ones((1, 1, 100), np.float32)
    )
    assert graph.inputs[0].shape == (2, 1, 128)


def test_sizes_that_cannot_be_found() -> None:
    with pytest.raises(ModelError, match="give them with --input-shape NAME:dims"):
        twin(
            "g (float[n,t] x) => (float[n,3] y) { r = Relu(x)\n y = MatMul(r, w) }",
            w=np.ones((11, 3), np.float32),
        )
    graph = twin(
        "g (float[n,t] x) => (float[n,3] y) { r = Relu(x)\n y = MatMul(r, w) }",
        {"x": (5, 11)},
        w=np.ones((11, 3), np.float32),
    )
    assert graph.outputs[0].shape == (5, 3)
    # No second size fits, so whatever comes from x counts as dynamic.
    assert graph.outputs[0].dynamic


def test_errors_of_inference_alone_do_not_refuse_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.inference import Inference

    real = Inference.types

    def wrong(self: Inference, op: Op, other: Any) -> Any:
        if op.op_type == "Relu":
            raise ValueError("a bug in shape inference")
        return real(self, op, other)

    monkeypatch.setattr(Inference, "types", wrong)
    graph = build_twin(
        parse(
            "g (float[n,3] x) => (float[n,4] y) { a = Relu(x)\n y = MatMul(a, w) }",
            w=np.ones((3, 4), np.float32),
        )
    )
    assert graph.inputs[0].shape == (2, 3)
    assert ("Relu_0", "shape inference: a bug in shape inference") in [
        (name if name != graph.ops[0].name else "Relu_0", reason) for name, reason in graph.notes
    ]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1, 3)}, r"z: the model has no such input \(its inputs: x\)"),
        ({"x": (1, 3, 4)}, "this is rank 3, the model's input has 2"),
        ({"x": (1, 4)}, "axis 1 is 4, but the model fixes it to 3"),
        ({"x": (0, 3)}, "sizes must be positive"),
    ],
)
def test_wrong_input_shapes(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        twin("g (float[n,3] x) => (float[n,3] y) { y = Relu(x) }", shapes)
    assert "\n" not in str(caught.value)


def test_given_shapes_bind_symbols() -> None:
    graph = twin("g (float[n,s] x, float[n,s] y) => (float[n,s] z) { z = Add(x, y) }", {"x": (4, 9)})
    assert [tensor.shape for tensor in graph.inputs] == [(4, 9), (4, 9)]
    assert graph.outputs[0].dynamic
    model = parse("g (float[n,s] x) => (float[n,s] z) { z = Relu(x) }")
    assert build_twin(model, dynamic_sizes={"s": 5}).outputs[0].shape == (2, 5)


def test_a_static_batch_of_one_stays() -> None:
    assert twin("g (float[1,t] x) => (float[1,t] y) { y = Relu(x) }").inputs[0].shape == (1, 8)


# ----- what inference does not know ------------------------------------------------------------------------------


def test_sizes_that_depend_on_contents() -> None:
    graph = twin(
        """g (float[4,5] x, float[4,5] z) => (float[n] y, float[4,5] u) {
        i = NonZero(x)
        j = Transpose(i)
        y = GatherND(x, j)
        s = Shape(y)
        u = Add(x, z)
    }"""
    )
    y = graph.outputs[0]
    assert y.shape is not None
    assert len(y.shape) == 1
    assert y.dynamic
    assert named(graph, "s").dynamic
    assert not named(graph, "s").constant
    assert not graph.outputs[1].dynamic


def test_a_run_shows_what_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune import rules

    monkeypatch.setattr(rules, "output_shapes", lambda op: None)
    model = parse(
        """g (float[2,4] x) => (float[2,4] y) {
        a = com.microsoft.QuickGelu(x)
        y = Relu(a)
    }"""
    )
    # What the model says is out of date: the run knows better.
    model.graph.node(0).outputs[0].shape = ir.Shape([2, 9])
    graph = build_twin(model)
    assert graph.notes == []
    assert [op.outputs[0].shape for op in graph.ops if op.outputs[0] is not None] == [(2, 4), (2, 4)]


def test_stale_shapes_do_not_win() -> None:
    model = parse("g (float[2,4] x) => (float[2,4] y) { a = Relu(x)\n y = Relu(a) }")
    model.graph.node(0).outputs[0].shape = ir.Shape([2, 9])
    graph = build_twin(model)
    assert named(graph, "a").shape == (2, 4)


def test_unknown_ops_that_cannot_run() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { a = local.Mystery(x)\n y = Relu(a) }"
    graph = build_twin(parse(text))
    check(graph)
    assert named(graph, "a").shape is None
    assert ("a", "its shape is not known") in graph.notes
    assert any("cannot be run" in reason for _, reason in graph.notes)
    assert named(graph, "a").dtype == ir.DataType.FLOAT
    # The model's own word is taken where nothing else is known, its symbols replaced.
    model = parse(text)
    model.graph.node(0).outputs[0].shape = ir.Shape(["n", 6])
    graph = build_twin(model)
    assert named(graph, "a").shape == (2, 6)
    assert graph.outputs[0].shape == (2, 6)
    assert graph.outputs[0].dynamic


def test_contradictions_in_a_static_model_become_notes() -> None:
    graph = build_twin(parse("g (float[2,3] x, float[4,5] z) => (float[n] y) { y = MatMul(x, z) }"))
    assert graph.outputs[0].shape is None
    assert any("Incompatible dimensions" in reason for _, reason in graph.notes)


def test_repeated_layers_are_inferred_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = onnx.shape_inference.infer_node_outputs

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(onnx.shape_inference, "infer_node_outputs", counted)
    lines = ["a0 = Relu(x)"]
    for k in range(300):
        lines += [f"m{k} = MatMul(a{k}, w{k})", f"b{k} = Add(m{k}, c{k})", f"a{k + 1} = Relu(b{k})"]
    arrays: dict[str, np.ndarray[Any, Any]] = {f"w{k}": np.full((4, 4), k, np.float32) for k in range(300)}
    arrays.update({f"c{k}": np.full(4, k, np.float32) for k in range(300)})
    body = "\n".join(lines)
    graph = build_twin(parse(f"g (float[2,4] x) => (float[2,4] a300) {{ {body} }}", **arrays))
    assert len(graph.ops) == 901
    assert calls == 3


# ----- other people's models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conformance() -> list[Any]:
    """ONNX's own single-node models, with their inputs and expected outputs."""
    from onnx.backend.test.case.node import collect_testcases

    with np.errstate(all="ignore"):
        return [case for case in collect_testcases(None) if case.model is not None]


def arrays_of(values: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Values as arrays; None for sequences and the like."""
    for value in values:
        if isinstance(value, TensorProto):
            yield numpy_helper.to_array(value)
        else:
            yield value


def test_conformance_models(conformance: list[Any]) -> None:
    """Every one builds; static shapes and known contents are those of the expected outputs."""
    assert len(conformance) > 1500
    compared = known = 0
    for case in conformance:
        graph = build_twin(ir.from_proto(case.model))
        check(graph)
        inputs, outputs = case.data_sets[0]
        if any(
            tensor.shape != np.shape(array)
            for tensor, array in zip(graph.inputs, arrays_of(inputs), strict=False)
            if not isinstance(array, list | dict) and array is not None and tensor.dtype is not None
        ):
            continue  # the model's dynamic dimensions were given other sizes
        for tensor, array in zip(graph.outputs, arrays_of(outputs), strict=False):
            if not isinstance(array, np.ndarray) or tensor.shape is None or tensor.dynamic:
                continue
            assert tensor.shape == array.shape, case.name
            compared += 1
            if tensor.data is not None:
                assert tensor.dtype is not None
                np.testing.assert_allclose(
                    tensor.data.astype(np.float64), array.astype(np.float64), 1e-3, 1e-3, err_msg=case.name
                )
                known += 1
    assert compared > 1500
    assert known > 10


LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda path: path.stem)
def test_real_networks(path: Path) -> None:
    """Every shape is the one that a run shows."""
    model = ir.load(path)
    graph = build_twin(model)
    check(graph)
    assert graph.notes == []
    values = {op.outputs[0].value: op.outputs[0].shape for op in graph.ops if op.outputs[0] is not None}
    some = [value for value in list(values)[::7] if value is not None]
    seen = measure(model, some, {tensor.name: tensor.shape for tensor in graph.inputs})
    assert {value: hint[1] for value, hint in seen.items()} == {value: values[value] for value in some}
