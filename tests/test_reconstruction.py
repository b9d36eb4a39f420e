"""Reconstruction of N:M weights, against least squares on the activations of the sparse network and of the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import scipy.linalg
from onnx import helper, numpy_helper

from graphprune.calibration import Calibration
from graphprune.errors import ModelError, OptionError, SparsityError
from graphprune.kernels.nm import nm_mask
from graphprune.kernels.sparsegpt import sparsegpt
from graphprune.model import copy, to_proto
from graphprune.sparsity.pattern import NM, Layout
from graphprune.sparsity.reconstruction import SELECTIONS, Method, ReconstructionReport, reconstruct

from .activations import Array, activations, calibration, outputs, patches
from .twins import parse

METHODS = [
    Method(selection, refit)
    for selection in SELECTIONS
    for refit in (False, True)
    if refit or selection != "alps"  # which only chooses
]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mixed(rows: int, features: int, seed: int = 0) -> Array:
    """Correlated inputs with a mean."""
    return (normal(rows, features, seed=seed) @ normal(features, features, seed=seed + 1) + 0.5).astype(
        np.float32
    )


def stored(model: ir.Model, name: str) -> ir.Value:
    """A weight by name, wherever it is stored."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    return next(value for node in model.graph for value in node.outputs if value.name == name)


def contents(model: ir.Model, name: str) -> Array:
    value = stored(model, name)
    node = value.producer()
    tensor = value.const_value if node is None else node.attributes["value"].as_tensor()
    assert tensor is not None
    return np.asarray(tensor.numpy())


class Sparse:
    """A network, some weights of which are given a pattern."""

    def __init__(
        self,
        source: ir.Model,
        feeds: Mapping[str, Array] | None,
        layouts: Mapping[str, Layout],
        method: Method,
        pattern: NM | None = None,
        **options: Any,
    ) -> None:
        self.source, self.ir = source, copy(source)
        self.pattern = pattern or NM(2, 4)
        weights = {stored(self.ir, name): layout for name, layout in layouts.items()}
        given = None if feeds is None else calibration(feeds)
        self.report: ReconstructionReport = reconstruct(
            self.ir, weights, self.pattern, method, given, **options
        )
        self.model, self.original = to_proto(self.ir), to_proto(source)
        onnx.checker.check_model(self.model, full_check=True)
        for name, layout in layouts.items():
            self.check(name, layout)

    def check(self, name: str, layout: Layout) -> None:
        """The weight holds the pattern, its mask says where, its type is what it was, and no zero is negative."""
        before, after = contents(self.source, name), contents(self.ir, name)
        assert after.dtype == before.dtype
        assert after.shape == before.shape
        mask = self.report.masks[stored(self.ir, name)]
        assert mask.shape == after.shape
        gone = after[~mask].astype(np.float32)
        assert (gone == 0).all()
        assert not np.signbit(gone).any()
        n, m = self.pattern.n, self.pattern.m
        cut = layout.contracted - layout.contracted % m
        viewed = mask.reshape(layout.shape)
        assert (viewed[:, :cut].reshape(layout.outer, -1, m, layout.inner).sum(axis=2) == n).all()
        assert viewed[:, cut:].all()

    def mask(self, name: str) -> Array:
        return self.report.masks[stored(self.ir, name)]

    def reasons(self) -> dict[str, str]:
        return {value.name or "": reason for value, reason in self.report.by_magnitude}


# -- one layer, in every form -----------------------------------------------------------------------------------------

GEMM = "agraph (float[N,12] x) => (float[N,6] y) { y = Gemm(x, w, b) }"
TRANSPOSED = "agraph (float[N,12] x) => (float[N,6] y) { y = Gemm<transB=1, alpha=-0.5>(x, w, b) }"
MATMUL = "agraph (float[N,12] x) => (float[N,6] y) { m = MatMul(x, w)  y = Add(m, b) }"
BEHIND = """agraph (float[N,12] x) => (float[N,6] y) {
    i = Identity(w)  t = Transpose<perm=[1,0]>(i)  m = MatMul(x, t)  y = Add(m, b)
}"""
LEFT = "agraph (float[N,12,3] x) => (float[N,6,3] y) { y = MatMul(w, x) }"
CONV = "agraph (float[N,8,5,5] x) => (float[N,6,H,W] y) { y = Conv<pads=[1,1,1,1]>(x, w, b) }"
GROUPED = "agraph (float[N,16,5,5] x) => (float[N,6,H,W] y) { y = Conv<group=2>(x, w, b) }"
TRANSPOSE_CONV = "agraph (float[N,8,4,4] x) => (float[N,6,H,W] y) { y = ConvTranspose(x, w, b) }"

#: The model, its weight, its input, and how the weight is contracted.
FORMS: dict[str, tuple[str, Array, Array, Layout]] = {
    "Gemm": (GEMM, normal(12, 6), mixed(90, 12), Layout(1, 12, 6, 6)),
    "Gemm, transposed": (TRANSPOSED, normal(6, 12), mixed(90, 12), Layout(6, 12, 1, 6)),
    "MatMul": (MATMUL, normal(12, 6), mixed(90, 12), Layout(1, 12, 6, 6)),
    "behind Transpose": (BEHIND, normal(6, 12), mixed(90, 12), Layout(6, 12, 1, 6)),
    "left": (
        LEFT,
        normal(6, 12),
        np.ascontiguousarray(mixed(90, 12).reshape(30, 3, 12).swapaxes(1, 2)),
        Layout(6, 12, 1, 6),
    ),
    "Conv": (CONV, normal(6, 8, 3, 3), normal(12, 8, 5, 5) + 0.5, Layout(6, 8, 9, 6)),
    "Conv in groups": (GROUPED, normal(6, 8, 3, 3), normal(12, 16, 5, 5) + 0.5, Layout(6, 8, 9, 3)),
    "ConvTranspose": (TRANSPOSE_CONV, normal(8, 6, 2, 2), normal(12, 8, 4, 4) + 0.5, Layout(1, 8, 24, 6)),
}


def products(form: str, x: Array, y: Array, weight: Array) -> list[tuple[Array, Array, Array]]:
    """Rows, results and weight ``[features, outputs]`` of each product, by the definition of the op."""
    if form == "left":
        return [(x.swapaxes(1, 2).reshape(-1, 12), y.swapaxes(1, 2).reshape(-1, 6), weight.T)]
    if form.startswith("Conv") and form != "ConvTranspose":
        groups = 2 if "groups" in form else 1
        made = []
        for part, result, filters in zip(
            np.split(x, groups, 1), np.split(y, groups, 1), np.split(weight, groups), strict=True
        ):
            rows = patches(part, [3, 3], pads=[0] * 4 if groups == 2 else [1] * 4)
            results = np.moveaxis(result, 1, -1).reshape(len(rows), -1)
            made.append((rows, results, filters.reshape(len(filters), -1).T))
        return made
    if form == "ConvTranspose":  # a convolution of the padded input with the kernel turned round
        rows = patches(x, [2, 2], pads=[1] * 4)
        turned = weight[:, :, ::-1, ::-1].swapaxes(0, 1)
        return [(rows, np.moveaxis(y, 1, -1).reshape(len(rows), -1), turned.reshape(6, -1).T)]
    matrix = weight if weight.shape == (12, 6) else weight.T
    return [(x, y, matrix * (-0.5 if form == "Gemm, transposed" else 1.0))]


def groups_of_four(form: str, features: int) -> Array:
    """Features of a convolution are (channel, tap): groups of four channels for each tap."""
    taps = features // 8 if form.startswith("Conv") else 1
    return np.arange(features).reshape(-1, 4, taps).swapaxes(1, 2).reshape(-1, 4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_one_layer(form: str, method: Method) -> None:
    """Masks hold along the contracted axis; what stays is least squares over the samples."""
    text, weight, x, layout = FORMS[form]
    arrays = {} if form == "left" else {"b": normal(6, seed=3)}
    method = Method(method.selection, method.refit, damping=0.0, hessian_damping=0.0)
    net = Sparse(parse(text, w=weight, **arrays), {"x": x}, {"w": layout}, method)
    assert not net.report.by_magnitude
    before, after = activations(net.original, {"x": x})["y"], activations(net.model, {"x": x})["y"]
    found, mask = contents(net.ir, "w"), net.mask("w")
    assert (found[mask] != 0).all()
    if not method.refit and method.selection != "sparsegpt":
        assert np.array_equal(found, weight * mask)
    if not method.refit and method.selection == "magnitude":
        assert np.array_equal(mask.reshape(layout.shape), nm_mask(abs(weight).reshape(layout.shape), 2, 4))
    wanted = products(form, x, before, weight)
    given = products(form, x, after, found)
    masks = products(form, x, after, mask.astype(float))
    for (rows, results, old), (_, made, _), (_, _, kept) in zip(wanted, given, masks, strict=True):
        rows, results = rows.astype(np.float64), results.astype(np.float64)
        if not method.refit:
            if method.selection == "wanda":
                scores = abs(old) * np.sqrt(np.square(rows).sum(axis=0))[:, None]
                for group in groups_of_four(form, len(old)):
                    ranks = np.argsort(np.argsort(-scores[group], axis=0), axis=0)
                    assert np.array_equal(kept[group] != 0, ranks < 2)
            continue
        place = form != "left"
        for k in range(old.shape[1]):
            chosen = np.flatnonzero(kept[:, k])
            columns = np.c_[rows[:, chosen], np.ones(len(rows))] if place else rows[:, chosen]
            fitted = scipy.linalg.lstsq(columns, results[:, k])[0]
            np.testing.assert_allclose(made[:, k], columns @ fitted, rtol=0, atol=2e-3 * abs(results).max())


@pytest.mark.parametrize("form", ["Gemm", "Gemm, transposed", "Conv", "Conv in groups", "behind Transpose"])
def test_sparsegpt_is_the_kernel_on_the_layers_rows(form: str) -> None:
    text, weight, x, layout = FORMS[form]
    method = Method("sparsegpt", refit=False, hessian_damping=0.01)
    net = Sparse(parse(text, w=weight, b=normal(6, seed=3)), {"x": x}, {"w": layout}, method)
    y = activations(net.original, {"x": x})["y"]
    found = products(form, x, y, contents(net.ir, "w"))
    for (rows, _, matrix), (_, _, new) in zip(products(form, x, y, weight), found, strict=True):
        rows = rows.astype(np.float64)
        groups = groups_of_four(form, len(matrix))
        wanted, _ = sparsegpt(matrix, rows.T @ rows, 2, 4, groups=groups, damping=0.01)
        np.testing.assert_allclose(new, wanted, rtol=0, atol=1e-4 * abs(matrix).max())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_tail_stays_dense(method: Method) -> None:
    text = "agraph (float[N,10] x) => (float[N,6] y) { y = MatMul(x, w) }"
    net = Sparse(parse(text, w=normal(10, 6)), {"x": mixed(60, 10)}, {"w": Layout(1, 10, 6, 6)}, method)
    assert (contents(net.ir, "w")[8:] != 0).all()


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(4, 8), NM(1, 2), NM(4, 4)], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_other_patterns(pattern: NM, method: Method) -> None:
    text, weight, x, layout = FORMS["Gemm"]
    net = Sparse(parse(text, w=weight, b=normal(6)), {"x": x}, {"w": layout}, method, pattern)
    if pattern.n == pattern.m:
        np.testing.assert_allclose(contents(net.ir, "w"), weight, rtol=0, atol=1e-4)


# -- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_half_precision_stays(method: Method) -> None:
    text = "agraph (float16[N,12] x) => (float16[N,6] y) { m = MatMul(x, w)  y = Add(m, b) }"
    half = np.float16
    source = parse(text, w=normal(12, 6).astype(half), b=normal(6).astype(half))
    x = normal(90, 12, seed=4).astype(half)
    net = Sparse(source, {"x": x}, {"w": Layout(1, 12, 6, 6)}, method)
    if method.refit:
        wanted, found = outputs(net.original, {"x": x})[0], outputs(net.model, {"x": x})[0]
        mask = net.mask("w")
        for k in range(6):
            columns = np.c_[x[:, mask[:, k]], np.ones(90)].astype(np.float64)
            fitted = scipy.linalg.lstsq(columns, wanted[:, k])[0]
            np.testing.assert_allclose(found[:, k], columns @ fitted, rtol=0, atol=2e-2 * abs(wanted).max())


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_weights_behind_a_cast_keep_their_type(kind: str, method: Method) -> None:
    text = "agraph (float[N,12] x) => (float[N,6] y) { c = Cast<to=1>(w)  y = MatMul(x, c) }"
    source = parse(text)
    dtype = np.dtype(np.float16) if kind == "FLOAT16" else np.dtype(ml_dtypes.bfloat16)
    array = normal(12, 6).astype(dtype)
    proto = to_proto(source)
    proto.graph.initializer.append(
        helper.make_tensor("w", getattr(onnx.TensorProto, kind), (12, 6), array.tobytes(), raw=True)
    )
    x = mixed(90, 12)
    net = Sparse(ir.from_proto(proto), {"x": x}, {"w": Layout(1, 12, 6, 6)}, method)
    assert not net.report.by_magnitude
    assert contents(net.ir, "w").dtype == dtype
    assert [node.op_type for node in net.model.graph.node] == ["Cast", "MatMul"]
    assert np.isfinite(outputs(net.model, {"x": x})[0]).all()


def test_a_constant_node_keeps_its_weight() -> None:
    text = "agraph (float[N,12] x) => (float[N,6] y) { y = MatMul(x, w) }"
    proto = to_proto(parse(text))
    proto.graph.node.insert(
        0, helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(normal(12, 6), "w"))
    )
    net = Sparse(ir.from_proto(proto), {"x": mixed(90, 12)}, {"w": Layout(1, 12, 6, 6)}, Method())
    assert not net.report.by_magnitude
    assert not net.model.graph.initializer


# -- several layers ---------------------------------------------------------------------------------------------------

DEEP = """agraph (float[N,12] x) => (float[N,6] y) {
    a = Gemm(x, w1, b1)  seen = Relu(a)  b = Gemm(seen, w2, b2)  last = Relu(b)  y = Gemm(last, w3, b3)
}"""
LAYOUTS = {"w1": Layout(1, 12, 16, 16), "w2": Layout(1, 16, 8, 8)}


def deep() -> ir.Model:
    sizes = {"w1": (12, 16), "w2": (16, 8), "w3": (8, 6), "b1": (16,), "b2": (8,), "b3": (6,)}
    return parse(DEEP, **{name: normal(*shape, seed=k) for k, (name, shape) in enumerate(sizes.items())})


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_later_layer_is_fitted_on_what_the_sparse_ones_make(selection: str) -> None:
    x = mixed(300, 12)
    net = Sparse(deep(), {"x": x}, LAYOUTS, Method(selection, damping=0.0))
    found, wanted = activations(net.model, {"x": x}), activations(net.original, {"x": x})
    for name, reads, makes in (("w1", "", "a"), ("w2", "seen", "b"), ("w3", "last", "y")):
        rows = (found[reads] if reads else x).astype(np.float64)
        mask = net.mask(name) if name in LAYOUTS else np.ones((8, 6), dtype=bool)
        for k in range(mask.shape[1]):
            columns = np.c_[rows[:, mask[:, k]], np.ones(len(rows))]
            fitted = columns @ scipy.linalg.lstsq(columns, wanted[makes][:, k].astype(np.float64))[0]
            np.testing.assert_allclose(
                found[makes][:, k], fitted, rtol=0, atol=2e-3 * abs(wanted[makes]).max()
            )
    assert [layer.weight for layer in net.report.layers] == ["w1", "w2", "w3"]
    assert [layer.sparse for layer in net.report.layers] == [True, True, False]
    assert [layer.node for layer in net.report.layers] == [f"Gemm_{k}" for k in (0, 2, 4)]
    for layer, makes in zip(net.report.layers, "aby", strict=True):
        variance = wanted[makes].astype(np.float64).var(axis=0).sum() * len(x)
        error = np.square(found[makes].astype(np.float64) - wanted[makes]).sum() / variance
        assert layer.after == pytest.approx(error, rel=1e-2, abs=1e-6)


def test_what_stays_dense_is_left_alone_unless_it_is_to_be_fitted() -> None:
    feeds = {"x": mixed(300, 12)}
    for method in (Method(others=False), Method("sparsegpt", refit=False)):
        net = Sparse(deep(), feeds, LAYOUTS, method)
        for name in ("w3", "b3"):
            assert np.array_equal(contents(net.ir, name), contents(net.source, name))
    assert not np.array_equal(
        contents(Sparse(deep(), feeds, LAYOUTS, Method()).ir, "w3"), normal(8, 6, seed=2)
    )


def test_a_fit_costs_less_than_none_and_sparsegpt_less_than_magnitude() -> None:
    feeds = {"x": mixed(2000, 12)}
    errors = {}
    for method in METHODS:
        net = Sparse(deep(), feeds, LAYOUTS, method)
        wanted, found = outputs(net.original, feeds)[0], outputs(net.model, feeds)[0]
        errors[method.selection, method.refit] = float(np.square(found - wanted).mean() / wanted.var())
    for selection in ("magnitude", "wanda", "sparsegpt"):
        assert errors[selection, True] < 0.5 * errors[selection, False]
    assert errors["sparsegpt", False] < errors["magnitude", False]
    assert max(errors["alps", True], errors["sparsegpt", True]) < errors["magnitude", True]


def test_zeros_of_what_stays_dense_stay() -> None:
    source, holes = (
        deep(),
        np.where(np.arange(48).reshape(8, 6) % 3, normal(8, 6, seed=2), 0).astype(np.float32),
    )
    source.graph.initializers["w3"].const_value = ir.tensor(holes, name="w3")
    x = mixed(300, 12)
    net = Sparse(source, {"x": x}, LAYOUTS, Method(damping=0.0))
    found, wanted = activations(net.model, {"x": x}), activations(net.original, {"x": x})
    assert np.array_equal(contents(net.ir, "w3") != 0, holes != 0)
    for k in range(6):
        columns = np.c_[found["last"][:, holes[:, k] != 0], np.ones(300)].astype(np.float64)
        fitted = columns @ scipy.linalg.lstsq(columns, wanted["y"][:, k].astype(np.float64))[0]
        np.testing.assert_allclose(found["y"][:, k], fitted, rtol=0, atol=2e-3 * abs(wanted["y"]).max())


STREAM = """agraph (float[N,12] x) => (float[N,8] y) {
    a = Gemm(x, w1, b1)  s = Gemm(x, w0, b0)  h = Relu(a)  f = Gemm(h, w2, b2)  y = Add(s, f)
}"""


def test_a_branch_makes_good_what_the_stream_has_lost() -> None:
    """The stream's weight is sparse; the branch is fitted to the sum, not to its own result."""
    sizes = {"w0": (12, 8), "w1": (12, 16), "w2": (16, 8), "b0": (8,), "b1": (16,), "b2": (8,)}
    source = parse(STREAM, **{name: normal(*shape, seed=k) for k, (name, shape) in enumerate(sizes.items())})
    x = mixed(300, 12)
    net = Sparse(source, {"x": x}, {"w0": Layout(1, 12, 8, 8)}, Method("magnitude", refit=True, damping=0.0))
    found, wanted = activations(net.model, {"x": x}), activations(net.original, {"x": x})
    columns = np.c_[found["h"], np.ones(300)].astype(np.float64)
    target = (wanted["y"] - found["s"]).astype(np.float64)
    assert abs(target - wanted["f"]).max() > 0.1
    fitted = columns @ scipy.linalg.lstsq(columns, target)[0]
    np.testing.assert_allclose(found["f"], fitted, rtol=0, atol=2e-3 * abs(target).max())


# -- what inputs say nothing of ---------------------------------------------------------------------------------------


def by_magnitude(net: Sparse, name: str, layout: Layout) -> None:
    before, after = contents(net.source, name), contents(net.ir, name)
    mask = nm_mask(abs(before.astype(np.float32)).reshape(layout.shape), 2, 4).reshape(before.shape)
    assert np.array_equal(net.mask(name), mask)
    assert np.array_equal(after, np.where(mask, before, 0))


def test_a_shared_weight() -> None:
    text = """agraph (float[N,8] x) => (float[N,8] y) { a = MatMul(x, w)  r = Relu(a)  y = MatMul(r, w) }"""
    layout = Layout(1, 8, 8, 8)
    net = Sparse(parse(text, w=normal(8, 8)), {"x": mixed(60, 8)}, {"w": layout}, Method())
    assert net.reasons() == {"w": "it is read in several places"}
    by_magnitude(net, "w", layout)


def test_an_integer_weight() -> None:
    text = """agraph (float[N,8] x) => (float[N,8] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }"""
    weight = np.random.default_rng(0).integers(-127, 128, (8, 8)).astype(np.int8)
    source = parse(text, w=weight, s=np.array(0.01, np.float32))
    layout = Layout(1, 8, 8, 8)
    net = Sparse(source, {"x": mixed(60, 8)}, {"w": layout}, Method())
    assert net.reasons() == {"w": "it is quantised"}
    by_magnitude(net, "w", layout)


def test_a_weight_in_a_subgraph_and_one_behind_it() -> None:
    """What is behind a weight that is pruned by magnitude sees it pruned."""
    text = """agraph (float[N,8] x, bool c) => (float[N,4] y) {
        h = If(c) <
            then_branch = g1 () => (float[N,8] t) { t = MatMul(x, w1) },
            else_branch = g2 () => (float[N,8] e) { e = MatMul(x, w2) }
        >
        y = MatMul(h, w3)
    }"""
    source = parse(text, w1=normal(8, 8), w2=normal(8, 8, seed=1), w3=normal(8, 4, seed=2))
    layouts = {"w1": Layout(1, 8, 8, 8), "w2": Layout(1, 8, 8, 8), "w3": Layout(1, 8, 4, 4)}
    model = copy(source)
    weights = {stored(model, name): layout for name, layout in layouts.items()}
    x, c = mixed(60, 8), np.array(True)
    report = reconstruct(model, weights, NM(2, 4), Method(damping=0.0), Calibration({"x": x}, {"c": c}))
    assert {value.name: reason for value, reason in report.by_magnitude} == dict.fromkeys(
        ["w1", "w2"], "it lies in a subgraph"
    )
    first = contents(model, "w1")
    assert np.array_equal(first != 0, nm_mask(abs(normal(8, 8))[None], 2, 4)[0])
    hidden, wanted = (x @ first).astype(np.float64), x @ normal(8, 8) @ normal(8, 4, seed=2)
    mask = report.masks[stored(model, "w3")]
    for k in range(4):
        columns = hidden[:, mask[:, k]]
        fitted = columns @ scipy.linalg.lstsq(columns, wanted[:, k].astype(np.float64))[0]
        np.testing.assert_allclose(
            hidden @ contents(model, "w3")[:, k], fitted, atol=2e-3 * abs(wanted).max()
        )


def test_functions_are_inlined() -> None:
    text = """agraph (float[N,8] x) => (float[N,8] y) { a = local.f(x, w)  y = MatMul(a, v) }
    <domain: "local", opset_import: ["" : 18]> f (p, q) => (r) { r = MatMul(p, q) }"""
    source = parse(text, w=normal(8, 8), v=normal(8, 8, seed=1))
    layouts = {"w": Layout(1, 8, 8, 8), "v": Layout(1, 8, 8, 8)}
    x = mixed(60, 8)
    for original in (None, source):
        net = Sparse(source, {"x": x}, layouts, Method(damping=0.0), original=original)
        assert not net.report.by_magnitude
        assert [node.op_type for node in net.model.graph.node] == ["MatMul", "MatMul"]
        assert len(source.functions) == 1
        hidden, wanted = (x @ contents(net.ir, "w")).astype(np.float64), outputs(net.original, {"x": x})[0]
        for k in range(8):
            columns = hidden[:, net.mask("v")[:, k]]
            fitted = columns @ scipy.linalg.lstsq(columns, wanted[:, k])[0]
            np.testing.assert_allclose(
                hidden @ contents(net.ir, "v")[:, k], fitted, rtol=0, atol=2e-3 * abs(wanted).max()
            )


def test_a_weight_that_is_stored_in_a_function() -> None:
    text = """agraph (float[N,4] x) => (float[N,2] y) { a = local.f(x)  y = MatMul(a, v) }
    <domain: "local", opset_import: ["" : 18]> f (p) => (r) {
        w = Constant<value = float[4,4] {1,2,3,4, 5,6,7,8, 9,1,2,3, 4,5,6,7}>()  r = MatMul(p, w)
    }"""
    model = parse(text, v=normal(4, 2))
    (function,) = model.functions.values()
    inside = next(iter(function)).outputs[0]
    weights = {inside: Layout(1, 4, 4, 4), stored(model, "v"): Layout(1, 4, 2, 2)}
    report = reconstruct(model, weights, NM(2, 4), Method(), calibration({"x": mixed(60, 4)}))
    assert report.by_magnitude == [(inside, "it is stored in a function")]
    wanted = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 1]])
    (kept,) = (node for node in model.graph if node.op_type == "Constant")
    assert np.array_equal(kept.attributes["value"].as_tensor().numpy() != 0, wanted)
    assert (report.masks[stored(model, "v")].sum(axis=0) == 2).all()


def test_what_is_quantised_and_stays_dense_is_left_alone() -> None:
    text = """agraph (float[N,8] x) => (float[N,8] y) {
        a = MatMul(x, v)  d = DequantizeLinear(w, s)  y = MatMul(a, d)
    }"""
    weight = np.random.default_rng(0).integers(-127, 128, (8, 8)).astype(np.int8)
    source = parse(text, w=weight, s=np.array(0.01, np.float32), v=normal(8, 8))
    net = Sparse(source, {"x": mixed(60, 8)}, {"v": Layout(1, 8, 8, 8)}, Method())
    assert np.array_equal(contents(net.ir, "w"), weight)
    assert [node.op_type for node in net.model.graph.node] == ["MatMul", "DequantizeLinear", "MatMul"]


def test_a_weight_that_nothing_contracts() -> None:
    text = "agraph (float[N,8] x) => (float[N,8] y) { y = Mul(x, w) }"
    layout = Layout(1, 8, 1, 1)
    net = Sparse(parse(text, w=normal(8)), {"x": mixed(60, 8)}, {"w": layout}, Method())
    assert net.reasons() == {"w": "no contraction of the main graph reads it"}
    by_magnitude(net, "w", layout)


def test_what_half_precision_cannot_hold() -> None:
    """Only weights beyond float16 would make up, through the small inputs, for what the others added."""
    text = "agraph (float[N,4] x) => (float[N,2] y) { c = Cast<to=1>(w)  y = MatMul(x, c) }"
    x = normal(60, 4)
    x[:, 2:] = 1e-4 * x[:, :2]
    weight = np.array([[1, 1], [1, 1], [60000, 60000], [60000, 60000]], np.float16)
    layout = Layout(1, 4, 2, 2)
    net = Sparse(parse(text, w=weight), {"x": x}, {"w": layout}, Method("magnitude", damping=0.0))
    assert net.reasons() == {"w": "its fitted weights are beyond the range of its type"}
    by_magnitude(net, "w", layout)


# -- laws, and what is refused ----------------------------------------------------------------------------------------


def test_by_magnitude_no_inputs_are_needed() -> None:
    for name, layout in LAYOUTS.items():
        by_magnitude(Sparse(deep(), None, LAYOUTS, Method("magnitude", refit=False)), name, layout)
    for method in METHODS[1:]:
        with pytest.raises(OptionError, match="needs inputs"):
            Sparse(deep(), None, LAYOUTS, method)


def test_the_original_may_be_given() -> None:
    """A network that is no longer what it was is fitted to what it was."""
    source, x = deep(), mixed(300, 12)
    noisy = copy(source)
    noisy.graph.initializers["w1"].const_value = ir.tensor(normal(12, 16) + normal(12, 16, seed=9))
    wanted = outputs(to_proto(source), {"x": x})[0]
    errors = [
        np.square(outputs(net.model, {"x": x})[0] - wanted).mean()
        for original in (None, source)
        for net in (Sparse(noisy, {"x": x}, LAYOUTS, Method(), original=original),)
    ]
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(ModelError, match="do not have the same nodes"):
        Sparse(deep(), {"x": x}, LAYOUTS, Method(), original=parse(GEMM, w=normal(12, 6), b=normal(6)))


def test_progress_and_seeds() -> None:
    feeds, seen = {"x": mixed(300, 12)}, []
    first = Sparse(deep(), feeds, LAYOUTS, Method(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    again = Sparse(deep(), feeds, LAYOUTS, Method())
    for name in LAYOUTS:
        assert np.array_equal(contents(first.ir, name), contents(again.ir, name))
    report = first.report.to_dict()
    assert [layer["weight"] for layer in report["layers"]] == ["w1", "w2", "w3"]


def test_what_is_refused() -> None:
    with pytest.raises(OptionError, match="for single weights, not for blocks"):
        Sparse(deep(), {"x": mixed(60, 12)}, LAYOUTS, Method(), NM(2, 4, (4, 1)))
    source = deep()
    source.graph.initializers["w1"].const_value = ir.tensor(np.full((12, 16), np.nan, np.float32), name="w1")
    with pytest.raises(SparsityError, match="'w1' holds NaN"):
        Sparse(source, None, LAYOUTS, Method("magnitude", refit=False))


def test_no_such_method() -> None:
    with pytest.raises(OptionError, match="there are magnitude, wanda, sparsegpt, alps"):
        Method("random")
    with pytest.raises(OptionError, match="it goes with a refit"):
        Method("alps", refit=False)
