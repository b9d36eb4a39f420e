"""The static twin: shapes, known contents, constants, functions laid out flat, other people's models."""

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

from graphprune.errors import ModelError
from graphprune.graph.evaluate import evaluate_constant
from graphprune.graph.measure import measure
from graphprune.graph.twin import build_twin
from tests.twins import check, kinds, named, parse, twin


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
