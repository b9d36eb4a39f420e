"""Gram matrices: the sufficient statistics of least squares, gathered in a stream.

Whatever a linear map ``x @ W + b`` is fitted or pruned by depends on its inputs and wanted outputs only through sums of
x, y and their products; so activations are never kept.

Precision: products of a block of rows are formed in the block's own dtype (float32 for activations, at twice the
speed), blocks are bounded and added in float64; and both x and y are shifted by the mean of the first block before they
are multiplied (Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983), so that a mean
much larger than the deviation does not drown it. Sums of y squared are formed in float64 throughout: errors of fits are
small differences of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.linalg

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

#: Rows multiplied at a time: enough for BLAS to be at full speed, few enough for float32 sums to be good to six digits.
ROWS = 4096


@dataclass(frozen=True)
class Moments:
    """Sums over samples of products, of deviations from the mean when centred, raw when not."""

    count: int
    x: Float64  #: [d] mean of x when centred, zeros when not
    y: Float64  #: [m] mean of y when centred, zeros when not
    xx: Float64  #: [d, d] sum of x x^T
    xy: Float64  #: [d, m] sum of x y^T
    yy: Float64  #: [m] sum of y squared


class GramAccumulator:
    """Sums of x, y and their products over all samples seen.

    Args:
        features: ``d``, length of an input.
        outputs: ``m``, length of a wanted output; 0 if only inputs matter.
    """

    def __init__(self, features: int, outputs: int = 0) -> None:
        self.count = 0
        self._at_x, self._at_y = np.zeros(features), np.zeros(outputs)  # what x and y are shifted by
        self._x, self._y = np.zeros(features), np.zeros(outputs)
        self._xx, self._xy = np.zeros((features, features)), np.zeros((features, outputs))
        self._yy = np.zeros(outputs)

    @property
    def features(self) -> int:
        return len(self._x)

    @property
    def outputs(self) -> int:
        return len(self._y)

    def add(self, x: Array, y: Array | None = None) -> None:
        """Adds samples.

        Args:
            x: ``[n, d]``, float32 or float64, rows or columns contiguous.
            y: ``[n, m]``; None only where ``outputs`` is 0.

        Raises:
            ValueError: The shapes do not fit.
        """
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"inputs of shape {x.shape} where [n, {self.features}] is gathered")
        if (y is None) != (self.outputs == 0) or (y is not None and y.shape != (len(x), self.outputs)):
            shape = None if y is None else y.shape
            raise ValueError(f"outputs of shape {shape} where [{len(x)}, {self.outputs}] is gathered")
        for start in range(0, len(x), ROWS):
            self._add(x[start : start + ROWS], None if y is None else y[start : start + ROWS])

    def _add(self, x: Array, y: Array | None) -> None:
        if not self.count:
            # Whatever is near the mean will do; rounded, it is exact in either dtype.
            self._at_x = x.mean(axis=0, dtype=np.float64).astype(np.float32).astype(np.float64)
            if y is not None:
                self._at_y = y.mean(axis=0, dtype=np.float64).astype(np.float32).astype(np.float64)
        x = x - self._at_x.astype(x.dtype)
        self.count += len(x)
        self._x += x.sum(axis=0, dtype=np.float64)
        self._xx += x.T @ x
        if y is not None:
            y = y - self._at_y.astype(y.dtype)
            self._y += y.sum(axis=0, dtype=np.float64)
            self._xy += x.T @ y
            self._yy += np.square(y, dtype=np.float64).sum(axis=0)

    def merge(self, other: GramAccumulator) -> None:
        """Adds the samples that another has seen."""
        if (self.features, self.outputs) != (other.features, other.outputs):
            raise ValueError("statistics of different lengths do not merge")
        if not other.count:
            return
        if not self.count:
            self._at_x, self._at_y = other._at_x.copy(), other._at_y.copy()
        dx, dy = other._at_x - self._at_x, other._at_y - self._at_y
        for name, moved in other._moved(dx, dy).items():
            total = getattr(self, name)
            total += moved
        self.count += other.count

    def copy(self) -> Self:
        """An accumulator of its own with the same samples."""
        twin = type(self)(self.features, self.outputs)
        twin.merge(self)
        return twin

    def _moved(self, dx: Float64, dy: Float64) -> dict[str, Float64]:
        """The sums had x and y been larger by dx and dy."""
        n = self.count
        x, y = self._x + n * dx, self._y + n * dy
        crossed = np.outer(self._x, dx)
        return {
            "_x": x,
            "_y": y,
            "_xx": self._xx + crossed + crossed.T + n * np.outer(dx, dx) if dx.any() else self._xx,
            "_xy": self._xy + np.outer(self._x, dy) + np.outer(dx, y),
            "_yy": self._yy + 2 * dy * self._y + n * dy * dy,
        }

    @property
    def x(self) -> Float64:
        """``[d]`` sum of x."""
        return self._x + self.count * self._at_x

    @property
    def y(self) -> Float64:
        """``[m]`` sum of y."""
        return self._y + self.count * self._at_y

    @property
    def xx(self) -> Float64:
        """``[d, d]`` sum of x x^T."""
        return self._moved(self._at_x, self._at_y)["_xx"]

    @property
    def xy(self) -> Float64:
        """``[d, m]`` sum of x y^T."""
        return self._moved(self._at_x, self._at_y)["_xy"]

    @property
    def yy(self) -> Float64:
        """``[m]`` sum of y squared."""
        return self._moved(self._at_x, self._at_y)["_yy"]

    def moments(self, centred: bool) -> Moments:
        """What a fit with (centred) or without an intercept is made from."""
        if not centred:
            sums = self._moved(self._at_x, self._at_y)
            zeros = np.zeros(self.features), np.zeros(self.outputs)
            return Moments(self.count, *zeros, sums["_xx"], sums["_xy"], sums["_yy"])
        n = max(1, self.count)
        return Moments(
            self.count,
            self.x / n,
            self.y / n,
            self._xx - np.outer(self._x, self._x / n),
            self._xy - np.outer(self._x, self._y / n),
            np.maximum(self._yy - self._y * self._y / n, 0.0),
        )

    def covariance(self) -> Float64:
        """``[d, d]`` mean product of the deviations of x from its mean; zeros if nothing was seen."""
        return self.moments(centred=True).xx / max(1, self.count)


def damped_factor(gram: Float64, damping: float) -> tuple[Float64, float]:
    """Cholesky factor of ``gram + penalty * I``.

    Args:
        gram: ``[d, d]`` symmetric, positive semidefinite up to rounding; left as it is.
        damping: The penalty in units of the mean of the diagonal.

    Returns:
        The lower factor (zeros above its diagonal), and the penalty: ten times the wanted one, or a power more, where
        the matrix would not factor otherwise. Of a matrix of zeros, the factor of the unit matrix and a penalty of 1.

    Raises:
        ValueError: The matrix holds infinities or NaN.
    """
    if not np.isfinite(gram.sum()):
        raise ValueError("a Gram matrix of values that are not finite")
    mean = float(np.mean(np.diagonal(gram))) if len(gram) else 0.0
    if mean <= 0.0:
        return np.eye(len(gram)), 1.0
    least = len(gram) * np.finfo(np.float64).eps
    while True:
        damped = np.array(gram.T, dtype=np.float64, order="F")
        damped.flat[:: len(gram) + 1] += damping * mean
        try:
            factor = scipy.linalg.cholesky(damped, lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            damping = max(10 * damping, least)
        else:
            return factor, damping * mean
