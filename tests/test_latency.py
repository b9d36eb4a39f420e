"""Latency tables and predictions. No time is asserted: clocks, kernels and layers' times are made up."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from graphprune.cost import counted_ops, mac_terms
from graphprune.costs import CostModel, LatencyCost, LatencyTable, Widths, compare, measure
from graphprune.costs.attribution import name_nodes, stems_of
from graphprune.costs.cache import VARIABLE, Cache, default_folder, machine
from graphprune.costs.latency import Curve, channel_block, measure_layer, profile_network
from graphprune.costs.layers import Cut, Layer, layer_of, points_of
from graphprune.costs.timing import Kernel, Profile, call_times, median_ratio, profile, read_events
from graphprune.errors import ModelError
from graphprune.model import as_ir
from graphprune.network import Network
from graphprune.pipeline import analyze_ir
from graphprune.verify import random_feeds
from tests.patterns import PATTERNS, Pattern
from tests.twins import parse

CONVS = """
agraph (float[2,3,12,12] x) => (float[2,10] y) {
  c1 = Conv <pads=[1,1,1,1]> (x, w1)
  b1 = BatchNormalization (c1, s1, t1, m1, v1)
  r1 = Relu (b1)
  c2 = Conv <pads=[1,1,1,1]> (r1, w2)
  a2 = Add (c2, r1)
  r2 = Relu (a2)
  p2 = MaxPool <kernel_shape=[2,2], strides=[2,2]> (r2)
  d3 = Conv <group=32, pads=[1,1,1,1]> (p2, w3)
  r3 = Relu (d3)
  g = GlobalAveragePool (r3)
  f = Flatten (g)
  y = Gemm <transB=1> (f, w4, b4)
}
"""


def convs() -> Network:
    rng = np.random.default_rng(0)
    shapes = {"w1": (32, 3, 3, 3), "w2": (32, 32, 3, 3), "w3": (32, 1, 3, 3), "w4": (10, 32), "b4": (10,)}
    shapes |= dict.fromkeys(("s1", "t1", "m1", "v1"), (32,))
    arrays = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}
    return analyze_ir(parse(CONVS, **arrays))


class Clock:
    """A clock that only calls move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


# -- timing -----------------------------------------------------------------------------------------------------


def test_warm_up_does_not_count() -> None:
    clock = Clock()
    seconds = iter([50.0, 50.0, 50.0, 3.0, 1.0, 2.0, 9.0, 2.5])
    assert call_times(lambda: clock.run(seconds), 5, clock=clock) == [3.0, 1.0, 2.0, 9.0, 2.5]


def test_no_run_is_begun_after_the_time_is_up() -> None:
    clock = Clock()
    seconds = iter([1.0] * 100)
    call_times(lambda: clock.run(seconds), 50, seconds=10.0, clock=clock)
    assert clock.now == 3 + 1 + 9  # warm-up, the first, and until ten seconds have passed


def test_a_ratio_is_not_moved_by_what_slows_both() -> None:
    """The machine becomes ever slower: the second network takes half as long all the same."""
    clock = Clock()
    load = iter(np.repeat(np.linspace(1, 20, 200), 2).tolist())

    def run(seconds: float) -> None:
        clock.now += seconds * next(load)

    assert median_ratio(lambda: run(2.0), lambda: run(1.0), 40, 1e9, clock) == pytest.approx(0.5, rel=0.05)


def test_pairs_alternate_their_order() -> None:
    clock, order = Clock(), []

    def run(name: str) -> None:
        order.append(name)
        clock.now += 1.0

    median_ratio(lambda: run("a"), lambda: run("b"), 4, clock=clock)
    assert "".join(order) == "ababab" + "ab" + "ba" + "ab" + "ba"


def test_whole_networks_run(tmp_path: Path) -> None:
    network = convs()
    feeds = random_feeds(network.analysis.graph, 0)
    assert measure(network.model, feeds, 2, threads=1) > 0
    assert (
        compare(network.model, network.model, {**feeds, "none of its inputs": feeds["x"]}, 2, threads=1) > 0
    )


def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(ModelError, match="cannot load the model"):
        measure(broken, {})
    with pytest.raises(ModelError, match="cannot be timed"):
        measure(convs().model, {"x": np.zeros((1, 1), np.float32)})


def test_events_are_read_run_by_run() -> None:
    """Kernels count with their least time; what lies between them is the least of all runs."""

    def node(name: str, start: int, duration: int) -> dict[str, object]:
        arguments = {"op_name": "Conv", "input_type_shape": [{"float": [1, 8]}, {"float": [8, 8]}]}
        return {
            "cat": "Node",
            "name": f"{name}_kernel_time",
            "ts": start,
            "dur": duration,
            "args": arguments,
        }

    def run(start: int, duration: int) -> dict[str, object]:
        return {"cat": "Session", "name": "model_run", "ts": start, "dur": duration, "args": {}}

    events = [
        {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 5},
        run(10, 100), node("a", 20, 30), node("b", 60, 20),
        run(200, 70), node("a", 210, 10), node("b", 230, 40),
    ]  # fmt: skip
    seen = read_events(events, {"a": (("x",), ("h",))})
    assert [(k.name, k.inputs, k.outputs) for k in seen.kernels] == [("a", ("x",), ("h",)), ("b", (), ())]
    assert [k.seconds for k in seen.kernels] == pytest.approx([10e-6, 20e-6])
    assert seen.kernels[0].input_shapes == ((1, 8), (8, 8))
    assert seen.between == pytest.approx(20e-6)
    assert seen.seconds == pytest.approx(50e-6)
    assert seen.typical == pytest.approx(85e-6)
    plain = seen.unprofiled([50e-6, 34e-6, 36e-6])
    assert (plain.kernels, plain.typical) == (seen.kernels, 36e-6)
    assert plain.between == pytest.approx(4e-6)
    assert seen.unprofiled([25e-6]).between == 0  # the kernels alone took longer while they were recorded


# -- which op a kernel stems from ---------------------------------------------------------------------------------


def test_every_contraction_is_found_among_the_kernels_of_onnx_runtime() -> None:
    """Whatever it fuses and renames: each product's time is put down to the op that it is."""
    network = convs()
    seen = profile_network(network, None, 1)
    assert seen.typical > 0
    assert all(kernel.seconds > 0 for kernel in seen.kernels)
    sums = [stem.op for stem in stems_of(network, seen.kernels) if stem.sums]
    expected = [op for op in counted_ops(network.analysis) if mac_terms(op, network.analysis)]
    assert sorted(op.index for op in sums if op is not None) == [op.index for op in expected]


def products(names: str) -> list[Pattern]:
    return [pattern for pattern in PATTERNS if pattern.name in names.split()]


@pytest.mark.parametrize(
    "pattern", products("rotary_embedding lstm grouped_query_attention"), ids=lambda p: p.name
)
def test_every_product_of_a_pattern_is_found(pattern: Pattern) -> None:
    network = analyze_ir(as_ir(pattern.build().model)[0], pattern.input_shapes)
    seen = profile_network(network, pattern.build().feeds, 1)
    stems = stems_of(network, seen.kernels)
    known = {stem.op for stem in stems if stem.sums} | {op for stem in stems for op in stem.among}
    missing = {
        op
        for op in counted_ops(network.analysis)
        if mac_terms(op, network.analysis) and op.outputs[0] is not None
    }
    assert missing <= known


def test_a_fused_kernel_is_the_convolution_and_not_its_neighbours() -> None:
    network = convs()
    ops = {op.outputs[0].value.name: op for op in network.analysis.graph.ops if op.outputs[0].value}  # type: ignore[union-attr]
    numbers = {node: i for i, node in enumerate(network.model.graph.all_nodes())}
    kernels = [
        Kernel("r1_nchwc", "Conv", 1e-3, ((2, 3, 12, 12), (32, 3, 3, 3), (32,))),  # Conv + BN + Relu
        Kernel(
            "r2_nchwc", "Conv", 1e-3, ((2, 32, 12, 12), (32, 32, 3, 3), (32,), (2, 32, 12, 12))
        ),  # ... + Add
        Kernel("b1_bn_nchwc", "Conv", 1e-3, ((2, 32, 12, 12), (32, 1, 1, 1), (32,))),  # a BN made a Conv
        Kernel(f"gp{numbers[ops['y'].node]}_Gemm", "Gemm", 1e-3),  # type: ignore[index]
        Kernel("p2_nchwc", "MaxPool", 1e-3),
        Kernel("ReorderOutput_token_7", "ReorderOutput", 1e-3, ((2, 32, 6, 6),), outputs=("r3",)),
        Kernel("mystery", "Softplus", 1e-3),
    ]
    found = [(stem.op and stem.op.outputs[0].value.name, stem.sums) for stem in stems_of(network, kernels)]  # type: ignore[union-attr]
    assert found == [
        ("c1", True),
        ("c2", True),
        (None, False),
        ("y", True),
        ("p2", False),
        ("r3", False),
        (None, False),
    ]


def test_products_of_unknown_origin_share_what_is_left() -> None:
    network = convs()
    kernels = [
        Kernel("r1_nchwc", "Conv", 1e-3, ((2, 3, 12, 12), (32, 3, 3, 3))),
        Kernel("?", "Attention", 1e-3),
    ]
    first, second = stems_of(network, kernels)
    contractions = {op for op in counted_ops(network.analysis) if mac_terms(op, network.analysis)}
    assert set(second.among) == contractions - {first.op}


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


def times_of(layer: Layer, points: Sequence[tuple[int, ...]], threads: int) -> list[float]:
    """A made-up machine: a fixed part, and a product of the sizes; ragged sizes cost half as much again."""
    return [
        1e-5 + 1e-8 * float(np.prod(p)) * 1.5 ** any(n % c.block for n, c in zip(p, layer.cuts, strict=True))
        for p in points
    ]


class Measurer:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, layer: Layer, points: Sequence[tuple[int, ...]], threads: int) -> list[float]:
        self.calls += 1
        return times_of(layer, points, threads)


def first_layer(network: Network) -> Layer:
    widths = Widths(network)
    found = (layer_of(op, widths, block=8) for op in counted_ops(network.analysis))
    return next(layer for layer in found if layer is not None and len(layer.cuts) == 2)


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


# -- interpolation ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=20), st.integers(0, 99)
)
def test_interpolation_is_scipys_within_each_kind(where: list[tuple[int, int]], seed: int) -> None:
    cuts = Cut("c", 0, 8, (8, 16, 32, 64), (3, 29, 61)), Cut("k", 1, 1, (4, 12, 36), ())
    seconds = np.random.default_rng(seed).uniform(1, 2, (7, 3))
    found = Curve(cuts, seconds).at(np.array(where, dtype=float))
    for (c, k), value in zip(where, found, strict=True):
        kind, part = ((8, 16, 32, 64), seconds[:4]) if c % 8 == 0 else ((3, 29, 61), seconds[4:])
        oracle = RegularGridInterpolator((kind, (4, 12, 36)), part)
        assert value == pytest.approx(float(oracle((np.clip(c, kind[0], kind[-1]), np.clip(k, 4, 36)))))


def test_a_disturbed_point_is_put_right_by_the_wider_one(tmp_path: Path) -> None:
    layer = first_layer(convs())

    def disturbed(layer: Layer, points: Sequence[tuple[int, ...]], threads: int) -> list[float]:
        times = times_of(layer, points, threads)
        times[0] = 1.0  # the narrowest of all
        return times

    clean = LatencyTable(Cache(tmp_path / "a"), measurer=times_of).times(layer)
    found = LatencyTable(Cache(tmp_path / "b"), measurer=disturbed).times(layer)
    assert found[0, 0] == min(clean[0, 1], clean[1, 0])
    found[0, 0] = clean[0, 0]
    np.testing.assert_array_equal(found, clean)


# -- the cost -----------------------------------------------------------------------------------------------------


def profiler(network: Network, feeds: object, threads: int) -> Profile:
    """Every node is a kernel of a millisecond, but the cheapest of a tenth; a tenth lies between; runs take double."""
    kernels = [
        Kernel(f"gp{i}_{node.op_type}", node.op_type, 1e-4 if node.op_type == "Flatten" else 1e-3)
        for i, node in enumerate(network.model.graph.all_nodes())
    ]
    return Profile(tuple(kernels), 1e-4, 2 * (1e-4 + sum(kernel.seconds for kernel in kernels)))


def made_up(network: Network, folder: Path, **options: object) -> LatencyCost:
    table = LatencyTable(Cache(folder), measurer=times_of)
    table.cache.put({"what": "channel block", "machine": machine()}, 8)
    return LatencyCost(network, table, profiler=profiler, **options)  # type: ignore[arg-type]


def test_a_prediction_by_hand(tmp_path: Path) -> None:
    network = convs()
    cost = made_up(network, tmp_path)
    assert isinstance(cost, CostModel)
    full = cost.widths.full.tolist()
    assert cost.total(full) == pytest.approx(cost.measured)
    (group,) = [g for g in network.groups if not g.frozen]
    assert group.unit == 32
    kept = list(full)
    kept[group.index] = 16

    def share(*pairs: tuple[int, int]) -> float:
        before, after = (np.prod([pair[i] for pair in pairs]) for i in (0, 1))
        return float((1e-5 + 1e-8 * after) / (1e-5 + 1e-8 * before))

    convolutions = share((32, 16)) + share((32, 16), (32, 16)) + share((32, 16)) + share((32, 16))
    # BatchNormalization, three Relus, Add, MaxPool, the average: all their bytes are halved, above what a kernel costs
    moving = 7 * (0.1 + 0.9 / 2)
    between_and_flatten = 0.1 + 0.1
    assert cost.total(kept) == pytest.approx(2e-3 * (convolutions + moving + between_and_flatten))


def test_ragged_widths_are_dearer(tmp_path: Path) -> None:
    """Where a convolution of 23 channels takes three times as long as one of 24, less is saved by it."""

    def blocked(layer: Layer, points: Sequence[tuple[int, ...]], threads: int) -> list[float]:
        kinds = [any(n % cut.block for n, cut in zip(point, layer.cuts, strict=True)) for point in points]
        return [
            (3.0 if ragged else 1.0) * np.prod(point) for ragged, point in zip(kinds, points, strict=True)
        ]

    network = convs()
    table = LatencyTable(Cache(tmp_path), measurer=blocked)
    table.cache.put({"what": "channel block", "machine": machine()}, 8)
    (group,) = [g for g in network.groups if not g.frozen]
    for round_to, dearer in ((1, True), (8, False)):
        cost = LatencyCost(network, table, profiler=profiler, round_to=round_to)
        saved = cost.saving(group.index, [24, 23], cost.widths.full)
        assert (saved[1] < saved[0]) == dearer


def test_savings_are_differences(tmp_path: Path) -> None:
    network = convs()
    cost = made_up(network, tmp_path, round_to=1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        kept = [int(rng.integers(1, group.unit + 1)) for group in network.groups]
        for group in network.groups:
            levels = list(range(1, group.unit + 1))
            totals = [cost.total([*kept[: group.index], n, *kept[group.index + 1 :]]) for n in levels]
            expected = cost.total(kept) - np.array(totals)
            np.testing.assert_allclose(
                cost.saving(group.index, levels, kept), expected, rtol=1e-9, atol=1e-15
            )


def test_what_cannot_be_measured_alone_is_reckoned_by_its_products(tmp_path: Path) -> None:
    network = convs()

    def refuses(layer: Layer, points: Sequence[tuple[int, ...]], threads: int) -> list[float]:
        raise ModelError(f"{layer.op.kind} cannot be timed alone")

    table = LatencyTable(Cache(tmp_path), measurer=refuses)
    cost = LatencyCost(network, table, profiler=profiler)
    assert len(cost.notes) == 4
    assert all("multiply-accumulates" in note for note in cost.notes)
    (group,) = [g for g in network.groups if not g.frozen]
    kept = cost.widths.full.tolist()
    kept[group.index] = 8
    products = 0.25 + 0.25**2 + 0.25 + 0.25
    assert cost.total(kept) == pytest.approx(2e-3 * (products + 7 * (0.1 + 0.9 / 4) + 0.2))


def test_progress_is_told_and_the_cost_described(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    cost = made_up(convs(), tmp_path, progress=lambda done, of: seen.append((done, of)))
    assert seen[0] == (0, 12)
    assert seen[-1] == (12, 12)
    assert "ONNX Runtime" in cost.describe()
    assert cost.unit == "s"


def test_names_of_nodes_are_told_apart() -> None:
    network = convs()
    name_nodes(network.model)
    names = [node.name for node in network.model.graph.all_nodes()]
    assert len(set(names)) == len(names) == 12


def test_a_profile_reads_values_too() -> None:
    rng = np.random.default_rng(0)
    layer = first_layer(convs())
    model, feeds = layer.model([tuple(cut.points[-1] for cut in layer.cuts)])
    seen = profile(
        model, {name: rng.random(a.shape, dtype=np.float32) for name, a in feeds.items()}, runs=2, threads=1
    )
    assert any("p0_0" in value for kernel in seen.kernels for value in (kernel.name, *kernel.outputs))
    assert seen.between >= 0
