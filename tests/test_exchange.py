"""Permutations of labels: the network with its constants reordered is the network.

The law is tried with permutations drawn at random within every class, on all patterns, on generated graphs, and on
single ops with an open boundary, where inputs and outputs change places too.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphprune.axes.analysis import Analysis
from graphprune.axes.labels import Labels
from graphprune.constants import ConstantChanges
from graphprune.errors import PlanError
from graphprune.graph import Tensor
from graphprune.model import as_ir, copy, to_proto
from graphprune.model.inlining import inline
from graphprune.model.splice import Splicer
from graphprune.network import Network
from graphprune.pipeline import analyze_ir
from graphprune.sparsity.exchange import Exchange, exchange_classes, functions_bearing, occurrences
from graphprune.sparsity.permutation import apply_orders
from graphprune.verification.difference import difference, tolerance_of
from tests.laws.graphs import graphs
from tests.laws.node_suite import node_suite
from tests.laws.single import Single, literals, open_analysis, run, weights

from .patterns import PATTERNS, Pattern
from .test_patterns import built, distance, results

TOLERANCE = 1e-4

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)


def shuffled(analysis: Analysis, seed: int) -> list[tuple[Labels, Labels]]:
    """A random order of every class."""
    random = np.random.default_rng(seed)
    return [(labels, random.permutation(labels)) for labels in exchange_classes(analysis)]


def analysed(model: ir.Model, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Network:
    """The network, functions inlined where their constants bear labels that may move."""
    while True:
        network = analyze_ir(model, shapes)
        labels = np.concatenate([np.zeros(0, np.int32), *exchange_classes(network.analysis)])
        functions = functions_bearing(network.analysis, labels)
        if not functions:
            return network
        inline(model, functions)


def contents(model: ir.Model) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every initializer and every Constant's tensor, by name."""
    found = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                array = value.const_value.numpy()
                found[name] = (str(array.dtype), array.shape, array.tobytes())
        for node in graph:
            if node.op_type == "Constant" and "value" in node.attributes:
                array = node.attributes["value"].as_tensor().numpy()
                found[node.outputs[0].name or ""] = (str(array.dtype), array.shape, array.tobytes())
    return found


# -- whole networks ------------------------------------------------------------------------------------------------


@every_pattern
@pytest.mark.parametrize("seed", [0, 1])
def test_patterns_with_random_orders_are_what_they_were(pattern: Pattern, seed: int) -> None:
    proto, feeds, _ = built(pattern)
    model = as_ir(proto)[0]
    model = copy(model)
    network = analysed(model, pattern.input_shapes)
    before = contents(model)
    nodes = Counter(node.op_type for node in model.graph)
    exchange = apply_orders(network, shuffled(network.analysis, seed))
    network.fills.join()
    assert len(exchange.moving), "nothing could be moved"
    assert contents(model) != before
    assert not Counter(node.op_type for node in model.graph) - nodes, "an op was added"
    onnx.checker.check_model(to_proto(model), full_check=True)
    errors = [
        distance(ours, theirs)
        for ours, theirs in zip(results(to_proto(model), feeds), results(proto, feeds), strict=True)
    ]
    assert max(errors) <= TOLERANCE


@every_pattern
def test_permuting_back_is_the_identity(pattern: Pattern) -> None:
    """Bit for bit, in every constant that the permuted model still has."""
    model = copy(as_ir(built(pattern).model)[0])
    network = analysed(model, pattern.input_shapes)
    exchange = Exchange(network.analysis, shuffled(network.analysis, 3))
    there = [(t, exchange.of(t)) for t in exchange.moved()]
    back = Exchange(network.analysis, [(exchange.partner[exchange.moving], exchange.moving)])
    assert there
    for tensor, change in there:
        undo = back.of(tensor)
        assert change is not None
        assert undo is not None
        array = np.arange(int(np.prod(tensor.shape or ()))).reshape(tensor.shape or ())
        moved = change.apply(array)
        assert not (moved == array).all()
        assert (undo.apply(moved) == array).all()


law = settings(
    deadline=None,
    max_examples=int(os.environ.get("GRAPHPRUNE_EXAMPLES", "60")),
    derandomize="GRAPHPRUNE_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@law
@given(graphs(), st.integers(0, 9))
def test_generated_graphs_with_random_orders(model: onnx.ModelProto, seed: int) -> None:
    changed = copy(as_ir(model)[0])
    network = analysed(changed)
    apply_orders(network, shuffled(network.analysis, seed))
    network.fills.join()
    random = np.random.default_rng(0)
    feeds = {
        value.name: random.standard_normal([d.dim_value for d in value.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for value in model.graph.input
    }
    expected, found = run(model, feeds), run(to_proto(changed), feeds)
    for name, array in expected.items():
        assert difference(array, found[name]) <= TOLERANCE


# -- single ops ----------------------------------------------------------------------------------------------------


def outcome(single: Single, seed: int) -> str:
    """Permute all that may be at once, inputs included; the outputs must come out permuted."""
    opened = open_analysis(single.model)
    orders = shuffled(opened.analysis, seed)
    exchange = Exchange(opened.analysis, orders)
    if not len(exchange.moving):
        return "nothing"
    if functions_bearing(opened.analysis, exchange.moving):
        return "function"
    try:
        whole = run(single.model, single.feeds)
    except Exception:
        return "not run"

    def moved(tensor: Tensor, array: Any) -> Any:
        change = exchange.of(tensor)
        return array if change is None else change.apply(array)

    graph = opened.analysis.graph
    feeds = {t.name: moved(t, single.feeds[t.name]) for t in graph.inputs if t.name in single.feeds}
    splice = Splicer(opened.model)
    ConstantChanges(opened.analysis, splice, exchange.of, "permuted").run()
    found = run(to_proto(opened.model), feeds)
    for tensor, value in zip(graph.outputs, single.model.graph.output, strict=True):
        expected = moved(tensor, whole[value.name])
        error = difference(expected, found[value.name])
        dtype = expected.dtype if isinstance(expected, np.ndarray) else np.dtype(object)
        if not error <= tolerance_of(dtype):
            return f"wrong: {value.name!r} differs by {error:.2g}"
    return "exact"


VARIANTS: dict[str, Callable[[Single], Single]] = {
    "literals": literals,
    "weights": weights,
    "inputs": lambda single: single,
}
CHUNKS = 12


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_op_of_the_suite_is_indifferent_to_the_order(chunk: int, variant: str) -> None:
    outcomes = {
        single.name: outcome(VARIANTS[variant](single), chunk) for single in node_suite()[chunk::CHUNKS]
    }
    print(Counter(text.partition(":")[0] for text in outcomes.values()))
    assert not {name: text for name, text in outcomes.items() if text.startswith("wrong")}
    assert Counter(outcomes.values())["exact"] >= 55


# -- what may not trade places -------------------------------------------------------------------------------------


def classes_of(nodes: list[Any], inputs: dict[str, Any], **constants: Any) -> tuple[Analysis, list[set[str]]]:
    """Classes of a small graph with an open boundary; each as the set of its labels' (tensor, position)."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_empty_tensor_value_info(nodes[-1].output[0])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    analysis = open_analysis(onnx.shape_inference.infer_shapes(model)).analysis
    found = []
    for labels in exchange_classes(analysis):
        places = set()
        for tensor in analysis.graph.inputs:
            for each in analysis.labellings(tensor):
                axis = int(np.argmax(each.shape))
                places |= {f"{tensor.name}{axis}:{i}" for i in np.flatnonzero(np.isin(each.ravel(), labels))}
        found.append(places)
    return analysis, found


def test_order_of_what_runs_along_an_axis() -> None:
    for nodes, constants in (
        ([helper.make_node("CumSum", ["x", "axis"], ["y"])], {"axis": np.asarray(1)}),
        ([helper.make_node("LRN", ["x"], ["y"], size=3)], {}),
    ):
        _, classes = classes_of(nodes, {"x": [3, 6, 5]}, **constants)
        assert not any(place.startswith("x1") for places in classes for place in places)
        assert {"x0:0", "x0:1", "x0:2"} in classes


def test_positions_that_a_slice_tells_apart() -> None:
    node = helper.make_node("Slice", ["x", "a", "b", "c"], ["y"])
    _, classes = classes_of([node], {"x": [1, 7]}, a=np.asarray([2]), b=np.asarray([5]), c=np.asarray([1]))
    assert {"x1:2", "x1:3", "x1:4"} in classes
    assert {"x1:0", "x1:1", "x1:5", "x1:6"} in classes


def test_repeated_labels_must_be_indexed_alike() -> None:
    """A label's elements 0 and 1 are told apart by an index that takes one label's first and the other's second."""
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["y"]),
        helper.make_node("Gather", ["y", "index"], ["z"], axis=0),
        helper.make_node("Reshape", ["z", "square"], ["u"]),
        helper.make_node("MatMul", ["u", "w"], ["v"]),
    ]
    for index, free in (([0, 1, 2, 3], True), ([1, 0, 3, 2], True), ([0, 1, 3, 2], False)):
        analysis = open_analysis(
            helper.make_model(
                helper.make_graph(
                    nodes,
                    "g",
                    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
                    [helper.make_tensor_value_info("v", TensorProto.FLOAT, [2, 3])],
                    [
                        numpy_helper.from_array(np.asarray([4]), "flat"),
                        numpy_helper.from_array(np.asarray(index), "index"),
                        numpy_helper.from_array(np.asarray([2, 2]), "square"),
                        numpy_helper.from_array(np.ones((2, 3), np.float32), "w"),
                    ],
                ),
                opset_imports=[helper.make_opsetid("", 17)],
                ir_version=8,
            )
        ).analysis
        rows = analysis.labellings(analysis.graph.inputs[0])
        first = next(each for each in rows if each.shape == (2, 1))
        held = [labels for labels in exchange_classes(analysis) if np.isin(first, labels).all()]
        assert bool(held) is free, index


def test_conv_groups_keep_their_channels() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2)
    weight = np.random.default_rng(0).standard_normal((6, 4, 1, 1)).astype(np.float32)
    analysis, _ = classes_of([node], {"x": [1, 8, 3, 3]}, w=weight)
    labels = next(each for each in analysis.labellings(analysis.graph.inputs[0]) if each.shape[1] == 8)
    mine = [
        set(np.flatnonzero(np.isin(labels.ravel(), each)).tolist()) for each in exchange_classes(analysis)
    ]
    assert {0, 1, 2, 3} in mine
    assert {4, 5, 6, 7} in mine


def test_labels_of_different_classes_are_refused() -> None:
    pattern = next(p for p in PATTERNS if p.name == "shuffle_grouped")
    network = analysed(copy(as_ir(built(pattern).model)[0]))
    one, other = exchange_classes(network.analysis)[:2]
    mixed = np.asarray([one[0], other[0]], dtype=np.int32)
    exchange = Exchange(network.analysis, [(mixed, mixed[::-1])])
    with pytest.raises(PlanError, match="differ in what they bear"):
        exchange.moved()


def test_outputs_keep_their_order() -> None:
    """No label that an output of the model shows is in a class."""
    for pattern in PATTERNS:
        network = _network(pattern)
        free = {int(label) for labels in exchange_classes(network.analysis) for label in labels}
        for tensor in (*network.analysis.graph.outputs, *network.analysis.graph.inputs):
            for labels in network.analysis.labellings(tensor):
                assert free.isdisjoint(np.unique(labels).tolist()), (pattern.name, tensor.name)


@functools.cache
def _network(pattern: Pattern) -> Network:
    return analysed(copy(as_ir(built(pattern).model)[0]), pattern.input_shapes)


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_occurrences(rows: list[list[int]]) -> None:
    expected = [[row[:i].count(label) for i, label in enumerate(row)] for row in rows]
    assert occurrences(np.asarray(rows, dtype=np.int32)).tolist() == expected
