"""Settings: everything that a run is asked to do, as one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graphprune.choice.budget import Budget
from graphprune.choice.choose import Request
from graphprune.depth import Criterion, check_criterion
from graphprune.errors import OptionError
from graphprune.plan import Plan

#: How a ratio or a budget is spread over the groups.
SCOPES = ("local", "global", "isomorphic", "allocated")


@dataclass(frozen=True)
class Settings:
    """What to remove, and how.

    Attributes:
        request: Which groups, by what ratio, and how sizes are rounded.
        budget: What the result may cost at most; the ratio of ``request`` is then not used.
        score: Name of the criterion; None: ``obs`` where there are calibration inputs, else ``l2``.
        scope: How a ratio or budget is spread; None: ``allocated`` for budgets where there are calibration inputs, else
            ``local``.
        keep_at_least: The fraction of each group that stays in any case.
        plan: Carry out this plan instead of choosing.
        repair: Refit what reads a cut; None: where something is cut and there are calibration inputs.
        dead: First remove, exactly, what contributes nothing.
        blocks: First remove so many residual branches.
        blocks_by: Which: see :func:`graphprune.depth.measures.measure_branches`.
        input_shapes: Sizes for inputs with dynamic dimensions, by input name.
        seed: For whatever is drawn at random.
        searched: How much goes is found by trials: as much as keeps a metric.
    """

    request: Request = field(default_factory=Request)
    budget: Budget | None = None
    score: str | None = None
    scope: str | None = None
    keep_at_least: float = 0.1
    plan: Plan | None = None
    repair: bool | None = None
    dead: bool = False
    blocks: int = 0
    blocks_by: Criterion = "cosine"
    input_shapes: Mapping[str, Sequence[int]] | None = None
    seed: int = 0
    searched: bool = False

    def __post_init__(self) -> None:
        if self.scope is not None and self.scope not in SCOPES:
            raise OptionError(f"unknown scope {self.scope!r}; there are {', '.join(SCOPES)}")
        if self.scope == "allocated" and self.budget is None and not self.searched:
            raise OptionError(
                "the scope 'allocated' spends a budget: give one, such as --macs 0.5, or another scope"
            )
        if not 0 <= self.keep_at_least <= 1:
            raise OptionError(
                f"keep_at_least is {self.keep_at_least!r}; give the fraction that each group keeps, 0 to 1"
            )
        if self.budget is not None and (self.request.channels or self.plan is not None):
            raise OptionError("a ratio of channels, a plan and a budget exclude each other")
        check_criterion(self.blocks_by)
        if self.blocks < 0:
            raise OptionError(f"blocks is {self.blocks}; give a number of residual branches")

    @property
    def measures(self) -> bool:
        """True if calibration inputs, where there are some, serve more than verification."""
        from graphprune.scores import find_score

        score = "obs" if self.score is None else self.score
        chosen = self.plan is None and self.cuts
        return self.repair is not False or (chosen and find_score(score).needs != "weights")

    @property
    def cuts(self) -> bool:
        """True if coupling groups are to be cut, beside dead positions and blocks."""
        return bool(
            self.budget is not None
            or self.plan is not None
            or self.searched
            or self.request.channels
            or self.request.channels_for
        )
