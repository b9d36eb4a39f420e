"""Sensitivity curves, against networks of which one group is cut and whose readers are fitted by least squares."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphprune.axes.groups import Group
from graphprune.choice import sensitivity
from graphprune.choice.sensitivity import Curve, Sensitivity, outputs_error, save_curves, score_curve
from graphprune.layers.execution import Feeds
from graphprune.model import as_ir
from graphprune.pipeline import analyze_ir
from graphprune.scores import Evidence, find_score

from .activations import Array, activations, affine_fit, calibration, outputs, patches
from .patterns.builder import Builder

#: (reader, value that it reads, how its rows are made)
Readers = list[tuple[str, str, Callable[[Array], Array]]]


class Net:
    """A small network with its curves."""

    def __init__(self, draw: Callable[[Builder], None]) -> None:
        builder = Builder("net", 18)
        draw(builder)
        self.built = builder.finish()
        self.model, self.feeds = self.built.model, self.built.feeds
        self.network = analyze_ir(as_ir(self.model)[0])
        self.evidence = Evidence(self.network, calibration(self.feeds))
        self.scores = find_score("l1")(self.evidence)
        levels = {g.index: [g.unit - 1, max(1, g.unit // 2)] for g in self.evidence.groups}
        self.curves = {c.group: c for c in Sensitivity(self.evidence, self.scores, levels).measure()}
        self.values = activations(self.model, self.feeds)
        self.weights = {t.name: numpy_helper.to_array(t).copy() for t in self.model.graph.initializer}

    def group(self, name: str) -> Group:
        return next(g for g in self.network.groups if g.name == name)

    def gone(self, name: str, level: int) -> list[int]:
        """Positions of the group with the lowest scores."""
        group = self.group(name)
        ranked: list[int] = np.argsort(self.scores[group.labels]).tolist()
        return ranked[: group.size - level]

    def error(self, weights: dict[str, Array]) -> float:
        """Of the network with other weights: squared distance over variance, the mean over outputs."""
        changed = onnx.ModelProto()
        changed.CopyFrom(self.model)
        del changed.graph.initializer[:]
        arrays = {**self.weights, **weights}
        changed.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(v, self.weights[k].dtype), k) for k, v in arrays.items()
        )
        pairs = zip(outputs(changed, self.feeds), outputs(self.model, self.feeds), strict=True)
        return float(
            np.mean([np.square(a - b).sum() / np.square(b - b.mean(axis=0)).sum() for a, b in pairs])
        )

    def fitted(self, readers: Readers, gone: Sequence[int]) -> dict[str, Array]:
        """Weights and biases of readers that see none of the channels that are gone."""
        changed = {}
        for name, seen, make in readers:
            weight = self.weights[f"{name}.w"]
            matrix = weight.reshape(len(weight), -1).T.astype(np.float64)
            rows = make(self.values[seen]).astype(np.float64)
            per_channel = len(matrix) // weight.shape[1]
            lost = [per_channel * c + i for c in gone for i in range(per_channel)]
            kept = np.setdiff1d(np.arange(len(matrix)), lost)
            new, shift = affine_fit(rows[:, kept], rows @ matrix + self.weights[f"{name}.b"])
            matrix[:] = 0
            matrix[kept] = new
            changed[f"{name}.w"] = matrix.T.reshape(weight.shape)
            changed[f"{name}.b"] = shift
        return changed


def plain(x: Array) -> Array:
    return x


def image(stride: int, size: int) -> Callable[[Array], Array]:
    return lambda x: patches(x, [size] * 2, [stride] * 2, [size // 2] * 4)


def network(builder: Builder) -> None:
    """Conv a -> BatchNorm -> ReLU -> Conv b -> ReLU -> pool -> Gemm c -> ReLU -> Gemm d, and a second output."""
    x = builder.batch_norm("bn", builder.conv("a", builder.input("x", (70, 3, 6, 6)), 3, 6), 6)
    x = builder.op("Relu", x, out="a_seen")
    x = builder.relu(builder.conv("b", x, 6, 5, stride=2))
    builder.op("Flatten", builder.op("GlobalAveragePool", x), out="b_seen", axis=1)
    hidden = builder.op("Relu", builder.gemm("c", "b_seen", 5, 8), out="c_seen")
    builder.output(builder.gemm("d", hidden, 8, 3))
    builder.output(builder.gemm("e", hidden, 8, 2))


def residual(builder: Builder) -> None:
    """A stream that three convolutions read, one of them in the branch."""
    x = builder.op("Relu", builder.conv("stem", builder.input("x", (66, 3, 4, 4)), 3, 6), out="first")
    inner = builder.op("Relu", builder.conv("down", x, 6, 4), out="inner")
    builder.op("Add", builder.conv("up", inner, 4, 6), x, out="second")
    builder.output(builder.conv("three", "second", 6, 4, stride=2))
    builder.output(builder.conv("one", "second", 6, 3, k=1))


CASES: dict[tuple[Callable[[Builder], None], str], Readers] = {
    (network, "a.w[0]"): [("b", "a_seen", image(2, 3))],
    (network, "b.w[0]"): [("c", "b_seen", plain)],
    (network, "c.w[0]"): [("d", "c_seen", plain), ("e", "c_seen", plain)],
    (residual, "stem.w[0]"): [
        ("down", "first", image(1, 3)),
        ("three", "second", image(2, 3)),
        ("one", "second", image(1, 1)),
    ],
    (residual, "down.w[0]"): [("up", "inner", image(1, 3))],
}


@pytest.mark.parametrize(("draw", "group"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_curves_are_errors_of_networks_cut_and_fitted(
    draw: Callable[[Builder], None], group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "DAMPING", 0.0)
    net = Net(draw)
    curve = net.curves[group]
    assert curve.measured
    assert (curve.kept[0], curve.errors[0]) == (net.group(group).unit, 0.0)
    worst = 0.0
    for level, found in zip(curve.kept[1:], curve.errors[1:], strict=True):
        weights = net.fitted(CASES[draw, group], net.gone(group, level))
        worst = max(worst, net.error(weights))
        assert found == pytest.approx(worst, rel=5e-3, abs=1e-6)
    assert worst > 1e-4


def test_the_network_is_as_it_was() -> None:
    builder = Builder("net", 18)
    network(builder)
    built = builder.finish()
    net = analyze_ir(as_ir(built.model)[0])
    before = {
        k: v.const_value.numpy().copy() for k, v in net.model.graph.initializers.items() if v.const_value
    }
    evidence = Evidence(net, calibration(built.feeds))
    levels = {g.index: [1] for g in evidence.groups}
    Sensitivity(evidence, find_score("l2")(evidence), levels).measure()
    for name, array in before.items():
        value = net.model.graph.initializers[name].const_value
        assert value is not None
        assert np.array_equal(value.numpy(), array)


def test_products_of_two_activations_are_measured_by_masks() -> None:
    def attention(builder: Builder) -> None:
        x = builder.input("x", (20, 5, 6))
        q, k = builder.linear("q", x, 6, 8), builder.linear("k", x, 6, 8)
        products = builder.matmul(q, builder.transpose(k, 0, 2, 1))
        builder.output(builder.matmul(builder.op("Softmax", products, axis=-1), x))

    net = Net(attention)
    curve = net.curves["q.w[1]"]
    for level, found in zip(curve.kept[1:], curve.errors[1:], strict=True):
        weight, bias = net.weights["q.w"].copy(), net.weights["q.b"].copy()
        gone = net.gone("q.w[1]", level)
        weight[:, gone], bias[gone] = 0, 0
        assert found == pytest.approx(net.error({"q.w": weight, "q.b": bias}), rel=1e-3)


# -- the error of outputs ---------------------------------------------------------------------------------------------


def batches(*arrays: Array) -> list[Feeds]:
    return [{"y": array} for array in arrays]


def test_error_is_distance_over_variance() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 10, 3)).astype(np.float32)
    expected = np.square(a - b).sum() / np.square(b - b.mean(axis=0)).sum()
    assert outputs_error(batches(a), batches(b)) == pytest.approx(expected, rel=1e-5)
    for cut in (1, 4, 9):  # in whatever batches
        halves = [batches(x[:cut], x[cut:]) for x in (a, b)]
        assert outputs_error(*halves) == pytest.approx(expected, rel=1e-5)
    assert outputs_error(batches(b), batches(b)) == 0


def test_error_of_outputs_that_are_no_plain_arrays() -> None:
    y = np.arange(6, dtype=np.float32).reshape(3, 2)
    # A class number is not compared; a constant output says nothing.
    found_here: list[Feeds] = [{"y": y + 1, "k": np.array([1, 2, 3]), "c": np.ones((3, 2), np.float32)}]
    wanted: list[Feeds] = [{"y": y, "k": np.array([1, 0, 3]), "c": np.zeros((3, 2), np.float32)}]
    assert outputs_error(found_here, wanted) == pytest.approx(6 / 16)
    # A scalar; samples of several shapes.
    one, two, three = (np.array(value, np.float32) for value in (1, 2, 3))
    assert outputs_error(batches(one, two), batches(one, three)) == 0.5
    wide = np.arange(9, dtype=np.float32).reshape(3, 3)
    found = outputs_error(batches(y + 1, wide + 2), batches(y, wide))
    assert found == pytest.approx((6 * 1 + 9 * 4) / (16 + 54))


def test_infinities_of_the_original_are_left_out_and_others_are_not() -> None:
    y = np.array([[0, 1], [-np.inf, 2], [2, 3]], np.float32)
    assert outputs_error(batches(y), batches(y)) == 0
    assert outputs_error(batches(y + 1), batches(y)) == pytest.approx(5 / (2 + 2))
    broken = np.where(np.isfinite(y), y, 0)
    broken[0, 0] = np.nan
    assert outputs_error(batches(broken), batches(y)) == np.inf


# -- curves without a measurement -------------------------------------------------------------------------------------


def test_a_curve_by_scores_is_the_share_of_their_squares() -> None:
    group = Group("g", [np.arange(1, 5, dtype=np.int32)], index=3)
    curve = score_curve(group, np.array([9.0, 3, 1, 2, 4]), [3, 2, 1])
    assert (curve.group, curve.index, curve.kept, curve.measured) == ("g", 3, [4, 3, 2, 1], False)
    assert curve.errors == pytest.approx([0, 1 / 30, 5 / 30, 14 / 30])
    assert curve.at(3) == pytest.approx(1 / 30)


def test_between_levels_a_curve_is_linear() -> None:
    curve = Curve("g", 0, [8, 4, 2], [0.0, 1.0, 3.0])
    assert [curve.at(k) for k in (8, 6, 4, 3, 2, 1)] == [0, 0.5, 1, 2, 3, 3]


def test_curves_are_saved(tmp_path: Path) -> None:
    group = Group("g", [np.arange(1, 9, dtype=np.int32)], index=0)
    save_curves([Curve("g", 0, [8, 4], [0.0, 0.5])], [group], tmp_path / "curves.json")
    (found,) = json.loads((tmp_path / "curves.json").read_text())["groups"]
    assert found == {"group": "g", "size": 8, "kept": [1.0, 0.5], "errors": [0.0, 0.5], "measured": True}
