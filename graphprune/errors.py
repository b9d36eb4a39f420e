"""Every error that graphprune raises on purpose.

One root, so that ``except graphprune.GraphPruneError`` catches them all. A message says what is wrong, where (node,
tensor, axis) and what to do, in one line.
"""

from __future__ import annotations


class GraphPruneError(Exception):
    """Root of all errors raised by graphprune."""


class ModelError(GraphPruneError):
    """The model cannot be read, is invalid, or cannot be written."""


class OptionError(GraphPruneError):
    """An argument is out of range, malformed, or names nothing in the model."""


class MetricError(GraphPruneError):
    """A metric raised, returned no number, or cannot judge the network's outputs."""


class NothingToPruneError(GraphPruneError):
    """No coupling group is free, or the request removes nothing."""


class BudgetError(GraphPruneError):
    """A budget is below what can be reached; the message says what can."""


class SparsityError(GraphPruneError):
    """No weight can have the pattern, or some fall short of what was required; the message names them and why."""


class RuleError(GraphPruneError):
    """An op rule is malformed or contradicts the op's tensors."""


class PlanError(GraphPruneError):
    """A plan does not fit the model, or cannot be carried out."""


class VerificationError(GraphPruneError):
    """The pruned model is invalid or differs from the masked original."""


class EngineError(GraphPruneError):
    """TensorRT is missing, fails, or does not take the network."""


def said(error: Exception, lines: int = 1) -> str:
    """What another package's exception says, in one line made of its first ``lines`` that are not blank."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(said[:lines]) or type(error).__name__
