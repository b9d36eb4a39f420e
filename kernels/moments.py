"""Moments of features, gathered in a stream: what first-order criteria read of activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

#: Rows that are raised to float64 at a time.
ROWS = 4096


class FeatureMoments:
    """Sums over samples of x, ``|x|``, x squared and ``x != 0``, feature by feature, in float64.

    As in :class:`graphprune.kernels.gram.GramAccumulator`, x is shifted by the mean of the first block before it is
    squared, so that a mean much larger than the deviation does not drown the variance.

    Args:
        features: ``d``, length of a sample.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self._at = np.zeros(features)  # what x is shifted by
        self._sum, self._squares = np.zeros(features), np.zeros(features)  # of x, shifted
        self._absolute = np.zeros(features)
        self._non_zero = np.zeros(features, dtype=np.int64)

    def add(self, x: npt.NDArray[Any]) -> None:
        """Adds samples.

        Args:
            x: ``[n, d]``, any real dtype.

        Raises:
            ValueError: The shape does not fit.
        """
        if x.ndim != 2 or x.shape[1] != len(self._at):
            raise ValueError(f"samples of shape {x.shape} where [n, {len(self._at)}] is gathered")
        for start in range(0, len(x), ROWS):
            block = x[start : start + ROWS].astype(np.float64)
            if not self.count:
                self._at = block.mean(axis=0)
            self.count += len(block)
            self._absolute += np.abs(block).sum(axis=0)
            self._non_zero += np.count_nonzero(block, axis=0)
            block -= self._at
            self._sum += block.sum(axis=0)
            self._squares += np.square(block).sum(axis=0)

    def _mean_of(self, total: npt.NDArray[Any]) -> Float64:
        return np.asarray(total / max(self.count, 1), dtype=np.float64)

    @property
    def mean(self) -> Float64:
        """``[d]`` mean of x; zeros if nothing was seen, as of all that follows."""
        return self._mean_of(self._sum + self.count * self._at)

    @property
    def mean_absolute(self) -> Float64:
        """``[d]`` mean of ``|x|``."""
        return self._mean_of(self._absolute)

    @property
    def mean_square(self) -> Float64:
        """``[d]`` mean of x squared."""
        return np.asarray(self.variance + np.square(self.mean))

    @property
    def variance(self) -> Float64:
        """``[d]`` mean square of the deviation of x from its mean."""
        return np.asarray(np.maximum(self._mean_of(self._squares) - np.square(self._mean_of(self._sum)), 0.0))

    @property
    def zeros(self) -> Float64:
        """``[d]`` the part of the samples in which x is exactly zero."""
        return self._mean_of(self.count - self._non_zero)
