"""Which weights are found, and that groups run along what an op truly sums over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.errors import RuleError
from graphprune.sparsity import contracted
from graphprune.sparsity.contracted import Weight, contracted_weights, register
from graphprune.sparsity.pattern import Layout
from graphprune.sparsity.sites import Site, find_sites

Array = np.ndarray[Any, Any]


def model(
    nodes: Sequence[onnx.NodeProto],
    x: Sequence[int],
    weights: Mapping[str, Array],
    *,
    functions: Sequence[onnx.FunctionProto] = (),
    output: str = "y",
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)


def sites(proto: onnx.ModelProto) -> dict[str, Site]:
    return {site.name: site for site in find_sites(ir.from_proto(proto))}


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


class Case(NamedTuple):
    """One op: its node, the activation's shape and the axis of it that is summed over, the weight."""

    name: str
    node: onnx.NodeProto
    x: tuple[int, ...]
    axis: int
    weight: tuple[int, ...]
    layout: Layout
    groups: int = 1
    more: Mapping[str, Array] = MappingProxyType({})


def node(
    op: str, *inputs: str, domain: str = "", outputs: Sequence[str] = ("y",), **attributes: Any
) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name=op.lower(), domain=domain, **attributes)


MS = "com.microsoft"
CASES = [
    Case("conv", node("Conv", "x", "w"), (2, 6, 5, 5), 1, (8, 6, 3, 2), Layout(8, 6, 6, 8)),
    Case("conv 1d", node("Conv", "x", "w"), (2, 6, 5), 1, (8, 6, 3), Layout(8, 6, 3, 8)),
    Case(
        "conv in groups",
        node("Conv", "x", "w", group=2),
        (1, 8, 5, 5),
        1,
        (6, 4, 1, 3),
        Layout(6, 4, 3, 3),
        2,
    ),
    Case(
        "transposed conv",
        node("ConvTranspose", "x", "w"),
        (1, 6, 4, 4),
        1,
        (6, 5, 2, 3),
        Layout(1, 6, 30, 5, 2, 6),
    ),
    Case(
        "transposed conv in groups",
        node("ConvTranspose", "x", "w", group=2),
        (1, 8, 4, 4),
        1,
        (8, 3, 2, 2),
        Layout(2, 4, 12, 3, 2, 4),
        2,
    ),
    Case("matmul", node("MatMul", "x", "w"), (3, 2, 8), 2, (8, 5), Layout(1, 8, 5, 5, 2, 1)),
    Case("matmul of batches", node("MatMul", "x", "w"), (3, 2, 8), 2, (3, 8, 5), Layout(3, 8, 5, 5, 2, 1)),
    Case("matmul from the left", node("MatMul", "w", "x"), (8, 3), 0, (5, 8), Layout(5, 8, 1, 5)),
    Case("gemm", node("Gemm", "x", "w"), (3, 8), 1, (8, 5), Layout(1, 8, 5, 5, 2, 1)),
    Case("gemm transB", node("Gemm", "x", "w", transB=1), (3, 8), 1, (5, 8), Layout(5, 8, 1, 5)),
    Case("gemm transA", node("Gemm", "x", "w", transA=1), (8, 3), 0, (8, 5), Layout(1, 8, 5, 5, 2, 1)),
    Case("gemm from the left", node("Gemm", "w", "x"), (8, 3), 0, (5, 8), Layout(5, 8, 1, 5)),
    Case(
        "gemm from the left, transA",
        node("Gemm", "w", "x", transA=1),
        (8, 3),
        0,
        (8, 5),
        Layout(1, 8, 5, 5, 2, 1),
    ),
    Case(
        "einsum", node("Einsum", "x", "w", equation="bic,oc->bio"), (2, 3, 8), 2, (5, 8), Layout(5, 8, 1, 5)
    ),
    Case(
        "einsum in heads",
        node("Einsum", "x", "w", equation="bic,hcd->bhid"),
        (2, 3, 8),
        2,
        (2, 8, 4),
        Layout(2, 8, 4, 4, 2, 1),
    ),
    Case(
        "lstm",
        node("LSTM", "x", "w", "r", hidden_size=3),
        (4, 2, 8),
        2,
        (1, 12, 8),
        Layout(12, 8, 1, 12),
        more={"r": normal(1, 12, 3)},
    ),
    Case(
        "gru",
        node("GRU", "x", "w", "r", hidden_size=3),
        (4, 2, 8),
        2,
        (1, 9, 8),
        Layout(9, 8, 1, 9),
        1,
        {"r": normal(1, 9, 3)},
    ),
    Case(
        "fused matmul",
        node("FusedMatMul", "x", "w", domain=MS, transB=1),
        (3, 8),
        1,
        (5, 8),
        Layout(5, 8, 1, 5),
    ),
    Case(
        "attention",
        node("Attention", "x", "w", "b", domain=MS, num_heads=2),
        (1, 3, 8),
        2,
        (8, 24),
        Layout(1, 8, 24, 24, 2, 1),
        1,
        {"b": normal(24)},
    ),
]


def run(proto: onnx.ModelProto, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_groups_run_along_what_is_summed_over(case: Case) -> None:
    """Where channel ``c`` of the activation is zero, its elements of the weight do nothing, others do."""
    x, weight = normal(*case.x), normal(*case.weight)
    proto = model([case.node], case.x, {"w": weight, **case.more}, domains=[MS])
    site = sites(proto)["w"]
    assert site.reason is None
    assert site.layout == case.layout
    layout = case.layout
    for channel in (0, layout.contracted - 1):
        without, changed = x.copy(), weight.copy()
        view = np.moveaxis(without, case.axis, 0)
        for group in range(case.groups):
            view[group * layout.contracted + channel] = 0
        changed.reshape(layout.shape)[:, channel] = 0
        twin = model([case.node], case.x, {"w": changed, **case.more}, domains=[MS])
        assert np.array_equal(run(proto, without), run(twin, without))
        assert not np.array_equal(run(proto, x), run(twin, x))


#: Ops whose answer mixes the results of their sums.
MIXING = ("lstm", "gru", "attention")


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in MIXING], ids=lambda case: case.name)
def test_neighbouring_outputs_lie_where_the_layout_says(case: Case) -> None:
    """Without the elements of one output (of each conv group) that output changes, and no other."""
    x, weight = normal(*case.x), normal(*case.weight)
    proto = model([case.node], case.x, {"w": weight, **case.more}, domains=[MS])
    layout = case.layout
    for output in (0, layout.outputs - 1):
        changed = weight.copy()
        view = np.moveaxis(changed.reshape(layout.shape), layout.outputs_axis, 0)
        for start in range(0, len(view), layout.outputs * layout.outputs_step):
            first = start + output * layout.outputs_step
            view[first : first + layout.outputs_step] = 0
        twin = model([case.node], case.x, {"w": changed, **case.more}, domains=[MS])
        whole, without = run(proto, x), run(twin, x)
        assert np.count_nonzero(whole != without) == whole.size // layout.outputs
        assert np.count_nonzero(without) == whole.size - whole.size // layout.outputs


def test_weights_behind_carriers_are_followed() -> None:
    weights: dict[str, Array] = {
        "w": normal(5, 8).astype(np.float16),
        "q": np.ones((8, 4), np.int8),
        "s": np.ones((), np.float32),
    }
    weights["z"] = np.zeros((), np.int8)
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("Cast", ["wt"], ["wf"], to=TensorProto.FLOAT),
        helper.make_node("Identity", ["wf"], ["wi"]),
        helper.make_node("MatMul", ["x", "wi"], ["a"], name="first"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["qf"]),
        helper.make_node("MatMul", ["x", "qf"], ["b"], name="second"),
        helper.make_node("Concat", ["a", "b"], ["y"], axis=1),
    ]
    found = sites(model(nodes, (3, 8), weights))
    assert set(found) == {"w", "q"}
    assert found["w"].layout == Layout(5, 8, 1, 5)
    assert found["w"].use.node == "first"
    assert found["q"].layout == Layout(1, 8, 4, 4, 2, 1)
    assert found["q"].reason is None


@pytest.mark.parametrize("op", ["DequantizeLinear", "QLinearMatMul"])
def test_a_zero_point_that_is_not_zero_is_a_reason(op: str) -> None:
    weights: dict[str, Array] = {
        "q": np.ones((8, 4), np.uint8),
        "s": np.ones((), np.float32),
        "z": np.full((), 128, np.uint8),
    }
    if op == "DequantizeLinear":
        nodes = [
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
    else:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            helper.make_node("QLinearMatMul", ["xq", "s", "z", "q", "s", "z", "s", "z"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
        ]
    site = sites(model(nodes, (3, 8), weights))["q"]
    assert site.reason is not None
    assert "zero point" in site.reason


def test_a_weight_in_two_layouts_says_so() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="there"),
        helper.make_node("Gemm", ["a", "w"], ["y"], name="back", transB=1),
    ]
    site = sites(model(nodes, (3, 8), {"w": normal(8, 8)}))["w"]
    assert site.layout is None
    assert site.reason is not None
    assert "'there'" in site.reason
    assert "'back'" in site.reason


def test_a_weight_that_something_else_reads_says_so() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Add", ["a", "w"], ["y"], name="sum"),
    ]
    site = sites(model(nodes, (8, 8), {"w": normal(8, 8)}))["w"]
    assert site.layout == Layout(1, 8, 8, 8, 2, 1)
    assert site.reason is not None
    assert "'sum'" in site.reason


def test_a_shared_weight_in_one_layout_is_one_site() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    site = sites(model(nodes, (3, 8), {"w": normal(8, 8)}))["w"]
    assert site.reason is None
    assert len(site.uses) == 2


def test_products_of_constants_and_vectors_are_no_sites() -> None:
    weights = {"w": normal(8, 8), "v": normal(8, 8), "u": normal(8)}
    nodes = [
        helper.make_node("MatMul", ["w", "v"], ["c"]),
        helper.make_node("MatMul", ["x", "u"], ["a"]),
        helper.make_node("Mul", ["a", "c"], ["y"]),
    ]
    found = sites(model(nodes, (3, 8), weights))
    assert all(site.reason is not None for site in found.values())
    assert "another constant" in str(found["w"].reason)
    assert "1 axes" in str(found["u"].reason)


def test_weights_are_seen_in_subgraphs_functions_and_constants() -> None:
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(normal(8, 8), "k"))
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "outer"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", 1, None)],
    )
    other = helper.make_graph(
        [constant, helper.make_node("MatMul", ["x", "k"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", 1, None)],
    )
    inside = helper.make_node("Constant", [], ["own"], value=numpy_helper.from_array(normal(8, 8), "own"))
    body = [
        helper.make_node("Transpose", ["p"], ["pt"]),
        helper.make_node("MatMul", ["a", "pt"], ["m"]),
        inside,
        helper.make_node("MatMul", ["m", "own"], ["b"]),
    ]
    function = helper.make_function("acme", "Twice", ["a", "p"], ["b"], body, [helper.make_opsetid("", 17)])
    nodes = [
        helper.make_node("If", ["flag"], ["i"], then_branch=then, else_branch=other),
        helper.make_node("Twice", ["i", "given"], ["j"], domain="acme"),
        helper.make_node("Twice", ["j", "given"], ["y"], domain="acme"),
    ]
    weights = {"outer": normal(8, 8), "given": normal(8, 8), "flag": np.array(True)}
    found = sites(model(nodes, (3, 8), weights, functions=[function], domains=["acme"]))
    assert set(found) == {"outer", "k", "given", "own"}
    assert all(site.reason is None for site in found.values())
    assert found["given"].layout == Layout(8, 8, 1, 8)
    assert found["outer"].layout == Layout(1, 8, 8, 8, 2, 1)


def test_axes_of_one_element_may_come_and_go() -> None:
    weights: dict[str, Array] = {
        "w": normal(12, 8),
        "r": normal(1, 1, 12, 3),
        "first": np.array([0]),
        "two": np.array([-4]),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["w", "first"], ["w3"]),
        helper.make_node("Squeeze", ["r", "two"], ["r3"]),
        helper.make_node("LSTM", ["x", "w3", "r3"], ["y"], hidden_size=3),
    ]
    proto = model(nodes, (4, 2, 8), weights)
    run(proto, normal(4, 2, 8))
    found = sites(proto)
    assert found["w"].layout == Layout(12, 8, 1, 12)
    assert found["r"].layout == Layout(12, 3, 1, 12)


def test_a_weight_that_is_computed_from_constants_is_named() -> None:
    weights = {"a": normal(8, 4), "b": normal(8, 3), "s": np.array(2, np.float32), "w": normal(7, 8)}
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["c"], "join", axis=1),
        helper.make_node("Mul", ["c", "s"], ["d0"], "scale"),
        helper.make_node("Unsqueeze", ["d0", "first"], ["d1"], "unsqueeze"),
        helper.make_node("Transpose", ["d1"], ["d2"], perm=[0, 1, 2]),
        helper.make_node("Squeeze", ["d2", "first"], ["d"], "squeeze"),
        helper.make_node("MatMul", ["x", "d"], ["e"]),
        helper.make_node("MatMul", ["e", "w"], ["f"]),
        helper.make_node("Shape", ["w"], ["g"]),
        helper.make_node("Gather", ["g", "i"], ["h"]),
        helper.make_node("Cast", ["h"], ["j"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["f", "j"], ["y"]),
    ]
    found = sites(model(nodes, (3, 8), {**weights, "i": np.array(0), "first": np.array([0])}))
    assert set(found) == {"a", "w"}
    assert found["a"].reason == "Mul 'scale' computes the weight from it"
    assert found["w"].reason is None  # that its size is asked for changes nothing


def test_graph_outputs_and_packed_types_are_reasons() -> None:
    proto = model(
        [helper.make_node("Identity", ["w"], ["y"]), helper.make_node("MatMul", ["x", "w"], ["z"])],
        (3, 8),
        {"w": normal(8, 8)},
    )
    assert "output of the graph" in str(sites(proto)["w"].reason)
    tensor = helper.make_tensor("p", TensorProto.INT4, [8, 8], np.ones(64, np.int8).tolist())
    proto = model(
        [
            helper.make_node("DequantizeLinear", ["p", "s"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        (3, 8),
        {"s": np.ones((), np.float32)},
    )
    proto.graph.initializer.append(tensor)
    assert "INT4" in str(sites(proto)["p"].reason)


def test_an_op_of_your_own_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracted, "CONTRACTED", dict(contracted.CONTRACTED))
    proto = model([helper.make_node("Dense", ["x", "w"], ["y"], domain="acme")], (3, 8), {"w": normal(5, 8)})
    assert not sites(proto)
    register("acme::Dense", Weight(slot=1, axis=1, outputs=0))
    assert sites(proto)["w"].layout == Layout(5, 8, 1, 5)
    with pytest.raises(RuleError, match="both summed and made"):
        register("acme::Wrong", Weight(1, 1, 1))


@pytest.mark.parametrize(
    "equation", ["ij,jk->ik...", "ii,ij->j", "ij,jk,kl->il", "ij,ij->ij", "ij,jk", "ab,abc->c"]
)
def test_einsums_that_are_no_product_of_matrices_are_left_alone(equation: str) -> None:
    assert contracted_weights("", "Einsum", {"equation": equation}) == ()
