"""graphprune: a pruning compiler for ONNX networks.

>>> import graphprune
>>> issubclass(graphprune.VerificationError, graphprune.GraphPruneError)
True

Everything but the errors is imported on first use (PEP 562): ``import graphprune`` loads neither NumPy nor ONNX, which
would take most of a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from graphprune.errors import (
    BudgetError,
    EngineError,
    GraphPruneError,
    MetricError,
    ModelError,
    NothingToPruneError,
    OptionError,
    PlanError,
    RuleError,
    SparsityError,
    VerificationError,
)

if TYPE_CHECKING:
    from graphprune.axes.analysis import Analysis as Analysis
    from graphprune.axes.coupling import coupling_graph as coupling_graph
    from graphprune.axes.groups import Group as Group
    from graphprune.calibration import Calibration as Calibration
    from graphprune.calibration import load_calibration as load_calibration
    from graphprune.calibration.preprocess import Preprocess as Preprocess
    from graphprune.model.kinds import from_graphsurgeon as from_graphsurgeon
    from graphprune.model.kinds import to_graphsurgeon as to_graphsurgeon
    from graphprune.network import Network as Network
    from graphprune.pipeline import analyze as analyze
    from graphprune.pipeline import prune as prune
    from graphprune.pipeline import sparsify as sparsify
    from graphprune.plan import Plan as Plan
    from graphprune.report import Report as Report
    from graphprune.sparsity.pattern import NM as NM
    from graphprune.sparsity.pattern import Unstructured as Unstructured
    from graphprune.sparsity.report import SparsityReport as SparsityReport

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Analysis",
    "BudgetError",
    "Calibration",
    "EngineError",
    "GraphPruneError",
    "Group",
    "MetricError",
    "ModelError",
    "Network",
    "NothingToPruneError",
    "OptionError",
    "Plan",
    "PlanError",
    "Preprocess",
    "Report",
    "RuleError",
    "SparsityError",
    "SparsityReport",
    "Unstructured",
    "VerificationError",
    "__version__",
    "analyze",
    "coupling_graph",
    "from_graphsurgeon",
    "load_calibration",
    "prune",
    "sparsify",
    "to_graphsurgeon",
]

# The home module of each lazy name; the imports under TYPE_CHECKING say the same to type checkers.
_HOMES = {
    "Analysis": "graphprune.axes.analysis",
    "Calibration": "graphprune.calibration",
    "Group": "graphprune.axes.groups",
    "Network": "graphprune.network",
    "Plan": "graphprune.plan",
    "Preprocess": "graphprune.calibration.preprocess",
    "NM": "graphprune.sparsity.pattern",
    "Report": "graphprune.report",
    "SparsityReport": "graphprune.sparsity.report",
    "Unstructured": "graphprune.sparsity.pattern",
    "analyze": "graphprune.pipeline",
    "coupling_graph": "graphprune.axes.coupling",
    "from_graphsurgeon": "graphprune.model.kinds",
    "load_calibration": "graphprune.calibration",
    "prune": "graphprune.pipeline",
    "sparsify": "graphprune.pipeline",
    "to_graphsurgeon": "graphprune.model.kinds",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'graphprune' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
