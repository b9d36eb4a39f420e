"""Search: budgets that only a measurement of the pruned network can tell, latency and accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np

from graphprune.calibration import Array, Calibration
from graphprune.choice.budget import Budget, amount
from graphprune.choice.choose import Request
from graphprune.choice.metrics import Metric, evaluate, find_metric
from graphprune.errors import BudgetError, OptionError
from graphprune.model import as_ir, to_proto
from graphprune.plan import Plan
from graphprune.settings import Settings

if TYPE_CHECKING:
    from graphprune.pruning import Pruning

#: A latency within this part of what was asked for is met.
LATENCY_TOLERANCE = 0.05
#: Times that a latency budget is corrected by a measurement.
CORRECTIONS = 6
#: Pairs of runs of a measurement.
PAIRS = 60
#: Seconds after which a measurement begins no further pair.
PAIR_SECONDS = 20.0
#: The largest cut within a drop is found to this part of the multiply-accumulates.
PRECISION = 0.02
#: What tells BLAS how many threads to use; read when a process starts.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
#: The part of the calibration's inputs that is held out to judge on, where no other inputs are given.
HELD_OUT = 0.25


# -- latency ---------------------------------------------------------------------------------------------------------


def plan_for_latency(
    pruning: Pruning, budget: Budget, ratio_of: Callable[[Plan], float] | None = None
) -> tuple[Plan, float, float]:
    """The plan that brings the measured latency to a budget.

    Tables of layers say what a plan will save; the pruned network is then measured beside the original, and the budget
    that the tables are asked for is corrected by how far they were off.

    Args:
        pruning: The model.
        budget: Of kind ``latency``.
        ratio_of: Measures a plan: its network's latency over the original's. Tests give their own.

    Returns:
        The plan, the predicted ratio, and the measured one.

    Raises:
        BudgetError: Not reachable by what may be cut.
    """
    measure = ratio_of or (lambda plan: _measured_ratio(pruning, plan))
    cost = pruning.selection.cost(budget)
    whole = [group.unit for group in pruning.network.groups]
    full = cost.total(whole)
    # What there is to choose from is faster than the original where exact passes or removed blocks came before.
    start = measure(Plan([])) if pruning.makes_smaller_first else 1.0
    asked = Budget("latency", min(budget.limit / start, 1.0))
    below, above = 0.0, float("inf")  # what was asked for and came out too fast, or too slow
    found: list[tuple[Plan, float, float]] = []
    for _ in range(CORRECTIONS):
        try:
            kept = pruning.selection.kept(asked)
        except BudgetError:
            if not found:
                raise
            break  # what has been found is the least there is
        left = cost.total([w if k is None else k for k, w in zip(kept, whole, strict=True)])
        predicted = start * left / full
        plan = pruning.plan(asked)
        measured = measure(plan)
        found.append((plan, predicted, measured))
        if abs(measured / budget.limit - 1) <= LATENCY_TOLERANCE:
            break
        if measured > budget.limit:
            above = min(above, asked.limit)
        else:
            below = max(below, asked.limit)
        corrected = asked.limit * budget.limit / measured
        if not below < corrected < above:  # timings are noisy: stay between what is known
            corrected = (below + above) / 2 if above < float("inf") else (below + 1) / 2
        if abs(corrected / asked.limit - 1) < 1e-3:
            break
        asked = Budget("latency", min(corrected, 1.0))
    within = [trial for trial in found if trial[2] <= budget.limit * (1 + LATENCY_TOLERANCE)]
    if not within:
        fastest = min(trial[2] for trial in found)
        raise BudgetError(
            f"a latency of {budget.limit:.3g} of the original's was not reached: the least that was measured is"
            f" {fastest:.3g}; raise --latency, or allow more with --residual or a lower --keep-at-least"
        )
    return max(within, key=lambda trial: trial[2])


def _measured_ratio(pruning: Pruning, plan: Plan) -> float:
    from graphprune.costs.timing import compare
    from graphprune.verification.feeds import random_feeds

    if not plan.cuts and not pruning.makes_smaller_first:
        return 1.0
    feeds = random_feeds(pruning.network.analysis.graph, pruning.settings.seed)
    return compare(pruning.original, pruning.cut(plan).model, feeds, PAIRS, seconds=PAIR_SECONDS)


# -- accuracy --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One cut to be tried, in whatever process.

    Attributes:
        model: The model after exact passes, serialised.
        settings: With a plan.
        calibration: Inputs for the repair.
        judged_on: Inputs for the metric.
        reference: The original's outputs on those.
        metric: How to judge.
    """

    model: bytes
    settings: Settings
    calibration: Calibration | None
    judged_on: Calibration
    reference: Mapping[str, Array]
    metric: Metric

    def run(self) -> float:
        """Cut, repair, and judge; the metric."""
        import onnx

        from graphprune.pruning import Pruning

        source, _ = as_ir(onnx.ModelProto.FromString(self.model))
        pruning = Pruning(source, self.settings, calibration=self.calibration, verify=False)
        assert self.settings.plan is not None
        pruned = pruning.cut(self.settings.plan)
        if pruning.repairs:
            pruning.repair(pruned)
        found = evaluate(to_proto(pruned.model).SerializeToString(), self.judged_on)
        return self.metric(found, self.reference, self.judged_on.labels)


def run_trial(trial: Trial) -> float:
    """:meth:`Trial.run`, under a name that other processes can import."""
    return trial.run()


@dataclass(frozen=True)
class Drop:
    """What accuracy may be lost.

    Attributes:
        most: The greatest difference of the metric to the original's.
        metric: Its name (see :func:`graphprune.choice.metrics.find_metric`); None: top1 where there are labels, else
            agreement.
        jobs: Trials that run at once, each in a process of its own.
        executor: Runs the trials instead: anything that has ``submit`` as :class:`concurrent.futures.Executor` does.
    """

    most: float
    metric: str | None = None
    jobs: int = 1
    executor: Executor | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.most) and self.most >= 0):
            raise OptionError(f"the drop is {self.most!r}; give a number of at least 0, such as 0.01")
        if self.jobs < 1:
            raise OptionError(f"jobs is {self.jobs}; give a positive number")


def split(calibration: Calibration, seed: int) -> tuple[Calibration, Calibration]:
    """Calibration inputs in two parts: to measure and repair with, and to judge on."""
    order = np.random.default_rng(seed).permutation(calibration.samples)
    held = max(1, int(HELD_OUT * calibration.samples))
    if calibration.samples < 8:
        raise OptionError(
            f"{calibration.samples} calibration inputs are too few to hold some out for the metric; give more, or"
            " others to judge on with --metric-data"
        )
    return calibration.pick(np.sort(order[held:])), calibration.pick(np.sort(order[:held]))


def plan_within_drop(pruning: Pruning, drop: Drop, judged_on: Calibration) -> tuple[Plan, float, float]:
    """The plan that keeps the fewest multiply-accumulates with the metric within a drop.

    Returns:
        The plan, the original's metric and the pruned network's, both on ``judged_on``.

    Raises:
        BudgetError: Not even the mildest cut stays within the drop.
        MetricError: The metric raises or returns no number.
    """
    name = drop.metric or ("top1" if judged_on.labels is not None else "agreement")
    metric = find_metric(name)
    original = to_proto(pruning.original).SerializeToString()
    reference = evaluate(original, judged_on)
    whole = metric(reference, reference, judged_on.labels)
    base = to_proto(pruning.base).SerializeToString()
    settings = replace(
        pruning.settings,
        dead=False,
        blocks=0,
        budget=None,
        scope=None,
        request=Request(),
        repair=pruning.repairs,
        searched=False,
    )

    def trial(plan: Plan) -> Trial:
        return Trial(base, replace(settings, plan=plan), pruning.calibration, judged_on, reference, metric)

    least = _least(pruning)
    low, high = least, 1.0
    found: tuple[Plan, float] | None = None
    mildest: float | None = None
    with _executor(drop) as executor:
        workers = drop.jobs if executor is not None else 1
        done = 0
        while high - low > PRECISION:
            fractions = [low + (high - low) * (i + 1) / (workers + 1) for i in range(workers)]
            if found is None and done == 0:
                fractions[0] = low + 1e-9  # perhaps all that may go can go
            plans = [pruning.plan(Budget("macs", fraction)) for fraction in fractions]
            pruning._part("search", done, done + int(np.ceil(np.log2((high - low) / PRECISION))))
            judged = iter(_run_all([trial(plan) for plan in plans if plan.cuts], executor))
            values = [next(judged) if plan.cuts else whole for plan in plans]
            done += 1
            for fraction, plan, value in sorted(
                zip(fractions, plans, values, strict=True), key=lambda item: -item[0]
            ):
                if whole - value <= drop.most + 1e-12:
                    found, high = (plan, value), fraction
                else:
                    mildest = value if mildest is None else max(mildest, value)
                    low = max(low, fraction)
                    break
    if found is None or not found[0].cuts:
        worst = "" if mildest is None else f"; the mildest that was tried has {mildest:.4g}"
        raise BudgetError(
            f"no cut keeps {name} within {drop.most:g} of the original's {whole:.4g}{worst}; allow a larger drop, or"
            " give more calibration inputs"
        )
    return found[0], whole, found[1]


def _least(pruning: Pruning) -> float:
    """The fraction of multiply-accumulates that is left where all goes that may."""
    budget = Budget("macs", 1.0)
    cost = pruning.selection.cost(budget)
    groups = pruning.network.groups
    curves = {curve.index: curve.kept[-1] for curve in pruning.selection.curves}
    return cost.total([curves.get(i, group.unit) for i, group in enumerate(groups)]) / amount(
        budget, cost, pruning.network
    )


@contextmanager
def _executor(drop: Drop) -> Iterator[Executor | None]:
    """The user's executor, a pool of processes, or None for one trial after the other.

    Processes are spawned: a forked child would inherit the locks of BLAS's and ONNX Runtime's threads without the
    threads. Each gets its share of the cores.
    """
    if drop.executor is not None or drop.jobs == 1:
        yield drop.executor
        return
    share = str(max(1, (os.cpu_count() or 1) // drop.jobs))
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, share))
    try:
        with ProcessPoolExecutor(drop.jobs, get_context("spawn")) as pool:
            yield pool
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _run_all(trials: Sequence[Trial], executor: Executor | None) -> list[float]:
    if executor is None:
        return [trial.run() for trial in trials]
    return [future.result() for future in [executor.submit(run_trial, trial) for trial in trials]]
