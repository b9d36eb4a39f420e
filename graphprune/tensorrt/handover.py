"""Handing a network to TensorRT: plan and script always, an engine where that can be had, and what became of its zeros.

Nothing foreign is imported here: what TensorRT does, it does in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import EngineError
from graphprune.model import load
from graphprune.sparsity.inspection import inspect_sparsity
from graphprune.sparsity.pattern import NM
from graphprune.tensorrt.plan import MAJORS, BuildPlan, make_plan, write_plan
from graphprune.tensorrt.probe import DEVICE, RTX, TENSORRT, Found, probe
from graphprune.tensorrt.verdict import Judgement, judge

if TYPE_CHECKING:
    from graphprune.sparsity.report import SparsityReport
    from graphprune.tensorrt.build import Built
    from graphprune.tensorrt.profiles import Profile
    from graphprune.tensorrt.rtx import Conformance


@dataclass(frozen=True)
class EngineSettings:
    """What is to be built.

    Attributes:
        engine: The file to write.
        major: TensorRT's major version to plan for; None for the one that is installed, else the newest known.
        sparsity: Let TensorRT use sparse kernels.
        shapes: Profiles for dynamic inputs.
        workspace: Memory for kernels, in MiB.
        timing_cache: File of kernels' times.
        required: No engine is an error.
        limit: Seconds that a build may take.
    """

    engine: Path
    major: int | None = None
    sparsity: bool = True
    shapes: Sequence[Profile] = ()
    workspace: int | None = None
    timing_cache: Path | None = None
    required: bool = False
    limit: float = 3600.0


@dataclass
class EngineReport:
    """What was written and built, and what it proves.

    Attributes:
        plan: What to build.
        plan_path, script_path: Its two files.
        weights: What the model's weights hold, and whether TensorRT can use it.
        judgement: What became of the sparse weights.
        found: What the probes found.
        built: The engine; None where none was built.
        conformance: What TensorRT-RTX, where it is installed, says of the network: types and shapes, no speed.
        notes: What a person should know.
    """

    plan: BuildPlan
    plan_path: Path
    script_path: Path
    weights: SparsityReport
    judgement: Judgement
    found: list[Found] = field(default_factory=list)
    built: Built | None = None
    conformance: Conformance | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        conformance = self.conformance
        return {
            "plan": str(self.plan_path),
            "script": str(self.script_path),
            "tensorrt": self.plan.major,
            "engine": None if self.built is None else self.built.to_dict(),
            "verdict": self.judgement.to_dict(),
            "weights": [entry.to_dict() for entry in self.weights.weights],
            "found": [found.to_dict() for found in self.found],
            "conformance": None
            if conformance is None
            else {
                "by": "TensorRT-RTX",
                "version": conformance.version,
                "parses": conformance.parses,
                "builds": conformance.builds,
                "reason": conformance.reason,
            },
            "notes": self.notes,
        }


def hand_over(
    path: Path, settings: EngineSettings, *, step: Callable[[str], None] = lambda name: None
) -> EngineReport:
    """Plan, build where that can be done, and judge.

    Args:
        path: The network's file.
        settings: What is to be built.
        step: Called with the name of each step.

    Returns:
        What was written and found. Without TensorRT there is no engine, and the notes say so.

    Raises:
        OptionError: Shapes or the version do not fit.
        ModelError: A file cannot be read or written.
        EngineError: TensorRT is there and does not take the network; or it is not there and ``required``.
    """
    step("weights")
    model = load(path)
    weights = inspect_sparsity(model, NM(2, 4), "tensorrt")
    names = [node.name for node in model.graph.all_nodes() if node.name]
    step("probing")
    found = [probe(name) for name in (TENSORRT, DEVICE, RTX)]
    tensorrt, device, rtx = found
    plan = make_plan(
        model,
        path,
        settings.engine,
        major=settings.major or _major(tensorrt) or MAJORS[-1],
        sparsity=settings.sparsity,
        shapes=settings.shapes,
        workspace=settings.workspace,
        timing_cache=settings.timing_cache,
    )
    plan_path, script_path = write_plan(plan, settings.engine.with_name(path.stem))
    report = EngineReport(plan, plan_path, script_path, weights, judge(weights.weights), found)
    report.notes += plan.notes
    if tensorrt.works and device.works:
        from graphprune.tensorrt.build import build_engine

        step("building")
        report.built = build_engine(plan, limit=settings.limit, known=names)
        report.notes += report.built.notes
        report.judgement = judge(weights.weights, report.built.log, report.built.layers)
        return report
    reason = tensorrt.reason if not tensorrt.works else device.reason
    if settings.required:
        raise EngineError(
            f"no engine was built: {reason}; {script_path.name} builds it on a machine with TensorRT"
        )
    report.notes.append(f"no engine was built: {reason}; {script_path.name} builds it elsewhere")
    if rtx.works:
        step("checking")
        report.conformance = _conformance(path, settings, report)
    return report


def _major(found: Found) -> int | None:
    """The major version of an installed TensorRT, where plans can be made for it."""
    if not found.works or found.version is None:
        return None
    major = found.version.partition(".")[0]
    return int(major) if major.isdecimal() and int(major) in MAJORS else None


def _conformance(path: Path, settings: EngineSettings, report: EngineReport) -> Conformance | None:
    """Let TensorRT-RTX parse and build the network.

    Raises:
        EngineError: It refuses the network.
    """
    from graphprune.tensorrt.rtx import check_network

    try:
        result = check_network(path, shapes=settings.shapes, limit=settings.limit)
    except EngineError as error:
        report.notes.append(f"TensorRT-RTX was not asked: {error}")
        return None
    if not result.parses:
        report.notes.append(f"TensorRT-RTX does not parse the network: {result.reason}")
    elif not result.builds:
        report.notes.append(f"TensorRT-RTX parses the network and does not build it: {result.reason}")
    return result
