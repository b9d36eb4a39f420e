"""Channel permutations for N:M sparsity: which columns share a stripe of M, so that most magnitude is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Order = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float32]
Progress = Callable[[float], None]

#: A table of swaps takes at most so many comparisons to fill (columns x columns x rows): what a second of one core does
#: about fifteen times. Wider matrices are searched in random blocks of their stripes.
TABLE_WORK = 1 << 26
#: No block is narrower than this many stripes.
LEAST_STRIPES = 8
#: Of taller matrices swaps are first looked for on so many rows, drawn anew for each block, and made if they gain on
#: all rows; where fewer than a fraction of them do, on four times as many.
SAMPLED_ROWS = 256
LEAST_GAINING = 0.25
#: Part of the time after which nothing is disturbed any more, and what is left is greedy.
COOLING = 0.9
#: Temperature of the annealing at its begin and its end, in units of the mean loss of a random swap.
HOT, COLD = 0.15, 0.02
#: One stripe of so many takes part in a random swap at a time.
CALM = 8
#: Swaps that gain less than this fraction of what is kept are rounding.
ROUNDING = 1e-7


def comparators(m: int) -> list[tuple[int, int]]:
    """Pairs of a sorting network on ``m`` values (Batcher, Sorting Networks and Their Applications, 1968).

    >>> comparators(4)
    [(0, 1), (2, 3), (0, 2), (1, 3), (1, 2)]
    """
    pairs: list[tuple[int, int]] = []
    p = 1
    while p < m:
        k = p
        while k >= 1:
            for j in range(k % p, m - k, 2 * k):
                pairs += [
                    (i + j, i + j + k)
                    for i in range(min(k, m - j - k))
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p)
                ]
            k //= 2
        p *= 2
    return pairs


def _sorted_members(members: Matrix) -> Matrix:
    """Sort ``[stripes, m, rows]`` along its middle axis, descending, in place."""
    for i, j in comparators(members.shape[1]):
        low = np.minimum(members[:, i], members[:, j])
        np.maximum(members[:, i], members[:, j], out=members[:, i])
        members[:, j] = low
    return members


def kept_by_stripe(columns: Matrix, n: int) -> npt.NDArray[np.float64]:
    """What each stripe keeps: the sum over rows of its ``n`` largest values.

    Args:
        columns: Magnitudes, float32 ``[stripes, m, rows]``.
        n: How many stay.

    Returns:
        float64 ``[stripes]``.
    """
    largest = _sorted_members(columns.copy())[:, :n]
    kept: npt.NDArray[np.float64] = largest.sum(axis=(1, 2), dtype=np.float64)
    return kept


def kept_of(columns: Matrix, stripes: Order, n: int) -> npt.NDArray[np.float64]:
    """What stripes keep; a few at a time, so that little is copied.

    Args:
        columns: Magnitudes, float32 ``[columns, rows]``.
        stripes: The columns of each stripe, int64 ``[stripes, m]``.
        n: How many stay.

    Returns:
        float64 ``[stripes]``.
    """
    step = max(1, (1 << 18) // max(stripes.shape[1] * columns.shape[1], 1))
    parts = [kept_by_stripe(columns[stripes[at : at + step]], n) for at in range(0, len(stripes), step)]
    return np.concatenate([np.zeros(0), *parts])


@dataclass
class _Limit:
    """When a search ends: by the clock, by the number of rounds, or by whichever comes first."""

    seconds: float | None
    sweeps: int | None
    start: float
    done: int = 0

    @property
    def fraction(self) -> float:
        """How much of what may be spent is spent."""
        parts = [0.0]
        if self.seconds is not None:
            parts.append((time.perf_counter() - self.start) / max(self.seconds, 1e-9))
        if self.sweeps is not None:
            parts.append(self.done / max(self.sweeps, 1))
        return max(parts)


class _Block:
    """Some stripes of a matrix, and a table that prices every swap of two of their columns.

    Where column x takes slot j of a stripe, the stripe keeps the n - 1 largest of its other members, and the larger
    of x and the n-th largest of them, row by row. ``table[slot, x]`` is the sum of that last term over rows, so that
    swapping the columns x, y of the slots a, b gains ``table[a, y] + table[b, x] - table[a, x] - table[b, y]``.
    """

    def __init__(self, columns: Matrix, n: int, m: int, rows: Order | None = None) -> None:
        """Price all swaps.

        Args:
            columns: Magnitudes, float32 ``[columns, rows]``.
            n, m: The pattern.
            rows: Those that the table is made of; each swap is then also tried on all rows before it is made.
        """
        self._columns = columns if rows is None else np.ascontiguousarray(columns[:, rows])
        self._all = None if rows is None else columns
        self._n, self._m = n, m
        self.order: Order = np.arange(len(columns))
        #: Swaps that the table proposed, and those of them that gained on all rows.
        self.proposed = self.made = 0
        self._ones = np.ones(self._columns.shape[1], dtype=np.float32)
        self._table = np.empty((len(columns), len(columns)), dtype=np.float32)
        self._stripe = self.order // m
        same = self._stripe[:, None] == self._stripe
        self._barred = np.where(same, np.float32(-np.inf), np.float32(0))
        self._step = max(1, (1 << 18) // self._columns.size)
        self._price(np.arange(len(columns) // m))

    def _price(self, stripes: Order) -> None:
        """Fill the table's rows of some stripes."""
        members = self._columns[self.order.reshape(-1, self._m)[stripes]]
        ranked = _sorted_members(members.copy())
        least, next_one = ranked[:, self._n - 1 : self._n], ranked[:, self._n : self._n + 1]
        # Without a member that is kept the next one moves up.
        bar = np.where(members >= least, next_one, least).reshape(-1, members.shape[2])
        slots = (stripes[:, None] * self._m + np.arange(self._m)).ravel()
        for at in range(0, len(slots), self._step):
            part = slice(at, at + self._step)
            larger = np.maximum(bar[part, None, :], self._columns[None])
            self._table[slots[part]] = larger @ self._ones

    def gains(self) -> Matrix:
        """What each swap of two slots gains, float32 ``[slots, slots]``; minus infinity within a stripe."""
        placed = self._table[:, self.order]
        now = placed.diagonal()
        gains: Matrix = placed + placed.T
        gains -= now[:, None]
        gains -= now
        gains += self._barred
        return gains

    def swap(self, pairs: list[tuple[int, int]]) -> None:
        """Swap the columns of pairs of slots, of which no two lie in one stripe."""
        a, b = np.asarray(pairs, dtype=np.int64).T
        self.order[a], self.order[b] = self.order[b], self.order[a]
        stripes = np.concatenate([self._stripe[a], self._stripe[b]])
        self._price(stripes)
        if self._all is not None:  # what was refused may gain now
            slots = (stripes[:, None] * self._m + np.arange(self._m)).ravel()
            self._barred[slots] = 0
            self._barred[:, slots] = 0
            for stripe in stripes.tolist():
                here = slice(stripe * self._m, (stripe + 1) * self._m)
                self._barred[here, here] = -np.inf

    def best(self, scores: Matrix, above: float, most: int) -> list[tuple[int, int]]:
        """At most ``most`` of the pairs of slots that score highest, each stripe in one pair at most."""
        mates = scores.argmax(axis=1)
        tops = scores[np.arange(len(scores)), mates]
        chosen: list[tuple[int, int]] = []
        taken = np.zeros(len(scores) // self._m, dtype=bool)
        for slot in np.argsort(-tops, kind="stable").tolist():
            if not tops[slot] > above or len(chosen) == most:
                break
            here, there = self._stripe[slot], self._stripe[mates[slot]]
            if not (taken[here] or taken[there]):
                taken[here] = taken[there] = True
                chosen.append((slot, int(mates[slot])))
        return chosen

    def improve(self, over: Callable[[], bool]) -> int:
        """Swap while that gains, the best swaps first; returns the number of swaps."""
        least = max(float(self._table.diagonal().sum()), 1e-30) * ROUNDING
        while not over():
            pairs = self.best(self.gains(), least, len(self.order))
            if not pairs:
                break
            self.proposed += len(pairs)
            if self._all is not None:
                pairs = self._that_gain(pairs, self._all)
            if pairs:
                self.swap(pairs)
            self.made += len(pairs)
        return self.made

    def _that_gain(self, pairs: list[tuple[int, int]], columns: Matrix) -> list[tuple[int, int]]:
        """Those swaps that gain on all rows; the others are barred until one of their stripes changes."""
        slots = np.asarray(pairs, dtype=np.int64)
        order = self.order.copy()
        order[slots[:, 0]], order[slots[:, 1]] = self.order[slots[:, 1]], self.order[slots[:, 0]]
        stripes = self._stripe[slots].ravel()
        before, after = (
            kept_of(columns, each.reshape(-1, self._m)[stripes], self._n) for each in (self.order, order)
        )
        gains = (after - before).reshape(-1, 2).sum(axis=1) > ROUNDING * before.reshape(-1, 2).sum(axis=1)
        refused = slots[~gains]
        self._barred[refused[:, 0], refused[:, 1]] = self._barred[refused[:, 1], refused[:, 0]] = -np.inf
        return [pair for pair, gain in zip(pairs, gains.tolist(), strict=True) if gain]

    def disturb(self, heat: float, random: np.random.Generator) -> None:
        """Swap at random, the more likely the less it loses.

        Each slot draws its partner, or stays, with probability proportional to ``exp(gain / temperature)`` (the
        Gumbel-max trick); of swaps that meet in a stripe the one with the highest draw is made.
        """
        gains = self.gains()
        loss = -float(gains.sum(where=self._barred == 0)) / max(int((self._barred == 0).sum()), 1)
        if not loss > 0:
            return
        gains /= np.float32(heat * loss)
        gains -= np.log(random.standard_exponential(gains.shape, dtype=np.float32) + np.float32(1e-30))
        stay = -float(np.log(random.standard_exponential() + 1e-30))
        pairs = self.best(gains, stay, max(1, len(self.order) // self._m // CALM))
        if pairs:
            self.swap(pairs)


def search_permutation(
    matrix: npt.NDArray[Any],
    n: int,
    m: int,
    *,
    seconds: float | None = None,
    sweeps: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Order, float]:
    """Order columns so that the ``n`` largest of every ``m`` neighbours hold as much magnitude as possible.

    Maximises the sum over rows and stripes (``m`` consecutive columns) of the ``n`` largest magnitudes (Pool and Yu,
    Channel Permutations for N:M Sparsity, NeurIPS 2021, section 3). As there, columns are swapped greedily and the
    search escapes from where that ends; here a table prices all swaps at once (:class:`_Block`), as many are made at
    a time as touch different stripes, and the escape is annealing on the same table. Matrices too wide for one table
    are searched in random blocks of stripes, drawn anew in each sweep.

    Args:
        matrix: Real ``[rows, columns]``; magnitudes count, and need not be given. The number of columns is a multiple
            of ``m``.
        n, m: The pattern, ``1 <= n <= m``.
        seconds: Time limit. The search ends before where nothing is left to be tried.
        sweeps: Limit of the number of visits to every column: the result then depends on ``seed`` only. One of the two
            limits must be given.
        seed: For the choice of blocks and of random swaps.
        progress: Called with the fraction of the limit that is used up.

    Returns:
        ``order``, int64 ``[columns]``: the column that stands at each place; and what is then kept of the magnitude.
        It is never less than without a permutation.

    Raises:
        ValueError: The sizes do not fit the pattern, an element is not finite, or there is no limit.
    """
    columns = _columns(matrix, n, m)
    if seconds is None and sweeps is None:
        raise ValueError("give a limit: seconds, sweeps, or both")
    search = _Search(columns, n, m, _Limit(seconds, sweeps, time.perf_counter()), seed, progress)
    if n < m and columns.shape[0] > m and columns.shape[1]:
        search.run()
    return search.best, float(search.kept)


def _columns(matrix: npt.NDArray[Any], n: int, m: int) -> Matrix:
    if not 1 <= n <= m:
        raise ValueError(f"{n}:{m} is no pattern")
    if matrix.ndim != 2 or matrix.shape[1] % m:
        raise ValueError(f"a matrix of shape {matrix.shape} has no whole stripes of {m} columns")
    columns = np.ascontiguousarray(np.abs(np.asarray(matrix, dtype=np.float32)).T)
    if not np.isfinite(columns).all():
        raise ValueError("the matrix holds elements that are not finite")
    return columns


class _Search:
    """The state of one search: the order that it is at, and the best that it has seen."""

    def __init__(
        self, columns: Matrix, n: int, m: int, limit: _Limit, seed: int, progress: Progress | None
    ) -> None:
        self._columns = columns
        self._n, self._m = n, m
        self._limit = limit
        self._random = np.random.default_rng(seed)
        self._progress = progress
        self._order: Order = np.arange(len(columns))
        self.best: Order = self._order.copy()
        self.kept = self._keeps()
        self._whole: _Block | None = None
        self._held: Order = self._order

    def _over(self) -> bool:
        return self._limit.seconds is not None and self._limit.fraction >= 1

    def _keeps(self) -> float:
        return float(kept_of(self._columns, self._order.reshape(-1, self._m), self._n).sum())

    def run(self) -> None:
        """Improve until nothing does, then disturb and improve until the limit is reached."""
        rows = SAMPLED_ROWS
        while 2 * rows < self._columns.shape[1]:
            if not self._sampled_sweep(rows):
                rows *= 4
        while self._greedy_sweep():
            pass
        begin = self._limit.fraction
        while (spent := self._limit.fraction) < 1:
            along = (spent - begin) / max(COOLING - begin, 1e-9)
            if along < 1:
                self._annealing_sweep(HOT * (COLD / HOT) ** along)
            elif not self._greedy_sweep():
                break
        self._note()
        if self._progress is not None:
            self._progress(1.0)

    def _sampled_sweep(self, rows: int) -> bool:
        """Improve every block by what some rows propose; False where that is seldom right or the limit is reached."""
        proposed = made = 0

        def visit(block: _Block) -> None:
            nonlocal proposed, made
            block.improve(self._over)
            proposed, made = proposed + block.proposed, made + block.made

        self._sweep(visit, rows)
        self._note()
        return made > LEAST_GAINING * proposed and self._limit.fraction < 1

    def _greedy_sweep(self) -> bool:
        """Improve every block; False where no swap gained or the limit is reached."""
        made = 0

        def visit(block: _Block) -> None:
            nonlocal made
            before = block.made
            made += block.improve(self._over) - before

        self._sweep(visit)
        self._note()
        return made > 0 and self._limit.fraction < 1

    def _annealing_sweep(self, heat: float) -> None:
        def visit(block: _Block) -> None:
            for _ in range(CALM):
                if self._over():
                    break
                block.disturb(heat, self._random)

        self._sweep(visit)

    def _sweep(self, visit: Callable[[_Block], None], sampled: int | None = None) -> None:
        """Visit all stripes, block by block."""
        height = self._columns.shape[1]
        count = len(self._order) // self._m
        width = int((TABLE_WORK / max(sampled or height, 1)) ** 0.5) // self._m
        width = min(max(width, LEAST_STRIPES), count)
        if width == count and sampled is None:
            if self._whole is None:
                held = self._order
                self._whole = _Block(self._columns[held], self._n, self._m)
                self._held = held
            visit(self._whole)
            self._order = self._held[self._whole.order]
        else:
            for stripes in np.array_split(self._random.permutation(count), -(-count // width)):
                if self._over():
                    break
                places = (stripes[:, None] * self._m + np.arange(self._m)).ravel()
                held = self._order[places]
                rows = None if sampled is None else np.sort(self._random.permutation(height)[:sampled])
                block = _Block(self._columns[held], self._n, self._m, rows)
                visit(block)
                self._order[places] = held[block.order]
                if self._progress is not None:
                    self._progress(min(self._limit.fraction, 1.0))
        self._limit.done += 1
        if self._progress is not None:
            self._progress(min(self._limit.fraction, 1.0))

    def _note(self) -> None:
        """Remember the order if it is the best so far."""
        kept = self._keeps()
        if kept > self.kept:
            self.best, self.kept = self._order.copy(), kept
