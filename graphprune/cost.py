"""Cost: parameters and multiply-accumulates, counted on the twin before and after a plan."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from graphprune.analysis import Analysis
from graphprune.flow import SignatureFlow
from graphprune.graph import Op
from graphprune.nodes import stored_tensor
from graphprune.plan import Masks
from graphprune.rewrite import OpChange
from graphprune.rules.registry import Refusal, find_rule
from graphprune.signature import Signature

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
        total += sum(t.size for t in stored if t is not None and t.dtype not in _NOT_PARAMETERS)
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


def macs_of(op: Op, analysis: Analysis, masks: Masks | None) -> int:
    """Multiply-accumulates of one op, as its rule counts them; after the cut where masks are given.

    A contraction costs the product of its factors' sizes.
    """
    rule = find_rule(op)
    flows = analysis.flows[op.index]
    if rule is None or not rule.macs or isinstance(flows, Refusal):
        return 0
    total = 0
    change = OpChange(op, analysis, masks) if masks is not None else None
    for flow in flows:
        if not isinstance(flow, SignatureFlow):
            continue
        for term in rule.macs.split("+"):
            names = _expand(term.strip(), flow.signature)
            if change is None:
                sizes = [flow.signature.sizes.get(n, 1) for n in names]
            else:
                sizes = [change.factor_sizes(n)[1] for n in names if n in flow.signature.sizes]
            total += prod(sizes)
    return total


def macs(analysis: Analysis, masks: Masks | None = None) -> int:
    """Multiply-accumulates of the whole twin, ops under constants left out."""
    return int(
        np.sum(
            [
                macs_of(op, analysis, masks)
                for op in analysis.graph.ops
                if not all(t is None or t.constant for t in op.inputs)
            ],
            dtype=np.int64,
        )
    )
