"""Where the constants of dead positions go: into every bias that reads them, whatever holds it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphprune.passes.remove_dead import remove_dead

from .dead_models import MLP, mlp, shrunk, size, vector, whole, without
from .patterns import run
from .twins import parse


@pytest.mark.parametrize(
    "readers",
    [
        "y = MatMul(r, w2)",
        "p = MatMul(r, w2)\n y = Add(p, b2)",
        "p = MatMul(r, w2)\n y = Add(b2, p)",
        "y = Gemm(r, w2)",
        "y = Gemm<alpha = 2.0>(r, w2, b2)",
        "y = Gemm<beta = 2.0>(r, w2, b2)",
        "one = Constant<value = float[1] {1.0}>()\n y = Gemm(r, w2, one)",
        "t = Transpose<perm = [1, 0]>(w2)\n y = Gemm<transB = 1>(r, t, b2)",
        'y = Einsum<equation = "bk,kn->bn">(r, w2)',
        "t = Transpose<perm = [1, 0]>(r)\n u = Transpose<perm = [1, 0]>(w2)\n z = MatMul(u, t)\n"
        " y = Transpose<perm = [1, 0]>(z)",
        "p = MatMul(r, w2)\n q = Relu(p)\n y = Sub(p, q)",
        "b = Relu(x)\n c = MatMul(b, w4)\n y = Gemm(r, w2, c)",
    ],
)
def test_constants_of_matrix_products(readers: str) -> None:
    text = f"g (float[2, 5] x) => (float[2, 3] y) {{ h = Gemm(x, w1, b1)\n r = Relu(h)\n {readers} }}"
    arrays = mlp(w1=without(whole(5, 6), 1, 1, 2, 4), b1=vector(1, 3, -2, 1, 2, -1)) | {"w4": whole(5, 3)}
    used = {name: array for name, array in arrays.items() if name in text}
    report, model = shrunk(text, used)
    assert size(model, "w1") == (5, 3)
    assert [(f.count, f.into) for f in report.folded] == [(2, "bias")]


def test_a_bias_that_two_layers_share_is_changed_for_one() -> None:
    text = """g (float[2, 5] x) => (float[2, 6] y, float[2, 6] z) {
        h = Gemm(x, w1, b)
        r = Relu(h)
        y = Gemm(r, w2, b)
        z = Gemm(x, w3, b)
    }"""
    b = vector(1, 3, -2, 1, 2, -1)
    arrays = {"w1": without(whole(5, 6), 1, 1), "b": b, "w2": whole(6, 6), "w3": whole(5, 6)}
    _, model = shrunk(text, arrays)
    assert size(model, "w1") == (5, 5)


def test_a_constant_goes_to_every_reader() -> None:
    text = """g (float[1, 3, 6, 6] x) => (float[1, 2, 6, 6] y, float[1, 2, 6, 6] z) {
        a = Conv(x, w1, b1)
        y = Conv(a, w2)
        z = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(a, w3)
    }"""
    arrays = {"w1": without(whole(4, 3, 1, 1), 0, 1, 2), "b1": vector(1, 2, 4, 1)}
    report, model = shrunk(text, arrays | {"w2": whole(2, 4, 1, 1), "w3": whole(2, 4, 3, 3)})
    assert size(model, "w1")[0] == 3
    assert sorted(f.into for f in report.folded) == ["bias", "carrier"]


def test_weights_that_are_computed() -> None:
    """Weight norm: the weight is a function of two others."""
    text = """g (float[2, 5] x) => (float[2, 3] y) {
        w1 = Mul(v1, g1)
        h = MatMul(x, w1)
        r = Add(h, b1)
        y = MatMul(r, w2)
    }"""
    arrays = {
        "v1": whole(5, 6),
        "g1": without(whole(1, 6), 1, 1, 3),
        "b1": whole(6, seed=1),
        "w2": whole(6, 3),
    }
    _, model = shrunk(text, arrays)
    assert size(model, "b1") == (4,)


def test_half_precision() -> None:
    text = MLP.replace("float", "float16")
    arrays = mlp(w1=without(whole(5, 6), 1, 1, 2, 4), b1=vector(1, 3, -2, 1, 2, -1))
    _, model = shrunk(text, {name: array.astype(np.float16) for name, array in arrays.items()})
    assert size(model, "w1") == (5, 3)
    assert {v.dtype for v in model.graph.initializers.values()} == {ir.DataType.FLOAT16}


def test_dynamic_batch() -> None:
    text = MLP.replace("float[2, 5]", "float[N, 5]").replace("float[2, 3]", "float[N, 3]")
    _, model = shrunk(text, mlp(w1=without(whole(5, 6), 1, 1, 2, 4), b1=vector(1, 3, -2, 1, 2, -1)))
    assert size(model, "w1") == (5, 3)


def test_inside_a_function() -> None:
    """The body is changed for one call: it is inlined first."""
    text = """g (float[2, 5] x) => (float[2, 3] y) { y = local.Block(x, w1, b1, w2) }
    <domain: "local", opset_import: ["" : 18]>
    Block (x, w1, b1, w2) => (y) {
        h = Gemm(x, w1, b1)
        r = Relu(h)
        y = MatMul(r, w2)
    }"""
    arrays = mlp(w1=without(whole(5, 6), 1, 1, 2, 4), b1=vector(1, 3, -2, 1, 2, -1))
    del arrays["b2"]
    _, model = shrunk(text, arrays)
    assert size(model, "w1") == (5, 3)


def test_inside_a_branch() -> None:
    text = """g (float[2, 5] x, bool c) => (float[2, 3] y) {
        y = If(c) <
            then_branch = a () => (float[2, 3] t) {
                h = Gemm(x, w1, b1)
                r = Relu(h)
                t = Gemm(r, w2, b2)
            },
            else_branch = b () => (float[2, 3] e) { e = MatMul(x, w3) }
        >
    }"""
    arrays = mlp(w1=without(whole(5, 6), 1, 1, 2, 4), b1=vector(1, 3, -2, 1, 2, -1)) | {"w3": whole(5, 3)}
    _, model = shrunk(text, arrays)
    assert size(model, "w1") == (5, 3)


def test_quantised_weights_are_zero_at_their_zero_point() -> None:
    text = """g (uint8[2, 5] x) => (int32[2, 3] y) {
        zx = Constant<value = uint8 {3}>()
        zw = Constant<value = uint8 {2}>()
        h = MatMulInteger(x, w1, zx, zw)
        f = Cast<to = 1>(h)
        r = Relu(f)
        q = Cast<to = 2>(r)
        y = MatMulInteger(q, w2, zx, zw)
    }"""
    w1 = (np.abs(whole(5, 6)) * 0 + 2 + (np.arange(30).reshape(5, 6) % 2)).astype(np.uint8)
    w2 = (np.abs(whole(6, 3)) + 2).astype(np.uint8)
    w2[[1, 4]] = 2
    model = parse(text, w1=w1, w2=w2)
    before = ir.to_proto(model)
    remove_dead(model, verify=False)
    assert size(model, "w1") == (5, 4)
    feeds = {"x": np.full((2, 5), 4, np.uint8)}
    np.testing.assert_array_equal(run(before, feeds)[0], run(ir.to_proto(model), feeds)[0])
