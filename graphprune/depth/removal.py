"""Depth: a network without some of its residual branches, cut out whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

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
from graphprune.graph.twin import build_twin
from graphprune.masked import WHERE_SINCE
from graphprune.model import copy
from graphprune.model.inlining import inline
from graphprune.model.nodes import subgraphs
from graphprune.model.splice import Splicer
from graphprune.verification.feeds import Feeds, random_feeds

Array: TypeAlias = npt.NDArray[Any]

#: Streams and results of all branches, of one batch, are to take no more bytes than this.
BATCH_BYTES = 256 << 20
#: Most samples at once.
BATCH = 64
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
