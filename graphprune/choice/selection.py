"""Selection: from settings to a plan. What is costly, scores and curves, is worked out once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from graphprune.calibration import Calibration
from graphprune.choice.allocate import allocate, check_reachable, levels_of, uniform
from graphprune.choice.budget import Budget, amount, cost_model
from graphprune.choice.choose import choose, cuttable
from graphprune.choice.scope import keep_counts
from graphprune.choice.sensitivity import Curve, Sensitivity, score_curve
from graphprune.costs import CostModel
from graphprune.network import Network
from graphprune.plan import Plan, make_plan
from graphprune.scores import Evidence, Scores, find_score
from graphprune.settings import Settings

#: Where a step's progress is reported: called with the step, what is done of it, and all of it.
Progress = Callable[[str, int, int], None]


class Selection:
    """What may be cut of one network, what it is worth, and what to remove of it."""

    def __init__(
        self,
        network: Network,
        settings: Settings,
        calibration: Calibration | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Prepare.

        Args:
            network: The analysed model.
            settings: What is asked for.
            calibration: Inputs, where there are some.
            progress: Told about steps that take long.
        """
        self.network = network
        self.settings = settings
        self._calibration = calibration
        self._progress = progress
        self._costs: dict[str, CostModel] = {}

    @cached_property
    def wanted(self) -> list[float | None]:
        """The ratio for each group; None where it may not be cut."""
        request = self.settings.request
        if not (request.channels or request.channels_for):
            request = request.with_channels(0.5)  # any ratio: it says which groups may be cut at all
        return cuttable(self.network.analysis, self.network.groups, request)

    @property
    def scope(self) -> str:
        """How a ratio or budget is spread.

        Without inputs no curve can be measured, and shares of scores do not compare from group to group.
        """
        if self.settings.scope is not None:
            return self.settings.scope
        request = self.settings.request
        ratio = request.channels or request.channels_for
        return "local" if ratio or self._calibration is None else "allocated"

    def _evidence(self, step: str) -> Evidence:
        progress = self._progress
        return Evidence(
            self.network,
            self._calibration,
            self.settings.seed,
            [index for index, ratio in enumerate(self.wanted) if ratio is not None],
            None if progress is None else lambda done, total: progress(step, done, total),
        )

    @cached_property
    def scores(self) -> Scores:
        """What each label is worth."""
        name = self.settings.score or default_score(self._calibration)
        return find_score(name)(self._evidence("scores"))

    @cached_property
    def levels(self) -> dict[int, list[int]]:
        """For each group that may be cut the numbers of parts that are tried, descending."""
        settings = self.settings
        return {
            group.index: found
            for group in self._evidence("levels").groups
            if (found := levels_of(group, settings.request.round_to, settings.keep_at_least))
        }

    @cached_property
    def curves(self) -> list[Curve]:
        """What the outputs lose when each group alone is cut; by scores alone where there are no inputs."""
        groups = self.network.groups
        if self._calibration is None:
            return [score_curve(groups[index], self.scores, found) for index, found in self.levels.items()]
        return Sensitivity(self._evidence("sensitivity"), self.scores, self.levels).measure()

    def cost(self, budget: Budget) -> CostModel:
        """The cost that a budget limits."""
        if budget.kind not in self._costs:
            progress = self._progress
            self._costs[budget.kind] = cost_model(
                self.network,
                budget.kind,
                round_to=self.settings.request.round_to,
                progress=None
                if progress is None
                else lambda done, total: progress("latency table", done, total),
            )
        return self._costs[budget.kind]

    def kept(self, budget: Budget | None, scope: str | None = None) -> list[int | None]:
        """For each group how many of its parts stay; None where it must not be cut.

        Args:
            budget: What the result may cost; None: the settings' ratio holds.
            scope: Instead of the settings'.

        Raises:
            BudgetError: The budget is below what can be reached.
        """
        settings, groups = self.settings, self.network.groups
        scope = scope or self.scope
        if budget is None:
            counts = keep_counts(
                groups,
                self.scores,
                self.wanted,
                scope,
                settings.keep_at_least,
                settings.request.round_to,
            )
        else:
            cost = self.cost(budget)
            limit = amount(budget, cost, self.network)
            if scope == "allocated":
                least = [self.levels[i][-1] if i in self.levels else g.unit for i, g in enumerate(groups)]
                check_reachable(groups, least, cost, limit)  # before anything is measured
                counts = allocate(groups, self.curves, cost, limit)
            else:
                counts = uniform(
                    groups,
                    self.scores,
                    self.wanted,
                    cost,
                    limit,
                    scope=scope,
                    keep_at_least=settings.keep_at_least,
                    round_to=settings.request.round_to,
                )
        return [None if ratio is None else count for ratio, count in zip(self.wanted, counts, strict=True)]

    def plan(self, budget: Budget | None = None, scope: str | None = None) -> Plan:
        """What to remove.

        Args:
            budget: Instead of the settings' own.
            scope: Instead of the settings' own.
        """
        budget = budget if budget is not None else self.settings.budget
        network = self.network
        if self.settings.plan is not None:
            removed = self.settings.plan.removed_labels(network.groups)
        elif not self.settings.cuts and budget is None:
            removed = np.zeros(0, dtype=np.int32)
        else:
            removed = choose(network.analysis, network.groups, self.scores, self.kept(budget, scope))
        return make_plan(network.analysis, network.groups, removed)[0]


def default_score(calibration: Calibration | None) -> str:
    """The criterion that is used where none is named."""
    return "l2" if calibration is None else "obs"
