"""Depth pruning: whole residual branches removed, those first that matter least."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphprune.calibration import Calibration
from graphprune.cost import macs, macs_of, parameters
from graphprune.depth import Criterion, check_criterion
from graphprune.depth.blocks import Branch, dead_ops, readers_of_values
from graphprune.depth.measures import Progress, measure_branches
from graphprune.depth.removal import (
    Cut,
    ResidualNetwork,
    cut_branches,
    node_at,
)
from graphprune.errors import ModelError, OptionError, VerificationError
from graphprune.graph.twin import build_twin
from graphprune.model import save
from graphprune.model.inlining import inline
from graphprune.verification.difference import difference, dtype_of, least_scale, tolerance_of
from graphprune.verification.feeds import Feeds
from graphprune.verification.runs import check_valid

#: Names listed in a message before it says how many more there are.
_LISTED = 12


@dataclass(frozen=True)
class RemovedBlock:
    """One branch that was removed.

    Attributes:
        name: The op that added it to the stream.
        score: What was measured when it was chosen; see :func:`graphprune.depth.measures.measure_branches`.
        ops: Number of ops that went with it.
        parameters: Weights that only it read.
        macs: Its multiply-accumulates.
    """

    name: str
    score: float
    ops: int
    parameters: int
    macs: int


@dataclass
class BlocksReport:
    """What removing blocks did.

    Attributes:
        removed: In the order of choice.
        kept: Branches that could have been removed, and what was measured on them last.
        refused: Branches that cannot be removed, and why.
        by: What was measured.
        parameters_before, parameters_after: Weights stored.
        macs_before, macs_after: Multiply-accumulates at the sizes of the twin.
        max_error: Largest difference from the network whose branches are multiplied by zero, relative to the output's
            scale; None if not verified.
        seconds: Wall time of each step.
        notes: Whatever the user should know.
    """

    removed: list[RemovedBlock]
    kept: dict[str, float]
    refused: dict[str, str]
    by: Criterion
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    max_error: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "removed": [vars(block) for block in self.removed],
            "kept": self.kept,
            "refused": self.refused,
            "by": self.by,
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "macs": {"before": self.macs_before, "after": self.macs_after},
            "max_error": self.max_error,
            "seconds": self.seconds,
            "notes": self.notes,
        }


class RemoveBlocksPass(ir.passes.InPlacePass):
    """Removes whole residual branches, those first that change the stream, or the outputs, least.

    The model is changed only after a copy of it has been compared with the original whose branches are multiplied by
    zero.

    Attributes:
        report: What the last call did; None before the first.

    Example:
        >>> import onnx_ir as ir
        >>> from onnx_ir.passes.common import ShapeInferencePass
        >>> pipeline = ir.passes.Sequential(RemoveBlocksPass(2), ShapeInferencePass())
    """

    def __init__(self, count: int, **options: Any) -> None:
        """Configure the pass.

        Args:
            count: Number of branches to remove.
            **options: Further arguments of :func:`remove_blocks`.
        """
        super().__init__()
        self.count = count
        self.options = options
        self.report: BlocksReport | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove branches of ``model`` in place.

        Raises:
            GraphPruneError: See :func:`remove_blocks`; the model is then as it was.
        """
        self.report = None
        self.report = remove_blocks(model, self.count, **self.options)
        return ir.passes.PassResult(model, modified=bool(self.report.removed))


def remove_blocks(
    model: ir.Model,
    count: int,
    *,
    calibration: Calibration | None = None,
    by: Criterion = "cosine",
    remeasure: bool = True,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> BlocksReport:
    """Remove the residual branches that matter least, in place.

    Where ``out = s + f(s)``, ``out`` becomes ``s``; what nothing reads any more goes: nodes, weights, functions.
    Functions that hold a branch are inlined. Outputs keep their names.

    Args:
        model: Changed in place; as it was if anything is raised.
        count: Number of branches to remove.
        calibration: Inputs to measure on; random ones, with a warning, if None.
        by: ``cosine``, ``error`` or ``refit``: see :func:`graphprune.depth.measures.measure_branches`.
        remeasure: Measure again after each choice, without what has been chosen. (ResNet-56 on CIFAR-10 with 8 of its
            25 branches gone by ``cosine`` has 54.0 % of its 83.3 % top-1 left then, 31.8 % if all are measured once;
            by ``error`` it has 64.5 %.)
        input_shapes: Sizes for inputs with dynamic dimensions, by input name.
        verify: Compare the result with the original whose branches are multiplied by zero.
        seed: For random inputs.
        progress: Called with what is being done.

    Raises:
        OptionError: ``count`` is negative or more than can be removed, or ``by`` is unknown.
        ModelError: The model cannot be analysed or run.
        VerificationError: The result is invalid or differs.
    """
    if count < 0:
        raise OptionError(f"blocks must be 0 or more, not {count}")
    check_criterion(by)
    clock = _Clock()
    network = ResidualNetwork.of(model, input_shapes)
    _check_count(network, count)
    clock.lap("finding blocks")
    notes: list[str] = []
    if calibration is None and count:
        text = "blocks were measured on random inputs: give real ones with --calib (calibration=...)"
        notes.append(text)
        warnings.warn(text, UserWarning, stacklevel=2)
    chosen, left = _choose(network, count, calibration, by, remeasure, seed, progress)
    clock.lap("measuring blocks")
    max_error = None
    branches = [branch for branch, _ in chosen]
    if chosen and verify:
        if progress is not None:
            progress("verifying blocks")
        max_error = _verify(network, branches, calibration, seed, model)
        clock.lap("verifying blocks")
    before = parameters(model)
    if chosen:
        _apply(model, network, branches, input_shapes)
    clock.lap("removing blocks")
    dead, _ = dead_ops(readers_of_values(network.analysis.graph), branches)
    macs_before = macs(network.analysis)
    return BlocksReport(
        removed=[
            RemovedBlock(branch.name, score, len(branch.ops), branch.parameters, branch.macs)
            for branch, score in chosen
        ],
        kept={branch.name: score for branch, score in left.items()},
        refused={branch.name: branch.obstacle for branch in network.branches if branch.obstacle is not None},
        by=by,
        parameters_before=before,
        parameters_after=parameters(model),
        macs_before=macs_before,
        macs_after=macs_before - sum(macs_of(op, network.analysis) for op in dead if _counts(op.inputs)),
        max_error=max_error,
        seconds=clock.seconds,
        notes=notes,
    )


class _Clock:
    """Wall time between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = now - self._last
        self._last = now


def _counts(inputs: Sequence[Any]) -> bool:
    """As in :func:`graphprune.cost.macs`: what is computed from constants costs nothing at run time."""
    return not all(tensor is None or tensor.constant for tensor in inputs)


def _check_count(network: ResidualNetwork, count: int) -> None:
    there = network.removable
    if count <= len(there):
        return
    names = ", ".join(branch.name for branch in there[:_LISTED])
    more = f" and {len(there) - _LISTED} more" if len(there) > _LISTED else ""
    listed = f": {names}{more}" if there else ""
    refused = [branch for branch in network.branches if branch.obstacle is not None]
    why = (
        f"; {len(refused)} more cannot be, {refused[0].name!r} because {refused[0].obstacle}"
        if refused
        else ""
    )
    raise OptionError(
        f"cannot remove {count} residual branches: the network has {len(there)} that can be removed{listed}{why}"
    )


def _choose(
    network: ResidualNetwork,
    count: int,
    calibration: Calibration | None,
    by: Criterion,
    remeasure: bool,
    seed: int,
    progress: Progress | None,
) -> tuple[list[tuple[Branch, float]], dict[Branch, float]]:
    """Greedily, the branch with the least number each time.

    Returns:
        The chosen branches with what was measured on them, and those that are left with theirs.
    """
    left = network.removable
    chosen: list[tuple[Branch, float]] = []
    scores: dict[Branch, float] = {}
    while len(chosen) < count:
        if not chosen or remeasure:
            scores = measure_branches(
                network,
                calibration,
                by=by,
                removed=[branch for branch, _ in chosen],
                branches=left,
                seed=seed,
                progress=progress,
            )
        for branch in sorted(left, key=lambda each: (scores[each], each.op.index)):
            # A branch goes with those inside it; enough must be left.
            rest = [each for each in left if each is not branch and not branch.contains(each)]
            if len(rest) >= count - len(chosen) - 1:
                chosen.append((branch, scores[branch]))
                left = rest
                break
    return chosen, {branch: scores[branch] for branch in left if branch in scores}


# -- verifying and carrying out -------------------------------------------------------------------------------------


def _verify(
    network: ResidualNetwork,
    branches: Sequence[Branch],
    calibration: Calibration | None,
    seed: int,
    original: ir.Model,
) -> float:
    """Compare the network without branches with the network whose branches are multiplied by zero.

    Returns:
        The largest difference of an output, relative to its scale.

    Raises:
        VerificationError: The former is invalid, cannot be run, or differs.
    """
    feeds = next(network.batches(calibration, seed))
    with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
        cut, zeroed = Path(name) / "cut.onnx", Path(name) / "zeroed.onnx"
        save(network.without(branches), cut)
        check_valid(cut, original)
        save(network.zeroed(branches), zeroed)
        expected = _run_unoptimised(zeroed, feeds, "the network with its branches multiplied by zero")
        found = _run_unoptimised(cut, feeds, "the network without its branches")
    made_by = {tensor.name: tensor.producer for tensor in network.analysis.graph.outputs}
    worst = 0.0
    for output, reference in expected.items():
        error = difference(reference, found.get(output), least_scale(made_by.get(output)))
        if not error <= tolerance_of(dtype_of(reference)):
            raise VerificationError(
                f"output {output!r} without the branches {', '.join(b.name for b in branches[:_LISTED])} differs by"
                f" {error:.2g} of its scale from the original with these branches multiplied by zero; this is a fault"
                " of graphprune: please report it with the model"
            )
        worst = max(worst, error)
    return worst


def _run_unoptimised(path: Path, feeds: Feeds, what: str) -> dict[str, Any]:
    """The outputs; nothing is fused, so that both networks run the same kernels."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        wanted = {value.name for value in session.get_inputs()}
        results = session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VerificationError(
            f"ONNX Runtime cannot run {what}: {reason}; give inputs that it can run with --calib, or --no-verify"
        ) from error
    return dict(zip(names, results, strict=True))


def _apply(
    model: ir.Model,
    network: ResidualNetwork,
    branches: Sequence[Branch],
    input_shapes: Mapping[str, Sequence[int]] | None,
) -> None:
    """Cut branches out of the model that the network was made from."""
    ordered = sorted(branches, key=lambda branch: branch.op.index)
    if not model.functions:
        node_of = dict(zip(network.model.graph.all_nodes(), model.graph.all_nodes(), strict=True))
        cut_branches(model, [Cut(node_of[node_at(b)], b.kept, b.dropped) for b in ordered])
        return
    # Only functions that hold a sum are inlined. The twin's ops are the same, in the same order, either way.
    ops = build_twin(model, input_shapes).ops
    if [op.kind for op in ops] != [op.kind for op in network.analysis.graph.ops]:
        raise ModelError("the model's functions cannot be inlined one by one; inline them, and try again")
    holding = {call.op_identifier() for branch in ordered for call in ops[branch.op.index].path}
    if holding:
        inline(model, holding)
        ops = build_twin(model, input_shapes).ops
    cuts: list[Cut] = []
    for branch in ordered:
        node = ops[branch.op.index].node
        assert node is not None
        cuts.append(Cut(node, branch.kept, branch.dropped))
    cut_branches(model, cuts)
    inline(model, set())
