"""What the precision pass measures: ranges, errors, bodies; and that its result is written as it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given as given_arrays
from onnx import TensorProto, helper, numpy_helper

from graphprune.calibration import Calibration
from graphprune.errors import VerificationError
from graphprune.graph.twin import build_twin
from graphprune.model import as_ir, load, save, to_proto
from graphprune.model.inlining import inline
from graphprune.model.nodes import is_constant_value
from graphprune.passes.cast_precision import CastPrecisionPass, cast_precision
from graphprune.precision import comparison as comparisons
from graphprune.precision.choice import Chooser
from graphprune.precision.comparison import values_of
from graphprune.precision.elements import element_types
from graphprune.precision.emulation import emulate
from graphprune.precision.formats import FORMATS, Format
from graphprune.precision.ranges import MAXIMA, add_probes
from graphprune.precision.stored import CastTensor, greatest
from graphprune.precision.typing import types_of

from .patterns import Pattern, attention, control, run
from .precision_networks import (
    FLOAT,
    HALF,
    cancelling,
    cast,
    chain,
    dense,
    given,
    names,
    network,
    norm,
    reasons,
    result_types,
    squares,
    types,
    weight,
    with_if,
)

# -- ranges ----------------------------------------------------------------------------------------------------------


def test_overflow_is_found_on_calibration_inputs() -> None:
    _, report = cast(squares(), calibration=given(1.0))
    assert "square" in names(report)
    original = squares()
    model, report = cast(original, calibration=given(200.0))
    found = result_types(model)
    assert [found[name] for name in ("square", "shrink")] == [FLOAT] * 2
    assert [found[name] for name in ("first", "second")] == [HALF] * 2
    # the value that is named is the greatest of all batches, not of the first
    x = np.asarray(given(200.0).inputs["x"])
    top = float(((x @ numpy_helper.to_array(original.graph.initializer[0])) ** 2).max())
    assert f"'square' reaches {top:.4g}, more than half the range of float16" == reasons(report)["square"]
    _, brain = cast(squares(), "bf16", calibration=given(200.0))
    assert "square" in names(brain)


def test_random_inputs_are_said_to_be_random() -> None:
    _, report = cast(chain())
    assert any("random inputs" in note for note in report.notes)
    _, report = cast(chain(), calibration=given(1.0, 2))
    assert not report.notes


# -- verification ----------------------------------------------------------------------------------------------------


def test_nodes_that_do_harm_are_found_and_kept() -> None:
    model, report = cast(cancelling())
    found = result_types(model)
    assert [found[name] for name in ("add", "sub")] == [FLOAT] * 2
    assert [found[name] for name in ("second", "third")] == [HALF] * 2
    assert reasons(report)["sub"] == "lowered, it leaves 'y' off by more than the bound"
    assert report.max_error["y"] <= report.bounds["y"]
    _, without = cast(cancelling(), verify=False)
    assert "sub" in names(without)
    assert not without.max_error


def test_it_is_refused_if_nothing_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.precision.formats.BOUND_FACTOR", 1e-9)
    made, _ = as_ir(chain())
    before = to_proto(made).SerializeToString()
    with pytest.raises(VerificationError, match=r"output 'y' in float16 is off by .* no choice of nodes"):
        cast_precision(made, "fp16")
    assert to_proto(made).SerializeToString() == before


def rounded(array: np.ndarray, low: Format) -> np.ndarray:
    return array.astype(low.dtype.numpy()).astype(np.float32)


def test_emulation_rounds_every_result() -> None:
    """The emulation equals NumPy with a rounding behind every op; ONNX Runtime's float16 does not."""
    w = [weight(16, 16), weight(16, 16)]
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("Exp", ["a"], ["b"]),
        helper.make_node("Log", ["b"], ["c"]),
        dense("second", "c", "y"),
    ]
    original, _ = as_ir(network(nodes, {"first.w": w[0], "second.w": w[1]}))
    x = np.random.default_rng(7).standard_normal((2, 16)).astype(np.float32)
    for low in FORMATS.values():
        twin = build_twin(original)
        chooser = Chooser(original, twin, low)
        choice = chooser.settle()
        with comparisons.Comparison(original, twin, chooser.types, low, choice, io=False) as comparison:
            candidate, _ = comparison.lowered(choice)
            reference = comparison.run_original([{"x": x}], [], 1)
            found = comparison.errors(reference, candidate, {"y": 1.0})["y"]

        exact = np.log(np.exp(x @ w[0])) @ w[1]
        a = rounded(rounded(x, low) @ rounded(w[0], low), low)
        logs = rounded(np.log(rounded(np.exp(a), low)), low)
        expected = rounded(logs @ rounded(w[1], low), low)
        assert found == pytest.approx(float(np.abs(expected - exact).max() / np.abs(exact).max()), rel=0.02)


def test_outputs_behind_a_jump_are_judged_by_what_enters_it() -> None:
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("TopK", ["a", "k"], ["top", "which"], "top"),
        helper.make_node("Gather", ["table", "which"], ["y"], "gather"),
    ]
    # two columns that are equal but for less than float16 tells apart
    w = weight(16, 8)
    w[:, 4:] = w[:, :4] * (1 + 1e-5)
    table = np.arange(8, dtype=np.float32)
    model, report = cast(network(nodes, {"first.w": w, "table": table, "k": np.array([1])}))
    assert result_types(model)["first"] == HALF
    assert report.max_error["a"] <= report.bounds["a"]
    assert report.max_error["y"] > report.bounds["y"]
    assert any("result jumps" in note for note in report.notes)


def test_a_jump_that_nothing_rounded_enters_excuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative positions are compared in float32, all of them exactly: outputs behind that are judged themselves."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["positions"], "positions", to=FLOAT),
        helper.make_node("Floor", ["positions"], ["whole"], "floor"),
        helper.make_node("Cast", ["whole"], ["index"], "index", to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["bias"], "gather"),
        dense("first", "x", "a"),
        helper.make_node("Add", ["a", "bias"], ["y"], "add"),
    ]
    constants = {"table": weight(4, 8), "first.w": weight(16, 8)}
    model = network(nodes, constants, {"x": (2, 16), "ids": (2,)})
    _, report = cast(model)
    assert set(report.max_error) == {"y"}
    assert 0 < report.max_error["y"] <= report.bounds["y"]
    monkeypatch.setattr("graphprune.precision.formats.BOUND_FACTOR", 1e-9)
    with pytest.raises(VerificationError, match="output 'y'"):
        cast(model)


# -- subgraphs and functions -----------------------------------------------------------------------------------------


def bodies(model: onnx.ModelProto) -> dict[str, onnx.GraphProto]:
    node = next(node for node in model.graph.node if node.op_type == "If")
    return {attribute.name: attribute.g for attribute in node.attribute}


def test_bodies_are_lowered_inside_and_float32_at_their_borders() -> None:
    model, _ = cast(with_if(), calibration=given(1.0))
    for body in bodies(model).values():
        assert body.node[-1].op_type == "Cast"
        assert body.node[-1].attribute[0].i == FLOAT
        assert sum(node.op_type == "Cast" for node in body.node) == 1  # the captured value comes down outside
    assert types(model)["inner.w"] == HALF


def test_overflow_inside_a_body_is_seen() -> None:
    """Each branch is measured on the inputs that lead into it."""
    x = np.asarray(given(1.0).inputs["x"])
    both = np.concatenate([x * np.sign(x.sum()), -x * np.sign(x.sum())])  # eight samples make a batch
    _, report = cast(with_if(1e3), calibration=Calibration({"x": both}, {}))
    kept = reasons(report)
    assert "reaches" in kept["then_square"]
    assert "else_square" in names(report)


def test_overflow_in_a_loop_is_seen_at_its_last_step() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["keep"], ["keep_on"]),
            dense("inner", "state", "a"),
            helper.make_node("Mul", ["a", "eight"], ["next"], "grow"),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("keep", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("keep_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
    )

    def looped(steps: int) -> onnx.ModelProto:
        nodes = [
            dense("first", "x", "a0"),
            helper.make_node("Loop", ["steps", "", "a0"], ["b"], "loop", body=body),
            helper.make_node("Mul", ["b", "tiny"], ["y"], "shrink"),
        ]
        constants = {
            "first.w": weight(16, 8),
            "inner.w": np.eye(8, dtype=np.float32),
            "eight": np.array(8, np.float32),
            "tiny": np.array(1e-4, np.float32),
            "steps": np.array(steps),
        }
        return network(nodes, constants)

    _, few = cast(looped(2))
    assert "grow" in names(few)
    _, many = cast(looped(6))
    assert "'next' reaches" in reasons(many)["grow"]


def test_functions_are_inlined() -> None:
    body = helper.make_function(
        "local",
        "block",
        ["a"],
        ["c"],
        [helper.make_node("Relu", ["a"], ["b"], "relu"), helper.make_node("Sin", ["b"], ["c"], "sin")],
        [helper.make_opsetid("", 18)],
    )
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("block", ["a"], ["b"], "call", domain="local"),
        dense("second", "b", "y"),
    ]
    original = network(nodes, {"first.w": weight(16, 8), "second.w": weight(8, 8)})
    original.functions.append(body)
    model, _ = cast(original)
    assert not model.functions
    ops = [node.op_type for node in model.graph.node]
    assert ops == ["Cast", "MatMul", "Relu", "Cast", "Sin", "Cast", "MatMul", "Cast"]


# -- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [chain, cancelling, lambda: norm(1e-12), with_if, squares])
@pytest.mark.parametrize("io", [False, True])
def test_twice_is_once_and_always_the_same(make: Any, io: bool) -> None:
    original = make()
    options: dict[str, Any] = {"io": io, "calibration": given(200.0, 4)} if make is squares else {"io": io}
    first, _ = cast(original, **options)
    again, _ = cast(original, **options)
    assert first.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
    if not io:
        twice, report = cast(first, **options)
        assert not report.lowered
        assert twice.SerializeToString(deterministic=True) == first.SerializeToString(deterministic=True)


def test_external_weights_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that lies in a file is converted when the result is written, and never held as a whole."""
    array = np.random.default_rng(7).standard_normal((16, 300_000)).astype(np.float32)
    nodes = [dense("first", "x", "a"), helper.make_node("ReduceMean", ["a", "axis"], ["y"], "mean")]
    source = network(nodes, {"first.w": array, "axis": np.array([1])})
    made, _ = as_ir(source)
    save(made, tmp_path / "source.onnx", external_data=True)
    model = load(tmp_path / "source.onnx")

    def refuse(self: ir.ExternalTensor) -> np.ndarray:
        if self.nbytes > 1 << 20:
            raise AssertionError("the whole weight was read at once")
        return original(self)

    report = cast_precision(model, "fp16")
    original = ir.ExternalTensor.numpy
    monkeypatch.setattr(ir.ExternalTensor, "numpy", refuse)
    save(model, tmp_path / "half.onnx")
    monkeypatch.undo()
    assert names(report) == {"first", "mean"}
    half = onnx.load(str(tmp_path / "half.onnx"))
    np.testing.assert_array_equal(numpy_helper.to_array(half.graph.initializer[0]), array.astype(np.float16))
    assert (tmp_path / "half.onnx.data").stat().st_size < 0.51 * (
        tmp_path / "source.onnx.data"
    ).stat().st_size


def test_the_pass_composes_and_reports() -> None:
    made, _ = as_ir(chain())
    step = CastPrecisionPass("bf16")
    result = ir.passes.Sequential(step)(made)
    assert result.modified
    assert step.report is not None
    found = step.report.to_dict()
    assert found["lowered"] == {"MatMul": 2, "Relu": 1}
    assert any("emulation" in note for note in found["notes"])
    assert step.report.contractions == (2, 0)
    assert not step(made).modified


def test_element_types_of_contractions() -> None:
    model, _ = as_ir(chain())
    assert [(c.node, c.weight, c.weight_type, c.is_half) for c in element_types(model)] == [
        ("first", "first.w", "FLOAT", False),
        ("second", "second.w", "FLOAT", False),
    ]
    cast_precision(model, "fp16", deny=["second"])
    found = {c.node: c for c in element_types(model)}
    assert found["first"].is_half
    assert (found["second"].weight_type, found["second"].activation_type) == ("FLOAT", "FLOAT")


# -- the pieces, against NumPy and ONNX Runtime ----------------------------------------------------------------------


@given_arrays(
    hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)),
    st.sampled_from(sorted(FORMATS)),
)
def test_a_tensor_is_cast_alike_whole_and_in_stretches(array: np.ndarray, name: str) -> None:
    dtype = FORMATS[name].dtype
    with np.errstate(all="ignore"):
        expected = array.astype(dtype.numpy())
    tensor = CastTensor(ir.Tensor(array, name="w"), dtype)
    written = b"".join(bytes(chunk) for chunk in tensor.chunks())
    assert written == expected.tobytes() == tensor.numpy().tobytes()
    assert tensor.nbytes == 2 * array.size
    # a tensor that is itself made in stretches
    again = CastTensor(tensor, ir.DataType.FLOAT)
    assert again.numpy().tobytes() == expected.astype(np.float32).tobytes()
    finite = np.abs(array[np.isfinite(array)])
    assert greatest(ir.Tensor(array)) == float(finite.max(initial=0))


@pytest.mark.parametrize(
    "pattern", [*control.PATTERNS, *attention.PATTERNS], ids=lambda pattern: pattern.name
)
def test_probes_tell_what_numpy_tells(pattern: Pattern) -> None:
    """The numbers that the network works out for the values of its main graph are those of the values themselves."""
    built = pattern.build()
    model, _ = as_ir(built.model)
    if model.functions:
        inline(model, {function.identifier() for function in model.functions.values()})
    kinds = types_of(model, build_twin(model, pattern.input_shapes))
    wanted = [
        value
        for value in values_of(model)
        if kinds.get(value) == ir.DataType.FLOAT and not is_constant_value(value)
    ]
    at_top = [
        value.name or "" for value in wanted if value.graph is model.graph and value.producer() is not None
    ]
    exposed = to_proto(model)
    present = {output.name for output in exposed.graph.output}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in at_top if name not in present)
    expected = dict(zip(at_top, run(exposed, built.feeds, at_top), strict=True))
    order = add_probes(model, wanted, [])
    (maxima,) = run(to_proto(model), built.feeds, [MAXIMA])
    assert set(order) == set(wanted)
    found = {value.name: top for value, top in zip(order, maxima, strict=True)}
    for name, array in expected.items():
        finite = np.abs(array[np.isfinite(array)])
        assert found[name] == pytest.approx(float(finite.max(initial=0)), rel=1e-6), name


def test_large_weights_round_alike_in_the_emulation() -> None:
    """Weights that are widened by a Cast equal those that are stored wide."""
    large, small = weight(16, 5000), weight(5000, 8)
    nodes = [
        dense("first", "x", "a"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        dense("second", "b", "y"),
    ]
    proto, _ = cast(network(nodes, {"first.w": large, "second.w": small}))
    emulated, _ = as_ir(proto)
    emulate(emulated, ir.DataType.FLOAT16)
    x = np.random.default_rng(3).standard_normal((2, 16)).astype(np.float32)
    (found,) = run(to_proto(emulated), {"x": x})
    half = FORMATS["fp16"]
    a = rounded(rounded(x, half) @ rounded(large, half), half)
    expected = rounded(np.maximum(a, 0) @ rounded(small, half), half)
    np.testing.assert_allclose(found, expected, rtol=2 * half.roundoff, atol=1e-5)
    assert not np.array_equal(found, np.maximum(x @ large, 0) @ small)
