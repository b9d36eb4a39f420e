"""Dead positions: what contributes nothing goes, and the model is the same bit for bit; near misses stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.dead import folding
from graphprune.errors import OptionError, VerificationError
from graphprune.passes.remove_dead import DeadReport, RemoveDeadPass, remove_dead

from .patterns import run
from .twins import parse

Array = np.ndarray[Any, Any]


def whole(*shape: int, seed: int = 0) -> Array:
    """Whole numbers, none of them zero, on which float arithmetic is exact."""
    drawn = np.random.default_rng(seed).integers(-3, 4, shape)
    return np.where(drawn == 0, 1, drawn).astype(np.float32)


def vector(*numbers: float) -> Array:
    return np.asarray(numbers, np.float32)


def without(array: Array, axis: int, *positions: int) -> Array:
    """The array with positions along an axis set to zero."""
    array = array.copy()
    array[(slice(None),) * axis + (list(positions),)] = 0
    return array


def feeds_of(model: onnx.ModelProto, seed: int = 7) -> dict[str, Array]:
    feeds = {}
    for value in model.graph.input:
        dims = [d.dim_value or 2 for d in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = whole(*dims, seed=seed).astype(dtype)
    return feeds


def same(before: onnx.ModelProto, after: onnx.ModelProto, *, exact: bool = True) -> None:
    """Both models give the same on whole numbers, bit for bit."""
    for seed in (7, 8):
        feeds = feeds_of(before, seed)
        for expected, found in zip(run(before, feeds), run(after, feeds), strict=True):
            if exact:
                np.testing.assert_array_equal(found, expected)
            else:
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def shrunk(
    text: str, arrays: dict[str, Array], *, exact: bool = True, once: bool = True
) -> tuple[DeadReport, ir.Model]:
    """The model without its dead positions; it computes what it did before, and nothing more is found in it.

    A carrier may be found dead later, where what it takes over cancels what it held: then ``once`` is false.
    """
    model = parse(text, **arrays)
    before = ir.to_proto(model)
    report = remove_dead(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    same(before, after, exact=exact)
    if once:
        assert remove_dead(ir.from_proto(after), verify=False).removed == {}
    return report, model


def size(model: ir.Model, name: str) -> tuple[int, ...]:
    shape = model.graph.initializers[name].shape
    assert shape is not None
    return tuple(shape.numpy())


def reasons(report: DeadReport) -> str:
    return "; ".join(f"{s.count}: {s.reason}" for s in report.stayed)


MLP = """g (float[2, 5] x) => (float[2, 3] y) {
    h = Gemm(x, w1, b1)
    r = Relu(h)
    y = Gemm(r, w2, b2)
}"""


def mlp(**changed: Array) -> dict[str, Array]:
    plain = {"w1": whole(5, 6), "b1": whole(6, seed=1), "w2": whole(6, 3, seed=2), "b2": whole(3, seed=3)}
    return plain | changed


# -- each kind of deadness ---------------------------------------------------------------------------


def test_zero_columns_that_give_zero() -> None:
    arrays = mlp(w1=without(whole(5, 6), 1, 1, 4), b1=without(whole(6, seed=1), 0, 1, 4))
    report, model = shrunk(MLP, arrays)
    assert size(model, "w1") == (5, 4)
    assert report.folded == []
    assert (report.parameters_before, report.parameters_after) == (57, 39)
    assert report.macs_after == report.macs_before * 4 // 6


def test_a_constant_is_added_to_the_next_bias() -> None:
    arrays = mlp(w1=without(whole(5, 6), 1, 1, 2, 4), b1=vector(1, 3, -2, 1, 2, -1))
    report, model = shrunk(MLP, arrays)
    assert size(model, "w1") == (5, 3)
    assert [(f.count, f.into) for f in report.folded] == [(2, "bias")]
    w2, b2 = arrays["w2"], arrays["b2"]
    moved = model.graph.initializers["b2"].const_value
    assert moved is not None
    np.testing.assert_array_equal(moved.numpy(), b2 + 3 * w2[1] + 2 * w2[4])


def test_a_channel_that_nobody_reads() -> None:
    _, model = shrunk(MLP, mlp(w2=without(whole(6, 3, seed=2), 0, 0, 5)))
    assert size(model, "w1") == (5, 4)


def test_what_feeds_the_unread_goes_too() -> None:
    """Unit 2 of the second layer is unread; unit 1 of the first is read by it alone."""
    text = """g (float[2, 5] x) => (float[2, 3] y) {
        a = MatMul(x, w1)
        b = Relu(a)
        c = MatMul(b, w2)
        d = Relu(c)
        y = MatMul(d, w3)
    }"""
    w2 = without(whole(6, 4, seed=1), 0, 1)
    w2[1, 2] = 5
    _, model = shrunk(text, {"w1": whole(5, 6), "w2": w2, "w3": without(whole(4, 3, seed=2), 0, 2)})
    assert size(model, "w1") == (5, 5)
    assert size(model, "w2") == (5, 3)


def test_a_filter_all_of_whose_inputs_are_dead_is_a_constant() -> None:
    text = """g (float[2, 5] x) => (float[2, 3] y) {
        a = Gemm(x, w1, b1)
        b = Relu(a)
        c = Gemm(b, w2, b2)
        d = Relu(c)
        y = MatMul(d, w3)
    }"""
    w2 = without(whole(4, 4, seed=1), 0, 0, 1)
    w2[[0, 1], 3] = 2  # unit 3 reads units 0 and 1 alone, which are constants
    w2[[2, 3], 3] = 0
    w1 = without(whole(5, 4), 1, 0, 1)
    arrays = {
        "w1": w1,
        "b1": vector(2, -1, 1, 1),
        "w2": w2,
        "b2": vector(1, 1, 1, 3),
        "w3": whole(4, 3, seed=2),
    }
    report, model = shrunk(text, arrays)
    assert size(model, "w1") == (5, 2)
    assert size(model, "w2") == (2, 3)
    assert sum(f.count for f in report.folded) == 1  # 3 + 2 * 2 = 7 is moved into the last sum


def test_relu_that_is_never_positive() -> None:
    """After a ReLU, weights that are not positive and a bias that is not: nothing can come out."""
    text = """g (float[2, 5] x) => (float[2, 3] y) {
        a = MatMul(x, w1)
        b = Relu(a)
        c = Gemm(b, w2, b2)
        d = Relu(c)
        y = MatMul(d, w3)
    }"""
    w2 = whole(6, 4, seed=1)
    w2[:, 1] = -np.abs(w2[:, 1])
    w2[:, 2] = -np.abs(w2[:, 2])
    arrays = {"w1": whole(5, 6), "w2": w2, "b2": vector(1, 0, -3, 1), "w3": whole(4, 3, seed=2)}
    _, model = shrunk(text, arrays)
    assert size(model, "w2") == (6, 2)
    arrays["b2"] = vector(1, 1e-30, -3, 1)  # by a hair
    model = parse(text, **arrays)
    remove_dead(model)
    assert size(model, "w2") == (6, 3)


def test_relu_that_is_never_positive_on_inputs_in_range() -> None:
    arrays = mlp(b1=vector(1, -100, 1, -6, -5, 1))
    arrays["w1"][:, [3, 4]] = [
        [-1],
        [2],
        [1],
        [1],
        [1],
    ]  # at most 5: not provably so in float32 if the bias is -5
    model = parse(MLP, **arrays)
    remove_dead(model, input_range={"x": (0, 1)})
    assert size(model, "w1") == (5, 4)
    model = parse(MLP, **arrays)
    remove_dead(model)
    assert size(model, "w1") == (5, 6)


def test_input_multiplied_by_zero() -> None:
    text = """g (float[2, 5] x) => (float[2, 3] y) {
        h = MatMul(x, w1)
        m = Mul(h, gate)
        s = Tanh(m)
        y = MatMul(s, w2)
    }"""
    arrays = {"w1": whole(5, 6), "gate": vector(1, 0, 1, 0, 0, 1), "w2": whole(6, 3)}
    _, model = shrunk(text, arrays, exact=False)
    assert size(model, "w1") == (5, 3)


BN = """g (float[1, 3, 6, 6] x) => (float[1, 2, 6, 6] y) {
    a = Conv(x, w1)
    n = BatchNormalization<epsilon = 0.0>(a, s, b, m, v)
    r = Relu(n)
    y = Conv(r, w2)
}"""


def test_zero_batch_norm_scale() -> None:
    """Below zero the ReLU gives nothing; above, the constant goes into a bias that the Conv did not have."""
    arrays = {"w1": whole(5, 3, 1, 1), "w2": whole(2, 5, 1, 1, seed=1)}
    arrays |= {
        "s": vector(1, 0, 2, 0, 1),
        "b": vector(1, -2, 1, 2, 3),
        "m": whole(5),
        "v": np.ones(5, np.float32),
    }
    report, model = shrunk(BN, arrays)
    assert size(model, "w1") == (3, 3, 1, 1)
    assert size(model, "v") == (3,)
    assert [(f.count, f.into) for f in report.folded] == [(1, "bias")]


# -- borders ---------------------------------------------------------------------------

CONVS = """g (float[1, 3, 6, 6] x) => (float[1, 2, SIZE, SIZE] y) {
    a = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(x, w1, b1)
    r = Relu(a)
    y = Conv<kernel_shape=[3, 3], pads=PADS>(r, w2)
}"""


@pytest.mark.parametrize("padded", [False, True])
def test_constants_at_borders(padded: bool) -> None:
    """Without padding the bias takes them; with padding one channel carries those of all."""
    text = CONVS.replace("PADS", "[1, 1, 1, 1]" if padded else "[0, 0, 0, 0]").replace(
        "SIZE", "6" if padded else "4"
    )
    arrays = {"w1": without(whole(6, 3, 3, 3), 0, 1, 2, 4), "b1": vector(1, 2, -2, 1, 4, -1)}
    report, model = shrunk(text, arrays | {"w2": whole(2, 6, 3, 3, seed=2)})
    assert size(model, "w1")[0] == (4 if padded else 3)
    assert [(f.count, f.into) for f in report.folded] == [(1, "carrier") if padded else (2, "bias")]
    assert ("past the padding" in reasons(report)) == padded


def test_a_lone_constant_before_padding_stays() -> None:
    """sigmoid(0) is 0.5 inside and 0 beyond the border."""
    text = CONVS.replace("Relu", "Sigmoid").replace("PADS", "[1, 1, 1, 1]").replace("SIZE", "6")
    arrays = {"w1": without(whole(6, 3, 3, 3), 0, 2), "b1": without(whole(6), 0, 2), "w2": whole(2, 6, 3, 3)}
    report, model = shrunk(text, arrays, exact=False)
    assert size(model, "w1")[0] == 6
    assert "past the padding" in reasons(report)


def test_a_constant_before_a_padded_depthwise_convolution_stays() -> None:
    text = """g (float[1, 3, 6, 6] x) => (float[1, 2, 6, 6] y) {
        a = Conv(x, w1, b1)
        d = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=4>(a, wd)
        y = Conv(d, w2)
    }"""
    arrays = {"w1": without(whole(4, 3, 1, 1), 0, 1, 2), "b1": vector(1, 2, 0, 1)}
    report, model = shrunk(text, arrays | {"wd": whole(4, 1, 3, 3), "w2": whole(2, 4, 1, 1)})
    assert size(model, "w1")[0] == 3  # channel 2 is zero before and after; channel 1 is uneven
    assert size(model, "wd")[0] == 3
    assert "does not stay one past" in reasons(report)


def test_each_group_of_a_grouped_convolution_has_a_carrier() -> None:
    """Groups keep equally many channels, and constants are carried within a group."""
    text = """g (float[1, 3, 6, 6] x) => (float[1, 4, 6, 6] y) {
        a = Conv(x, w1, b1)
        y = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=2>(a, w2)
    }"""
    w1 = without(whole(8, 3, 1, 1), 0, 0, 1, 2, 5, 6)
    arrays = {"w1": w1, "b1": vector(2, 4, 2, 1, 1, 3, 6, 2), "w2": whole(4, 4, 3, 3)}
    report, model = shrunk(text, arrays)
    assert size(model, "w1")[0] == 6
    assert size(model, "w2") == (4, 3, 3, 3)
    assert "past the padding" in reasons(report)


def test_transposed_convolution() -> None:
    text = """g (float[1, 3, 4, 4] x) => (float[1, 2, 9, 9] y) {
        a = Conv(x, w1, b1)
        y = ConvTranspose<kernel_shape=[3, 3], strides=[2, 2]>(a, w2)
    }"""
    arrays = {
        "w1": without(whole(5, 3, 1, 1), 0, 0, 1, 3),
        "b1": vector(2, 0, 1, 4, 1),
        "w2": whole(5, 2, 3, 3),
    }
    report, model = shrunk(text, arrays)
    assert size(model, "w2") == (3, 2, 3, 3)
    assert [f.into for f in report.folded] == ["carrier"]


# -- couplings ---------------------------------------------------------------------------

RESIDUAL = """g (float[2, 5] x) => (float[2, 3] y) {
    s = MatMul(x, w0)
    a = MatMul(s, w1)
    r = Relu(a)
    b = MatMul(r, w2)
    t = Add(s, b)
    y = MatMul(t, w3)
}"""


def test_a_stream_position_is_dead_only_if_all_writers_are() -> None:
    arrays = {"w0": whole(5, 6), "w1": whole(6, 4), "w2": whole(4, 6), "w3": whole(6, 3)}
    one = arrays | {"w2": without(arrays["w2"], 1, 2)}
    _, model = shrunk(RESIDUAL, one)
    assert size(model, "w0") == (5, 6)
    both = one | {"w0": without(arrays["w0"], 1, 2)}
    _, model = shrunk(RESIDUAL, both)
    assert size(model, "w0") == (5, 5)
    assert size(model, "w2") == (4, 5)


def test_a_branch_that_writes_nothing_keeps_one_unit() -> None:
    """All of what it reads could go; a tensor of no elements could not be stored."""
    arrays = {"w0": whole(5, 6), "w1": whole(6, 4), "w2": np.zeros((4, 6), np.float32), "w3": whole(6, 3)}
    report, model = shrunk(RESIDUAL, arrays)
    assert size(model, "w1") == (6, 1)
    assert "something of it must stay" in reasons(report)


@pytest.mark.parametrize("scaled", ["BatchNormalization", "Mul", "Tanh"])
def test_a_branch_that_is_multiplied_by_zero(scaled: str) -> None:
    """All that the branch computes is thrown away by its last scale: one unit of it stays."""
    scale = {
        "BatchNormalization": "n = BatchNormalization(b, g, beta, m, v)",
        "Mul": "n0 = Mul(b, g)\n n = Add(n0, beta)",
        "Tanh": "b2 = Tanh(b)\n n0 = Mul(g, b2)\n n = Add(n0, beta)",
    }[scaled]
    text = f"""g (float[2, 5] x) => (float[2, 3] y) {{
        s = MatMul(x, w0)
        a = MatMul(s, w1)
        r = Relu(a)
        b = MatMul(r, w2)
        {scale}
        t = Add(s, n)
        y = MatMul(t, w3)
    }}"""
    arrays = {"w0": whole(5, 6), "w1": whole(6, 4), "w2": whole(4, 6), "w3": whole(6, 3)}
    arrays |= {"g": np.zeros(6, np.float32), "beta": whole(6)}
    if scaled == "BatchNormalization":
        arrays |= {"m": whole(6), "v": np.ones(6, np.float32)}
    _, model = shrunk(text, arrays)
    assert size(model, "w1") == (6, 1)
    arrays["g"][2] = 1
    _, model = shrunk(text, arrays, exact=False)
    assert size(model, "w1") == (6, 4)


def test_units_that_only_feed_each_other_die_together() -> None:
    """Hidden units 1 and 3 of a recurrent layer read each other, and nobody else reads them."""
    text = """g (float[4, 2, 3] x) => (float[4, 1, 2, 2] y) {
        h, last = RNN<hidden_size=4, activations=["Relu"]>(x, w, r)
        y = MatMul(h, out)
    }"""
    r = np.zeros((1, 4, 4), np.float32)
    r[0, 1, 3] = r[0, 3, 1] = r[0, 0, 2] = r[0, 2, 0] = 1
    r[0, 1, 0] = 1  # they may read others
    arrays = {"w": whole(1, 4, 3), "r": r, "out": without(whole(4, 2), 0, 1, 3)}
    _, model = shrunk(text, arrays)
    assert size(model, "r") == (1, 2, 2)
    arrays["r"] = r.copy()
    arrays["r"][0, 0, 1] = 1  # now unit 0 reads unit 1, which reads unit 3
    _, model = shrunk(text, arrays)
    assert size(model, "r") == (1, 4, 4)


def test_sizes_are_no_elements() -> None:
    """What reads a tensor's shape does not read the tensor: sizes stay the original ones."""
    text = """g (float[N, 5] x) => (float[N, 3] y, int64[2] z) {
        h = MatMul(x, w1)
        z = Shape(h)
        y = MatMul(h, w2)
    }"""
    _, model = shrunk(text, {"w1": whole(5, 6), "w2": without(whole(6, 3), 0, 4)})
    assert size(model, "w1") == (5, 5)


HEADS = """g (float[1, 5, 6] x) => (float[1, 5, 6] y) {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v0 = MatMul(x, wv)
    v = Add(v0, bv)
    shape = Constant<value = int64[4] {1, 5, 3, 4}>()
    flat = Constant<value = int64[3] {1, 5, 12}>()
    q4 = Reshape(q, shape)
    k4 = Reshape(k, shape)
    v4 = Reshape(v, shape)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4)
    kt = Transpose<perm = [0, 2, 3, 1]>(k4)
    vt = Transpose<perm = [0, 2, 1, 3]>(v4)
    s = MatMul(qt, kt)
    p = Softmax<axis = -1>(s)
    o = MatMul(p, vt)
    ot = Transpose<perm = [0, 2, 1, 3]>(o)
    of = Reshape(ot, flat)
    y = MatMul(of, wo)
}"""


def heads(**changed: Array) -> dict[str, Array]:
    plain = {name: whole(6, 12, seed=i) * np.float32(0.1) for i, name in enumerate(["wq", "wk", "wv"])}
    return plain | {"bv": whole(12, seed=4), "wo": whole(12, 6, seed=5)} | changed


def test_a_head_goes_as_a_whole() -> None:
    _, model = shrunk(HEADS, heads(wo=without(whole(12, 6, seed=5), 0, 4, 5, 6, 7)), exact=False)
    assert [size(model, name) for name in ("wq", "wk", "wv", "wo")] == [(6, 8)] * 3 + [(8, 6)]


def test_heads_keep_equally_many_dimensions() -> None:
    """Two of each head's value dimensions are unread, three of one head's: two go in each."""
    report, model = shrunk(
        HEADS, heads(wo=without(whole(12, 6, seed=5), 0, 0, 1, 2, 5, 6, 8, 11)), exact=False
    )
    assert size(model, "wv") == (6, 6)
    assert size(model, "wq") == (6, 12)
    assert "must keep as many" in reasons(report)


def test_values_that_are_constants_mix_to_the_same_constants() -> None:
    """Value rows that are zero leave their bias, whatever the attention's shares are."""
    wv = without(whole(6, 12, seed=2), 1, 0, 4, 8)
    report, model = shrunk(HEADS, heads(wv=wv), exact=False)
    assert size(model, "wv") == (6, 9)
    assert [f.into for f in report.folded] == ["bias"]
    assert [n.op_type for n in model.graph][-2:] == ["MatMul", "Add"]


def test_query_and_key_dimensions_die_where_either_is_zero() -> None:
    wq, wk = whole(6, 12, seed=0), whole(6, 12, seed=1)
    _, model = shrunk(HEADS, heads(wq=without(wq, 1, 0, 4), wk=without(wk, 1, 9)), exact=False)
    assert size(model, "wq") == size(model, "wk") == (6, 9)


def test_constants_that_meet_in_the_scores() -> None:
    """Query and key rows are zero and leave their biases: each score gets the same number more."""
    text = HEADS.replace("q = MatMul(x, wq)", "q0 = MatMul(x, wq)\n q = Add(q0, bq)")
    text = text.replace("k = MatMul(x, wk)", "k0 = MatMul(x, wk)\n k = Add(k0, bk)")
    biases = {"bq": whole(12, seed=6), "bk": whole(12, seed=7)}
    wq, wk = (without(whole(6, 12, seed=i) * np.float32(0.1), 1, 1, 5, 9) for i in range(2))
    report, model = shrunk(text, heads(wq=wq, wk=wk) | biases, exact=False)
    assert size(model, "wq") == size(model, "wk") == (6, 9)
    assert [(f.count, f.into) for f in report.folded] == [(3, "bias")]
    one = (
        heads(wq=wq) | biases
    )  # the keys differ from place to place, and so does what they are multiplied with
    _, model = shrunk(text, one, exact=False)
    assert size(model, "wq") == (6, 12)


def test_a_statistic_counts_zeros_too() -> None:
    """A zero channel under a LayerNorm is not dead: it is normalised with the others."""
    text = """g (float[2, 5] x) => (float[2, 3] y) {
        h = MatMul(x, w1)
        n = LayerNormalization(h, s)
        y = MatMul(n, w2)
    }"""
    arrays = {
        "w1": without(whole(5, 6), 1, 2),
        "s": without(whole(6), 0, 2),
        "w2": without(whole(6, 3), 0, 2),
    }
    _, model = shrunk(text, arrays)
    assert size(model, "w1") == (5, 6)


def test_what_the_model_returns_stays() -> None:
    text = "g (float[2, 5] x) => (float[2, 6] y) { h = MatMul(x, w)\n y = Relu(h) }"
    _, model = shrunk(text, {"w": without(whole(5, 6), 1, 2)})
    assert size(model, "w") == (5, 6)


def test_infinite_constants_are_not_multiplied_by_zero() -> None:
    text = """g (float[2, 5] x) => (float[2, 3] y) {
        h = MatMul(x, w1)
        m = Add(h, mask)
        y = MatMul(m, w2)
    }"""
    w2 = without(whole(6, 3), 0, 2)
    model = parse(text, w1=whole(5, 6), mask=vector(0, 0, -np.inf, 0, 0, 0), w2=w2)
    assert remove_dead(model, verify=False).removed == {}
    model = parse(text, w1=whole(5, 6), mask=vector(0, 0, -1e9, 0, 0, 0), w2=w2)
    assert sum(remove_dead(model).removed.values()) == 1


# -- where constants go ---------------------------------------------------------------------------


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


# -- the pass ---------------------------------------------------------------------------


def test_nothing_dead_nothing_changed() -> None:
    model = parse(MLP, **mlp())
    before = ir.to_proto(model).SerializeToString()
    removal = RemoveDeadPass()
    assert not removal(model).modified
    assert removal.report is not None
    assert removal.report.removed == {}
    assert ir.to_proto(model).SerializeToString() == before


def test_pass_composes() -> None:
    model = parse(MLP, **mlp(w2=without(whole(6, 3), 0, 1)))
    removal = RemoveDeadPass()
    result = ir.passes.Sequential(removal, RemoveDeadPass())(model)
    assert result.modified
    assert removal.report is not None
    assert list(removal.report.removed.values()) == [1]
    assert removal.report.to_dict()["parameters"] == {"before": 57, "after": 48}


def test_a_wrong_fold_is_noticed_and_the_model_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(MLP, **mlp(w1=without(whole(5, 6), 1, 1, 2, 4), b1=vector(1, 3, -2, 1, 2, -1)))
    before = ir.to_proto(model).SerializeToString()
    monkeypatch.setattr("graphprune.passes.remove_dead.put_in_place", lambda model, folds: None)
    with pytest.raises(VerificationError, match="differs from the original"):
        remove_dead(model)
    assert ir.to_proto(model).SerializeToString() == before
    monkeypatch.setattr("graphprune.passes.remove_dead.put_in_place", folding.put_in_place)
    assert remove_dead(model).removed


def test_wrong_range_is_refused() -> None:
    model = parse(MLP, **mlp())
    with pytest.raises(OptionError, match="no input 'u'"):
        remove_dead(model, input_range={"u": (0, 1)})


# -- laws ---------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_masked_networks_stay_the_same_bit_for_bit(data: st.DataObject) -> None:
    """Random layers of whole numbers, masked at random: convolutions with and without padding, then a product."""
    draw = data.draw
    seeds = st.integers(0, 10**6)
    channels, side, source = 2, 7, "x"
    lines: list[str] = []
    arrays: dict[str, Array] = {}
    for layer in range(draw(st.integers(1, 3))):
        width, pad, kernel = draw(st.integers(2, 5)), draw(st.integers(0, 1)), draw(st.sampled_from([1, 3]))
        w = whole(width, channels, kernel, kernel, seed=draw(seeds))
        w[draw(st.lists(st.integers(0, width - 1), max_size=width))] = 0
        w[:, draw(st.lists(st.integers(0, channels - 1), max_size=channels - 1))] = 0
        b = np.where(np.asarray(draw(st.lists(st.booleans(), min_size=width, max_size=width))), 1, -1)
        arrays |= {f"w{layer}": w, f"b{layer}": b.astype(np.float32)}
        lines.append(f"c{layer} = Conv<pads=[{pad},{pad},{pad},{pad}]>({source}, w{layer}, b{layer})")
        source = f"c{layer}"
        if draw(st.booleans()):
            lines.append(f"r{layer} = {draw(st.sampled_from(['Relu', 'Neg', 'Identity']))}({source})")
            source = f"r{layer}"
        channels, side = width, side + 2 * pad - kernel + 1
    last = whole(channels, 2, seed=draw(seeds))
    last[draw(st.lists(st.integers(0, channels - 1), max_size=channels))] = 0
    lines += [f"s = ReduceMax<axes=[2, 3], keepdims=0>({source})", "y = MatMul(s, last)"]
    text = "g (float[1, 2, 7, 7] x) => (float[1, 2] y) {" + "\n".join(lines) + "}"
    text = text.replace(
        "ReduceMax<axes=[2, 3], keepdims=0>(" + source + ")", "ReduceMax<keepdims=0>(" + source + ", axes)"
    )
    arrays |= {"last": last, "axes": np.asarray([2, 3])}
    shrunk(text, arrays, once=False)
