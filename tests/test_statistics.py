"""Statistics of what contractions read, against NumPy on exposed activations."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_ir.passes.common import InlinePass

from graphprune.calibration import Calibration
from graphprune.kernels.gram import GramAccumulator
from graphprune.layers import statistics
from graphprune.layers.statistics import Reader, find_readers, gather
from graphprune.model import as_ir
from graphprune.network import Network
from graphprune.pipeline import analyze_ir

from .activations import Array, activations, calibration, patches
from .patterns import PATTERNS, Built, Pattern
from .patterns.builder import Builder


def gathered(
    network: Network, inputs: Calibration, outputs: int = 0, **options: int
) -> list[tuple[Reader, list[GramAccumulator]]]:
    assert not outputs
    return list(
        gather(
            network,
            find_readers(network),
            inputs,
            GramAccumulator,
            lambda d: 8 * d * d,
            seed=options.get("seed", 0),
        )
    )


def small(samples: int = 20) -> tuple[Network, Built]:
    """A convolution in two groups, one of 1 x 1, and a Gemm behind a Flatten."""
    builder = Builder("net", 18)
    x = builder.cbr("a", builder.input("x", (samples, 3, 6, 6)), 3, 8)
    x = builder.relu(builder.conv("b", x, 8, 6, group=2, stride=2))
    x = builder.relu(builder.conv("c", x, 6, 4, k=1))
    builder.output(builder.gemm("d", builder.op("Flatten", x, axis=1), 36, 3))
    built = builder.finish()
    built.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    built.model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    return analyze_ir(as_ir(built.model)[0]), built


def rows_of(values: dict[str, Array], reader: Reader) -> Array:
    """What the readers of :func:`small` see, ``[g, n, d]``, one position at a time."""
    x = values[reader.contraction.input.name].astype(np.float64)
    if reader.contraction.op.kind == "Gemm":
        return x[None]
    groups = reader.size[0]
    attributes = reader.contraction.op.attributes
    kernel = (reader.contraction.weight_tensor.shape or ())[2:]
    parts = np.split(x, groups, axis=1)
    return np.array([patches(p, kernel, attributes["strides"], attributes["pads"]) for p in parts])


def test_gram_matrices_are_numpys() -> None:
    network, built = small()
    values = activations(built.model, built.feeds)
    found = gathered(network, calibration(built.feeds))
    assert [reader.contraction.output.name for reader, _ in found] == ["a", "b", "c", "d"]
    for reader, grams in found:
        for gram, rows in zip(grams, rows_of(values, reader), strict=True):
            assert gram.count == len(rows)
            np.testing.assert_allclose(gram.xx, rows.T @ rows, rtol=1e-4, atol=1e-5 * len(rows))
            np.testing.assert_allclose(gram.x, rows.sum(axis=0), rtol=1e-4, atol=1e-5 * len(rows))
            np.testing.assert_allclose(gram.covariance(), np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-5)


def test_passes_over_the_inputs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network, built = small()
    at_once = gathered(network, calibration(built.feeds))
    monkeypatch.setattr(statistics, "MEMORY_LIMIT", 0)
    steps: list[tuple[int, int]] = []
    apart = list(
        gather(
            network,
            find_readers(network),
            calibration(built.feeds),
            GramAccumulator,
            lambda d: 8 * d * d,
            progress=lambda done, total: steps.append((done, total)),
        )
    )
    for (one, first), (two, second) in zip(at_once, apart, strict=True):
        assert one.contraction.op is two.contraction.op
        for a, b in zip(first, second, strict=True):
            np.testing.assert_allclose(a.xx, b.xx, rtol=1e-6)
    assert steps == [(i, 8) for i in range(9)]  # four passes over two batches


def test_rows_are_chosen_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    network, built = small(samples=32)
    inputs = calibration(built.feeds)
    everything = gathered(network, inputs)
    monkeypatch.setattr(statistics, "LEAST_ROWS", 100)
    monkeypatch.setattr(statistics, "ROWS_PER_FEATURE", 4)
    some, again, other = (gathered(network, inputs, seed=seed) for seed in (0, 0, 1))
    for number, (reader, grams) in enumerate(some):
        rows = rows_of(activations(built.model, built.feeds), reader)
        limit = max(100, 4 * reader.size[1])
        assert all(gram.count == min(limit, rows.shape[1]) for gram in grams)
        for gram, same, all_rows in zip(grams, again[number][1], everything[number][1], strict=True):
            assert np.array_equal(gram.xx, same.xx)
            deviation = np.sqrt(np.diagonal(all_rows.covariance()))
            mean = all_rows.x / all_rows.count
            assert (abs(gram.x / gram.count - mean) < 6 * deviation / np.sqrt(gram.count) + 1e-6).all()
        if rows.shape[1] > limit:
            assert not np.array_equal(grams[0].xx, other[number][1][0].xx)


def test_readers_are_independent_of_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    network, built = small()
    inputs = calibration(built.feeds)
    found = gathered(network, inputs)
    monkeypatch.setattr(statistics, "BATCH", 3)
    for (_, first), (_, second) in zip(found, gathered(network, inputs), strict=True):
        for a, b in zip(first, second, strict=True):
            assert a.count == b.count
            np.testing.assert_allclose(a.xx, b.xx, rtol=1e-4, atol=1e-5 * a.count)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_readers_of_all_patterns(pattern: Pattern) -> None:
    """Labels of features are those of the input's elements; means are those of exposed activations."""
    built = pattern.build()
    source = as_ir(built.model)[0]
    InlinePass()(source)  # statistics are taken inside of functions
    network = analyze_ir(source, pattern.input_shapes or None)
    values = activations(built.model, built.feeds)
    for reader, grams in gathered(network, Calibration({}, built.feeds)):
        contraction = reader.contraction
        assert reader.matrices.shape[:2] == reader.size == (len(grams), grams[0].features)
        name = statistics._input_name(reader)
        weight_shape = contraction.weight_tensor.shape or ()
        if name in values:  # an input of a subgraph's node is exposed too; a fill that was split is not
            rows = contraction.form.rows(values[name], weight_shape).astype(np.float64)
            assert grams[0].count == rows.shape[1]
            for gram, seen in zip(grams, rows, strict=True):
                scale = abs(seen).max(initial=1.0)
                np.testing.assert_allclose(gram.x / gram.count, seen.mean(axis=0), atol=1e-5 * scale)
        borne = [_seen(reader, labels) for labels in network.analysis.labellings(contraction.input)]
        for labels in reader.labels:
            assert any(np.array_equal(labels, other) for other in borne)


def _seen(reader: Reader, labels: Array) -> Array:
    """Which label each feature bears by the labels of the input's elements, 0 where that varies."""
    shape = reader.contraction.input.shape or ()
    rows = reader.contraction.form.rows(
        np.broadcast_to(labels, shape).astype(np.float32), reader.contraction.weight_tensor.shape or ()
    )
    least = np.where(rows == 0, np.inf, rows).min(axis=1)
    most = rows.max(axis=1)
    return np.where(least == most, most, 0).astype(np.int32)
