"""Engines on the device: what they compute, and how long they take against each other.

Engines that are compared run in one process, in turn, and are timed by the device's events; a difference below
:data:`NOISE` is none, since two builds of one network differ by as much.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import EngineError
from graphprune.tensorrt.foreign import Answer, ask

if TYPE_CHECKING:
    import numpy.typing as npt

    Arrays = Mapping[str, npt.NDArray[Any]]

#: Seconds.
LIMIT = 600.0
#: Differences of medians below this fraction are not told from chance.
NOISE = 0.03


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One engine, run.

    Attributes:
        engine: Its file.
        outputs: By name.
        milliseconds: Of each timed run.
        version: Of TensorRT.
    """

    engine: str
    outputs: Arrays
    milliseconds: tuple[float, ...]
    version: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two timings of the same work.

    Attributes:
        before, after: Medians, in the unit that was given.
    """

    before: float
    after: float

    @property
    def speedup(self) -> float:
        """How many times as fast."""
        return self.before / self.after

    @property
    def differs(self) -> bool:
        """By more than chance."""
        return abs(self.after / self.before - 1) >= NOISE

    def __str__(self) -> str:
        if not self.differs:
            return f"no difference (below {NOISE:.0%})"
        if self.after < self.before:
            return f"{self.speedup:.2f} times as fast"
        return f"slower: {self.after / self.before:.2f} times as long"


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Compare two timings by their medians.

    >>> str(compare([1.0, 1.2, 9.0], [1.19, 1.19, 1.2]))
    'no difference (below 3%)'
    >>> str(compare([2.0, 2.0, 2.0], [1.0, 1.0, 8.0]))
    '2.00 times as fast'
    """
    return Comparison(statistics.median(before), statistics.median(after))


def largest_difference(outputs: Arrays, reference: Arrays) -> float:
    """The largest difference of any output, as a fraction of that output's largest value in the reference.

    Raises
    ------
    EngineError
        If outputs are missing, or have other shapes.
    """
    import numpy as np

    worst = 0.0
    for name, expected in reference.items():
        if name not in outputs or outputs[name].shape != expected.shape:
            shape = outputs[name].shape if name in outputs else "missing"
            raise EngineError(f"output {name!r} of the engine is {shape}, not {expected.shape}")
        if expected.size == 0:
            continue
        wanted, found = expected.astype(np.float64), outputs[name].astype(np.float64)
        same = (wanted == found) | (np.isnan(wanted) & np.isnan(found))  # infinities too
        if same.all():
            continue
        difference = np.abs(wanted - found)[~same]
        scale = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
        fraction = float(difference.max() / scale) if scale else float("inf")
        worst = max(worst, fraction if np.isfinite(fraction) else float("inf"))
    return worst


def run_engines(
    engines: Sequence[str | os.PathLike[str]],
    feeds: Arrays,
    *,
    rounds: int = 0,
    runs: int = 20,
    warm: int = 20,
    limit: float = LIMIT,
    package: str = "tensorrt",
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
) -> list[EngineRun]:
    """Run engines with the same inputs, in a subprocess, and time them in turn.

    Parameters
    ----------
    engines : sequence of path
        Files that were built on this device.
    feeds : mapping of str to array
        All inputs; cast to the engines' types where these are floating ones.
    rounds, runs, warm : int
        Rounds over all engines, timed runs of each in a round, and untimed ones before the first.
    limit : float
        Seconds after which it is stopped.
    package : {"tensorrt", "tensorrt_rtx"}
        The package that built them.
    environment, python : optional
        See :func:`graphprune.tensorrt.foreign.ask`.

    Returns
    -------
    list of EngineRun
        One for each engine.

    Raises
    ------
    EngineError
        If there is no device, or an engine cannot be run.
    """
    import numpy as np

    paths = [os.path.abspath(engine) for engine in engines]  # noqa: PTH100 - links are kept as they are
    with tempfile.TemporaryDirectory(prefix="graphprune-", ignore_cleanup_errors=True) as folder:
        outputs = [str(Path(folder) / f"outputs{index}.npz") for index in range(len(paths))]
        stored = str(Path(folder) / "feeds.npz")
        np.savez(stored, *feeds.values())  # names of inputs may be no names of files: they are numbered
        question: dict[str, Any] = {
            "package": package,
            "engines": paths,
            "inputs": list(feeds),
            "feeds": stored,
            "outputs": outputs,
            "rounds": rounds,
            "runs": runs,
            "warm": warm if rounds else 0,
        }
        answer = ask("engine", question, limit, environment=environment, python=python)
        facts = answer.contents or {}
        _check(paths, answer, facts)
        results = []
        for index, engine in enumerate(engines):
            with np.load(outputs[index]) as arrays:
                named = {name: arrays[f"arr_{number}"] for number, name in enumerate(facts["names"][index])}
            times = tuple(facts["milliseconds"][index])
            results.append(EngineRun(os.fspath(engine), named, times, facts["version"]))
    return results


def _check(paths: Sequence[str], answer: Answer, facts: Mapping[str, Any]) -> None:
    step = str(facts.get("step", "import"))
    if step == "done":
        return
    error = str(facts.get("error"))
    if step == "import" and error.startswith("ModuleNotFoundError"):
        raise EngineError("TensorRT's Python package is not installed; install it where the engine was built")
    why = answer.failure or facts.get("error") or "the process ended of itself"
    if step in {"import", "device"}:
        what = "TensorRT cannot be imported" if step == "import" else "there is no usable NVIDIA device"
        raise EngineError(f"{what}: {why}")
    doing = {"load": "loading", "run": "running", "time": "timing"}.get(step, step)
    raise EngineError(f"{paths[int(facts.get('engine', 0))]}: TensorRT fails {doing} the engine: {why}")
