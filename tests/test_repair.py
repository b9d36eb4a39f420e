"""Repair, against least squares on the activations of the pruned network and of the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx_ir.passes.common import InlinePass

from graphprune.calibration import Calibration
from graphprune.choice.choose import Request
from graphprune.model import as_ir, to_proto
from graphprune.network import Pruned
from graphprune.pipeline import analyze_ir
from graphprune.plan import Cut, Plan
from graphprune.pruning import Pruning
from graphprune.repair.refit import RepairReport, repair
from graphprune.settings import Settings

from .activations import Array, activations, affine_fit, calibration, outputs, patches
from .patterns import PATTERNS, Pattern
from .patterns.builder import Builder
from .twins import parse

Feeds = dict[str, Array]


class Repaired:
    """A network, cut at given positions of given groups and then repaired."""

    def __init__(
        self, source: ir.Model, feeds: Feeds, gone: Mapping[str, Sequence[int]], **options: Any
    ) -> None:
        sizes = {group.name: group.size for group in analyze_ir(as_ir(source)[0]).groups}
        plan = Plan([Cut(name, sizes[name], tuple(positions)) for name, positions in gone.items()])
        self.pruned: Pruned = Pruning(source, Settings(plan=plan), verify=False).cut(plan)
        self.feeds = feeds
        self.original = to_proto(source)
        self.values = activations(self.original, feeds)
        self.cut = onnx.ModelProto.FromString(to_proto(self.pruned.model).SerializeToString())
        self.report: RepairReport = repair(self.pruned, calibration(feeds), **options)
        self.model = to_proto(self.pruned.model)
        onnx.checker.check_model(self.model)
        self.found = activations(self.model, feeds)

    def error(self) -> float:
        """Greatest difference of the outputs to the original's, relative to those."""
        pairs = zip(outputs(self.model, self.feeds), outputs(self.original, self.feeds), strict=True)
        return max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)

    def skipped(self) -> dict[str, str]:
        return dict(self.report.skipped)


def built(draw: Callable[[Builder], None]) -> tuple[ir.Model, Feeds]:
    builder = Builder("net", 18)
    draw(builder)
    model, feeds, _ = builder.finish()
    return as_ir(model)[0], feeds


def weights(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}


def close(found: Array, wanted: Array, tolerance: float = 1e-3) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * abs(wanted).max())


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# -- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_gemm(damping: float) -> None:
    def mlp(builder: Builder) -> None:
        hidden = builder.gemm("a", builder.input("x", (80, 5)), 5, 8)
        builder.output(builder.gemm("b", builder.op("Relu", hidden, out="seen"), 8, 3))

    net = Repaired(*built(mlp), {"a.w[0]": [1, 4, 6]}, damping=damping)
    prior = weights(net.cut)["b.w"].T
    weight, bias = affine_fit(net.found["seen"], net.values["b"], prior, damping)
    close(weights(net.model)["b.w"].T, weight)
    close(weights(net.model)["b.b"], bias)
    (refitted,) = net.report.refitted
    assert refitted.name == "node_b"
    for found, error in (
        (net.found["b"], refitted.after),
        (activations(net.cut, net.feeds)["b"], refitted.before),
    ):
        wanted = net.values["b"].astype(np.float64)
        assert error == pytest.approx(
            np.square(found - wanted).sum() / wanted.var(axis=0).sum() / 80, rel=1e-3
        )
    assert refitted.after is not None
    assert refitted.before is not None
    assert refitted.after < refitted.before


def test_gemm_with_all_its_attributes() -> None:
    text = """agraph (float[N,5] x) => (float[N,3] y) {
        a = MatMul(x, wa)  seen = Relu(a)
        y = Gemm<transB=1, alpha=0.5, beta=-2.0>(seen, w, c)
    }"""
    source = parse(text, wa=normal(5, 8), w=normal(3, 8, seed=1), c=normal(1, 3, seed=2))
    net = Repaired(source, {"x": normal(60, 5, seed=3)}, {"wa[1]": [0, 3]}, damping=0.0)
    weight, bias = affine_fit(net.found["seen"], net.values["y"])
    close(0.5 * weights(net.model)["w"].T, weight)
    close(-2.0 * weights(net.model)["c"].ravel(), bias)


@pytest.mark.parametrize("bias", ["none", "scalar"])
def test_gemm_gets_a_bias(bias: str) -> None:
    operands = "seen, w" + (", c" if bias == "scalar" else "")
    text = f"""agraph (float[N,5] x) => (float[N,3] y) {{
        a = MatMul(x, wa)  seen = Relu(a)  y = Gemm({operands})
    }}"""
    arrays = {"c": np.array([0.5], np.float32)} if bias == "scalar" else {}
    source = parse(text, wa=normal(5, 8), w=normal(8, 3, seed=1), **arrays)
    net = Repaired(source, {"x": normal(60, 5, seed=3)}, {"wa[1]": [0, 3]}, damping=0.0)
    weight, shift = affine_fit(net.found["seen"], net.values["y"])
    close(net.found["y"], net.found["seen"] @ weight + shift)


def test_what_a_gemm_adds_along_its_rows_is_no_bias() -> None:
    """``y = W x + C`` with C a matrix or a column: not fitted, and not added twice."""
    for shape in ((3, 60), (3, 1)):
        text = """agraph (float[60,5] x) => (float[3,60] y) {
            a = MatMul(x, wa)  seen = Relu(a)  y = Gemm<transB=1>(w, seen, c)
        }"""
        source = parse(text, wa=normal(5, 8), w=normal(3, 8, seed=1), c=10 + normal(*shape, seed=2))
        net = Repaired(source, {"x": normal(60, 5, seed=3)}, {"wa[1]": [0, 3]})
        assert net.skipped() == {
            net.pruned.network.analysis.graph.ops[2].name: "it adds a constant that is no bias"
        }
        assert np.array_equal(net.found["y"], activations(net.cut, net.feeds)["y"])
    column = """agraph (float[3,5] x) => (float[3,4] y) {
        a = MatMul(x, wa)  seen = Relu(a)  y = Gemm(seen, w, c)
    }"""
    source = parse(column, wa=normal(5, 8), w=normal(8, 4, seed=1), c=normal(3, 1, seed=2))
    net = Repaired(source, {"x": normal(3, 5, seed=3)}, {"wa[1]": [0, 3]})
    assert list(net.skipped().values()) == ["its bias is no constant vector"]


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_conv(damping: float) -> None:
    def conv(builder: Builder) -> None:
        x = builder.relu(builder.conv("a", builder.input("x", (6, 3, 7, 7)), 3, 6))
        builder.op("Relu", x, out="seen")
        builder.output(builder.conv("b", "seen", 6, 4, stride=2))

    net = Repaired(*built(conv), {"a.w[0]": [0, 5]}, damping=damping)
    rows = patches(net.found["seen"], [3, 3], [2, 2], [1] * 4)
    wanted = np.moveaxis(net.values["b"], 1, -1).reshape(-1, 4)
    prior = weights(net.cut)["b.w"].reshape(4, -1).T
    weight, bias = affine_fit(rows, wanted, prior, damping)
    close(weights(net.model)["b.w"].reshape(4, -1).T, weight)
    close(weights(net.model)["b.b"], bias)


def test_grouped_conv() -> None:
    def grouped(builder: Builder) -> None:
        x = builder.op("Relu", builder.conv("a", builder.input("x", (6, 3, 5, 5)), 3, 8), out="seen")
        builder.output(builder.conv("b", x, 8, 6, group=2))

    net = Repaired(*built(grouped), {"a.w[0]": [1, 6]}, damping=0.0)
    found = weights(net.model)
    for g in range(2):
        rows = patches(net.found["seen"][:, 3 * g : 3 * g + 3], [3, 3], pads=[1] * 4)
        wanted = np.moveaxis(net.values["b"][:, 3 * g : 3 * g + 3], 1, -1).reshape(-1, 3)
        weight, bias = affine_fit(rows, wanted)
        close(found["b.w"][3 * g : 3 * g + 3].reshape(3, -1).T, weight)
        close(found["b.b"][3 * g : 3 * g + 3], bias)


def test_conv_without_bias_in_front_of_a_batch_norm() -> None:
    def conv(builder: Builder) -> None:
        x = builder.op("Relu", builder.conv("a", builder.input("x", (6, 3, 5, 5)), 3, 6), out="seen")
        y = builder.op("Conv", x, builder.weight("b.w", 4, 6, 3, 3), out="b")
        builder.output(builder.batch_norm("bn", y, 4))

    net = Repaired(*built(conv), {"a.w[0]": [2, 3]}, damping=0.0)
    weight, bias = affine_fit(
        patches(net.found["seen"], [3, 3]), np.moveaxis(net.values["b"], 1, -1).reshape(-1, 4)
    )
    (node,) = (node for node in net.model.graph.node if node.output[0] == "b")
    assert len(node.input) == 3
    close(weights(net.model)["b.w"].reshape(4, -1).T, weight)
    close(weights(net.model)[node.input[2]], bias)


def test_matmul_and_add() -> None:
    def linear(builder: Builder) -> None:
        x = builder.op("Relu", builder.linear("a", builder.input("x", (6, 7, 5)), 5, 8), out="seen")
        builder.output(builder.linear("b", x, 8, 3))

    net = Repaired(*built(linear), {"a.w[1]": [1, 2, 7]}, damping=0.0)
    weight, bias = affine_fit(net.found["seen"].reshape(-1, 5), net.values["b"].reshape(-1, 3))
    close(weights(net.model)["b.w"], weight)
    close(weights(net.model)["b.b"], bias)


def test_matmul_alone_is_fitted_without_an_intercept() -> None:
    text = (
        "agraph (float[N,5] x) => (float[N,3] y) { a = MatMul(x, wa)  seen = Relu(a)  y = MatMul(seen, w) }"
    )
    source = parse(text, wa=normal(5, 8), w=normal(8, 3, seed=1))
    net = Repaired(source, {"x": normal(60, 5, seed=3)}, {"wa[1]": [0, 3]}, damping=0.0)
    close(weights(net.model)["w"], affine_fit(net.found["seen"], net.values["y"], bias=np.zeros(3))[0])


def test_matmul_with_the_weight_on_the_left() -> None:
    text = """agraph (float[N,5,4] x) => (float[N,3,4] y) {
        a = MatMul(wa, x)  seen = Relu(a)  y = MatMul(w, seen)
    }"""
    source = parse(text, wa=normal(8, 5), w=normal(3, 8, seed=1))
    net = Repaired(source, {"x": normal(20, 5, 4, seed=3)}, {"wa[0]": [0, 3]}, damping=0.0)
    seen, wanted = (
        np.swapaxes(v, 1, 2).reshape(-1, v.shape[1]) for v in (net.found["seen"], net.values["y"])
    )
    close(weights(net.model)["w"].T, affine_fit(seen, wanted, bias=np.zeros(3))[0])


def test_a_transposed_weight() -> None:
    text = """agraph (float[N,5] x) => (float[N,3] y) {
        a = MatMul(x, wa)  seen = Relu(a)  t = Transpose<perm=[1,0]>(w)  y = MatMul(seen, t)
    }"""
    source = parse(text, wa=normal(5, 8), w=normal(3, 8, seed=1))
    net = Repaired(source, {"x": normal(60, 5, seed=3)}, {"wa[1]": [0, 3]}, damping=0.0)
    weight, _ = affine_fit(net.found["seen"], net.values["y"], bias=np.zeros(3))
    close(net.found["y"], net.found["seen"] @ weight)
    assert [node.op_type for node in net.model.graph.node] == ["MatMul", "Relu", "MatMul"]


# -- several layers ---------------------------------------------------------------------------------------------------


def test_a_later_layer_sees_what_the_repaired_ones_before_it_make() -> None:
    def deep(builder: Builder) -> None:
        x = builder.input("x", (120, 5))
        for name, size in (("a", 5), ("b", 8), ("c", 8)):
            x = builder.op("Relu", builder.gemm(name, x, size, 8), out=f"{name}_seen")
        builder.output(builder.gemm("d", x, 8, 3))

    gone = {"a.w[0]": [0, 1], "b.w[0]": [2, 3], "c.w[0]": [4]}
    net = Repaired(*built(deep), gone, damping=0.0)
    found = weights(net.model)
    for name, seen, kept in (
        ("b", "a_seen", [0, 1, 4, 5, 6, 7]),
        ("c", "b_seen", [0, 1, 2, 3, 5, 6, 7]),
        ("d", "c_seen", [0, 1, 2]),
    ):
        weight, bias = affine_fit(net.found[seen], net.values[name][:, kept])
        seen_now = net.found[seen].astype(np.float64)  # a unit may be dead: its weight is then any
        close(seen_now @ found[f"{name}.w"].T + found[f"{name}.b"], seen_now @ weight + bias)
    assert [each.name for each in net.report.refitted] == ["node_b", "node_c", "node_d"]


def test_what_reads_no_cut_is_left_alone() -> None:
    def two(builder: Builder) -> None:
        x = builder.input("x", (40, 5))
        a = builder.relu(builder.gemm("a", x, 5, 8))
        b = builder.relu(builder.gemm("b", a, 8, 6))
        builder.output(builder.gemm("c", b, 6, 3))

    net = Repaired(*built(two), {"a.w[0]": [0, 1]})
    before, after = weights(net.cut), weights(net.model)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {"b.w", "b.b"}


def test_everywhere_every_layer_is_fitted() -> None:
    def two(builder: Builder) -> None:
        a = builder.relu(builder.gemm("a", builder.input("x", (40, 5)), 5, 8))
        builder.output(builder.gemm("c", builder.relu(builder.gemm("b", a, 8, 6)), 6, 3))

    net = Repaired(*built(two), {"a.w[0]": [0, 1]}, everywhere=True, damping=0.0)
    assert [each.name for each in net.report.refitted] == ["node_a", "node_b", "node_c"]


# -- residual streams -------------------------------------------------------------------------------------------------

#: The stream loses unit 2 of `h`, and what reads it cannot make that good: its weight is read twice. The branch can,
#: by unit 0 of `g`, which is the same.
STREAM = """agraph (float[N,5] x) => (float[N,4] y, float[N,4] other) {{
    ha = Gemm(x, wh, bh)  h = Relu(ha)  s = MatMul(h, ws)  minus = Neg(h)  other = MatMul(minus, ws)
    ga = Gemm(x, wg, bg)  g = Relu(ga)  {branch}
    y = Add({sum})
}}"""

BRANCHES = {
    "gemm": "f = Gemm(g, wf, bf)",
    "matmul and add": "m = MatMul(g, wf)  f = Add(m, bf)",
    "scaled": "m = Gemm(g, wf, bf)  f = Mul(m, scale)",
    "normalised": "m = Gemm(g, wf, bf)  f = BatchNormalization(m, scale, bf, mean, var)",
    "scaled twice": "m = MatMul(g, wf)  k = Mul(scale, m)  n = Add(bf, k)  i = Identity(n)  f = Mul(i, scale)",
}


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("order", ["s, f", "f, s"])
def test_a_branch_makes_good_what_the_stream_has_lost(branch: str, order: str) -> None:
    wh, bh, wg, bg = normal(5, 6), normal(6, seed=1), normal(5, 7, seed=2), normal(7, seed=3)
    wg[:, 0], bg[0] = wh[:, 2], bh[2]
    wg[:, 6], bg[6] = wg[:, 5], bg[5]  # one of two equal units goes, so that the branch reads a cut
    source = parse(
        STREAM.format(branch=BRANCHES[branch], sum=order),
        wh=wh,
        bh=bh,
        wg=wg,
        bg=bg,
        ws=normal(6, 4, seed=4),
        wf=normal(7, 4, seed=5),
        bf=normal(4, seed=6),
        scale=np.array([0.5, -2, 1.5, 3], np.float32),
        mean=normal(4, seed=7),
        var=normal(4, seed=8) ** 2 + 0.5,
    )
    net = Repaired(source, {"x": normal(80, 5, seed=9)}, {"wh[1]": [2], "wg[1]": [6]}, damping=1e-8)
    assert set(net.skipped().values()) == {"its weight is shared with another layer"}
    cut = activations(net.cut, net.feeds)["y"]
    wanted = net.values["y"]
    assert abs(cut - wanted).max() > 0.1 * abs(wanted).max()
    if branch == "scaled twice":  # no place for an intercept: all but a constant
        found = net.found["y"] - wanted
        assert found.std(axis=0).max() < 0.2 * (cut - wanted).std(axis=0).max()
    else:
        close(net.found["y"], wanted, 2e-4)


def test_duplicated_channels_are_made_good_exactly() -> None:
    """A residual network whose removed channels are copies of kept ones: repaired, it is the original."""

    def residual(builder: Builder) -> None:
        x = builder.relu(builder.conv("stem", builder.input("x", (6, 3, 6, 6)), 3, 6))
        for name in ("one", "two"):
            inner = builder.cbr(f"{name}.in", x, 6, 8)
            x = builder.relu(
                builder.add(x, builder.batch_norm(f"{name}.bn", builder.conv(f"{name}.out", inner, 8, 6), 6))
            )
        builder.output(builder.gemm("head", builder.pool(x), 6, 3))
        arrays = builder.initializers
        for name in arrays:
            if ".in" in name:  # channels 6 and 7 are 0 and 3 once more
                arrays[name][6:] = arrays[name][[0, 3]]
            if name.startswith("stem"):
                arrays[name][5] = arrays[name][1]
            if ".out" in name or ".bn." in name:
                arrays[name][5] = arrays[name][1]

    gone = {"one.in.w[0]": [6, 7], "two.in.w[0]": [6, 7], "stem.w[0]": [5]}
    net = Repaired(*built(residual), gone, damping=1e-8)
    assert {each.name for each in net.report.refitted} == {
        "node_one.in",
        "node_one.out",
        "node_two.in",
        "node_two.out",
        "node_head",
    }
    cut = outputs(net.cut, net.feeds)[0]
    assert abs(cut - outputs(net.original, net.feeds)[0]).max() > 0.05
    assert net.error() < 1e-3


# -- what is skipped --------------------------------------------------------------------------------------------------


def test_shared_weights_are_skipped() -> None:
    text = """agraph (float[N,5] x, float[N,5] z) => (float[N,3] y, float[N,3] v) {
        a = MatMul(x, wa)  r = Relu(a)  y = MatMul(r, w)
        b = MatMul(z, wa)  s = Relu(b)  v = MatMul(s, w)
    }"""
    source = parse(text, wa=normal(5, 8), w=normal(8, 3, seed=1))
    feeds = {"x": normal(40, 5, seed=3), "z": normal(40, 5, seed=4)}
    net = Repaired(source, feeds, {"wa#0[1]": [0, 3], "wa#1[1]": [0, 3]})
    assert not net.report.refitted
    assert len(net.report.skipped) == 2
    assert set(net.skipped().values()) == {"its weight is shared with another layer"}
    assert np.array_equal(weights(net.cut)["w"], weights(net.model)["w"])


def test_layers_in_the_bodies_of_an_if_are_skipped() -> None:
    text = """agraph (float[N,5] x, bool c) => (float[N,3] y, float[N,2] z) {
        a = MatMul(x, wa)  r = Relu(a)
        y = If(c) <
            then_branch = g1 () => (float[N,3] t) { t = MatMul(r, w1) },
            else_branch = g2 () => (float[N,3] e) { e = MatMul(r, w2) }
        >
        z = MatMul(r, w3)
    }"""
    source = parse(
        text, wa=normal(5, 8), w1=normal(8, 3, seed=1), w2=normal(8, 3, seed=2), w3=normal(8, 2, seed=3)
    )
    sizes = {group.name: group.size for group in analyze_ir(as_ir(source)[0]).groups}
    plan = Plan([Cut("wa[1]", sizes["wa[1]"], (0, 3))])
    pruned = Pruning(source, Settings(plan=plan), verify=False).cut(plan)
    x = normal(40, 5, seed=4)
    report = repair(pruned, Calibration({"x": x}, {"c": np.array(True)}), damping=0.0)
    assert [reason for _, reason in report.skipped] == ["it lies in a subgraph"] * 2
    feeds = {"x": x, "c": np.array(False)}
    found, wanted = (activations(to_proto(m), feeds) for m in (pruned.model, source))
    weight, _ = affine_fit(found["r"], wanted["z"], bias=np.zeros(2))
    close(found["z"], found["r"] @ weight)


# -- types, laws ------------------------------------------------------------------------------------------------------


def test_half_precision_stays() -> None:
    text = """agraph (float16[N,5] x) => (float16[N,3] y) {
        a = MatMul(x, wa)  seen = Relu(a)  m = MatMul(seen, w)  y = Add(m, b)
    }"""
    half = np.float16
    source = parse(
        text, wa=normal(5, 8).astype(half), w=normal(8, 3, seed=1).astype(half), b=normal(3).astype(half)
    )
    net = Repaired(source, {"x": normal(60, 5, seed=3).astype(half)}, {"wa[1]": [0, 3]}, damping=1e-6)
    assert {t.name: numpy_helper.to_array(t).dtype for t in net.model.graph.initializer} == dict.fromkeys(
        ["wa", "w", "b"], np.dtype(half)
    )
    weight, bias = affine_fit(net.found["seen"], net.values["y"])
    close(net.found["y"].astype(np.float64), net.found["seen"].astype(np.float64) @ weight + bias, 5e-3)


def test_the_choice_of_rows_is_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def conv(builder: Builder) -> None:
        x = builder.relu(builder.conv("a", builder.input("x", (6, 3, 9, 9)), 3, 6))
        builder.output(builder.conv("b", x, 6, 4))

    monkeypatch.setattr("graphprune.repair.refit.LEAST_ROWS", 100)
    monkeypatch.setattr("graphprune.repair.refit.ROWS_PER_FEATURE", 1)
    first, again, other = (
        weights(Repaired(*built(conv), {"a.w[0]": [0]}, seed=seed).model)["b.w"] for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_repair_raises_no_layers_error(pattern: Pattern) -> None:
    model, feeds, _ = pattern.build()
    source = as_ir(model)[0]
    InlinePass()(source)
    settings = Settings(
        Request(0.5, round_to=1, residual=pattern.residual), input_shapes=pattern.input_shapes or None
    )
    pruning = Pruning(source, settings, verify=False)
    pruned = pruning.cut(pruning.plan())
    types = {name: value.dtype for name, value in pruned.model.graph.initializers.items()}
    report = repair(pruned, Calibration({}, feeds))
    for each in report.refitted:
        assert each.after is not None
        assert each.before is not None
        assert each.after <= each.before * (1 + 1e-5) + 1e-6
    assert all(reason for _, reason in report.skipped)
    for name, value in pruned.model.graph.initializers.items():
        assert value.dtype == types.get(name, value.dtype)
    repaired = to_proto(pruned.model)
    onnx.checker.check_model(repaired, full_check=True)
    for array in outputs(repaired, feeds):
        assert array.dtype.kind != "f" or np.isfinite(array).all()
