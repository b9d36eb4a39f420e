"""Multiple-choice knapsack: one level for each group, least error within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, fsum
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

#: Integers up to this are exact as float64.
_EXACT = 2.0**53


def knapsack(
    costs: Sequence[npt.ArrayLike], errors: Sequence[npt.ArrayLike], budget: float, *, bins: int = 10_000
) -> list[int]:
    """Pick one level for each group: the least sum of errors whose sum of costs is within the budget.

    Dynamic programming over groups and a discretised budget (Frantar and Alistarh, SPDY, 2022, section 3; Frantar and
    Alistarh, ZipLM, 2023, section 3.2). Each group's cheapest level is paid first, exactly; what the others cost
    beyond it is rounded up to whole bins, so that the budget always holds, and what rounding left over is then spent
    greedily on the largest drops in error that it pays for.

    The result is optimal if all costs are integers whose differences from their group's cheapest are multiples of a
    unit of which what is left of the budget holds at most ``bins``. Otherwise its error is at most the least that is
    possible with ``g / bins`` of what is left after the cheapest levels given up, ``g`` being the number of groups
    that have a choice: 2 % of it for 200 groups and 10,000 bins. Time is O(bins x levels of all groups), memory 4 bytes
    for each bin and group.

    Args:
        costs: For each group the cost of each level, float ``[levels]``, at least one level; in any order.
        errors: For each group the error of each level, float ``[levels]``.
        budget: What all costs together may come to, in the costs' unit.
        bins: Parts into which the budget is divided.

    Returns:
        For each group the index of the level.

    Raises:
        ValueError: Even the cheapest levels exceed the budget (the message says what they cost); or a number is not
            finite; or the two arguments do not fit each other.

    >>> knapsack([[4, 2, 1], [4, 2, 1]], [[0, 1, 3], [0, 2, 9]], 6)
    [1, 0]
    """
    prices, losses = _vectors("costs", costs), _vectors("errors", errors)
    if [len(p) for p in prices] != [len(e) for e in losses]:
        raise ValueError("costs and errors have different numbers of groups or levels")
    if bins < 1:
        raise ValueError(f"bins is {bins}; give a positive number")
    if np.isnan(budget):
        raise ValueError("the budget is not a number")
    least = fsum(price.min() for price in prices)
    if least > budget:
        raise ValueError(f"the budget of {budget:g} is not reachable: the cheapest levels cost {least:g}")

    fronts = [_front(price, loss) for price, loss in zip(prices, losses, strict=True)]
    extras = [price[front] - price[front[0]] for price, front in zip(prices, fronts, strict=True)]
    drops = [loss[front] for loss, front in zip(losses, fronts, strict=True)]
    spare, unit = _spare(prices, extras, budget, least)
    counts = floor(spare / unit) if unit else bins
    if counts > bins:
        unit, counts = 0.0, bins
    steps = [_steps(extra, spare, unit, counts) for extra in extras]
    chosen = _dynamic_programme(steps, drops, counts)
    _spend(chosen, extras, drops, spare)
    return [int(front[level]) for front, level in zip(fronts, chosen, strict=True)]


def _vectors(what: str, groups: Sequence[npt.ArrayLike]) -> list[Vector]:
    vectors = [np.asarray(group, dtype=np.float64).ravel() for group in groups]
    for index, vector in enumerate(vectors):
        if not vector.size:
            raise ValueError(f"group {index} has no level")
        if not np.isfinite(vector).all():
            raise ValueError(f"{what} of group {index} are not finite")
    return vectors


def _front(price: Vector, loss: Vector) -> npt.NDArray[np.int64]:
    """Levels that no other beats in both, by rising cost and falling error; the first is the cheapest."""
    order = np.lexsort((loss, price))
    best = np.minimum.accumulate(loss[order])
    return np.asarray(order[np.r_[True, loss[order][1:] < best[:-1]]], dtype=np.int64)


def _spare(prices: list[Vector], extras: list[Vector], budget: float, least: float) -> tuple[float, float]:
    """What the cheapest levels leave of the budget, and the unit of which all extras are multiples (0: none)."""
    most = fsum(extra[-1] for extra in extras)
    sizes = fsum(np.abs(price).max() for price in prices)
    steps = np.concatenate([extra[1:] for extra in extras]) if extras else np.zeros(0)
    if not steps.size:
        return 0.0, 1.0
    if sizes < _EXACT and all((price == np.rint(price)).all() for price in prices):
        return min(budget - least, most), float(np.gcd.reduce(steps.astype(np.int64)))
    if budget - least >= most + np.finfo(float).eps * sizes:
        return most * (1 + 1e-9), 0.0
    return max(0.0, budget - least - np.finfo(float).eps * (sizes + abs(budget))), 0.0


def _steps(extra: Vector, spare: float, unit: float, counts: int) -> npt.NDArray[np.int64]:
    """What each level takes of the bins; one more than there are where it does not fit."""
    if unit:
        steps = np.rint(extra / unit)
    elif spare:
        # A little more than the exact quotient: a sum of floats may exceed what its rounded terms say.
        with np.errstate(over="ignore"):
            steps = np.ceil(extra / spare * counts * (1 + 1e-12))
    else:
        steps = np.where(extra > 0, np.inf, 0.0)
    return np.minimum(steps, counts + 1).astype(np.int64)


def _dynamic_programme(steps: list[npt.NDArray[np.int64]], drops: list[Vector], counts: int) -> list[int]:
    """The level of each group with the least sum of errors whose steps sum to at most ``counts``."""
    best = np.zeros(counts + 1)
    choices: list[npt.NDArray[Any]] = []
    for step, drop in zip(steps, drops, strict=True):
        reached = best + drop[0]
        choice = np.zeros(counts + 1, dtype=np.int32)
        for level in range(1, len(step)):
            size = int(step[level])
            if size > counts:
                break
            candidate = best[: counts + 1 - size] + drop[level]
            better = candidate < reached[size:]
            np.copyto(reached[size:], candidate, where=better)
            np.copyto(choice[size:], level, where=better)
        best = reached
        choices.append(choice)
    chosen: list[int] = []
    left = counts
    for choice, step in zip(reversed(choices), reversed(steps), strict=True):
        chosen.append(int(choice[left]))
        left -= int(step[chosen[-1]])
    return chosen[::-1]


def _spend(chosen: list[int], extras: list[Vector], drops: list[Vector], spare: float) -> None:
    """Move groups to dearer levels, the largest drop in error first, as long as one fits; in place."""
    group = np.repeat(np.arange(len(extras)), [len(extra) for extra in extras])
    if not group.size:
        return
    level = np.concatenate([np.arange(len(extra)) for extra in extras])
    extra, drop = np.concatenate(extras), np.concatenate(drops)
    while True:
        paid = np.array([e[c] for e, c in zip(extras, chosen, strict=True)])
        now = np.array([d[c] for d, c in zip(drops, chosen, strict=True)])
        fits = extra - paid[group] <= spare - fsum(paid)
        gain = np.where(fits, now[group] - drop, 0.0)
        pick = int(np.argmax(gain))
        if gain[pick] <= 0:
            return
        chosen[int(group[pick])] = int(level[pick])
