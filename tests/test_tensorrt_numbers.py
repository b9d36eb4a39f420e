"""What engines compute against ONNX Runtime: bounds that right engines keep and wrong ones do not; races."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.errors import EngineError, OptionError, VerificationError
from graphprune.graph.twin import build_twin
from graphprune.model import load
from graphprune.tensorrt import bench
from graphprune.tensorrt.bench import Contender, race
from graphprune.tensorrt.engines import EngineRun
from graphprune.tensorrt.numbers import Numbers, OutputDifference, Reference, Source, bounds
from graphprune.tensorrt.plan import BuildPlan, Precision, make_plan
from graphprune.tensorrt.profiles import Profile

Array = npt.NDArray[Any]
LAYERS, WIDTH = 8, 32
ROUND: dict[str, Callable[[Array], Array]] = {
    "FLOAT16": lambda x: x.astype(np.float16).astype(np.float64),
    "BFLOAT16": lambda x: x.astype(ir.DataType.BFLOAT16.numpy()).astype(np.float64),
}


def weights() -> list[Array]:
    generator = np.random.default_rng(1)
    return [generator.standard_normal((WIDTH, WIDTH)) * np.sqrt(2 / WIDTH) for _ in range(LAYERS)]


def perceptron(dtype: str = "FLOAT", head: str | None = None) -> onnx.ModelProto:
    """Eight layers; inputs and outputs in float32."""
    kind = getattr(TensorProto, dtype)
    nodes = [helper.make_node("Cast", ["x"], ["h0"], to=kind)]
    stored = []
    for index, weight in enumerate(weights()):
        stored.append(
            helper.make_tensor(
                f"w{index}", kind, weight.shape, weight.astype(helper.tensor_dtype_to_np_dtype(kind))
            )
        )
        nodes.append(helper.make_node("MatMul", [f"h{index}", f"w{index}"], [f"a{index}"], name=f"fc{index}"))
        nodes.append(helper.make_node("Relu", [f"a{index}"], [f"h{index + 1}"]))
    nodes.append(helper.make_node("Cast", [f"h{LAYERS}"], ["y"], to=TensorProto.FLOAT))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", WIDTH))]
    if head is not None:
        nodes.append(helper.make_node(head, ["y"], ["k"], axis=1))
        outputs.append(helper.make_tensor_value_info("k", TensorProto.INT64, ("n", 1)))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", WIDTH))], outputs, stored
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def reference(folder: Path, dtype: str, source: Source | None = None, head: str | None = None) -> Reference:
    path = folder / f"{dtype}.onnx"
    onnx.save(perceptron(dtype, head), path)
    model = load(path)
    plan = make_plan(
        model, path, folder / "net.plan", shapes=[Profile("x", (1, WIDTH), (4, WIDTH), (8, WIDTH))]
    )
    return Reference(model, plan, source or Source())


def forward(x: Array, each: Sequence[Array], rounded: Callable[[Array], Array]) -> Array:
    """In float64, every result rounded."""
    x = rounded(x.astype(np.float64))
    for weight in each:
        x = np.maximum(rounded(x @ rounded(weight)), 0)
    return x


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16"])
def test_a_right_engine_is_within_bounds_and_a_wrong_one_is_not(tmp_path: Path, dtype: str) -> None:
    """Oracle: float64 that rounds after every op; wrong is one weight whose two input channels are swapped."""
    case = reference(tmp_path, dtype)
    assert case.feeds["x"].shape == (4, WIDTH)
    right = case.compare({"y": forward(case.feeds["x"], weights(), ROUND[dtype])})
    assert right.worst is not None
    assert right.worst.difference <= (right.worst.bound or 0)
    right.check("net.plan")
    swapped = [weight.copy() for weight in weights()]
    swapped[3][[0, 1]] = swapped[3][[1, 0]]
    wrong = case.compare({"y": forward(case.feeds["x"], swapped, ROUND[dtype])})
    with pytest.raises(
        EngineError, match=r"net.plan: on random inputs, output 'y' differs .* is allowed in b?float16"
    ):
        wrong.check("net.plan")


def test_bfloat16_is_emulated_where_onnx_runtime_has_no_kernels(tmp_path: Path) -> None:
    case = reference(tmp_path, "BFLOAT16")
    expected = forward(case.feeds["x"], weights(), ROUND["BFLOAT16"])
    scale = np.abs(expected).max()
    assert np.abs(case.outputs["y"] - expected).max() / scale < 2.0**-7  # an ulp where a sum rounds otherwise
    exact = forward(case.feeds["x"], weights(), lambda x: x)
    assert np.abs(case.outputs["y"] - exact).max() / scale > 2.0**-10  # it did round


def test_bounds_grow_with_depth_and_stop_at_jumps() -> None:
    twin = build_twin(ir.from_proto(perceptron(head="ArgMax")), {"x": (2, WIDTH)})
    found = bounds(twin, 2.0**-11)
    assert found["k"] is None
    # eight products and eight Relu, and one for the input
    assert found["y"] == pytest.approx(4 * 2.0**-11 * np.sqrt(2 * LAYERS + 1))


def test_quantization_is_no_jump_for_int8() -> None:
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "s")
    zero = numpy_helper.from_array(np.array(0, np.int8), "z")
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
            helper.make_node("Floor", ["y"], ["f"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (4,))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (4,)) for name in "yf"],
        [scale, zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    found = bounds(build_twin(ir.from_proto(model)), 2.0**-7)
    assert found["y"] is not None
    assert found["f"] is None


def test_an_output_behind_a_jump_is_reported_and_not_judged(tmp_path: Path) -> None:
    case = reference(tmp_path, "FLOAT", head="ArgMax")
    numbers = case.compare({**case.outputs, "k": case.outputs["k"] + 1})
    numbers.check("net.plan")
    judged = {output.name: output.bound is not None for output in numbers.outputs}
    assert judged == {"y": True, "k": False}
    assert numbers.to_dict()["outputs"][1]["difference"] > 0


def test_outputs_that_are_not_numbers_are_wrong(tmp_path: Path) -> None:
    case = reference(tmp_path, "FLOAT")
    numbers = case.compare({"y": case.outputs["y"] * np.nan})
    assert numbers.to_dict()["outputs"][0]["difference"] is None
    with pytest.raises(EngineError, match=r"float32 \(TF32\)"):
        numbers.check("net.plan")
    with pytest.raises(EngineError, match="missing"):
        case.compare({})


def test_several_wrong_outputs_are_counted() -> None:
    wrong = tuple(OutputDifference(name, 1.0, 0.1) for name in "abc")
    with pytest.raises(EngineError, match=r"output 'a' \(and 2 more\)"):
        Numbers("random inputs", "float16", wrong).check("net.plan")
    assert Numbers("random inputs", "float16", ()).worst is None


def test_inputs_of_the_user(tmp_path: Path) -> None:
    rows = np.random.default_rng(3).standard_normal((16, WIDTH)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=rows)
    case = reference(tmp_path, "FLOAT", Source(tmp_path / "inputs.npz"))
    np.testing.assert_array_equal(case.feeds["x"], rows[:4])  # as many as the profile's usual batch
    assert case.compare(case.outputs).inputs.endswith("inputs.npz")
    np.savez(tmp_path / "other.npz", x=rows[:, :-1])
    with pytest.raises(OptionError, match="31"):
        reference(tmp_path, "FLOAT", Source(tmp_path / "other.npz"))


def test_inputs_that_cannot_be_made_up(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("StringNormalizer", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.STRING, (2,))],
        [helper.make_tensor_value_info("y", TensorProto.STRING, (2,))],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "s.onnx",
    )
    plan = BuildPlan(str(tmp_path / "s.onnx"), str(tmp_path / "s.plan"), 11, Precision(()))
    with pytest.raises(VerificationError, match="--calib"):
        Reference(load(tmp_path / "s.onnx"), plan, Source())


# -- races ----------------------------------------------------------------------------------------------------------


def test_a_race_builds_what_is_missing_and_compares_medians(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = BuildPlan("net.onnx", str(tmp_path / "net.plan"), 10, Precision(("FLOAT16",)))
    built: list[BuildPlan] = []
    asked: dict[str, Any] = {}

    def build(wanted: BuildPlan, *, limit: float) -> Any:
        built.append(wanted)
        Path(wanted.engine).write_bytes(b"an engine")
        return type("Built", (), {"engine": Path(wanted.engine)})

    def run(engines: list[Path], feeds: Any, **more: Any) -> list[EngineRun]:
        assert all(engine.exists() or engine == tmp_path / "net.plan" for engine in engines)
        asked.update(more, engines=engines)
        times = [(4.0, 4.1, 90.0), (2.0, 2.0, 2.1), (1.98, 1.97, 50.0)]
        return [EngineRun(str(e), {}, t, "10.0") for e, t in zip(engines, times, strict=True)]

    monkeypatch.setattr(bench, "build_engine", build)
    monkeypatch.setattr(bench, "run_engines", run)
    steps: list[str] = []
    results = race(
        [
            Contender("original", plan),
            Contender("dense", plan),
            Contender("engine", plan, tmp_path / "net.plan"),
        ],
        {},
        limit=5,
        step=steps.append,
    )
    assert [wanted.layers for wanted in built] == [None, None]
    assert not any(Path(wanted.engine).exists() for wanted in built)  # gone afterwards
    assert asked["engines"][2] == tmp_path / "net.plan"
    assert asked["rounds"] > 1
    assert steps == ["building: original", "building: dense", "timing"]
    assert [timed.milliseconds for timed in results] == [4.1, 2.0, 1.98]
    assert [str(timed.gain) for timed in results] == ["None", "2.05 times as fast", "2.07 times as fast"]
    assert str(results[2].over_last) == "no difference (below 3%)"
    assert results[2].to_dict()["against_previous"] == "no difference (below 3%)"
