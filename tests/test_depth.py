"""What is measured on residual branches, and what it is good for on real networks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphprune.depth import measures
from graphprune.depth.measures import change_of_direction, measure_branches
from graphprune.depth.removal import ResidualNetwork
from graphprune.kernels.gram import GramAccumulator
from graphprune.model import load
from graphprune.passes.remove_blocks import RemoveBlocksPass, remove_blocks
from tests.residual import (
    MODELS,
    Array,
    accuracy,
    calibration,
    convolutional,
    digits_inputs,
    found,
    image_calibration,
    macs,
    relu,
    run,
    stack,
    stack_oracle,
    weights,
)
from tests.twins import parse

finite = st.floats(-1e3, 1e3, width=32)


@given(arrays(np.float64, (3, 4), elements=finite), arrays(np.float64, (3, 4), elements=finite))
def test_change_of_direction_is_one_minus_the_cosine(stream: Array, result: Array) -> None:
    after = stream + result
    lengths = np.linalg.norm(stream, axis=1) * np.linalg.norm(after, axis=1)
    changes = change_of_direction(stream, result)
    for k in range(3):
        if lengths[k] > 1e-12:
            cosine = np.dot(stream[k], after[k]) / lengths[k]
            assert changes[k] == pytest.approx(1 - cosine, abs=1e-9)
    np.testing.assert_array_equal(change_of_direction(stream, np.zeros_like(stream)), np.zeros(3))


def test_change_of_direction_of_nothing() -> None:
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert change_of_direction(zero, one).tolist() == [1]
    assert change_of_direction(one, -one).tolist() == [1]
    assert change_of_direction(np.ones(3), 2 * np.ones(3)) == pytest.approx([0])  # a vector is one sample


def test_cosine_is_measured_on_the_original_s_streams() -> None:
    model, w = stack()
    network = ResidualNetwork.of(model)
    inputs = calibration(100)
    scores = measure_branches(network, inputs)
    x = np.asarray(inputs.inputs["x"]).astype(np.float64)
    for k, branch in enumerate(network.branches, 1):
        after = x + relu(x @ w[f"w{k}"]) @ w[f"v{k}"]
        cosines = (x * after).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(after, axis=1)
        assert scores[branch] == pytest.approx(1 - cosines.mean(), abs=1e-6)
        x = after
    # Measured anew, without the first branch, the second is measured on another stream.
    again = measure_branches(network, inputs, removed=network.branches[:1])
    assert list(again) == network.branches[1:]
    assert again[network.branches[2]] != pytest.approx(scores[network.branches[2]], rel=1e-3)


def test_error_is_the_change_of_the_outputs() -> None:
    model, w = stack()
    network = ResidualNetwork.of(model)
    inputs = calibration(100)
    x = np.asarray(inputs.inputs["x"]).astype(np.float64)
    scores = measure_branches(network, inputs, by="error")
    again = measure_branches(network, inputs, by="error", removed=network.branches[:1])
    exact = stack_oracle(w, x)
    for k, branch in enumerate(network.branches, 1):
        error = np.linalg.norm(stack_oracle(w, x, (k,)) - exact) / np.linalg.norm(exact)
        assert scores[branch] == pytest.approx(error, rel=1e-4)
        if k > 1:
            error = np.linalg.norm(stack_oracle(w, x, (1, k)) - exact) / np.linalg.norm(exact)
            assert again[branch] == pytest.approx(error, rel=1e-4)


def test_error_of_outputs_that_are_not_real_is_the_share_that_changes() -> None:
    model = parse(
        """agraph (float[N, 6] x) => (int64[N] y) {
            f = MatMul(x, w)  s = Add(x, f)  h = MatMul(s, head)
            y = ArgMax<axis = 1, keepdims = 0>(h)
        }""",
        **weights("w head"),
    )
    w, head = weights("w head").values()
    inputs = calibration(64)
    x = np.asarray(inputs.inputs["x"])
    (score,) = measure_branches(ResidualNetwork.of(model), inputs, by="error").values()
    assert score == np.mean(((x + x @ w) @ head).argmax(1) != (x @ head).argmax(1))
    assert 0 < score < 1


def unexplained(x: Array, y: Array) -> float:
    """The share of y's variance that least squares on x with an intercept leaves."""
    design = np.c_[x, np.ones(len(x))]
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float(np.square(left).sum() / np.square(y - y.mean(0)).sum())


def test_refit_is_the_variance_that_no_affine_map_of_the_stream_explains() -> None:
    model, w = stack()
    network = ResidualNetwork.of(model)
    inputs = calibration(100)
    scores = measure_branches(network, inputs, by="refit")
    again = measure_branches(network, inputs, by="refit", removed=network.branches[:1])
    whole = without_first = np.asarray(inputs.inputs["x"]).astype(np.float64)
    for k, branch in enumerate(network.branches, 1):
        stream = whole
        whole = stream + relu(stream @ w[f"w{k}"]) @ w[f"v{k}"]
        assert scores[branch] == pytest.approx(unexplained(stream, whole), abs=2e-5)
        if k > 1:
            stream = without_first
            without_first = stream + relu(stream @ w[f"w{k}"]) @ w[f"v{k}"]
            more = unexplained(stream, whole) - unexplained(without_first, whole)
            assert again[branch] == pytest.approx(max(more, 0), abs=2e-5)


def test_a_branch_that_is_affine_can_be_made_good() -> None:
    """However far it turns the stream; the other is far smaller, but no refit makes it good."""
    model = parse(
        """agraph (float[N, 6] x) => (float[N, 6] y) {
            f = Gemm(x, w, b)  s = Add(x, f)  r = Relu(s)
            p = MatMul(r, v)  q = Relu(p)  t = Add(r, q)  y = MatMul(t, head)
        }""",
        b=np.ones(6, np.float32),
        **{name: array * (0.3 if name == "v" else 1) for name, array in weights("w v head").items()},
    )
    network = ResidualNetwork.of(model)
    affine, bent = network.branches
    inputs = calibration(200)
    refit, cosine = (measure_branches(network, inputs, by=by) for by in ("refit", "cosine"))
    assert refit[affine] < 1e-4 < refit[bent]
    assert cosine[affine] > 2 * cosine[bent]


def test_rows_are_drawn_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ResidualNetwork.of(convolutional())
    every = measure_branches(network, image_calibration(), by="refit")
    seen: list[int] = []
    add = GramAccumulator.add

    def counted(self: Any, x: Array, y: Array) -> None:
        seen.append(len(x))
        add(self, x, y)

    monkeypatch.setattr(GramAccumulator, "add", counted)
    monkeypatch.setattr(measures, "ROWS_PER_CHANNEL", 16)
    drawn = measure_branches(network, image_calibration(), by="refit")
    assert max(seen) <= 16 * 8
    assert drawn == measure_branches(network, image_calibration(), by="refit")
    assert min(drawn, key=lambda branch: drawn[branch]) is min(every, key=lambda branch: every[branch])


def test_random_inputs_come_with_a_warning() -> None:
    model, _ = stack()
    with pytest.warns(UserWarning, match="random inputs"):
        report = remove_blocks(model, 1)
    assert "random inputs" in report.notes[0]
    again, _ = stack()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        repeated = remove_blocks(again, 1)
    assert repeated.removed == report.removed


def test_digits_transformer_loses_its_layers_one_by_one() -> None:
    model = load(MODELS / "digits_transformer.onnx")
    network = ResidualNetwork.of(model)
    assert len(network.removable) == len(network.branches) == 4
    feeds = {"image": np.asarray(digits_inputs().inputs["image"])}
    before = run(model, feeds)["logits"]
    changes = {
        branch.name: np.linalg.norm(run(network.without([branch]), feeds)["logits"] - before)
        for branch in network.branches
    }
    small = RemoveBlocksPass(1, calibration=digits_inputs(), by="error")
    assert small(model).modified
    assert small.report is not None
    assert small.report.max_error == 0.0
    assert small.report.removed[0].name == min(changes, key=lambda name: changes[name])
    remove_blocks(model, 3, calibration=digits_inputs())
    assert found(model) == []


@pytest.mark.parametrize("by", ["cosine", "error", "refit"])
def test_digits_cnn_loses_the_block_that_it_can_do_without(by: Any) -> None:
    model = load(MODELS / "digits.onnx")
    report = remove_blocks(model, 1, calibration=digits_inputs(), by=by)
    assert [block.name for block in report.removed] == ["/block3/Add"]
    assert report.max_error == 0.0
    assert report.macs_after == macs(model) < report.macs_before
    assert accuracy(model) > 0.96  # of .981; without /block1 it is .111
