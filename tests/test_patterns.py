"""Every pattern is alive, is pruned where it must be and nowhere else, and equals its masked original.

The last is checked twice: by graphprune's own verification, and by an oracle that shares nothing with it but the plan
(zero what was removed in the original's initializers, run both models, compare).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import graphprune

from .patterns import FAMILIES, PATTERNS, Built, Pattern, run

TOLERANCE = 1e-4  # of the output's scale
MOVEMENT = {
    "Transpose",
    "Reshape",
    "Identity",
    "Gather",
    "Unsqueeze",
    "Squeeze",
    "Slice",
    "Cast",
    "DequantizeLinear",
}
OPERANDS = {
    "Conv": (1,), "ConvTranspose": (1,), "FusedConv": (1,), "Attention": (1,),
    "MatMul": (0, 1), "FusedMatMul": (0, 1), "Gemm": (0, 1), "Einsum": (0, 1),
    "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2),
}  # fmt: skip

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
exact_patterns = pytest.mark.parametrize(
    "pattern", [p for p in PATTERNS if p.oracle != "none"], ids=lambda p: p.name
)


@functools.cache
def built(pattern: Pattern) -> Built:
    return pattern.build()


def prune(pattern: Pattern, **keywords: Any) -> tuple[onnx.ModelProto, Any]:
    """The pattern's model pruned, verification on; ratios are exact (round_to=1)."""
    options: dict[str, Any] = {
        "channels": 0.5,
        "round_to": 1,
        "residual": pattern.residual,
        "input_shapes": pattern.input_shapes,
    }
    pruned, report = graphprune.prune(built(pattern).model, **(options | keywords))
    return pruned, report


@functools.cache
def halved(pattern: Pattern) -> tuple[onnx.ModelProto, Any]:
    return prune(pattern)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for graph in graphs(model.graph) for t in graph.initializer}


def rewritten(model: onnx.ModelProto, change: Callable[[str, np.ndarray], np.ndarray]) -> onnx.ModelProto:
    """A copy of the model with every initializer passed through `change(name, value)`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name, tensor in initializers(copy).items():
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(change(name, value).astype(value.dtype), name))
    return copy


def axis_size(model: onnx.ModelProto, feeds: dict[str, np.ndarray], name: str, axis: int) -> int:
    """The size of an axis of an initializer or, by running the model, of a value of the outer graph."""
    found = initializers(model).get(name)
    if found is not None:
        return int(found.dims[axis])
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    if name not in {o.name for o in probe.graph.output}:
        probe.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return int(run(probe, feeds, [name])[0].shape[axis])


def contraction_operands(model: onnx.ModelProto) -> set[str]:
    """Initializers that reach a contraction's weight input, directly or through data movement."""
    nodes = [node for graph in graphs(model.graph) for node in graph.node]
    producer = {name: node for node in nodes for name in node.output}
    waiting = [node.input[i] for node in nodes for i in OPERANDS.get(node.op_type, ()) if i < len(node.input)]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in producer and producer[name].op_type in MOVEMENT:
            waiting.append(producer[name].input[0])
        elif name not in producer:
            found.add(name)
    return found


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the scale of `theirs`; any difference of integers is infinite."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if not np.issubdtype(ours.dtype, np.floating):
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    return float(np.abs(ours - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), 1e-6))


def results(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs; those of an If for both values of its flag, one run after the other."""
    flags = [name for name, value in feeds.items() if value.dtype == bool]
    cases = [
        feeds | {name: np.asarray(value) for name in flags} for value in (False, True)[: 1 + bool(flags)]
    ]
    return [output for case in cases for output in run(model, case)]


# -- the patterns themselves ---------------------------------------------------------------------------------------


def test_names_are_unique_and_every_family_has_patterns() -> None:
    names = [pattern.name for pattern in PATTERNS]
    assert len(set(names)) == len(names)
    assert all(family.PATTERNS for family in FAMILIES)


@every_pattern
def test_alive(pattern: Pattern) -> None:
    """The model is valid, its output is finite and varies, and every one of its weights moves it."""
    model, feeds, weights = built(pattern).model, built(pattern).feeds, built(pattern).weights
    onnx.checker.check_model(model, full_check=True)
    outputs = results(model, feeds)
    assert all(np.isfinite(o).all() for o in outputs)
    assert any(np.unique(o).size > 1 for o in outputs)
    rng = np.random.default_rng(0)
    for weight in weights:
        for _ in range(20):  # an ArgMax or TopK may hide one change, not twenty
            noise = rng.uniform(0.3, 1.7)

            def shake(name: str, value: np.ndarray, weight: str = weight, noise: float = noise) -> np.ndarray:
                if name != weight:
                    return value
                if np.issubdtype(value.dtype, np.floating):
                    return np.asarray(value * noise + rng.standard_normal(value.shape) * np.abs(value).mean())
                return np.asarray(rng.permuted(value))

            moved = results(rewritten(model, shake), feeds)
            if any(not np.array_equal(a, b) for a, b in zip(outputs, moved, strict=True)):
                break
        else:
            pytest.fail(f"{weight} does not reach the output")


@every_pattern
def test_declarations_alive(pattern: Pattern) -> None:
    """What is expected of a pattern names axes that exist, and none of them twice."""
    model, feeds, _ = built(pattern)
    fixed = [(name, axis) for name, axis, _ in pattern.frozen]
    assert pattern.shrinks
    assert not set(pattern.shrinks) & set(fixed)
    assert len(set(pattern.shrinks)) == len(pattern.shrinks)
    for name, axis in [*pattern.shrinks, *fixed]:
        assert axis_size(model, feeds, name, axis) >= (1 if (name, axis) in fixed else 2), name


# -- pruning ---------------------------------------------------------------------------------------------------------


@every_pattern
def test_half_goes_where_it_must_and_nowhere_else(pattern: Pattern) -> None:
    model, feeds, _ = built(pattern)
    pruned, report = halved(pattern)
    onnx.checker.check_model(pruned, full_check=True)
    assert report.parameters_after < report.parameters_before

    def sizes(name: str, axis: int) -> tuple[int, int]:
        return axis_size(model, feeds, name, axis), axis_size(pruned, feeds, name, axis)

    kept = {key: sizes(*key) for key in pattern.shrinks}
    held = {(name, axis): sizes(name, axis) for name, axis, _ in pattern.frozen}
    reasons = {(name, axis): reason for name, axis, reason in pattern.frozen}
    assert not {key: pair for key, pair in kept.items() if pair[0] <= pair[1]}, "did not shrink"
    assert not {(*key, reasons[key]): pair for key, pair in held.items() if pair[0] != pair[1]}, "changed"


@every_pattern
def test_interface_stays(pattern: Pattern) -> None:
    """Inputs and outputs keep names, order, types and shapes, the dynamic dimensions too; so do the results."""
    model, feeds, _ = built(pattern)
    pruned, _ = halved(pattern)
    for before, after in ((model.graph.input, pruned.graph.input), (model.graph.output, pruned.graph.output)):
        assert [v.name for v in before] == [v.name for v in after]
        assert [v.type for v in before] == [v.type for v in after]
    for before, after in zip(results(model, feeds), results(pruned, feeds), strict=True):
        assert before.dtype == after.dtype
        assert before.shape == after.shape or before.dtype == np.int64  # how many boxes survive is data


@every_pattern
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.8])
def test_other_ratios(pattern: Pattern, ratio: float) -> None:
    """Graphprune's own verification passes, and ONNX Runtime agrees on a batch of noise it has not seen."""
    pruned, report = prune(pattern, channels=ratio)
    assert report.max_error <= TOLERANCE
    assert all(np.isfinite(o).all() for o in results(pruned, built(pattern).feeds))


@every_pattern
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_importance(pattern: Pattern, seed: int) -> None:
    """Which positions go must not matter: random scores find couplings that a sensible score hides."""
    pruned, report = prune(pattern, score="random", seed=seed)
    assert report.max_error <= TOLERANCE
    assert all(np.isfinite(o).all() for o in results(pruned, built(pattern).feeds))


def assert_equals_zeroed(pattern: Pattern, pruned: onnx.ModelProto, report: Any) -> None:
    model, feeds, _ = built(pattern)
    masks: dict[str, np.ndarray] = report.plan.masks
    zeroed = contraction_operands(model) if pattern.oracle == "weights" else set(initializers(model))
    cut = {name for name in zeroed & set(masks) if not masks[name].all()}
    assert cut, "the plan removes nothing from any weight"
    masked = rewritten(model, lambda name, value: np.where(masks[name], value, 0) if name in cut else value)
    expected, original = results(masked, feeds), results(model, feeds)
    assert any(not np.array_equal(a, b) for a, b in zip(expected, original, strict=True)), (
        "the mask masks nothing"
    )
    errors = [distance(ours, theirs) for ours, theirs in zip(results(pruned, feeds), expected, strict=True)]
    assert max(errors) <= TOLERANCE, dict(zip([o.name for o in model.graph.output] * 2, errors, strict=False))


@exact_patterns
def test_pruned_equals_original_with_zeroed_weights(pattern: Pattern) -> None:
    assert_equals_zeroed(pattern, *halved(pattern))


@exact_patterns
@pytest.mark.parametrize("seed", [4, 5])
def test_pruned_equals_zeroed_under_random_importance(pattern: Pattern, seed: int) -> None:
    assert_equals_zeroed(pattern, *prune(pattern, score="random", seed=seed, channels=0.4))


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.differ], ids=lambda p: p.name)
def test_shared_constants_couple_nothing(pattern: Pattern) -> None:
    """Layers that share a bias keep channels of their own.

    The score is random: by magnitude the vector that both share can rank the channels of both alike.
    """
    masks = prune(pattern, score="random", seed=1)[1].plan.masks

    def kept(name: str, axis: int) -> list[int]:
        others = tuple(i for i in range(masks[name].ndim) if i != axis)
        return [int(i) for i in np.flatnonzero(masks[name].any(axis=others))]

    for one, other in pattern.differ:
        assert kept(*one) != kept(*other)
