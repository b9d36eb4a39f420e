"""Vector-Jacobian products of ONNX ops, as ONNX nodes: reverse-mode differentiation inside the graph.

Every op type has one rule (:mod:`graphprune.gradients.vjp.site`);
:func:`graphprune.gradients.vjp.program.Program` puts them together.
"""

from __future__ import annotations

from graphprune.gradients.vjp import (
    attention,
    contraction,
    elementwise,
    movement,
    recurrent,
    reduction,
    spatial,
)
from graphprune.gradients.vjp.emit import Emitter, NoGradientError, Value
from graphprune.gradients.vjp.site import Adjoints, Site, differentiable, find_vjp, vjp

__all__ = [
    "Adjoints",
    "Emitter",
    "NoGradientError",
    "Site",
    "Value",
    "attention",
    "contraction",
    "differentiable",
    "elementwise",
    "find_vjp",
    "movement",
    "recurrent",
    "reduction",
    "spatial",
    "vjp",
]
