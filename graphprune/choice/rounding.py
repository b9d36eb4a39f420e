"""Rounding: which sizes a group may be left with."""

from __future__ import annotations

from math import ceil

import numpy as np
import numpy.typing as npt

from graphprune.axes.groups import Group

#: Groups of at least this many labels are rounded by default.
ROUNDED_FROM = 32
#: To a multiple of this.
ROUND_TO = 8


def allowed_counts(group: Group, round_to: int | None, keep_at_least: float = 0.0) -> npt.NDArray[np.int64]:
    """What may stay of a group, in ``group.unit`` equal parts, ascending; all of it where nothing else may.

    What stays is a multiple of ``round_to`` labels; head dimensions are rounded head by head where a head is wide
    enough, else the whole width counts.
    """
    unit, size = group.unit, group.size
    row = max(len(block) for block in group.blocks)
    step = round_to if round_to is not None else (ROUND_TO if size >= ROUNDED_FROM else 1)
    width = row if row >= ROUNDED_FROM else size
    counts = np.arange(1, unit + 1, dtype=np.int64)
    least = ceil(keep_at_least * unit - 1e-9)
    fitting = counts[((counts * width // unit) % step == 0) & (counts >= least)]
    return fitting if len(fitting) else counts[-1:]


def nearest_count(allowed: npt.NDArray[np.int64], target: float) -> int:
    """The allowed count nearest to a target, the smaller of two."""
    return int(allowed[np.argmin(np.abs(allowed - target))])


def keep_count(group: Group, ratio: float, round_to: int | None) -> int:
    """How many of ``group.unit`` equal parts stay where a ratio goes."""
    if ratio == 0:
        return group.unit
    return nearest_count(allowed_counts(group, round_to), (1 - ratio) * group.unit)
