"""Running and timing engines, against stand-ins for TensorRT's runtime and the driver, in the host's memory."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import EngineError
from graphprune.tensorrt.engines import NOISE, compare, largest_difference, run_engines
from graphprune.tensorrt.workers import engine as worker

STAND_INS = Path(__file__).parent / "stand_ins"


class Driver:
    """The driver's calls, in the host's memory; time is what engines say they take."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.clock = 0.0
        self.marks: dict[int, float] = {}
        self.current = False

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        self.current = True
        return 0

    def cuStreamCreate(self, stream: Any, flags: int) -> int:  # noqa: N802
        assert self.current
        return 0

    def cuMemAlloc_v2(self, pointer: Any, size: ctypes.c_size_t) -> int:  # noqa: N802
        block = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(block)
        self.blocks[ctypes.addressof(block)] = block
        return 0

    def cuMemcpyHtoD_v2(self, target: Any, source: Any, size: Any) -> int:  # noqa: N802
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, source: Any, size: Any) -> int:  # noqa: N802
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        return 0

    def cuEventCreate(self, event: Any, flags: int) -> int:  # noqa: N802
        event._obj.value = len(self.marks) + 1
        self.marks[event._obj.value] = math.nan
        return 0

    def cuEventRecord(self, event: Any, stream: Any) -> int:  # noqa: N802
        self.marks[event.value] = self.clock
        return 0

    def cuEventElapsedTime(self, value: Any, start: Any, end: Any) -> int:  # noqa: N802
        value._obj.value = self.marks[end.value] - self.marks[start.value]
        return 0


class Mode(enum.Enum):
    INPUT, OUTPUT = range(2)


@dataclasses.dataclass
class Loaded:
    """An engine, y = 2 x, that takes a given time."""

    driver: Driver
    milliseconds: float
    kind: Any = np.float16
    largest: int = 8
    rows: int | None = None
    num_io_tensors: int = 2

    def create_execution_context(self) -> Loaded:
        self.addresses: dict[str, int] = {}
        return self

    def get_tensor_name(self, index: int) -> str:
        return ["x:0", "y"][index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name == "x:0" else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.kind

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= self.largest

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape if self.rows is None else (self.rows, *self.shape[1:])

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        size = math.prod(self.shape) * np.dtype(self.kind).itemsize
        values = np.frombuffer(ctypes.string_at(self.addresses["x:0"], size), self.kind) * 2
        ctypes.memmove(self.addresses["y"], values.astype(self.kind).tobytes(), size)
        self.driver.clock += self.milliseconds
        return True


def work(
    folder: Path, engines: dict[str, Loaded | None], driver: Driver, x: Any, **changes: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let the worker run engines by these names; what it answers, and the outputs."""
    package = SimpleNamespace(
        TensorIOMode=Mode,
        nptype=lambda kind: kind,
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, severity: None}),
        Runtime=lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda contents: engines[contents.decode()]
        ),
    )
    for name in engines:
        (folder / name).write_text(name)
    np.savez(folder / "feeds.npz", x)
    question: dict[str, Any] = {
        "engines": [str(folder / name) for name in engines],
        "inputs": ["x:0"],
        "feeds": str(folder / "feeds.npz"),
        "outputs": [str(folder / f"{name}.npz") for name in engines],
        "warm": 1,
        "rounds": 2,
        "runs": 3,
    }
    facts: dict[str, Any] = {}
    worker.run_all(package, worker.Device(driver), question | changes, lambda **more: facts.update(more), np)
    outputs = []
    for index, path in enumerate(question["outputs"]):
        with np.load(path) as stored:
            outputs.append({name: stored[f"arr_{i}"] for i, name in enumerate(facts["names"][index])})
    return facts, outputs


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_engines_compute_and_are_timed_in_turn(tmp_path: Path) -> None:
    driver = Driver()
    engines: dict[str, Loaded | None] = {
        "dense": Loaded(driver, 4.0),
        "sparse": Loaded(driver, 2.5, np.float32),
    }
    facts, outputs = work(tmp_path, engines, driver, X)
    for output, kind in zip(outputs, (np.float16, np.float32), strict=True):
        np.testing.assert_array_equal(output["y"], (X * 2).astype(kind))
        assert output["y"].dtype == kind
    dense, sparse = facts["milliseconds"]
    assert dense == pytest.approx([4.0] * 6)
    assert sparse == pytest.approx([2.5] * 6)
    assert facts["step"] == "done"
    assert compare(dense, sparse).speedup == pytest.approx(1.6)


def test_int64_inputs_of_an_int32_engine(tmp_path: Path) -> None:
    """TensorRT 8.6 makes int32 of int64."""
    driver = Driver()
    _, (output,) = work(tmp_path, {"e": Loaded(driver, 1.0, np.int32)}, driver, np.array([[1, 2]], np.int64))
    np.testing.assert_array_equal(output["y"], [[2, 4]])
    with pytest.raises(worker.Refusal, match="do not fit the engine's type int32"):
        work(tmp_path, {"e": Loaded(driver, 1.0, np.int32)}, driver, np.array([[1 << 40]], np.int64))


def test_runs_that_are_refused(tmp_path: Path) -> None:
    driver = Driver()
    with pytest.raises(worker.Refusal, match="outside the engine's profile"):
        work(tmp_path, {"e": Loaded(driver, 1.0, largest=1)}, driver, X)
    with pytest.raises(worker.Refusal, match="known only after the run"):
        work(tmp_path, {"e": Loaded(driver, 1.0, rows=-1)}, driver, X)
    with pytest.raises(worker.Refusal, match="no value for input 'x:0'"):
        work(tmp_path, {"e": Loaded(driver, 1.0)}, driver, X, inputs=["other"])
    with pytest.raises(worker.Refusal, match="cannot be loaded"):
        work(tmp_path, {"e": None}, driver, X)
    driver.cuMemAlloc_v2 = lambda pointer, size: 2  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cuMemAlloc_v2 of the driver gives error 2"):
        work(tmp_path, {"e": Loaded(driver, 1.0)}, driver, X)


def test_without_tensorrt_or_a_device(tmp_path: Path) -> None:
    engine = tmp_path / "net.plan"
    engine.write_bytes(b"an engine")
    with pytest.raises(EngineError, match="is not installed"):
        run_engines([engine], {"x": X}, environment={"PYTHONPATH": str(STAND_INS / "empty")})
    environment = {
        "PYTHONPATH": str(STAND_INS),
        "STAND_IN": json.dumps({"import": "crash"}),
        "STAND_IN_CALLS": str(tmp_path / "calls"),
    }
    with pytest.raises(EngineError, match="cannot be imported: was ended by SIGSEGV"):
        run_engines([engine], {"x": X}, environment=environment)
    # the stand-in runs nothing: this ends at the driver here, and at the engine where there is one
    environment["STAND_IN"] = json.dumps({"runtime": "refused"})
    with pytest.raises(EngineError, match=r"no usable NVIDIA device|cannot be loaded here"):
        run_engines([engine], {"x": X}, environment=environment)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([1.0], [1.0], "no difference (below 3%)"),
        ([1.0], [0.98], "no difference (below 3%)"),
        ([1.0], [1.02], "no difference (below 3%)"),
        ([1.0], [0.5], "2.00 times as fast"),
        ([1.0], [1.5], "slower: 1.50 times as long"),
        ([1.0, 1.0, 100.0], [0.5, 0.5, 100.0], "2.00 times as fast"),
    ],
)
def test_comparisons(before: list[float], after: list[float], said: str) -> None:
    assert str(compare(before, after)) == said


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_a_comparison_does_not_depend_on_the_unit(before: float, after: float) -> None:
    one, thousand = compare([before], [after]), compare([before * 1024], [after * 1024])
    assert one.differs == thousand.differs
    assert str(one) == str(thousand)
    assert one.differs == (abs(after / before - 1) >= NOISE)


@pytest.mark.parametrize(
    ("found", "wanted", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.1], [1.0, 2.0], 0.05),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([math.nan, 1.0], [0.0, 1.0], math.inf),
        ([math.inf, 1.0], [0.0, 1.0], math.inf),
        ([1.0, 1.0], [math.inf, 1.0], math.inf),
        ([1.0], [0.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_differences(found: list[float], wanted: list[float], difference: float) -> None:
    assert largest_difference({"y": np.array(found)}, {"y": np.array(wanted)}) == pytest.approx(difference)


def test_outputs_of_another_shape() -> None:
    with pytest.raises(EngineError, match=r"output 'y' of the engine is \(1,\), not \(2,\)"):
        largest_difference({"y": np.zeros(1)}, {"y": np.zeros(2)})
    with pytest.raises(EngineError, match="missing"):
        largest_difference({}, {"y": np.zeros(2)})
