"""TensorRT-RTX as a check of form: does NVIDIA's parser take a network, does its compiler build it?

TensorRT-RTX (``pip install graphprune[rtx]``) builds ahead of time and without a GPU. It follows the file's types, as
TensorRT 11 does. What it proves is that ops, types and shapes fit together, for any network that graphprune writes; it
chooses its kernels later, on the device, so it tells nothing of sparse ones.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphprune.errors import EngineError
from graphprune.tensorrt.build import ParserError, listed, parser_errors
from graphprune.tensorrt.foreign import Answer, ask
from graphprune.tensorrt.profiles import Profile

#: Seconds, for all networks of one call.
LIMIT = 600.0
_PACKAGE = "tensorrt_rtx"


@dataclass(frozen=True, slots=True)
class Conformance:
    """What TensorRT-RTX says of a network.

    Attributes:
        parses, builds: The parser takes it; the compiler builds it.
        errors: What the parser objects to.
        reason: Why it is not taken, in one sentence; None where it is.
        version: Of TensorRT-RTX.
        size: Bytes of the engine.
        seconds: Time of parsing and building.
        stopped: It was ended at its time limit, which says nothing of the network.
    """

    parses: bool
    builds: bool
    errors: tuple[ParserError, ...]
    reason: str | None
    version: str | None
    size: int
    seconds: float
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A network's file, external data beside it, and shapes for its dynamic inputs."""

    model: str | os.PathLike[str]
    shapes: Sequence[Profile] = ()


def check_network(
    model: str | os.PathLike[str],
    *,
    shapes: Sequence[Profile] = (),
    build: bool = True,
    limit: float = LIMIT,
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
) -> Conformance:
    """Let TensorRT-RTX parse and build one network: see :func:`check_networks`."""
    (result,) = check_networks(
        [Candidate(model, shapes)], build=build, limit=limit, environment=environment, python=python
    )
    return result


def check_networks(
    candidates: Sequence[Candidate],
    *,
    build: bool = True,
    limit: float = LIMIT,
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
) -> list[Conformance]:
    """Let TensorRT-RTX parse and build networks, one after another in one process. Nothing is written.

    Parameters
    ----------
    candidates : sequence of Candidate
        The files.
    build : bool
        Build them too; parsing alone takes some milliseconds each, building from a third of a second.
    limit : float
        Seconds for a process. A network at which the process crashes or is stopped is not taken, and a new process
        goes on after it.
    environment, python : optional
        See :func:`graphprune.tensorrt.foreign.ask`.

    Returns
    -------
    list of Conformance
        One for each candidate.

    Raises
    ------
    EngineError
        If TensorRT-RTX is not installed, or does not start.
    """
    results: list[Conformance] = []
    while len(results) < len(candidates):
        rest = candidates[len(results) :]
        with tempfile.TemporaryDirectory(prefix="graphprune-", ignore_cleanup_errors=True) as folder:
            question = {
                "package": _PACKAGE,
                "networks": [
                    {
                        "model": os.path.abspath(entry.model),  # noqa: PTH100 - links are kept as they are
                        "profiles": [profile.to_dict() for profile in entry.shapes],
                    }
                    for entry in rest
                ],
                "build": build,
                "log": str(Path(folder) / "log"),
            }
            answer = ask("build", question, limit, environment=environment, python=python)
        facts = answer.contents or {}
        begun = facts.get("results", [])
        if not begun:
            raise EngineError(_why_not_started(answer, facts))
        for index, entry in enumerate(begun):
            results.append(_conformance(rest[index], entry, answer, facts.get("version"), build))
    return results


def _why_not_started(answer: Answer, facts: Mapping[str, Any]) -> str:
    error = str(facts.get("error"))
    if error.startswith("ModuleNotFoundError"):
        return "TensorRT-RTX is not installed; install graphprune[rtx]"
    return f"TensorRT-RTX does not start: {answer.failure or facts.get('error') or 'the process ended of itself'}"


def _conformance(
    candidate: Candidate, entry: Mapping[str, Any], answer: Answer, version: str | None, build: bool
) -> Conformance:
    errors = tuple(parser_errors(entry["parser_errors"], os.fspath(candidate.model)))
    finished = "seconds" in entry
    reason = None
    if errors:
        reason = f"TensorRT-RTX does not take {listed(errors)}"
    elif not finished:
        doing = "parsing" if entry["step"] == "parse" else "building"
        reason = f"TensorRT-RTX {answer.failure or 'ended of itself'}, {doing} it"
    elif entry["error"] is not None:
        reason = f"TensorRT-RTX does not build it: {entry['error']}"
    return Conformance(
        parses=entry["step"] in {"build", "done"},
        builds=build and entry["step"] == "done",
        errors=errors,
        reason=reason,
        version=version,
        size=int(entry["size"]),
        seconds=float(entry.get("seconds", answer.seconds)),
        stopped=not finished and answer.ended == "time",
    )
