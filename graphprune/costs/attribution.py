"""Which op of the twin each kernel of an optimised graph stems from.

ONNX Runtime fuses and renames: what it makes of a node keeps the node's name or that of the node's output. So the
nodes are given names that can be told, and the rest follows values and, through what was fused, producers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from graphprune.cost import counted_ops, mac_terms
from graphprune.costs.timing import Kernel
from graphprune.graph import Op

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphprune.network import Network

#: How far back from a fused kernel's output the op is looked for that it stems from.
_DEPTH = 6
#: Convolutions in optimised graphs.
_CONVOLUTIONS = frozenset(
    {"Conv", "ConvTranspose", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger"}
)
#: What matrix products become in optimised graphs.
_PRODUCTS = frozenset(
    {
        "MatMul",
        "Gemm",
        "FusedMatMul",
        "FusedGemm",
        "MatMulInteger",
        "QLinearMatMul",
        "Attention",
        "QAttention",
    }
    | {"MultiHeadAttention", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"}
)
#: Padding to blocks of channels makes a kernel's weight at most this much larger than the op's.
_PADDED = 8

_NAME = re.compile(r"gp(\d+)_")


@dataclass(frozen=True, slots=True)
class Stem:
    """What one kernel stems from.

    Attributes:
        kernel: The kernel.
        op: The op whose result it makes; None if that is not known.
        sums: The kernel is the op's sum of products, and its time is that of the op at its widths.
        among: Where the kernel sums products but the op is not known: all ops that may be meant.
    """

    kernel: Kernel
    op: Op | None
    sums: bool = False
    among: tuple[Op, ...] = ()


def name_nodes(model: ir.Model) -> None:
    """Give all nodes of a model names by which :func:`stems_of` knows them; in place."""
    for number, node in enumerate(model.graph.all_nodes()):
        node.name = f"gp{number}_{node.op_type}"


def stems_of(network: Network, kernels: Sequence[Kernel]) -> list[Stem]:
    """Where each kernel comes from.

    Args:
        network: The analysed model.
        kernels: The profile of a copy of the model whose nodes bear the names of :func:`name_nodes`.
    """
    finder = _Finder(network)
    found = [finder.find(kernel) for kernel in kernels]
    claimed = {stem.op for stem in found if stem.sums}
    rest = tuple(op for op in finder.contractions if op not in claimed)
    return [
        Stem(stem.kernel, stem.op, among=rest) if finder.is_unknown_sum(stem) and rest else stem
        for stem in found
    ]


class _Finder:
    def __init__(self, network: Network) -> None:
        graph = network.analysis.graph
        by_node = {op.node: op for op in graph.ops if op.node is not None and not op.path}
        self._by_number = [by_node.get(node) for node in network.model.graph.all_nodes()]
        self._by_value = {
            tensor.value.name: tensor.producer
            for tensor in graph.tensors
            if tensor.value is not None and tensor.producer is not None and not tensor.producer.path
        }
        self.contractions = [op for op in counted_ops(network.analysis) if mac_terms(op, network.analysis)]
        self._is_contraction = set(self.contractions)

    def find(self, kernel: Kernel) -> Stem:
        op = self._op_of(kernel)
        if op is None:
            return Stem(kernel, None)
        if op in self._is_contraction and (kernel.op_type == op.op_type or self._sums(kernel)):
            return Stem(kernel, op, sums=True)
        if kernel.op_type in _CONVOLUTIONS:
            for earlier in self._before(op):
                if earlier in self._is_contraction and _same_weight(kernel, earlier):
                    return Stem(kernel, earlier, sums=True)
        return Stem(kernel, op)

    def is_unknown_sum(self, stem: Stem) -> bool:
        """True if a kernel sums products of nobody knows which op."""
        return not stem.sums and stem.kernel.op_type in _PRODUCTS

    @staticmethod
    def _sums(kernel: Kernel) -> bool:
        return kernel.op_type in _CONVOLUTIONS or kernel.op_type in _PRODUCTS

    def _op_of(self, kernel: Kernel) -> Op | None:
        match = _NAME.search(kernel.name)
        if match and int(match[1]) < len(self._by_number):
            return self._by_number[int(match[1])]
        for name in (kernel.name.removesuffix("_nchwc"), *kernel.outputs, *kernel.inputs):
            if name in self._by_value:
                return self._by_value[name]
        return None

    @staticmethod
    def _before(op: Op) -> Iterator[Op]:
        """The op and those before it, nearest first."""
        layer, seen = [op], {op}
        for _ in range(_DEPTH):
            yield from layer
            earlier = [
                t.producer for o in layer for t in o.inputs if t is not None and t.producer is not None
            ]
            layer = [o for o in dict.fromkeys(earlier) if o not in seen]
            seen.update(layer)


def _same_weight(kernel: Kernel, op: Op) -> bool:
    """True if a convolution's weight is the op's, up to padding; a BatchNorm that became one has a smaller one."""
    weight = op.inputs[1] if len(op.inputs) > 1 else None
    if weight is None or weight.shape is None or len(kernel.input_shapes) < 2:
        return False
    return prod(weight.shape) <= prod(kernel.input_shapes[1]) <= _PADDED * prod(weight.shape)
