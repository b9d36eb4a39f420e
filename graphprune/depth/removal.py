"""Depth: residual branches measured on inputs, and cut out whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.axes.analysis import Analysis
from graphprune.calibration import Calibration
from graphprune.depth.blocks import (
    FUSED_NORMS,
    LAYER_NORM_SINCE,
    Branch,
    dropped_slots,
    find_branches,
    is_fused_norm,
)
from graphprune.errors import ModelError, OptionError
from graphprune.graph.twin import build_twin
from graphprune.masked import WHERE_SINCE
from graphprune.model import copy, save
from graphprune.model.inlining import inline
from graphprune.model.nodes import subgraphs
from graphprune.model.splice import Splicer
from graphprune.runtime import make_session, run_session
from graphprune.verification.feeds import random_feeds

if TYPE_CHECKING:
    import onnxruntime

Array: TypeAlias = npt.NDArray[Any]
Feeds: TypeAlias = dict[str, Array]
Progress: TypeAlias = Callable[[str], None]
#: How a branch is judged: by what it adds to the stream, or by what its removal does to the network's outputs.
Criterion: TypeAlias = Literal["cosine", "error"]

#: Streams and results of all branches, of one batch, are to take no more bytes than this.
BATCH_BYTES = 256 << 20
#: Most samples at once.
BATCH = 64
#: Samples on which the error is measured: the network runs once for each branch.
ERROR_SAMPLES = 128
#: The network's own outputs are remembered up to this many bytes, and computed again above.
OUTPUT_BYTES = 512 << 20
#: Random inputs, of the twin's sizes, where no calibration is given.
RANDOM_RUNS = 4


@dataclass
class ResidualNetwork:
    """A model without functions, and its residual branches.

    Attributes:
        model: A copy of the model that was given, all functions inlined.
        analysis: The analysis of its twin.
        branches: All branches; those without an ``obstacle`` can be removed.
    """

    model: ir.Model
    analysis: Analysis
    branches: list[Branch]

    @classmethod
    def of(cls, model: ir.Model, input_shapes: Mapping[str, Sequence[int]] | None = None) -> ResidualNetwork:
        """Find the branches of a model, which is not changed.

        Raises:
            GraphPruneError: See :func:`graphprune.analyze`.
        """
        flat = copy(model)
        if flat.functions:
            inline(flat, {function.identifier() for function in flat.functions.values()})
        analysis = Analysis(build_twin(flat, input_shapes))
        return cls(flat, analysis, find_branches(analysis))

    @property
    def removable(self) -> list[Branch]:
        """The branches that can be removed."""
        return [branch for branch in self.branches if branch.obstacle is None]

    def without(self, branches: Iterable[Branch]) -> ir.Model:
        """A copy of the model with branches removed."""
        return self._edited(branches, cut_branches)

    def zeroed(self, branches: Iterable[Branch]) -> ir.Model:
        """A copy of the model with the results of branches replaced by zeros."""
        return self._edited(branches, zero_branches)

    def _edited(
        self, branches: Iterable[Branch], edit: Callable[[ir.Model, Sequence[Cut]], None]
    ) -> ir.Model:
        model = copy(self.model)
        node_of = dict(zip(self.model.graph.all_nodes(), model.graph.all_nodes(), strict=True))
        ordered = sorted(branches, key=lambda branch: branch.op.index)
        edit(model, [Cut(node_of[node_at(branch)], branch.kept, branch.dropped) for branch in ordered])
        return model

    def batches(self, calibration: Calibration | None, seed: int = 0) -> Iterator[Feeds]:
        """Feeds: the calibration's, in batches that fit in memory; random ones without."""
        graph = self.analysis.graph
        if calibration is None:
            for run in range(RANDOM_RUNS):
                yield random_feeds(graph, seed + run)
            return
        exposed = {tensor for branch in self.removable for tensor in (branch.stream, branch.result)}
        taken = max((t.shape[0] for t in graph.inputs if t.name in calibration.inputs and t.shape), default=1)
        size = sum(4 * prod(tensor.shape or ()) for tensor in exposed) // max(taken, 1)
        yield from calibration.batches(min(max(BATCH_BYTES // max(size, 1), 1), BATCH))


def node_at(branch: Branch) -> ir.Node:
    """The node of the model that adds the branch to the stream."""
    node = branch.op.node
    assert node is not None
    return node


# -- measuring ------------------------------------------------------------------------------------------------------


def measure_branches(
    network: ResidualNetwork,
    calibration: Calibration | None = None,
    *,
    by: Criterion = "cosine",
    removed: Sequence[Branch] = (),
    branches: Sequence[Branch] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[Branch, float]:
    """How much each branch matters: at least 0, and 0 for a branch that does nothing.

    ``cosine``
        ``1 - E[cos(s, s + f)]`` of the stream before and after the branch: the Block Influence of Men et al.,
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (2024), eq. 1. They take the
        cosine over the channels of each token; here it is taken over all that a sample holds (the tensor flattened
        but for axis 0), which needs no notion of a channel axis, and the mean over samples. One run of the network.

    ``error``
        The relative change of the network's outputs when the branch is removed, ``|y' - y| / |y|`` in the 2-norm over
        all samples, averaged over outputs; for outputs that are not real, the share of elements that change.
        One run of the network for each branch, on the first 128 samples.

    Args:
        network: The network.
        calibration: Inputs; random ones if None.
        by: What to measure.
        removed: Branches that are removed already; ``error`` still compares with the whole network.
        branches: What to measure; all removable branches that are not removed if None.
        seed: For random inputs.
        progress: Called with what is being done.

    Returns:
        A number for each branch; infinity where NaN or infinities come up.

    Raises:
        OptionError: ``by`` is unknown, or a branch is not removable.
        ModelError: ONNX Runtime cannot run the network on the inputs.
    """
    if branches is None:
        gone = {op for branch in removed for op in (branch.op, *branch.ops)}
        branches = [branch for branch in network.removable if branch.op not in gone]
    for branch in (*branches, *removed):
        if branch.obstacle is not None:
            raise OptionError(f"branch {branch.name!r} cannot be removed: {branch.obstacle}")
    if by == "cosine":
        if progress is not None:
            progress("measuring blocks")
        return _influence(network, branches, removed, calibration, seed)
    if by == "error":
        return _errors(network, branches, removed, calibration, seed, progress)
    raise OptionError(f"unknown measure of blocks {by!r}; there are cosine, error")


def _influence(
    network: ResidualNetwork,
    branches: Sequence[Branch],
    removed: Sequence[Branch],
    calibration: Calibration | None,
    seed: int,
) -> dict[Branch, float]:
    model = copy(network.model)
    node_of = dict(zip(network.model.graph.all_nodes(), model.graph.all_nodes(), strict=True))
    cuts = [Cut(node_of[node_at(b)], b.kept, b.dropped) for b in sorted(removed, key=lambda b: b.op.index)]
    sums = [node_of[node_at(branch)] for branch in branches]
    cut_branches(model, cuts)
    pairs: list[tuple[str, str]] = []
    for node, branch in zip(sums, branches, strict=True):
        values = node.inputs[branch.kept], node.inputs[branch.dropped]
        for value in values:
            # A stream may be an input of the graph: that is no output, and its feed is at hand.
            if value is not None and not value.is_graph_output() and not value.is_graph_input():
                model.graph.outputs.append(value)
        pairs.append((_name(values[0]), _name(values[1])))
    total = np.zeros(len(branches))
    samples = np.zeros(len(branches))
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        session = _session(model, Path(folder) / "exposed.onnx")
        for feeds in network.batches(calibration, seed):
            found = {**feeds, **_run(session, feeds)}
            for k, (stream, result) in enumerate(pairs):
                changes = change_of_direction(found[stream], found[result])
                total[k] += changes.sum()
                samples[k] += len(changes)
    return {
        branch: _finite(total[k] / samples[k] if samples[k] else np.nan) for k, branch in enumerate(branches)
    }


def change_of_direction(stream: Array, result: Array) -> npt.NDArray[np.float64]:
    """``1 - cos(s, s + f)`` for each sample; 0 where both are zero, 1 where one is.

    Args:
        stream, result: Real arrays of one shape, samples along axis 0; a scalar or a vector is one sample.
    """
    rows = (len(stream), -1) if stream.ndim > 1 else (1, -1)
    before = stream.astype(np.float64).reshape(rows)
    added = result.astype(np.float64).reshape(rows)
    after = before + added
    # 1 - cos = |u - v|^2 / 2 for unit vectors u, v: exact for small changes, where 1 - cos would cancel.
    lengths = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = before / lengths[0][:, None] - after / lengths[1][:, None]
        changes: npt.NDArray[np.float64] = np.square(distance).sum(axis=1) / 2
    empty = (lengths[0] == 0) | (lengths[1] == 0)
    return np.where(empty, (lengths[0] != lengths[1]).astype(np.float64), changes)


def _errors(
    network: ResidualNetwork,
    branches: Sequence[Branch],
    removed: Sequence[Branch],
    calibration: Calibration | None,
    seed: int,
    progress: Progress | None,
) -> dict[Branch, float]:
    errors: dict[Branch, float] = {}
    calibration = calibration.subset(ERROR_SAMPLES) if calibration is not None else None
    with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
        folder = Path(name)
        original = _session(network.model, folder / "original.onnx")
        remembered: list[Feeds] = []
        held = 0
        for number, branch in enumerate(branches):
            if progress is not None:
                progress(f"measuring blocks: {number + 1} of {len(branches)}")
            trial = _session(network.without([*removed, branch]), folder / "trial.onnx")
            change = _Change()
            for index, feeds in enumerate(network.batches(calibration, seed)):
                if index < len(remembered):
                    expected = remembered[index]
                else:
                    expected = _run(original, feeds)
                    held += sum(a.nbytes for a in expected.values() if isinstance(a, np.ndarray))
                    if held <= OUTPUT_BYTES and index == len(remembered):
                        remembered.append(expected)
                change.add(expected, _run(trial, feeds))
            errors[branch] = _finite(change.value())
    return errors


class _Change:
    """The relative change of outputs, summed up batch by batch."""

    def __init__(self) -> None:
        self._changed: dict[str, float] = {}
        self._total: dict[str, float] = {}
        self._real: dict[str, bool] = {}

    def add(self, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        for name, before in expected.items():
            after = found[name]
            if not isinstance(before, np.ndarray) or not isinstance(after, np.ndarray):
                continue
            self._real[name] = before.dtype.kind in "fV"
            if self._real[name] and before.shape == after.shape:
                reference = before.astype(np.float64)
                changed = float(np.square(after.astype(np.float64) - reference).sum())
                total = float(np.square(reference).sum())
            else:  # a result of another length is another result
                same = before.shape == after.shape
                changed = float((before != after).sum()) if same else float(before.size)
                total = float(before.size)
            self._changed[name] = self._changed.get(name, 0.0) + changed
            self._total[name] = self._total.get(name, 0.0) + total

    def value(self) -> float:
        """The mean over outputs; that of the real ones where there are any."""
        names = [name for name, real in self._real.items() if real] or list(self._real)
        changes = []
        for name in names:
            share = self._changed[name] / self._total[name] if self._total[name] else self._changed[name]
            changes.append(share**0.5 if self._real[name] else share)
        return float(np.mean(changes)) if changes else 0.0


def _finite(number: float) -> float:
    return float(number) if np.isfinite(number) else float("inf")


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name


def _session(model: ir.Model, path: Path) -> onnxruntime.InferenceSession:
    save(model, path)
    return make_session(path)


def _run(session: onnxruntime.InferenceSession, feeds: Feeds) -> Feeds:
    try:
        return run_session(session, feeds, "the network to measure its blocks")
    except ModelError as error:
        raise ModelError(f"{error}; give inputs that it can run with --calib") from error


# -- cutting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A sum in a model, and which of its operands stays.

    Attributes:
        node: The node that adds; it lies in the main graph.
        kept: Input slot of the stream.
        dropped: Input slot of the branch's result.
    """

    node: ir.Node
    kept: int
    dropped: int


def cut_branches(model: ir.Model, cuts: Sequence[Cut]) -> None:
    """Replace sums by their streams, in place, and remove what nothing reads any more.

    Outputs of the graph keep their names. Where a sum was one, an Identity stands for it.

    Args:
        model: Its sums must lie in the main graph.
        cuts: In the graph's order; none may lie in a branch of another.
    """
    splice = Splicer(model)
    for cut in cuts:
        node = cut.node
        stream = node.inputs[cut.kept]
        assert stream is not None
        operands = [node.inputs[slot] for slot in dropped_slots(node, cut.dropped)]
        if is_fused_norm(node):
            _replace(splice, node.outputs[0], _norm_alone(model, splice, node, stream))
            for output in node.outputs[3:]:
                _replace(splice, output, stream)
        else:
            _replace(splice, node.outputs[0], stream)
        inputs = list(node.inputs)
        splice.graph_of(node).remove(node, safe=True)
        sweep(model, [*operands, *inputs])


def _replace(splice: Splicer, old: ir.Value, new: ir.Value) -> None:
    """Let all that read ``old`` read ``new``; an output of the graph keeps its name."""
    for reader, slot in list(old.uses()):
        reader.replace_input_with(slot, new)
    if not old.is_graph_output():
        return
    node = old.producer()
    assert node is not None
    name, old.name = old.name, splice.fresh(f"{old.name}_sum")
    named = splice.insert(node, "Identity", [new], like=old, after=True)
    named.name, named.shape, named.doc_string = name, old.shape, old.doc_string
    named.metadata_props.update(old.metadata_props)
    outputs = splice.graph_of(node).outputs
    for position, output in enumerate(outputs):
        if output is old:
            outputs[position] = named


def _norm_alone(model: ir.Model, splice: Splicer, node: ir.Node, stream: ir.Value) -> ir.Value:
    """The normalisation of a fused op, of the stream alone."""
    epsilon = node.attributes.get_float(
        "epsilon", 1e-12 if node.op_type == "SkipLayerNormalization" else 1e-6
    )
    weights = list(node.inputs[2 : FUSED_NORMS[node.op_type]])
    opset = model.opset_imports.get("", 1)
    like = node.outputs[0]
    if node.op_type == "SkipLayerNormalization" and opset >= LAYER_NORM_SINCE:
        made = splice.insert(
            node, "LayerNormalization", [stream, *weights], {"axis": -1, "epsilon": epsilon}, like=like
        )
        made.shape = like.shape
        return made
    # No op of this opset normalises alone. The stream plus itself does: norm(2x) with 4 epsilon is norm(x), and in
    # binary floating point exactly so.
    twin = ir.node(
        node.op_type,
        [stream, stream, *weights],
        {"epsilon": 4 * epsilon},
        domain=node.domain,
        name=splice.fresh(f"{node.name or node.op_type}_alone"),
    )
    made = twin.outputs[0]
    made.name, made.type, made.shape = splice.fresh(f"{like.name}_alone"), like.type, like.shape
    splice.graph_of(node).insert_before(node, twin)
    return made


def zero_branches(model: ir.Model, cuts: Sequence[Cut]) -> None:
    """Replace the results of branches by zeros of the same shape, in place: what :func:`cut_branches` must equal.

    The branches are still computed; infinities in them come through only before opset 9, which has no Where.
    """
    splice = Splicer(model)
    for cut in cuts:
        node = cut.node
        for slot in dropped_slots(node, cut.dropped):
            value = node.inputs[slot]
            if value is None:
                continue
            dtype = value.dtype or node.outputs[0].dtype or ir.DataType.FLOAT
            if model.opset_imports.get("", WHERE_SINCE) < WHERE_SINCE:
                zero = splice.constant(node, "graphprune_zero", _scalar(dtype))
                node.replace_input_with(slot, splice.insert(node, "Mul", [value, zero], like=value))
                continue
            never = splice.constant(node, "graphprune_never", _scalar(ir.DataType.BOOL))
            zero = splice.constant(node, "graphprune_zero", _scalar(dtype))
            node.replace_input_with(slot, splice.insert(node, "Where", [never, value, zero], like=value))


def _scalar(dtype: ir.DataType) -> npt.NDArray[Any]:
    return np.zeros((), dtype.numpy())


def sweep(model: ir.Model, values: Iterable[ir.Value | None]) -> None:
    """Remove what made ``values``, as far as nothing reads it.

    Nodes go with their subgraphs, initializers also as inputs of the graph (before IR version 4 every one is); other
    inputs stay.
    """
    todo = [value for value in values if value is not None]
    while todo:
        value = todo.pop()
        if value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        if node is None:
            _drop_initializer(model, value)
        elif node.graph is not None and not any(o.uses() or o.is_graph_output() for o in node.outputs):
            todo += _detach(node)
            node.graph.remove(node, safe=True)


def _detach(node: ir.Node) -> list[ir.Value]:
    """Let a node and the nodes in its subgraphs read nothing; returns what they read."""
    read: list[ir.Value] = []
    for slot, value in enumerate(node.inputs):
        if value is not None:
            read.append(value)
            node.replace_input_with(slot, None)
    for graph in subgraphs(node):
        for inner in graph:
            read += _detach(inner)
    return read


def _drop_initializer(model: ir.Model, value: ir.Value) -> None:
    for graph in model.graphs():
        if value.name is not None and graph.initializers.get(value.name) is value:
            del graph.initializers[value.name]
            if value in graph.inputs:
                graph.inputs.remove(value)
