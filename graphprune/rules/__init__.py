"""Op rules: what graphprune knows of each op type, as data.

``register`` adds a rule for an op of your own; the families below hold those of ONNX and of ``com.microsoft``.
"""

from __future__ import annotations

from graphprune.rules import (
    attention,
    contraction,
    control,
    elementwise,
    indexing,
    movement,
    normalisation,
    opaque,
    quantisation,
    recurrent,
    reduction,
    spatial,
)
from graphprune.rules.registry import (
    Change,
    Refusal,
    Rule,
    find_rule,
    flows_of,
    output_shapes,
    register,
    registered,
    tensor_at,
)

__all__ = [
    "Change",
    "Refusal",
    "Rule",
    "attention",
    "contraction",
    "control",
    "elementwise",
    "find_rule",
    "flows_of",
    "indexing",
    "movement",
    "normalisation",
    "opaque",
    "output_shapes",
    "quantisation",
    "recurrent",
    "reduction",
    "register",
    "registered",
    "spatial",
    "tensor_at",
]
