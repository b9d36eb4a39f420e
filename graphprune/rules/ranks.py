"""Where positions lie after pruning."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.axes.flow import Operand
from graphprune.errors import PlanError
from graphprune.rules.registry import Change

Index: TypeAlias = npt.NDArray[np.int64]


def ranks(change: Change, operand: Operand, axis: int) -> tuple[Index, npt.NDArray[np.bool_]]:
    """Where each position of an axis lies after pruning, and whether it is kept.

    Returns:
        int64 and bool, ``[rows, size of the axis]``: one row where all rows of the axis keep the same positions, else
        one for each row that does not vanish as a whole.
    """
    mask = change.kept(operand)
    if mask.shape[axis] == 1:
        size = change.old(operand)[axis]
        return np.arange(size)[None], np.ones((1, size), dtype=bool)
    others = tuple(a for a in range(mask.ndim) if a != axis)
    there = np.asarray(mask.any(axis=others))
    if there.sum() == change.new(operand)[axis]:  # no row lacks a position that another keeps
        rows = there[None]
    else:
        rows = np.moveaxis(mask, axis, -1).reshape(-1, mask.shape[axis])
        rows = rows[rows.any(axis=1)]
    before: Index = np.cumsum(rows, axis=1, dtype=np.int64) - rows.astype(np.int64)
    return before, rows


def prefix(change: Change, operand: Operand, axis: int, stop: int) -> int:
    """How many of the first ``stop`` positions of an axis are kept; the same in every row."""
    before, kept = ranks(change, operand, axis)
    counts = (before + kept)[:, stop - 1] if stop else np.zeros(1, dtype=np.int64)
    if (counts != counts[0]).any():
        raise PlanError(f"{change.op.name!r}: the rows of axis {axis} keep different numbers before {stop}")
    return int(counts[0])
