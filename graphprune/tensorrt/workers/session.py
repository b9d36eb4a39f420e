"""Worker: run a network in an ONNX Runtime session, and say which providers computed it.

Question: {"model", "providers": [[name, options], ...], "inputs" (names), "feeds", "outputs" (.npz files), "profile",
"log", "runs", "warm"}.
Answer: {"step": "import" | "create" | "run" | "done", "error", "version", "available", "providers", "placed" (number of
nodes by provider), "names" (of outputs), "seconds" (of each run)}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from typing import Any


def placements(path: str) -> dict[str, int]:
    """How many nodes each provider computed, from a profile."""
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        events = json.load(file)
    nodes: dict[str, set[str]] = {}
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and arguments.get("provider"):
            nodes.setdefault(arguments["provider"], set()).add(str(event.get("name")))
    return {provider: len(names) for provider, names in nodes.items()}


def work(question: dict[str, Any], say: Any) -> None:
    import numpy as np

    runtime = importlib.import_module("onnxruntime")
    say(step="create", version=runtime.__version__, available=list(runtime.get_available_providers()))
    options = runtime.SessionOptions()
    options.log_severity_level = 0 if question["log"] is not None else 2
    options.enable_profiling = True
    options.profile_file_prefix = question["profile"]
    session = runtime.InferenceSession(
        question["model"],
        options,
        providers=[name for name, _ in question["providers"]],
        provider_options=[settings for _, settings in question["providers"]],
    )
    say(step="run", providers=list(session.get_providers()))
    with np.load(question["feeds"]) as stored:
        feeds = {name: stored[f"arr_{index}"] for index, name in enumerate(question["inputs"])}
    names = [item.name for item in session.get_outputs()]
    outputs = session.run(names, feeds)
    say(placed=placements(session.end_profiling()))
    for _ in range(question["warm"]):
        session.run(names, feeds)
    seconds = []
    for _ in range(question["runs"]):
        start = time.perf_counter()
        session.run(names, feeds)
        seconds.append(time.perf_counter() - start)
    np.savez(question["outputs"], *outputs)
    say(step="done", names=names, seconds=seconds)


def main(question: str, answer: str) -> None:
    with open(question) as file:  # noqa: PTH123
        asked = json.load(file)
    if asked["log"] is not None:
        # The runtime writes its log to the process's own streams.
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
    facts: dict[str, Any] = {"step": "import", "error": None}

    def say(**more: Any) -> None:
        facts.update(more)
        with open(f"{answer}.part", "w") as file:  # noqa: PTH123
            json.dump(facts, file)
        os.replace(f"{answer}.part", answer)  # noqa: PTH105

    say()
    try:
        work(asked, say)
    except BaseException as error:
        say(error=f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    # Destructors of foreign libraries may crash or hang on the way out; the answer and the outputs are written.
    os._exit(0)
