"""Residual branches: what counts as one, and what is in it."""

from __future__ import annotations

import numpy as np
import pytest

import graphprune
from graphprune.calibration import Calibration
from graphprune.passes.remove_blocks import remove_blocks
from tests.residual import (
    PARALLEL,
    POSTNORM,
    PRENORM,
    WIDTH,
    Array,
    calibration,
    convolutional,
    found,
    macs,
    pairs,
    run,
    stack,
    transformer,
    weights,
)
from tests.twins import parse


def test_branches_of_a_stack_and_what_they_hold() -> None:
    model, _ = stack()
    branches = found(model)
    assert [(b.stream.name, b.result.name) for b in branches] == [("x", "f1"), ("s1", "f2"), ("s2", "f3")]
    for branch in branches:
        assert [op.op_type for op in branch.ops] == ["MatMul", "Relu", "MatMul"]
        assert branch.parameters == 2 * WIDTH * WIDTH
        assert branch.macs == 2 * WIDTH * WIDTH * (branch.stream.shape or ())[0]
        assert branch.obstacle is None


def test_a_shortcut_that_changes_the_shape_or_holds_a_layer_makes_no_branch() -> None:
    assert pairs(convolutional()) == [("x", "f1", "s1")]


@pytest.mark.parametrize("mask", ["input", "computed"])
@pytest.mark.parametrize(
    ("form", "sums"),
    [
        (PRENORM, [("e", "A0f"), ("h0", "M0f"), ("o0", "A1f"), ("h1", "M1f")]),
        (POSTNORM, [("e", "A0f"), ("h0", "M0f"), ("o0", "A1f"), ("h1", "M1f")]),
        (PARALLEL, [("e", "A0f"), ("h0", "M0f"), ("o0", "A1f"), ("h1", "M1f")]),
    ],
    ids=["pre-norm", "post-norm", "parallel"],
)
def test_attention_and_mlp_are_branches_of_their_own(
    form: str, sums: list[tuple[str, str]], mask: str
) -> None:
    model = transformer(form, mask)
    assert [(stream, result) for stream, result, _ in pairs(model)] == sums
    feeds: dict[str, Array] = {"ids": np.array([[1, 2, 3, 0], [4, 5, 0, 0]])}
    if mask == "input":
        feeds["attention_mask"] = (feeds["ids"] == 0).astype(np.float32)
    inputs = Calibration(feeds, {})
    before = run(model, feeds)["y"]
    for count in (1, 4):
        small = transformer(form, mask)
        report = remove_blocks(small, count, calibration=inputs)
        assert report.max_error == 0.0
        assert report.macs_after == macs(small)
        assert np.abs(run(small, feeds)["y"] - before).max() > 0
    # Nothing but embedding, norms and head is left.
    assert {node.op_type for node in small.graph} <= {"Gather", "MatMul", "LayerNormalization"}
    assert [node.op_type for node in small.graph].count("MatMul") == 1


def test_an_encoder_s_states_do_not_hide_a_decoder_s_branch() -> None:
    model = parse(
        """agraph (float[2, 6] memory, float[2, 6] x) => (float[2, 6] y) {
            m = MatMul(memory, wm)  a = MatMul(x, w)  p = Mul(a, m)  f = MatMul(p, v)  s = Add(x, f)
            y = MatMul(s, head)
        }""",
        **weights("wm w v head"),
    )
    (branch,) = found(model)
    assert (branch.stream.name, branch.result.name) == ("x", "f")
    assert [op.op_type for op in branch.ops] == ["MatMul", "MatMul", "Mul", "MatMul"]  # the memory's too


def test_a_way_round_the_stream_makes_no_branch() -> None:
    # s is a side track: the network's main path reaches f beside it.
    model = parse(
        """agraph (float[2, 6] x) => (float[2, 6] y) {
            s = MatMul(x, ws)  m = MatMul(x, w)  p = Mul(s, m)  f = MatMul(p, v)  y = Add(s, f)
        }""",
        **weights("ws w v"),
    )
    assert found(model) == []


def test_a_gelu_is_no_branch() -> None:
    model = parse(
        """agraph (float[2, 6] x) => (float[2, 6] y) {
            cube = Pow(x, three)  small = Mul(cube, c)  sum = Add(x, small)  t = Tanh(sum)  y = MatMul(t, w)
        }""",
        three=np.array(3, np.float32),
        c=np.array(0.044715, np.float32),
        **weights("w"),
    )
    assert found(model) == []


def test_the_stream_twice_is_no_branch() -> None:
    model = parse(
        """agraph (float[2, 6] x) => (float[2, 6] y) {
            f = MatMul(x, w)  s = Add(x, f)  twice = Add(s, x)  more = Add(twice, twice)
            y = MatMul(more, head)
        }""",
        **weights("w head"),
    )
    assert pairs(model) == [("x", "f", "s")]


def test_a_moved_stream_is_the_stream() -> None:
    model = parse(
        """agraph (float[2, 6] x) => (float[2, 1, 6] y) {
            f = MatMul(x, w)  g = Unsqueeze(f, one)  same = Identity(x)  s = Unsqueeze(same, one)
            t = Add(g, s)  y = MatMul(t, eye)
        }""",
        one=np.array([1]),
        eye=np.eye(WIDTH, dtype=np.float32),
        **weights("w"),
    )
    assert pairs(model) == [("s", "g", "t")]
    remove_blocks(model, 1, calibration=calibration(2))
    x = np.ones((2, WIDTH), np.float32)
    np.testing.assert_array_equal(run(model, {"x": x})["y"], x[:, None])


def test_sum_with_two_inputs_and_a_broadcast_operand() -> None:
    model = parse(
        """agraph (float[2, 3, 6] x) => (float[2, 3, 6] y) {
            f = MatMul(x, w)  s = Sum(f, x)
            m = ReduceMean<keepdims=1>(s, axes)  g = MatMul(m, v)  y = Add(s, g)
        }""",
        axes=np.array([1]),
        **weights("w v"),
    )
    assert pairs(model) == [("x", "f", "s")]  # g has another shape than s


def test_a_branch_whose_inside_is_read_elsewhere_cannot_be_removed() -> None:
    model = parse(
        """agraph (float[2, 6] x) => (float[2, 6] y, float[2, 6] z) {
            a = MatMul(x, w)  h = Relu(a)  f = MatMul(h, v)  s = Add(x, f)  y = MatMul(s, head)  z = MatMul(h, side)
        }""",
        **weights("w v head side"),
    )
    (branch,) = found(model)
    assert branch.obstacle is not None
    assert "'h'" in branch.obstacle
    assert "MatMul" in branch.obstacle
    with pytest.raises(graphprune.OptionError, match=r"has 0 that can be removed; 1 more cannot be, .*'h'"):
        remove_blocks(model, 1, calibration=calibration())


def test_a_branch_that_holds_an_output_cannot_be_removed() -> None:
    model = parse(
        """agraph (float[2, 6] x) => (float[2, 6] y, float[2, 6] h) {
            a = MatMul(x, w)  h = Relu(a)  f = MatMul(h, v)  y = Add(x, f)
        }""",
        **weights("w v"),
    )
    (branch,) = found(model)
    assert branch.obstacle == "'h' in it is an output of the network"


def test_a_branch_that_is_the_whole_network_cannot_be_removed() -> None:
    # An image plus its correction: it hardly changes the image, and is all there is.
    model = parse(
        """agraph (float[2, 6] x) => (float[2, 6] y) {
            a = MatMul(x, w)  b = MatMul(a, v)  t = Add(a, b)  f = MatMul(t, u)  y = Add(x, f)
        }""",
        **weights("w v u"),
    )
    inner, outer = found(model)
    assert inner.obstacle is None
    assert outer.obstacle == "it is all that the network computes: its input would be left"


def test_a_branch_in_a_loop_cannot_be_removed() -> None:
    model = parse(
        """agraph (float[2, 6] x) => (float[2, 6] y) {
            y = Loop <body = body (int64 i, bool going, float[2, 6] s) => (bool on, float[2, 6] o) {
                on = Identity(going)  f = MatMul(s, w)  o = Add(s, f)
            }> (three, , x)
        }""",
        three=np.array(3),
        **weights("w"),
    )
    (branch,) = found(model)
    assert branch.obstacle == "it lies in the body of an If, Loop or Scan"
