"""Structured optimal brain surgeon: what to remove when the rest is corrected for it.

A linear map ``y = x W`` with Gram matrix H of its inputs loses the inputs S. If the remaining weights are corrected in
the best way, the output changes by (Hassibi and Stork, Second order derivatives for network pruning, NeurIPS 1992, for
one weight; Kurtic, Frantar and Alistarh, ZipLM, NeurIPS 2023, section 3, for structures)::

    error(S) = tr(W_S^T ([H^-1]_SS)^-1 W_S)

and after it, with P the inverse of H::

    W <- W - P_:S (P_SS)^-1 W_S        P <- P - P_:S (P_SS)^-1 P_S:

A *unit* (a channel, a head, a hidden unit) is read by several maps, its *readers*, and owns some inputs of each; its
cost is the sum over them. The greedy removal takes the cheapest unit, updates, and goes on.

Updating P for each unit is bound by memory, so large groups go in rounds. A round takes a *pool* of the cheapest units,
and within it removes one at a time, with exact costs: the rows of W and P that belong to the pool are enough for that.
Then all of P is updated at once. The costs of units outside the pool are those at the beginning of the round; since
removing hardly ever makes another unit cheaper (as in Minoux, Accelerated greedy algorithms, 1978, where it never
does), a round ends when the pool's cheapest costs more than the cheapest outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from graphprune.kernels.gram import damped_factor

Float64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer[Any]]

#: Rounds that a removal takes about, where units are many.
ROUNDS = 96
#: Units in a pool for each that a round may remove.
POOL = 3
#: Features whose removal is pending before an inverse is brought up to date.
PENDING = 256
#: Rows of removed features are dropped once fewer than this part are left.
COMPACT = 0.85
#: Damping below which an inverse in float64 is not to be trusted.
LEAST_DAMPING = 1e-9


@dataclass(frozen=True)
class Reader:
    """A linear map that reads units.

    Where its bias can take up a change of the mean, ``gram`` is of the inputs less their means, and the errors are
    those with the best bias.
    """

    gram: Floats  #: [d, d] Gram matrix of its inputs
    weight: Floats  #: [d, m]
    features: Sequence[Ints]  #: one a unit: the inputs that it owns, possibly none; no input has two owners
    scale: float = 1.0  #: of its error in the sum over readers, such as one over the energy of its outputs


@dataclass(frozen=True)
class Removal:
    """Units in the order in which they were removed, and what it cost."""

    order: npt.NDArray[np.int64]  #: [removed]
    errors: Float64  #: [removed] scaled error of all readers together after each removal; never decreases
    #: for each number of units wanted in ``weights_at``: the units kept, and each reader's corrected weight, with the
    #: rows of all features that were not removed, in their order
    weights: list[tuple[npt.NDArray[np.int64], list[Float64]]] = field(default_factory=list)


def remove_greedily(
    readers: Sequence[Reader],
    keep: int,
    *,
    blocks: Sequence[Ints] | None = None,
    batch: int | None = None,
    weights_at: Sequence[int] = (),
    damping: float = 0.0,
) -> Removal:
    """Removes the unit that costs least after the best correction of the rest, again and again.

    Args:
        readers: The maps that read the units; all with as many ``features``.
        keep: Units to be left, or a few less than one for each block more.
        blocks: Units that must lose equally many: each step removes one of each block, in their order. Units in no
            block stay. By default one block with all of them.
        batch: Steps a round takes at most; 1 is the plain greedy removal. By default such that `ROUNDS` rounds do.
        weights_at: Numbers of units at which corrected weights are wanted.
        damping: Added to the diagonal of each Gram matrix, in units of its mean; `LEAST_DAMPING` is the least.

    Returns:
        The order, the errors and the weights.

    Raises:
        ValueError: The arguments do not fit each other, or a number in them is not finite.
    """
    units = _units(readers)
    blocks = [np.arange(units)] if blocks is None else [np.asarray(block, dtype=np.int64) for block in blocks]
    steps = _steps(units, keep, blocks)
    total = steps * len(blocks)
    for count in weights_at:
        if not units - total <= count <= units:
            raise ValueError(f"weights are wanted at {count} units, and {units - total} to {units} are left")
    if batch is None:
        batch = 1 if total <= ROUNDS else max(2, -(-steps // ROUNDS))
    block_of = np.full(units, -1)
    for number, block in enumerate(blocks):
        block_of[block] = number
    states = [_State.of(reader, damping) for reader in readers]
    if batch == 1:
        order, costs = _one_by_one(states, block_of, steps, [np.inf] * len(blocks))
    else:
        order, costs = _in_rounds(states, block_of, steps, len(blocks), batch)
    removal = Removal(np.array(order, dtype=np.int64), np.cumsum(np.array(costs, dtype=np.float64)))
    for count in weights_at:
        gone = removal.order[: units - count]
        weights = [corrected_weight(reader, gone, damping=damping) for reader in readers]
        removal.weights.append((np.setdiff1d(np.arange(units), gone), weights))
    return removal


def reconstruction_error(readers: Sequence[Reader], removed: Ints, *, damping: float = 0.0) -> float:
    """Scaled error of all readers together once units are removed and the rest is corrected in the best way.

    Computed from the Gram matrices, not from their inverses: ``tr(W_S^T (H_SS - H_SK H_KK^-1 H_KS) W_S)`` with K what
    is kept.
    """
    total = 0.0
    for reader in readers:
        gone, kept = _split(reader, removed)
        if not len(gone) or not reader.gram.any():
            continue
        damped = _damped(reader, damping)
        weight = reader.weight[gone].astype(np.float64)
        weight[reader.gram.diagonal()[gone] <= 0] = 0.0
        schur = damped[np.ix_(gone, gone)]
        if len(kept):
            cross = damped[np.ix_(kept, gone)]
            solved = scipy.linalg.solve(damped[np.ix_(kept, kept)], cross, assume_a="pos", check_finite=False)
            schur = schur - cross.T @ solved
        total += reader.scale * max(0.0, float(np.sum(weight * (schur @ weight))))
    return total


def corrected_weight(reader: Reader, removed: Ints, *, damping: float = 0.0) -> Float64:
    """``[kept, m]`` the best weight of a reader once units are removed: ``W_K + H_KK^-1 H_KS W_S``.

    Rows are the features that were not removed, in their order.
    """
    gone, kept = _split(reader, removed)
    weight = reader.weight[kept].astype(np.float64)
    if not len(gone) or not len(kept) or not reader.gram.any():
        return weight
    damped = _damped(reader, damping)
    lost = damped[np.ix_(kept, gone)] @ reader.weight[gone].astype(np.float64)
    weight += scipy.linalg.solve(damped[np.ix_(kept, kept)], lost, assume_a="pos", check_finite=False)
    return weight


def _units(readers: Sequence[Reader]) -> int:
    """Number of units, once the readers agree on it."""
    if not readers or len(readers[0].features) == 0:
        raise ValueError("no reader, or no unit that it reads: nothing to choose by")
    units = len(readers[0].features)
    for reader in readers:
        d = len(reader.gram)
        if reader.gram.shape != (d, d) or len(reader.weight) != d or len(reader.features) != units:
            raise ValueError(
                f"a Gram matrix of shape {reader.gram.shape}, a weight of shape {reader.weight.shape} and features of "
                f"{len(reader.features)} units (others: {units}) do not fit"
            )
        owned = np.concatenate([np.asarray(part, dtype=np.int64) for part in reader.features])
        if len(np.unique(owned)) < len(owned) or (len(owned) and not 0 <= owned.min() <= owned.max() < d):
            raise ValueError(f"features must have one owner each and lie in 0 to {d - 1}")
        if not np.isfinite(reader.weight).all() or not reader.scale >= 0:
            raise ValueError("a weight that is not finite, or a scale below zero")
    return units


def _steps(units: int, keep: int, blocks: Sequence[Ints]) -> int:
    """How often each block loses a unit."""
    members = np.concatenate(list(blocks)) if blocks else np.zeros(0, dtype=np.int64)
    if len(np.unique(members)) < len(members) or (
        len(members) and not 0 <= members.min() <= members.max() < units
    ):
        raise ValueError(f"blocks must share no unit and lie in 0 to {units - 1}")
    if not 0 <= keep <= units:
        raise ValueError(f"{keep} of {units} units to be kept")
    steps = -(-(units - keep) // max(1, len(blocks)))
    if steps > min((len(block) for block in blocks), default=0):
        raise ValueError(f"{keep} of {units} units to be kept, but the blocks do not allow it")
    return steps


def _damped(reader: Reader, damping: float) -> Float64:
    """The Gram matrix with the penalty that `_State` uses too."""
    _, penalty = damped_factor(reader.gram.astype(np.float64, copy=False), max(damping, LEAST_DAMPING))
    damped = reader.gram.astype(np.float64)
    damped.flat[:: len(damped) + 1] += penalty
    return damped


def _split(reader: Reader, removed: Ints) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Features that go with the units, and those that stay."""
    gone = [np.asarray(reader.features[unit], dtype=np.int64) for unit in removed]
    rows = np.sort(np.concatenate(gone)) if gone else np.zeros(0, dtype=np.int64)
    return rows, np.setdiff1d(np.arange(len(reader.gram)), rows)


def _one_by_one(
    states: Sequence[_State], block_of: Ints, steps: int, outside: Sequence[float]
) -> tuple[list[int], list[float]]:
    """The plain greedy removal; the units (as places in ``block_of``) and what each cost.

    It ends before a step in which the cheapest of a block costs more than ``outside`` says, but not before the first.
    """
    units = np.arange(len(block_of))
    removed: list[int] = []
    spent: list[float] = []
    for step in range(steps):
        for block in range(len(outside)):
            costs = np.sum([state.costs() for state in states], axis=0)
            if step and not block:
                cheapest = [costs[block_of == each].min(initial=np.inf) for each in range(len(outside))]
                if any(inside > beyond for inside, beyond in zip(cheapest, outside, strict=True)):
                    return removed, spent
            members = np.flatnonzero(block_of == block)
            at = int(members[np.argmin(costs[members])])
            removed.append(int(units[at]))
            spent.append(float(costs[at]))
            for state in states:
                state.remove(np.array([at]))
            units, block_of = np.delete(units, at), np.delete(block_of, at)
    return removed, spent


def _in_rounds(
    states: Sequence[_State], block_of: Ints, steps: int, blocks: int, batch: int
) -> tuple[list[int], list[float]]:
    """The same in rounds of up to ``batch`` steps, each among the units that were cheapest at its beginning."""
    units = np.arange(len(block_of))
    removed: list[int] = []
    spent: list[float] = []
    while (left := steps - len(removed) // blocks) > 0:
        costs = np.sum([state.costs() for state in states], axis=0)
        pools, outside = [], []
        for block in range(blocks):
            members = np.flatnonzero(block_of == block)
            members = members[np.argsort(costs[members], kind="stable")]
            pools.append(members[: POOL * batch])
            outside.append(min(costs[members[POOL * batch :]], default=np.inf))
        pool = np.concatenate(pools)
        parts = [state.part(pool) for state in states]
        places, prices = _one_by_one(parts, block_of[pool], min(batch, left), outside)
        gone = pool[places]
        removed += units[gone].tolist()
        spent += prices
        for state in states:
            state.remove(gone)
        units, block_of = np.delete(units, gone), np.delete(block_of, gone)
    return removed, spent


class _State:
    """Inverse and corrected weight of one reader, restricted to the features that its remaining units own.

    Features without an owner are never removed, and their rows are needed by none of the formulas. The inverse is
    ``inverse - pending^T pending``: a removal appends rows, and only many of them together are subtracted, at the full
    speed of a matrix product; until then the few entries that are looked at are put right one by one. Rows of removed
    features stay, unused, until they are many.
    """

    def __init__(self, inverse: Float64, weight: Float64, sizes: Ints) -> None:
        self.inverse = inverse  # [d, d]
        self.weight = weight  # [d, m] times the root of the scale
        self.sizes = sizes  # [units] features of each remaining unit
        self.starts = np.cumsum(sizes) - sizes  # [units] the first of them; the others follow it
        self.pending = np.empty((0, len(inverse)))  # [p, d], of which `filled` rows are meant
        self.filled = 0

    @classmethod
    def of(cls, reader: Reader, damping: float) -> _State:
        owned = np.concatenate([np.asarray(part, dtype=np.int64) for part in reader.features])
        sizes = np.array([len(part) for part in reader.features], dtype=np.int64)
        weight = np.sqrt(reader.scale) * reader.weight[owned].astype(np.float64)
        if (
            weight.shape[1] > weight.shape[0]
        ):  # errors are norms of sums of rows: a rotation of columns is free
            (triangle,) = scipy.linalg.qr(weight.T, mode="r", check_finite=False)
            weight = np.ascontiguousarray(triangle[: len(owned)].T)
        # Nothing is lost with inputs that are always zero, whatever the damping would charge for their weights.
        weight[reader.gram.diagonal()[owned] <= 0] = 0.0
        factor, _ = damped_factor(reader.gram.astype(np.float64, copy=False), max(damping, LEAST_DAMPING))
        inverse, _ = scipy.linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
        diagonal = inverse.diagonal().copy()
        inverse = inverse + inverse.T
        np.fill_diagonal(inverse, diagonal)
        if not np.array_equal(owned, np.arange(len(inverse))):
            inverse = inverse[np.ix_(owned, owned)]
        return cls(np.ascontiguousarray(inverse), weight, sizes)

    def costs(self) -> Float64:
        """``[units]`` what each would cost now."""
        costs = np.zeros(len(self.sizes))
        pending = self.pending[: self.filled].T
        for size in np.unique(self.sizes[self.sizes > 0]):
            units = np.flatnonzero(self.sizes == size)
            rows = self.starts[units][:, None] + np.arange(size)
            weight, late = self.weight[rows], pending[rows]
            if size == 1:
                own = self.inverse[rows[:, 0], rows[:, 0]] - np.einsum("nfp,nfp->n", late, late)
                costs[units] = np.einsum("nfm,nfm->n", weight, weight) / own
            else:
                block = self.inverse[rows[:, :, None], rows[:, None, :]] - late @ late.swapaxes(1, 2)
                costs[units] = np.sum(np.linalg.inv(block) * (weight @ weight.swapaxes(1, 2)), axis=(1, 2))
        return np.maximum(costs, 0.0)

    def part(self, units: Ints) -> _State:
        """The same for some of the units, in the order given: to remove among them, no more is needed."""
        rows = self._rows(units)
        late = self.pending[: self.filled, rows]
        return _State(self.inverse[np.ix_(rows, rows)] - late.T @ late, self.weight[rows], self.sizes[units])

    def remove(self, units: Ints) -> None:
        """Removes units (places among those that remain) and corrects the rest."""
        lost = int(self.sizes[units].sum())
        if self.filled + lost > len(self.pending):
            self._settle()
            self.pending = np.empty((max(PENDING, lost), len(self.inverse)))
        rows = self._rows(units)
        self.starts, self.sizes = np.delete(self.starts, units), np.delete(self.sizes, units)
        if not lost:
            return
        late = self.pending[: self.filled]
        cross = self.inverse[rows] - late[:, rows].T @ late
        factor, _ = damped_factor(cross[:, rows], 0.0)
        cross = scipy.linalg.solve_triangular(factor, cross, lower=True, check_finite=False)
        weight = scipy.linalg.solve_triangular(factor, self.weight[rows], lower=True, check_finite=False)
        self.weight = _less(self.weight, cross, weight)
        self.pending[self.filled : self.filled + lost] = cross
        self.filled += lost

    def _rows(self, units: Ints) -> npt.NDArray[np.int64]:
        """The features of units, unit by unit."""
        sizes = self.sizes[units]
        ends = np.cumsum(sizes)
        return np.repeat(self.starts[units] - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)

    def _settle(self) -> None:
        """Subtracts what is pending, and drops the rows of removed features."""
        self.inverse = _less(self.inverse, self.pending[: self.filled], self.pending[: self.filled])
        self.filled = 0
        rows = self._rows(np.arange(len(self.sizes)))
        if len(rows) < COMPACT * len(self.inverse):
            self.inverse, self.weight = self.inverse[np.ix_(rows, rows)], self.weight[rows]
            self.starts = np.cumsum(self.sizes) - self.sizes


def _less(matrix: Float64, left: Float64, right: Float64) -> Float64:
    """``matrix - left^T right``, in place."""
    if not matrix.size or not left.size:
        return matrix
    transposed = scipy.linalg.blas.dgemm(
        -1.0, right.T, left.T, beta=1.0, c=matrix.T, trans_b=True, overwrite_c=True
    )
    return np.asarray(transposed.T)
