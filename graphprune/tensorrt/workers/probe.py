"""Worker: what is there of one package, or of the device. Answers after each step, so that a crash shows where.

Question: {"package": "tensorrt" | "tensorrt_rtx" | "onnxruntime" | "device"}.
Answer: {"step": "import" | "look" | "create" | "done", "error", "version", "builder_flags", "network_flags",
"attributes", "providers", "devices"}, those that are known.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import sys
from typing import Any

#: What a build looks for, beside flags.
ATTRIBUTES = (
    "Builder.build_serialized_network",
    "IBuilderConfig.set_memory_pool_limit",
    "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.get_timing_cache",
    "IBuilderConfig.profiling_verbosity",
    "ICudaEngine.create_engine_inspector",
    "OnnxParser.parse_from_file",
    "ParserError.node_name",
)
# CUdevice_attribute of cuda.h
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76


def look(package: str, say: Any) -> None:
    """A module with TensorRT's API."""
    module = importlib.import_module(package)
    facts = {
        "version": str(getattr(module, "__version__", "")) or None,
        "builder_flags": names(getattr(module, "BuilderFlag", None)),
        "network_flags": names(getattr(module, "NetworkDefinitionCreationFlag", None)),
        "attributes": [name for name in ATTRIBUTES if has(module, name)],
    }
    say(step="create", **facts)
    builder = module.Builder(module.Logger(module.Logger.ERROR))
    if builder is None:
        raise RuntimeError("no builder could be made")
    say(step="done")


def names(kind: Any) -> list[str]:
    """Members of an enumeration, of Python's or of pybind11's kind."""
    members = getattr(kind, "__members__", None)
    found = list(members) if members is not None else [name for name in dir(kind) if name.isupper()]
    return sorted(str(name) for name in found)


def has(module: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def look_runtime(say: Any) -> None:
    """ONNX Runtime, and what it was built with; only a session tells what works."""
    import onnxruntime

    say(step="done", version=onnxruntime.__version__, providers=list(onnxruntime.get_available_providers()))


def look_device(say: Any) -> None:
    """NVIDIA's devices, by the driver itself."""
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    check(driver.cuInit(0), "cuInit")
    count = ctypes.c_int()
    check(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    devices = []
    for index in range(count.value):
        device = ctypes.c_int()
        check(driver.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
        name = ctypes.create_string_buffer(256)
        check(driver.cuDeviceGetName(name, len(name), device), "cuDeviceGetName")
        capability = []
        for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
            value = ctypes.c_int()
            check(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device), "cuDeviceGetAttribute")
            capability.append(value.value)
        devices.append({"name": name.value.decode(errors="replace"), "capability": capability})
    say(step="done", devices=devices)


def check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"{call} of the driver gives error {status}")


def main(question: str, answer: str) -> None:
    with open(question) as file:  # noqa: PTH123 - pathlib is not needed here
        package = json.load(file)["package"]
    facts: dict[str, Any] = {"step": "import", "error": None}

    def say(**more: Any) -> None:
        facts.update(more)
        with open(f"{answer}.part", "w") as file:  # noqa: PTH123
            json.dump(facts, file)
        os.replace(f"{answer}.part", answer)  # noqa: PTH105

    say(missing=package != "device" and importlib.util.find_spec(package) is None)
    if facts["missing"]:
        return
    try:
        if package == "device":
            look_device(say)
        elif package == "onnxruntime":
            look_runtime(say)
        else:
            look(package, say)
    except BaseException as error:
        say(error=f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    # Destructors of foreign libraries may crash or hang on the way out; the answer is written.
    os._exit(0)
