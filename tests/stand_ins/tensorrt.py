"""TensorRT's Python API as far as builds use it; which flags there are is asked for, as in 8.6, 10 or 11."""

from __future__ import annotations

import enum
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

ASKED: dict[str, Any] = json.loads(os.environ.get("STAND_IN", "{}"))


def record(*call: Any) -> None:
    with Path(os.environ["STAND_IN_CALLS"]).open("a") as file:
        file.write(json.dumps(call, default=str) + "\n")


def happen(where: str) -> None:
    """Whatever is asked to go wrong at this place."""
    match ASKED.get(where):
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(600)
        case "quit":
            os._exit(0)
        case "status":
            os._exit(7)
        case "garbage":
            os.write(1, b'{"step": "done", "version": "lies"}\n\xff\xfe' + b"garbage " * 100_000)
        case "raise":
            raise RuntimeError("the driver\nis too old")
        case _:
            pass


happen("import")

__version__ = ASKED.get("version", "10.16.0")
BuilderFlag = enum.IntEnum("BuilderFlag", ASKED.get("builder_flags", ["SPARSE_WEIGHTS"]), start=0)  # type: ignore[misc]
NetworkDefinitionCreationFlag = enum.IntEnum(  # type: ignore[misc]
    "NetworkDefinitionCreationFlag", ASKED.get("network_flags", ["STRONGLY_TYPED"]), start=0
)
MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["NONE", "LAYER_NAMES_ONLY", "DETAILED"])
LayerInformationFormat = enum.Enum("LayerInformationFormat", ["ONELINE", "JSON"])


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    ERROR = ILogger.Severity.ERROR

    def __init__(self, severity: ILogger.Severity) -> None:
        self.severity = severity

    def log(self, severity: ILogger.Severity, message: str) -> None:
        print(message)


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    return True


class _Input:
    def __init__(self, name: str, shape_tensor: bool) -> None:
        self.name, self.is_shape_tensor = name, shape_tensor


class INetworkDefinition:
    num_inputs = len(ASKED.get("inputs", ["x"]))

    def get_input(self, index: int) -> _Input:
        return _Input(ASKED.get("inputs", ["x"])[index], bool(ASKED.get("shape_tensors")))


class ITimingCache:
    def __init__(self, contents: bytes) -> None:
        self.contents = contents

    def serialize(self) -> bytes:
        return self.contents + b"+times"


class IOptimizationProfile:
    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        record("set_shape", name, *shapes)


class IBuilderConfig:
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    cache: ITimingCache | None = None

    def set_flag(self, flag: enum.IntEnum) -> None:
        record("set_flag", flag.name)

    def set_memory_pool_limit(self, pool: enum.Enum, size: int) -> None:
        record("set_memory_pool_limit", pool.name, size)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        record("add_optimization_profile")
        return -1 if ASKED.get("profile") == "refused" else 0

    def create_timing_cache(self, contents: bytes) -> ITimingCache:
        record("create_timing_cache", contents.decode())
        return ITimingCache(contents)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not (ASKED.get("cache") == "mismatch" and cache.contents)

    def get_timing_cache(self) -> ITimingCache | None:
        return self.cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        happen("builder")
        self.logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        record(
            "create_network", [flag.name for flag in NetworkDefinitionCreationFlag if flags >> int(flag) & 1]
        )
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        record("build", config.profiling_verbosity.name)
        for severity, message in ASKED.get("messages", []):
            self.logger.log(ILogger.Severity[severity], message)
        happen("build")
        return None if ASKED.get("build") == "nothing" else b"an engine"


class ParserError:
    def __init__(self, index: int, name: str, operator: str, text: str) -> None:
        self._index, self._text = index, text
        if ASKED.get("named_errors", True):  # 8.6 has neither
            self.node_name = lambda: name
            self.node_operator = lambda: operator

    def node(self) -> int:
        return self._index

    def desc(self) -> str:
        return self._text


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self.errors = [ParserError(*entry) for entry in ASKED.get("parser_errors", [])]
        self.num_errors = len(self.errors)

    def parse_from_file(self, path: str) -> bool:
        happen("parse")
        record("parse_from_file", path)
        return not self.errors and ASKED.get("parse") != "refused"

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]


class EngineInspector:
    def get_engine_information(self, form: enum.Enum) -> str:
        record("get_engine_information", form.name)
        return str(ASKED.get("layers", '{"Layers": []}'))


class ICudaEngine:
    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        happen("runtime")

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        return None if ASKED.get("runtime") == "refused" else ICudaEngine()
