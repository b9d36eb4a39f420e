"""Criteria that read weights, against their formulas written out for small networks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from onnx import numpy_helper

from graphprune.errors import OptionError
from graphprune.graph.evaluate import evaluate_constant
from graphprune.kernels.saliency import distance_sums, maxima_by_label, slices_by_label, sums_by_label
from graphprune.model import as_ir
from graphprune.network import Network
from graphprune.pipeline import analyze_ir
from graphprune.scores import SCORES, Evidence, find_score
from graphprune.scores.weights import weights_of

from .patterns import PATTERNS, Built, Pattern
from .patterns.builder import Builder

Array = npt.NDArray[np.float64]
#: Scores that may be judged without inputs.
NAMES = [name for name, (module, _) in SCORES.items() if module == "weights"]


def analysed(built: Built) -> Network:
    return analyze_ir(as_ir(built.model)[0])


def network(draw: Callable[[Builder], None]) -> tuple[Network, dict[str, Array]]:
    """A small network, and its weights by name."""
    builder = Builder("net", 18)
    draw(builder)
    built = builder.finish()
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in built.model.graph.initializer}
    return analysed(built), weights


def scored(net: Network, name: str, group: str) -> Array:
    """Scores of the labels of the group of that name, in the order of the axis."""
    found = next(g for g in net.groups if g.name == group)
    return find_score(name)(Evidence(net))[found.labels]


def two_convs(builder: Builder) -> None:
    """Conv a (8) -> BatchNorm -> ReLU -> Conv b (6) -> ReLU -> Conv head."""
    x = builder.cbr("a", builder.input("x", (2, 3, 6, 6)), 3, 8)
    builder.head(builder.relu(builder.conv("b", x, 8, 6)), 6)


def filters(w: dict[str, Array], channel: int) -> Array:
    """What makes and what reads the output channel of `a`."""
    return np.concatenate([w["a.w"][channel].ravel(), w["b.w"][:, channel].ravel()])


def elements(w: dict[str, Array], channel: int) -> Array:
    """All parameters that the output channel of `a` touches."""
    vectors = [w[name][channel : channel + 1] for name in ("a.b", "a_bn.scale", "a_bn.bias")]
    return np.concatenate([filters(w, channel), *vectors])


def test_norms() -> None:
    net, w = network(two_convs)
    formulas: dict[str, Callable[[int], float]] = {
        "l1": lambda c: np.abs(elements(w, c)).sum(),
        "l2": lambda c: np.sqrt((elements(w, c) ** 2).sum()),
        "linf": lambda c: np.abs(filters(w, c)).max(),
    }
    for name, formula in formulas.items():
        expected = np.array([formula(c) for c in range(8)])
        np.testing.assert_allclose(scored(net, name, "a.w[0]"), expected, rtol=1e-6)


def test_lamp() -> None:
    net, w = network(two_convs)
    squares = np.array([(elements(w, c) ** 2).sum() for c in range(8)])
    expected = [s / squares[squares >= s].sum() for s in squares]
    np.testing.assert_allclose(scored(net, "lamp", "a.w[0]"), expected, rtol=1e-6)
    assert max(expected) == 1


def distances(filters: Array) -> Array:
    """For each row the sum of its distances to all rows."""
    return np.asarray(np.linalg.norm(filters[:, None] - filters[None], axis=2).sum(axis=1))


def test_fpgm_takes_the_filters_that_make_the_group() -> None:
    net, w = network(two_convs)
    filters = w["a.w"].reshape(8, -1)
    expected = distances(filters)
    np.testing.assert_allclose(scored(net, "fpgm", "a.w[0]"), expected, rtol=1e-6)


def test_fpgm_joins_the_filters_of_coupled_layers() -> None:
    def residual(builder: Builder) -> None:
        x = builder.stem(8)
        builder.head(builder.relu(builder.add(x, builder.conv("inner", x, 8, 8))), 8)

    net, w = network(residual)
    filters = np.concatenate([w["stem.w"].reshape(8, -1), w["inner.w"].reshape(8, -1)], axis=1)
    expected = distances(filters)
    np.testing.assert_allclose(scored(net, "fpgm", "stem.w[0]"), expected, rtol=1e-6)


def test_fpgm_of_a_transposed_matrix_and_of_depthwise_filters() -> None:
    def mlp(builder: Builder) -> None:
        builder.token_head(builder.gelu(builder.tokens(8)), 8)

    net, w = network(mlp)
    columns = w["embed.w"].T
    expected = distances(columns)
    np.testing.assert_allclose(scored(net, "fpgm", "embed.w[1]"), expected, rtol=1e-6)

    def separable(builder: Builder) -> None:
        builder.head(builder.conv("deep", builder.stem(8), 8, 8, group=8), 8)

    net, w = network(separable)
    filters = np.concatenate([w["stem.w"].reshape(8, -1), w["deep.w"].reshape(8, -1)], axis=1)
    expected = distances(filters)
    np.testing.assert_allclose(scored(net, "fpgm", "stem.w[0]"), expected, rtol=1e-6)


def test_bn_scale() -> None:
    net, w = network(two_convs)
    np.testing.assert_allclose(scored(net, "bn-scale", "a.w[0]"), np.abs(w["a_bn.scale"]), rtol=1e-6)


def test_bn_scale_of_a_group_without_one_is_its_l2_made_typical() -> None:
    net, w = network(two_convs)
    scores, l2 = scored(net, "bn-scale", "b.w[0]"), scored(net, "l2", "b.w[0]")
    np.testing.assert_allclose(scores / scores.mean(), l2 / l2.mean(), rtol=1e-9)
    assert scores.mean() == pytest.approx(np.abs(w["a_bn.scale"]).mean())


def test_bn_scale_is_the_mean_where_there_are_several() -> None:
    def residual(builder: Builder) -> None:
        x = builder.cbr("a", builder.input("x", (2, 3, 6, 6)), 3, 8)
        y = builder.batch_norm("c_bn", builder.conv("c", x, 8, 8), 8)
        builder.head(builder.relu(builder.add(x, y)), 8)

    net, w = network(residual)
    expected = (np.abs(w["a_bn.scale"]) + np.abs(w["c_bn.scale"])) / 2
    np.testing.assert_allclose(scored(net, "bn-scale", "a.w[0]"), expected, rtol=1e-6)


def test_bn_scale_of_channels_of_which_some_have_none() -> None:
    """A Concat of a normalised and a plain branch, of which a grouped convolution must be left equally much."""

    def concat(builder: Builder) -> None:
        x = builder.input("x", (2, 3, 6, 6))
        first, second = builder.cbr("a", x, 3, 4), builder.relu(builder.conv("b", x, 3, 4))
        builder.head(builder.relu(builder.conv("c", builder.concat(first, second), 8, 6, group=2)), 6)

    net, w = network(concat)
    group = next(g for g in net.groups if g.size == 8)
    scores, l2 = (find_score(name)(Evidence(net))[group.labels] for name in ("bn-scale", "l2"))
    gamma = np.abs(w["a_bn.scale"])
    np.testing.assert_allclose(scores[:4], gamma, rtol=1e-6)
    np.testing.assert_allclose(scores[4:], l2[4:] * gamma.mean() / l2[:4].mean(), rtol=1e-6)


@pytest.mark.parametrize("swapped", [False, True])
def test_bn_scale_of_a_norm_that_was_taken_apart(swapped: bool) -> None:
    def apart(builder: Builder) -> None:
        y = builder.conv("a", builder.input("x", (2, 3, 6, 6)), 3, 8)
        y = builder.op("Sub", y, builder.vector("mean", 8, 1, 1))
        pair = (y, builder.vector("factor", 8, 1, 1, mean=1))
        y = builder.mul(*(pair[::-1] if swapped else pair))
        builder.head(builder.relu(builder.add(y, builder.vector("shift", 8, 1, 1))), 8)

    net, w = network(apart)
    np.testing.assert_allclose(scored(net, "bn-scale", "a.w[0]"), np.abs(w["factor"]).ravel(), rtol=1e-6)


def test_bn_scale_takes_no_other_product_for_a_norm() -> None:
    def scaled(builder: Builder) -> None:
        """Behind a ReLU, by a scalar, by an activation: none is a BatchNormalization's scale."""
        y = builder.relu(builder.conv("a", builder.input("x", (2, 3, 6, 6)), 3, 8))
        y = builder.mul(y, builder.vector("temperature", 8, 1, 1))
        y = builder.mul(builder.conv("b", y, 8, 8), builder.const(0.5))
        builder.head(builder.mul(y, builder.sigmoid(y)), 8)

    net, _ = network(scaled)
    with pytest.raises(OptionError, match="finds no scale"):
        find_score("bn-scale")(Evidence(net))


# -- planted redundancy ------------------------------------------------------------------------------------------


def planted(channels: list[int], change: Callable[[dict[str, Array], int], None]) -> Network:
    """`two_convs` with some channels of `a` changed."""
    builder = Builder("net", 18)
    two_convs(builder)
    values: dict[str, Array] = builder.initializers
    for channel in channels:
        change(values, channel)
    return analysed(builder.finish())


def shrink(w: dict[str, Array], channel: int) -> None:
    for name in ("a.w", "a.b", "a_bn.scale", "a_bn.bias"):
        w[name][channel] *= 1e-3
    w["b.w"][:, channel] *= 1e-3


def centre(w: dict[str, Array], channel: int) -> None:
    """A filter in the middle of all others."""
    w["a.w"][channel] = np.median(w["a.w"], axis=0)


@pytest.mark.parametrize("name", ["l1", "l2", "linf", "lamp", "bn-scale"])
def test_tiny_channels_go_first(name: str) -> None:
    scores = scored(planted([2, 5], shrink), name, "a.w[0]")
    assert set(np.argsort(scores)[:2].tolist()) == {2, 5}


def test_filters_in_the_middle_go_first() -> None:
    assert int(np.argmin(scored(planted([3], centre), "fpgm", "a.w[0]"))) == 3


def test_copies_score_alike_and_below_what_stands_apart() -> None:
    def double(w: dict[str, Array], channel: int) -> None:
        w["a.w"][channel] = w["a.w"][0]

    scores = scored(planted([4, 6], double), "fpgm", "a.w[0]")
    assert scores[0] == pytest.approx(scores[4], rel=1e-6)
    assert scores[0] == pytest.approx(scores[6], rel=1e-6)
    assert scores[[0, 4, 6]].max() < np.median(scores[[1, 2, 3, 5, 7]])


# -- every way in which channels are tied ------------------------------------------------------------------------


@functools.cache
def pattern_network(pattern: Pattern) -> Network:
    return analyze_ir(as_ir(pattern.build().model)[0], pattern.input_shapes)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_every_label_of_every_group_has_a_finite_score(pattern: Pattern) -> None:
    net = pattern_network(pattern)
    for name in NAMES:
        try:
            scores = find_score(name)(Evidence(net))
        except OptionError:
            assert name == "bn-scale"
            continue
        assert scores.dtype == np.float64
        assert scores.shape == (len(net.analysis.atoms),)
        assert np.isfinite(scores).all()
        assert (scores >= 0).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_largest_weights_by_hand(pattern: Pattern) -> None:
    """Label by label, through the labels broadcast to the weight's full shape."""
    net = pattern_network(pattern)
    largest = find_score("linf")(Evidence(net))
    matrices, vectors = np.full(len(largest), -1.0), np.zeros(len(largest))
    for tensor in weights_of(net.analysis):
        array = np.abs(evaluate_constant(tensor).astype(np.float64))
        kind = vectors if max(array.shape, default=1) == array.size else matrices
        for labels in net.analysis.labellings(tensor):
            np.maximum.at(kind, np.broadcast_to(labels, array.shape).ravel(), array.ravel())
    expected = np.where(matrices >= 0, matrices, vectors)
    np.testing.assert_allclose(largest[1:], expected[1:], rtol=1e-6)
    touched = np.maximum(matrices, vectors) > 0
    for name in ("l1", "l2", "lamp"):
        np.testing.assert_array_equal(find_score(name)(Evidence(net))[1:] > 0, touched[1:])


# -- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 1 << 22])
@pytest.mark.parametrize(
    ("shape", "across"),
    [
        ((5, 4, 3), (5, 1, 1)),
        ((5, 4, 3), (1, 4, 1)),
        ((5, 4), (5, 4)),
        ((6,), (1,)),
        ((), ()),
        ((5, 4, 3), (5, 1, 3)),
    ],
)
def test_reductions_in_blocks(
    monkeypatch: pytest.MonkeyPatch, block: int, shape: tuple[int, ...], across: tuple[int, ...]
) -> None:
    monkeypatch.setattr("graphprune.kernels.saliency.BLOCK", block)
    rng = np.random.default_rng(1)
    array = rng.standard_normal(shape).astype(np.float32)
    labels = rng.integers(0, 4, across).astype(np.int32)
    full = np.broadcast_to(labels, shape)
    for label in range(1, 5):
        there = np.abs(array[full == label]).astype(np.float64)
        assert sums_by_label(array, labels, 5, 1)[label] == pytest.approx(there.sum(), rel=1e-6)
        assert sums_by_label(array, labels, 5, 3)[label] == pytest.approx((there**3).sum(), rel=1e-6)
        assert maxima_by_label(array, labels, 5)[label] == pytest.approx(there.max(initial=0), rel=1e-6)


def test_slices_of_ragged_labels() -> None:
    array = np.arange(24.0).reshape(2, 3, 4)
    labels = np.array([[7, 5, 9, 2], [5, 9, 2, 7]], dtype=np.int32).reshape(2, 1, 4)
    found = slices_by_label(array, labels, np.array([9, 5], dtype=np.int32))
    assert found.tolist() == [[2, 6, 10, 13, 17, 21], [1, 5, 9, 12, 16, 20]]
    with pytest.raises(ValueError, match="equally often"):
        slices_by_label(
            array, np.array([1, 1, 2], dtype=np.int32).reshape(1, 3, 1), np.array([1, 2], np.int32)
        )


@pytest.mark.parametrize("block", [3, 1 << 22])
def test_distances_in_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("graphprune.kernels.saliency.BLOCK", block)
    vectors = np.random.default_rng(2).standard_normal((7, 10)).astype(np.float32)
    expected = distances(vectors.astype(np.float64))
    found = distance_sums(7, lambda: iter([vectors[:, :6], vectors[:, 6:]]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
