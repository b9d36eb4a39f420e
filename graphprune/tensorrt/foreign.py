"""Questions put to foreign packages, each in a process of its own with a time limit.

Some builds of TensorRT crash the interpreter that imports them, hang without a driver, or print what they like. So a
worker is a program in :mod:`graphprune.tensorrt.workers`, run by its path; the question and the answer are JSON files.
Whatever the process does, the caller gets an :class:`Answer`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORKERS = Path(__file__).parent / "workers"
#: Characters of output that are kept.
_TAIL = 4000


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        contents: The last answer that the worker wrote, which may be there although it failed later; None for none.
        failure: What went wrong with the process, in a few words; None if it ended well and answered.
        ended: "well", "exit", "signal", "time" (stopped at its limit), or "silent" (it ended well without an answer).
        output: The end of what it printed, both streams.
        seconds: How long it ran.
    """

    contents: dict[str, Any] | None
    failure: str | None
    ended: str
    output: str
    seconds: float


def ask(
    worker: str,
    question: Mapping[str, Any],
    limit: float,
    *,
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
) -> Answer:
    """Run a worker, and wait for its answer.

    Parameters
    ----------
    worker : str
        Name of a module in :mod:`graphprune.tensorrt.workers`.
    question : mapping
        What JSON can hold.
    limit : float
        Seconds after which the process, and all that it started, is killed.
    environment : mapping, optional
        Added to this process's environment.
    python : str, optional
        The interpreter; this one by default.

    Returns
    -------
    Answer
        Always.
    """
    with tempfile.TemporaryDirectory(prefix="graphprune-", ignore_cleanup_errors=True) as folder:
        asked, told, printed = (Path(folder) / name for name in ("question.json", "answer.json", "output"))
        asked.write_text(json.dumps(question))
        # -P: neither the worker's folder nor the working directory comes before the installed packages
        command = [python or sys.executable, "-P", str(_WORKERS / f"{worker}.py"), str(asked), str(told)]
        start = time.monotonic()
        # A file, not a pipe: a pipe that a grandchild holds would keep us waiting after the kill.
        with printed.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONFAULTHANDLER": "0", **(environment or {})},
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
        seconds = time.monotonic() - start
        output = printed.read_bytes()[-_TAIL:].decode(errors="replace")
        contents = _read(told)
    ended, failure = _fate(code, limit, output, contents)
    return Answer(contents, failure, ended, output, seconds)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and those that it started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        contents = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return contents if isinstance(contents, dict) else None


def _fate(
    code: int | None, limit: float, output: str, contents: dict[str, Any] | None
) -> tuple[str, str | None]:
    if code is None:
        return "time", f"did not end within {limit:g} s"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return "signal", f"was ended by {name}"
    if code:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        last = f": {lines[-1]}" if lines else ""
        return "exit", f"ended with status {code}{last}"
    if contents is None:
        return "silent", "ended without an answer"
    return "well", None
