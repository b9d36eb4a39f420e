"""Calibration: the inputs that statistics are taken on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Feeds = dict[str, Array]


@dataclass(frozen=True)
class Calibration:
    """Inputs, checked against the model's.

    Attributes:
        inputs: By input name, samples along axis 0; all of one length. Inputs without a batch axis are in ``fixed``.
        fixed: Inputs that are the same for every sample.
        batch: Samples that the model takes at once where its batch size is fixed; None where any number will do.
        labels: int64 ``[samples]`` or whatever the metric understands; None where there are none.
    """

    inputs: dict[str, Array]
    fixed: dict[str, Array]
    batch: int | None = None
    labels: Array | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values()))) if self.inputs else 1

    def subset(self, samples: int) -> Calibration:
        """The first samples."""
        inputs = {name: array[:samples] for name, array in self.inputs.items()}
        labels = None if self.labels is None else self.labels[:samples]
        return Calibration(inputs, self.fixed, self.batch, labels)

    def batches(self, size: int) -> Iterator[Feeds]:
        """Feeds of at most ``size`` samples, in order; of exactly ``batch`` where the model fixes that."""
        size = self.batch or size
        for start in range(0, self.samples, size):
            yield {**{name: array[start : start + size] for name, array in self.inputs.items()}, **self.fixed}
