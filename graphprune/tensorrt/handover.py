"""Handing a network to TensorRT: plan and script always, an engine where that can be had, and what became of its zeros.

Nothing foreign is imported here: what TensorRT does, it does in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import EngineError, VerificationError
from graphprune.model import load
from graphprune.sparsity.inspection import inspect_sparsity
from graphprune.sparsity.pattern import NM
from graphprune.tensorrt.numbers import Numbers, Reference, Source
from graphprune.tensorrt.plan import MAJORS, BuildPlan, make_plan, write_plan, write_whole
from graphprune.tensorrt.probe import DEVICE, PROVIDER, RTX, RUNTIME, TENSORRT, Found, probe
from graphprune.tensorrt.verdict import Judgement, judge

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphprune.sparsity.report import SparsityReport
    from graphprune.tensorrt.bench import Timed
    from graphprune.tensorrt.build import Built
    from graphprune.tensorrt.profiles import Profile
    from graphprune.tensorrt.provider import SessionRun
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
        original: What the network was made from: TensorRT is to take both or neither, and it is timed.
        bench: Time the original, the network with dense kernels only, and the engine.
        provider: Also go by ONNX Runtime's TensorRT provider; ``required`` then asks for that.
        source: Inputs to compare numbers on.
    """

    engine: Path
    major: int | None = None
    sparsity: bool = True
    shapes: Sequence[Profile] = ()
    workspace: int | None = None
    timing_cache: Path | None = None
    required: bool = False
    limit: float = 3600.0
    original: Path | None = None
    bench: bool = False
    provider: bool = False
    source: Source = field(default_factory=Source)


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
        numbers: What the engine computes against ONNX Runtime on the CPU.
        bench: Times; empty where nothing was timed.
        provider_path: The options for ONNX Runtime's provider, where they were asked for.
        session: What ONNX Runtime did with them.
        session_numbers: What it computed.
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
    numbers: Numbers | None = None
    bench: list[Timed] = field(default_factory=list)
    provider_path: Path | None = None
    session: SessionRun | None = None
    session_numbers: Numbers | None = None
    conformance: Conformance | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        conformance, session = self.conformance, self.session
        return {
            "plan": str(self.plan_path),
            "script": str(self.script_path),
            "tensorrt": self.plan.major,
            "engine": None if self.built is None else self.built.to_dict(),
            "verdict": self.judgement.to_dict(),
            "weights": [entry.to_dict() for entry in self.weights.weights],
            "found": [found.to_dict() for found in self.found],
            "numbers": None if self.numbers is None else self.numbers.to_dict(),
            "bench": [timed.to_dict() for timed in self.bench],
            "provider": None
            if self.provider_path is None
            else {
                "options": str(self.provider_path),
                "used": session is not None,
                "version": None if session is None else session.version,
                "nodes": None if session is None else dict(session.placed),
                "numbers": None if self.session_numbers is None else self.session_numbers.to_dict(),
            },
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
    """Plan, build where that can be done, compare, time, and judge.

    Args:
        path: The network's file.
        settings: What is to be built.
        step: Called with the name of each step.

    Returns:
        What was written and found. Without TensorRT there is no engine, and the notes say so.

    Raises:
        OptionError: Shapes, inputs or the version do not fit.
        ModelError: A file cannot be read or written.
        EngineError: TensorRT is there and does not take the network, or takes the original and not what was made of
            it; or it is not there and ``required``; or the engine computes something else than ONNX Runtime.
    """
    return _HandOver(path, settings, step).run()


class _HandOver:
    """One network on its way."""

    def __init__(self, path: Path, settings: EngineSettings, step: Callable[[str], None]) -> None:
        self.path, self.settings, self.step = path, settings, step
        step("weights")
        self.model = load(path)
        self.names = [node.name for node in self.model.graph.all_nodes() if node.name]
        self._reference: Reference | None = None

    def run(self) -> EngineReport:
        settings = self.settings
        weights = inspect_sparsity(self.model, NM(2, 4), "tensorrt")
        self.step("probing")
        found = [probe(name) for name in (TENSORRT, DEVICE, RTX)]
        tensorrt, device, rtx = found
        major = settings.major or _major(tensorrt) or MAJORS[-1]
        plan = self._plan(self.model, self.path, major)
        base = settings.engine.with_name(self.path.stem)
        report = EngineReport(plan, *write_plan(plan, base), weights, judge(weights.weights), found)
        self.report = report
        report.notes += plan.notes
        if settings.provider:
            from graphprune.tensorrt.provider import providers_json

            report.provider_path = base.with_name(f"{base.name}.ort.json")
            write_whole(report.provider_path, providers_json(plan).encode(errors="surrogateescape"))
        if tensorrt.works and device.works:
            self._build()
        else:
            self._do_without(tensorrt.reason if not tensorrt.works else device.reason)
        if settings.provider:
            self._go_by_provider()
        if report.built is None and report.session is None and rtx.works:
            self.step("checking")
            report.conformance = self._conformance()
        return report

    def _plan(self, model: ir.Model, path: Path, major: int) -> BuildPlan:
        settings = self.settings
        return make_plan(
            model,
            path,
            settings.engine,
            major=major,
            sparsity=settings.sparsity,
            shapes=settings.shapes,
            workspace=settings.workspace,
            timing_cache=settings.timing_cache,
        )

    # -- the engine ---------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        from graphprune.tensorrt.build import build_engine

        report = self.report
        self.step("building")
        built = build_engine(report.plan, limit=self.settings.limit, known=self.names)
        report.built = built
        report.notes += built.notes
        report.judgement = judge(report.weights.weights, built.log, built.layers)
        self._compare(built)
        if self.settings.bench:
            self._race(built)

    def _do_without(self, reason: str | None) -> None:
        """No engine can be built on this machine."""
        script = self.report.script_path.name
        if self.settings.required and not self.settings.provider:
            raise EngineError(f"no engine was built: {reason}; {script} builds it on a machine with TensorRT")
        self.report.notes.append(f"no engine was built: {reason}; {script} builds it elsewhere")
        if self.settings.bench:
            self.report.notes.append("nothing was timed: there is no engine")

    def reference(self) -> Reference:
        """Inputs, and what they lead to; made once."""
        if self._reference is None:
            self.step("ONNX Runtime")
            self._reference = Reference(self.model, self.report.plan, self.settings.source)
        return self._reference

    def _compare(self, built: Built) -> None:
        """What the engine computes, against ONNX Runtime.

        Raises:
            EngineError: It is something else.
        """
        from graphprune.tensorrt.engines import run_engines

        try:
            reference = self.reference()
            self.step("comparing")
            (run,) = run_engines([built.engine], reference.feeds)
        except (EngineError, VerificationError) as error:
            self.report.notes.append(f"the engine's numbers were not compared: {error}")
            return
        self.report.numbers = reference.compare(run.outputs)
        self._note_unbounded(self.report.numbers)
        self.report.numbers.check(str(built.engine))

    def _note_unbounded(self, numbers: Numbers) -> None:
        free = [output.name for output in numbers.outputs if output.bound is None]
        if free:
            names = ", ".join(repr(name) for name in free[:3]) + (" and more" if len(free) > 3 else "")
            self.report.notes.append(
                f"{names} lie behind a jump (such as ArgMax or Round), so no bound of their difference can be given"
            )

    def _race(self, built: Built) -> None:
        from graphprune.tensorrt.bench import Contender, race

        report, original = self.report, self.settings.original
        contenders = []
        if original is not None:
            plan = replace(self._plan(load(original), original, report.plan.major), sparsity=False)
            contenders.append(Contender("original", plan))
            if plan.precision != report.plan.precision:
                report.notes.append(
                    f"the original computes in {', '.join(plan.precision.floats)}, the engine in"
                    f" {', '.join(report.plan.precision.floats)}: what is gained against it is gained by both,"
                    " fewer channels and the type"
                )
        if report.plan.sparsity:
            name = "dense kernels only"
            contenders.append(Contender(name, replace(report.plan, sparsity=False)))
        contenders.append(Contender("engine", report.plan, built.engine))
        try:
            report.bench = race(contenders, self.reference().feeds, limit=self.settings.limit, step=self.step)
        except (EngineError, VerificationError) as error:
            report.notes.append(f"nothing was timed: {error}")

    # -- ONNX Runtime's provider --------------------------------------------------------------------------------------

    def _go_by_provider(self) -> None:
        """Run the network by TensorRT within ONNX Runtime.

        Raises:
            EngineError: It falls back to other providers, and an engine is required; or its numbers are wrong.
        """
        from graphprune.tensorrt.provider import run_with_tensorrt

        report = self.report
        self.step("ONNX Runtime's provider")
        runtime = probe(RUNTIME)
        report.found.append(runtime)
        try:
            if not runtime.works:
                raise EngineError(runtime.reason or "ONNX Runtime does not work")
            if PROVIDER not in runtime.providers:
                raise EngineError(
                    f"this ONNX Runtime ({runtime.version}) has no {PROVIDER}; install onnxruntime-gpu"
                )
            reference = self.reference()
            session = run_with_tensorrt(
                report.plan, reference.feeds, limit=self.settings.limit, known=self.names
            )
        except (EngineError, VerificationError) as error:
            if self.settings.required:
                raise EngineError(f"TensorRT was not used by ONNX Runtime: {error}") from error
            report.notes.append(f"TensorRT was not used by ONNX Runtime: {error}")
            return
        report.session = session
        if report.built is None:
            report.judgement = judge(report.weights.weights, session.log)
        others = {name: count for name, count in session.placed.items() if name != PROVIDER}
        if others:
            shown = ", ".join(f"{count} by {name}" for name, count in others.items())
            report.notes.append(f"not all nodes were computed by TensorRT: {shown}")
        report.session_numbers = reference.compare(session.outputs)
        self._note_unbounded(report.session_numbers)
        report.session_numbers.check("ONNX Runtime's TensorRT provider")

    # -- form ---------------------------------------------------------------------------------------------------------

    def _conformance(self) -> Conformance | None:
        """Let TensorRT-RTX parse and build the network.

        Raises:
            EngineError: It refuses the network, and takes what that was made from.
        """
        from graphprune.tensorrt.rtx import check_network

        settings, notes = self.settings, self.report.notes
        try:
            result = check_network(self.path, shapes=settings.shapes, limit=settings.limit)
            if result.builds:
                return result
            before = None
            if settings.original is not None and not result.stopped:
                before = check_network(settings.original, shapes=settings.shapes, limit=settings.limit)
        except EngineError as error:
            notes.append(f"TensorRT-RTX was not asked: {error}")
            return None
        if before is not None and before.builds:
            raise EngineError(
                f"{self.path}: {result.reason}; it takes {settings.original}, which this was made from: this is a"
                " fault of graphprune, please report it with the model"
            )
        doing = "parses the network and does not build it" if result.parses else "does not parse the network"
        refused = "; nor does it take the original" if before is not None else ""
        if before is not None and before.reason != result.reason:
            refused += f": {before.reason}"
        notes.append(f"TensorRT-RTX {doing}: {result.reason}{refused}")
        return result


def _major(found: Found) -> int | None:
    """The major version of an installed TensorRT, where plans can be made for it."""
    if not found.works or found.version is None:
        return None
    major = found.version.partition(".")[0]
    return int(major) if major.isdecimal() and int(major) in MAJORS else None
