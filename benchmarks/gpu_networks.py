"""ONNX networks on the device, for gpu.py: the original, pruned, pruned with 2:4 weights, through what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from graphprune.errors import EngineError, GraphPruneError
from graphprune.tensorrt.engines import compare

HERE = Path(__file__).resolve().parent
TENSORRT, ORT_TENSORRT, ORT_CUDA = "TensorRT", "ONNX Runtime, TensorRT", "ONNX Runtime, CUDA"
PRUNE = "import sys; from graphprune.cli import main; sys.exit(main())"
#: Models of one network: name, and what makes it.
VARIANTS: dict[str, list[str]] = {
    "original": [],
    "pruned": ["--channels", "{channels}"],
    "pruned, 2:4": ["--channels", "{channels}", "--nm", "2:4"],
}


@dataclass(frozen=True)
class Asked:
    """What gpu.py was asked.

    Attributes:
        models: Files.
        channels: Fraction of channels that goes.
        precision: fp16 or bf16.
        shapes: Profiles, as graphprune's --shapes takes them.
        calib: Inputs that pruning may look at.
        rounds, runs: Rounds over all models, and runs of each in a round.
        limit: Seconds for one step.
    """

    models: Sequence[Path]
    channels: float
    precision: str
    shapes: Sequence[str]
    calib: Path | None
    rounds: int
    runs: int
    limit: float


def child(script: str, question: Any, limit: float) -> tuple[list[Any], str | None]:
    """Run a script beside this one; the lines that it answered, and why there are no more."""
    with tempfile.TemporaryDirectory(prefix="graphprune-", ignore_cleanup_errors=True) as folder:
        asked, answers = Path(folder) / "question.json", Path(folder) / "answers.jsonl"
        asked.write_text(json.dumps(question))
        command = [sys.executable, str(HERE / script), str(asked), str(answers)]
        failure = None
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, errors="replace")
            if done.returncode:
                last = [line for line in done.stderr.splitlines() if line.strip()] or ["it does not say why"]
                failure = f"the process ended with status {done.returncode}: {last[-1].strip()}"
        except subprocess.TimeoutExpired:
            failure = f"the process did not end within {limit:g} s"
        lines = answers.read_text().splitlines() if answers.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")], failure


def run(asked: Asked, runtimes: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each model of each network through each runtime."""
    rows: list[dict[str, Any]] = []
    for source in asked.models:
        with tempfile.TemporaryDirectory(prefix="graphprune-", ignore_cleanup_errors=True) as folder:
            try:
                say(f"{source.name}: pruning")
                files = variants(source, Path(folder), asked)
            except GraphPruneError as error:
                rows += [failed(source, runtime, str(error)) for runtime in runtimes]
                continue
            for runtime in runtimes:
                say(f"{source.name}: {runtime}")
                measure = with_tensorrt if runtime == TENSORRT else with_onnx_runtime
                try:
                    rows += measure(source, files, asked, runtime)
                except GraphPruneError as error:
                    rows.append(failed(source, runtime, str(error)))
    return rows


def variants(source: Path, folder: Path, asked: Asked) -> dict[str, Path]:
    """The files that are compared, by their names.

    Raises:
        EngineError: graphprune does not make one.
    """
    files = {}
    for index, (name, options) in enumerate(VARIANTS.items()):
        files[name] = folder / f"{index}.onnx"
        given = [option.format(channels=asked.channels) for option in options]
        if asked.calib is not None and given:
            given += ["--calib", str(asked.calib)]
        command = [sys.executable, "-c", PRUNE, str(source), *given, "--precision", asked.precision, "-q"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
        done = subprocess.run(
            [*command, "-o", str(files[name])], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()] or ["it does not say why"]
            raise EngineError(f"{source.name}, {name}: {last[-1]}")
    return files


def failed(source: Path, runtime: str, reason: str, model: str = "all") -> dict[str, Any]:
    """A row that says why there is no figure."""
    return {"network": source.name, "runtime": runtime, "model": model, "types": [], "reason": reason}


def timed(
    source: Path,
    runtime: str,
    names: Sequence[str],
    types: Sequence[Sequence[str]],
    times: Sequence[Sequence[float]],
) -> list[dict[str, Any]]:
    """Rows of models that were timed in turn."""
    return [
        {
            "network": source.name,
            "runtime": runtime,
            "model": name,
            "types": list(types[index]),
            "reason": None,
            "milliseconds": median(times[index]),
            "runs": len(times[index]),
            "against_first": str(compare(times[0], times[index])) if index else None,
            "against_previous": str(compare(times[index - 1], times[index])) if index > 1 else None,
            "note": None,
        }
        for index, name in enumerate(names)
    ]


def with_tensorrt(source: Path, files: dict[str, Path], asked: Asked, runtime: str) -> list[dict[str, Any]]:
    """Engines, the last one with sparse kernels allowed; the verdict on that and its numbers are noted."""
    from dataclasses import replace

    from graphprune.model import load
    from graphprune.sparsity.inspection import inspect_sparsity
    from graphprune.sparsity.pattern import NM
    from graphprune.tensorrt.bench import Contender, race
    from graphprune.tensorrt.build import build_engine
    from graphprune.tensorrt.engines import run_engines
    from graphprune.tensorrt.numbers import Reference, Source
    from graphprune.tensorrt.plan import make_plan
    from graphprune.tensorrt.profiles import parse_profile
    from graphprune.tensorrt.verdict import judge

    profiles = [parse_profile(text) for text in asked.shapes]
    contenders = []
    for name, path in files.items():
        plan = make_plan(load(path), path, path.with_suffix(".plan"), shapes=profiles)
        contenders.append(Contender(f"{name}, dense kernels only", replace(plan, sparsity=False)))
    model = load(path)
    built = build_engine(plan, limit=asked.limit, known=[n.name for n in model.graph.all_nodes() if n.name])
    contenders.append(Contender(f"{name}, sparse kernels allowed", plan, built.engine))
    judgement = judge(inspect_sparsity(model, NM(2, 4), "tensorrt").weights, built.log, built.layers)
    reference = Reference(model, plan, Source(asked.calib))
    (found,) = run_engines([built.engine], reference.feeds, limit=asked.limit)
    worst = reference.compare(found.outputs).worst
    results = race(contenders, reference.feeds, limit=asked.limit, rounds=asked.rounds, runs=asked.runs)
    rows = [
        {
            "network": source.name,
            "runtime": runtime,
            "model": result.name,
            "types": list(result.floats),
            "reason": None,
            "note": None,
            **{key: value for key, value in result.to_dict().items() if key not in {"name", "types"}},
        }
        for result in results
    ]
    error = "" if worst is None else f"; error {worst.difference:.1e}, allowed {worst.bound:.1e}"
    rows[-1]["note"] = f"{judgement.verdict.value}: {judgement.reason}{error}"
    return rows


def with_onnx_runtime(
    source: Path, files: dict[str, Path], asked: Asked, runtime: str
) -> list[dict[str, Any]]:
    """Sessions on the device; which nodes the provider truly took is noted."""
    import numpy as np

    from graphprune.model import load
    from graphprune.tensorrt.numbers import Reference, Source
    from graphprune.tensorrt.plan import make_plan
    from graphprune.tensorrt.probe import PROVIDER
    from graphprune.tensorrt.profiles import parse_profile
    from graphprune.tensorrt.provider import CPU, CUDA, provider_options, run_session

    profiles = [parse_profile(text) for text in asked.shapes]
    entries, types, notes = [], [], []
    reference: Reference | None = None
    for name, path in files.items():
        model = load(path)
        plan = make_plan(model, path, path.with_suffix(".plan"), shapes=profiles)
        reference = reference or Reference(model, plan, Source(asked.calib))
        providers: list[tuple[str, dict[str, str]]] = [(CUDA, {}), (CPU, {})]
        if runtime == ORT_TENSORRT:
            providers.insert(0, (PROVIDER, provider_options(plan)))
        run = run_session(path, reference.feeds, providers, limit=asked.limit)
        wanted = providers[0][0]
        if not run.placed.get(wanted):
            raise EngineError(f"{name}: {wanted} took no node: {dict(run.placed)}")
        notes.append(", ".join(f"{count} nodes by {provider}" for provider, count in run.placed.items()))
        entries.append({"path": str(path), "providers": providers})
        types.append(plan.precision.floats)
    assert reference is not None
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        feeds = Path(folder) / "feeds.npz"
        np.savez(feeds, *reference.feeds.values())
        question = {
            "models": entries,
            "inputs": list(reference.feeds),
            "feeds": str(feeds),
            "rounds": asked.rounds,
            "runs": asked.runs,
        }
        answers, failure = child("gpu_sessions.py", question, asked.limit)
    if not answers or "reason" in answers[0]:
        raise EngineError(answers[0]["reason"] if answers else failure or "there is no answer")
    rows = timed(source, runtime, list(files), types, answers[0]["milliseconds"])
    for row, note in zip(rows, notes, strict=True):
        row["note"] = note
    return rows
