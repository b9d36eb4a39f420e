"""Criteria that read activations, against their formulas written out for small networks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from graphprune.errors import OptionError
from graphprune.kernels import moments
from graphprune.kernels.moments import FeatureMoments
from graphprune.model import as_ir
from graphprune.network import Network
from graphprune.pipeline import analyze_ir
from graphprune.scores import SCORES, Evidence, find_score

from .activations import Array, activations, calibration, patches
from .patterns.builder import Builder

NAMES = [name for name, (module, _) in SCORES.items() if module == "activations"]


class Net:
    """A small network, its weights, and all that it computes on its inputs."""

    def __init__(self, draw: Callable[[Builder], None]) -> None:
        builder = Builder("net", 18)
        draw(builder)
        built = builder.finish()
        self.network: Network = analyze_ir(as_ir(built.model)[0])
        self.feeds = built.feeds
        self.evidence = Evidence(self.network, calibration(built.feeds))
        self.weights = {
            t.name: numpy_helper.to_array(t).astype(np.float64) for t in built.model.graph.initializer
        }
        self.values = activations(built.model, built.feeds)

    def scored(self, name: str, group: str) -> Array:
        found = next(g for g in self.network.groups if g.name == group)
        return find_score(name)(self.evidence)[found.labels]


def mean_absolute(x: Array) -> Array:
    return np.asarray(np.abs(x).mean(axis=0))


def variance(x: Array) -> Array:
    return np.asarray(x.astype(np.float64).var(axis=0))


def apoz(x: Array) -> Array:
    return np.asarray((x != 0).mean(axis=0))


FORMULAS: dict[str, Callable[[Array], Array]] = {
    "mean-abs": mean_absolute,
    "variance": variance,
    "apoz": apoz,
}


def test_every_score_of_this_family_is_tested() -> None:
    assert {*FORMULAS, "wanda"} == set(NAMES)


def per_channel(features: Array, channels: int) -> Array:
    return np.asarray(features.reshape(channels, -1).mean(axis=1))


# -- an MLP: one feature a label --------------------------------------------------------------------------------------


def mlp(builder: Builder) -> None:
    """Gemm a (8) -> ReLU -> Gemm b (3)."""
    x = builder.input("x", (40, 5))
    builder.output(builder.gemm("b", builder.op("Relu", builder.gemm("a", x, 5, 8), out="seen"), 8, 3))


@pytest.mark.parametrize("name", FORMULAS)
def test_an_mlp(name: str) -> None:
    net = Net(mlp)
    np.testing.assert_allclose(net.scored(name, "a.w[0]"), FORMULAS[name](net.values["seen"]), rtol=1e-5)


def test_wanda_of_an_mlp() -> None:
    net = Net(mlp)
    norms = np.sqrt(np.square(net.values["seen"].astype(np.float64)).mean(axis=0))
    expected = (np.abs(net.weights["b.w"]) * norms).sum(axis=0)
    np.testing.assert_allclose(net.scored("wanda", "a.w[0]"), expected, rtol=1e-5)


# -- readers of different kernels, and of another resolution ----------------------------------------------------------


def fork(builder: Builder) -> None:
    """Conv a (6) -> ReLU, read by a 3 x 3 convolution of stride 2 and by one of 1 x 1."""
    x = builder.op("Relu", builder.conv("a", builder.input("x", (3, 3, 6, 6)), 3, 6), out="seen")
    builder.output(builder.conv("three", x, 6, 4, stride=2))
    builder.output(builder.conv("one", x, 6, 5, k=1))


def seen_by_fork(net: Net) -> tuple[Array, Array]:
    seen = net.values["seen"]
    return patches(seen, [3, 3], [2, 2], [1, 1, 1, 1]), patches(seen, [1, 1])


@pytest.mark.parametrize("name", FORMULAS)
def test_readers_count_alike(name: str) -> None:
    net = Net(fork)
    expected = np.mean([per_channel(FORMULAS[name](rows), 6) for rows in seen_by_fork(net)], axis=0)
    np.testing.assert_allclose(net.scored(name, "a.w[0]"), expected, rtol=1e-5)


def test_wanda_sums_over_all_readers() -> None:
    net = Net(fork)
    expected = np.zeros(6)
    for rows, weight in zip(seen_by_fork(net), ("three.w", "one.w"), strict=True):
        norms = np.sqrt(np.square(rows.astype(np.float64)).mean(axis=0)).reshape(6, -1)
        expected += (np.abs(net.weights[weight]).sum(axis=0).reshape(6, -1) * norms).sum(axis=1)
    np.testing.assert_allclose(net.scored("wanda", "a.w[0]"), expected, rtol=1e-5)


# -- grouped convolutions ---------------------------------------------------------------------------------------------


def grouped(builder: Builder) -> None:
    """Conv a (8) -> ReLU -> Conv b in 2 groups, whose filters see 4 channels each."""
    x = builder.op("Relu", builder.conv("a", builder.input("x", (3, 3, 5, 5)), 3, 8), out="seen")
    builder.output(builder.conv("b", x, 8, 6, group=2))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_grouped_convolution(name: str) -> None:
    net = Net(grouped)
    rows = patches(net.values["seen"], [3, 3], None, [1] * 4)
    expected = per_channel(FORMULAS[name](rows), 8)
    np.testing.assert_allclose(net.scored(name, "a.w[0]"), expected, rtol=1e-5)


def test_wanda_of_a_grouped_convolution() -> None:
    net = Net(grouped)
    rows = patches(net.values["seen"], [3, 3], None, [1] * 4).astype(np.float64)
    norms = np.sqrt(np.square(rows).mean(axis=0)).reshape(8, 9)
    weight = np.abs(net.weights["b.w"])  # [6, 4, 3, 3]: the first 3 filters see the first 4 channels
    expected = [
        (weight[3 * (c // 4) : 3 * (c // 4) + 3, c % 4].reshape(3, 9) * norms[c]).sum() for c in range(8)
    ]
    np.testing.assert_allclose(net.scored("wanda", "a.w[0]"), expected, rtol=1e-5)


# -- what is read through a Flatten -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
def test_a_label_of_many_features(name: str) -> None:
    def flat(builder: Builder) -> None:
        x = builder.relu(builder.conv("a", builder.input("x", (7, 3, 4, 4)), 3, 6))
        builder.output(builder.gemm("b", builder.op("Flatten", x, axis=1, out="seen"), 96, 3))

    net = Net(flat)
    expected = per_channel(FORMULAS[name](net.values["seen"]), 6)
    np.testing.assert_allclose(net.scored(name, "a.w[0]"), expected, rtol=1e-5)


# -- what no reader sees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_groups_without_readers_are_scored_by_l2(name: str) -> None:
    def attention(builder: Builder) -> None:
        """Queries and keys meet in a product of two activations: no weight reads them."""
        x = builder.input("x", (2, 5, 6))
        q, k = builder.linear("q", x, 6, 8), builder.linear("k", x, 6, 8)
        products = builder.matmul(q, builder.transpose(k, 0, 2, 1))
        builder.output(builder.matmul(builder.op("Softmax", products, axis=-1), x))

    net = Net(attention)
    found = next(g for g in net.network.groups if g.name == "q.w[1]" and not g.frozen)
    assert np.array_equal(
        find_score(name)(net.evidence)[found.labels], find_score("l2")(net.evidence)[found.labels]
    )


@pytest.mark.parametrize("name", NAMES)
def test_without_inputs_the_complaint_names_the_score(name: str) -> None:
    net = Net(mlp)
    with pytest.raises(OptionError, match=f"'{name}' is measured on inputs"):
        find_score(name)(Evidence(net.network))


def test_only_wanted_groups_need_be_judged() -> None:
    net = Net(fork)
    wanted = next(g.index for g in net.network.groups if g.name == "a.w[0]")
    some = Evidence(net.network, net.evidence.calibration, wanted=[wanted])
    labels = net.network.groups[wanted].labels
    for name in NAMES:
        assert np.array_equal(find_score(name)(some)[labels], find_score(name)(net.evidence)[labels])


def test_a_dead_channel_is_the_least() -> None:
    def dead(builder: Builder) -> None:
        mlp(builder)
        builder.initializers["a.b"][3] = -1000.0  # behind the ReLU always zero

    net = Net(dead)
    for name in NAMES:
        scores = net.scored(name, "a.w[0]")
        assert scores[3] == 0
        assert (np.delete(scores, 3) > 0).all()


# -- the accumulator --------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 1000), st.sampled_from([0.0, 3.0, 1e4]))
@settings(deadline=None, max_examples=60)
def test_moments_are_numpys(n: int, d: int, seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, d)) + offset).astype(np.float32)
    x[rng.random((n, d)) < 0.3] = 0
    gathered = FeatureMoments(d)
    for part in np.array_split(x, rng.integers(1, n + 1)):
        gathered.add(part)
    wide = x.astype(np.float64)
    assert gathered.count == n
    scale = 1 + offset**2
    np.testing.assert_allclose(gathered.mean, wide.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gathered.mean_absolute, np.abs(wide).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(gathered.variance, wide.var(axis=0), rtol=1e-9, atol=1e-13 * scale)
    np.testing.assert_allclose(
        gathered.mean_square, np.square(wide).mean(axis=0), rtol=1e-9, atol=1e-13 * scale
    )
    np.testing.assert_allclose(gathered.zeros, (x == 0).mean(axis=0), rtol=1e-12)


def test_a_large_mean_does_not_drown_the_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "ROWS", 16)
    x = 1e6 + np.random.default_rng(0).choice([-0.5, 0.5], (1000, 3))
    gathered = FeatureMoments(3)
    gathered.add(x)
    np.testing.assert_allclose(gathered.variance, x.var(axis=0), rtol=1e-9)


def test_moments_of_nothing_are_zero() -> None:
    gathered = FeatureMoments(2)
    for found in (gathered.mean, gathered.mean_absolute, gathered.variance, gathered.zeros):
        assert np.array_equal(found, [0, 0])
    with pytest.raises(ValueError, match=r"\[n, 2\] is gathered"):
        gathered.add(np.zeros((3, 4)))
