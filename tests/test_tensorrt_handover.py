"""``graphprune engine`` and ``--tensorrt`` from end to end: numbers, times, the provider, and what is refused.

TensorRT and ONNX Runtime's provider are stand-ins in processes of their own; the device is ONNX Runtime on the CPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.errors import EngineError
from graphprune.tensorrt import bench, engines, handover
from graphprune.tensorrt.engines import EngineRun
from graphprune.tensorrt.probe import DEVICE, PROVIDER, RTX, TENSORRT, Device, Found, State, probe
from tests.command import Cli

from .test_cli_engine import SHAPES, folder  # noqa: F401 - a fixture
from .test_tensorrt_build import STAND_INS, VERSIONS

CPU = "CPUExecutionProvider"


class Gpu:
    """A device that computes what ONNX Runtime computes of a file, times a factor, in given times."""

    def __init__(self) -> None:
        self.model = "net.onnx"
        self.factor = 1.0
        self.milliseconds: dict[str, float] = {}

    def run(self, paths: list[Path], feeds: Any, *, rounds: int = 0, **more: Any) -> list[EngineRun]:
        session = ort.InferenceSession(self.model, providers=[CPU])
        names = [output.name for output in session.get_outputs()]
        values = session.run(names, feeds)
        results = []
        for index, path in enumerate(paths):
            assert Path(path).exists()
            outputs = {name: value * self.factor for name, value in zip(names, values, strict=True)}
            times = (4.0 / 2**index, 9.0, 4.0 / 2**index) if rounds else ()
            results.append(EngineRun(str(path), outputs, times, "10.0"))
        return results


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Gpu:
    """A machine with TensorRT 10 and a device."""
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    monkeypatch.setenv("STAND_IN", json.dumps(VERSIONS[10]))
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls"))
    found = Found(DEVICE, State.WORKS, devices=(Device("a GPU", (9, 0)),))
    monkeypatch.setattr(handover, "probe", lambda name: found if name == DEVICE else probe(name))
    device = Gpu()
    monkeypatch.setattr(engines, "run_engines", device.run)
    monkeypatch.setattr(bench, "run_engines", device.run)
    return device


def calls(kind: str) -> list[Any]:
    return [rest for name, *rest in map(json.loads, Path("calls").read_text().splitlines()) if name == kind]


def test_numbers_of_the_engine_are_compared(cli: Cli, gpu: Gpu) -> None:
    result = cli("engine", "net.onnx", *SHAPES, "--json")
    assert result.code == 0, result.err
    numbers = result.json["engine"]["numbers"]
    assert numbers["inputs"] == "random inputs"
    assert numbers["kind"] == "float32 (TF32)"
    assert all(output["holds"] and output["difference"] < 1e-5 for output in numbers["outputs"])
    assert numbers["outputs"]
    shown = cli("engine", "net.onnx", *SHAPES).out
    assert "of its scale on random inputs" in shown


def test_an_engine_that_computes_something_else_is_an_error(cli: Cli, gpu: Gpu) -> None:
    gpu.factor = 1.5
    result = cli("engine", "net.onnx", *SHAPES)
    assert result.code == 1
    assert "differs from ONNX Runtime's on the CPU by 0.5" in result.err
    assert result.err.count("\n") == 1


def test_inputs_to_compare_on(cli: Cli, gpu: Gpu) -> None:
    np.savez("inputs.npz", x=np.ones((8, 16, 6, 6), np.float32))
    result = cli("engine", "net.onnx", *SHAPES, "--calib", "inputs.npz", "--json")
    assert result.json["engine"]["numbers"]["inputs"] == "inputs.npz"
    missing = cli("engine", "net.onnx", *SHAPES, "--calib", "nothing.npz")
    assert missing.code == 2
    assert "nothing.npz" in missing.err


def test_the_chain_is_timed_against_the_original(cli: Cli, gpu: Gpu) -> None:
    """Three engines: the original and the pruned one with dense kernels, and the one that is kept."""
    gpu.model = "net.pruned.onnx"
    result = cli("net.onnx", "--nm", "2:4", "--tensorrt", "net.plan", *SHAPES, "--bench", "--json")
    assert result.code == 0, result.err
    rows = result.json["engine"]["bench"]
    assert [row["name"] for row in rows] == ["original", "dense kernels only", "engine"]
    assert [row["milliseconds"] for row in rows] == [4.0, 2.0, 1.0]
    assert [row["against_first"] for row in rows] == [None, "2.00 times as fast", "4.00 times as fast"]
    assert rows[2]["against_previous"] == "2.00 times as fast"
    parsed = [Path(path).name for (path,) in calls("parse_from_file")]
    assert parsed == ["net.pruned.onnx", "net.onnx", "net.pruned.onnx"]
    flags = [flag for (flag,) in calls("set_flag")]
    assert flags.count("SPARSE_WEIGHTS") == 1  # of the engine alone
    assert sorted(path.name for path in Path().glob("*.plan")) == ["net.plan"]


def test_a_baseline_that_is_given(cli: Cli, gpu: Gpu) -> None:
    onnx.save(onnx.load("net.onnx"), "before.onnx")
    result = cli("engine", "net.onnx", *SHAPES, "--bench", "--baseline", "before.onnx")
    assert result.code == 0, result.err
    for words in ("original", "dense kernels only", "4.00 times as fast"):
        assert words in result.out
    without = cli("engine", "net.onnx", *SHAPES, "--bench", "--no-sparsity", "--json")
    assert [row["name"] for row in without.json["engine"]["bench"]] == ["engine"]
    wrong = cli("engine", "net.onnx", *SHAPES, "--baseline", "before.onnx", "--engine", "before.onnx")
    assert wrong.code == 2
    assert "never changed" in wrong.err


def test_where_nothing_can_be_timed_it_is_said(cli: Cli) -> None:
    result = cli("engine", "net.onnx", *SHAPES, "--bench", "--json")
    assert result.code == 0
    assert result.json["engine"]["bench"] == []
    assert "nothing was timed: there is no engine" in result.json["engine"]["notes"]


def test_a_device_that_does_not_run_it_is_noted(
    cli: Cli,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*arguments: Any, **more: Any) -> list[EngineRun]:
        raise EngineError("the size of output 'y' is known only after the run")

    monkeypatch.setattr(engines, "run_engines", run)
    monkeypatch.setattr(bench, "run_engines", run)
    result = cli("engine", "net.onnx", *SHAPES, "--bench", "--json")
    assert result.code == 0
    notes = result.json["engine"]["notes"]
    assert any(note.startswith("the engine's numbers were not compared: the size") for note in notes)
    assert any(note.startswith("nothing was timed: the size") for note in notes)
    assert result.json["engine"]["numbers"] is None


# -- ONNX Runtime's provider ----------------------------------------------------------------------------------------


def double() -> onnx.ModelProto:
    """y/0 = 2 x, which is what the stand-in for a session computes."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y/0"], name="fc")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (4, 16))],
        [helper.make_tensor_value_info("y/0", TensorProto.FLOAT, (4, 16))],
        [numpy_helper.from_array(2 * np.eye(16, dtype=np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture
def runtime(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Puts a stand-in for ONNX Runtime with the provider on this machine, and a network that it computes."""

    def install(**asked: Any) -> None:
        onnx.save(double(), "double.onnx")
        monkeypatch.setenv("PYTHONPATH", str(STAND_INS / "runtime"))
        monkeypatch.setenv("STAND_IN", json.dumps(asked))
        monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls"))
        monkeypatch.setattr(
            handover,
            "probe",
            lambda name: (
                Found(name, State.MISSING, "it is not installed") if name in (TENSORRT, RTX) else probe(name)
            ),
        )

    return install


def test_without_the_provider_there_are_options_and_a_note(cli: Cli) -> None:
    result = cli("engine", "net.onnx", *SHAPES, "--provider", "--json")
    assert result.code == 0
    entry = result.json["engine"]["provider"]
    assert entry == {
        "options": "net.ort.json",
        "used": False,
        "version": None,
        "nodes": None,
        "numbers": None,
    }
    (name, options), *_ = json.loads(Path("net.ort.json").read_text())
    assert name == PROVIDER
    assert options["trt_sparsity_enable"] == "1"
    assert options["trt_profile_opt_shapes"] == "x:4x16x6x6"
    assert any("TensorRT was not used by ONNX Runtime" in note for note in result.json["engine"]["notes"])
    required = cli("engine", "net.onnx", *SHAPES, "--provider", "--require-engine")
    assert required.code == 1
    assert "TensorRT was not used by ONNX Runtime" in required.err


def test_options_are_not_written_unasked(cli: Cli) -> None:
    assert cli("engine", "net.onnx", *SHAPES, "--json").json["engine"]["provider"] is None
    assert not Path("net.ort.json").exists()


def test_a_session_by_tensorrt(cli: Cli, runtime: Callable[..., None]) -> None:
    log = [
        "2026 [I:onnxruntime:, t.h:88 log] [2026 INFO] (Sparsity) Found 1 layer(s) eligible to use sparse tactics: fc",
        "2026 [I:onnxruntime:, t.h:88 log] [2026 INFO] (Sparsity) Chose 1 layer(s) using sparse tactics: fc",
    ]
    runtime(log=log, placed=[PROVIDER, CPU])
    result = cli("engine", "double.onnx", "--provider", "--require-engine", "--json")
    assert result.code == 0, result.err
    engine = result.json["engine"]
    assert engine["provider"]["used"]
    assert engine["provider"]["nodes"] == {PROVIDER: 1, CPU: 1}
    assert engine["provider"]["numbers"]["outputs"] == [
        {"name": "y/0", "difference": 0.0, "bound": pytest.approx(4 * 2**-11 * 2**0.5), "holds": True}
    ]
    assert engine["verdict"]["verdict"] == "SPARSE_USED"
    assert any("not all nodes were computed by TensorRT: 1 by CPU" in note for note in engine["notes"])
    assert "computed 1 node by TensorRT" in cli("engine", "double.onnx", "--provider").out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"providers": [CPU], "placed": [CPU]}, "fell back to CPU"),
        ({"placed": [CPU]}, "it took no node"),
        ({"available": [CPU]}, "has no TensorrtExecutionProvider"),
    ],
)
def test_a_fall_back_is_a_note_or_an_error(
    cli: Cli,
    runtime: Callable[..., None],
    asked: dict[str, Any],
    said: str,
) -> None:
    runtime(**asked)
    result = cli("engine", "double.onnx", "--provider", "--json")
    assert result.code == 0
    assert any(said in note for note in result.json["engine"]["notes"])
    assert not result.json["engine"]["provider"]["used"]
    required = cli("engine", "double.onnx", "--provider", "--require-engine")
    assert required.code == 1
    assert said in required.err


# -- what TensorRT-RTX refuses --------------------------------------------------------------------------------------


@pytest.fixture
def rtx(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """A TensorRT-RTX that takes a file by a condition on its name."""

    def install(condition: str) -> None:
        package = tmp_path / "rtx"
        package.mkdir()
        (package / "tensorrt_rtx.py").write_text(
            "import time\n__version__ = '1.4'\n"
            "class ILogger:\n    Severity = None\n"
            "class Logger:\n    ERROR = 1\n    def __init__(self, severity): pass\n"
            "class BuilderFlag: pass\n"
            "class NetworkDefinitionCreationFlag: pass\n"
            "class Error:\n"
            "    def node(self): return 0\n"
            "    def node_name(self): return 'product'\n"
            "    def node_operator(self): return 'MatMul'\n"
            "    def desc(self): return 'shapes do not fit'\n"
            "class Config:\n    def add_optimization_profile(self, profile): return 0\n"
            "class Builder:\n"
            "    def __init__(self, logger): pass\n"
            "    def create_network(self, flags): return type('N', (), {'num_inputs': 0})\n"
            "    def create_builder_config(self): return Config()\n"
            "    def create_optimization_profile(self): return type('P', (), {'set_shape': lambda *a: None})()\n"
            "    def build_serialized_network(self, network, config): return b'engine'\n"
            "class OnnxParser:\n"
            "    num_errors = 1\n"
            "    def __init__(self, network, logger): pass\n"
            "    def get_error(self, index): return Error()\n"
            f"    def parse_from_file(self, path): return {condition}\n"
        )
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(package), str(STAND_INS / "empty"))))

    return install


CHAIN = ("net.onnx", "--nm", "2:4", "--tensorrt", "net.plan", *SHAPES)


def test_what_is_refused_and_was_taken_before_is_an_error(
    cli: Cli,
    rtx: Callable[[str], None],
) -> None:
    rtx("'pruned' not in path")
    result = cli(*CHAIN)
    assert result.code == 1
    assert "node 'product' (MatMul): shapes do not fit" in result.err
    assert "it takes net.onnx, which this was made from" in result.err
    given = cli("engine", "net.pruned.onnx", *SHAPES, "--baseline", "net.onnx")
    assert given.code == 1
    alone = cli("engine", "net.pruned.onnx", *SHAPES, "--json")
    assert alone.code == 0  # nothing to hold against it
    assert any("(MatMul): shapes do not fit" in note for note in alone.json["engine"]["notes"])


def test_what_was_refused_before_is_a_note(cli: Cli, rtx: Callable[[str], None]) -> None:
    rtx("False")
    result = cli(*CHAIN, "--json")
    assert result.code == 0, result.err
    (note,) = [note for note in result.json["engine"]["notes"] if "TensorRT-RTX" in note]
    assert "(MatMul)" in note
    assert "nor does it take the original" in note
    assert not result.json["engine"]["conformance"]["parses"]


def test_what_is_taken_needs_no_original(cli: Cli, rtx: Callable[[str], None]) -> None:
    rtx("'pruned' in path")
    result = cli(*CHAIN, "--json")
    assert result.code == 0, result.err
    assert result.json["engine"]["conformance"]["builds"]
