"""What a cut saves: cost models for budgets.

A budget is met by choosing how much each group keeps; a :class:`CostModel` tells what that costs, and what each group
saves at each level, without pruning anything.
"""

from graphprune.costs.energy import EnergyCost
from graphprune.costs.latency import LatencyCost, LatencyTable
from graphprune.costs.models import BytesCost, CostModel, MacsCost, ParametersCost
from graphprune.costs.sizes import parse_size
from graphprune.costs.timing import compare, measure
from graphprune.costs.widths import Extent, Kept, Widths

__all__ = [
    "BytesCost",
    "CostModel",
    "EnergyCost",
    "Extent",
    "Kept",
    "LatencyCost",
    "LatencyTable",
    "MacsCost",
    "ParametersCost",
    "Widths",
    "compare",
    "measure",
    "parse_size",
]
