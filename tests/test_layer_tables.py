"""Tables of the times of single layers. No time is asserted: the times are made up."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.cost import counted_ops
from graphprune.costs import LatencyTable, Widths
from graphprune.costs.cache import VARIABLE, Cache, default_folder, machine
from graphprune.costs.latency import channel_block, measure_layer
from graphprune.costs.layers import Layer, layer_of, points_of
from graphprune.model import as_ir
from graphprune.pipeline import analyze_ir
from tests.patterns import PATTERNS, Pattern
from tests.timed_networks import Measurer, convs, first_layer

# -- layers -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.sampled_from([1, 4, 8, 16]), st.booleans())
def test_points_lie_within_and_hold_the_original(size: int, block: int, ragged: bool) -> None:
    aligned, others = points_of(size, (1.0, 0.75, 0.5, 0.25, 0.125), block, ragged)
    assert size in aligned + others
    assert all(0 < n <= size for n in aligned + others)
    assert all(n % block == 0 for n in aligned)
    assert all(n % block for n in others)
    assert list(aligned) == sorted(set(aligned))
    assert list(others) == sorted(set(others))
    if ragged and block > 1 and size >= block:
        assert others


@functools.cache
def layers_of(pattern: Pattern) -> list[Layer]:
    network = analyze_ir(as_ir(pattern.build().model)[0], pattern.input_shapes)
    widths = Widths(network)
    found = [layer_of(op, widths, block=4, round_to=1) for op in counted_ops(network.analysis)]
    return [layer for layer in found if layer is not None and layer.cuts]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_layers_run_alone_at_every_width(pattern: Pattern) -> None:
    """Each is a valid model, and its results have the sizes that the signature says."""
    for layer in layers_of(pattern):
        corners = [tuple(cut.points[i] for cut in layer.cuts) for i in (0, -1)]
        model, feeds = layer.model(corners)
        onnx.checker.check_model(model)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for name, result in zip(
            [o.name for o in session.get_outputs()], session.run(None, feeds), strict=True
        ):
            number, slot = (int(part) for part in name[1:].split("_"))
            sizes = {**layer.sizes, **{c.factor: n for c, n in zip(layer.cuts, corners[number], strict=True)}}
            for view in layer.flow.signature.views:
                if view.is_output and view.slot == slot:
                    for axis, size in zip(view.axes, result.shape, strict=True):
                        if axis.factors is not None:
                            assert size == np.prod([sizes[name] for name in axis.factors])


def test_most_patterns_have_layers() -> None:
    without = [pattern.name for pattern in PATTERNS if not layers_of(pattern)]
    assert len(without) < len(PATTERNS) / 8, without


def test_a_layer_is_measured_at_every_point() -> None:
    network = convs()
    widths = Widths(network)
    layer = next(
        layer
        for op in counted_ops(network.analysis)
        if (layer := layer_of(op, widths, block=8, round_to=1)) is not None and len(layer.cuts) == 2
    )
    points = [(n, m) for n in layer.cuts[0].points[:2] for m in layer.cuts[1].points[:3]]
    times = measure_layer(layer, points, 1)
    assert len(times) == 6
    assert all(t > 0 for t in times)


def test_the_block_of_channels_is_found_and_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    block = channel_block(1, cache)
    assert block in (1, 4, 8, 16, 32)
    cache.put({"what": "channel block", "machine": machine()}, 2 * block)
    assert channel_block(1, cache) == 2 * block


# -- the table --------------------------------------------------------------------------------------------------


def test_a_layer_is_measured_once(tmp_path: Path) -> None:
    measurer = Measurer()
    layer = first_layer(convs())
    table = LatencyTable(Cache(tmp_path), measurer=measurer)
    first = table.times(layer)
    assert first.shape == layer.shape
    assert measurer.calls == 1
    np.testing.assert_array_equal(table.times(first_layer(convs())), first)
    assert measurer.calls == 1
    again = LatencyTable(Cache(tmp_path), measurer=measurer)
    np.testing.assert_array_equal(again.times(layer), first)
    assert measurer.calls == 1  # from disk
    LatencyTable(Cache(tmp_path), threads=3, measurer=measurer).times(layer)
    assert measurer.calls == 2  # other threads, other times


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": 1, "value": [1]}', b"\xff\xfe"])
def test_a_damaged_entry_is_measured_anew(tmp_path: Path, text: str | bytes) -> None:
    measurer = Measurer()
    layer = first_layer(convs())
    expected = LatencyTable(Cache(tmp_path), measurer=measurer).times(layer)
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(RuntimeWarning, match="measured anew"):
        found = LatencyTable(Cache(tmp_path), measurer=measurer).times(layer)
    np.testing.assert_array_equal(found, expected)
    assert measurer.calls == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LatencyTable(Cache(tmp_path), measurer=measurer).times(layer)
    assert measurer.calls == 2  # it was mended


@pytest.mark.parametrize("value", [[1.0], "no times", [[0.0] * 5] * 5, None, [[float("nan")] * 5] * 5])
def test_an_entry_that_does_not_fit_is_measured_anew(tmp_path: Path, value: object) -> None:
    measurer = Measurer()
    layer = first_layer(convs())
    LatencyTable(Cache(tmp_path), measurer=measurer).times(layer)
    (path,) = tmp_path.rglob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "value": value}))
    times = LatencyTable(Cache(tmp_path), measurer=measurer).times(layer)
    assert measurer.calls == 2
    assert (times > 0).all()


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.warns(RuntimeWarning, match=f"set {VARIABLE}"):
        Cache(file).put({"a": 1}, 2)
    assert file.read_text() == "in the way"


def test_entries_are_whole_or_absent(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get({"a": (1, 2)}) is None
    cache.put({"a": (1, 2)}, [1.5])
    cache.put({"a": (1, 2)}, [2.5])
    assert cache.get({"a": [1, 2]}) == [2.5]
    assert cache.get({"a": [2, 1]}) is None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]
    with pytest.raises(TypeError):
        cache.put({"b": 1}, object())
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_the_folder_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert default_folder() == tmp_path / "graphprune"
