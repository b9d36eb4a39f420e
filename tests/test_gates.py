"""Gates stand for removal: at 0 the network is its masked form, at 1 their derivatives are those of the network."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphprune.axes.labels import Labels
from graphprune.errors import OptionError
from graphprune.gradients.gates import Gate, find_gates, free_labels, sample_positions
from graphprune.gradients.vjp.emit import Value
from graphprune.gradients.vjp.program import Place, Program
from graphprune.graph import TWIN_DOMAIN, Graph, Tensor
from graphprune.graph.twin import build_twin
from graphprune.masked import SWITCH, mask_model
from graphprune.model import as_ir, to_proto
from graphprune.network import Network
from graphprune.pipeline import analyze_ir, reference_of
from graphprune.plan import Masks

from .derivatives import Array, in_double, in_runtime, slope
from .patterns import PATTERNS, Pattern

#: Patterns through which no gradient goes, and what is said about it.
REFUSED = {
    "grid_sample": "there is no derivative rule for GridSample",
    "lstm_with_peepholes": "it has peepholes",
    "if_with_outer_weights": "through If",
    "if_with_hidden_layers": "through If",
    "if_with_weights_of_its_own": "through If",
    "loop_carries_a_state": "through Loop|comes from an If, Loop or Scan",
    "loop_with_scan_output": "through Loop",
    "scan_as_a_recurrent_cell": "through Scan",
    "ms_attention": "no derivative rule for com.microsoft::Attention",
    "ms_attention_with_narrow_values": "no derivative rule for com.microsoft::Attention",
    "ms_multi_head_attention": "no derivative rule for com.microsoft::MultiHeadAttention",
    "ms_multi_head_attention_with_bias": "no derivative rule for com.microsoft::MultiHeadAttention",
    "ms_group_query_attention": "no derivative rule for com.microsoft::GroupQueryAttention",
    "ms_fused_conv": "no derivative rule for com.microsoft::FusedConv",
    "ms_rotary_embedding": "no derivative rule for com.microsoft::",
}
#: Rounding has no slope (what counts as one is tested beside the rules), and jumps where kernels differ.
ROUNDED = {"qdq_per_axis_conv", "qdq_matmul", "qdq_per_axis_activation"}
#: No real output: nothing to take a derivative of.
INTEGRAL = {"argmax_head"}
#: Labels that nothing reads, and that have no gate therefore.
UNREAD = {"channel_gather": 6, "gather_nd": 6, "gather_elements": 6}

#: Patterns in which samples cannot be told apart.
UNKNOWN = {"roi_align", "non_max_suppression_head"}

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
smooth_patterns = pytest.mark.parametrize(
    "pattern",
    [p for p in PATTERNS if p.name not in REFUSED.keys() | ROUNDED | INTEGRAL],
    ids=lambda p: p.name,
)


@dataclass
class Gated:
    """A pattern with a gate for each label that may go.

    Attributes:
        network: The analysed pattern.
        twin: The twin at the sizes of its feeds.
        labels: The labels, in the order of the gates.
        column: By label its gate's number from 1; 0 for others.
        places: Labellings by operand.
    """

    network: Network
    twin: Graph
    feeds: dict[str, Array]
    gates: list[Gate]
    labels: Labels
    column: np.ndarray[tuple[int], np.dtype[np.int64]]
    places: dict[Place, list[Labels]]

    @property
    def real_outputs(self) -> list[Tensor]:
        return [
            t
            for t in self.twin.outputs
            if t.dtype is not None and t.dtype.is_floating_point() and not t.constant
        ]

    def forward(self, dtype: type) -> onnx.ModelProto:
        """A model of the real outputs with an input ``gates``; the first gate is that of label 0."""
        program = Program(self.twin, dtype)
        gates = program.seed("gates", (len(self.labels) + 1,))
        factors: dict[Place, Value] = {}
        for place, labellings in self.places.items():
            for labels in labellings:
                factor = gates.take(self.column[labels], 0)
                factors[place] = factors[place] * factor if place in factors else factor
        program.write_forward(factors)
        for tensor in self.real_outputs:
            program.output(program.value(tensor))
        return program.finish()

    def gradient(self, weights: dict[Tensor, Array], dtype: type) -> onnx.ModelProto:
        """A model of the derivatives of ``sum(weights * outputs)`` by every gate of every place."""
        program = Program(self.twin, dtype)
        program.write_forward()
        seeds = {tensor: program.e.lift(array) for tensor, array in weights.items()}
        found, _ = program.adjoints(seeds, self.places)
        for place in self.places:
            tensor = place.op.inputs[place.slot]
            assert tensor is not None
            value = program.value(tensor)
            program.output(value * found[place] if place in found else program.e.zeros(value.shape))
        return program.finish()

    def by_gate(self, products: list[Array]) -> Array:
        total = np.zeros(len(self.labels) + 1)
        for product, labellings in zip(products, self.places.values(), strict=True):
            for labels in labellings:
                np.add.at(total, np.broadcast_to(self.column[labels], product.shape), product)
        return total[1:]


@functools.cache
def gated(pattern: Pattern) -> Gated:
    built = pattern.build()
    network = analyze_ir(as_ir(built.model)[0], pattern.input_shapes or None)
    twin = build_twin(network.model, {name: array.shape for name, array in built.feeds.items()})
    gates = find_gates(network.analysis, free_labels(network.analysis))
    labels = np.unique(np.concatenate([np.zeros(1, np.int32), *(g.labels.ravel() for g in gates)]))[1:]
    column = np.zeros(len(network.analysis.atoms), dtype=np.int64)
    column[labels] = np.arange(1, len(labels) + 1)
    places: dict[Place, list[Labels]] = {}
    for gate in gates:
        places.setdefault(Place(twin.ops[gate.op.index], gate.slot), []).append(gate.labels)
    return Gated(network, twin, built.feeds, gates, labels, column, places)


def in_type(feeds: dict[str, Array], dtype: type) -> dict[str, Array]:
    return {name: array.astype(dtype) if array.dtype.kind == "f" else array for name, array in feeds.items()}


@every_pattern
def test_every_label_that_is_read_has_a_gate(pattern: Pattern) -> None:
    found = gated(pattern)
    free = [g.labels for g in found.network.groups if g.frozen is None and g.statistical is None]
    missing = set(np.concatenate([np.zeros(0, np.int32), *free]).tolist()) - set(found.labels.tolist())
    assert len(missing) == UNREAD.get(pattern.name, 0)


@smooth_patterns
def test_closed_gates_are_masks(pattern: Pattern) -> None:
    """Gates at 0 give the masked original to 1e-5 of its scale, in single precision."""
    found = gated(pattern)
    groups = [g for g in found.network.groups if g.frozen is None and g.statistical is None]
    rng = np.random.default_rng(0)
    removed = np.concatenate(
        [np.zeros(0, np.int32), *(rng.permutation(g.labels)[: g.size // 2] for g in groups)]
    )
    masks = Masks(found.network.analysis, removed)
    reference, node_of = reference_of(found.network, None)
    mask_model(reference, node_of, found.network.analysis, masks, {})
    masked = to_proto(reference)
    names = [output.name for output in masked.graph.output]
    expected = dict(zip(names, in_runtime(masked)({**found.feeds, SWITCH: np.asarray(False)}), strict=True))
    gates = np.ones(len(found.labels) + 1, np.float32)
    gates[found.column[removed]] = 0
    gates[0] = 1
    results = in_runtime(found.forward(np.float32))({**in_type(found.feeds, np.float32), "gates": gates})
    for tensor, result in zip(found.real_outputs, results, strict=True):
        wanted = expected[tensor.name]
        np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()) + 1e-7)


@smooth_patterns
def test_derivatives_by_gates_equal_central_differences(pattern: Pattern) -> None:
    """To 1e-5 in double precision.

    Ops that only ONNX Runtime has run in single precision, to 2e-2 at the better of two steps: a long one meets the
    kinks of a ReLU, a short one rounding.
    """
    found = gated(pattern)
    kinds = {op.kind for op in found.twin.ops if op.domain not in ("", TWIN_DOMAIN)}
    # ONNX's own ConvTranspose does not know groups that are narrower than the input.
    single = bool(kinds) or pattern.name == "conv_transpose_groups"
    dtype = np.float32 if single else np.float64
    run = in_runtime if single else in_double
    rng = np.random.default_rng(0)
    weights = {t: rng.standard_normal(t.shape or ()) for t in found.real_outputs}
    feeds = in_type(found.feeds, dtype)
    if not found.places:
        assert all(group.frozen for group in found.network.groups)
        return
    gradient = found.by_gate(run(found.gradient(weights, dtype))(feeds))
    primal = run(found.forward(dtype))

    def loss(gates: Array) -> float:
        results = primal({**feeds, "gates": np.concatenate([[1.0], gates]).astype(dtype)})
        pairs = zip(weights.values(), results, strict=True)
        return float(sum((weight * result.astype(np.float64)).sum() for weight, result in pairs))

    ones = np.ones(len(found.labels))
    for _ in range(3):
        along = rng.standard_normal(len(ones))
        steps = (1e-3, 1e-4) if single else (1e-7,)
        error = min(abs(slope(loss, ones, along, step) - gradient @ along) for step in steps)
        assert error <= (2e-2 if single else 1e-5) * np.linalg.norm(gradient)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.name in REFUSED], ids=lambda p: p.name)
def test_a_refusal_says_why(pattern: Pattern) -> None:
    found = gated(pattern)
    weights = {tensor: np.ones(tensor.shape or ()) for tensor in found.real_outputs}
    with pytest.raises(OptionError, match=REFUSED[pattern.name]):
        found.gradient(weights, np.float32)


# -- samples --------------------------------------------------------------------------------------------------------


@smooth_patterns
def test_samples_are_known_in_every_tensor(pattern: Pattern) -> None:
    """What another sample holds changes nothing at the positions of a sample."""
    found = gated(pattern)
    twin = found.twin
    axes = {name: array.shape.index(2) for name, array in found.feeds.items() if 2 in array.shape}
    if not axes:
        assert pattern.name == "gemm_transposes"  # its input has one axis of samples, of another size
        return
    positions = sample_positions(twin, axes, 2)
    if pattern.name in UNKNOWN:
        assert positions is None
        return
    assert positions is not None
    program = Program(twin)
    program.write_forward()
    tensors = [t for t in positions if t.producer is not None and t.dtype in (ir.DataType.FLOAT, None)]
    for tensor in tensors:
        program.output(program.value(tensor))
    run = in_runtime(program.finish())
    feeds = in_type(found.feeds, np.float32)
    other = {name: array.copy() for name, array in feeds.items()}
    for name, axis in axes.items():
        second = np.moveaxis(other[name], axis, 0)[1]  # a view
        second[...] = np.roll(second, 1)
    some = False
    for tensor, before, after in zip(tensors, run(feeds), run(other), strict=True):
        changed = before != after
        theirs = np.broadcast_to(positions[tensor] == 1, changed.shape)
        assert not (changed & ~theirs).any(), tensor
        some |= bool(changed.any())
    assert some


def test_samples_that_mix_are_noticed() -> None:
    """A product of the batch with itself."""
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"]),
        onnx.helper.make_node("Transpose", ["h"], ["t"], perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["t", "h"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "gram",
        [onnx.helper.make_tensor_value_info("x", 1, (3, 4))],
        [onnx.helper.make_tensor_value_info("y", 1, (5, 5))],
        [onnx.numpy_helper.from_array(np.ones((4, 5), np.float32), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    twin = build_twin(as_ir(model)[0])
    assert sample_positions(twin, {"x": 0}, 3) is None
