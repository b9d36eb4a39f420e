"""Timing: runs, pairs of runs, kernels, and which op each kernel stems from. Clocks are made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from graphprune.cost import counted_ops, mac_terms
from graphprune.costs import compare, measure
from graphprune.costs.attribution import stems_of
from graphprune.costs.latency import profile_network
from graphprune.costs.timing import Kernel, call_times, median_ratio, profile, read_events
from graphprune.errors import ModelError
from graphprune.model import as_ir
from graphprune.pipeline import analyze_ir
from graphprune.verification.feeds import random_feeds
from tests.patterns import PATTERNS, Pattern
from tests.timed_networks import convs, first_layer


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


def test_a_profile_reads_values_too() -> None:
    rng = np.random.default_rng(0)
    layer = first_layer(convs())
    model, feeds = layer.model([tuple(cut.points[-1] for cut in layer.cuts)])
    seen = profile(
        model, {name: rng.random(a.shape, dtype=np.float32) for name, a in feeds.items()}, runs=2, threads=1
    )
    assert any("p0_0" in value for kernel in seen.kernels for value in (kernel.name, *kernel.outputs))
    assert seen.between >= 0
