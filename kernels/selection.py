"""Which units to keep, from how their contributions to the next layer's outputs overlap.

A layer's output is the sum of what each unit (channel, head, hidden unit) contributes: ``y = sum_i y_i``. The Gram
matrix ``C_ij = sum over samples and outputs of y_i y_j`` holds all that a choice by reconstruction error needs:
leaving out the units S costs ``|sum_{i in S} y_i|^2 = 1_S^T C 1_S``, and scaling unit i by ``b_i`` costs
``(1 - b)^T C (1 - b)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

#: Elements of the product of weights that are formed at a time.
BLOCK = 1 << 22
#: Where the path of penalties ends, as a fraction of its start.
LAST_PENALTY = 1e-5
#: A unit of which the active ones explain all but this fraction is a linear combination of them.
DEPENDENT = 1e-6
#: Knots of the path, times the number of units: a unit rarely comes and goes more than once or twice.
MAX_KNOTS = 8
#: Changes of the active set between exact inversions.
REFRESH = 64


def contributions(
    gram: npt.NDArray[Any], weight: npt.NDArray[Any], unit_of: npt.NDArray[Any], units: int | None = None
) -> Matrix:
    """The Gram matrix of the units' contributions to a contraction's outputs.

    With inputs ``x`` and ``H = sum over samples of x x^T``, unit i contributes ``sum_{p in i} x_p W[p]``, so that
    ``C_ij = sum_{p in i, q in j} H_pq (W W^T)_pq``.

    Args:
        gram: ``H``, ``[d, d]``, any real dtype.
        weight: ``W``, ``[d, m]``: what each input position adds to each output.
        unit_of: integers ``[d]``: the unit that each position belongs to, negative for none.
        units: Number of units; one more than the largest in ``unit_of`` by default.

    Returns:
        ``C``, float64 ``[units, units]``, symmetric. The contributions of several readers add up.
    """
    count = int(unit_of.max(initial=-1)) + 1 if units is None else units
    total = np.zeros((count, count))
    order = np.argsort(unit_of, kind="stable")
    order = order[unit_of[order] >= 0]
    if not order.size:
        return total
    owner = unit_of[order]
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    rows = np.asarray(weight, dtype=np.float64)[order]
    step = max(1, BLOCK // len(order))
    for start in range(0, len(order), step):
        here = slice(start, start + step)
        product = rows[here] @ rows.T
        product *= gram[np.ix_(order[here], order)]
        np.add.at(
            total, (owner[here][:, None], owner[starts][None, :]), np.add.reduceat(product, starts, axis=1)
        )
    return np.asarray((total + total.T) / 2)


def thinet(C: Matrix) -> tuple[npt.NDArray[np.int64], Vector]:
    """Greedy removal by first-order reconstruction: each time the unit that leaves the least error.

    The error of leaving out S is ``1_S^T C 1_S``; nothing is refitted (Luo et al., ThiNet, 2017, section 3.2, where
    the same greedy set is built from sampled outputs). Removing i as well adds ``C_ii + 2 sum_{j in S} C_ij``, of
    which the sums are kept, so that all removals together take O(u^2).

    Args:
        C: The contributions' Gram matrix, ``[u, u]``, symmetric.

    Returns:
        The units in the order of removal, ``[u]``, and the error when the first k + 1 of them are gone, ``[u]``.
        It need not rise: units that cancel each other cost nothing together.
    """
    count = len(C)
    order = np.zeros(count, dtype=np.int64)
    errors = np.zeros(count)
    added = np.diagonal(C).astype(np.float64, copy=True)
    error = 0.0
    for step in range(count):
        unit = int(np.argmin(added))
        error += float(added[unit])
        order[step], errors[step] = unit, error
        added += 2 * C[unit]
        added[unit] = np.inf
    return order, np.maximum(errors, 0)


class Knot(NamedTuple):
    """A point of the LASSO path; between two of them the scales are linear in the penalty.

    Attributes:
        penalty: Weight of the 1-norm.
        scales: The solution there, float64 ``[u]``.
        active: Units whose scale is not zero just below this penalty.
    """

    penalty: float
    scales: Vector
    active: list[int]


def lasso_knots(C: Matrix) -> Iterator[Knot]:
    """All solutions of ``min_b (1 - b)^T C (1 - b) + penalty * |b|_1``, from the penalty that keeps no unit downwards.

    The path is followed from knot to knot (Osborne, Presnell and Turlach, 2000; Efron et al., Least Angle Regression,
    2004, section 3.1): a unit comes in where its correlation with the residual reaches half the penalty, and goes out
    where its scale reaches zero. Coordinate descent on a grid of penalties takes hundreds of sweeps a point here:
    what channels contribute behind a ReLU has one mean in common. Units that are linear combinations of active ones
    are passed over. O(u^2) a knot.

    Args:
        C: The contributions' Gram matrix, ``[u, u]``, symmetric, positive semidefinite.

    Yields:
        Knots, down to ``LAST_PENALTY`` of the first penalty.
    """
    count = len(C)
    residual = C.sum(axis=1)
    half = float(np.abs(residual).max(initial=0.0))
    last = LAST_PENALTY * half
    if not half > 0:
        return
    system = _ActiveSystem(C)
    scales = np.zeros(count)
    dependent = np.diagonal(C) <= 0
    entering: int | None = int(np.argmax(np.where(dependent, -1.0, np.abs(residual))))
    left: int | None = None
    for _ in range(MAX_KNOTS * count):
        if entering is not None and not system.add(entering, float(np.sign(residual[entering]))):
            dependent[entering] = True
        yield Knot(2 * half, scales.copy(), list(system.units))
        if half <= last:
            return
        active, signs = np.array(system.units, dtype=np.int64), np.array(system.signs)
        direction = np.zeros(count)
        direction[active] = system.inverse @ signs
        slope = C @ direction

        inside = np.zeros(count, dtype=bool)
        inside[active] = True
        with np.errstate(divide="ignore", invalid="ignore"):
            above, below = (half - residual) / (1 - slope), (half + residual) / (1 + slope)
            out = -scales / direction
        if left is not None:  # at the border, on its way inwards
            (above if residual[left] > 0 else below)[left] = np.inf
        joins = np.minimum(_positive(above, 1 - slope), _positive(below, 1 + slope))
        joins[inside | dependent] = np.inf
        drops = np.where(inside & (np.sign(direction) * _sign_of(active, signs, count) < 0), out, np.inf)
        entering = left = None
        step = half - last
        if joins.min() < step:
            entering, step = int(np.argmin(joins)), float(joins.min())
        if drops.min() <= step:
            entering, left, step = None, int(np.argmin(drops)), max(0.0, float(drops.min()))
        scales += step * direction
        half -= step
        if left is not None:
            scales[left] = 0.0
            system.drop(left)
            dependent = np.diagonal(C) <= 0
        residual = C @ (1 - scales)


def lasso_path(C: Matrix) -> Vector:
    """LASSO channel selection: how large a penalty each unit withstands.

    A unit's score is the largest penalty at which its scale is not zero in
    ``min_b (1 - b)^T C (1 - b) + penalty * |b|_1`` (He et al., Channel Pruning, 2017, section 3.1, who raise the
    penalty until few enough channels are left). Units that are not in at the end of the path score by their
    correlation with the residual there, which is what would bring them in; a unit that is a linear combination of
    active ones scores zero.

    Args:
        C: The contributions' Gram matrix, ``[u, u]``, symmetric, positive semidefinite.

    Returns:
        Scores, float64 ``[u]``, at least 0.
    """
    entered = np.zeros(len(C))
    knot = None
    for knot in lasso_knots(C):
        came = np.array([unit for unit in knot.active if not entered[unit]], dtype=np.int64)
        entered[came] = knot.penalty
    if knot is not None:
        residual = 2 * np.abs(C @ (1 - knot.scales))
        # Tied with the penalty without being in: linear combinations of units that are.
        outside = (entered == 0) & (residual < knot.penalty * (1 - 1e-6))
        entered[outside] = residual[outside]
    return entered


class _ActiveSystem:
    """The inverse of ``C`` on the active units, kept up to date as they come and go."""

    def __init__(self, C: Matrix) -> None:
        self._C = C
        self._age = 0
        self.units: list[int] = []
        self.signs: list[float] = []
        self.inverse: Matrix = np.zeros((0, 0))

    def add(self, unit: int, sign: float) -> bool:
        """Add a unit; False, and nothing added, if it is a linear combination of those that are there."""
        self._refresh()
        column = self._C[self.units, unit]
        towards = self.inverse @ column
        rest = float(self._C[unit, unit] - column @ towards)
        if rest <= DEPENDENT * self._C[unit, unit]:
            return False
        count = len(self.units)
        grown = np.empty((count + 1, count + 1))
        np.outer(towards, towards / rest, out=grown[:count, :count])
        grown[:count, :count] += self.inverse
        grown[:count, count] = grown[count, :count] = -towards / rest
        grown[count, count] = 1 / rest
        self.inverse = grown
        self.units.append(unit)
        self.signs.append(sign)
        return True

    def drop(self, unit: int) -> None:
        """Take a unit out."""
        index = self.units.index(unit)
        kept = np.delete(np.arange(len(self.units)), index)
        column = self.inverse[kept, index]
        shrunk = self.inverse[np.ix_(kept, kept)]
        shrunk -= np.outer(column, column / self.inverse[index, index])
        self.inverse = shrunk
        del self.units[index], self.signs[index]

    def _refresh(self) -> None:
        """Work the inverse out anew from time to time: rounding errors add up."""
        self._age += 1
        if self._age % REFRESH == 0 and self.units:
            # Not by Cholesky: a Gram matrix summed in float32 may be indefinite by a rounding error.
            self.inverse = np.asarray(
                np.linalg.inv(self._C[np.ix_(self.units, self.units)]), dtype=np.float64
            )


def _positive(step: Vector, denominator: Vector) -> Vector:
    """Steps forward; rounding may put a tie a little behind."""
    return np.asarray(np.where(denominator > 0, np.maximum(step, 0.0), np.inf))


def _sign_of(active: npt.NDArray[np.int64], signs: Vector, count: int) -> Vector:
    spread = np.zeros(count)
    spread[active] = signs
    return spread
