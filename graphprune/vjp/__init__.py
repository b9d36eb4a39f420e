"""Vector-Jacobian products of ONNX ops, as ONNX nodes: reverse-mode differentiation inside the graph.

Every op type has one rule (:mod:`graphprune.vjp.site`); :func:`graphprune.vjp.program.Program` puts them together.
"""

from __future__ import annotations

from graphprune.vjp import attention, contraction, elementwise, movement, recurrent, reduction, spatial
from graphprune.vjp.emit import Emitter, NoGradientError, Value
from graphprune.vjp.site import Adjoints, Site, differentiable, find_vjp, vjp

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
