"""Times ONNX Runtime sessions on the device, in turn; gpu.py runs this as a process of its own.

    python gpu_sessions.py QUESTION.json ANSWERS.jsonl

Question: {"models": [{"path", "providers": [[name, options], ...]}, ...], "inputs" (names), "feeds" (.npz), "rounds",
"runs"}.
Answer, one line: {"milliseconds": for each model, of all its runs} or {"reason"}. Inputs and outputs lie on the device,
and a session computes on a stream of ours, on which events are recorded through NVIDIA's driver: no PyTorch is needed.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from graphprune.tensorrt.workers.engine import Device

CPU = "CPUExecutionProvider"


def bound(runtime: Any, entry: dict[str, Any], feeds: dict[str, Any], stream: int) -> tuple[Any, Any]:
    """A session whose inputs and outputs lie on the device, and its binding.

    Raises:
        RuntimeError: The wanted provider was not loaded.
    """
    providers = [
        (name, options if name == CPU else {**options, "user_compute_stream": str(stream)})
        for name, options in entry["providers"]
    ]
    session = runtime.InferenceSession(entry["path"], providers=providers)
    wanted = entry["providers"][0][0]
    if wanted not in session.get_providers():
        raise RuntimeError(
            f"{wanted} could not be loaded, and ONNX Runtime fell back to {session.get_providers()[0]}"
        )
    binding = session.io_binding()
    for item in session.get_inputs():
        binding.bind_ortvalue_input(
            item.name, runtime.OrtValue.ortvalue_from_numpy(feeds[item.name], "cuda", 0)
        )
    for item in session.get_outputs():
        binding.bind_output(item.name, "cuda", 0)
    return session, binding


def measure(runtime: Any, device: Any, asked: dict[str, Any], feeds: dict[str, Any]) -> list[list[float]]:
    """Milliseconds of each run of each model, in turn."""
    sessions = [bound(runtime, entry, feeds, device.stream.value or 0) for entry in asked["models"]]
    for session, binding in sessions:
        for _ in range(asked["runs"]):
            session.run_with_iobinding(binding)
    device.wait()
    start, end = device.event(), device.event()
    times: list[list[float]] = [[] for _ in sessions]
    for turn in range(asked["rounds"]):
        order = list(enumerate(sessions))
        for index, (session, binding) in order if turn % 2 == 0 else order[::-1]:
            for _ in range(asked["runs"]):
                device.record(start)
                session.run_with_iobinding(binding)
                device.record(end)
                device.wait()
                times[index].append(device.elapsed(start, end))
    return times


def main(question: str, answers: str) -> None:
    """Answer."""
    import numpy as np
    import onnxruntime

    asked = json.loads(Path(question).read_text())
    with np.load(asked["feeds"]) as stored:
        feeds = {name: stored[f"arr_{index}"] for index, name in enumerate(asked["inputs"])}
    try:
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        device = Device(ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
        result: dict[str, Any] = {"milliseconds": measure(onnxruntime, device, asked, feeds)}
    except Exception as error:
        result = {"reason": " ".join(str(error).split())[:200] or type(error).__name__}
    Path(answers).write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
