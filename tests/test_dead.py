"""Dead positions: what contributes nothing goes, and the model is the same bit for bit; near misses stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.dead import folding
from graphprune.errors import OptionError, VerificationError
from graphprune.passes.remove_dead import RemoveDeadPass, remove_dead

from .dead_models import MLP, Array, mlp, reasons, shrunk, size, vector, whole, without
from .twins import parse

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
