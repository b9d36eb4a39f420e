"""Repair without data: exact for a multiple of a kept channel and for a constant one; means against samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import graphprune
from graphprune.axes.analysis import Analysis
from graphprune.graph.evaluate import evaluate_constant
from graphprune.graph.twin import build_twin
from graphprune.model import copy
from graphprune.plan import Cut, Plan
from graphprune.repair.datafree import DataFreeReport
from graphprune.repair.moments import Moments, Signal
from tests.residual import run
from tests.twins import parse

Array = npt.NDArray[Any]
MODELS = Path(__file__).parents[1] / "models"
#: Channels of the group that is cut; the last is the one that goes.
SIZE = 6
GONE = SIZE - 1


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def statistics(*, multiple: float | None = None, constant: float | None = None) -> dict[str, Array]:
    """A BatchNormalization of `SIZE` channels; the last repeats the second ``multiple`` times, or is constant."""
    found = {"gamma": 0.5 + np.abs(normal(SIZE)), "beta": normal(SIZE, seed=1)}
    found |= {"mean": normal(SIZE, seed=2), "var": 0.5 + np.abs(normal(SIZE, seed=3))}
    if multiple is not None:
        for name in found:
            found[name][GONE] = found[name][1]
        found["gamma"][GONE] *= multiple
        found["beta"][GONE] *= multiple
    if constant is not None:
        found["gamma"][GONE], found["beta"][GONE] = 0.0, constant
    return found


def producer(shape: tuple[int, ...], *, multiple: bool = False, axis: int = 0) -> Array:
    """A weight whose last filter is its second one, where asked for."""
    weight = normal(*shape, seed=4)
    filters = np.moveaxis(weight, axis, 0)
    if multiple:
        filters[GONE] = filters[1]
    return weight


def prune_last(model: ir.Model, **options: Any) -> tuple[ir.Model, graphprune.Report]:
    """Remove position `GONE` of the one free group of `SIZE`."""
    groups = [g for g in graphprune.analyze(model).groups if not g.frozen and g.size == SIZE]
    assert len(groups) == 1
    plan = Plan([Cut(groups[0].name, SIZE, (GONE,))])
    pruned, report = graphprune.prune(copy(model), plan=plan, repair=True, **options)
    assert isinstance(report.repaired, DataFreeReport)
    return pruned, report


def outputs(model: ir.Model, x: Array) -> Array:
    return run(copy(model), {"x": x})["y"]


def close(a: Array, b: Array) -> bool:
    return bool(np.abs(a - b).max() < 1e-4 * np.abs(a).max())


CONV = """agraph (float[N, 3, 7, 7] x) => (float[N, 4, 7, 7] y) {{
    a = Conv <pads = [1, 1, 1, 1]> (x, w)
    b = BatchNormalization (a, gamma, beta, mean, var)
    c = {function} (b)
    y = Conv <pads = [{pad}, {pad}, {pad}, {pad}]> (c, v, bias)
}}"""


def conv(function: str = "Relu", kernel: int = 3, **options: Any) -> ir.Model:
    arrays = statistics(**options)
    arrays["w"] = producer((SIZE, 3, 3, 3), multiple="multiple" in options)
    arrays |= {"v": normal(4, SIZE, kernel, kernel), "bias": normal(4)}
    return parse(CONV.format(function=function, pad=kernel // 2), **arrays)


GEMM = """agraph (float[N, 5] x) => (float[N, 4] y) {
    a = Gemm <transB = 1> (x, w)
    b = BatchNormalization (a, gamma, beta, mean, var)
    c = Relu (b)
    y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (c, v, bias)
}"""
MATMUL = """agraph (float[N, 5] x) => (float[N, 4] y) {
    a = MatMul (x, w)
    b = BatchNormalization (a, gamma, beta, mean, var)
    c = Relu (b)
    d = MatMul (c, v)
    y = Add (bias, d)
}"""
BARE = MATMUL.replace("d = MatMul (c, v)\n    y = Add (bias, d)", "y = MatMul (c, v)")


def dense(text: str, **options: Any) -> ir.Model:
    arrays = statistics(**options)
    transposed = text == GEMM
    multiple = "multiple" in options
    arrays["w"] = (
        producer((SIZE, 5), multiple=multiple)
        if transposed
        else producer((5, SIZE), multiple=multiple, axis=1)
    )
    arrays["v"] = normal(4, SIZE) if transposed else normal(SIZE, 4)
    if text != BARE:
        arrays["bias"] = normal(4)
    return parse(text, **arrays)


IMAGES = normal(4, 3, 7, 7, seed=9)
ROWS = normal(16, 5, seed=9)


@pytest.mark.parametrize("multiple", [2.0, 0.3])
def test_a_positive_multiple_is_merged_without_loss(multiple: float) -> None:
    model = conv(multiple=multiple)
    pruned, report = prune_last(model)
    assert close(outputs(model, IMAGES), outputs(pruned, IMAGES))
    assert report.repaired is not None
    assert len(report.repaired.refitted) == 1


@pytest.mark.parametrize("text", [GEMM, MATMUL, BARE], ids=["gemm", "matmul", "bare"])
def test_so_it_is_by_matrix_products(text: str) -> None:
    model = dense(text, multiple=1.7)
    pruned, _ = prune_last(model)
    assert close(outputs(model, ROWS), outputs(pruned, ROWS))


def test_without_a_repair_both_would_lose_much() -> None:
    """What the tests above and below compare is no noise."""
    for model in (conv(kernel=1, multiple=2.0), conv(kernel=1, constant=0.7)):
        group = next(g for g in graphprune.analyze(model).groups if not g.frozen and g.size == SIZE)
        cut = Plan([Cut(group.name, SIZE, (GONE,))])
        pruned, report = graphprune.prune(copy(model), plan=cut)
        assert report.repaired is None
        before, after = outputs(model, IMAGES), outputs(pruned, IMAGES)
        assert np.abs(before - after).max() > 5e-3 * np.abs(before).max()


@pytest.mark.parametrize("function", ["Relu", "HardSwish", "Sigmoid", "Elu"])
def test_a_constant_channel_goes_into_the_bias(function: str) -> None:
    model = conv(function, kernel=1, constant=0.7)
    pruned, report = prune_last(model)
    assert close(outputs(model, IMAGES), outputs(pruned, IMAGES))
    assert isinstance(report.repaired, DataFreeReport)
    assert (report.repaired.removed, report.repaired.corrected) == (1, 1)


@pytest.mark.parametrize("text", [GEMM, MATMUL], ids=["gemm", "matmul"])
def test_so_it_does_in_matrix_products(text: str) -> None:
    model = dense(text, constant=0.7)
    pruned, _ = prune_last(model)
    assert close(outputs(model, ROWS), outputs(pruned, ROWS))


def test_at_a_padded_border_the_mean_over_positions_is_right() -> None:
    model = conv(kernel=3, constant=0.7)
    pruned, _ = prune_last(model)
    before, after = outputs(model, IMAGES), outputs(pruned, IMAGES)
    assert not close(before, after)  # the border itself cannot be
    assert close(before.mean(axis=(2, 3)), after.mean(axis=(2, 3)))


def test_a_multiple_that_is_no_function_of_the_other_is_merged_as_well_as_can_be() -> None:
    """A sigmoid of twice the input: nearer with a repair, but not equal."""
    model = conv("Sigmoid", kernel=1, multiple=2.0)
    pruned, _ = prune_last(model)
    group = next(g for g in graphprune.analyze(model).groups if not g.frozen and g.size == SIZE)
    sliced, _ = graphprune.prune(copy(model), plan=Plan([Cut(group.name, SIZE, (GONE,))]))
    before = outputs(model, IMAGES)
    assert (
        np.square(before - outputs(pruned, IMAGES)).mean()
        < 0.2 * np.square(before - outputs(sliced, IMAGES)).mean()
    )


# -- what is not known ----------------------------------------------------------------------------------------------


def test_where_nothing_is_known_nothing_changes() -> None:
    """No rule tells what a normalisation over space makes of a channel."""
    text = CONV.replace("c = {function} (b)", "c = LpNormalization <axis = 3> (b)").format(pad=1)
    arrays = statistics() | {"w": producer((SIZE, 3, 3, 3)), "v": normal(4, SIZE, 3, 3), "bias": normal(4)}
    pruned, report = prune_last(parse(text, **arrays))
    assert np.array_equal(weight(pruned, "v"), arrays["v"][:, :GONE])
    assert np.array_equal(weight(pruned, "bias"), arrays["bias"])
    assert isinstance(report.repaired, DataFreeReport)
    assert report.repaired.corrected == 0


def test_without_statistics_filters_are_merged_and_biases_left() -> None:
    """A BatchNormalization that was folded: a multiple of filter and bias is merged without loss all the same."""
    text = """agraph (float[N, 3, 7, 7] x) => (float[N, 4, 7, 7] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w, c)
        b = Relu (a)
        p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (b)
        y = Conv <pads = [1, 1, 1, 1]> (p, v, bias)
    }"""
    arrays = {"w": normal(SIZE, 3, 3, 3), "c": normal(SIZE), "v": normal(4, SIZE, 3, 3), "bias": normal(4)}
    arrays["w"][GONE], arrays["c"][GONE] = 1.5 * arrays["w"][0], 1.5 * arrays["c"][0]
    model = parse(text, **arrays)
    pruned, report = prune_last(model)
    assert close(outputs(model, IMAGES), outputs(pruned, IMAGES))
    assert np.array_equal(weight(pruned, "bias"), arrays["bias"])
    assert isinstance(report.repaired, DataFreeReport)
    assert report.repaired.corrected == 0


def test_a_shared_weight_stays_and_the_report_says_so() -> None:
    text = """agraph (float[N, 6] x) => (float[N, 6] y) {
        a = MatMul (x, w)
        b = BatchNormalization (a, gamma, beta, mean, var)
        c = Relu (b)
        d = MatMul (c, v)
        e = BatchNormalization (d, gamma, beta, mean, var)
        f = Relu (e)
        y = MatMul (f, u)
        z = MatMul (c, v)
    }""".replace("float[N, 6] y)", "float[N, 6] y, float[N, 6] z)")
    arrays = statistics() | {name: normal(SIZE, SIZE, seed=seed) for seed, name in enumerate("wvu")}
    model = parse(text, **arrays)
    groups = [g for g in graphprune.analyze(model).groups if not g.frozen]
    plan = Plan([Cut(groups[0].name, SIZE, (GONE,))])
    _, report = graphprune.prune(copy(model), plan=plan, repair=True)
    assert report.repaired is not None
    assert any(reason == "its weight is shared with another layer" for _, reason in report.repaired.skipped)
    assert any("shared with another layer" in note for note in report.notes)


def weight(model: ir.Model, name: str) -> Array:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


# -- expected means -------------------------------------------------------------------------------------------------


def signal_of(model: ir.Model, name: str) -> Signal:
    """What is known of a tensor."""
    analysis = Analysis(build_twin(model))
    moments = Moments(analysis, lambda op, slot: evaluate_constant(_operand(op.inputs, slot)))
    for op in analysis.graph.ops:
        moments.advance(op)
        for tensor in op.outputs:
            if tensor is not None and tensor.name == name:
                found = moments.of(tensor)
                assert found is not None
                return found
    raise AssertionError(name)


def _operand(tensors: Sequence[Any], slot: int) -> Any:
    return tensors[slot]


FUNCTIONS = {
    "relu": "y = Relu (b)",
    "leaky": "y = LeakyRelu <alpha = 0.2> (b)",
    "sigmoid": "y = Sigmoid (b)",
    "hardswish": "y = HardSwish (b)",
    "silu": "s = Sigmoid (b) y = Mul (b, s)",
    "relu6": "y = Clip (b, zero, six)",
    "hardswish by hand": "s = Add (b, three) t = Clip (s, zero, six) u = Mul (b, t) y = Div (u, six)",
    "gelu": "s = Div (b, root) t = Erf (s) u = Add (t, one) v = Mul (b, u) y = Mul (v, half)",
    "prelu": "y = PRelu (b, slopes)",
    "scaled": "s = Mul (b, slopes) y = Add (s, slopes)",
    "transposed": "s = Relu (b) y = Transpose <perm = [0, 2, 3, 1]> (s)",
    "padded": "y = Pad (b, pads)",
    "sum": "s = Relu (b) t = Relu (b2) y = Add (s, t)",
    "product": "s = Relu (b) t = Sigmoid (b2) y = Mul (s, t)",
    "concat": "s = Relu (b) y = Concat <axis = 1> (s, b2)",
    "depthwise": "s = Relu (b) y = Conv <group = 6> (s, depth)",
    "linear": "s = Relu (b) y = Conv (s, dense, slope)",
    "average": "s = Relu (b) y = GlobalAveragePool (s)",
    "mean": "s = Relu (b) y = ReduceMean <keepdims = 0> (s, space)",
    "flat": "s = Relu (b) y = Flatten (s)",
}
SCALARS = {"zero": 0.0, "one": 1.0, "three": 3.0, "six": 6.0, "half": 0.5, "root": 2**0.5}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_expected_means_and_variances_agree_with_samples(name: str) -> None:
    """Samples of independent Gaussians with the statistics that the BatchNormalization has stored, five errors wide."""
    rank = {"mean": "float[N, 6]", "flat": "float[N, 24]", "concat": "float[N, 12, 2, 2]"}
    rank |= {
        "average": "float[N, 6, 1, 1]",
        "padded": "float[N, 8, 2, 2]",
        "transposed": "float[N, 2, 2, 6]",
        "linear": "float[N, 3, 2, 2]",
    }
    text = f"""agraph (float[N, 6, 2, 2] x, float[N, 6, 2, 2] x2) => ({rank.get(name, "float[N, 6, 2, 2]")} y) {{
        b = BatchNormalization (x, gamma, beta, mean, var)
        b2 = BatchNormalization (x2, gamma, mean, beta, var)
        {FUNCTIONS[name]}
    }}"""
    arrays = statistics()
    arrays |= {key: np.array(value, np.float32) for key, value in SCALARS.items()}
    arrays |= {"slopes": normal(SIZE, 1, 1), "slope": normal(3), "depth": normal(SIZE, 1, 1, 1)}
    arrays |= {"dense": normal(3, SIZE, 1, 1), "pads": np.array([0, 1, 0, 0, 0, 1, 0, 0])}
    arrays |= {
        "halves": np.array([0, 2, 3, 2, 2]),
        "whole": np.array([0, 6, 2, 2]),
        "space": np.array([2, 3]),
    }
    used = {
        key: value for key, value in arrays.items() if key in text.replace(",", " ").replace(")", " ").split()
    }
    used |= {key: value for key, value in arrays.items() if f"({key}" in text or f", {key}" in text}
    model = parse(text, **used)
    signal = signal_of(model, "y")
    count = 40_000
    rng = np.random.default_rng(3)
    deviation, lift = np.sqrt(arrays["var"] + 1e-5), (1, SIZE, 1, 1)
    x = arrays["mean"].reshape(lift) + deviation.reshape(lift) * rng.standard_normal((count, SIZE, 2, 2))
    x2 = arrays["beta"].reshape(lift) + deviation.reshape(lift) * rng.standard_normal((count, SIZE, 2, 2))
    y = run(model, {"x": x.astype(np.float32), "x2": x2.astype(np.float32)})["y"]
    rows = np.moveaxis(y, signal.axis, -1).reshape(-1, y.shape[signal.axis])
    found = signal.moments
    assert found.known.all()
    error = 5 * rows.std(axis=0) / np.sqrt(count)
    assert (np.abs(found.mean[signal.channel] - rows.mean(axis=0)) <= error + 1e-4).all()
    if name not in ("average", "mean"):  # positions of one sample are taken to be alike, which these are not
        variance = rows.var(axis=0)
        assert np.allclose(np.diagonal(found.covariance)[signal.channel], variance, rtol=0.1, atol=1e-4)


# -- whole networks -------------------------------------------------------------------------------------------------


def test_the_digits_network_keeps_most_of_its_accuracy() -> None:
    """30 % of all channels, half of the arithmetic: 16 % right without a repair; a bound five points below what is."""
    with np.load(MODELS / "digits_test.npz") as archive:
        images, labels = archive["image"].astype(np.float32) / 16, archive["label"]

    def correct(model: ir.Model) -> float:
        return float((run(model, {"image": images})["logits"].argmax(axis=1) == labels).mean())

    plain, _ = graphprune.prune(MODELS / "digits.onnx", 0.3)
    pruned, report = graphprune.prune(MODELS / "digits.onnx", 0.3, repair=True)
    assert correct(plain) < 0.5
    assert correct(pruned) > 0.86
    assert isinstance(report.repaired, DataFreeReport)
    assert not report.repaired.skipped
    assert report.repaired.removed == report.repaired.corrected > 0
    assert any(note.startswith("repaired without inputs: ") for note in report.notes)
    assert report.to_dict()["repaired"]["refitted"][0]["error_before"] is None
