"""Allocation: how much each group keeps so that a budget holds and the outputs suffer least.

Each group has a curve: the error of the network's outputs when it alone is cut to each of a few levels
(:mod:`graphprune.choice.sensitivity`). Errors add up, to first order, and costs nearly do; so a budget is a knapsack
with one item a group and level (Frantar & Alistarh, SPDY, ICML 2022, section 3; ZipLM, NeurIPS 2023, section 3.2).
Costs of neighbouring layers multiply: they are taken at the last solution, and the knapsack is solved again until it
stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graphprune.axes.groups import Group
from graphprune.choice.rounding import allowed_counts
from graphprune.choice.scope import keep_counts, ranked_parts
from graphprune.choice.sensitivity import Curve
from graphprune.costs import CostModel
from graphprune.errors import BudgetError
from graphprune.kernels.knapsack import knapsack
from graphprune.scores.evidence import Scores

#: Levels of a group's curve at most.
LEVELS = 10
#: The knapsack is solved at most so often.
ROUNDS = 16
#: A solution whose cost is within this part of the budget is close enough.
CLOSE = 0.01
#: The ratio that meets a budget is found to one part in two to this power.
BISECTIONS = 20


def levels_of(group: Group, round_to: int | None, keep_at_least: float) -> list[int]:
    """The numbers of parts to try for a group, descending, without all of them; about evenly spread."""
    allowed = [int(k) for k in allowed_counts(group, round_to, keep_at_least) if k < group.unit]
    if len(allowed) > LEVELS:
        picks = np.unique(np.round(np.linspace(0, len(allowed) - 1, LEVELS)).astype(int))
        allowed = [allowed[i] for i in picks]
    return sorted(allowed, reverse=True)


def allocate(groups: Sequence[Group], curves: Sequence[Curve], cost: CostModel, budget: float) -> list[int]:
    """How many of its parts each group keeps so that the cost is within the budget.

    Args:
        groups: All groups of the network.
        curves: Curves of those that may be cut.
        cost: What is limited.
        budget: The limit, in the cost's unit.

    Returns:
        For each group a number of its ``unit`` parts.

    Raises:
        BudgetError: The least that can be reached is more; the message says what it is.
    """
    kept = [group.unit for group in groups]
    least = list(kept)
    for curve in curves:
        least[curve.index] = curve.kept[-1]
    check_reachable(groups, least, cost, budget)
    curves = _finite(curves)
    errors = [np.asarray(curve.errors) for curve in curves]
    best, best_error = least, float("inf")
    spend = budget  # what the linearised costs may come to so that the true ones come to the budget
    for number in range(ROUNDS):
        saved = [np.asarray(cost.saving(curve.index, curve.kept, kept)) for curve in curves]
        now = sum(
            each[curve.kept.index(kept[curve.index])] for curve, each in zip(curves, saved, strict=True)
        )
        try:
            picks = knapsack([-each for each in saved], errors, spend - cost.total(kept) - now)
        except ValueError:  # seen from here, nothing reaches so far: costs are smaller near the least
            kept, spend = list(least), budget
            continue
        chosen = list(kept)
        for curve, pick in zip(curves, picks, strict=True):
            chosen[curve.index] = curve.kept[pick]
        total = cost.total(chosen)
        if total <= budget:
            error = sum(curve.at(chosen[curve.index]) for curve in curves)
            if error < best_error:
                best, best_error = chosen, error
        if chosen == kept and number and 0 <= budget - total < CLOSE * budget:
            break
        spend += budget - total
        kept = chosen
    return _fill(best, curves, cost, budget)


def _finite(curves: Sequence[Curve]) -> list[Curve]:
    """The curves with infinite errors (a network that blows up) as more than all finite ones together."""
    most = 1.0 + sum(max((e for e in curve.errors if np.isfinite(e)), default=0.0) for curve in curves)
    return [replace(c, errors=[e if np.isfinite(e) else most for e in c.errors]) for c in curves]


def _fill(kept: Sequence[int], curves: Sequence[Curve], cost: CostModel, budget: float) -> list[int]:
    """Spend what is left of the budget on the steps up that save most error for their cost."""
    kept = list(kept)
    while True:
        left = budget - cost.total(kept)
        best, best_gain = None, 0.0
        for curve in curves:
            here = curve.kept.index(kept[curve.index])
            above = curve.kept[:here]
            if not above:
                continue
            prices = -np.asarray(cost.saving(curve.index, above, kept))
            for position, price in enumerate(prices.tolist()):
                gain = (curve.errors[here] - curve.errors[position]) / max(price, 1e-9)
                if price <= left and gain > best_gain:
                    best, best_gain = (curve.index, above[position]), gain
        if best is None:
            return kept
        kept[best[0]] = best[1]


def uniform(
    groups: Sequence[Group],
    scores: Scores,
    wanted: Sequence[float | None],
    cost: CostModel,
    budget: float,
    *,
    scope: str = "local",
    keep_at_least: float = 0.1,
    round_to: int | None = None,
) -> list[int]:
    """How many parts each group keeps when one ratio, spread by ``scope``, just meets the budget.

    Sizes are rounded, so that groups of one size are cut by the next step all at the same ratio, and a budget may lie
    far above what that leaves. Of the groups that the last step cuts, those whose labels are worth most are spared, as
    many as the budget allows.

    Args:
        groups: All groups.
        scores: What each label is worth.
        wanted: None for groups that must not be cut.
        cost, budget: What is limited, and the limit.
        scope, keep_at_least, round_to: As of :func:`graphprune.choice.scope.keep_counts`.

    Raises:
        BudgetError: The least that can be reached is more.
    """

    def at(ratio: float) -> list[int]:
        ratios = [None if w is None else ratio for w in wanted]
        return keep_counts(groups, scores, ratios, scope, keep_at_least, round_to)

    low, high = 0.0, 1.0 - 1e-6
    best, above = at(high), at(low)
    check_reachable(groups, best, cost, budget)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        kept = at(middle)
        if cost.total(kept) <= budget:
            best, high = kept, middle
        else:
            above, low = kept, middle
    return _spared(best, above, groups, scores, cost, budget)


def _spared(
    kept: Sequence[int],
    above: Sequence[int],
    groups: Sequence[Group],
    scores: Scores,
    cost: CostModel,
    budget: float,
) -> list[int]:
    """Groups keep what they have in ``above``, those first that lose most worth to ``kept``, within the budget."""

    def worth(group: Group) -> float:
        """Of the parts in question, each; scores are comparable within a group, so in multiples of its mean."""
        ranked = ranked_parts(group, scores)
        parts = ranked[group.unit - above[group.index] : group.unit - kept[group.index]]
        mean = float(ranked.mean())
        return float(parts.mean()) / mean if mean > 0 else 0.0

    kept = list(kept)
    last = [group for group in groups if above[group.index] > kept[group.index]]
    for group in sorted(last, key=worth, reverse=True):
        trial = list(kept)
        trial[group.index] = above[group.index]
        if cost.total(trial) <= budget:
            kept = trial
    return kept


def check_reachable(groups: Sequence[Group], least: Sequence[int], cost: CostModel, budget: float) -> None:
    """Complain now if even the least that may be kept costs more than the budget.

    Raises:
        BudgetError: It does; the message says what is left of the original then.
    """
    whole, reachable = cost.total([group.unit for group in groups]), cost.total(least)
    if reachable > budget:
        raise BudgetError(
            f"the budget of {budget:,.4g} {cost.unit} ({budget / whole:.3f} of the network's) cannot be reached:"
            f" cutting all that may be cut leaves {reachable:,.4g} ({reachable / whole:.3f}); raise it, allow more with"
            " --residual or a lower --keep-at-least, or exclude less"
        )
