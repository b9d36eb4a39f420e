"""Interval arithmetic over the twin: between which values each element of each tensor lies, for all inputs.

Rules are data, registered by op kind (:mod:`graphprune.intervals.registry`); the families below hold those of ONNX.
"""

from __future__ import annotations

from graphprune.intervals import contraction, elementwise, movement, normalisation, reduction
from graphprune.intervals.bounds import Bounds
from graphprune.intervals.propagation import Intervals
from graphprune.intervals.registry import Site, find_rule, registered, rule

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
