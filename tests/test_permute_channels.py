"""Channel permutations on whole models: found on the readers, applied to everything coupled, verified."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphprune
from graphprune.model import as_ir, copy, save, to_proto
from graphprune.passes import permute_channels as module
from graphprune.passes.permute_channels import PermuteChannelsPass, permute_channels
from graphprune.pipeline import analyze_ir
from graphprune.sparsity.exchange import Exchange
from graphprune.sparsity.pattern import NM
from graphprune.sparsity.permutation import (
    Reading,
    apply_orders,
    find_orders,
    find_readings,
    find_stripes,
)
from tests.laws.single import run

MODELS = Path(__file__).parent.parent / "models"
TWO_FOUR = NM(2, 4)
TOLERANCE = 1e-5

Array = npt.NDArray[Any]


def model_of(
    nodes: list[onnx.NodeProto],
    x: list[int],
    output: str,
    constants: dict[str, Array],
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_empty_tensor_value_info(output)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid("own", 1)] if functions else [])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions or [])
    return onnx.shape_inference.infer_shapes(model)


def normal(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def kept(weight: Array, axis: int, pattern: NM = TWO_FOUR) -> float:
    """What an N:M mask along an axis keeps, by sorting every group; a tail is passed over."""
    rows = np.abs(np.moveaxis(weight.astype(np.float64), axis, -1))
    groups = rows[..., : rows.shape[-1] // pattern.m * pattern.m].reshape(-1, pattern.m)
    return float(np.sort(groups, axis=1)[:, pattern.m - pattern.n :].sum())


def array_of(model: ir.Model, name: str) -> Array:
    stored = model.graph.initializers[name].const_value
    assert stored is not None
    return stored.numpy()


def same(model: onnx.ModelProto, changed: ir.Model, shape: list[int]) -> bool:
    feeds = {"x": normal(*shape, seed=9)}
    one, other = run(model, feeds), run(to_proto(changed), feeds)
    return all(np.abs(one[n] - other[n]).max() <= TOLERANCE * np.abs(one[n]).max() for n in one)


def chain(channels: int = 32) -> tuple[onnx.ModelProto, list[int]]:
    """Two convolutions with a BatchNorm, and a Gemm behind a flattened map of 3 x 3."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"]),
        helper.make_node("BatchNormalization", ["a", "s", "b", "m", "v"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["c"]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["y"], transB=1),
    ]
    constants = {
        "w1": normal(channels, 3, 1, 1),
        "b1": normal(channels),
        "s": normal(channels, seed=1),
        "b": normal(channels, seed=2),
        "m": normal(channels, seed=3),
        "v": np.abs(normal(channels, seed=4)) + 1,
        "w2": normal(16, channels, 3, 3),
        "w3": normal(5, 16 * 9),
    }
    return model_of(nodes, [2, 3, 5, 5], "y", constants), [2, 3, 5, 5]


def permuted(
    proto: onnx.ModelProto, pattern: NM = TWO_FOUR, **options: Any
) -> tuple[ir.Model, module.PermutationReport]:
    model = copy(as_ir(proto)[0])
    report = permute_channels(model, pattern, **({"seconds": None, "sweeps": 5} | options))
    return model, report


# -- what is found and kept -----------------------------------------------------------------------------------------


def test_reported_magnitude_is_what_the_stored_weight_keeps() -> None:
    proto, shape = chain()
    before = copy(as_ir(proto)[0])
    model, report = permuted(proto)
    (only,) = report.classes
    assert only.channels == 32
    assert only.weights == ("w2",)
    assert only.unpermuted == pytest.approx(kept(array_of(before, "w2"), 1))
    assert only.permuted == pytest.approx(kept(array_of(model, "w2"), 1))
    assert only.total == pytest.approx(np.abs(array_of(before, "w2")).sum())
    flat = np.sort(np.abs(array_of(before, "w2")).ravel())
    assert only.bound == pytest.approx(flat[flat.size // 2 :].sum(), rel=1e-5)
    assert only.unpermuted < only.permuted < only.bound
    assert 0 < only.recovered < 1
    assert report.unpermuted < report.permuted < report.bound < 1
    assert same(proto, model, shape)


def test_everything_coupled_moves_and_nothing_else() -> None:
    proto, _ = chain()
    before = copy(as_ir(proto)[0])
    model, _ = permuted(proto)
    order = [
        int(np.flatnonzero((array_of(before, "b1") == value).ravel())[0]) for value in array_of(model, "b1")
    ]
    assert sorted(order) == list(range(32))
    assert order != list(range(32))
    for name in ("w1", "b1", "s", "b", "m", "v"):
        assert (array_of(model, name) == array_of(before, name)[order]).all()
    assert (array_of(model, "w2") == array_of(before, "w2")[:, order]).all()
    assert (array_of(model, "w3") == array_of(before, "w3")).all()
    assert [n.op_type for n in model.graph] == [n.op_type for n in before.graph]


def test_permuting_back_gives_the_file_back() -> None:
    proto, _ = chain()
    model = copy(as_ir(proto)[0])
    network = analyze_ir(model)
    orders, _ = find_orders(network, TWO_FOUR, seconds=None, sweeps=3)
    apply_orders(network, orders)
    assert to_proto(model).SerializeToString() != to_proto(copy(as_ir(proto)[0])).SerializeToString()
    back = analyze_ir(model)  # the same labels, on the new contents
    apply_orders(back, [(comers, labels) for labels, comers in orders])
    again = copy(as_ir(proto)[0])
    for name in again.graph.initializers:
        assert array_of(model, name).tobytes() == array_of(again, name).tobytes()


def test_all_readers_of_a_class_score_together() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["a"]),
        helper.make_node("MatMul", ["h", "w3"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    constants = {"w1": normal(6, 16), "w2": normal(16, 8), "w3": 3 * normal(16, 8, seed=1)}
    model, report = permuted(model_of(nodes, [3, 6], "y", constants))
    (only,) = report.classes
    assert only.weights == ("w2", "w3")
    both = kept(array_of(model, "w2"), 0) + kept(array_of(model, "w3"), 0)
    assert only.permuted == pytest.approx(both)
    assert both > kept(constants["w2"], 0) + kept(constants["w3"], 0)


def test_weights_that_are_not_wanted_are_carried_along() -> None:
    """Known by what is stored, here behind a Transpose."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Transpose", ["w2"], ["w2t"]),
        helper.make_node("MatMul", ["h", "w2t"], ["a"]),
        helper.make_node("MatMul", ["h", "w3"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    constants = {"w1": normal(6, 16), "w2": normal(8, 16), "w3": 9 * normal(16, 8, seed=1)}
    proto = model_of(nodes, [3, 6], "y", constants)

    def wanted(reading: Reading) -> bool:
        return reading.stored is not None and reading.stored.name == "w2"

    model, report = permuted(proto, wanted=wanted)
    (only,) = report.classes
    assert only.unpermuted == pytest.approx(kept(constants["w2"], 1))
    assert only.permuted == pytest.approx(kept(array_of(model, "w2"), 1))
    assert only.permuted > only.unpermuted
    assert report.moved > 0
    assert same(proto, model, [3, 6])


def test_readers_that_are_not_aligned_are_carried_along() -> None:
    """One MatMul reads the channels as they are; another behind two further ones, so that groups of 4 straddle."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("MatMul", ["x", "w0"], ["g"]),
        helper.make_node("Concat", ["g", "h"], ["c"], axis=1),
        helper.make_node("MatMul", ["h", "w2"], ["a"]),
        helper.make_node("MatMul", ["c", "w3"], ["b"]),
        helper.make_node("Concat", ["a", "b"], ["y"], axis=1),
    ]
    constants = {
        "w0": normal(6, 2),
        "w1": normal(6, 16),
        "w2": normal(16, 40),
        "w3": normal(18, 8, seed=1),
    }
    proto = model_of(nodes, [3, 6], "y", constants)
    model, report = permuted(proto)
    (only,) = report.classes
    assert only.weights == ("w2",)
    assert not (array_of(model, "w3")[2:] == constants["w3"][2:]).all()
    assert (array_of(model, "w3")[:2] == constants["w3"][:2]).all()
    assert same(proto, model, [3, 6])


def test_groups_of_a_convolution_are_classes_of_their_own() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Conv", ["a", "w2"], ["y"], group=2),
    ]
    proto = model_of(nodes, [1, 3, 4, 4], "y", {"w1": normal(32, 3, 1, 1), "w2": normal(8, 16, 1, 1, seed=1)})
    model, report = permuted(proto)
    assert [each.channels for each in report.classes] == [16, 16]
    assert len({each.name for each in report.classes}) == 2
    assert sum(each.permuted for each in report.classes) == pytest.approx(kept(array_of(model, "w2"), 1))
    assert same(proto, model, [1, 3, 4, 4])


def test_flattened_channels_last_are_rows() -> None:
    """Behind a flattened [H, W, C] each position is a stripe pattern of its own, all of one order."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("Flatten", ["t"], ["f"]),
        helper.make_node("Gemm", ["f", "w2"], ["y"]),
    ]
    proto = model_of(nodes, [2, 3, 3, 3], "y", {"w1": normal(16, 3, 1, 1), "w2": normal(9 * 16, 5)})
    model, report = permuted(proto)
    (only,) = report.classes
    assert only.channels == 16
    assert only.permuted == pytest.approx(kept(array_of(model, "w2"), 0))
    assert only.permuted > only.unpermuted
    assert same(proto, model, [2, 3, 3, 3])


def test_shared_initializer_with_two_orders_is_cloned() -> None:
    """One bias for two layers whose channels are ordered apart."""
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "bias"], ["a"]),
        helper.make_node("Relu", ["a"], ["ar"]),
        helper.make_node("Gemm", ["ar", "w2", "bias"], ["b"]),
        helper.make_node("Relu", ["b"], ["br"]),
        helper.make_node("Gemm", ["br", "w3"], ["y"]),
    ]
    constants = {
        "w1": normal(6, 16),
        "w2": normal(16, 16, seed=1),
        "w3": normal(16, 4, seed=2),
        "bias": normal(16),
    }
    proto = model_of(nodes, [3, 6], "y", constants)
    model, report = permuted(proto)
    assert len(report.classes) == 2
    biases = {node.inputs[2].name for node in model.graph if len(node.inputs) > 2 and node.inputs[2]}
    assert len(biases) == 2
    assert same(proto, model, [3, 6])


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(2, 4), NM(4, 8), NM(1, 2), NM(3, 5)], ids=str)
def test_patterns(pattern: NM) -> None:
    proto, shape = chain(40)
    model, report = permuted(proto, pattern)
    (only,) = report.classes
    assert only.channels == 40
    assert only.permuted == pytest.approx(kept(array_of(model, "w2"), 1, pattern))
    assert only.permuted > only.unpermuted
    assert same(proto, model, shape)


def test_scores_replace_magnitudes() -> None:
    """Channels that the scores call large are spread over the groups, whatever their weights are."""
    proto, _ = chain(16)
    before = copy(as_ir(proto)[0])
    heavy = np.r_[np.full(8, 100.0), np.full(8, 1.0)]

    def scores(reading: Reading) -> Array:
        assert reading.tensor.name == "w2"
        return np.broadcast_to(heavy.reshape(1, -1, 1, 1), reading.tensor.shape or ()).copy()

    model, report = permuted(proto, scores=scores)
    order = [int(np.flatnonzero(array_of(before, "b1") == value)[0]) for value in array_of(model, "b1")]
    assert ((np.asarray(order) < 8).reshape(-1, 4).sum(axis=1) == 2).all()
    assert report.classes[0].permuted == pytest.approx(100 * 8 * 16 * 9)


# -- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "digits_transformer"])
def test_real_models(name: str) -> None:
    model = copy(as_ir(MODELS / f"{name}.onnx")[0])
    nodes = len(list(model.graph))
    heard: list[float] = []
    report = permute_channels(model, TWO_FOUR, seconds=1.0, progress=heard.append)
    assert report.max_error is not None
    assert report.max_error < TOLERANCE
    assert report.permuted > report.unpermuted + 0.05 * (report.bound - report.unpermuted)
    assert len(list(model.graph)) == nodes
    assert heard == sorted(heard)
    assert heard[-1] == 1
    assert set(report.seconds) == {"analysis", "search", "permutation", "verification"}
    assert report.to_dict()["kept"]["permuted"] == report.permuted


def test_the_seed_decides_where_there_is_no_clock() -> None:
    proto, _ = chain()
    one, other, third = (to_proto(permuted(proto, seed=seed)[0]).SerializeToString() for seed in (1, 1, 2))
    assert one == other
    assert one != third


def test_large_weights_are_read_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight in external data is reordered while it is written, and comes out right."""
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["h"]), helper.make_node("MatMul", ["h", "w2"], ["y"])]
    constants = {"w1": normal(300, 256), "w2": normal(256, 300, seed=1)}
    proto = model_of(nodes, [2, 300], "y", constants)
    save(as_ir(proto)[0], tmp_path / "in.onnx")
    model = copy(as_ir(proto)[0])
    permute_channels(model, TWO_FOUR, seconds=None, sweeps=1)
    assert isinstance(model.graph.initializers["w2"].const_value, ir.LazyTensor)
    save(model, tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx")
    found = {t.name: numpy_helper.to_array(t) for t in written.graph.initializer}
    assert kept(found["w2"], 0) > kept(constants["w2"], 0)
    assert same(proto, model, [2, 300])


def test_constants_inside_functions() -> None:
    """Two calls of one function need orders of their own: it is inlined."""
    body = helper.make_function(
        "own",
        "Layer",
        ["u"],
        ["v"],
        [
            helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(normal(16, 16))),
            helper.make_node("MatMul", ["u", "w"], ["m"]),
            helper.make_node("Relu", ["m"], ["v"]),
        ],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("Layer", ["h"], ["h1"], domain="own"),
        helper.make_node("Layer", ["h1"], ["h2"], domain="own"),
        helper.make_node("MatMul", ["h2", "w9"], ["y"]),
    ]
    proto = model_of(nodes, [3, 6], "y", {"w0": normal(6, 16), "w9": normal(16, 4)}, [body])
    model, report = permuted(proto)
    assert len(report.classes) == 3
    assert report.inlined == ["Layer"]
    assert not model.functions
    assert same(proto, model, [3, 6])
    network = analyze_ir(copy(as_ir(proto)[0]))
    orders, _ = find_orders(network, TWO_FOUR, seconds=None, sweeps=1)
    with pytest.raises(graphprune.PlanError, match="inline Layer first"):
        apply_orders(network, orders)


def test_nothing_to_permute() -> None:
    proto = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [3, 8], "y", {"w": normal(8, 8)})
    before = proto.SerializeToString()
    step = PermuteChannelsPass(TWO_FOUR, seconds=0.1)
    model = copy(as_ir(proto)[0])
    result = step(model)
    assert not result.modified
    assert step.report is not None
    assert step.report.classes == []
    assert step.report.max_error is None
    assert math.isclose(step.report.permuted, 1.0)
    assert proto.SerializeToString() == before
    assert (array_of(model, "w") == normal(8, 8)).all()


def test_pass_modifies_in_place() -> None:
    proto, shape = chain()
    model = copy(as_ir(proto)[0])
    result = ir.passes.Sequential(PermuteChannelsPass(TWO_FOUR, seconds=None, sweeps=2))(model)
    assert result.model is model
    assert result.modified
    assert same(proto, model, shape)


# -- verification ---------------------------------------------------------------------------------------------------


def test_a_wrong_order_is_found_and_the_model_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reverse one weight behind the search's back: the first node that differs is named."""
    proto, _ = chain()
    model = copy(as_ir(proto)[0])
    before = to_proto(model).SerializeToString()

    def wrong(*args: Any) -> Exchange:
        exchange = apply_orders(*args)
        value = args[0].model.graph.initializers["w2"]
        value.const_value = ir.tensor(value.const_value.numpy()[:, ::-1].copy(), name="w2")
        return exchange

    monkeypatch.setattr(module, "apply_orders", wrong)
    with pytest.raises(graphprune.VerificationError, match=r"tensor 'c', made by Conv"):
        permute_channels(model, TWO_FOUR, seconds=None, sweeps=1)
    assert to_proto(model).SerializeToString() == before


def test_readings_are_what_ops_sum_over() -> None:
    proto, _ = chain()
    network = analyze_ir(copy(as_ir(proto)[0]))
    found = {(reading.tensor.name, reading.axis) for reading in find_readings(network.analysis)}
    assert found == {("w1", 1), ("w2", 1), ("w3", 1)}
    assert [stripes.weights for stripes in find_stripes(network, 4)] == [["w2"]]
