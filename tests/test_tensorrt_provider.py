"""ONNX Runtime's TensorRT provider: its options, and a fall-back that is never taken for success."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphprune.errors import EngineError, OptionError
from graphprune.tensorrt.plan import BuildPlan, Precision
from graphprune.tensorrt.probe import PROVIDER
from graphprune.tensorrt.profiles import Profile
from graphprune.tensorrt.provider import (
    CPU,
    CUDA,
    SessionRun,
    provider_options,
    providers,
    providers_json,
    run_session,
    run_with_tensorrt,
)

STAND_INS = Path(__file__).parent / "stand_ins"
X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def plan(tmp_path: Path) -> BuildPlan:
    """Of a real network: y = relu(x w)."""
    weight = np.array([[1, -1], [2, 0], [0, 3], [-1, 1]], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="fc"),
            helper.make_node("Relu", ["a"], ["y/0"], name="act"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 4))],
        [helper.make_tensor_value_info("y/0", TensorProto.FLOAT, ("n", 2))],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "net.onnx")
    return BuildPlan(
        model=str(tmp_path / "net.onnx"),
        engine=str(tmp_path / "net.plan"),
        major=10,
        precision=Precision(("FLOAT16", "FLOAT")),
        profiles=(Profile("x", (1, 4), (2, 4), (8, 4)), Profile("scale", (), (), ())),
        workspace=64,
        timing_cache="times/net.timing",
    )


def test_options(plan: BuildPlan) -> None:
    options = provider_options(plan)
    assert options == {
        "trt_sparsity_enable": "1",
        "trt_fp16_enable": "1",
        "trt_int8_enable": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(Path(plan.engine).parent),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": "times",
        "trt_detailed_build_log": "1",
        "trt_max_workspace_size": str(64 << 20),
        "trt_profile_min_shapes": "x:1x4",
        "trt_profile_opt_shapes": "x:2x4",
        "trt_profile_max_shapes": "x:8x4",
    }
    names = [name for name, _ in providers(plan)]
    assert names == [PROVIDER, CUDA, CPU]
    assert json.loads(providers_json(plan)) == [[PROVIDER, options], [CUDA, {}], [CPU, {}]]


def test_options_of_other_plans(plan: BuildPlan) -> None:
    plan = dataclasses.replace(
        plan,
        engine="net.plan",
        sparsity=False,
        precision=Precision(("BFLOAT16",), quantized=True),
        profiles=(),
        timing_cache=None,
        workspace=None,
    )
    options = provider_options(plan)
    assert options["trt_sparsity_enable"] == options["trt_fp16_enable"] == "0"
    assert options["trt_int8_enable"] == options["trt_bf16_enable"] == "1"
    assert options["trt_engine_cache_path"] == "."
    assert not [
        name for name in options if "shapes" in name or "workspace" in name or name.endswith("cache_path")
    ][1:]


@pytest.mark.parametrize("name", ["a:0", "a,b"])
def test_names_that_the_provider_cannot_be_given(plan: BuildPlan, name: str) -> None:
    with pytest.raises(OptionError, match="rename the input"):
        provider_options(dataclasses.replace(plan, profiles=(Profile(name, (1,), (1,), (1,)),)))


def test_a_session_of_the_installed_runtime(plan: BuildPlan) -> None:
    run = run_session(plan.model, {"x": X}, [(CPU, {})], runs=2)
    weight = onnx.numpy_helper.to_array(onnx.load(plan.model).graph.initializer[0])
    np.testing.assert_allclose(run.outputs["y/0"], np.maximum(X @ weight, 0), rtol=1e-6)
    assert run.providers == (CPU,)
    assert run.placed[CPU] >= 1
    assert len(run.seconds) == 2


def test_a_run_is_of_tensorrt_or_an_error(plan: BuildPlan) -> None:
    """Where there is no GPU, ONNX Runtime gives a session on the CPU and a warning."""
    said, placed = "", 0
    try:
        placed = run_with_tensorrt(plan, {"x": X}).placed[PROVIDER]
    except EngineError as error:
        said = str(error)
    assert placed or any(text in said for text in ("fell back to", "took no node", "fails making a session"))


def run(plan: BuildPlan, folder: Path, **asked: Any) -> SessionRun:
    environment = {
        "PYTHONPATH": str(STAND_INS / "runtime"),
        "STAND_IN": json.dumps(asked),
        "STAND_IN_CALLS": str(folder / "calls"),
    }
    return run_with_tensorrt(plan, {"x": X}, environment=environment)


def test_a_session_with_tensorrt(plan: BuildPlan, tmp_path: Path) -> None:
    log = [
        "2026-01-01 [I:onnxruntime:, tensorrt_execution_provider.h:88 log] [2026-01-01 INFO] (Sparsity) Found 1"
        " layer(s) eligible to use sparse tactics: fc",
        "2026-01-01 [I:onnxruntime:, tensorrt_execution_provider.h:88 log] [2026-01-01 INFO] (Sparsity) Chose 1"
        " layer(s) using sparse tactics: fc",
    ]
    result = run(plan, tmp_path, log=log, placed=[PROVIDER, CPU])
    np.testing.assert_array_equal(result.outputs["y/0"], X * 2)
    assert result.providers == (PROVIDER, CPU)
    assert result.placed == {PROVIDER: 1, CPU: 1}
    assert result.log.last is not None
    assert result.log.last.chosen is not None
    assert result.log.last.chosen.names == ("fc",)
    (call,) = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert call == ["session", plan.model, [PROVIDER, CUDA, CPU], [provider_options(plan), {}, {}]]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"providers": [CPU], "placed": [CPU]},
            "could not load TensorrtExecutionProvider and fell back to CPU",
        ),
        ({"providers": [CUDA, CPU], "placed": [CUDA]}, "fell back to CUDAExecutionProvider"),
        ({"placed": [CPU, CPU]}, "it took no node: all ran on CPUExecutionProvider"),
        ({"placed": []}, "it took no node"),
        (
            {"refuse": "Unknown provider option: trt_sparsity_enable"},
            "fails making a session: RuntimeError: Unknown",
        ),
    ],
)
def test_a_fall_back_is_never_success(
    plan: BuildPlan, tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(EngineError) as caught:
        run(plan, tmp_path, **asked)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_runtime_that_is_missing(plan: BuildPlan) -> None:
    with pytest.raises(EngineError, match=r"not installed|No module"):
        run_with_tensorrt(plan, {"x": X}, environment={"PYTHONPATH": str(STAND_INS / "empty")})
