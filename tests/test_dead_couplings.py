"""Dead positions across layers: a position goes where all that it is coupled to is dead, as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from graphprune.passes.remove_dead import remove_dead

from .dead_models import Array, reasons, shrunk, size, vector, whole, without
from .twins import parse

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
