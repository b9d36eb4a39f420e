"""Tensors as functions of Gaussian channels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.kernels import gaussian

Array: TypeAlias = npt.NDArray[Any]
Float64: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

#: Covariances are held for so many channels at most: a square matrix each.
MAX_CHANNELS = 4096


@dataclass(frozen=True, eq=False)
class Channels:
    """Gaussian channels.

    Attributes:
        mean: ``[c]``.
        covariance: ``[c, c]``.
        known: bool ``[c]``; True where the mean follows from stored statistics, not from assumptions.
    """

    mean: Float64
    covariance: Float64
    known: npt.NDArray[np.bool_]

    @cached_property
    def deviation(self) -> Float64:
        """``[c]``."""
        return np.sqrt(np.maximum(np.diagonal(self.covariance), 0.0))

    @cached_property
    def correlation(self) -> Float64:
        """``[c, c]``; a channel that is constant correlates with none."""
        inverse = np.where(self.deviation > 0, 1 / np.where(self.deviation > 0, self.deviation, 1), 0.0)
        return np.asarray(self.covariance * inverse[:, None] * inverse)


@dataclass(frozen=True, eq=False)
class Signal:
    """A tensor as a function of Gaussian channels.

    Attributes:
        base: The channels.
        axis: The axis of the tensor along which they lie.
        channel: int ``[size of the axis]``; the channel at each position.
        place: int ``[size of the axis]``; positions of one channel differ in it, where the axis was joined with others.
        values: The function on the quadrature nodes, ``[c, nodes]``; None for the channels themselves.
    """

    base: Channels
    axis: int
    channel: Ints
    place: Ints
    values: Float64 | None = field(default=None, repr=False)

    @staticmethod
    def of(base: Channels, axis: int) -> Signal:
        """The channels themselves, one at each position."""
        size = len(base.mean)
        return Signal(base, axis, np.arange(size), np.zeros(size, dtype=np.int64))

    @cached_property
    def moments(self) -> Channels:
        """Mean and covariance of the function."""
        if self.values is None:
            return self.base
        return Channels(
            gaussian.expectation(self.values),
            gaussian.covariance(self.values, self.base.correlation),
            self.base.known,
        )

    @property
    def on_nodes(self) -> Float64:
        """``[c, nodes]``."""
        if self.values is not None:
            return self.values
        return gaussian.on_nodes(self.base.mean, self.base.deviation)

    @property
    def plain(self) -> bool:
        """True if every position along the axis is a channel of its own, in order."""
        return np.array_equal(self.channel, np.arange(len(self.base.mean)))
