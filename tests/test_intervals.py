"""Bounds hold: whatever the inputs, every element that ONNX Runtime computes lies in its interval."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graphprune.rules
from graphprune.dead.intervals import Bounds, Intervals, Site, registered, rule
from graphprune.dead.intervals.bounds import between
from graphprune.errors import OptionError
from graphprune.graph import Tensor
from graphprune.pipeline import analyze_ir

from .patterns import PATTERNS, Pattern, run
from .twins import parse

Array = np.ndarray[Any, Any]


def intervals_of(model: ir.Model, **ranges: tuple[float, float]) -> dict[str, tuple[Tensor, Bounds]]:
    """The bounds of all tensors that inputs influence, by name."""
    network = analyze_ir(model)
    found = Intervals(network.analysis, ranges)
    return {t.name: (t, found.of(t)) for t in network.analysis.graph.tensors if not t.constant}


def bounds_of(text: str, **initializers: Array) -> Bounds:
    """The bounds of ``y`` in a model in ONNX text format; inputs named ``u`` lie between 0 and 1."""
    model = parse(text, **initializers)
    ranges = {"u": (0.0, 1.0)} if any(v.name == "u" for v in model.graph.inputs) else {}
    return intervals_of(model, **ranges)["y"][1]


def check(part: Bounds, found: Array, what: str) -> None:
    """What was computed lies within bounds, and is what is said to be fixed."""
    assert part.ndim == found.ndim, what
    real = found.astype(np.float64)
    finite = np.isfinite(real)
    lo, hi, value = (np.broadcast_to(a, real.shape) for a in (part.lo, part.hi, part.value))
    assert (real >= lo)[finite].all(), what
    assert (real <= hi)[finite].all(), what
    fixed = finite & ~np.isnan(value)
    np.testing.assert_allclose(real[fixed], value[fixed], rtol=1e-4, atol=1e-4, err_msg=what)


# -- soundness, against ONNX Runtime --------------------------------------------------------------------------------


@functools.cache
def exposed(pattern: Pattern) -> tuple[ir.Model, onnx.ModelProto, dict[str, Any], list[str]]:
    """A pattern's model, the same with every tensor of its main graph as an output, inputs, and the names."""
    built = pattern.build()
    model = ir.from_proto(built.model)
    probe = onnx.ModelProto()
    probe.CopyFrom(built.model)
    present = {output.name for output in probe.graph.output}
    names = [o for node in probe.graph.node for o in node.output if o and o not in present]
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    return model, probe, dict(built.feeds), [*names, *present]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_every_pattern_stays_within_bounds(pattern: Pattern) -> None:
    model, probe, feeds, names = exposed(pattern)
    network = analyze_ir(model, pattern.input_shapes)
    found = Intervals(network.analysis)
    tensors = {t.name: t for t in network.analysis.graph.tensors if not t.constant}
    checked = 0
    for factor in (1.0, 30.0):
        scaled = {k: (v * factor).astype(v.dtype) if v.dtype.kind == "f" else v for k, v in feeds.items()}
        for name, array in zip(names, run(probe, scaled, names), strict=True):
            tensor = tensors.get(name)
            if tensor is None or not isinstance(array, np.ndarray) or array.shape != tensor.shape:
                continue
            if array.dtype.kind in "fb":
                check(found.of(tensor), array, f"{tensor.producer}")
                checked += 1
    assert checked


UNARY = ["Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Softplus", "Softsign", "Elu", "Selu", "Celu", "LeakyRelu",
         "HardSigmoid", "HardSwish", "Mish", "ThresholdedRelu", "Floor", "Ceil", "Round", "Sign", "Abs", "Neg",
         "Sqrt", "Reciprocal", "Log", "Atan", "Asinh", "Sin", "Cos"]  # fmt: skip


@pytest.mark.parametrize("kind", UNARY)
def test_function_within_range(kind: str) -> None:
    """The bounds contain what is computed on a dense sample of the range, and are no wider than three times that."""
    lo, hi = (0.25, 2.0) if kind in ("Sqrt", "Reciprocal", "Log") else (-2.0, 1.5)
    model = parse(f"g (float[1, 4001] u) => (float[1, 4001] y) {{ y = {kind}(u) }}")
    part = intervals_of(model, u=(lo, hi))["y"][1]
    sample = np.linspace(lo, hi, 4001, dtype=np.float32)[None]
    (found,) = run(ir.to_proto(model), {"u": sample})
    check(part, found, kind)
    assert float(part.hi.max() - part.lo.min()) <= 3 * float(found.max() - found.min()) + 1


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Where", "PRelu", "Pow"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_arithmetic_of_intervals(kind: str, data: st.DataObject) -> None:
    number = st.integers(-32, 32)
    a, b = (sorted(i / 8 for i in data.draw(st.tuples(number, number))) for _ in range(2))
    call = {
        "Where": "c = Greater(u, v)\n y = Where(c, u, v)",
        "Pow": "w = Constant<value = float {2.0}>()\n y = Pow(u, w)",
    }.get(kind, f"y = {kind}(u, v)")
    model = parse(f"g (float[1, 64] u, float[1, 64] v) => (float[1, 64] y) {{ {call} }}")
    part = intervals_of(model, u=(a[0], a[1]), v=(b[0], b[1]))["y"][1]
    generator = np.random.default_rng(0)
    feeds = {
        "u": np.append(generator.uniform(a[0], a[1], 62), a[:]).astype(np.float32)[None],
        "v": np.append(generator.uniform(b[0], b[1], 62), b[::-1]).astype(np.float32)[None],
    }
    (found,) = run(ir.to_proto(model), feeds)
    check(part, found, kind)


# -- exactness ------------------------------------------------------------------------------------------------------


def test_ends_of_a_product_are_reached() -> None:
    """Against brute force: the extremes of a linear function lie at corners of the box."""
    w = np.random.default_rng(0).integers(-3, 4, (6, 4)).astype(np.float32)
    part = bounds_of("g (float[1, 6] u) => (float[1, 4] y) { y = MatMul(u, w) }", w=w)
    corners = np.stack(np.meshgrid(*[[0.0, 1.0]] * 6), axis=-1).reshape(-1, 6) @ w
    np.testing.assert_allclose(part.lo[0], corners.min(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(part.hi[0], corners.max(axis=0), rtol=1e-5, atol=1e-5)
    assert (part.lo[0] <= corners.min(axis=0)).all()
    assert (part.hi[0] >= corners.max(axis=0)).all()


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("group", [1, 2])
def test_ends_of_a_convolution(pads: list[int], group: int) -> None:
    """Each output is linear in its window: its extremes are sums of the weights' positive and negative parts."""
    w = np.random.default_rng(1).standard_normal((4, 4 // group, 3, 3)).astype(np.float32)
    out = 4 + pads[0] + pads[1] - 2
    part = bounds_of(
        f"g (float[1, 4, 4, 4] u) => (float[1, 4, {out}, {out}] y) "
        f"{{ y = Conv<group={group}, pads={pads}, kernel_shape=[3, 3]>(u, w) }}",
        w=w,
    )
    np.testing.assert_allclose(part.lo.ravel(), np.minimum(w, 0).sum(axis=(1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(part.hi.ravel(), np.maximum(w, 0).sum(axis=(1, 2, 3)), rtol=1e-4)


def test_rounding_is_allowed_for() -> None:
    """A float32 sum may exceed the exact one; the bound must not lie below it."""
    n = 4096
    w = np.full((n, 1), 0.1, np.float32)
    model = parse(f"g (float[1, {n}] u) => (float[1, 1] y) {{ y = MatMul(u, w) }}", w=w)
    part = intervals_of(model, u=(0.0, 1.0))["y"][1]
    (found,) = run(ir.to_proto(model), {"u": np.ones((1, n), np.float32)})
    exact = float(np.float32(0.1)) * n
    assert part.hi.item() > exact
    assert part.hi.item() >= found.item()


def test_unbounded_inputs_with_weights_of_one_sign() -> None:
    """ReLU gives [0, inf): with no positive weight the sum cannot exceed the bias."""
    w = -np.abs(np.random.default_rng(0).standard_normal((3, 2))).astype(np.float32)
    text = "g (float[1, 3] x) => (float[1, 2] y) { r = Relu(x)\n y = Gemm(r, w, b) }"
    part = bounds_of(text, w=w, b=np.asarray([0.0, -1.0], np.float32))
    assert (part.lo == -np.inf).all()
    assert part.hi.ravel()[0] == 0.0
    assert -1.0 <= part.hi.ravel()[1] <= -0.999


def test_zero_weights_do_not_read_the_unbounded() -> None:
    w = np.asarray([[0.0, 1.0], [0.0, 2.0]], np.float32)
    part = bounds_of("g (float[1, 2] x) => (float[1, 2] y) { y = MatMul(x, w) }", w=w)
    assert part.zero.tolist() == [[True, False]]
    assert part.hi[0, 1] == np.inf


def test_fixed_values_pass_through_a_block() -> None:
    """Zero filter, BatchNorm, activation: the constant is what the network computes there."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 2, 1, 1)).astype(np.float32)
    w[1] = 0
    stats = {k: rng.uniform(0.5, 1.5, 3).astype(np.float32) for k in ("s", "b", "m", "v")}
    text = """g (float[1, 2, 3, 3] x) => (float[1, 3, 3, 3] y) {
        a = Conv(x, w)
        n = BatchNormalization(a, s, b, m, v)
        y = Sigmoid(n)
    }"""
    part = bounds_of(text, w=w, **stats)
    model = parse(text, w=w, **stats)
    (found,) = run(ir.to_proto(model), {"x": rng.standard_normal((1, 2, 3, 3)).astype(np.float32)})
    assert part.fixed.ravel().tolist() == [False, True, False]
    np.testing.assert_allclose(found[0, 1], part.value.ravel()[1], rtol=1e-6)


def test_zero_scale_leaves_the_bias() -> None:
    stats = {"s": np.asarray([0, 1], np.float32), "b": np.asarray([-2, 3], np.float32)}
    stats |= {"m": np.ones(2, np.float32), "v": np.ones(2, np.float32)}
    text = "g (float[1, 2, 3] x) => (float[1, 2, 3] y) { y = BatchNormalization(x, s, b, m, v) }"
    part = bounds_of(text, **stats)
    assert part.value.ravel()[0] == -2
    assert not part.fixed.ravel()[1]


def test_padding_makes_a_constant_uneven() -> None:
    text = """g (float[1, 1, 3, 3] x) => (float[1, 1, 3, 3] y) {
        z = Mul(x, zero)
        o = Add(z, one)
        y = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(o, w)
    }"""
    arrays = {"zero": np.zeros(1, np.float32), "one": np.ones(1, np.float32)}
    part = bounds_of(text, w=np.ones((1, 1, 3, 3), np.float32), **arrays)
    assert not part.fixed.any()
    assert part.lo.item() == 0
    assert 9 <= part.hi.item() < 9.001
    inner = text.replace("pads=[1, 1, 1, 1]", "pads=[0, 0, 0, 0]").replace(
        "(float[1, 1, 3, 3] y)", "(float[1, 1, 1, 1] y)"
    )
    part = bounds_of(inner, w=np.ones((1, 1, 3, 3), np.float32), **arrays)
    assert part.value.item() == 9


def test_attention_over_equal_values_is_that_value() -> None:
    """Shares of one: if the value is 3 at every position, so is the mixture."""
    text = """g (float[1, 4, 4] s, float[1, 4, 2] x) => (float[1, 4, 2] y) {
        p = Softmax<axis = -1>(s)
        v = Mul(x, gate)
        w = Add(v, bias)
        y = MatMul(p, w)
    }"""
    part = bounds_of(text, gate=np.asarray([0, 1], np.float32), bias=np.asarray([3, 3], np.float32))
    assert part.value.ravel()[0] == 3
    assert not part.fixed.ravel()[1]


def test_infinite_constants_spoil_zeros() -> None:
    """Zero times infinity is NaN: nothing is concluded from a zero that meets an infinite constant."""
    text = """g (float[1, 2] x) => (float[1, 2] y) {
        m = Add(x, mask)
        y = Mul(m, gate)
    }"""
    gate = np.zeros(2, np.float32)
    assert not bounds_of(text, gate=gate, mask=np.asarray([0, -np.inf], np.float32)).zero.any()
    assert bounds_of(text, gate=gate, mask=np.asarray([0, -1e9], np.float32)).zero.all()


def test_loops_are_unbounded() -> None:
    """What a loop carries depends on what its body makes later."""
    text = """g (float[2] x) => (float[2] y) {
        n = Constant<value = int64 {3}>()
        c = Constant<value = bool {1}>()
        r = Relu(x)
        y = Loop(n, c, r) <body = b (int64 i, bool go, float[2] s) => (bool on, float[2] t) {
            on = Identity(go)
            one = Constant<value = float {1.0}>()
            t = Sub(s, one)
        }>
    }"""
    part = bounds_of(text)
    assert (part.lo == -np.inf).all()


def test_a_rule_of_ones_own() -> None:
    text = "g (float[1, 2] x) => (float[1, 2] y) { a = local.Gate(x)\n y = Neg(a) }"
    graphprune.rules.register("local::Gate", "S* -> S*")
    assert bounds_of(text).lo.item() == -np.inf

    @rule("local::Gate")
    def gate(site: Site) -> list[Bounds | None]:
        return [between(site.rank(), 0.0, 1.0)]

    assert "local::Gate" in registered()
    part = bounds_of(text)
    assert (part.lo.item(), part.hi.item()) == (-1, 0)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"z": (0, 1)}, "no input 'z'"),
        ({"x": (1, 0)}, "in order"),
        ({"x": (0, float("inf"))}, "finite"),
        ({"x": (float("nan"), 1)}, "finite"),
    ],
)
def test_bad_ranges(ranges: dict[str, tuple[float, float]], message: str) -> None:
    model = parse("g (float[1, 2] x) => (float[1, 2] y) { y = Relu(x) }")
    with pytest.raises(OptionError, match=message):
        intervals_of(model, **ranges)
