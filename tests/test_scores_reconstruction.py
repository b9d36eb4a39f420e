"""Criteria of reconstruction, against least squares on the activations themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
import scipy.linalg
from onnx import numpy_helper

from graphprune.axes.groups import Group
from graphprune.kernels.selection import lasso_path
from graphprune.model import as_ir
from graphprune.network import Network
from graphprune.pipeline import analyze_ir
from graphprune.scores import Evidence, find_score, reconstruction
from graphprune.scores.reconstruction import contributions, group_readers, removal_order

from .activations import Array, activations, affine_fit, calibration, patches
from .patterns.builder import Builder

#: What one product of a reader sees, how it weighs it, and which of its features each channel of a group owns.
View = tuple[Array, Array, list[list[int]]]
NAMES = ["obs", "thinet", "lasso"]


class Net:
    """A small network, its weights, and all that it computes on its inputs."""

    def __init__(
        self, draw: Callable[[Builder], None], change: Callable[[Builder], None] | None = None
    ) -> None:
        builder = Builder("net", 18)
        draw(builder)
        if change is not None:
            change(builder)
        built = builder.finish()
        self.network: Network = analyze_ir(as_ir(built.model)[0])
        self.evidence = Evidence(self.network, calibration(built.feeds))
        self.weights = {
            t.name: numpy_helper.to_array(t).astype(np.float64) for t in built.model.graph.initializer
        }
        self.values = activations(built.model, built.feeds)

    def group(self, name: str) -> Group:
        return next(g for g in self.network.groups if g.name == name)

    def scored(self, score: str, group: str) -> Array:
        return find_score(score)(self.evidence)[self.group(group).labels]

    def conv(self, name: str, seen: str, channels: Iterable[int], **options: Sequence[int]) -> View:
        """A convolution's view of a value, the channels in the order of the group."""
        weight = self.weights[f"{name}.w"]
        rows = patches(self.values[seen], weight.shape[2:], **options).astype(np.float64)
        size = int(np.prod(weight.shape[2:]))
        owned = [list(range(c * size, (c + 1) * size)) for c in channels]
        return rows, weight.reshape(len(weight), -1).T, owned


def error(views: Sequence[View], gone: Sequence[int]) -> float:
    """What the readers lose, in units of their outputs' variance, after the best correction with an intercept."""
    total = 0.0
    for rows, weight, owned in views:
        y = rows @ weight
        lost = [f for unit in gone for f in owned[unit]]
        kept = np.setdiff1d(np.arange(rows.shape[1]), lost)
        fitted, shift = affine_fit(rows[:, kept], y)
        total += float(
            np.square(rows[:, kept] @ fitted + shift - y).sum() / np.square(y - y.mean(axis=0)).sum()
        )
    return total


def greedy(views: Sequence[View], units: int) -> tuple[list[int], list[float]]:
    """Brute force: in each step every unit that is left is tried."""
    order: list[int] = []
    errors = []
    while len(order) < units:
        tried = {unit: error(views, [*order, unit]) for unit in range(units) if unit not in order}
        order.append(min(tried, key=lambda unit: tried[unit]))
        errors.append(tried[order[-1]])
    return order, errors


def damped_error(views: Sequence[View], gone: int) -> float:
    """The least of error and penalty together: what the weights change, those that go included, is charged as well."""
    total = 0.0
    for rows, weight, owned in views:
        centred = rows - rows.mean(axis=0)
        penalty = reconstruction.DAMPING * np.square(centred).sum() / rows.shape[1]
        kept = np.setdiff1d(np.arange(rows.shape[1]), owned[gone])
        wanted = centred @ weight
        stacked = np.r_[centred[:, kept], np.sqrt(penalty) * np.eye(rows.shape[1])[:, kept]]
        target = np.r_[wanted, np.sqrt(penalty) * weight]
        fitted = scipy.linalg.lstsq(stacked, target)[0]
        total += float(np.square(stacked @ fitted - target).sum() / np.square(wanted).sum())
    return total


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "DAMPING", 0.0)


def mlp(builder: Builder) -> None:
    """Gemm a (7) -> ReLU -> Gemm b (3)."""
    hidden = builder.gemm("a", builder.input("x", (60, 5)), 5, 7)
    builder.output(builder.gemm("b", builder.op("Relu", hidden, out="seen"), 7, 3))


def of_mlp(net: Net) -> list[View]:
    return [(net.values["seen"].astype(np.float64), net.weights["b.w"].T, [[i] for i in range(7)])]


def convolutional(builder: Builder) -> None:
    """Conv a (5) -> BatchNorm -> ReLU -> Conv b of stride 2."""
    x = builder.batch_norm("bn", builder.conv("a", builder.input("x", (6, 3, 6, 6)), 3, 5), 5)
    builder.output(builder.conv("b", builder.op("Relu", x, out="seen"), 5, 4, stride=2))


def of_convolutional(net: Net) -> list[View]:
    return [net.conv("b", "seen", range(5), strides=[2, 2], pads=[1] * 4)]


def residual(builder: Builder) -> None:
    """A stream of 5 channels that two convolutions and a branch read."""
    x = builder.op("Relu", builder.conv("stem", builder.input("x", (5, 3, 5, 5)), 3, 5), out="first")
    inner = builder.relu(builder.conv("down", x, 5, 4))
    y = builder.op("Add", builder.conv("up", inner, 4, 5), x, out="second")
    builder.output(builder.conv("three", y, 5, 4))
    builder.output(builder.conv("one", y, 5, 3, k=1))


def of_residual(net: Net) -> list[View]:
    return [
        net.conv("down", "first", range(5), pads=[1] * 4),
        net.conv("three", "second", range(5), pads=[1] * 4),
        net.conv("one", "second", range(5)),
    ]


CASES: dict[str, tuple[Callable[[Builder], None], Callable[[Net], list[View]], str]] = {
    "mlp": (mlp, of_mlp, "a.w[0]"),
    "convolutional": (convolutional, of_convolutional, "a.w[0]"),
    "residual": (residual, of_residual, "stem.w[0]"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("undamped")
def test_obs_is_greedy_least_squares(case: str) -> None:
    draw, views, group = CASES[case]
    net = Net(draw)
    order, errors = greedy(views(net), net.group(group).size)
    scores = net.scored("obs", group)
    assert np.argsort(scores).tolist() == order
    np.testing.assert_allclose(scores[order], errors, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_cost_of_the_first_is_that_of_the_best_correction(case: str) -> None:
    """With damping it is the error of a fit that is held towards the weights that were."""
    draw, views, group = CASES[case]
    net = Net(draw)
    scores = net.scored("obs", group)
    first = int(np.argmin(scores))
    costs = [damped_error(views(net), unit) for unit in range(len(scores))]
    assert first == int(np.argmin(costs))
    assert scores[first] == pytest.approx(costs[first], rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_contributions_are_products_of_what_channels_add(case: str) -> None:
    draw, views, group = CASES[case]
    net = Net(draw)
    size = net.group(group).size
    expected = np.zeros((size, size))
    for rows, weight, owned in views(net):
        parts = [rows[:, features] @ weight[features] for features in owned]
        parts = [part - part.mean(axis=0) for part in parts]
        variance = np.square(np.sum(parts, axis=0)).sum()
        expected = expected + np.array([[np.sum(a * b) / variance for a in parts] for b in parts])
    found = {g.name: contributions(g, readers) for g, readers in group_readers(net.evidence, "test")}
    np.testing.assert_allclose(found[group], expected, rtol=1e-3, atol=1e-5)
    # Without a correction the cheapest is the one that contributes least ...
    assert int(np.argmin(net.scored("thinet", group))) == int(np.argmin(np.diagonal(expected)))
    # ... and the LASSO is that of these contributions.
    np.testing.assert_allclose(net.scored("lasso", group), lasso_path(found[group]))


@pytest.mark.usefixtures("undamped")
@pytest.mark.parametrize("score", NAMES)
def test_one_of_two_equal_channels_goes_for_nothing(score: str) -> None:
    def duplicate(builder: Builder) -> None:
        for name in ("a.w", "a.b", "bn.scale", "bn.bias", "bn.mean", "bn.var"):
            builder.initializers[name][3] = builder.initializers[name][1]

    net = Net(convolutional, duplicate)
    scores = net.scored(score, "a.w[0]")
    assert np.isfinite(scores).all()
    if score == "obs":
        assert int(np.argmin(scores)) in (1, 3)
        assert scores.min() < 1e-6
    else:  # without a correction both are missed
        assert scores[[1, 3]].min() > 1e-3


@pytest.mark.parametrize("score", NAMES)
def test_a_channel_that_is_constant_goes_first(score: str) -> None:
    def dead(builder: Builder) -> None:
        builder.initializers["a.w"][4] = 0.0
        builder.initializers["a.b"][4] = 3.0  # constant, not zero: the next bias takes it up

    scores = Net(mlp, dead).scored(score, "a.w[0]")
    assert int(np.argmin(scores)) == 4
    assert abs(scores[4]) < 1e-9


@pytest.mark.usefixtures("undamped")
def test_a_grouped_convolution_is_greedy_in_each_group() -> None:
    def grouped(builder: Builder) -> None:
        x = builder.op("Relu", builder.conv("a", builder.input("x", (6, 3, 5, 5)), 3, 8), out="seen")
        builder.output(builder.conv("b", x, 8, 6, group=2))

    net = Net(grouped)
    group = net.group("a.w[0]")
    assert [len(block) for block in group.blocks] == [4, 4]
    scores = net.scored("obs", "a.w[0]")
    weight, seen = net.weights["b.w"], net.values["seen"]
    views = [
        (
            patches(seen[:, 4 * g : 4 * g + 4], [3, 3], pads=[1] * 4).astype(np.float64),
            weight[3 * g : 3 * g + 3].reshape(3, -1).T,
            [list(range(9 * c, 9 * c + 9)) for c in range(4)],
        )
        for g in range(2)
    ]
    for g, view in enumerate(views):
        order, _ = greedy([view], 4)
        assert np.argsort(scores[4 * g : 4 * g + 4]).tolist() == order
    # All of it gone costs all of the variance, of both groups together.
    assert scores.max() == pytest.approx(1.0, rel=1e-3)


def test_removal_takes_equally_many_of_each_block() -> None:
    def grouped(builder: Builder) -> None:
        x = builder.relu(builder.conv("a", builder.input("x", (4, 3, 5, 5)), 3, 8))
        builder.output(builder.conv("b", x, 8, 6, group=2))

    net = Net(grouped)
    for group, readers in group_readers(net.evidence, "test"):
        if group.name == "a.w[0]":
            removal = removal_order(group, readers, keep=1, weights_at=[4, 2])
            assert len(removal.order) == 6
            for step in range(0, 6, 2):
                assert sorted(unit // 4 for unit in removal.order[step : step + 2]) == [0, 1]
            assert [len(kept) for kept, _ in removal.weights] == [4, 2]
            return
    pytest.fail("the group was not found")


# -- products of two activations --------------------------------------------------------------------------------------


def test_products_of_two_activations_are_scored_by_their_energies() -> None:
    def attention(builder: Builder) -> None:
        x = builder.input("x", (1, 6, 5))
        q, k = builder.linear("q", x, 5, 4), builder.linear("k", x, 5, 4)
        products = builder.matmul(q, builder.transpose(k, 0, 2, 1))
        builder.output(builder.op("Softmax", products, axis=-1))

    net = Net(attention)
    q, k = (net.values[name].astype(np.float64)[0] for name in ("q", "k"))
    expected = [np.square(np.outer(q[:, d], k[:, d])).sum() for d in range(4)]
    for score in NAMES:
        np.testing.assert_allclose(net.scored(score, "q.w[1]"), expected, rtol=1e-4)
