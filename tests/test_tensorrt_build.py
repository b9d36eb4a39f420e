"""Probing and building against a stand-in for TensorRT (tests/stand_ins): every way in which a process can end."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper, save

from graphprune.errors import EngineError, ModelError
from graphprune.tensorrt.build import Built, build_engine
from graphprune.tensorrt.foreign import ask
from graphprune.tensorrt.plan import BuildPlan, Precision
from graphprune.tensorrt.probe import Device, Found, State, probe
from graphprune.tensorrt.profiles import Profile

STAND_INS = Path(__file__).parent / "stand_ins"
# Builder and network flags by version: python/src/infer/pyCore.cpp and pyGraph.cpp of NVIDIA/TensorRT.
VERSIONS: dict[int, dict[str, Any]] = {
    8: {
        "version": "8.6.1",
        "builder_flags": ["FP16", "INT8", "TF32", "SPARSE_WEIGHTS", "OBEY_PRECISION_CONSTRAINTS", "FP8"],
        "network_flags": ["EXPLICIT_BATCH", "EXPLICIT_PRECISION"],
    },
    10: {
        "version": "10.16.0",
        "builder_flags": ["FP16", "BF16", "INT8", "TF32", "SPARSE_WEIGHTS", "OBEY_PRECISION_CONSTRAINTS"],
        "network_flags": ["EXPLICIT_BATCH", "STRONGLY_TYPED"],
    },
    11: {
        "version": "11.1.0",
        "builder_flags": ["TF32", "SPARSE_WEIGHTS", "STRICT_NANS"],
        "network_flags": ["STRONGLY_TYPED"],
    },
}


class StandIn:
    """An environment with the stand-in in it, and what was done with it."""

    def __init__(self, folder: Path) -> None:
        self.calls_file = folder / "calls"

    def environment(self, **asked: Any) -> dict[str, str]:
        return {
            "PYTHONPATH": str(STAND_INS),
            "STAND_IN": json.dumps(asked),
            "STAND_IN_CALLS": str(self.calls_file),
        }

    @property
    def calls(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def arguments(self, name: str) -> list[Any]:
        """The arguments of all calls of that name."""
        return [call[1] if len(call) == 2 else call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


# probing


@pytest.mark.parametrize("major", VERSIONS)
def test_flags_are_looked_for(stand_in: StandIn, major: int) -> None:
    found = probe("tensorrt", environment=stand_in.environment(**VERSIONS[major]))
    assert found.works
    assert found.version == VERSIONS[major]["version"]
    assert set(found.builder_flags) == set(VERSIONS[major]["builder_flags"])
    assert set(found.network_flags) == set(VERSIONS[major]["network_flags"])
    assert "OnnxParser.parse_from_file" in found.attributes
    assert "ParserError.node_name" not in found.attributes  # only its instances have it
    assert json.loads(json.dumps(found.to_dict()))["state"] == "works"


@pytest.mark.parametrize(
    ("asked", "state", "said"),
    [
        ({"import": "crash"}, State.CRASHES, "was ended by SIGSEGV when imported"),
        ({"import": "status"}, State.CRASHES, "ended with status 7 when imported"),
        ({"import": "quit"}, State.CRASHES, "ended of itself when imported"),
        ({"import": "raise"}, State.BROKEN, "fails when imported: RuntimeError: the driver is too old"),
        ({"builder": "crash"}, State.CRASHES, "was ended by SIGSEGV when a builder is made"),
        ({"builder": "raise"}, State.BROKEN, "fails when a builder is made: RuntimeError"),
    ],
)
def test_a_package_that_fails(stand_in: StandIn, asked: dict[str, str], state: State, said: str) -> None:
    found = probe("tensorrt", environment=stand_in.environment(**asked))
    assert found.state is state
    assert found.reason is not None
    assert said in found.reason
    assert "\n" not in found.reason
    # what was seen before the fall is kept
    assert (found.version is not None) == ("builder" in asked)


def test_a_package_that_hangs_is_stopped(stand_in: StandIn) -> None:
    start = time.monotonic()
    found = probe("tensorrt", limit=2, environment=stand_in.environment(**{"import": "hang"}))
    assert found.state is State.HANGS
    assert "did not end within 2 s when imported" in (found.reason or "")
    assert time.monotonic() - start < 30


def test_a_package_that_prints_garbage(stand_in: StandIn) -> None:
    found = probe("tensorrt", environment=stand_in.environment(**{"import": "garbage"}))
    assert found.works
    assert found.version == "10.16.0"


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx", "onnxruntime"])
def test_a_package_that_is_missing(name: str) -> None:
    found = probe(name, environment={"PYTHONPATH": str(STAND_INS / "empty")})
    assert found.state is State.MISSING
    assert "is not installed" in (found.reason or "")


def test_onnxruntime_lists_its_providers() -> None:
    found = probe("onnxruntime")
    assert found.works
    assert "CPUExecutionProvider" in found.providers


def test_the_driver_is_asked_for_devices() -> None:
    found = probe("device")
    assert found.state in {State.WORKS, State.MISSING}
    assert bool(found.devices) == found.works
    assert all(device.name and device.capability > (0, 0) for device in found.devices)


def test_sparse_tensor_cores_by_capability() -> None:
    assert [Device("", capability).sparse for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 1))] == [
        False, True, True, True, True,
    ]  # fmt: skip
    assert not Found("device", State.MISSING).works


def test_nothing_of_the_working_directory_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise SystemError('of the working directory')")
    monkeypatch.chdir(tmp_path)
    found = probe("tensorrt", environment={"PYTHONPATH": str(STAND_INS / "empty")})
    assert found.state is State.MISSING


def test_grandchildren_end_with_the_worker(stand_in: StandIn, tmp_path: Path) -> None:
    """A process that the package starts holds the output open and would outlive it."""
    package = tmp_path / "tensorrt.py"
    package.write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    answer = ask("probe", {"package": "tensorrt"}, 3, environment={"PYTHONPATH": str(tmp_path)})
    assert answer.ended == "time"
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the grandchild lives on")


# building


@pytest.fixture
def plan(tmp_path: Path) -> BuildPlan:
    """A plan for a network of three nodes, which the stand-in does not read."""
    weight = helper.make_tensor("w", TensorProto.FLOAT16, (4, 4), [1.0] * 16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="fc1"),
        helper.make_node("Relu", ["a"], ["b"], name="act"),
        helper.make_node("MatMul", ["b", "w"], ["y"], name="fc2"),
    ]
    item, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ("n", 4)) for name in ("x", "y"))
    save(helper.make_model(helper.make_graph(nodes, "g", [item], [result], [weight])), tmp_path / "net.onnx")
    return BuildPlan(
        model=str(tmp_path / "net.onnx"),
        engine=str(tmp_path / "net.plan"),
        major=10,
        precision=Precision(("FLOAT16",)),
        profiles=(Profile("x", (1, 4), (2, 4), (3, 4)),),
        workspace=64,
        timing_cache=str(tmp_path / "times"),
        layers=str(tmp_path / "layers.json"),
    )


MESSAGES = [
    ["INFO", "Total Activation Memory: 7864832"],
    ["VERBOSE", "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: fc1, fc2"],
    ["VERBOSE", "(Sparsity) Chose 1 layer(s) using sparse tactics: fc2"],
]
LAYERS = json.dumps({"Layers": [{"Name": "fc2", "TacticName": "sm80_xmma_sparse_gemm_f16f16"}]})


def build(stand_in: StandIn, plan: BuildPlan, limit: float = 60, **asked: Any) -> Built:
    asked = {"messages": MESSAGES, "layers": LAYERS, **asked}
    return build_engine(plan, limit=limit, environment=stand_in.environment(**asked))


@pytest.mark.parametrize(
    ("major", "network_flags", "builder_flags"),
    [
        (8, ["EXPLICIT_BATCH"], ["SPARSE_WEIGHTS", "FP16"]),
        (10, ["EXPLICIT_BATCH", "STRONGLY_TYPED"], ["SPARSE_WEIGHTS"]),
        (11, ["STRONGLY_TYPED"], ["SPARSE_WEIGHTS"]),
    ],
)
def test_build(
    stand_in: StandIn, plan: BuildPlan, major: int, network_flags: list[str], builder_flags: list[str]
) -> None:
    built = build(stand_in, dataclasses.replace(plan, major=major), **VERSIONS[major])
    assert stand_in.arguments("create_network") == [network_flags]
    assert stand_in.arguments("set_flag") == builder_flags
    assert stand_in.arguments("set_memory_pool_limit") == [["WORKSPACE", 64 << 20]]
    assert stand_in.arguments("set_shape") == [["x", [1, 4], [2, 4], [3, 4]]]
    assert stand_in.arguments("build") == ["DETAILED"]
    assert Path(plan.engine).read_bytes() == b"an engine"
    assert Path(plan.timing_cache or "").read_bytes() == b"+times"
    assert Path(plan.layers or "").read_text() == LAYERS
    assert (built.version, built.notes) == (VERSIONS[major]["version"], ())
    assert list(built.flags) == network_flags + builder_flags
    assert built.log.last is not None
    assert built.log.last.chosen is not None
    assert built.log.last.chosen.names == ("fc2",)
    assert "] [TRT] [V] (Sparsity) Found 2" in built.log_path.read_text()
    assert built.layers is not None
    assert [layer.name for layer in built.layers.sparse] == ["fc2"]
    assert json.dumps(built.to_dict())


def test_quantized_and_dense_builds(stand_in: StandIn, plan: BuildPlan) -> None:
    quantized = dataclasses.replace(plan, major=8, precision=Precision(("FLOAT",), True), sparsity=False)
    build(stand_in, quantized, **VERSIONS[8])
    assert stand_in.arguments("set_flag") == ["INT8"]


def test_flags_that_are_not_there_are_said(stand_in: StandIn, plan: BuildPlan) -> None:
    built = build(stand_in, plan, **(VERSIONS[8] | {"builder_flags": ["FP16"]}))
    assert built.notes == (
        "planned for TensorRT 10, built by 8.6.1",
        "this TensorRT has no builder flag SPARSE_WEIGHTS",
    )


def test_timing_cache_is_used_again(stand_in: StandIn, plan: BuildPlan) -> None:
    build(stand_in, plan)
    build(stand_in, plan)
    assert stand_in.arguments("create_timing_cache") == ["", "+times"]
    assert Path(plan.timing_cache or "").read_bytes() == b"+times+times"


def test_timing_cache_of_another_device(stand_in: StandIn, plan: BuildPlan) -> None:
    Path(plan.timing_cache or "").write_bytes(b"foreign")
    built = build(stand_in, plan, cache="mismatch")
    assert any("timing cache" in note for note in built.notes)
    assert Path(plan.timing_cache or "").read_bytes() == b"+times"


@pytest.mark.parametrize("named", [True, False])
def test_parser_errors_name_the_node(stand_in: StandIn, plan: BuildPlan, named: bool) -> None:
    """10 and 11 give the name; 8.6 gives an index, and the name is looked up in the file."""
    errors = [[2, "fc2", "MatMul", "shapes do\nnot fit"], [1, "act", "Relu", "second"]]
    with pytest.raises(EngineError) as caught:
        build(stand_in, plan, parser_errors=errors, named_errors=named)
    operator = " (MatMul)" if named else ""
    assert f"TensorRT does not take node 'fc2'{operator}: shapes do not fit (and 1 more)" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"import": "crash"}, "TensorRT was ended by SIGSEGV, importing it"),
        ({"parse": "crash"}, "TensorRT was ended by SIGSEGV, parsing the network"),
        ({"parse": "refused"}, "the parser does not say why"),
        ({"build": "crash"}, "TensorRT was ended by SIGSEGV, building the engine; the log is"),
        ({"build": "quit"}, "fails building the engine: the process ended of itself"),
        ({"build": "raise"}, "RuntimeError: the driver is too old"),
        (
            {"build": "nothing", "messages": [["ERROR", "Error Code 10: no implementation for fc1"]]},
            "builds nothing of it (Error Code 10: no implementation for fc1)",
        ),
        ({"profile": "refused"}, "refuses the optimisation profile"),
        ({"shape_tensors": True}, "input 'x' decide shapes"),
    ],
)
def test_a_build_that_fails_leaves_the_engine_before(
    stand_in: StandIn, plan: BuildPlan, asked: dict[str, Any], said: str
) -> None:
    Path(plan.engine).write_bytes(b"the engine before")
    with pytest.raises(EngineError) as caught:
        build(stand_in, plan, **asked)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Path(plan.engine).read_bytes() == b"the engine before"
    assert not Path(plan.timing_cache or "").exists()
    assert not [path for path in Path(plan.engine).parent.iterdir() if path.name.startswith(".net.plan.")]


def test_a_build_that_hangs_is_stopped(stand_in: StandIn, plan: BuildPlan) -> None:
    with pytest.raises(EngineError, match="did not end within 3 s, building the engine"):
        build(stand_in, plan, limit=3, build="hang")
    assert not Path(plan.engine).exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"runtime": "crash"}, "was ended by SIGSEGV"),
        ({"runtime": "raise"}, "RuntimeError"),
        ({"runtime": "refused"}, "cannot be loaded here"),
        ({"layers": "no JSON"}, "no JSON"),
    ],
)
def test_an_engine_that_cannot_be_inspected_is_kept(
    stand_in: StandIn, plan: BuildPlan, asked: dict[str, Any], said: str
) -> None:
    built = build(stand_in, plan, **asked)
    assert built.layers is None
    assert said in built.notes[-1]
    assert Path(plan.engine).read_bytes() == b"an engine"
    assert built.log.last is not None


def test_tensorrt_that_is_missing(plan: BuildPlan) -> None:
    with pytest.raises(EngineError, match="is not installed"):
        build_engine(plan, environment={"PYTHONPATH": str(STAND_INS / "empty")})


def test_a_folder_that_is_missing(stand_in: StandIn, plan: BuildPlan, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be written"):
        build(stand_in, dataclasses.replace(plan, engine=str(tmp_path / "none" / "net.plan")))
    assert not stand_in.calls_file.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
