"""The two things that users call: ``prune`` and ``analyze``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from graphprune.analysis import Analysis
from graphprune.choose import Request, choose, cuttable, keep_count
from graphprune.cost import macs, parameters
from graphprune.errors import ModelError, NothingToPruneError
from graphprune.graph import Op
from graphprune.groups import find_groups
from graphprune.model import as_ir, copy, file_size
from graphprune.network import Network, Pruned
from graphprune.passes.split_fills import SplitFillsPass
from graphprune.plan import Plan, make_plan
from graphprune.report import Report
from graphprune.rewrite import OpChange, Rewriter, collect, functions_to_inline
from graphprune.scores import Evidence, find_score
from graphprune.twin import build_twin

if TYPE_CHECKING:
    import onnx_ir as ir

Model = TypeVar("Model")
Progress = Callable[[str], None]


def analyze_ir(model: ir.Model, input_shapes: Mapping[str, Sequence[int]] | None = None) -> Network:
    """Analyse an ``onnx_ir.Model``, which the result refers to.

    The model is changed in one respect: fills that several ops read are split (:class:`SplitFillsPass`).
    """
    fills = SplitFillsPass()
    fills(model)
    analysis = Analysis(build_twin(model, input_shapes))
    return Network(model, analysis, find_groups(analysis), fills)


def analyze(model: object, *, input_shapes: Mapping[str, Sequence[int]] | None = None) -> Network:
    """Find the coupling groups of a model.

    Args:
        model: A path, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a graphsurgeon Graph; not changed.
        input_shapes: Sizes for inputs with dynamic dimensions, by input name.

    Raises:
        GraphPruneError: The model cannot be read, or the shapes contradict it.
    """
    return analyze_ir(as_ir(model)[0], input_shapes)


@contextmanager
def _timed(seconds: dict[str, float], step: str, progress: Progress | None) -> Iterator[None]:
    if progress is not None:
        progress(step)
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start


def prune_ir(
    original: ir.Model,
    request: Request,
    *,
    score: str = "l2",
    plan: Plan | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Pruned:
    """Prune a copy of ``original``; nothing is verified yet.

    Raises:
        GraphPruneError: See :func:`prune`.
    """
    seconds: dict[str, float] = {}
    criterion = find_score(score)
    base = original
    while True:
        work = copy(base)
        with _timed(seconds, "analysis", progress):
            network = analyze_ir(work, input_shapes)
        with _timed(seconds, "choice", progress):
            if plan is None:
                scores = criterion(Evidence(network, seed=seed))
                wanted = cuttable(network.analysis, network.groups, request)
                kept = [
                    None if ratio is None else keep_count(group, ratio, request.round_to)
                    for group, ratio in zip(network.groups, wanted, strict=True)
                ]
                removed = choose(network.analysis, network.groups, scores, kept)
            else:
                removed = plan.removed_labels(network.groups)
            made, masks = make_plan(network.analysis, network.groups, removed)
        if not made.cuts:
            raise NothingToPruneError(
                "the request removes nothing: every free group would keep all it has; raise the ratio or lower round_to"
            )
        with _timed(seconds, "rewriting", progress):
            edits = collect(network.analysis, masks)
            functions = functions_to_inline(network.analysis, masks, edits)
        if not functions:
            break
        base = _inline(base, functions)
    report = Report(
        parameters_before=parameters(original),
        parameters_after=0,
        macs_before=macs(network.analysis),
        macs_after=macs(network.analysis, lambda op: OpChange(op, network.analysis, masks).new_size),
        groups=network.groups,
        plan=made,
        bytes_before=file_size(original),
        input_shapes=network.input_shapes,
        seconds=seconds,
        notes=[f"{name}: {reason}" for name, reason in network.analysis.graph.notes],
    )
    reference, node_of = reference_of(network, input_shapes)
    with _timed(seconds, "rewriting", None):
        Rewriter(network.analysis, masks).run(edits)
        network.fills.join()
    report.parameters_after = parameters(work)
    report.bytes_after = file_size(work)
    by_node = {node: edit for (_, node), edit in edits.items()}
    return Pruned(reference, work, network, masks, report, node_of, by_node)


def reference_of(
    network: Network, input_shapes: Mapping[str, Sequence[int]] | None
) -> tuple[ir.Model, dict[Op, ir.Node]]:
    """A copy of the analysed model, all functions inlined, and its node for each op of the twin."""
    reference = copy(network.model)
    ops = network.analysis.graph.ops
    if reference.functions:
        reference = _inline(reference, {function.identifier() for function in reference.functions.values()})
        inlined = build_twin(reference, input_shapes).ops
        if [op.kind for op in inlined] != [op.kind for op in ops]:
            raise ModelError(
                "the model's functions cannot be inlined one by one, so that nothing could be verified"
            )
        return reference, {
            op: other.node for op, other in zip(ops, inlined, strict=True) if other.node is not None
        }
    mapping = dict(zip(network.model.graph.all_nodes(), reference.graph.all_nodes(), strict=True))
    return reference, {op: mapping[op.node] for op in ops if op.node is not None}


def apply_plan(
    model: ir.Model, plan: Plan, *, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Carry a plan out on a model, in place and without verification.

    Args:
        model: Changed in place.
        plan: A plan made for this model.
        input_shapes: Sizes for inputs with dynamic dimensions, as when the plan was made.

    Raises:
        PlanError: The plan does not fit the model; it is then as it was, but for functions that had to be inlined.
    """
    while True:
        network = analyze_ir(model, input_shapes)
        _, masks = make_plan(network.analysis, network.groups, plan.removed_labels(network.groups))
        edits = collect(network.analysis, masks)
        functions = functions_to_inline(network.analysis, masks, edits)
        if not functions:
            break
        _inline_in_place(model, functions)
    Rewriter(network.analysis, masks).run(edits)
    network.fills.join()


def _inline(model: ir.Model, functions: set[tuple[str, str, str]]) -> ir.Model:
    inlined = copy(model)
    _inline_in_place(inlined, functions)
    return inlined


def _inline_in_place(model: ir.Model, functions: set[tuple[str, str, str]]) -> None:
    from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass

    InlinePass(criteria=lambda function: function.identifier() in functions)(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]


def prune(
    model: Model,
    channels: float = 0.0,
    *,
    round_to: int | None = None,
    residual: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    channels_for: Mapping[str, float] | None = None,
    score: str = "l2",
    plan: Plan | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    calibration: Mapping[str, np.ndarray[Any, Any]] | str | Path | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Any, Report]:
    """Remove channels, filters, heads and hidden units from a model, with everything that is coupled to them.

    Args:
        model: A path, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a graphsurgeon Graph; not changed.
        channels: Fraction of every free group to remove, at least 0 and below 1.
        round_to: What stays of each group is a multiple of this; None: of 8 in groups of 32 and more; 1: no rounding.
        residual: Also cut groups whose removal changes a statistic (the stream through LayerNorm).
        include, exclude: Globs on node and tensor names.
        channels_for: Glob -> fraction for the groups that touch a matching node or tensor.
        score: ``l2``, ``l1`` or ``random``.
        plan: Carry out this plan instead of choosing.
        input_shapes: Sizes for inputs with dynamic dimensions, by input name.
        calibration: Inputs to verify on, by input name (arrays with a leading batch), or an .npz file of them;
            random inputs otherwise.
        verify: Compare the result with the masked original before returning it.
        seed: For random inputs and scores.
        progress: Called with the name of each step.

    Returns:
        The pruned model, of the same kind as ``model`` (an ``onnx_ir.Model`` for a path), and a report.

    Raises:
        ModelError: The model cannot be read or is invalid.
        OptionError: An argument is out of range or matches nothing.
        NothingToPruneError: No group is free, or nothing would be removed.
        PlanError: A given plan does not fit the model.
        VerificationError: The result differs from the masked original; nothing is returned.

    Example:
        >>> import graphprune
        >>> small, report = graphprune.prune("model.onnx", channels=0.3)  # doctest: +SKIP
    """
    request = Request(channels, round_to, residual, include, exclude, channels_for or {})
    source, same_kind = as_ir(model)
    pruned = prune_ir(
        source, request, score=score, plan=plan, input_shapes=input_shapes, seed=seed, progress=progress
    )
    if verify:
        from graphprune.verify import verify as check

        with _timed(pruned.report.seconds, "verification", progress):
            check(pruned, calibration=calibration, seed=seed)
    return same_kind(pruned.model), pruned.report
