"""Budgets: what the pruned network may cost at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from graphprune.errors import OptionError

if TYPE_CHECKING:
    from graphprune.costs import CostModel
    from graphprune.network import Network

#: What may be limited.
Kind: TypeAlias = Literal["macs", "params", "size", "latency", "energy"]


@dataclass(frozen=True)
class Budget:
    """A limit on one cost.

    Attributes:
        kind: What is limited: multiply-accumulates, parameters, the file's bytes, the time in ONNX Runtime on this
            machine, or the modelled energy.
        limit: The fraction to keep, in (0, 1]; for ``size`` a number of bytes.
    """

    kind: Kind
    limit: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise OptionError(f"unknown budget {self.kind!r}; there are {', '.join(get_args(Kind))}")
        if not (isinstance(self.limit, int | float) and math.isfinite(self.limit) and self.limit > 0):
            raise OptionError(f"the budget for {self.kind} is {self.limit!r}; give a positive number")
        if self.kind != "size" and self.limit > 1:
            raise OptionError(
                f"the budget for {self.kind} is {self.limit!r}; give the fraction to keep, at most 1"
            )

    def scaled(self, factor: float) -> Budget:
        """A budget that many times as large, but not above all there is."""
        limit = self.limit * factor
        return Budget(self.kind, limit if self.kind == "size" else min(limit, 1.0))

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.limit:,.0f} bytes" if self.kind == "size" else f"{self.kind} {self.limit:.3g}"
        )


def cost_model(
    network: Network,
    kind: Kind,
    *,
    round_to: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CostModel:
    """The cost that a kind of budget limits.

    Raises:
        ModelError: The latency is limited, and ONNX Runtime cannot run the network.
    """
    from graphprune import costs

    match kind:
        case "macs":
            return costs.MacsCost(network)
        case "params":
            return costs.ParametersCost(network)
        case "size":
            return costs.BytesCost(network)
        case "energy":
            return costs.EnergyCost(network)
        case "latency":
            from graphprune.costs.latency import LatencyCost

            return LatencyCost(network, round_to=round_to, progress=progress)


def amount(budget: Budget, cost: CostModel, network: Network) -> float:
    """The budget in the unit of its cost."""
    if budget.kind == "size":
        return budget.limit
    return budget.limit * cost.total([group.unit for group in network.groups])


def only_budget(limits: Mapping[str, float | int | str | None]) -> Budget | None:
    """The one limit that is given; None where none is.

    Args:
        limits: By kind; a size may be text such as ``5MB``.

    Raises:
        OptionError: More than one is given, or one is out of range.
    """
    given = {kind: limit for kind, limit in limits.items() if limit is not None}
    if len(given) > 1:
        raise OptionError(f"give one budget; {' and '.join(given)} exclude each other")
    for kind, limit in given.items():
        if kind == "size":
            from graphprune.costs.sizes import parse_size

            limit = parse_size(limit)
        return Budget(kind, float(limit))  # type: ignore[arg-type]
    return None
