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

from graphprune.errors import EngineError, GraphPruneError
from graphprune.tensorrt.build import ParserError, ask_builder, check_answer, parser_errors, read_text
from graphprune.tensorrt.plan import BuildPlan, Precision
from graphprune.tensorrt.profiles import Profile

#: Seconds.
LIMIT = 600.0


@dataclass(frozen=True, slots=True)
class Conformance:
    """What TensorRT-RTX says of a network.

    Attributes:
        parses, builds: The parser takes it; the compiler builds it.
        errors: What the parser objects to.
        reason: Why it is not taken, in one sentence; None where it is.
        version: Of TensorRT-RTX.
        size: Bytes of the engine.
        seconds: Time of the whole check.
    """

    parses: bool
    builds: bool
    errors: tuple[ParserError, ...]
    reason: str | None
    version: str | None
    size: int
    seconds: float


def check_network(
    model: str | os.PathLike[str],
    *,
    shapes: Sequence[Profile] = (),
    limit: float = LIMIT,
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
) -> Conformance:
    """Let TensorRT-RTX parse and build a network's file. Nothing is written.

    Parameters
    ----------
    model : path
        An ONNX file; external data beside it.
    shapes : sequence of Profile
        For inputs with dynamic shapes.
    limit : float
        Seconds after which the check is stopped.
    environment, python : optional
        See :func:`graphprune.tensorrt.foreign.ask`.

    Raises
    ------
    EngineError
        If TensorRT-RTX is not installed, or does not start.
    """
    path = os.fspath(model)
    with tempfile.TemporaryDirectory(prefix="graphprune-", ignore_cleanup_errors=True) as folder:
        staged = {name: Path(folder) / name for name in ("engine", "layers", "timing_cache", "log")}
        plan = BuildPlan(
            model=path,
            engine=str(staged["engine"]),
            major=11,
            precision=Precision(()),
            profiles=tuple(shapes),
        )
        answer = ask_builder(
            plan, "tensorrt_rtx", staged, limit, inspect=False, environment=environment, python=python
        )
        size = staged["engine"].stat().st_size if staged["engine"].exists() else 0
        facts = answer.contents or {}
        reason = None
        try:
            check_answer(plan, "TensorRT-RTX", answer, read_text(staged["log"]), None)
        except GraphPruneError as error:
            if facts.get("step", "import") == "import":
                missing = str(facts.get("error")).startswith("ModuleNotFoundError")
                raise EngineError(
                    "TensorRT-RTX is not installed; install graphprune[rtx]" if missing else str(error)
                ) from error
            reason = str(error)
    step = facts.get("step")
    return Conformance(
        parses=step in {"build", "inspect", "done"},
        builds=step in {"inspect", "done"} and size > 0,
        errors=tuple(parser_errors(answer, path)),
        reason=reason,
        version=facts.get("version"),
        size=size,
        seconds=answer.seconds,
    )
