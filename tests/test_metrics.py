"""Metrics against their definitions written out, and outputs gathered batch by batch against one run."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.calibration import Calibration, load_calibration, memory
from graphprune.choice.metrics import METRICS, evaluate, find_metric
from graphprune.errors import GraphPruneError, MetricError, ModelError, OptionError
from tests.twins import parse, twin

Array = npt.NDArray[Any]
TOP1, AGREEMENT, COSINE = find_metric("top1"), find_metric("agreement"), find_metric("cosine")


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# -- top1 ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(samples=st.integers(1, 30), classes=st.integers(2, 6), seed=st.integers(0, 99))
def test_top1_counts(samples: int, classes: int, seed: int) -> None:
    scores = normal(samples, classes, seed=seed)
    labels = np.random.default_rng(seed).integers(0, classes, samples)
    right = sum(
        max(range(classes), key=lambda c: row[c]) == label for row, label in zip(scores, labels, strict=True)
    )
    assert TOP1({"out": scores}, {}, labels) == pytest.approx(right / samples)
    # What else is put out does not count; nor does the type of the labels, nor an axis of one.
    assert TOP1({"out": scores, "more": -scores}, {}, labels[:, None].astype(np.uint8)) == right / samples
    assert TOP1({"out": scores[:, :, None, None]}, {}, labels.astype(np.float32)) == right / samples


def test_top1_of_pixels_and_tokens() -> None:
    pixels, tokens = normal(2, 5, 3, 4), normal(2, 3, 5)
    assert TOP1({"o": pixels}, {}, pixels.argmax(1)) == 1
    assert TOP1({"o": tokens}, {}, tokens.argmax(-1)) == 1
    labels = tokens.argmax(-1)
    labels[0] = (labels[0] + 1) % 5
    assert TOP1({"o": tokens}, {}, labels) == 0.5
    labels[0] = -100  # unknown
    assert TOP1({"o": tokens}, {}, labels) == 1


def test_top1_of_classes() -> None:
    """Some networks put out the class itself."""
    assert TOP1({"label": np.array([1, 2, 0, 2])}, {}, np.array([1, 2, 1, 2])) == 0.75


def test_nan_is_never_right() -> None:
    scores = np.eye(4, dtype=np.float32)
    scores[0, 0] = np.nan  # where argmax would look
    assert TOP1({"o": scores}, {}, np.arange(4)) == 0.75
    assert AGREEMENT({"o": scores}, {"o": np.eye(4)}, None) == 0.75
    assert COSINE({"o": scores}, {"o": np.eye(4)}, None) == pytest.approx((3 - 1) / 4)


WRONG_LABELS: dict[str, tuple[Any, Any, str]] = {
    "none": (normal(3, 4), None, "'top1' needs labels"),
    "too high": (normal(3, 4), [1, 2, 4], "labels reach 4, but the output 'o' has classes 0 to 3"),
    "unknown": (normal(3, 4), [-1, -1, -1], "all are negative"),
    "real": (normal(3, 4), [0.5, 1, 2], "class numbers, these are float64"),
    "words": (normal(3, 4), ["a", "b", "c"], "class numbers, these are <U1"),
    "shape": (normal(3, 4), [[1, 2], [1, 2], [1, 2]], r"shape \[3, 2\] do not fit the output 'o' \[3, 4\]"),
    "one score": (normal(3, 1), [0, 1, 1], "one score for a sample"),
}


@pytest.mark.parametrize("case", WRONG_LABELS)
def test_wrong_labels(case: str) -> None:
    scores, labels, match = WRONG_LABELS[case]
    with pytest.raises(MetricError, match=match):
        TOP1({"o": scores}, {}, None if labels is None else np.array(labels))


# -- beside the original --------------------------------------------------------------------------------------------


def test_agreement() -> None:
    a, b = normal(50, 5), normal(50, 5, seed=1)
    expected = np.mean([x.argmax() == y.argmax() for x, y in zip(a, b, strict=True)])
    assert 0 < expected < 1
    assert AGREEMENT({"o": a}, {"o": b}, None) == pytest.approx(expected)
    assert AGREEMENT({"o": a}, {"o": a}, None) == 1
    maps, others = normal(2, 5, 6, 6), normal(2, 5, 6, 6, seed=1)
    assert AGREEMENT({"o": maps}, {"o": others}, None) == np.mean(maps.argmax(1) == others.argmax(1))
    classes = np.array([1, 2, 3, 4])
    assert AGREEMENT({"o": classes}, {"o": classes // 2 * 2}, None) == 0.5


@settings(deadline=None, max_examples=50)
@given(
    samples=st.integers(1, 6), width=st.integers(1, 9), seed=st.integers(0, 99), power=st.integers(-100, 100)
)
def test_cosine(samples: int, width: int, seed: int, power: int) -> None:
    a, b = normal(samples, width, 2, seed=seed), normal(samples, width, 2, seed=seed + 1)
    each = [
        np.dot(x.ravel(), y.ravel()) / np.sqrt(np.dot(x.ravel(), x.ravel()) * np.dot(y.ravel(), y.ravel()))
        for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True)
    ]
    assert COSINE({"o": a}, {"o": b}, None) == pytest.approx(np.mean(each), abs=1e-9)
    # Scale does not matter, be it beyond the squares that float64 can hold.
    scaled = a.astype(np.float64) * 10.0 ** (3 * power)
    assert COSINE({"o": scaled}, {"o": b}, None) == pytest.approx(np.mean(each), abs=1e-9)
    assert COSINE({"o": a}, {"o": a}, None) == pytest.approx(1)
    assert COSINE({"o": a}, {"o": -a}, None) == pytest.approx(-1)


def test_cosine_of_zeros_and_of_several_outputs() -> None:
    zero, one = np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)
    assert COSINE({"o": zero}, {"o": zero}, None) == 1
    assert COSINE({"o": zero}, {"o": one}, None) == 0
    both = {"o": one, "p": one, "count": np.array([3])}
    assert COSINE(both, {"o": one, "p": -one, "count": np.array([4])}, None) == pytest.approx(0)
    assert COSINE({"count": np.array([3])}, {"count": np.array([3])}, None) == 1


def test_samples_of_different_shapes() -> None:
    mixed, other = np.empty(2, object), np.empty(2, object)
    mixed[:] = [normal(3, 4), normal(5, 4)]
    other[:] = [mixed[0], -mixed[1]]
    assert COSINE({"o": mixed}, {"o": other}, None) == pytest.approx(0)
    assert AGREEMENT({"o": mixed}, {"o": other}, None) == pytest.approx(3 / 8)


@pytest.mark.parametrize("metric", [AGREEMENT, COSINE], ids=lambda metric: metric.name)
def test_outputs_that_cannot_be_compared(metric: Any) -> None:
    with pytest.raises(MetricError, match=r"'o' is \[3, 4\], that of the original \[3, 5\]"):
        metric({"o": normal(3, 4)}, {"o": normal(3, 5)}, None)
    with pytest.raises(MetricError, match="that of the original nothing"):
        metric({"o": normal(3, 4)}, {}, None)
    with pytest.raises(MetricError, match="no samples"):
        metric({"o": normal(0, 4)}, {"o": normal(0, 4)}, None)
    with pytest.raises(MetricError, match=r"no output|an output"):
        metric({}, {}, None)


def test_agreement_needs_classes() -> None:
    with pytest.raises(MetricError, match=r"one score for a sample.*cosine"):
        AGREEMENT({"o": normal(3, 1)}, {"o": normal(3, 1)}, None)


# -- functions of users -----------------------------------------------------------------------------------------------

OWN = """
import helper
calls = []

def half(outputs, reference, labels):
    calls.append((sorted(outputs), sorted(reference), labels))
    return helper.HALF

def broken(outputs, reference, labels):
    raise KeyError("logits")

def words(outputs, reference, labels):
    return "good"

def nothing(outputs, reference, labels):
    pass

def nan(outputs, reference, labels):
    return float("nan")

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_metrics.py").write_text(OWN)
    (tmp_path / "helper.py").write_text("import numpy\nHALF = numpy.float32(0.5)\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    for name in ("my_metrics", "helper", "raises", "leaves"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_own_function(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = list(sys.path)
    metric = find_metric("my_metrics:half")
    assert sys.path == path
    labels = np.arange(3)
    assert metric({"o": normal(3, 2)}, {"o": normal(3, 2)}, labels) == 0.5
    assert not metric.needs_labels
    assert sys.modules["my_metrics"].calls == [(["o"], ["o"], labels)]
    assert pickle.loads(pickle.dumps(metric))({}, {}, None) == 0.5
    monkeypatch.chdir("/")
    monkeypatch.delitem(sys.modules, "helper")
    by_file = find_metric(f"{own / 'my_metrics.py'}:half")
    assert by_file({}, {}, None) == 0.5
    assert by_file.name.endswith("my_metrics.py:half")


IMPOSSIBLE = {
    "top2": r"unknown metric 'top2'; there are top1, agreement, cosine, or your own as module:function",
    ":half": "not of the form module:function",
    "my_metrics:": "not of the form module:function",
    "no_such_module:f": "'no_such_module:f' cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
    "none.py:f": "cannot be imported: FileNotFoundError: no file 'none.py'",
    "raises:f": "'raises:f' cannot be imported: ZeroDivisionError: division by zero",
    "raises.py:f": "cannot be imported: ZeroDivisionError",
    "leaves:f": "cannot be imported: SystemExit: 3",
    "my_metrics:haf": "there is no 'haf' in 'my_metrics'",
    "my_metrics:number": "not callable is 'number' in 'my_metrics'",
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_imported(name: str, own: Path) -> None:
    with pytest.raises(OptionError, match=IMPOSSIBLE[name]):
        find_metric(name)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("broken", "'my_metrics:broken' raised KeyError: 'logits'"),
        ("words", "must return a number, it returned str 'good'"),
        ("nothing", "must return a number, it returned NoneType"),
        ("nan", "'my_metrics:nan' returned nan"),
    ],
)
def test_functions_that_fail(name: str, match: str, own: Path) -> None:
    metric = find_metric(f"my_metrics:{name}")
    with pytest.raises(MetricError, match=match) as caught:
        metric({}, {}, None)
    assert isinstance(caught.value, GraphPruneError)


def test_metrics_say_what_they_are() -> None:
    for name in METRICS:
        assert find_metric(name).name == name
    assert [find_metric(name).needs_labels for name in METRICS] == [True, False, False]


# -- outputs of a model -----------------------------------------------------------------------------------------------


def model_bytes(text: str, **initializers: Array) -> bytes:
    return bytes(ir.to_proto(parse(text, **initializers)).SerializeToString())


NET = """g (float[N, 3] x, float scale) => (float[N, 2] out, float[N, 3] twice, float all) {
    out = MatMul(x, w)
    twice = Add(x, x)
    sum = ReduceSum<keepdims = 0>(x)
    all = Mul(sum, scale)
}"""


def test_evaluate(tmp_path: Path) -> None:
    x, w = normal(10, 3), normal(3, 2)
    data = model_bytes(NET, w=w)
    calibration = load_calibration({"x": x, "scale": np.float32(2)}, twin(NET, w=w))
    seen: list[tuple[int, int]] = []
    outputs = evaluate(data, calibration, batch=4, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert list(outputs) == ["out", "twice", "all"]
    np.testing.assert_allclose(outputs["out"], x @ w, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs["twice"], 2 * x)
    # One number for each batch.
    sums = [2 * x[:4].sum(), 2 * x[4:8].sum(), 2 * x[8:].sum()]
    np.testing.assert_allclose(outputs["all"], sums, rtol=1e-5)
    (tmp_path / "net.onnx").write_bytes(data)
    for model in (tmp_path / "net.onnx", str(tmp_path / "net.onnx")):
        again = evaluate(model, calibration, batch=4, threads=1)
        for name, array in outputs.items():
            np.testing.assert_allclose(again[name], array, rtol=1e-5, atol=1e-6)
    assert COSINE(outputs, outputs, None) == pytest.approx(1)


def test_evaluate_fixed_batch() -> None:
    text = "g (float[4, 3] x) => (float[4, 3] out) { out = Relu(x) }"
    x = normal(8, 3)
    outputs = evaluate(model_bytes(text), load_calibration(x, twin(text)), batch=3)
    np.testing.assert_array_equal(outputs["out"], np.maximum(x, 0))


def test_evaluate_samples_of_different_lengths() -> None:
    text = """g (float[N, L, 2] x) => (float[N, L, 2] out, float[N, 2] sum) {
        out = Neg(x)
        axes = Constant<value = int64[1] {1}>()
        sum = ReduceSum<keepdims = 0>(x, axes)
    }"""
    feeds = [normal(2, 5, 2), normal(3, 4, 2)]
    outputs = evaluate(model_bytes(text), load_calibration(feeds, twin(text)), batch=2)
    assert outputs["out"].dtype == object
    assert [sample.shape for sample in outputs["out"]] == [(5, 2)] * 2 + [(4, 2)] * 3
    np.testing.assert_array_equal(outputs["out"][3], -feeds[1][1])
    assert outputs["sum"].shape == (5, 2)
    assert COSINE(outputs, outputs, None) == pytest.approx(1)


def test_evaluate_time_first() -> None:
    """Samples lie along axis 1 of what many text recognisers put out."""
    text = "g (float[N, T, 2] x) => (float[T, N, 2] out) { out = Transpose<perm = [1, 0, 2]>(x) }"
    x = normal(5, 4, 2)
    outputs = evaluate(model_bytes(text), load_calibration(x, twin(text)), batch=2)
    np.testing.assert_array_equal(outputs["out"], x)


def test_evaluate_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(3, 2)
    calibration = Calibration({"x": normal(9, 3)}, {"scale": np.array(1, np.float32)})
    with pytest.raises(ModelError, match="cannot load the model"):
        evaluate(b"no model", calibration)
    with pytest.raises(ModelError, match=r"cannot run the model: .*scale"):
        evaluate(model_bytes(NET, w=w), Calibration({"x": normal(9, 3)}, {}))
    sequence = "g (float[N, 3] x) => (seq(float[N, 3]) out) { out = SequenceConstruct(x) }"
    with pytest.raises(ModelError, match="output 'out' is a list"):
        evaluate(model_bytes(sequence), Calibration({"x": normal(9, 3)}, {}))
    monkeypatch.setattr(memory, "available", lambda: 300)
    with pytest.raises(OptionError, match=r"puts out for all calibration inputs takes .* take fewer samples"):
        evaluate(model_bytes(NET, w=w), calibration, batch=3)
