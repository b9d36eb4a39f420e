"""ONNX Runtime as far as sessions with the TensorRT provider use it; what the session does is asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

ASKED: dict[str, Any] = json.loads(os.environ.get("STAND_IN", "{}"))
__version__ = "1.31.0"


def get_available_providers() -> list[str]:
    return list(ASKED.get("available", ["TensorrtExecutionProvider", "CPUExecutionProvider"]))


class SessionOptions:
    log_severity_level = 2
    enable_profiling = False
    profile_file_prefix = ""


class _Output:
    def __init__(self, name: str) -> None:
        self.name = name


class InferenceSession:
    def __init__(
        self,
        path: str,
        options: SessionOptions,
        providers: list[str],
        provider_options: list[dict[str, str]],
    ) -> None:
        with Path(os.environ["STAND_IN_CALLS"]).open("a") as file:
            file.write(json.dumps(["session", path, providers, provider_options]) + "\n")
        if "refuse" in ASKED:
            raise RuntimeError(ASKED["refuse"])
        self.options = options
        os.write(2, "".join(f"{line}\n" for line in ASKED.get("log", [])).encode())

    def get_providers(self) -> list[str]:
        return list(ASKED.get("providers", ["TensorrtExecutionProvider", "CPUExecutionProvider"]))

    def get_outputs(self) -> list[_Output]:
        return [_Output("y/0")]

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        return [np.asarray(feeds["x"]) * 2]

    def end_profiling(self) -> str:
        events = [
            {"cat": "Node", "name": f"node{index}_kernel_time", "args": {"provider": provider}}
            for index, provider in enumerate(ASKED.get("placed", ["TensorrtExecutionProvider"]))
        ]
        path = Path(f"{self.options.profile_file_prefix}.json")
        path.write_text(json.dumps([{"cat": "Session", "name": "model_loading"}, *events]))
        return str(path)
