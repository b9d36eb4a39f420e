"""Small graphs, one for each way in which real networks tie channels together."""

from __future__ import annotations

from . import attention, contrib, control, convolutional, movement, normalisation, recurrent, weights
from .builder import Built, Pattern, run

FAMILIES = (convolutional, movement, attention, normalisation, recurrent, control, weights, contrib)
PATTERNS: tuple[Pattern, ...] = tuple(pattern for family in FAMILIES for pattern in family.PATTERNS)

__all__ = ["FAMILIES", "PATTERNS", "Built", "Pattern", "run"]
