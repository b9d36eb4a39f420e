"""What users call: ``analyze``, ``prune``, ``sparsify``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from graphprune.axes.analysis import Analysis
from graphprune.axes.groups import find_groups
from graphprune.choice.budget import only_budget
from graphprune.choice.choose import Request
from graphprune.depth import Criterion
from graphprune.errors import ModelError
from graphprune.graph import Op
from graphprune.graph.twin import build_twin
from graphprune.model import as_ir, copy
from graphprune.model.inlining import inline, inlined
from graphprune.network import Network
from graphprune.passes.split_fills import SplitFillsPass
from graphprune.plan import Plan, make_plan
from graphprune.progress import Progress
from graphprune.report import Report
from graphprune.rewrite import Rewriter, collect, functions_to_inline
from graphprune.settings import Settings

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import onnx_ir as ir

    from graphprune.calibration.preprocess import Preprocess
    from graphprune.choice.search import Drop
    from graphprune.sparsity.pattern import Pattern
    from graphprune.sparsity.report import SparsityReport

Model = TypeVar("Model")


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


def reference_of(
    network: Network, input_shapes: Mapping[str, Sequence[int]] | None
) -> tuple[ir.Model, dict[Op, ir.Node]]:
    """A copy of the analysed model, all functions inlined, and its node for each op of the twin."""
    reference = copy(network.model)
    ops = network.analysis.graph.ops
    if reference.functions:
        reference = inlined(reference, {function.identifier() for function in reference.functions.values()})
        flat = build_twin(reference, input_shapes).ops
        if [op.kind for op in flat] != [op.kind for op in ops]:
            raise ModelError(
                "the model's functions cannot be inlined one by one, so that nothing could be verified"
            )
        return reference, {
            op: other.node for op, other in zip(ops, flat, strict=True) if other.node is not None
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
        inline(model, functions)
    Rewriter(network.analysis, masks).run(edits)
    network.fills.join()


def prune(
    model: Model,
    channels: float | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    size: int | str | None = None,
    latency: float | None = None,
    energy: float | None = None,
    max_drop: float | None = None,
    metric: str | None = None,
    metric_data: object = None,
    score: str | None = None,
    scope: str | None = None,
    keep_at_least: float = 0.1,
    calibration: object = None,
    preprocess: Preprocess | str | None = None,
    repair: bool | None = None,
    dead: bool = False,
    blocks: int = 0,
    blocks_by: Criterion = "cosine",
    jobs: int = 1,
    executor: Executor | None = None,
    round_to: int | None = None,
    residual: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    channels_for: Mapping[str, float] | None = None,
    plan: Plan | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Any, Report]:
    """Remove channels, filters, heads and hidden units from a model, with everything that is coupled to them.

    Give one of ``channels`` (or ``channels_for``), a budget, ``max_drop`` or ``plan``; ``dead`` and ``blocks`` go
    before, or alone.

    Args:
        model: A path, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a graphsurgeon Graph; not changed.
        channels: Fraction of every free group to remove, at least 0 and below 1.
        macs, params, latency, energy: The fraction to keep of multiply-accumulates, parameters, the time in ONNX
            Runtime on this machine, modelled energy.
        size: The file's size at most: bytes, or text such as ``"5MB"``.
        max_drop: Remove as much as keeps the metric within this of the original's.
        metric: ``top1`` (needs labels), ``agreement``, ``cosine``, or a Python function as ``module:function``.
        metric_data: Inputs to judge on, in any form of ``calibration``; by default a quarter of those is held out.
        score: What goes first: a name of :data:`graphprune.scores.SCORES`; by default ``obs`` with ``calibration``,
            ``l2`` without.
        scope: How a ratio or budget is spread over groups: ``local``, ``global``, ``isomorphic`` or ``allocated``.
        keep_at_least: The fraction that every group keeps.
        calibration: Inputs, as a path (.npz, .npy, a folder of images), arrays by input name, an iterable of feeds, or
            a :class:`graphprune.calibration.Calibration`. Scores, curves and repair are measured on them.
        preprocess: What makes inputs of images: a :class:`graphprune.calibration.preprocess.Preprocess` or its text.
        repair: Refit what reads a cut; by default with ``calibration``.
        dead: First remove, exactly, what contributes nothing.
        blocks: First remove so many residual branches.
        blocks_by: Which: those that turn the stream least (``cosine``), those without which the outputs change least
            (``error``; the network is run once for each branch), or those that a refit can make good best (``refit``).
        jobs: Trials of ``max_drop`` that run at once.
        executor: Runs those trials: anything with the interface of :class:`concurrent.futures.Executor`.
        round_to: What stays of each group is a multiple of this; None: of 8 in groups of 32 and more; 1: no rounding.
        residual: Also cut groups whose removal changes a statistic (the stream through LayerNorm).
        include, exclude: Globs on node and tensor names.
        channels_for: Glob -> fraction for the groups that touch a matching node or tensor.
        plan: Carry out this plan instead of choosing.
        input_shapes: Sizes for inputs with dynamic dimensions, by input name.
        verify: Compare the cut with the masked original, before anything is repaired.
        seed: For random inputs and scores.
        progress: Called with the name of each step; its attribute ``part``, if it has one, with (step, done, total).

    Returns:
        The pruned model, of the same kind as ``model`` (an ``onnx_ir.Model`` for a path), and a report.

    Raises:
        ModelError: The model cannot be read or is invalid.
        OptionError: An argument is out of range or matches nothing, or inputs do not fit.
        NothingToPruneError: No group is free, or nothing would be removed.
        BudgetError: A budget is below what can be reached.
        MetricError: The metric raises or returns no number.
        PlanError: A given plan does not fit the model.
        VerificationError: The result differs from the masked original; nothing is returned.

    Example:
        >>> import graphprune
        >>> small, report = graphprune.prune("model.onnx", channels=0.3)  # doctest: +SKIP
    """
    from graphprune.calibration.preprocess import Preprocess as Steps
    from graphprune.pruning import Pruning, finish

    limits = {"macs": macs, "params": params, "size": size, "latency": latency, "energy": energy}
    settings = Settings(
        Request(channels or 0.0, round_to, residual, include, exclude, channels_for or {}),
        only_budget(limits),
        score,
        scope,
        keep_at_least,
        plan,
        repair,
        dead,
        blocks,
        blocks_by,
        input_shapes,
        seed,
        max_drop is not None,
    )
    source, same_kind = as_ir(model)
    pruning = Pruning(
        source,
        settings,
        calibration=calibration,
        preprocess=Steps.parse(preprocess) if isinstance(preprocess, str) else preprocess,
        verify=verify,
        progress=progress,
    )
    drop = None if max_drop is None else _drop(max_drop, metric, jobs, executor)
    pruned = finish(pruning, drop, metric_data)
    if verify:
        pruning.check(pruned)
    return same_kind(pruned.model), pruned.report


def _drop(most: float, metric: str | None, jobs: int, executor: Executor | None) -> Drop:
    from graphprune.choice.search import Drop

    return Drop(most, metric, jobs, executor)


def sparsify(
    model: Model,
    pattern: str | Pattern = "2:4",
    *,
    target: str = "tensorrt",
    method: str | None = None,
    refit: bool | None = None,
    permute: bool = False,
    permute_seconds: float = 30.0,
    tail: str = "dense",
    calibration: object = None,
    preprocess: Preprocess | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Any, SparsityReport]:
    """Give a model's weights an N:M pattern, or another sparsity.

    Args:
        model: A path, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or an onnx-graphsurgeon graph; never changed.
        pattern: "2:4" or the like, or a value of :mod:`graphprune.sparsity.pattern`.
        target: The runtime whose rules say which weights can have it: "tensorrt", "onnxruntime" or "any".
        method: How the elements that stay are chosen: "magnitude", "wanda", "sparsegpt" or "alps"; None: the last where
            there are inputs (sparsegpt without ``refit``), else the first.
        refit: Fit what stays, and biases, to the original's outputs; None: where there are inputs.
        permute: First reorder channels, so that larger elements stay; helps most where nothing is fitted.
        permute_seconds: How long an order may be looked for.
        tail: Where M does not divide an axis: "dense" leaves its last channels as they are, "refuse" the weight.
        calibration: Inputs, in any form that :func:`graphprune.load_calibration` takes.
        preprocess: What makes inputs of images.
        include, exclude: Globs on names of weights and of the nodes that sum over them.
        input_shapes: Sizes for inputs with dynamic dimensions, by input name.
        verify: Check that the pattern holds and that nothing else changed; a reordered model is run too.
        seed: For searches, and for choices at random.
        progress: Called with the name of each step.

    Returns:
        The sparse model, of the kind that was given (a path gives an ``onnx_ir.Model``), and what was done.

    Raises:
        OptionError: An option is wrong, or inputs are missing.
        ModelError: The model cannot be read.
        SparsityError: No weight can have the pattern.
        VerificationError: The result is not what it should be.
    """
    from graphprune.calibration import load_calibration
    from graphprune.calibration.preprocess import Preprocess
    from graphprune.sparsity.pattern import NM
    from graphprune.sparsity.sparsify import Sparsifier, SparsitySettings

    settings = SparsitySettings(
        NM.parse(pattern) if isinstance(pattern, str) else pattern,
        target,
        method,
        refit,
        permute,
        permute_seconds,
        tail,
        include,
        exclude,
        input_shapes or {},
        seed,
    )
    made, same_kind = as_ir(model)
    inputs = None
    if calibration is not None:
        chosen = Preprocess.parse(preprocess) if isinstance(preprocess, str) else preprocess
        graph = build_twin(made, input_shapes)
        inputs = load_calibration(calibration, graph, preprocess=chosen, seed=seed)
    sparsifier = Sparsifier(made, settings, inputs, progress, verify=verify)
    report = sparsifier.run()
    if verify:
        sparsifier.check()
    return same_kind(made), report
