"""Contractions as matrix products, against what ONNX Runtime makes of the ops themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.graph import Graph
from graphprune.graph.twin import build_twin
from graphprune.layers.contractions import Contraction, find_contraction

from .activations import Array, activations
from .twins import parse, twin


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> Array:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(dtype)


def only(graph: Graph) -> Contraction:
    """The one contraction of a graph."""
    found = [c for op in graph.ops if isinstance(c := find_contraction(op), Contraction)]
    assert len(found) == 1
    return found[0]


def check(model: ir.Model, **feeds: Array) -> None:
    """``rows @ matrix``, and the bias in its place, is the op's result; ``arrange`` and ``restore`` are inverse."""
    found = only(build_twin(model))
    values = activations(ir.to_proto(model), feeds)
    values |= {name: v.const_value.numpy() for name, v in model.graph.initializers.items() if v.const_value}
    form = found.form
    x, y = values[found.input.name], values[found.output.name]
    weight = values[found.weight_tensor.name]
    rows, matrix = form.rows(x, weight.shape), form.arrange(weight) * form.scale
    assert rows.dtype == np.float32
    assert rows.shape == (len(matrix), form.count(x.shape, weight.shape), matrix.shape[1])
    products = rows.astype(np.float64) @ matrix.astype(np.float64)
    if found.bias_tensor is not None:
        beta = found.op.attributes.get("beta", 1.0)
        bias = np.broadcast_to(values[found.bias_tensor.name].ravel(), matrix.shape[0] * matrix.shape[2])
        products += beta * bias.reshape(len(matrix), 1, -1)
        spread = form.spread(bias, y.ndim)
        assert np.array_equal(
            form.results(np.broadcast_to(spread, y.shape)),
            np.broadcast_to(bias.reshape(len(matrix), 1, -1), products.shape),
        )
    tolerance = 2e-3 if y.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(
        form.results(y), products, rtol=tolerance, atol=tolerance * abs(products).max()
    )

    restored = form.restore(form.arrange(weight), weight.shape)
    assert restored.dtype == weight.dtype
    assert np.array_equal(restored, weight)
    some = np.sort(np.random.default_rng(0).permutation(rows.shape[1])[: max(1, rows.shape[1] // 3)])
    assert np.array_equal(form.rows(x, weight.shape, some), rows[:, some])
    assert np.array_equal(form.results(y, some), form.results(y)[:, some])
    _added_where_spread_says(found, x, weight, values, y)


def _added_where_spread_says(
    found: Contraction, x: Array, weight: Array, values: dict[str, Array], y: Array
) -> None:
    """A vector spread over the result lies in each row of it: nothing else would be an intercept."""
    form = found.form
    arranged = form.arrange(weight)
    vector = np.arange(1.0, arranged.shape[0] * arranged.shape[2] + 1)
    spread = np.broadcast_to(form.spread(vector, y.ndim), y.shape)
    rows = form.results(spread)
    assert np.array_equal(rows, np.broadcast_to(vector.reshape(len(arranged), 1, -1), rows.shape))


# -- convolutions -----------------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": ("", (2, 4, 7, 6), (5, 4, 3, 2)),
    "strides and pads": ("strides=[2,3], pads=[1,0,2,3]", (2, 4, 8, 9), (5, 4, 3, 3)),
    "dilations": ("dilations=[2,3], pads=[2,3,2,3]", (2, 3, 8, 9), (4, 3, 3, 3)),
    "everything": ("strides=[2,1], dilations=[1,2], pads=[0,1,1,0], group=2", (3, 6, 7, 8), (4, 3, 3, 2)),
    "groups": ("group=3", (2, 6, 4, 4), (9, 2, 3, 3)),
    "depthwise": ("group=6, pads=[1,1,1,1]", (2, 6, 5, 5), (6, 1, 3, 3)),
    "depthwise with a multiplier": ("group=3, pads=[1,1,1,1]", (2, 3, 5, 5), (6, 1, 3, 3)),
    "pointwise": ("", (2, 4, 3, 3), (5, 4, 1, 1)),
    "one axis": ("strides=[2], pads=[2,1], dilations=[2]", (2, 4, 13), (5, 4, 3)),
    "one axis, groups": ("group=2, pads=[1,1]", (2, 4, 9), (6, 2, 3)),
    "three axes": (
        "strides=[1,2,1], pads=[1,0,1,0,1,1], dilations=[1,1,2]",
        (2, 2, 5, 6, 7),
        (3, 2, 2, 3, 2),
    ),
    "three axes, groups": ("group=2", (1, 4, 3, 4, 4), (4, 2, 2, 2, 3)),
    "kernel_shape spelt out": ('kernel_shape=[3,3], auto_pad="NOTSET"', (2, 4, 5, 5), (3, 4, 3, 3)),
    "VALID": ('auto_pad="VALID", strides=[2,2]', (2, 3, 8, 7), (4, 3, 3, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_conv(name: str, bias: bool) -> None:
    attributes, x_shape, w_shape = CONVOLUTIONS[name]
    _conv(attributes, x_shape, w_shape, bias)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("stride", [1, 2, 3])  # ONNX Runtime takes no dilation there
@pytest.mark.parametrize("sizes", [(7, 6), (8, 9)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)])
def test_conv_with_automatic_padding(
    mode: str, stride: int, sizes: tuple[int, int], kernel: tuple[int, int]
) -> None:
    _conv(f'auto_pad="{mode}", strides=[{stride},{stride}]', (2, 3, *sizes), (4, 3, *kernel), True)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_conv_with_automatic_padding_of_one_axis(mode: str) -> None:
    _conv(f'auto_pad="{mode}", strides=[2]', (2, 4, 9), (4, 2, 4), True, ", group=2")


TRANSPOSED = {
    "plain": ("", (2, 4, 5, 6), (4, 3, 3, 3), 3),
    "upsampling": ("strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]", (2, 4, 5, 6), (4, 3, 3, 3), 3),
    "groups": ("group=2, strides=[2,3], pads=[1,0,0,2]", (2, 4, 5, 4), (4, 3, 2, 4), 6),
    "dilations": ("dilations=[2,1], pads=[1,1,2,0]", (1, 3, 4, 5), (3, 2, 3, 2), 2),
    "one axis": ("strides=[4], pads=[2,2]", (2, 3, 7), (3, 5, 8), 5),
}


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("bias", [False, True])
def test_conv_transpose(name: str, bias: bool) -> None:
    attributes, x_shape, w_shape, outputs = TRANSPOSED[name]
    _conv(attributes, x_shape, w_shape, bias, kind="ConvTranspose", outputs=outputs)


@pytest.mark.parametrize("attributes", ['auto_pad="SAME_UPPER"', "output_shape=[9,9]"])
def test_conv_transpose_of_a_wanted_size_says_why_not(attributes: str) -> None:
    text = f"agraph (float[1,2,4,4] x) => (float[a,b,c,d] y) {{ y = ConvTranspose<{attributes}, strides=[2,2]>(x, w) }}"
    (op,) = twin(text, w=normal(2, 3, 3, 3)).ops
    assert find_contraction(op) == "its padding follows from a wanted size"


def _conv(
    attributes: str,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    bias: bool,
    more: str = "",
    *,
    kind: str = "Conv",
    outputs: int | None = None,
) -> None:
    arrays: dict[str, Array] = {"w": normal(*w_shape)}
    if bias:
        arrays["b"] = normal(w_shape[0] if outputs is None else outputs, seed=1)
    sizes = ",".join(map(str, x_shape))
    wild = ",".join("abcdefg"[: len(x_shape)])
    operands = "x, w, b" if bias else "x, w"
    head = f"<{attributes}{more}>" if attributes + more else ""
    text = f"agraph (float[{sizes}] x) => (float[{wild}] y) {{ y = {kind}{head}({operands}) }}"
    check(parse(text, **arrays), x=normal(*x_shape, seed=2))


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_any_conv(data: st.DataObject) -> None:
    draw = data.draw
    rank = draw(st.integers(1, 3))
    groups, cin, cout = (draw(st.integers(1, 3)) for _ in range(3))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    strides = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
    pads = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    sizes = [draw(st.integers(d * (k - 1) + 1, 7)) for d, k in zip(dilations, kernel, strict=True)]
    attributes = f"group={groups}, strides={strides}, dilations={dilations}, pads={pads}".replace(" ", "")
    _conv(attributes, (2, groups * cin, *sizes), (groups * cout, cin, *kernel), draw(st.booleans()))


# -- Gemm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed_x", [0, 1])
@pytest.mark.parametrize("transposed_w", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("bias", [None, (4,), (1, 4), (1,)])
def test_gemm(transposed_x: int, transposed_w: int, alpha: float, bias: tuple[int, ...] | None) -> None:
    arrays: dict[str, Array] = {"w": normal(4, 5) if transposed_w else normal(5, 4)}
    if bias is not None:
        arrays["b"] = normal(*bias, seed=1)
    x = normal(5, 3, seed=2) if transposed_x else normal(3, 5, seed=2)
    operands = "x, w" if bias is None else "x, w, b"
    attributes = f"transA={transposed_x}, transB={transposed_w}, alpha={alpha}, beta=2.0"
    shape = ",".join(map(str, x.shape))
    check(
        parse(
            f"agraph (float[{shape}] x) => (float[N,M] y) {{ y = Gemm<{attributes}>({operands}) }}", **arrays
        ),
        x=x,
    )


@pytest.mark.parametrize("transposed_w", [0, 1])
@pytest.mark.parametrize("transposed_x", [0, 1])
def test_gemm_with_the_weight_on_the_left(transposed_w: int, transposed_x: int) -> None:
    arrays: dict[str, Array] = {"w": normal(5, 4) if transposed_w else normal(4, 5)}
    x = normal(3, 5, seed=2) if transposed_x else normal(5, 3, seed=2)
    shape = ",".join(map(str, x.shape))
    attributes = f"transA={transposed_w}, transB={transposed_x}, alpha=1.5"
    check(
        parse(f"agraph (float[{shape}] x) => (float[N,M] y) {{ y = Gemm<{attributes}>(w, x) }}", **arrays),
        x=x,
    )


# -- MatMul -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 4, 3, 5), (5,)])
def test_matmul_with_the_weight_on_the_right(shape: tuple[int, ...]) -> None:
    sizes = ",".join(map(str, shape))
    wild = ",".join("abcd"[: len(shape)])
    model = parse(f"agraph (float[{sizes}] x) => (float[{wild}] y) {{ y = MatMul(x, w) }}", w=normal(5, 4))
    check(model, x=normal(*shape, seed=2))


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 4, 5, 3)])
def test_matmul_with_the_weight_on_the_left(shape: tuple[int, ...]) -> None:
    sizes = ",".join(map(str, shape))
    wild = ",".join("abcd"[: len(shape)])
    model = parse(f"agraph (float[{sizes}] x) => (float[{wild}] y) {{ y = MatMul(w, x) }}", w=normal(4, 5))
    check(model, x=normal(*shape, seed=2))


def test_a_weight_that_is_computed_from_constants() -> None:
    text = """agraph (float[3,5] x) => (float[3,4] y) {
        t = Transpose<perm=[1,0]>(w)
        y = MatMul(x, t)
    }"""
    check(parse(text, w=normal(4, 5)), x=normal(3, 5, seed=2))


def test_half_precision_is_widened() -> None:
    text = "agraph (float16[3,5] x) => (float16[3,4] y) { y = MatMul(x, w) }"
    check(parse(text, w=normal(5, 4, dtype="float16")), x=normal(3, 5, dtype="float16"))


# -- what is no contraction -------------------------------------------------------------------------------------------


def reason(text: str, **arrays: Array) -> Any:
    graph = build_twin(parse(text, **arrays))
    (op,) = (op for op in graph.ops if op.op_type in ("Conv", "MatMul", "Relu"))
    return find_contraction(op)


def test_reasons() -> None:
    two = "agraph (float[2,3,5] x, float[2,5,4] v) => (float[a,b,c] y) "
    assert reason(two + "{ y = MatMul(x, v) }") is None
    assert reason(two + "{ y = MatMul(x, w) }", w=normal(2, 5, 4)) == "its weight is no matrix"
    assert reason(two + "{ y = MatMul(x, w) }", w=normal(5)) == "its weight is no matrix"
    image = "agraph (float[1,2,5,5] x, float[3,2,3,3] w) => (float[a,b,c,d] y) "
    assert reason(image + "{ y = Conv(x, w) }") == "its weight is computed"
    integers = "agraph (int32[3,5] x) => (int32[a,b] y) { y = MatMul(x, w) }"
    assert reason(integers, w=np.ones((5, 4), np.int32)) == "its weight is of type INT32"
    assert reason("agraph (float[3,5] x) => (float[3,5] y) { y = Relu(x) }") is None
    constants = "agraph (float[3,4] x) => (float[3,4] y) { c = MatMul(v, w)  y = Add(x, c) }"
    graph = twin(constants, v=normal(3, 5), w=normal(5, 4))
    assert [find_contraction(op) for op in graph.ops] == [None] * len(graph.ops)


def test_attributes_of_the_pruned_op_go_before_the_twins() -> None:
    text = "agraph (float[2,6,4,4] x) => (float[a,b,c,d] y) { y = Conv<group=3>(x, w) }"
    graph = twin(text, w=normal(6, 2, 3, 3))
    (op,) = (op for op in graph.ops if op.kind == "Conv")
    found = find_contraction(op, {**op.attributes, "group": 2})
    assert isinstance(found, Contraction)
    assert found.form.arrange(normal(4, 2, 3, 3)).shape == (2, 18, 2)
