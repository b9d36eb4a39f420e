"""The static twin: dynamic dimensions, and shapes that inference does not know."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from graphprune.errors import ModelError, OptionError
from graphprune.graph import Op
from graphprune.graph.twin import build_twin
from tests.twins import check, named, parse, twin


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
    from graphprune.graph.inference import Inference

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
