"""Removal of dead positions as a pass, to be composed with others in ``onnx_ir.passes.Sequential``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnx_ir as ir

from graphprune.cost import macs, parameters
from graphprune.dead.folding import Fold, folds_of, put_in_place
from graphprune.dead.intervals import Intervals
from graphprune.dead.positions import find_dead
from graphprune.model import copy
from graphprune.model.inlining import inline
from graphprune.pipeline import analyze_ir
from graphprune.plan import Masks, Plan, make_plan
from graphprune.rewrite import OpChange, Rewriter, collect, functions_to_inline

if TYPE_CHECKING:
    from graphprune.axes.groups import Group


@dataclass(frozen=True)
class Folded:
    """Constants that one op took over.

    Attributes:
        node: The op's name.
        count: The number of positions.
        into: ``bias``, or ``carrier``: the weights of another position that holds a constant.
    """

    node: str
    count: int
    into: str


@dataclass(frozen=True)
class Stayed:
    """Dead positions of one group that stayed, and why."""

    group: str
    count: int
    reason: str


@dataclass
class DeadReport:
    """What :func:`remove_dead` did.

    Attributes:
        plan: What was removed, group by group; empty where nothing is dead.
        folded: Constants that were moved.
        stayed: Positions that contribute nothing, or nothing but a constant, and stayed.
        parameters_before, parameters_after: Weights stored.
        macs_before, macs_after: Multiply-accumulates at the sizes of the twin.
        max_error: Largest difference from the unmodified model, relative to the output's scale; None if not verified.
        seconds: Wall time of each step.
    """

    plan: Plan
    folded: list[Folded] = field(default_factory=list)
    stayed: list[Stayed] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    max_error: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def removed(self) -> dict[str, int]:
        """Number of positions removed, by group."""
        return {cut.group: len(cut.removed) for cut in self.plan.cuts}

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "removed": [
                {"group": cut.group, "size": cut.size, "removed": len(cut.removed)} for cut in self.plan.cuts
            ],
            "folded": [{"node": f.node, "count": f.count, "into": f.into} for f in self.folded],
            "stayed": [{"group": s.group, "count": s.count, "reason": s.reason} for s in self.stayed],
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "macs": {"before": self.macs_before, "after": self.macs_after},
            "max_error": self.max_error,
            "seconds": self.seconds,
        }


def remove_dead(
    model: ir.Model,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    input_range: Mapping[str, tuple[float, float]] | None = None,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]] = (),
    verify: bool = True,
    seed: int = 0,
) -> DeadReport:
    """Remove what contributes nothing, in place; the model computes what it did before.

    All-zero filters and rows, channels whose BatchNorm scale is zero or whose ReLU is never positive, and channels
    that nobody reads go, with all that is coupled to them (:mod:`graphprune.dead.positions`). Inputs are assumed to be
    finite, and the model not to overflow on them; where a constant of the model is infinite or NaN, nothing is
    concluded from a multiplication by zero.

    Args:
        model: Changed in place.
        input_shapes: Sizes for inputs with dynamic dimensions, by input name.
        input_range: Smallest and greatest value of inputs, by name. More is dead where inputs are known to be bounded
            (``(0, 255)``), and the model is then only the same on such inputs.
        feeds: Inputs to compare on, beside random ones.
        verify: Compare with the unmodified model in ONNX Runtime.
        seed: For random inputs.

    Returns:
        What was removed, folded and left.

    Raises:
        OptionError: ``input_shapes`` or ``input_range`` does not fit the model.
        VerificationError: The result differs from the unmodified model; ``model`` is as it was.
    """
    original = copy(model)
    try:
        return _Removal(model, original, input_shapes, input_range).run(feeds, verify=verify, seed=seed)
    except BaseException:
        model.graph = original.graph
        model.functions.clear()
        model.functions.update(original.functions)
        raise


class _Removal:
    def __init__(
        self,
        model: ir.Model,
        original: ir.Model,
        input_shapes: Mapping[str, Sequence[int]] | None,
        input_range: Mapping[str, tuple[float, float]] | None,
    ) -> None:
        self._model = model
        self._original = original
        self._shapes = input_shapes
        self._range = input_range
        self._seconds: dict[str, float] = {}

    def run(self, feeds: Sequence[Mapping[str, npt.NDArray[Any]]], *, verify: bool, seed: int) -> DeadReport:
        start = time.perf_counter()
        while True:
            network = analyze_ir(self._model, self._shapes)
            intervals = Intervals(network.analysis, self._range)
            dead = find_dead(network.analysis, network.groups, intervals)
            plan, masks = make_plan(network.analysis, network.groups, dead.removed)
            folds = folds_of(dead.steps, dead.removed, masks)
            edits = collect(network.analysis, masks)
            functions = functions_to_inline(network.analysis, masks, edits)
            functions |= {call.op_identifier() for fold in folds for call in fold.op.path}
            if not functions:
                break
            inline(self._model, functions)
        report = DeadReport(
            plan,
            [Folded(fold.op.name, fold.count, fold.where) for fold in folds],
            _stayed(network.groups, dead.stayed),
            parameters_before=parameters(self._original),
            macs_before=macs(network.analysis),
            macs_after=macs(network.analysis, lambda op: OpChange(op, network.analysis, masks).new_size),
            seconds=self._seconds,
        )
        if plan.cuts:
            Rewriter(network.analysis, masks).run(edits)
            put_in_place(self._model, folds)
        network.fills.join()
        report.parameters_after = parameters(self._model)
        self._seconds["removal"] = time.perf_counter() - start
        if verify and plan.cuts:
            start = time.perf_counter()
            report.max_error = self._compare(masks, folds, feeds, seed)
            self._seconds["verification"] = time.perf_counter() - start
        return report

    def _compare(
        self,
        masks: Masks,
        folds: Sequence[Fold],
        feeds: Sequence[Mapping[str, npt.NDArray[Any]]],
        seed: int,
    ) -> float:
        from graphprune.dead.compare import compare, feeds_within

        graph = masks.analysis.graph
        given = [dict(each) for each in feeds]
        # Where the bias of a product is moved into an Add behind it, the product itself is another.
        moved = {out for fold in folds if fold.replaced is None for out in fold.op.outputs if out is not None}
        trials = [*given, feeds_within(graph, self._range or {}, seed)]
        return compare(self._original, self._model, masks, trials, moved)


def _stayed(groups: Sequence[Group], reasons: Mapping[int, str]) -> list[Stayed]:
    """Reasons by group, each with the number of positions that it holds for."""
    found = []
    for group in groups:
        counts: dict[str, int] = {}
        for label in group.labels.tolist():
            if label in reasons:
                counts[reasons[label]] = counts.get(reasons[label], 0) + 1
        found += [Stayed(group.name, count, reason) for reason, count in counts.items()]
    return found


class RemoveDeadPass(ir.passes.InPlacePass):
    """Removes what contributes nothing, with everything that is coupled to it (:func:`remove_dead`).

    Attributes:
        report: What the last call did; None before the first.

    Example:
        >>> import onnx_ir as ir
        >>> from graphprune.passes.prune_channels import PruneChannelsPass
        >>> pipeline = ir.passes.Sequential(RemoveDeadPass(), PruneChannelsPass(0.3))
    """

    def __init__(self, **options: Any) -> None:
        """Configure the pass.

        Args:
            **options: Further arguments of :func:`remove_dead`.
        """
        super().__init__()
        self.options = options
        self.report: DeadReport | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove in place.

        Raises:
            GraphPruneError: An option is wrong, or the result differs; the model is then as it was.
        """
        self.report = None
        report = remove_dead(model, **self.options)
        self.report = report
        return ir.passes.PassResult(model, modified=bool(report.plan.cuts))
