"""Engines against each other: the original, the pruned network without and with sparse kernels, timed in turn."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from graphprune.tensorrt.build import build_engine
from graphprune.tensorrt.engines import Comparison, compare, run_engines
from graphprune.tensorrt.plan import BuildPlan

if TYPE_CHECKING:
    import numpy.typing as npt

    Arrays = Mapping[str, npt.NDArray[Any]]

#: Rounds over all engines, and timed runs of each in a round.
ROUNDS, RUNS = 10, 20


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine of a race.

    Attributes:
        name: For the table.
        plan: How it is built.
        engine: Its file, where it has been built.
    """

    name: str
    plan: BuildPlan
    engine: Path | None = None


@dataclass(frozen=True, slots=True)
class Timed:
    """One engine's time.

    Attributes:
        name: Of the contender.
        floats: Its floating types.
        milliseconds: The median.
        runs: How many.
        gain: Against the first of the race; None for that.
        over_last: Against the one before; None for the first two.
    """

    name: str
    floats: tuple[str, ...]
    milliseconds: float
    runs: int
    gain: Comparison | None
    over_last: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "name": self.name,
            "types": list(self.floats),
            "milliseconds": self.milliseconds,
            "runs": self.runs,
            "speedup": None if self.gain is None else self.gain.speedup,
            "against_first": None if self.gain is None else str(self.gain),
            "against_previous": None if self.over_last is None else str(self.over_last),
        }


def race(
    contenders: Sequence[Contender],
    feeds: Arrays,
    *,
    limit: float,
    step: Callable[[str], None] = lambda name: None,
    rounds: int = ROUNDS,
    runs: int = RUNS,
) -> list[Timed]:
    """Build what is not built yet, and time all in turn on the device.

    Parameters
    ----------
    contenders : sequence of Contender
        In the order of the table. Those without an engine are built in a folder that goes afterwards.
    feeds : mapping of str to array
        The inputs of all.
    limit : float
        Seconds for each build, and for the race.
    step : callable
        Called with the name of each step.
    rounds, runs : int
        Rounds over all, and timed runs of each in a round.

    Returns
    -------
    list of Timed
        One for each contender.

    Raises
    ------
    EngineError
        If one cannot be built or run.
    """
    with tempfile.TemporaryDirectory(prefix="graphprune-", ignore_cleanup_errors=True) as folder:
        engines = []
        for index, contender in enumerate(contenders):
            if contender.engine is not None:
                engines.append(contender.engine)
                continue
            step(f"building: {contender.name}")
            plan = dataclasses.replace(
                contender.plan, engine=str(Path(folder) / f"{index}.plan"), layers=None
            )
            engines.append(build_engine(plan, limit=limit).engine)
        step("timing")
        results = run_engines(engines, feeds, rounds=rounds, runs=runs, limit=limit)
    times = [result.milliseconds for result in results]
    return [
        Timed(
            contender.name,
            contender.plan.precision.floats,
            median(times[index]),
            len(times[index]),
            compare(times[0], times[index]) if index else None,
            compare(times[index - 1], times[index]) if index > 1 else None,
        )
        for index, contender in enumerate(contenders)
    ]
