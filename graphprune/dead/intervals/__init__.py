"""Interval arithmetic over the twin: between which values each element of each tensor lies, for all inputs.

Rules are data, registered by op kind (:mod:`graphprune.dead.intervals.registry`); the families below hold ONNX's.
"""

from __future__ import annotations

from graphprune.dead.intervals import contraction, elementwise, movement, normalisation, reduction
from graphprune.dead.intervals.bounds import Bounds
from graphprune.dead.intervals.propagation import Intervals
from graphprune.dead.intervals.registry import Site, find_rule, registered, rule

__all__ = [
    "Bounds",
    "Intervals",
    "Site",
    "contraction",
    "elementwise",
    "find_rule",
    "movement",
    "normalisation",
    "reduction",
    "registered",
    "rule",
]
