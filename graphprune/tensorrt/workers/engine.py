"""Worker: run engines on the device, in turn, and time them by the device's own events.

Memory, streams and events are NVIDIA's driver API (libcuda, cuda.h), so nothing but TensorRT and NumPy is needed. The
calls of TensorRT are those that 8.6, 10 and 11 have alike (python/src/infer/pyCore.cpp): tensors by name,
execute_async_v3.

Question: {"package", "engines" (files), "inputs" (names), "feeds", "outputs" (one .npz an engine), "warm", "rounds",
"runs"}.
Answer: {"step": "import" | "device" | "load" | "run" | "time" | "done", "error", "engine" (index of the one at work),
"version", "names" (of outputs, for each engine), "milliseconds" (for each engine, of all its runs)}.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from typing import Any


class Refusal(Exception):  # noqa: N818 - not a fault of this program
    """The engine cannot be run with these inputs."""


class Device:
    """The first device, through the driver's C interface."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(self.stream), 0)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} of the driver gives error {status}")

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return pointer.value

    def upload(self, pointer: int, array: Any) -> None:
        self.call(
            "cuMemcpyHtoD_v2",
            ctypes.c_uint64(pointer),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
        )

    def download(self, array: Any, pointer: int) -> None:
        self.call(
            "cuMemcpyDtoH_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(pointer),
            ctypes.c_size_t(array.nbytes),
        )

    def wait(self) -> None:
        self.call("cuStreamSynchronize", self.stream)

    def event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self.call("cuEventCreate", ctypes.byref(event), 0)
        return event

    def record(self, event: ctypes.c_void_p) -> None:
        self.call("cuEventRecord", event, self.stream)

    def elapsed(self, start: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        """Milliseconds between two recorded events."""
        value = ctypes.c_float()
        self.call("cuEventElapsedTime", ctypes.byref(value), start, end)
        return value.value


class Engine:
    """An engine with its inputs on the device."""

    def __init__(self, package: Any, runtime: Any, device: Device, path: str, feeds: dict[str, Any]) -> None:
        import numpy as np

        self.device = device
        with open(path, "rb") as file:  # noqa: PTH123
            self.engine = runtime.deserialize_cuda_engine(file.read())
        if self.engine is None:
            raise Refusal("the engine cannot be loaded here")
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise Refusal("the engine gets no execution context, for lack of memory as a rule")
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        is_input = {name: self.engine.get_tensor_mode(name) == package.TensorIOMode.INPUT for name in names}
        for name in (name for name in names if is_input[name]):
            if name not in feeds:
                raise Refusal(f"there is no value for input {name!r}")
            kind = np.dtype(package.nptype(self.engine.get_tensor_dtype(name)))
            array = np.ascontiguousarray(feeds[name].astype(kind))  # 8.6 makes int32 of int64
            if kind.kind in "iub" and not np.array_equal(array, feeds[name]):
                raise Refusal(f"values of input {name!r} do not fit the engine's type {kind}")
            if self.context.set_input_shape(name, tuple(array.shape)) is False:
                raise Refusal(f"shape {array.shape} of input {name!r} is outside the engine's profile")
            pointer = device.allocate(array.nbytes)
            device.upload(pointer, array)
            self.context.set_tensor_address(name, pointer)
        self.outputs: dict[str, tuple[Any, int]] = {}
        for name in (name for name in names if not is_input[name]):
            shape = tuple(self.context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise Refusal(
                    f"the size of output {name!r} is known only after the run, which is not supported"
                )
            array = np.empty(shape, np.dtype(package.nptype(self.engine.get_tensor_dtype(name))))
            pointer = device.allocate(array.nbytes)
            self.context.set_tensor_address(name, pointer)
            self.outputs[name] = array, pointer

    def start(self) -> None:
        if self.context.execute_async_v3(self.device.stream.value or 0) is False:
            raise Refusal("the engine refuses to run")

    def results(self) -> dict[str, Any]:
        self.device.wait()
        for array, pointer in self.outputs.values():
            self.device.download(array, pointer)
        return {name: array for name, (array, _) in self.outputs.items()}


def timed(engine: Engine, device: Device, runs: int) -> list[float]:
    """Milliseconds of each of some runs, one after another."""
    events = [(device.event(), device.event()) for _ in range(runs)]
    for start, end in events:
        device.record(start)
        engine.start()
        device.record(end)
    device.wait()
    return [device.elapsed(start, end) for start, end in events]


def work(question: dict[str, Any], say: Any) -> None:
    import numpy as np

    package = importlib.import_module(question["package"])
    say(step="device", version=str(getattr(package, "__version__", "")) or None)
    device = Device(ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
    run_all(package, device, question, say, np)


def run_all(package: Any, device: Device, question: dict[str, Any], say: Any, np: Any) -> None:
    with np.load(question["feeds"]) as stored:
        feeds = {name: stored[f"arr_{index}"] for index, name in enumerate(question["inputs"])}
    runtime = package.Runtime(package.Logger(package.Logger.ERROR))
    engines, names = [], []
    for index, path in enumerate(question["engines"]):
        say(step="load", engine=index)
        engine = Engine(package, runtime, device, path, feeds)
        engines.append(engine)
        say(step="run")
        engine.start()
        results = engine.results()
        names.append(list(results))
        np.savez(question["outputs"][index], *results.values())
    say(step="time", names=names)
    milliseconds: list[list[float]] = [[] for _ in engines]
    for engine in engines:
        timed(engine, device, question["warm"])
    # In turn, so that a drift of clocks or temperature falls on all alike.
    for turn in range(question["rounds"]):
        order = range(len(engines)) if turn % 2 == 0 else reversed(range(len(engines)))
        for index in order:
            say(engine=index)
            milliseconds[index] += timed(engines[index], device, question["runs"])
    say(step="done", milliseconds=milliseconds)


def main(question: str, answer: str) -> None:
    with open(question) as file:  # noqa: PTH123
        asked = json.load(file)
    facts: dict[str, Any] = {"step": "import", "error": None, "engine": 0}

    def say(**more: Any) -> None:
        facts.update(more)
        with open(f"{answer}.part", "w") as file:  # noqa: PTH123
            json.dump(facts, file)
        os.replace(f"{answer}.part", answer)  # noqa: PTH105

    say()
    try:
        work(asked, say)
    except Refusal as refusal:
        say(error=str(refusal))
    except BaseException as error:
        say(error=f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    # Destructors of foreign libraries may crash or hang on the way out; the answer and the outputs are written.
    os._exit(0)
