"""Saliency: how much each label matters.

A score gives every label a number; labels with small numbers go first. Scores are registered by name, behind one
interface that needs nothing but the analysis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from graphprune.analysis import Analysis
from graphprune.errors import OptionError
from graphprune.evaluate import evaluate_constant
from graphprune.graph import Tensor
from graphprune.kernels.saliency import sums_by_label

Scores = npt.NDArray[np.float64]


class Score(Protocol):
    """A saliency criterion."""

    def __call__(self, analysis: Analysis, seed: int) -> Scores:
        """Score every label.

        Args:
            analysis: The analysed twin.
            seed: For criteria that draw at random.

        Returns:
            float64 ``[number of atoms]``, indexed by label.
        """


def weights_of(analysis: Analysis) -> list[Tensor]:
    """Real-valued weights that bear labels, running means and variances left out: they are no parameters."""
    found = []
    for tensor in analysis.colourings:
        if not tensor.constant or (tensor.producer is not None and not analysis.is_leaf(tensor.producer)):
            continue
        if tensor.dtype is None or not (tensor.dtype.is_floating_point() or tensor.dtype.is_integer()):
            continue
        if tensor.uses and all(
            op.op_type == "BatchNormalization" and slot in (3, 4) for op, slot in tensor.uses
        ):
            continue
        found.append(tensor)
    return found


class Magnitude:
    """The p-norm of all weights that a label touches, on the side that makes it and on the side that reads it.

    ``(sum |w| ** p) ** (1 / p)`` over the elements of every weight that bear the label (Li et al., Pruning Filters
    for Efficient ConvNets, 2017, section 3.1, summed over the coupled weights as in Fang et al., DepGraph, 2023,
    section 3.3).
    """

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, analysis: Analysis, seed: int) -> Scores:
        count = len(analysis.atoms)
        total = np.zeros(count)
        for tensor in weights_of(analysis):
            array = evaluate_constant(tensor)
            for labels in analysis.labellings(tensor):
                total += sums_by_label(array, labels, count, self.power)
        return np.asarray(total ** (1 / self.power), dtype=np.float64)


class Random:
    """Uniform in [0, 1): the baseline that any criterion has to beat."""

    def __call__(self, analysis: Analysis, seed: int) -> Scores:
        return np.random.default_rng(seed).random(len(analysis.atoms))


#: All criteria by name.
SCORES: dict[str, Callable[[], Score]] = {
    "l1": lambda: Magnitude(1),
    "l2": lambda: Magnitude(2),
    "random": Random,
}


def find_score(name: str) -> Score:
    """The criterion of that name.

    Raises:
        OptionError: There is none.
    """
    if name not in SCORES:
        raise OptionError(f"unknown score {name!r}; there are {', '.join(SCORES)}")
    return SCORES[name]()
