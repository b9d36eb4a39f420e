"""The multiple-choice knapsack against enumeration, and its laws."""

from __future__ import annotations

import itertools
import time
from math import fsum

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.kernels.knapsack import knapsack

Table = list[list[float]]


def enumerated(costs: Table, errors: Table, budget: float) -> float:
    """The least error of all combinations within the budget."""
    return min(
        fsum(e[i] for e, i in zip(errors, combination, strict=True))
        for combination in itertools.product(*map(range, map(len, costs)))
        if fsum(c[i] for c, i in zip(costs, combination, strict=True)) <= budget
    )


def total(table: Table, chosen: list[int]) -> float:
    return fsum(row[i] for row, i in zip(table, chosen, strict=True))


@st.composite
def tables(draw: st.DrawFn, *, whole: bool) -> tuple[Table, Table]:
    """Costs and errors of up to five groups of up to four levels."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    numbers = (
        st.integers(0, 40).map(float) if whole else st.floats(0, 40, allow_subnormal=False, allow_nan=False)
    )
    errors = st.floats(0, 10, allow_subnormal=False)
    return (
        [draw(st.lists(numbers, min_size=n, max_size=n)) for n in sizes],
        [draw(st.lists(errors, min_size=n, max_size=n)) for n in sizes],
    )


@settings(max_examples=300, deadline=None)
@given(tables(whole=True), st.floats(0, 1))
def test_optimal_on_whole_costs(pair: tuple[Table, Table], share: float) -> None:
    costs, errors = pair
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = least + share * (most - least)
    chosen = knapsack(costs, errors, budget)
    assert total(costs, chosen) <= budget
    assert total(errors, chosen) == pytest.approx(enumerated(costs, errors, budget), abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(tables(whole=False), st.floats(0, 1), st.integers(1, 200))
def test_loss_of_rounding_is_bounded(pair: tuple[Table, Table], share: float, bins: int) -> None:
    costs, errors = pair
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = least + share * (most - least)
    if fsum(map(min, costs)) > budget:
        budget = fsum(map(min, costs))
    chosen = knapsack(costs, errors, budget, bins=bins)
    assert total(costs, chosen) <= budget
    given_up = len(costs) / bins * (budget - least) * (1 + 1e-9) + 1e-9
    if budget - given_up >= fsum(map(min, costs)):
        assert total(errors, chosen) <= enumerated(costs, errors, budget - given_up) + 1e-9


@settings(max_examples=200, deadline=None)
@given(tables(whole=True), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_budget_is_never_worse(pair: tuple[Table, Table], first: float, second: float) -> None:
    costs, errors = pair
    least, most = sum(map(min, costs)), sum(map(max, costs))
    small, large = (least + share * (most - least) for share in sorted((first, second)))
    better = total(errors, knapsack(costs, errors, large))
    assert better <= total(errors, knapsack(costs, errors, small)) + 1e-12


def test_uses_what_rounding_leaves_over() -> None:
    # Two bins, three extras of .33: each is rounded up to one bin, so that only two fit; the third is paid from what
    # is left only where it truly fits.
    costs, errors = [[0.0, 0.33]] * 3, [[1.0, 0.0]] * 3
    assert knapsack(costs, errors, 1.0, bins=2) == [1, 1, 1]
    assert sorted(knapsack(costs, errors, 0.98, bins=2)) == [0, 1, 1]


def test_large_whole_costs_share_a_unit() -> None:
    costs = [[3e12, 1e12], [5e12, 2e12, 1e12]]
    assert knapsack(costs, [[0.0, 2.0], [0.0, 1.0, 9.0]], 5e12) == [0, 1]


def test_negative_errors_and_levels_in_any_order() -> None:
    assert knapsack([[1, 5, 3], [2, 2]], [[0, -2, -3], [1, 0]], 7) == [2, 1]
    assert knapsack([], [], 0) == []
    assert knapsack([[5.5]], [[1]], 5.5) == [0]
    assert knapsack([[1.5, 2.5]], [[1, 0]], float("inf")) == [1]


def test_unreachable_budget_says_what_is_reachable() -> None:
    with pytest.raises(ValueError, match=r"budget of 2 is not reachable: the cheapest levels cost 2\.5"):
        knapsack([[1.5, 3], [1, 2]], [[1, 0], [1, 0]], 2)


@pytest.mark.parametrize(
    ("costs", "errors", "budget", "said"),
    [
        ([[1.0]], [[1.0, 2.0]], 3.0, "different numbers"),
        ([[1.0]], [], 3.0, "different numbers"),
        ([[1.0], []], [[1.0], []], 3.0, "group 1 has no level"),
        ([[float("nan")]], [[1.0]], 3.0, "costs of group 0 are not finite"),
        ([[1.0]], [[float("inf")]], 3.0, "errors of group 0 are not finite"),
        ([[1.0]], [[1.0]], float("nan"), "budget is not a number"),
    ],
)
def test_bad_input(costs: Table, errors: Table, budget: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        knapsack(costs, errors, budget)


def test_no_bins() -> None:
    with pytest.raises(ValueError, match="bins is 0"):
        knapsack([[1.0]], [[1.0]], 1.0, bins=0)


def test_two_hundred_groups_in_a_second() -> None:
    rng = np.random.default_rng(0)
    costs = [np.sort(rng.random(12))[::-1].tolist() for _ in range(200)]
    errors = [np.sort(rng.random(12)).tolist() for _ in range(200)]
    budget = 0.5 * sum(map(max, costs))
    start = time.process_time()
    chosen = knapsack(costs, errors, budget)
    assert time.process_time() - start < 1
    assert total(costs, chosen) <= budget
    # Rounding costs little beside the true optimum, which the linear relaxation bounds from below: a finer grid agrees.
    assert total(errors, chosen) <= total(errors, knapsack(costs, errors, budget, bins=100_000)) * 1.01
