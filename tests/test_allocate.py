"""Allocation, against enumeration of all ways to spend a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.axes.groups import Group
from graphprune.choice.allocate import LEVELS, allocate, levels_of, uniform
from graphprune.choice.scope import keep_counts
from graphprune.choice.sensitivity import Curve
from graphprune.errors import BudgetError

Kept = Sequence[int] | npt.NDArray[Any]


class Cost:
    """A cost that is a function of what each group keeps."""

    unit = "units"

    def __init__(self, function: Callable[[Sequence[int]], float]) -> None:
        self.function = function

    def total(self, kept: Kept) -> float:
        return float(self.function([int(k) for k in kept]))

    def saving(self, group: int, levels: Kept, kept: Kept) -> npt.NDArray[np.float64]:
        now = self.total(kept)
        changed = [[level if i == group else k for i, k in enumerate(kept)] for level in levels]
        return np.array([now - self.total(each) for each in changed])

    def describe(self) -> str:
        return "units"


def groups_of(sizes: Sequence[int]) -> list[Group]:
    starts = np.cumsum([1, *sizes])
    return [
        Group(f"g{i}", [np.arange(a, a + size, dtype=np.int32)], index=i)
        for i, (a, size) in enumerate(zip(starts.tolist(), sizes, strict=False))
    ]


def curves_of(groups: Sequence[Group], draw: np.random.Generator) -> list[Curve]:
    curves = []
    for group in groups:
        kept = [group.unit, *sorted(range(1, group.unit), reverse=True)]
        errors = np.r_[0.0, np.cumsum(draw.random(len(kept) - 1) ** 2)]
        curves.append(Curve(group.name, group.index, kept, errors.tolist()))
    return curves


def enumerated(curves: Sequence[Curve], cost: Cost, budget: float) -> float:
    """The least sum of errors within the budget."""
    return min(
        sum(curve.errors[level] for curve, level in zip(curves, levels, strict=True))
        for levels in product(*(range(len(curve.kept)) for curve in curves))
        if cost.total([c.kept[level] for c, level in zip(curves, levels, strict=True)]) <= budget
    )


def error_of(curves: Sequence[Curve], kept: Sequence[int]) -> float:
    return sum(curve.errors[curve.kept.index(kept[curve.index])] for curve in curves)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 999), st.floats(0, 1))
@settings(deadline=None, max_examples=80)
def test_with_costs_that_add_up_it_is_the_best(sizes: list[int], seed: int, share: float) -> None:
    draw = np.random.default_rng(seed)
    groups = groups_of(sizes)
    curves = curves_of(groups, draw)
    prices = draw.integers(1, 20, len(sizes)).tolist()
    cost = Cost(lambda kept: 7 + sum(p * k for p, k in zip(prices, kept, strict=True)))
    least, whole = cost.total([1] * len(sizes)), cost.total(sizes)
    budget = least + share * (whole - least)
    kept = allocate(groups, curves, cost, budget)
    assert cost.total(kept) <= budget
    assert error_of(curves, kept) == pytest.approx(enumerated(curves, cost, budget))


@given(st.lists(st.integers(2, 5), min_size=2, max_size=4), st.integers(0, 999), st.floats(0.05, 1))
@settings(deadline=None, max_examples=80)
def test_with_costs_that_multiply_it_holds_the_budget(sizes: list[int], seed: int, share: float) -> None:
    """Layers in a row: each costs the product of its widths. Nothing more can be had for what is left of the budget."""
    draw = np.random.default_rng(seed)
    groups = groups_of(sizes)
    curves = curves_of(groups, draw)
    prices = draw.integers(1, 20, len(sizes) + 1).tolist()

    def layers(kept: Sequence[int]) -> float:
        return float(sum(p * a * b for p, a, b in zip(prices, [3, *kept], [*kept, 2], strict=True)))

    cost = Cost(layers)
    least, whole = cost.total([1] * len(sizes)), cost.total(sizes)
    budget = least + share * (whole - least)
    kept = allocate(groups, curves, cost, budget)
    assert cost.total(kept) <= budget
    assert error_of(curves, kept) >= enumerated(curves, cost, budget) - 1e-9
    for group in groups:
        for more in range(kept[group.index] + 1, group.unit + 1):
            assert cost.total([more if i == group.index else k for i, k in enumerate(kept)]) > budget


def test_groups_without_a_curve_stay_whole() -> None:
    groups = groups_of([4, 4, 4])
    curves = [curve for curve in curves_of(groups, np.random.default_rng(0)) if curve.index != 1]
    kept = allocate(groups, curves, Cost(sum), 8)
    assert kept[1] == 4
    assert sum(kept) <= 8


def test_an_infinite_error_is_the_last_resort() -> None:
    groups = groups_of([2, 2])
    curves = [Curve("g0", 0, [2, 1], [0.0, np.inf]), Curve("g1", 1, [2, 1], [0.0, 5.0])]
    assert allocate(groups, curves, Cost(sum), 3) == [2, 1]
    assert allocate(groups, curves, Cost(sum), 2) == [1, 1]
    assert allocate(groups, curves, Cost(sum), 4) == [2, 2]


def test_a_budget_below_what_is_reachable_says_what_is() -> None:
    groups = groups_of([4, 4])
    curves = [Curve(g.name, g.index, [4, 2], [0.0, 1.0]) for g in groups]
    cost = Cost(lambda kept: 10 * sum(kept))
    complaint = r"budget of 30 units \(0.375 .* leaves 40 \(0.500\)"
    with pytest.raises(BudgetError, match=complaint):
        allocate(groups, curves, cost, 30)
    with pytest.raises(BudgetError, match=complaint):
        uniform(groups, np.arange(9.0), [0.5, 0.5], cost, 30, keep_at_least=0.5, round_to=1)
    assert allocate(groups, curves, cost, 40) == [2, 2]


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8, 1.0])
def test_uniform_is_the_mildest_ratio_that_meets_the_budget(scope: str, share: float) -> None:
    groups = groups_of([8, 12, 5])
    scores = np.r_[0.0, np.random.default_rng(0).random(25)]
    wanted = [0.5, 0.5, None]
    cost = Cost(lambda kept: kept[0] * kept[1] + 3 * kept[1] + kept[2])
    budget = share * cost.total([8, 12, 5])
    kept = uniform(groups, scores, wanted, cost, budget, scope=scope, keep_at_least=0.1, round_to=1)
    assert kept[2] == 5
    reachable = [
        keep_counts(groups, scores, [None if w is None else r for w in wanted], scope, 0.1, 1)
        for r in np.linspace(0, 1 - 1e-6, 2001)
    ]
    costs = [cost.total(each) for each in reachable]
    assert max(c for c in costs if c <= budget) <= cost.total(kept) <= budget


def test_of_groups_that_a_ratio_cuts_together_those_worth_most_are_spared() -> None:
    """Four groups of 32 go to 24 at one ratio; a budget of 112 lets two of them stay."""
    groups = groups_of([32, 32, 32, 32])
    scores = np.r_[0.0, np.tile(np.arange(1.0, 33.0), 4)]
    for group, factor in zip(groups, (2, 16, 8, 4), strict=True):  # the worth of the weakest eight
        scores[group.labels[:8]] /= factor
    kept = uniform(groups, scores, [0.5] * 4, Cost(sum), 112.5)
    assert kept == [32, 24, 24, 32]
    kept = uniform(groups, 7 * scores, [0.5] * 4, Cost(sum), 111.5)  # a scale tells nothing
    assert kept == [32, 24, 24, 24]
    assert uniform(groups, scores, [0.5] * 4, Cost(sum), 96) == [24, 24, 24, 24]
    assert uniform(groups, scores, [0.5] * 4, Cost(sum), 95) == [16, 24, 24, 24]


@given(
    st.lists(st.sampled_from([5, 16, 32, 64]), min_size=1, max_size=5),
    st.integers(0, 999),
    st.floats(0.15, 1),
)
@settings(deadline=None, max_examples=60)
def test_uniform_spends_what_a_spared_group_costs(sizes: list[int], seed: int, share: float) -> None:
    """No group could keep what it has at the next milder ratio without breaking the budget."""
    groups = groups_of(sizes)
    draw = np.random.default_rng(seed)
    scores = np.r_[0.0, draw.random(sum(sizes))]
    prices = draw.integers(1, 9, len(sizes)).tolist()
    cost = Cost(lambda kept: sum(p * k for p, k in zip(prices, kept, strict=True)))
    budget = share * cost.total(sizes)
    wanted = [0.5] * len(sizes)
    try:
        kept = uniform(groups, scores, wanted, cost, budget)
    except BudgetError:
        return
    assert cost.total(kept) <= budget
    milder = min(
        (
            counts
            for ratio in np.linspace(0, 1 - 1e-6, 1001)
            if cost.total(counts := keep_counts(groups, scores, [ratio] * len(sizes), "local", 0.1)) > budget
        ),
        key=cost.total,
        default=sizes,
    )
    for index, count in enumerate(milder):
        if count > kept[index]:
            assert cost.total([count if i == index else k for i, k in enumerate(kept)]) > budget


def test_levels_are_spread_and_end_where_the_floor_is() -> None:
    (group,) = groups_of([64])
    assert levels_of(group, 8, 0.1) == [56, 48, 40, 32, 24, 16, 8]
    assert levels_of(group, 8, 0.5) == [56, 48, 40, 32]
    many = levels_of(group, 1, 0.1)
    assert len(many) <= LEVELS
    assert (many[0], many[-1]) == (63, 7)
    assert many == sorted(many, reverse=True)
    assert levels_of(groups_of([1])[0], 1, 0.1) == []
