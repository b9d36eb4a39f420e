"""One small model with an open boundary: prune it, run it, compare it with its masked original.

With an open boundary the axes of the model's inputs bear labels as well and labels reach its outputs, so that a single
op can be pruned by itself. The pruned model is fed what is left of the inputs and must give what is left of the masked
original's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import numpy_helper

from graphprune.axes.analysis import Analysis
from graphprune.axes.groups import Group, find_groups
from graphprune.choice.choose import Request, choose, cuttable
from graphprune.choice.scope import keep_counts
from graphprune.errors import NothingToPruneError
from graphprune.graph import Op
from graphprune.graph.twin import build_twin
from graphprune.kernels.box import compact
from graphprune.masked import SWITCH, mask_model
from graphprune.model import as_ir, copy, to_proto
from graphprune.network import Network
from graphprune.pipeline import reference_of
from graphprune.plan import Masks, make_plan
from graphprune.rewrite import Edits, Rewriter, collect, functions_to_inline
from graphprune.verification.difference import difference, tolerance_of

Array = npt.NDArray[Any]
Feeds = dict[str, Any]

#: Inputs that say where or how much, by op type: rules can speak only where they are literals.
LITERALS: dict[str, tuple[int, ...]] = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "CumProd": (1,),
    "Expand": (1,),
    "Gather": (1,),
    "OneHot": (1, 2),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
    **dict.fromkeys(
        (
            f"Reduce{k}"
            for k in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
        ),
        (1,),
    ),
}


@dataclass(frozen=True)
class Single:
    """A model and one set of inputs for it, by input name."""

    name: str
    model: onnx.ModelProto
    feeds: Mapping[str, Any]


def with_constants(single: Single, chosen: Callable[[onnx.NodeProto, int], bool]) -> Single:
    """Turn graph inputs into initializers that hold the test's values, where the first reader's slot is chosen."""
    model = onnx.ModelProto()
    model.CopyFrom(single.model)
    model.ir_version = max(model.ir_version, 4)  # before, initializers had to be inputs too
    readers: dict[str, tuple[onnx.NodeProto, int]] = {}
    for node in model.graph.node:
        for slot, name in enumerate(node.input):
            readers.setdefault(name, (node, slot))
    kept, feeds = [], dict(single.feeds)
    for value in model.graph.input:
        reader = readers.get(value.name)
        array = feeds.get(value.name)
        if (
            reader is not None
            and chosen(*reader)
            and isinstance(array, np.ndarray)
            and value.type.HasField("tensor_type")
        ):
            tensor = numpy_helper.from_array(array, value.name)
            if tensor.data_type == value.type.tensor_type.elem_type:
                model.graph.initializer.append(tensor)
                del feeds[value.name]
                continue
        kept.append(value)
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return Single(single.name, model, feeds)


def literals(single: Single) -> Single:
    """Inputs that say where or how much become initializers."""
    return with_constants(single, lambda node, slot: slot in LITERALS.get(node.op_type, ()))


def weights(single: Single) -> Single:
    """All inputs but the first of each op become initializers."""
    return with_constants(single, lambda node, slot: slot > 0)


@dataclass
class Opened:
    """A model analysed with an open boundary; ``model`` is a copy that may be changed."""

    model: ir.Model
    analysis: Analysis
    groups: list[Group]


def open_analysis(model: onnx.ModelProto) -> Opened:
    """Analyse a copy of a model, labels on its inputs and outputs."""
    work = copy(as_ir(model)[0])
    analysis = Analysis(build_twin(work), open_boundary=True)
    return Opened(work, analysis, find_groups(analysis))


@dataclass
class Outcome:
    """What became of a model.

    Attributes:
        kind: ``exact``, ``nothing`` (no group is free), ``not run`` (ONNX Runtime cannot run the original), or
            ``wrong``.
        detail: Why.
        removed: Names of tensors that lose something.
    """

    kind: str
    detail: str = ""
    removed: tuple[str, ...] = ()


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """Unoptimised, so that both models run the same kernels."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs by name."""
    runner = session(model)
    names = [output.name for output in runner.get_outputs()]
    wanted = {value.name for value in runner.get_inputs()}
    results = runner.run(names, {name: value for name, value in feeds.items() if name in wanted})
    return dict(zip(names, results, strict=True))


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def prune_open(
    single: Single,
    *,
    channels: float = 0.4,
    residual: bool = False,
    seed: int = 0,
    removed_from: Callable[[Opened], npt.NDArray[np.int32]] | None = None,
) -> Outcome:
    """Prune a model with an open boundary and compare it with its masked original.

    Args:
        single: The model and its inputs.
        channels: Fraction that each free group loses.
        residual: Also cut statistical groups.
        seed: Which labels go is drawn at random.
        removed_from: Gives the labels that go, in place of a choice in every free group.
    """
    opened = open_analysis(single.model)
    if removed_from is not None:
        removed = removed_from(opened)
    else:
        scores = np.random.default_rng(seed).random(len(opened.analysis.atoms))
        try:
            wanted = cuttable(
                opened.analysis, opened.groups, Request(channels, round_to=1, residual=residual)
            )
            kept = keep_counts(opened.groups, scores, wanted, keep_at_least=0.0, round_to=1)
            removed = choose(opened.analysis, opened.groups, scores, kept)
        except NothingToPruneError as error:
            return Outcome("nothing", first_line(error))
    if not len(removed):
        return Outcome("nothing", "every group keeps all it has")
    try:
        run(single.model, single.feeds)
    except Exception as error:
        return Outcome("not run", first_line(error))
    return compare(single, opened, removed)


def compare(single: Single, opened: Opened, removed: npt.NDArray[np.int32]) -> Outcome:
    """Rewrite the analysed copy, and compare it with the masked original."""
    analysis = opened.analysis
    _, masks = make_plan(analysis, opened.groups, removed)
    changed = tuple(tensor.name for tensor in masks.changed())
    try:
        edits = collect(analysis, masks)
        if functions_to_inline(analysis, masks, edits):
            return Outcome("nothing", "its functions would have to be inlined first")
        reference, node_of = reference_of(Network(opened.model, analysis, opened.groups), None)
        Rewriter(analysis, masks).run(edits)
    except Exception as error:
        return Outcome("wrong", f"rewriting: {type(error).__name__}: {first_line(error)}", changed)
    expected, feeds = masked(reference, node_of, analysis, masks, edits, single.feeds)
    try:
        found = run(to_proto(opened.model), feeds)
    except Exception as error:
        return Outcome("wrong", f"the pruned model: {first_line(error)}", changed)
    if set(found) != set(expected):
        return Outcome("wrong", f"outputs {sorted(found)} in place of {sorted(expected)}", changed)
    for name, reference_value in expected.items():
        differs = difference(reference_value, found[name])
        dtype = reference_value.dtype if isinstance(reference_value, np.ndarray) else np.dtype(object)
        if not differs <= tolerance_of(dtype):
            shapes = f"{np.shape(reference_value)} and {np.shape(found[name])}"
            return Outcome(
                "wrong", f"output {name!r} differs by {differs:.2g} of its scale, shapes {shapes}", changed
            )
    return Outcome("exact", "", changed)


def masked(
    reference: ir.Model,
    node_of: Mapping[Op, ir.Node],
    analysis: Analysis,
    masks: Masks,
    edits: Mapping[tuple[tuple[ir.Node, ...], ir.Node], Edits],
    feeds: Mapping[str, Any],
) -> tuple[dict[str, Any], Feeds]:
    """What is left of the masked original's outputs, and of the inputs."""
    mask_model(reference, node_of, analysis, masks, {node: edit for (_, node), edit in edits.items()})
    whole = run(to_proto(reference), {**feeds, SWITCH: np.asarray(False)})
    graph = analysis.graph
    outputs = {
        name: _left(masks, tensor, whole[name])
        for tensor, name in zip(
            graph.outputs, [value.name or "" for value in reference.graph.outputs], strict=True
        )
    }
    inputs = {
        tensor.name: _left(masks, tensor, feeds[tensor.name])
        for tensor in graph.inputs
        if tensor.name in feeds
    }
    return outputs, inputs


def _left(masks: Masks, tensor: Any, array: Any) -> Any:
    mask = masks.mask(tensor)
    return array if mask is None else compact(array, mask)


def free_groups(opened: Opened, *, residual: bool = False) -> list[Group]:
    """Groups that may be cut."""
    return [g for g in opened.groups if not g.frozen and (residual or not g.statistical)]


def tally(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many outcomes there are of each kind."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.kind] = counts.get(outcome.kind, 0) + 1
    return counts
