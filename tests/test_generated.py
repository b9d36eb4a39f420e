"""Laws on generated graphs.

Without more said, 60 graphs a law, always the same. For as many as one likes, at random::

    GRAPHPRUNE_EXAMPLES=2000 pytest tests/test_generated.py
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphprune
from graphprune.axes.analysis import Analysis
from graphprune.errors import NothingToPruneError
from graphprune.graph import Tensor
from graphprune.graph.twin import build_twin
from graphprune.model import as_ir
from graphprune.plan import Plan
from tests.laws.graphs import graphs
from tests.laws.single import run

law = settings(
    deadline=None,
    max_examples=int(os.environ.get("GRAPHPRUNE_EXAMPLES", "60")),
    derandomize="GRAPHPRUNE_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
ratios = st.sampled_from([0.2, 0.3, 0.5])


def names(model: onnx.ModelProto) -> str:
    """The graph as text, for hypothesis to show."""
    return str(onnx.printer.to_text(model))


@law
@given(graphs())
def test_generated_graphs_are_valid_and_run(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    rng = np.random.default_rng(0)
    feeds = {
        value.name: rng.standard_normal([d.dim_value for d in value.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for value in model.graph.input
    }
    assert all(np.isfinite(output).all() for output in run(model, feeds).values())


@law
@given(graphs(), ratios, st.booleans(), st.integers(0, 5))
def test_removal_equals_masking(model: onnx.ModelProto, channels: float, residual: bool, seed: int) -> None:
    before = model.SerializeToString()
    try:
        pruned, report = graphprune.prune(
            model, channels, round_to=1, residual=residual, score="random", seed=seed
        )  # verifies
    except NothingToPruneError:
        return
    finally:
        assert model.SerializeToString() == before
    assert report.plan.cuts
    assert report.macs_after <= report.macs_before
    assert [value.name for value in pruned.graph.output] == [value.name for value in model.graph.output]


def fingerprint(model: onnx.ModelProto) -> dict[int, bool]:
    """For each free label what it covers, as a number; and whether it is statistical.

    What a frozen label covers is not worked out to the end: it is not carried on. Elements are named by their tensor
    and position, so that the result does not depend on the numbers of labels.
    """
    analysis = Analysis(build_twin(as_ir(model)[0]))
    total = np.zeros(len(analysis.atoms), dtype=np.uint64)
    for tensor in analysis.colourings:
        covered: set[tuple[int, int]] = set()
        for labels in analysis.labellings(tensor):
            whole = np.broadcast_to(labels, tensor.shape or ()).ravel()
            covered |= set(zip(whole.tolist(), range(whole.size), strict=True))
        name = element_name(tensor)
        with np.errstate(over="ignore"):
            for label, position in covered:
                if label:
                    total[label] += np.uint64(hash((name, position)) & (2**64 - 1)) * np.uint64(
                        0x9E3779B97F4A7C15
                    )
    found = {}
    for label in analysis.labels().tolist():
        if analysis.atoms.frozen(label) is None:
            found[int(total[label])] = analysis.atoms.statistical(label) is not None
    return found


def element_name(tensor: Tensor) -> tuple[Any, ...]:
    """Twins name the uses of a weight apart, in their order: name it by its readers."""
    value = tensor.value.name if tensor.value is not None else tensor.name
    readers = {(op.outputs[0].name, slot) for op, slot in tensor.uses if op.outputs[0] is not None}
    return (value, *sorted(readers)) if tensor.constant else (value,)


def reordered(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Another topological order of the nodes, another order of the initializers."""
    rng = np.random.default_rng(seed)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    ready = {v.name for v in (*model.graph.input, *model.graph.initializer)} | {""}
    waiting = list(model.graph.node)
    del result.graph.node[:], result.graph.initializer[:]
    while waiting:
        fitting = [i for i, node in enumerate(waiting) if ready.issuperset(node.input)]
        node = waiting.pop(int(rng.choice(fitting)))
        ready.update(node.output)
        result.graph.node.append(node)
    result.graph.initializer.extend(
        [model.graph.initializer[i] for i in rng.permutation(len(model.graph.initializer))]
    )
    return result


@law
@given(graphs(), st.integers(0, 1000))
def test_groups_do_not_depend_on_the_order_of_analysis(model: onnx.ModelProto, seed: int) -> None:
    assert fingerprint(model) == fingerprint(reordered(model, seed))


@law
@given(graphs(), ratios, st.integers(0, 5))
def test_a_plan_gives_the_same_bytes_again(model: onnx.ModelProto, channels: float, seed: int) -> None:
    options: dict[str, Any] = {"score": "random", "seed": seed, "verify": False}
    try:
        first, report = graphprune.prune(model, channels, round_to=1, **options)
    except NothingToPruneError:
        return
    again = graphprune.prune(model, channels, round_to=1, **options)[0]
    plan = Plan.from_dict(json.loads(json.dumps(report.plan.to_dict())))
    planned, planned_report = graphprune.prune(model, plan=plan, verify=False)
    assert first.SerializeToString() == again.SerializeToString() == planned.SerializeToString()
    assert planned_report.plan.cuts == report.plan.cuts
    shapes = {tensor.name: tuple(tensor.dims) for tensor in first.graph.initializer}
    for name, mask in report.plan.masks.items():
        kept = int(np.broadcast_to(mask, report.plan.shapes[name]).sum())
        assert name not in shapes or np.prod(shapes[name]) == kept


@law
@given(graphs(), ratios)
def test_which_positions_go_does_not_decide_how_many(model: onnx.ModelProto, channels: float) -> None:
    sizes = []
    for seed in (1, 2):
        try:
            report = graphprune.prune(model, channels, round_to=1, score="random", seed=seed, verify=False)[1]
        except NothingToPruneError:
            return
        sizes.append({cut.group: len(cut.removed) for cut in report.plan.cuts})
    assert sizes[0] == sizes[1]


@law
@given(graphs())
def test_labellings_are_sound(model: onnx.ModelProto) -> None:
    """They are representatives, broadcast against their tensors, and no free label is all there is of a tensor."""
    analysis = Analysis(build_twin(as_ir(model)[0]))
    for tensor in analysis.colourings:
        for labels in analysis.labellings(tensor):
            assert labels.dtype == np.int32
            assert labels.any()
            assert np.array_equal(labels, analysis.atoms.find(labels))
            assert all(size in (1, full) for size, full in zip(labels.shape, tensor.shape or (), strict=True))
            assert labels.min() != labels.max() or analysis.atoms.all_frozen(labels)
