"""One run: what comes before the cut, the choice, the cut, its verification, the repair."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.axes.analysis import Analysis
from graphprune.calibration import Calibration, load_calibration
from graphprune.choice.budget import Budget, cost_model
from graphprune.choice.selection import Selection
from graphprune.cost import macs, parameters
from graphprune.depth import SAYS
from graphprune.errors import NothingToPruneError, OptionError
from graphprune.graph.twin import build_twin
from graphprune.model import copy, file_size
from graphprune.model.inlining import inlined
from graphprune.network import Network, Pruned
from graphprune.pipeline import analyze_ir, reference_of
from graphprune.plan import Plan, make_plan
from graphprune.progress import Progress, part_of, timed
from graphprune.report import Report
from graphprune.rewrite import OpChange, Rewriter, collect, functions_to_inline
from graphprune.settings import Settings

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphprune.calibration.preprocess import Preprocess
    from graphprune.choice.search import Drop

#: Fewer inputs than this are too few to measure and repair with.
LEAST_SAMPLES = 8


class Pruning:
    """A model on its way: what comes before the cut is done once, cuts can be tried any number of times."""

    def __init__(
        self,
        original: ir.Model,
        settings: Settings,
        *,
        calibration: object = None,
        preprocess: Preprocess | None = None,
        verify: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """Remove what is dead, and blocks; analyse what is left.

        Args:
            original: The model; not changed.
            settings: What to do.
            calibration: Inputs, in any form that :func:`graphprune.calibration.load_calibration` takes.
            preprocess: What makes inputs of images.
            verify: Compare what exact passes made with what they were given.
            progress: Called with the name of each step.
        """
        self.original = original
        self.settings = settings
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self._progress = progress
        self.verifies = verify
        self._latency: tuple[float, float] | None = None
        self._preprocess = preprocess
        base = original
        loaded: Calibration | None = None
        if calibration is not None:
            with self._timed("calibration inputs"):
                graph = build_twin(original, settings.input_shapes)
                least = LEAST_SAMPLES if settings.measures else 1
                loaded = load_calibration(
                    calibration, graph, preprocess=preprocess, seed=settings.seed, least=least
                )
        self.calibration = loaded
        if base.functions and (loaded is not None or settings.repair) and (settings.cuts or settings.blocks):
            # Statistics are taken inside of functions, and repaired weights differ from call to call.
            base = inlined(base, {function.identifier() for function in base.functions.values()})
        if settings.dead:
            base = self._without_dead(base)
        self._whole = base  # what the result is to answer like, position by position
        if settings.blocks:
            base = self._without_blocks(base)
        self.base = base
        with self._timed("analysis"):
            self.network = analyze_ir(copy(base), settings.input_shapes)
        self.selection = Selection(self.network, settings, loaded, self._part)

    def _timed(self, step: str) -> AbstractContextManager[None]:
        return timed(self.seconds, step, self._progress)

    def _part(self, step: str, done: int, total: int) -> None:
        part_of(self._progress, step)(done, total)

    def _without_dead(self, base: ir.Model) -> ir.Model:
        from graphprune.passes.remove_dead import remove_dead

        work = copy(base)
        with self._timed("dead positions"):
            dead = remove_dead(
                work,
                input_shapes=self.settings.input_shapes,
                feeds=[] if self.calibration is None else list(self.calibration.subset(1).batches(1)),
                verify=self.verifies,
                seed=self.settings.seed,
            )
        removed = sum(dead.removed.values())
        self.notes.append(
            f"dead: {removed} positions of {len(dead.removed)} groups contributed nothing and are gone"
        )
        self.notes += [f"dead: {s.count} of {s.group} stay: {s.reason}" for s in dead.stayed]
        return work

    def _without_blocks(self, base: ir.Model) -> ir.Model:
        from graphprune.passes.remove_blocks import remove_blocks

        work = copy(base)
        with self._timed("blocks"):
            blocks = remove_blocks(
                work,
                self.settings.blocks,
                calibration=self.calibration,
                by=self.settings.blocks_by,
                input_shapes=self.settings.input_shapes,
                verify=self.verifies,
                seed=self.settings.seed,
                progress=self._progress,
            )
        says = SAYS[blocks.by]
        self.notes += [f"block {block.name} is gone: {says.format(block.score)}" for block in blocks.removed]
        return work

    @property
    def makes_smaller_first(self) -> bool:
        """True if something goes before anything is chosen: what is dead, or blocks."""
        return self.settings.dead or self.settings.blocks > 0

    @cached_property
    def budget(self) -> Budget | None:
        """The settings' budget, as a part of what is left to choose from: users speak of the model that they gave."""
        budget = self.settings.budget
        if budget is None or budget.kind in ("size", "latency") or not self.makes_smaller_first:
            return budget
        original = analyze_ir(copy(self.original), self.settings.input_shapes)
        whole = cost_model(original, budget.kind).total([group.unit for group in original.groups])
        left = self.selection.cost(budget).total([group.unit for group in self.network.groups])
        return budget.scaled(whole / left)

    @property
    def repairs(self) -> bool:
        """True if what reads a cut is to be refitted."""
        if self.settings.repair is None:
            return self.calibration is not None and bool(self.settings.cuts or self.settings.blocks)
        return self.settings.repair

    def plan(self, budget: Budget | None = None, scope: str | None = None) -> Plan:
        """What to remove (see :meth:`Selection.plan`)."""
        with self._timed("choice"):
            return self.selection.plan(budget, scope)

    def cut(self, plan: Plan) -> Pruned:
        """Carry a plan out on a copy; nothing is verified or repaired yet.

        Raises:
            NothingToPruneError: The plan removes nothing, and nothing else was asked for.
        """
        if not plan.cuts and not self.makes_smaller_first:
            raise NothingToPruneError(
                "the request removes nothing: every free group would keep all it has; raise the ratio or lower round_to"
            )
        base = self.base
        while True:
            work = copy(base)
            with self._timed("analysis"):
                network = analyze_ir(work, self.settings.input_shapes)
                made, masks = make_plan(network.analysis, network.groups, plan.removed_labels(network.groups))
            with self._timed("rewriting"):
                edits = collect(network.analysis, masks)
                functions = functions_to_inline(network.analysis, masks, edits)
            if not functions:
                break
            base = inlined(base, functions)
        report = Report(
            parameters_before=parameters(self.original),
            parameters_after=0,
            macs_before=self._macs_before(network),
            macs_after=macs(network.analysis, lambda op: OpChange(op, network.analysis, masks).new_size),
            groups=network.groups,
            plan=made,
            bytes_before=file_size(self.original),
            input_shapes=network.input_shapes,
            latency=self._latency,
            inputs="random input" if self.calibration is None else "calibration inputs",
            seconds=self.seconds,
            notes=self.notes + [f"{name}: {reason}" for name, reason in network.analysis.graph.notes],
        )
        reference, node_of = reference_of(network, self.settings.input_shapes)
        with timed(self.seconds, "rewriting", None):
            Rewriter(network.analysis, masks).run(edits)
            network.fills.join()
        report.parameters_after = parameters(work)
        report.bytes_after = file_size(work)
        by_node = {node: edit for (_, node), edit in edits.items()}
        return Pruned(reference, work, network, masks, report, node_of, by_node, self.calibration)

    def _macs_before(self, network: Network) -> int:
        if not self.makes_smaller_first:
            return macs(network.analysis)
        return macs(Analysis(build_twin(copy(self.original), self.settings.input_shapes)))

    def plan_for_latency(self, budget: Budget) -> Plan:
        """The plan that brings the measured latency to a budget."""
        from graphprune.choice.search import plan_for_latency

        with self._timed("search"):
            plan, foretold, measured = plan_for_latency(self, budget)
        self._latency = foretold, measured
        self.notes.append(
            f"latency: {measured:.3f} of the original's, measured in pairs of runs; the tables said {foretold:.3f}"
        )
        return plan

    def plan_within(self, drop: Drop, data: object) -> Plan:
        """The plan that removes most within a drop of accuracy; what is held out for judging serves nothing else."""
        from graphprune.choice.search import plan_within_drop, split

        if data is not None:
            judged_on = load_calibration(data, self.network.analysis.graph, preprocess=self._preprocess)
        elif self.calibration is not None:
            self.calibration, judged_on = split(self.calibration, self.settings.seed)
            self.selection = Selection(self.network, self.settings, self.calibration, self._part)
        else:
            raise OptionError(
                "a drop of accuracy is judged on inputs: give some with --calib or --metric-data"
            )
        with self._timed("search"):
            plan, before, after = plan_within_drop(self, drop, judged_on)
        self.notes.append(
            f"metric: {after:.4g} after the cut, {before:.4g} before, on {judged_on.samples} samples held out for it"
        )
        return plan

    def verify(self, pruned: Pruned, path: Path | None = None) -> None:
        """Compare a cut with the masked original."""
        from graphprune.verification.pruned import verify

        with self._timed("verification"):
            verify(pruned, calibration=self.calibration, seed=self.settings.seed, path=path)

    def check(self, pruned: Pruned, path: Path | None = None) -> None:
        """Check what is about to be handed out: a cut against the masked original; a repaired model for soundness.

        Args:
            pruned: The result.
            path: Its file, if it has been written already.
        """
        if pruned.report.repaired is None:
            self.verify(pruned, path)
            if not self.settings.blocks:
                return
        from graphprune.verification.pruned import verify_sound

        with self._timed("verification"):
            verify_sound(
                pruned, self._whole, calibration=self.calibration, seed=self.settings.seed, path=path
            )

    def repair(self, pruned: Pruned) -> None:
        """Refit what reads a cut, in place; with inputs by least squares, without any by stored statistics."""
        from graphprune.repair.datafree import repair_without_data
        from graphprune.repair.refit import RepairReport, repair

        done: RepairReport
        with self._timed("repair"):
            if self.calibration is None:
                without = repair_without_data(
                    pruned, progress=lambda count, total: self._part("repair", count, total)
                )
                pruned.report.notes.append(without.summary)
                done = without
            else:
                done = repair(
                    self._beside_whole(pruned),
                    self.calibration,
                    everywhere=self.settings.blocks > 0,
                    seed=self.settings.seed,
                    progress=lambda count, total: self._part("repair", count, total),
                )
        pruned.report.repaired = done
        pruned.report.parameters_after = parameters(pruned.model)
        pruned.report.bytes_after = file_size(pruned.model)
        pruned.report.notes += [f"{name} was not refitted: {reason}" for name, reason in done.skipped]

    def _beside_whole(self, pruned: Pruned) -> Pruned:
        """The pruned model beside the original with all its blocks: a repair makes up for those too."""
        if not self.settings.blocks:
            return pruned
        whole = copy(self._whole)
        made_by = {value.name: node for node in whole.graph for value in node.outputs if value.name}
        counterparts = {
            op: made_by.get(node.outputs[0].name or "") for op, node in pruned.node_of.items() if node.outputs
        }
        node_of = {op: node for op, node in counterparts.items() if node is not None}
        return replace(pruned, original=whole, node_of=node_of)


def finish(pruning: Pruning, drop: Drop | None = None, metric_data: object = None) -> Pruned:
    """Choose, cut, and repair; a cut that is repaired is verified before.

    Args:
        pruning: The model and its settings.
        drop: The accuracy that may be lost, instead of a budget.
        metric_data: Inputs to judge it on; a part of the calibration's by default.

    Raises:
        GraphPruneError: See :func:`prune`.
    """
    budget = pruning.settings.budget
    if drop is not None:
        plan = pruning.plan_within(drop, metric_data)
    elif budget is not None and budget.kind == "latency":
        plan = pruning.plan_for_latency(budget)
    else:
        plan = pruning.plan(pruning.budget)
    pruned = _carried_out(pruning, plan)
    if budget is not None and budget.kind == "size" and pruned.report.bytes_after > budget.limit:
        # A repair adds biases where layers had none; they count.
        excess = pruned.report.bytes_after - budget.limit
        pruned = _carried_out(pruning, pruning.plan(Budget("size", budget.limit - excess)))
    return pruned


def _carried_out(pruning: Pruning, plan: Plan) -> Pruned:
    pruned = pruning.cut(plan)
    if pruning.repairs:
        if pruning.verifies:
            pruning.verify(pruned)
        pruning.repair(pruned)
    return pruned
