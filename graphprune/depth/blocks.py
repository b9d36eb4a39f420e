"""Depth: residual branches, found in the graph.

A residual branch is the ``f`` of ``out = s + f(s)``: with it gone, ``out`` is the stream ``s`` itself. No op type but
the sum is looked for. Whether ``f`` hangs on the stream is a question of dominance: the network's signal must reach
``f`` through ``s`` alone. So a shortcut that changes the shape, or that holds a layer of its own, makes no branch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import networkx as nx
import onnx_ir as ir

from graphprune.axes.analysis import Analysis
from graphprune.cost import macs_of
from graphprune.graph import TWIN_DOMAIN, Graph, Op, Tensor
from graphprune.network import Network
from graphprune.rules.registry import Refusal

#: ONNX Runtime's ops that normalise the sum of their first two inputs, and the slot of a bias that they add as well.
FUSED_NORMS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
#: Ops that change where the stream's elements stand, or their type, and nothing else: a sum behind them is on the
#: same stream.
_MOVEMENT = frozenset(
    [
        "Identity",
        "Dropout",
        "Cast",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "QuantizeLinear",
        "DequantizeLinear",
    ]
)
#: Ops whose result tells the shape of what they read, not its contents.
_SHAPE_OPS = frozenset(["Shape", "Size"])
#: Contents of these types are sizes, indices and flags: no parameters.
_NOT_PARAMETERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING}
#: The opset that brought LayerNormalization.
LAYER_NORM_SINCE = 17


@dataclass(eq=False)
class Branch:
    """One residual branch of a twin.

    Attributes:
        op: The op that adds the branch to the stream.
        kept: The slot of ``op`` that reads the stream.
        dropped: The slot that reads the branch's result.
        source: The tensor that the branch begins at: the stream, or what the stream is moved from.
        ops: What goes with the branch: ops that nothing else reads, those that prepare its side inputs included, in
            the graph's order; ops on constants are left out.
        parameters: Weights that only these ops read.
        macs: Multiply-accumulates of these ops, at the twin's sizes.
        obstacle: Why it cannot be removed; None if it can.
    """

    op: Op
    kept: int
    dropped: int
    source: Tensor
    ops: list[Op] = field(default_factory=list)
    parameters: int = 0
    macs: int = 0
    obstacle: str | None = None

    @property
    def name(self) -> str:
        """The name of the op that adds the branch to the stream."""
        return self.op.name

    @property
    def stream(self) -> Tensor:
        """What is left of the sum when the branch is gone."""
        return _operand(self.op, self.kept)

    @property
    def result(self) -> Tensor:
        """The branch's result, of the stream's shape."""
        return _operand(self.op, self.dropped)

    @property
    def output(self) -> Tensor:
        """The sum; for an op that normalises it, the normalised sum."""
        output = self.op.outputs[0]
        assert output is not None
        return output

    @property
    def is_normalised(self) -> bool:
        """True if ``op`` also normalises the sum."""
        return is_fused_norm(self.op)

    def contains(self, other: Branch) -> bool:
        """True if ``other`` goes with this branch."""
        return other.op in self.ops

    def __repr__(self) -> str:
        return f"<branch {self.name!r}: {self.stream.name!r} + {self.result.name!r}>"


def _operand(op: Op, slot: int) -> Tensor:
    tensor = op.inputs[slot]
    assert tensor is not None
    return tensor


def is_fused_norm(op: Op | ir.Node) -> bool:
    """True for ONNX Runtime's ops that normalise the sum of their first two inputs."""
    return op.domain == "com.microsoft" and op.op_type in FUSED_NORMS


def find_branches(network: Network | Analysis) -> list[Branch]:
    """The residual branches of a network, in the order of their sums.

    A branch is an operand ``f`` of a sum of two activations of the same shape, if

    * the other operand is a tensor ``s``, or is ``s`` moved, or ``s`` plus something else, and
    * ``s`` dominates ``f``: there is an input from which every path to ``f`` leads through ``s``. (Other inputs may
      reach ``f`` beside it, as an attention mask or the encoder's states do. Flags and shapes carry no signal: where
      a mask is computed from token ids it counts as an input of its own.)
    * something on the way multiplies and accumulates: x + 0.04 x³ in a GELU is no branch.

    It cannot be removed if something inside it is read elsewhere, or if it is all that the network computes.

    Branches lie inside each other where sums do; removing one removes those in it.

    Args:
        network: An analysed network, or its analysis.

    Returns:
        Branches that can be removed (``obstacle`` is None), and those that cannot.
    """
    analysis = network.analysis if isinstance(network, Network) else network
    return _Finder(analysis).branches()


class _Finder:
    """One search over one twin."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._graph = analysis.graph
        self._macs = [
            0 if all(t is None or t.constant for t in op.inputs) else macs_of(op, analysis)
            for op in self._graph.ops
        ]
        self._above = self._ancestors()
        self._working = sum(1 << op.index for op in self._graph.ops if self._works(op))
        self._sources, self._flow = self._signal()
        self._dominators: dict[Tensor, dict[Tensor | Op, Tensor | Op | None]] = {}
        self._readers = readers_of_values(self._graph)

    def branches(self) -> list[Branch]:
        return [branch for op in self._graph.ops if (branch := self._branch_at(op)) is not None]

    # -- what depends on what -----------------------------------------------------------------------------------

    def _ancestors(self) -> list[int]:
        """For each op the ops that its result depends on, itself included, as bits of a number."""
        above: list[int] = []
        for op in self._graph.ops:
            bits = 1 << op.index
            for tensor in op.inputs:
                if tensor is not None and (producer := tensor.producer) is not None:
                    if producer.index < op.index:  # a loop leads back to its beginning
                        bits |= above[producer.index]
            above.append(bits)
        return above

    def _signal(self) -> tuple[list[Tensor], nx.DiGraph[Tensor | Op]]:
        """The tensors at which the network's signal begins, and the ways that it goes on from there.

        Booleans carry no signal; what is made of them, a mask, is a beginning.
        """
        flow: nx.DiGraph[Tensor | Op] = nx.DiGraph()
        sources = [tensor for tensor in self._graph.inputs if tensor.dtype != ir.DataType.BOOL]
        flow.add_nodes_from(sources)
        live = set(self._graph.inputs)
        for op in self._graph.ops:
            operands = [tensor for tensor in op.inputs if tensor is not None]
            if (op.op_type in _SHAPE_OPS and not op.domain) or not any(t in live for t in operands):
                continue
            carriers = [tensor for tensor in operands if tensor in flow]
            for output in op.outputs:
                if output is None:
                    continue
                live.add(output)
                if output.dtype == ir.DataType.BOOL:
                    continue
                flow.add_edge(op, output)
                if not carriers:
                    sources.append(output)
            flow.add_edges_from((tensor, op) for tensor in carriers)
        return sources, flow

    def _reaches(self, source: Tensor, target: Tensor) -> bool:
        """True if ``target`` is computed from ``source``."""
        if target.producer is None:
            return False
        above = self._above[target.producer.index]
        return any(above >> op.index & 1 for op, _ in source.uses)

    def _dominates(self, source: Tensor, target: Tensor) -> bool:
        """True if from some beginning of the signal every way to ``target`` leads through ``source``."""
        if source not in self._flow or not self._reaches(source, target):
            return False
        for root in self._sources:
            if root is not source and not self._reaches(root, source):
                continue
            if root not in self._dominators:
                self._dominators[root] = dict(nx.immediate_dominators(self._flow, root))
            dominators = self._dominators[root]
            node: Tensor | Op | None = target if target in dominators else None
            while node is not None and node is not source:
                above = dominators.get(node)
                node = None if above is node else above
            if node is source:
                return True
        return False

    # -- sums ---------------------------------------------------------------------------------------------------

    def _branch_at(self, op: Op) -> Branch | None:
        if not _is_sum(op):
            return None
        for kept, dropped in ((0, 1), (1, 0)):
            stream, result = _operand(op, kept), _operand(op, dropped)
            if stream is result:
                return None
            own = set(_terms(result))
            for source in _terms(stream):
                # s + (s + g): the second operand is no branch beside the stream, it is the stream once more.
                if source not in own and self._dominates(source, result):
                    branch = Branch(op, kept, dropped, source)
                    return branch if self._measure(branch) else None
        return None

    def _measure(self, branch: Branch) -> bool:
        """Fill in what the branch consists of; False if there is no work in it."""
        inside = self._between(branch.source, branch.result)
        if not any(self._works(op) for op in inside):
            return False
        dead, values = dead_ops(self._readers, [branch])
        branch.ops = [op for op in dead if not _on_constants(op)]
        branch.macs = sum(self._macs[op.index] for op in branch.ops)
        branch.parameters = sum(parameters_of(self._readers[value][0]) for value in values)
        branch.obstacle = self._obstacle(branch, inside, set(dead))
        return True

    def _works(self, op: Op) -> bool:
        """True if the op multiplies and accumulates; an op without a rule is taken for one that does."""
        return self._macs[op.index] > 0 or (
            isinstance(self._analysis.flows[op.index], Refusal) and op.domain != TWIN_DOMAIN
        )

    def _between(self, source: Tensor, target: Tensor) -> list[Op]:
        """The ops on the ways from ``source`` to ``target``."""
        assert target.producer is not None
        above = self._above[target.producer.index]
        reached = {source}
        found: list[Op] = []
        start = source.producer.index + 1 if source.producer is not None else 0
        for op in self._graph.ops[start : target.producer.index + 1]:
            if above >> op.index & 1 and any(tensor in reached for tensor in op.inputs if tensor is not None):
                found.append(op)
                reached.update(output for output in op.outputs if output is not None)
        return found

    def _obstacle(self, branch: Branch, inside: Sequence[Op], dead: set[Op]) -> str | None:
        op = branch.op
        if _is_nested(op, self._graph.model):
            return "it lies in the body of an If, Loop or Scan"
        if branch.is_normalised and (reason := _norm_obstacle(self._graph.model, branch)) is not None:
            return reason
        if all(each in dead for each in inside if self._works(each)):
            return self._emptied(op, dead)
        region = {*inside, op}
        for each in inside:
            for output in each.outputs:
                if output is None or each in dead:
                    continue
                if output.is_output:
                    return f"{output.name!r} in it is an output of the network"
                for reader, _ in output.uses:
                    if reader not in region:
                        return f"{output.name!r} in it is read elsewhere, by {reader.kind} {reader.name!r}"
        return "its result is read twice by the sum"

    def _emptied(self, op: Op, dead: set[Op]) -> str | None:
        """A refusal if the branch is all that the network computes: an image plus its correction, say."""
        gone = sum(1 << each.index for each in dead)
        above = [self._above[t.producer.index] for t in self._graph.outputs if t.producer is not None]
        behind = [bits for bits in above if bits >> op.index & 1]
        if behind and not any(bits & ~gone & self._working for bits in behind):
            return "it is all that the network computes: its input would be left"
        return None


def _is_sum(op: Op) -> bool:
    """True for a sum of two activations of the shape of the result."""
    plain = not op.domain and (op.op_type == "Add" or (op.op_type == "Sum" and len(op.inputs) == 2))
    if not plain and not is_fused_norm(op):
        return False
    output, operands = op.outputs[0], op.inputs[:2]
    return (
        output is not None
        and output.shape is not None
        and len(output.shape) > 0
        and output.dtype is not None
        and output.dtype.is_floating_point()
        and all(t is not None and not t.constant and t.shape == output.shape for t in operands)
        and not any(_broadcasts(t, output) for t in operands if t is not None)
    )


def _broadcasts(operand: Tensor, output: Tensor) -> bool:
    """True if an axis of one element meets a dynamic dimension that happens to be 1 at the twin's sizes."""
    if operand.value is None or output.value is None:
        return False
    mine, other = operand.value.shape, output.value.shape
    if mine is None or other is None or len(mine) != len(other):
        return False
    return any(a == 1 and not isinstance(b, int) and b.value for a, b in zip(mine, other, strict=True))


def _terms(stream: Tensor) -> Iterator[Tensor]:
    """The tensor, what it is moved from, and the terms that it is a sum of; nearest first."""
    queue, seen = [stream], {stream}
    for tensor in queue:  # grows while it is walked
        yield tensor
        op = tensor.producer
        if op is None:
            continue
        if _is_sum(op) and not is_fused_norm(op):
            following = op.inputs[:2]
        elif not op.domain and op.op_type in _MOVEMENT:
            following = op.inputs[:1]
        else:
            continue
        for operand in following:
            if operand is not None and operand not in seen:
                seen.add(operand)
                queue.append(operand)


def _is_nested(op: Op, model: ir.Model) -> bool:
    """True if the op's node lies in a subgraph, or is control flow itself."""
    if op.node is None or op.domain == TWIN_DOMAIN:
        return True
    functions = [function.graph for function in model.functions.values()]
    return not any(op.node.graph is graph for graph in (model.graph, *functions))


def _norm_obstacle(model: ir.Model, branch: Branch) -> str | None:
    op = branch.op
    if any(output is not None and (output.uses or output.is_output) for output in op.outputs[1:3]):
        return "the mean or deviation of the normalised sum is read"
    alone = op.op_type == "SkipLayerNormalization" and model.opset_imports.get("", 1) >= LAYER_NORM_SINCE
    if not alone and branch.stream.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return f"{op.kind} in half precision has no counterpart without the sum in this opset"
    return None


# -- what goes ------------------------------------------------------------------------------------------------------


def _on_constants(op: Op) -> bool:
    return bool(op.inputs) and all(tensor is None or tensor.constant for tensor in op.inputs)


def readers_of_values(graph: Graph) -> dict[ir.Value, list[Tensor]]:
    """For each stored constant of the model the tensors of the twin that stand for its uses."""
    tensors: dict[ir.Value, list[Tensor]] = {}
    for tensor in graph.tensors:
        if tensor.producer is None and tensor.constant and tensor.value is not None:
            tensors.setdefault(tensor.value, []).append(tensor)
    return tensors


def parameters_of(tensor: Tensor) -> int:
    """The number of weights in a stored constant."""
    return 0 if tensor.dtype in _NOT_PARAMETERS else prod(tensor.shape or ())


def dead_ops(
    readers: dict[ir.Value, list[Tensor]], branches: Iterable[Branch]
) -> tuple[list[Op], list[ir.Value]]:
    """What nothing reads any more when branches are cut.

    Args:
        readers: See :func:`readers_of_values`.
        branches: Branches of one twin.

    Returns:
        Ops in the graph's order, and stored constants.
    """
    cut = {(branch.op, slot) for branch in branches for slot in dropped_slots(branch.op, branch.dropped)}
    dead: dict[Op, None] = {}
    leaves: dict[ir.Value, None] = {}
    queue: list[tuple[int, int, Op]] = []
    queued: set[Op] = set()

    def visit(tensor: Tensor | None) -> None:
        if tensor is None:
            return
        if tensor.producer is None:
            if tensor.constant and tensor.value is not None:
                leaves[tensor.value] = None
        elif tensor.producer not in queued:
            queued.add(tensor.producer)
            heapq.heappush(queue, (-tensor.producer.index, len(queued), tensor.producer))

    def is_dead(tensor: Tensor) -> bool:
        return not tensor.is_output and all(use in cut or use[0] in dead for use in tensor.uses)

    for op, slot in cut:
        visit(op.inputs[slot])
    while queue:  # readers before what they read
        _, _, op = heapq.heappop(queue)
        if all(output is None or is_dead(output) for output in op.outputs):
            dead[op] = None
            for tensor in op.inputs:
                visit(tensor)
    unread = [value for value in leaves if all(is_dead(tensor) for tensor in readers[value])]
    return sorted(dead, key=lambda op: op.index), unread


def dropped_slots(op: Op | ir.Node, dropped: int) -> list[int]:
    """The slots of a sum that go with a branch: its result and, of a fused op, the bias, which is the branch's."""
    bias = FUSED_NORMS[op.op_type] if is_fused_norm(op) else None
    return [dropped] if bias is None or bias >= len(op.inputs) else [dropped, bias]
