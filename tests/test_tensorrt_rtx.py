"""NVIDIA's parser and compiler take what graphprune writes, and refuse a network whose channels do not fit.

TensorRT-RTX needs no GPU for this. It tells that ops, types and shapes fit, not that numbers are right.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import graphprune
from graphprune.errors import EngineError
from graphprune.tensorrt.build import build_engine
from graphprune.tensorrt.handover import EngineSettings, hand_over
from graphprune.tensorrt.plan import make_plan
from graphprune.tensorrt.profiles import Profile, parse_profile
from graphprune.tensorrt.rtx import Candidate, Conformance, check_network, check_networks

from .patterns import FAMILIES, Built, Pattern

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed (pip install graphprune[rtx])",
)

# What TensorRT-RTX does not take of the patterns themselves, and what it says of it.
UNSUPPORTED = {
    "roi_align": "ROIAlign plugin was not found",
    "non_max_suppression_head": "no runners that implement it",
    "lrn_over_all_channels": "Invalid Node",
    "lrn_over_all_channels_residual": "Invalid Node",
    "loop_with_scan_output": "Node input was not registered",
    "qdq_per_axis_conv": "Non-zero zero point is not supported",
    "qdq_matmul": "Non-zero zero point is not supported",
    "qdq_per_axis_activation": "Non-zero zero point is not supported",
    "ms_attention": "must have the same number of dimensions",
    "ms_attention_with_narrow_values": "must have the same number of dimensions",
    "ms_multi_head_attention_with_bias": "bias input is not supported",
    "ms_group_query_attention": "past_key is required",
    "ms_skip_layer_normalization": "(FastGelu): creator",
    "ms_skip_layer_normalization_residual": "(FastGelu): creator",
    "ms_skip_simplified_layer_normalization": "(QuickGelu): creator",
    "ms_skip_simplified_layer_normalization_residual": "(QuickGelu): creator",
    "ms_fused_matmul": "(FusedMatMul): creator",
    "ms_fused_conv": "(FusedConv): creator",
    "ms_gelus": "(FastGelu): creator",
    "ms_rotary_embedding": "num_heads attribute is required",
    "ms_embed_layer_normalization": "(EmbedLayerNormalization): creator",
    "ms_embed_layer_normalization_residual": "(EmbedLayerNormalization): creator",
    "attention_on_heads": "not supported by a dedicated kernel",
    "attention_on_rows": "not supported by a dedicated kernel",
    "rotary_embedding_op": "not supported by a dedicated kernel",
    "rotary_embedding_op_interleaved": "not supported by a dedicated kernel",
}


@functools.cache
def built(pattern: Pattern) -> Built:
    return pattern.build()


@functools.cache
def pruned(pattern: Pattern) -> onnx.ModelProto:
    """Not verified: tests/test_patterns.py does that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = graphprune.prune(
            built(pattern).model,
            channels=0.5,
            round_to=1,
            residual=pattern.residual,
            input_shapes=pattern.input_shapes,
            verify=False,
        )
    assert isinstance(model, onnx.ModelProto)
    return model


def shapes(pattern: Pattern) -> list[Profile]:
    """Profiles for inputs with dynamic dimensions: the sizes of the pattern's own feeds."""
    case = built(pattern)
    stored = {tensor.name for tensor in case.model.graph.initializer}
    return [
        Profile(item.name, *[case.feeds[item.name].shape] * 3)
        for item in case.model.graph.input
        if item.name not in stored and any(not size.dim_value for size in item.type.tensor_type.shape.dim)
    ]


def candidate(model: onnx.ModelProto, path: Path, profiles: list[Profile]) -> Candidate:
    onnx.save(model, path)
    return Candidate(path, profiles)


@needs_rtx
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.rpartition(".")[2])
def test_pruned_networks_parse_and_build(family: ModuleType, tmp_path: Path) -> None:
    patterns: list[Pattern] = family.PATTERNS
    results = check_networks(
        [
            candidate(pruned(pattern), tmp_path / f"{pattern.name}.onnx", shapes(pattern))
            for pattern in patterns
        ]
    )
    problems = []
    for pattern, result in zip(patterns, results, strict=True):
        expected = UNSUPPORTED.get(pattern.name)
        if expected is None and not (result.parses and result.builds and result.size):
            problems.append(f"{pattern.name}: {result.reason}")
        if expected is not None and expected not in (result.reason or ""):
            problems.append(f"{pattern.name}: {result.reason}, where {expected!r} was to be said")
    assert not problems


@needs_rtx
def test_what_is_refused_was_refused_before_pruning(tmp_path: Path) -> None:
    """The table of what TensorRT-RTX does not take is about the patterns, not about what pruning made of them."""
    patterns = [pattern for family in FAMILIES for pattern in family.PATTERNS if pattern.name in UNSUPPORTED]
    assert {pattern.name for pattern in patterns} == set(UNSUPPORTED)
    results = check_networks(
        [
            candidate(built(pattern).model, tmp_path / f"{pattern.name}.onnx", shapes(pattern))
            for pattern in patterns
        ]
    )
    for pattern, result in zip(patterns, results, strict=True):
        assert not result.builds
        assert UNSUPPORTED[pattern.name] in (result.reason or "")


def miscoupled(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The network with one input channel too few in one weight, for each weight whose op checks that."""
    axes = {"Conv": 1, "ConvTranspose": 0}
    stored = {tensor.name: index for index, tensor in enumerate(model.graph.initializer)}
    for node in model.graph.node:
        if node.op_type not in {*axes, "MatMul", "Gemm"} or node.input[1] not in stored:
            continue
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        index = stored[node.input[1]]
        weight = numpy_helper.to_array(model.graph.initializer[index])
        if node.op_type == "Gemm":
            axis = 1 if attributes.get("transB", 0) else 0
        else:
            axis = axes.get(node.op_type, weight.ndim - 2)
        if weight.shape[axis] < 2:
            continue
        damaged = onnx.ModelProto()
        damaged.CopyFrom(model)
        del damaged.graph.value_info[:]
        cut = np.delete(weight, -1, axis)
        damaged.graph.initializer[index].CopyFrom(numpy_helper.from_array(cut, node.input[1]))
        yield f"{node.name}:{node.input[1]}", damaged


@needs_rtx
def test_a_miscoupled_network_is_refused(tmp_path: Path) -> None:
    """One input channel too few in any one weight: the parser says no."""
    cases: list[tuple[str, Candidate]] = []
    for family in FAMILIES:
        for pattern in family.PATTERNS:
            if pattern.name in UNSUPPORTED:
                continue
            for name, model in miscoupled(pruned(pattern)):
                path = tmp_path / f"{len(cases)}.onnx"
                cases.append((f"{pattern.name} {name}", candidate(model, path, shapes(pattern))))
    results = check_networks([entry for _, entry in cases], build=False)
    assert len(cases) > 200
    taken = [name for (name, _), result in zip(cases, results, strict=True) if result.parses]
    assert not taken
    assert all(result.errors and result.reason for result in results)


@needs_rtx
def test_a_network_that_was_taken_and_is_miscoupled_is_an_error(tmp_path: Path) -> None:
    """The chain knows the original: what it made of it is to be taken where that is."""
    pattern = next(pattern for pattern in FAMILIES[0].PATTERNS if pattern.name not in UNSUPPORTED)
    onnx.save(built(pattern).model, tmp_path / "net.onnx")
    onnx.save(pruned(pattern), tmp_path / "net.pruned.onnx")
    _, damaged = next(miscoupled(pruned(pattern)))
    onnx.save(damaged, tmp_path / "net.damaged.onnx")
    settings = EngineSettings(
        tmp_path / "net.plan", shapes=tuple(shapes(pattern)), original=tmp_path / "net.onnx"
    )
    report = hand_over(tmp_path / "net.pruned.onnx", settings)
    assert report.built is not None or (report.conformance is not None and report.conformance.builds)
    with pytest.raises(EngineError, match=r"net.damaged.onnx.*which this was made from|does not take"):
        hand_over(tmp_path / "net.damaged.onnx", settings)


@needs_rtx
def test_dynamic_inputs_need_shapes(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 2), np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ("n", 4))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ("n", 2))],
        [weight],
    )
    path = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph, ir_version=10), path)
    without = check_network(path)
    assert (without.parses, without.builds) == (True, False)
    assert "no optimization profile" in (without.reason or "")
    given = check_network(path, shapes=[Profile("x", (1, 4), (2, 4), (8, 4))])
    assert (given.parses, given.builds, given.reason) == (True, True, None)


@needs_rtx
def test_plans_are_built_by_nvidias_own_api(tmp_path: Path) -> None:
    """The worker that drives TensorRT drives TensorRT-RTX, whose API is that of TensorRT 11: profile, cache, flags."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    weight[1::2] = 0
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, ("n", 64))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ("n", 64))],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph, ir_version=10), path)
    plan = make_plan(
        ir.load(path), path, tmp_path / "net.plan", shapes=[parse_profile("x:1x64,8x64,32x64")], workspace=256
    )
    for _ in range(2):
        built = build_engine(plan, package="tensorrt_rtx")
        assert built.flags == ("STRONGLY_TYPED", "SPARSE_WEIGHTS")
        assert built.engine.stat().st_size > weight.nbytes
        assert plan.timing_cache is not None
        assert Path(plan.timing_cache).exists()
        # without a device there is nothing to inspect with, which is said
        assert built.layers is not None or "could not be inspected" in built.notes[-1]
    refused = dataclasses.replace(plan, profiles=())
    with pytest.raises(EngineError, match="no optimization profile"):
        build_engine(refused, package="tensorrt_rtx")


# without it

STAND_INS = Path(__file__).parent / "stand_ins"


def stand_in(folder: Path, behaviour: str) -> dict[str, str]:
    """An environment in which tensorrt_rtx parses a file by executing its contents as Python."""
    (folder / "tensorrt_rtx.py").write_text(
        "import os, signal, time\n"
        f"{behaviour}\n"
        "class ILogger: pass\n"
        "class Builder:\n"
        "    def __init__(self, logger): pass\n"
        "    def create_network(self, flags): pass\n"
        "    def create_builder_config(self): pass\n"
        "    def build_serialized_network(self, network, config): return b'engine'\n"
        "class OnnxParser:\n"
        "    num_errors = 0\n"
        "    def __init__(self, network, logger): pass\n"
        "    def parse_from_file(self, path): exec(open(path).read()); return True\n"
    )
    return {"PYTHONPATH": str(folder)}


def test_a_crash_is_held_against_the_network_that_causes_it(tmp_path: Path) -> None:
    texts = ["", "os.kill(os.getpid(), signal.SIGSEGV)", "", "time.sleep(600)", "raise ValueError('bad')", ""]
    candidates = []
    for index, text in enumerate(texts):
        path = tmp_path / f"{index}.onnx"
        path.write_text(text)
        candidates.append(Candidate(path))
    results = check_networks(candidates, limit=4, environment=stand_in(tmp_path, ""))
    assert [result.builds for result in results] == [True, False, True, False, False, True]
    assert [result.parses for result in results] == [True, False, True, False, False, True]
    assert "SIGSEGV, parsing it" in (results[1].reason or "")
    assert "did not end within 4 s, parsing it" in (results[3].reason or "")
    assert "ValueError: bad" in (results[4].reason or "")
    assert all(isinstance(result, Conformance) and result.seconds >= 0 for result in results)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
        ("raise ImportError('no libcudart')", "no libcudart"),
        ("os._exit(0)", "ended of itself"),
    ],
)
def test_rtx_that_does_not_start(tmp_path: Path, behaviour: str, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        check_network(tmp_path / "net.onnx", environment=stand_in(tmp_path, behaviour))


def test_rtx_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"install graphprune\[rtx\]"):
        check_network(tmp_path / "net.onnx", environment={"PYTHONPATH": str(STAND_INS / "empty")})


def between_layers(op: str) -> onnx.ModelProto:
    """A convolution, an op that no cast lowers, and another convolution."""
    nodes, constants = _DENIED_OPS[op]
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((16, 16, 3, 3)) / 12, "w2": rng.standard_normal((16, 16, 1, 1)) / 4}
    arrays = {name: array.astype(np.float32) for name, array in weights.items()} | constants
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "w1"], ["a"], "first", pads=[1, 1, 1, 1]),
            *nodes,
            onnx.helper.make_node("Conv", ["b", "w2"], ["z"], "second"),
        ],
        op,
        [onnx.helper.make_tensor_value_info("x", 1, (1, 16, 8, 8))],
        [onnx.helper.make_tensor_value_info("z", 1, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


_node = onnx.helper.make_node
_last = np.array([3])
#: Ops of the deny-list that TensorRT knows, as they may stand between two layers.
_DENIED_OPS: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "CumSum": ([_node("CumSum", ["a", "axis"], ["b"], "denied")], {"axis": np.array(3)}),
    "LRN": ([_node("LRN", ["a"], ["b"], "denied", size=3)], {}),
    "LpNormalization": ([_node("LpNormalization", ["a"], ["b"], "denied", axis=1, p=2)], {}),
    "ReduceL2": ([_node("ReduceL2", ["a", "axes"], ["b"], "denied")], {"axes": _last}),
    "ReduceSumSquare": ([_node("ReduceSumSquare", ["a", "axes"], ["b"], "denied")], {"axes": _last}),
    "ReduceLogSumExp": ([_node("ReduceLogSumExp", ["a", "axes"], ["b"], "denied")], {"axes": _last}),
    "ReduceProd": ([_node("ReduceProd", ["a", "axes"], ["b"], "denied")], {"axes": _last}),
    "Sin": ([_node("Sin", ["a"], ["b"], "denied")], {}),
    "Cos": ([_node("Cos", ["a"], ["b"], "denied")], {}),
    "Tan": ([_node("Tan", ["a"], ["b"], "denied")], {}),
}


@needs_rtx
def test_networks_with_ops_that_stay_float32_parse_and_build(tmp_path: Path) -> None:
    """A 16-bit network around an op of the deny-list is strongly typed and consistent."""
    from graphprune.passes.cast_precision import cast_precision

    candidates = []
    for op in _DENIED_OPS:
        model = ir.from_proto(between_layers(op))
        report = cast_precision(model, "fp16", verify=False)
        assert [kept.node for kept in report.kept] == ["denied"], op
        assert report.contractions == (2, 0)
        path = tmp_path / f"{op}.onnx"
        ir.save(model, path)
        candidates.append(Candidate(path))
    for op, result in zip(_DENIED_OPS, check_networks(candidates), strict=True):
        assert result.parses, (op, result.reason)
        assert result.builds, (op, result.reason)
