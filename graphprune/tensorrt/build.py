"""Build an engine with TensorRT's Python API, in a subprocess, and bring home all evidence of what was built."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphprune.errors import EngineError, ModelError
from graphprune.tensorrt.foreign import Answer, ask
from graphprune.tensorrt.inspector import EngineLayers, parse_layers
from graphprune.tensorrt.log import SparsityLog, parse_log
from graphprune.tensorrt.plan import BuildPlan

#: Seconds. Builds that time every kernel of a large network take tens of minutes.
LIMIT = 3600.0
_DOING = {
    "import": "importing it",
    "parse": "parsing the network",
    "build": "building the engine",
    "inspect": "inspecting the engine",
}


@dataclass(frozen=True, slots=True)
class ParserError:
    """What the parser objects to.

    Attributes:
        node: The node's name; empty where the parser names none.
        operator: Its op type; empty where the parser names none.
        text: The objection, in one line.
    """

    node: str
    operator: str
    text: str

    def __str__(self) -> str:
        if not self.node and not self.operator:
            return self.text
        operator = f" ({self.operator})" if self.operator else ""
        return f"node {self.node!r}{operator}: {self.text}"


@dataclass(frozen=True, slots=True)
class Built:
    """An engine and what is known of it.

    Attributes:
        engine: Its file.
        version: Of the TensorRT that built it.
        flags: Flags of the network and of the builder that were set.
        notes: What a person should know.
        log: What the log says of sparse weights.
        log_path: The whole log.
        layers: Its layers; None where they could not be read.
        seconds: Time of parsing and building.
    """

    engine: Path
    version: str | None
    flags: tuple[str, ...]
    notes: tuple[str, ...]
    log: SparsityLog
    log_path: Path
    layers: EngineLayers | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "engine": str(self.engine),
            "version": self.version,
            "flags": list(self.flags),
            "notes": list(self.notes),
            "log": str(self.log_path),
            "layers": None if self.layers is None else len(self.layers.layers),
            "seconds": round(self.seconds, 3),
        }


def build_engine(
    plan: BuildPlan,
    *,
    limit: float = LIMIT,
    known: Iterable[str] = (),
    package: str = "tensorrt",
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
) -> Built:
    """Build the plan's engine with TensorRT's Python API.

    The engine, its layers and the timing cache appear whole or not at all; the log is kept in any case, under the
    engine's name with ".log".

    Parameters
    ----------
    plan : BuildPlan
        What to build. Its version is not enforced: another one than planned for is in the notes.
    limit : float
        Seconds after which the build is stopped.
    known : iterable of str
        Names of the network's nodes, see :func:`graphprune.tensorrt.log.parse_log`.
    package : {"tensorrt", "tensorrt_rtx"}
        The package with that API.
    environment, python : optional
        See :func:`graphprune.tensorrt.foreign.ask`.

    Raises
    ------
    EngineError
        If TensorRT is missing, fails, or does not take the network; the message names the node.
    ModelError
        If files cannot be written.
    """
    target = Path(plan.engine)
    log_path = target.with_name(f"{target.name}.log")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror}; choose another folder") from error
    try:
        staged = {name: folder / name for name in ("engine", "layers", "timing_cache", "log")}
        answer = ask("build", _question(plan, package, staged), limit, environment=environment, python=python)
        text = _text(staged["log"])
        if text:
            _keep(staged["log"], log_path)
        facts = answer.contents or {}
        _check(plan, answer, text, log_path if text else None)
        layers, notes = _layers(staged["layers"], answer, facts)
        planned = _version_note(plan, facts.get("version")) if package == "tensorrt" else []
        notes = [*planned, *facts.get("notes", ()), *notes]
        if plan.timing_cache is not None and staged["timing_cache"].exists():
            _keep(staged["timing_cache"], Path(plan.timing_cache))
        if plan.layers is not None and layers is not None:
            _keep(staged["layers"], Path(plan.layers))
        _keep(staged["engine"], target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Built(
        engine=target,
        version=facts.get("version"),
        flags=tuple(facts.get("flags", ())),
        notes=tuple(notes),
        log=parse_log(text, known),
        log_path=log_path,
        layers=layers,
        seconds=float(facts.get("seconds", answer.seconds)),
    )


def _question(plan: BuildPlan, package: str, staged: Mapping[str, Path]) -> dict[str, Any]:
    return {
        "package": package,
        "plan": json.loads(plan.to_json()),
        "engine": str(staged["engine"]),
        "layers": str(staged["layers"]),
        "timing_cache": str(staged["timing_cache"]) if plan.timing_cache is not None else None,
        "log": str(staged["log"]),
        "inspect": True,
    }


def parser_errors(entries: Iterable[Mapping[str, Any]], model: str) -> list[ParserError]:
    """What the parser of a worker objected to; names that the parser does not give are looked up in the file."""
    names: Sequence[str] | None = None
    errors = []
    for entry in entries:
        name = entry["node"] or ""
        if not name and entry["index"] >= 0:
            names = _node_names(model) if names is None else names
            name = names[entry["index"]] if entry["index"] < len(names) else ""
        errors.append(ParserError(name, entry["operator"] or "", entry["text"]))
    return errors


def listed(errors: Sequence[ParserError]) -> str:
    """The first objection, and how many there are."""
    return str(errors[0]) + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def _node_names(model: str) -> list[str]:
    import onnx

    try:
        return [node.name for node in onnx.load(model, load_external_data=False).graph.node]
    except Exception:  # whatever protobuf raises: the objection is shown without a name
        return []


def _check(plan: BuildPlan, answer: Answer, text: str, log_path: Path | None) -> None:
    """Raise what went wrong; an engine that could only not be inspected is good."""
    facts = answer.contents or {}
    step = str(facts.get("step", "import"))
    error = facts.get("error")
    where = f"; the log is {log_path}" if log_path is not None else ""
    if refused := parser_errors(facts.get("parser_errors", ()), plan.model):
        raise EngineError(f"{plan.model}: TensorRT does not take {listed(refused)}{where}")
    if step in {"inspect", "done"}:
        return
    if step == "import" and str(error).startswith("ModuleNotFoundError"):
        raise EngineError(
            "TensorRT's Python package is not installed; install it, or run the plan's script on a machine that has it"
        )
    doing = _DOING.get(step, step)
    if answer.failure is not None:
        raise EngineError(f"{plan.model}: TensorRT {answer.failure}, {doing}{where}")
    logged = parse_log(text).errors
    last = f" ({logged[-1]})" if logged else ""
    why = error or "the process ended of itself"
    raise EngineError(f"{plan.model}: TensorRT fails {doing}: {why}{last}{where}")


def _layers(path: Path, answer: Answer, facts: Mapping[str, Any]) -> tuple[EngineLayers | None, list[str]]:
    """The engine's layers, or why there are none."""
    if facts.get("step") == "done" and path.exists():
        try:
            return parse_layers(_text(path)), []
        except ModelError as error:
            return None, [str(error)]
    reason = answer.failure or facts.get("error") or "the process ended early"
    return None, [f"the engine was built and could not be inspected: {reason}"]


def _version_note(plan: BuildPlan, version: str | None) -> list[str]:
    major = (version or "").partition(".")[0]
    if major.isdecimal() and int(major) != plan.major:
        return [f"planned for TensorRT {plan.major}, built by {version}"]
    return []


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _keep(staged: Path, target: Path) -> None:
    """Put a finished file in its place."""
    try:
        shutil.move(
            staged, target
        ) if staged.stat().st_dev != target.parent.stat().st_dev else staged.replace(target)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror}; choose another name") from error
