"""Which operand of which op is a weight that the op sums over, and along which of its axes. Data, one line an op.

The table works on op types and attributes alone: no shapes of activations are needed, so that a model of any size is
read in the time that its nodes take. An op of your own is one more line::

    register("com.acme::Dense", Weight(slot=1, axis=1, outputs=0))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphprune.errors import RuleError

Attributes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Weight:
    """An operand that an op multiplies with an activation and sums over.

    Attributes:
        slot: The operand.
        axis: The axis that is summed over; negative ones count from the end.
        outputs: The axis along which each sum makes another result.
        other: The operand that it is multiplied with; where that is constant too there is nothing to gain.
        grouped: ``axis`` holds the attribute ``group``'s blocks one after another, and no sum leaves its block.
        zero_point: The operand that holds the number standing for zero, for integer weights.
        least_rank: Weights of fewer axes are vectors.
    """

    slot: int
    axis: int
    outputs: int
    other: int = 0
    grouped: bool = False
    zero_point: int | None = None
    least_rank: int = 2


#: What an op's attributes say about its weights.
Describe = Callable[[Attributes], "tuple[Weight, ...]"]


def _gemm(attributes: Attributes) -> tuple[Weight, ...]:
    right = Weight(1, 1, 0) if attributes.get("transB", 0) else Weight(1, 0, 1)
    left = Weight(0, 0, 1, other=1) if attributes.get("transA", 0) else Weight(0, 1, 0, other=1)
    return right, left


def _fused_matmul(attributes: Attributes) -> tuple[Weight, ...]:
    if attributes.get("transBatchA", 0) or attributes.get("transBatchB", 0):
        return ()  # the batch stands between the matrix' axes
    right = Weight(1, -1, -2) if attributes.get("transB", 0) else Weight(1, -2, -1)
    left = Weight(0, -2, -1, other=1) if attributes.get("transA", 0) else Weight(0, -1, -2, other=1)
    return right, left


def _einsum(attributes: Attributes) -> tuple[Weight, ...]:
    """Products of two matrices or batches of them, whatever their axes are called."""
    equation = attributes.get("equation", "")
    text = equation.decode() if isinstance(equation, bytes) else str(equation)
    operands, arrow, result = text.replace(" ", "").partition("->")
    terms = operands.split(",")
    if len(terms) != 2 or not arrow or "." in text or any(len(set(term)) < len(term) for term in terms):
        return ()
    weights = []
    for slot, (term, other) in enumerate((terms, terms[::-1])):
        summed = [letter for letter in term if letter in other and letter not in result]
        made = [letter for letter in term if letter not in other and letter in result]
        if len(summed) == 1 and made:
            weights.append(Weight(slot, term.index(summed[0]), term.index(made[-1]), other=1 - slot))
    return tuple(weights)


def _fixed(*weights: Weight) -> Describe:
    return lambda attributes: weights


#: By op type, with its domain in front where that is not ONNX's own.
CONTRACTED: dict[str, Describe] = {
    "Conv": _fixed(Weight(1, 1, 0, least_rank=3)),
    "ConvInteger": _fixed(Weight(1, 1, 0, least_rank=3, zero_point=3)),
    "QLinearConv": _fixed(Weight(3, 1, 0, least_rank=3, zero_point=5)),
    "ConvTranspose": _fixed(Weight(1, 0, 1, least_rank=3, grouped=True)),
    "MatMul": _fixed(Weight(1, -2, -1), Weight(0, -1, -2, other=1)),
    "MatMulInteger": _fixed(Weight(1, -2, -1, zero_point=3), Weight(0, -1, -2, other=1, zero_point=2)),
    "QLinearMatMul": _fixed(Weight(3, -2, -1, zero_point=5), Weight(0, -1, -2, other=3, zero_point=2)),
    "Gemm": _gemm,
    "Einsum": _einsum,
    "LSTM": _fixed(Weight(1, 2, 1, least_rank=3), Weight(2, 2, 1, least_rank=3)),
    "GRU": _fixed(Weight(1, 2, 1, least_rank=3), Weight(2, 2, 1, least_rank=3)),
    "RNN": _fixed(Weight(1, 2, 1, least_rank=3), Weight(2, 2, 1, least_rank=3)),
    "com.microsoft::FusedMatMul": _fused_matmul,
    "com.microsoft::FusedGemm": _gemm,
    "com.microsoft::FusedConv": _fixed(Weight(1, 1, 0, least_rank=3)),
    "com.microsoft::Attention": _fixed(Weight(1, 0, 1)),
    "com.microsoft::QAttention": _fixed(Weight(1, 0, 1, zero_point=7)),
    "com.microsoft::MatMulIntegerToFloat": _fixed(Weight(1, 0, 1, zero_point=5)),
    "com.microsoft::DynamicQuantizeMatMul": _fixed(Weight(1, 0, 1, zero_point=3)),
}


def register(op_type: str, *weights: Weight) -> None:
    """Add an op, or say otherwise of one that is there.

    Args:
        op_type: The op's type, as ``domain::Type`` outside ONNX's own domain.
        weights: Its operands that are contracted.

    Raises:
        RuleError: A weight's two axes are the same.
    """
    for weight in weights:
        if weight.axis == weight.outputs:
            raise RuleError(
                f"{op_type}: axis {weight.axis} of operand {weight.slot} cannot be both summed and made"
            )
    CONTRACTED[op_type] = _fixed(*weights)


def contracted_weights(domain: str, op_type: str, attributes: Attributes) -> tuple[Weight, ...]:
    """What an op contracts; empty for ops that contract no weight."""
    key = op_type if domain in ("", "ai.onnx") else f"{domain}::{op_type}"
    describe = CONTRACTED.get(key)
    return () if describe is None else describe(attributes)
