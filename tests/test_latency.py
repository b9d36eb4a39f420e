"""Predictions of latency from tables of layers. No time is asserted: kernels and layers' times are made up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from graphprune.costs import CostModel, LatencyCost, LatencyTable
from graphprune.costs.attribution import name_nodes
from graphprune.costs.cache import Cache, machine
from graphprune.costs.latency import Curve
from graphprune.costs.layers import Cut, Layer
from graphprune.costs.timing import Kernel, Profile
from graphprune.errors import ModelError
from graphprune.network import Network
from tests.timed_networks import convs, first_layer, times_of


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
