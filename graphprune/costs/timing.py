"""Time: whole networks in ONNX Runtime on this machine, alone, in pairs, and kernel by kernel.

Other processes only ever make a run slower, and their share changes from second to second. So two networks are
compared run by run in turn, and a kernel's time is the least of its runs.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.errors import ModelError, said
from graphprune.runtime import make_session

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import onnxruntime

Feeds: TypeAlias = Mapping[str, npt.NDArray[Any]]
Clock: TypeAlias = Callable[[], float]

#: Runs before the first that counts: memory is allocated, weights are packed, threads are started.
WARM_UP = 3
#: A profile takes at least so many runs, however long they take.
LEAST_RUNS = 8


@dataclass(frozen=True, slots=True)
class Kernel:
    """One node of the optimised graph and its time.

    Attributes:
        name: As ONNX Runtime names it, which keeps the name of the node or of the output that it stems from.
        op_type: What is run.
        seconds: The least of all runs.
        input_shapes: Shapes of its operands, missing ones left out.
        outputs: Names of the values that it makes.
        inputs: Names of the values that it reads.
    """

    name: str
    op_type: str
    seconds: float
    input_shapes: tuple[tuple[int, ...], ...] = ()
    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """A run of a network, kernel by kernel.

    Attributes:
        kernels: In the order in which they run.
        between: Seconds of a run that lie between the kernels: the least of all runs.
        typical: Seconds of a run: the median.

    A run that is profiled takes longer: recording a kernel takes as long as a small one runs, so that the network seems
    to have more of what no cut saves. :meth:`unprofiled` takes that off.
    """

    kernels: tuple[Kernel, ...]
    between: float
    typical: float

    def unprofiled(self, times: Sequence[float]) -> Profile:
        """The kernels within runs that were not profiled and took so many seconds each."""
        kernels = sum(kernel.seconds for kernel in self.kernels)
        return Profile(self.kernels, max(min(times) - kernels, 0.0), median(times))

    @property
    def seconds(self) -> float:
        """A run that nothing disturbs."""
        return self.between + sum(kernel.seconds for kernel in self.kernels)


def measure(
    model: ir.Model | str | Path,
    feeds: Feeds,
    runs: int = 20,
    *,
    threads: int = 0,
    seconds: float = 60.0,
    clock: Clock = time.perf_counter,
) -> float:
    """Median time of one run.

    Args:
        model: A model, or the path of one.
        feeds: Inputs by name.
        runs: How many runs count.
        threads: Threads within an op; 0: as many as ONNX Runtime takes.
        seconds: After this time no further run is begun.
        clock: Tells seconds.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """
    return median(run_times(model, feeds, runs, threads=threads, seconds=seconds, clock=clock))


def run_times(
    model: ir.Model | str | Path,
    feeds: Feeds,
    runs: int = 20,
    *,
    threads: int = 0,
    seconds: float = 60.0,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Seconds of each run; arguments and errors as for :func:`measure`."""
    with _runner(model, feeds, threads) as run:
        return call_times(run, runs, seconds, clock)


def compare(
    first: ir.Model | str | Path,
    second: ir.Model | str | Path,
    feeds: Feeds,
    pairs: int = 20,
    *,
    threads: int = 0,
    seconds: float = 120.0,
    clock: Clock = time.perf_counter,
) -> float:
    """Time of ``second`` over time of ``first``: the median of pairs of runs, in turn in one process.

    Args:
        first, second: Models with the same inputs, or their paths.
        feeds: Inputs by name.
        pairs: How many pairs count.
        threads: Threads within an op; 0: as many as ONNX Runtime takes.
        seconds: After this time no further pair is begun.
        clock: Tells seconds.

    Raises:
        ModelError: ONNX Runtime cannot load or run one of them.
    """
    with _runner(first, feeds, threads) as run_first, _runner(second, feeds, threads) as run_second:
        return median_ratio(run_first, run_second, pairs, seconds, clock)


def call_times(
    run: Callable[[], object], runs: int, seconds: float = 60.0, clock: Clock = time.perf_counter
) -> list[float]:
    """Seconds of each call, after some that warm up; of at least one."""
    for _ in range(WARM_UP):
        run()
    start, times = clock(), [_timed(run, clock)]
    while len(times) < runs and clock() - start < seconds:
        times.append(_timed(run, clock))
    return times


def median_ratio(
    first: Callable[[], object],
    second: Callable[[], object],
    pairs: int,
    seconds: float = 120.0,
    clock: Clock = time.perf_counter,
) -> float:
    """Median over pairs of calls of the second one's time over the first one's; the order in a pair alternates."""
    for _ in range(WARM_UP):
        first()
        second()
    start, ratios = clock(), list[float]()
    while not ratios or (len(ratios) < pairs and clock() - start < seconds):
        if len(ratios) % 2:
            after, before = _timed(second, clock), _timed(first, clock)
        else:
            before, after = _timed(first, clock), _timed(second, clock)
        ratios.append(after / before if before > 0 else 1.0)
    return median(ratios)


def _timed(run: Callable[[], object], clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start


def session_of(
    model: onnx.ModelProto | str | Path, threads: int, **settings: Any
) -> onnxruntime.InferenceSession:
    """A session as users run it: all optimisations on, on the CPU.

    Its threads stop spinning when a run ends: else the other of a pair would be run beside them.

    Args:
        model: A small model, or the path of any.
        threads: Threads within an op; 0: as many as ONNX Runtime takes.
        settings: Further attributes of ``SessionOptions``.

    Raises:
        ModelError: ONNX Runtime cannot load it.
    """
    return make_session(model, threads=threads, spin=True, enable_cpu_mem_arena=True, **settings)


@contextmanager
def _runner(model: ir.Model | str | Path, feeds: Feeds, threads: int) -> Iterator[Callable[[], object]]:
    with stored(model) as path:
        session = session_of(path, threads)
        wanted = {value.name for value in session.get_inputs()}
        given = {name: array for name, array in feeds.items() if name in wanted}
        try:
            session.run(None, given)
        except Exception as error:
            raise ModelError(f"the model cannot be timed: {said(error)}") from error
        yield lambda: session.run(None, given)


@contextmanager
def stored(model: ir.Model | str | Path) -> Iterator[Path]:
    """The path of a model; of a temporary file where it is in memory."""
    if isinstance(model, str | Path):
        yield Path(model)
        return
    from graphprune.model import save

    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        yield path


def profile(
    model: onnx.ModelProto | str | Path,
    feeds: Feeds,
    *,
    runs: int = 20,
    seconds: float = 10.0,
    threads: int = 0,
    outputs: bool = True,
) -> Profile:
    """The time of each kernel of the optimised graph.

    Args:
        model: A small model, or the path of any.
        feeds: Inputs by name.
        runs: How many runs at most, after those that warm up.
        seconds: After this time no further run is begun.
        threads: Threads within an op; 0: as many as ONNX Runtime takes.
        outputs: Also find out which values each kernel reads and makes.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        settings: dict[str, Any] = {"enable_profiling": True, "profile_file_prefix": f"{folder}/profile"}
        optimised = Path(folder) / "optimised.onnx"
        if outputs:
            settings["optimized_model_filepath"] = str(optimised)
        session = session_of(model, threads, **settings)
        wanted = {value.name for value in session.get_inputs()}
        binding = session.io_binding()
        for name, array in feeds.items():
            if name in wanted:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for value in session.get_outputs():
            binding.bind_output(value.name)
        start = time.perf_counter()
        try:
            for run in range(WARM_UP + runs):
                if run >= WARM_UP + LEAST_RUNS and time.perf_counter() - start > seconds:
                    break
                session.run_with_iobinding(binding)
        except Exception as error:
            raise ModelError(f"the model cannot be timed: {said(error)}") from error
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        values = _values(optimised) if outputs and optimised.exists() else {}
    return read_events(events, values)


def _values(path: Path) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """By node name of a stored graph what the node reads and makes."""
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    return {node.name: (tuple(node.input), tuple(node.output)) for node in proto.graph.node}


def read_events(
    events: list[dict[str, Any]], values: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
) -> Profile:
    """Kernels from the events of ONNX Runtime's profiler; times are microseconds there."""
    suffix = "_kernel_time"
    times: dict[tuple[str, str], list[int]] = {}
    shapes: dict[tuple[str, str], tuple[tuple[int, ...], ...]] = {}
    between: list[int] = []
    wholes: list[int] = []
    running = 0
    # A run ends after its kernels, and may do so in the same microsecond.
    for event in sorted(events, key=lambda e: (int(e["ts"]) + int(e["dur"]), e["name"] == "model_run")):
        if event["name"] == "model_run":
            between.append(event["dur"] - running)
            wholes.append(event["dur"])
            running = 0
        if event.get("cat") != "Node" or not event["name"].endswith(suffix):
            continue
        running += event["dur"]
        key = event["name"].removesuffix(suffix), event["args"]["op_name"]
        times.setdefault(key, []).append(event["dur"])
        shapes[key] = tuple(
            tuple(shape)
            for operand in event["args"].get("input_type_shape", ())
            for shape in operand.values()
        )
    kernels = tuple(
        Kernel(name, op_type, min(seen) * 1e-6, shapes[name, op_type], made[1], made[0])
        for (name, op_type), seen in times.items()
        for made in [values.get(name, ((), ()))]
    )
    least, typical = max(min(between, default=0), 0), median(wholes) if wholes else 0.0
    return Profile(kernels, least * 1e-6, typical * 1e-6)
