"""Cost: parameters and multiply-accumulates, counted on the twin before and after a plan."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TypeAlias

import onnx_ir as ir

from graphprune.axes.analysis import Analysis
from graphprune.axes.flow import SignatureFlow
from graphprune.axes.signature import Signature
from graphprune.graph import Op
from graphprune.model.nodes import stored_tensor
from graphprune.rules.registry import Refusal, find_rule

#: The size of each factor of one op.
SizeOf: TypeAlias = Callable[[str], int]

#: Element types that count as parameters: sizes, indices and flags do not.
_NOT_PARAMETERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING}


def parameters(model: ir.Model) -> int:
    """Number of real or quantised weights that the model stores."""
    total = 0
    for graph in model.graphs():
        stored = [value.const_value for value in graph.initializers.values()]
        stored += [
            stored_tensor(node.outputs[0]) for node in graph if node.op_type == "Constant" and not node.domain
        ]
        total += sum(t.size for t in stored if t is not None and is_parameter(t.dtype))
    return int(total)


def _expand(term: str, signature: Signature) -> list[str]:
    """Factor names of one product; ``R*`` stands for all of R0, R1, ..."""
    if term == "all":
        return list(signature.sizes)
    names: list[str] = []
    for word in term.split():
        if word.endswith("*"):
            names += [n for n in signature.sizes if n.rstrip("0123456789") == word[:-1] and n != word[:-1]]
        else:
            names.append(word)
    return names


def is_parameter(dtype: ir.DataType | None) -> bool:
    """True if elements of this type count as parameters: real or quantised numbers."""
    return dtype is not None and dtype not in _NOT_PARAMETERS


def mac_terms(op: Op, analysis: Analysis) -> list[list[str]]:
    """The products of factors that one op costs, as its rule counts them; equal to its multiply-accumulates in sum."""
    rule = find_rule(op)
    flows = analysis.flows[op.index]
    if rule is None or not rule.macs or isinstance(flows, Refusal):
        return []
    return [
        [name for name in _expand(term.strip(), flow.signature) if name in flow.signature.sizes]
        for flow in flows
        if isinstance(flow, SignatureFlow)
        for term in rule.macs.split("+")
    ]


def macs_of(op: Op, analysis: Analysis, size_of: SizeOf | None = None) -> int:
    """Multiply-accumulates of one op, as its rule counts them.

    A contraction costs the product of its factors' sizes; these are the original ones, or what ``size_of`` says.
    """
    terms = mac_terms(op, analysis)
    if not terms:
        return 0
    if size_of is None:
        flows = analysis.flows[op.index]
        sizes = {
            name: size
            for flow in ([] if isinstance(flows, Refusal) else flows)
            if isinstance(flow, SignatureFlow)
            for name, size in flow.signature.sizes.items()
        }
        size_of = sizes.__getitem__
    return sum(prod(size_of(name) for name in names) for names in terms)


def counted_ops(analysis: Analysis) -> list[Op]:
    """The ops that are run for each input: those that read more than constants."""
    return [op for op in analysis.graph.ops if not all(t is None or t.constant for t in op.inputs)]


def macs(analysis: Analysis, sizes_in: Callable[[Op], SizeOf] | None = None) -> int:
    """Multiply-accumulates of the twin, ops under constants left out; at other sizes if ``sizes_in`` tells them."""
    return sum(
        macs_of(op, analysis, None if sizes_in is None else sizes_in(op)) for op in counted_ops(analysis)
    )
