"""What the steps hand on: an analysed model, and a pruned one with all that its verification needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graphprune.axes.analysis import Analysis
from graphprune.axes.groups import Group
from graphprune.graph import Op
from graphprune.passes.split_fills import SplitFillsPass
from graphprune.plan import Masks
from graphprune.report import Report
from graphprune.rewrite import Edits

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphprune.calibration import Calibration


@dataclass
class Network:
    """An analysed model.

    Attributes:
        model: The model that the twin stands for.
        analysis: Labels on all tensors.
        groups: The coupling groups, in the order of the graph.
        fills: Which nodes of ``model`` were split for the analysis.
    """

    model: ir.Model
    analysis: Analysis
    groups: list[Group]
    fills: SplitFillsPass = field(default_factory=SplitFillsPass)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The sizes at which the model was analysed."""
        return {tensor.name: tensor.shape or () for tensor in self.analysis.graph.inputs}


@dataclass
class Pruned:
    """A pruned model with all that verification needs.

    Attributes:
        original: What it was made from; functions that had to change are inlined.
        model: The pruned model.
        network: The analysis, on which masks are defined.
        masks: What is left of every tensor.
        report: Everything known so far.
        node_of: The original's node for each op of the twin.
        edits: What rewriting did to each node of ``model``.
        calibration: The inputs that served to measure and repair; None where there were none.
    """

    original: ir.Model
    model: ir.Model
    network: Network
    masks: Masks
    report: Report
    node_of: dict[Op, ir.Node]
    edits: dict[ir.Node, Edits]
    calibration: Calibration | None = None
