"""ONNX Runtime's TensorRT provider: the other way to an engine with sparse weights.

A session whose provider cannot be loaded runs on the CPU and says so in a warning only. Here that is an error: which
providers a session has is asked of the session, and which of them computed nodes is read from its profile.

Names and meanings of the options: ONNX Runtime's documentation, "TensorRT Execution Provider", and
tensorrt_execution_provider_info.cc. Profile shapes are written as for trtexec, but at the first colon of a name its
shape is taken to begin.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import EngineError, OptionError
from graphprune.tensorrt.foreign import Answer, ask
from graphprune.tensorrt.log import SparsityLog, parse_log
from graphprune.tensorrt.plan import BuildPlan
from graphprune.tensorrt.probe import PROVIDER
from graphprune.tensorrt.profiles import Shape, shape_text

if TYPE_CHECKING:
    import numpy.typing as npt

    Arrays = Mapping[str, npt.NDArray[Any]]

#: Seconds: the session builds the engine.
LIMIT = 3600.0
_MIB = 1 << 20
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
Provider = tuple[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class SessionRun:
    """One network run by ONNX Runtime.

    Attributes:
        outputs: By name, in the order of the network.
        providers: That the session has.
        placed: Number of nodes that each provider computed, a fused one counted once.
        seconds: Of each timed run.
        version: Of ONNX Runtime.
        log: What the log says of sparse weights.
    """

    outputs: Arrays
    providers: tuple[str, ...]
    placed: Mapping[str, int]
    seconds: tuple[float, ...]
    version: str | None
    log: SparsityLog


def provider_options(plan: BuildPlan) -> dict[str, str]:
    """The TensorRT provider's options for a plan.

    Returns
    -------
    dict of str to str
        As JSON and ``InferenceSession`` take them. Caches of engines and times lie in the engine's folder.

    Raises
    ------
    OptionError
        If an input's name cannot be given to the provider.
    """
    folder = os.path.dirname(plan.engine) or "."  # noqa: PTH120 - as it was written
    options = {
        "trt_sparsity_enable": str(int(plan.sparsity)),
        "trt_fp16_enable": str(int("FLOAT16" in plan.precision.floats)),
        "trt_int8_enable": str(int(plan.precision.quantized)),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": str(int(plan.timing_cache is not None)),
        "trt_detailed_build_log": str(int(plan.verbose)),
    }
    if "BFLOAT16" in plan.precision.floats:
        options["trt_bf16_enable"] = "1"
    if plan.timing_cache is not None:
        options["trt_timing_cache_path"] = os.path.dirname(plan.timing_cache) or "."  # noqa: PTH120
    if plan.workspace is not None:
        options["trt_max_workspace_size"] = str(plan.workspace * _MIB)
    shaped = [profile for profile in plan.profiles if profile.usual]
    for which, key in enumerate(("min", "opt", "max")):
        if shaped:
            options[f"trt_profile_{key}_shapes"] = ",".join(
                _named(profile.name, profile.shapes[which]) for profile in shaped
            )
    return options


def _named(name: str, shape: Shape) -> str:
    if any(mark in name for mark in ",:"):
        raise OptionError(
            f"input {name!r}: ONNX Runtime's TensorRT provider cannot be given a shape for a name with commas or"
            " colons; rename the input, or build with TensorRT itself"
        )
    return f"{name}:{shape_text(shape)}"


def providers(plan: BuildPlan) -> list[Provider]:
    """Providers in order of preference: TensorRT, then what takes the nodes that it leaves."""
    return [(PROVIDER, provider_options(plan)), (CUDA, {}), (CPU, {})]


def providers_json(plan: BuildPlan) -> str:
    """The providers as JSON, a list of pairs of a name and its options."""
    return json.dumps([[name, dict(options)] for name, options in providers(plan)], indent=2) + "\n"


def run_with_tensorrt(
    plan: BuildPlan,
    feeds: Arrays,
    *,
    runs: int = 0,
    limit: float = LIMIT,
    known: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
) -> SessionRun:
    """Run a plan's network in ONNX Runtime with the TensorRT provider.

    Parameters
    ----------
    plan : BuildPlan
        The network, and the provider's options.
    feeds : mapping of str to array
        All inputs.
    runs : int
        Timed runs after the first one.
    limit : float
        Seconds after which it is stopped.
    known : sequence of str
        Names of the network's nodes, see :func:`graphprune.tensorrt.log.parse_log`.
    environment, python : optional
        See :func:`graphprune.tensorrt.foreign.ask`.

    Raises
    ------
    EngineError
        If ONNX Runtime is missing or fails, or if TensorRT computed nothing: the session fell back to other providers.
    """
    run = run_session(
        plan.model,
        feeds,
        providers(plan),
        runs=runs,
        limit=limit,
        known=known,
        environment=environment,
        python=python,
    )
    others = [name for name in run.placed if name != PROVIDER] or [CPU]
    if PROVIDER not in run.providers:
        raise EngineError(
            f"ONNX Runtime {run.version} could not load {PROVIDER} and fell back to {others[0]}; install"
            " onnxruntime-gpu with the TensorRT that it names, or build with TensorRT itself"
        )
    if not run.placed.get(PROVIDER):
        raise EngineError(
            f"ONNX Runtime {run.version} has {PROVIDER}, and it took no node: all ran on {others[0]}; see its log"
        )
    return run


def run_session(
    model: str | os.PathLike[str],
    feeds: Arrays,
    wanted: Sequence[Provider],
    *,
    runs: int = 0,
    warm: int = 1,
    limit: float = LIMIT,
    known: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
) -> SessionRun:
    """Run a network in ONNX Runtime, in a subprocess; which providers computed it is for the caller to judge.

    Raises
    ------
    EngineError
        If ONNX Runtime is missing or fails.
    """
    import numpy as np

    path = os.path.abspath(model)  # noqa: PTH100 - links are kept as they are
    with tempfile.TemporaryDirectory(prefix="graphprune-", ignore_cleanup_errors=True) as folder:
        files = {name: str(Path(folder) / name) for name in ("feeds.npz", "outputs.npz", "log", "profile")}
        np.savez(
            files["feeds.npz"], *feeds.values()
        )  # names of inputs may be no names of files: they are numbered
        question: dict[str, Any] = {
            "model": path,
            "providers": [[name, dict(options)] for name, options in wanted],
            "feeds": files["feeds.npz"],
            "inputs": list(feeds),
            "outputs": files["outputs.npz"],
            "profile": files["profile"],
            "log": files["log"],
            "runs": runs,
            "warm": warm if runs else 0,
        }
        answer = ask("session", question, limit, environment=environment, python=python)
        facts = answer.contents or {}
        _check(path, answer, facts)
        with np.load(files["outputs.npz"]) as stored:
            outputs = {name: stored[f"arr_{index}"] for index, name in enumerate(facts["names"])}
        log = Path(files["log"])
        text = log.read_text(errors="replace") if log.exists() else ""
    return SessionRun(
        outputs=outputs,
        providers=tuple(facts["providers"]),
        placed=facts["placed"],
        seconds=tuple(facts["seconds"]),
        version=facts["version"],
        log=parse_log(text, known),
    )


def _check(path: str, answer: Answer, facts: Mapping[str, Any]) -> None:
    step = facts.get("step", "import")
    doing = {"import": "when imported", "create": "making a session", "run": "running the network"}.get(
        step, ""
    )
    if answer.failure is not None:
        raise EngineError(f"{path}: ONNX Runtime {answer.failure} {doing}".rstrip())
    error = facts.get("error")
    if step == "import" and str(error).startswith("ModuleNotFoundError"):
        raise EngineError("ONNX Runtime is not installed; install onnxruntime-gpu")
    if step != "done":
        raise EngineError(f"{path}: ONNX Runtime fails {doing}: {error or 'the process ended of itself'}")
