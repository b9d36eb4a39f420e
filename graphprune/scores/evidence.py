"""What a saliency criterion may look at, and the interface of all criteria."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.axes.groups import Group
from graphprune.calibration import Calibration
from graphprune.errors import OptionError
from graphprune.network import Network

Scores: TypeAlias = npt.NDArray[np.float64]
#: What a criterion reads beside the network: nothing, the calibration's inputs, or gradients on them.
Needs: TypeAlias = Literal["weights", "activations", "gradients"]


@dataclass
class Evidence:
    """A network, and the inputs to judge its labels on.

    Attributes:
        network: The analysed model.
        calibration: Inputs; None where the user gave none.
        seed: For criteria that draw at random.
        wanted: Indices of the groups that may be cut; None: all that are not frozen.
        progress: Called with (steps done, steps in all) by criteria that take long.
    """

    network: Network
    calibration: Calibration | None = None
    seed: int = 0
    wanted: Sequence[int] | None = None
    progress: Callable[[int, int], None] | None = None

    @property
    def groups(self) -> list[Group]:
        """The groups that may be cut: a criterion need not judge others."""
        groups = self.network.groups
        if self.wanted is None:
            return [group for group in groups if group.frozen is None]
        return [groups[index] for index in self.wanted]

    def inputs(self, score: str) -> Calibration:
        """The calibration's inputs, which ``score`` cannot do without.

        Raises:
            OptionError: There are none.
        """
        if self.calibration is None:
            raise OptionError(
                f"the score {score!r} is measured on inputs: give some with --calib (calibration=...)"
            )
        return self.calibration


class Score(Protocol):
    """A saliency criterion.

    Attributes:
        needs: What it reads.
    """

    needs: ClassVar[Needs]

    def __call__(self, evidence: Evidence) -> Scores:
        """Score every label.

        Args:
            evidence: The network and, where ``needs`` says so, inputs.

        Returns:
            float64 ``[number of atoms]``, indexed by label; labels with small numbers go first. Numbers of labels
            of different groups mean the same only as far as the criterion's formula says so.

        Raises:
            OptionError: It needs inputs, and there are none.
        """
