"""Each rule against the op's real behaviour.

Where the rule is a signature: permuting the positions of a factor in all inputs that bear it must permute them in the
outputs that bear it, and leave the other outputs as they are. And every rule's signatures are compared with a
committed file; to write it anew::

    GRAPHPRUNE_SNAPSHOT=1 pytest tests/test_rules.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphprune.axes.flow import ChainFlow, Flow, ReshapeFlow, SignatureFlow, TakeFlow
from graphprune.axes.signature import Role, View
from graphprune.errors import RuleError
from graphprune.graph import Op
from graphprune.graph.twin import build_twin
from graphprune.model import as_ir
from graphprune.rules import Refusal, find_rule, flows_of, register, registered
from graphprune.rules.opaque import REFUSALS
from graphprune.rules.registry import _RULES
from graphprune.verification.difference import difference, tolerance_of
from tests.laws.contrib import contrib_suite
from tests.laws.node_suite import node_suite
from tests.laws.single import Single, literals, prune_open, run, weights

SNAPSHOT = Path(__file__).parent / "snapshots" / "signatures.txt"
#: Instances of one kind that are tried.
MOST = 12

#: Kinds whose behaviour is not tried here, each with the reason.
NOT_TRIED = {
    **{kind: f"refused: {reason}" for reason, kinds in REFUSALS.items() for kind in kinds.split()},
    "graphprune::Join": "a pseudo-op of the twin; its behaviour is that of If, Loop and Scan",
    "graphprune::Stack": "a pseudo-op of the twin; its behaviour is that of Loop and Scan",
    "graphprune::Unstack": "a pseudo-op of the twin; its behaviour is that of Scan",
    "com.microsoft::LayerNormalization": "ONNX Runtime registers it in the standard's domain",
    "com.microsoft::SimplifiedLayerNormalization": "ONNX Runtime registers it in the standard's domain",
}


def kind_of(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


@lru_cache(maxsize=1)
def instances() -> dict[str, list[Single]]:
    """Models of a single node, by kind."""
    found: dict[str, list[Single]] = {}
    for single in (*node_suite(), *contrib_suite()):
        if len(single.model.graph.node) == 1:
            found.setdefault(kind_of(single.model.graph.node[0]), []).append(literals(single))
    return found


def spread(models: list[Single], most: int) -> list[Single]:
    """At most so many, evenly from the whole list."""
    step = max(1, -(-len(models) // most))
    return models[::step]


def op_of(single: Single) -> Op:
    (op,) = build_twin(as_ir(single.model)[0]).ops
    return op


def moved(
    array: np.ndarray[Any, Any], view: View, sizes: dict[str, int], factor: str, order: Any
) -> np.ndarray[Any, Any]:
    """An operand with the positions of a factor permuted, in the part of it that a view speaks of."""
    array = array.copy()
    part = tuple(slice(*axis.take) if axis.take is not None else slice(None) for axis in view.axes)
    inner = array[part]
    shape: list[int] = []
    at = -1
    for axis, size in zip(view.axes, inner.shape, strict=True):
        if axis.factors is None:
            shape.append(size)
            continue
        for name in axis.factors:
            if name == factor:
                at = len(shape)
            shape.append(sizes[name])
    array[part] = inner.reshape(shape).take(order, axis=at).reshape(inner.shape)
    return array


def permuted(
    single: Single, flow: SignatureFlow, factor: str, order: Any, *, outputs: bool, values: dict[str, Any]
) -> dict[str, Any]:
    """All inputs (or outputs) with a factor's positions permuted."""
    node = single.model.graph.node[0]
    names = node.output if outputs else node.input
    values = dict(values)
    for view in flow.signature.views:
        if view.is_output is outputs and factor in view.factors:
            name = names[view.slot]
            if name in values:
                values[name] = moved(values[name], view, dict(flow.signature.sizes), factor, order)
    return values


def movable(flow: SignatureFlow) -> Iterator[str]:
    """Factors whose positions are interchangeable, as the signature says."""
    marked = {axis: flow.signature.role(axis) for axis in flow.signature.sizes}
    for factor, role in marked.items():
        bearers = [view for view in flow.signature.views if factor in view.factors]
        if (
            role in (Role.PASS, Role.CONTRACTED, Role.NORMALISED)
            and flow.signature.sizes[factor] > 1
            and bearers
        ):
            yield factor


def as_inputs(single: Single) -> tuple[Single, dict[str, Any]]:
    """All initializers as inputs again, for arrays of which only values change."""
    feeds = dict(single.feeds)
    for tensor in single.model.graph.initializer:
        feeds[tensor.name] = onnx.numpy_helper.to_array(tensor)
    model = onnx.ModelProto()
    model.CopyFrom(single.model)
    for tensor in model.graph.initializer:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    del model.graph.initializer[:]
    return Single(single.name, model, feeds), feeds


def permutations_hold(single: Single) -> tuple[int, list[str]]:
    """How many factors of a model's op were permuted, and what went wrong."""
    op = op_of(single)
    flows = flows_of(op)
    if isinstance(flows, Refusal):
        return 0, []
    free, feeds = as_inputs(single)
    wrong = []
    count = 0
    try:
        before = run(free.model, feeds)
    except Exception:
        return 0, []
    rng = np.random.default_rng(3)
    for flow in flows:
        if not isinstance(flow, SignatureFlow):
            continue
        for factor in movable(flow):
            order = np.roll(rng.permutation(flow.signature.sizes[factor]), 1)
            if (order == np.arange(len(order))).all():
                order = order[::-1]
            found = run(free.model, permuted(free, flow, factor, order, outputs=False, values=feeds))
            expected = permuted(free, flow, factor, order, outputs=True, values=before)
            count += 1
            for name, value in expected.items():
                error = difference(value, found[name])
                if not error <= tolerance_of(value.dtype):
                    wrong.append(
                        f"{single.name}: {factor!r} of {flow.signature.text!r}: {name!r} differs by {error:.2g}"
                    )
    return count, wrong


KINDS = [kind for kind in registered() if kind not in NOT_TRIED]


def test_every_registered_kind_has_an_instance() -> None:
    missing = [kind for kind in KINDS if kind not in instances()]
    assert not missing
    assert not [kind for kind in NOT_TRIED if kind not in registered()]


def is_signature(kind: str) -> bool:
    """True if the kind's rule describes some instance with a signature."""
    for single in spread(instances().get(kind, []), MOST):
        flows = flows_of(op_of(single))
        if not isinstance(flows, Refusal) and any(isinstance(flow, SignatureFlow) for flow in flows):
            return True
    return False


#: Kinds whose factors are not permuted, each with the reason.
UNMOVABLE = {
    "ReverseSequence": "its batch axis is computed separately for each sample, the other axes are reversed",
    "CumSum": "a running sum sees the order of what it sums",
    "LRN": "its window slides over neighbouring channels",
}


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_a_factor_permutes_the_outputs(kind: str) -> None:
    if kind in UNMOVABLE:
        print(f"{kind}: {UNMOVABLE[kind]}")
        return
    if not is_signature(kind):
        print(f"{kind}: its instances move elements or are refused; tests/test_flow.py tries moves")
        return
    total = 0
    first = spread(instances()[kind], MOST)
    for number, single in enumerate([*first, *(s for s in instances()[kind] if s not in first)]):
        if number >= MOST and total:
            break
        count, wrong = permutations_hold(single)
        assert not wrong
        total += count
    assert total > 0


@pytest.mark.parametrize("single", contrib_suite(), ids=lambda s: s.name)
@pytest.mark.parametrize("variant", [literals, weights], ids=["literals", "weights"])
def test_removal_equals_masking(single: Single, variant: Any) -> None:
    for seed in range(3):
        outcome = prune_open(variant(single), residual=True, seed=seed)
        assert (outcome.kind, outcome.detail) == ("exact", "")


# -- snapshot -------------------------------------------------------------------------------------------------------


def spelled(flow: Flow) -> str:
    if isinstance(flow, SignatureFlow):
        return flow.signature.text
    if isinstance(flow, TakeFlow):
        index = flow.index.tolist()
        return f"take axis {flow.axis} of size {flow.size} at {index if len(index) < 13 else f'{len(index)} positions'}"
    if isinstance(flow, ChainFlow):
        return "; ".join(map(spelled, flow.steps))
    assert isinstance(flow, ReshapeFlow)
    return f"reshape {flow.source_shape} to {flow.target_shape}"


def said_of(kind: str, single: Single) -> str:
    """The rule's word on one instance, and the attributes that hold sizes of factors."""
    op = op_of(single)
    flows = flows_of(op)
    rule = find_rule(op)
    assert rule is not None
    sizes = "".join(f"  [{name} = {' '.join(factors)}]" for name, factors in sorted(rule.attributes.items()))
    return (
        f"refused: {flows.reason}" if isinstance(flows, Refusal) else " and ".join(map(spelled, flows))
    ) + sizes


def written() -> Iterator[str]:
    """Up to four different things that each rule says, with the instance."""
    for kind in KINDS:
        texts: dict[str, str] = {}
        for single in spread(instances()[kind], MOST):
            texts.setdefault(said_of(kind, single), single.name)
        for text, name in list(texts.items())[:4]:
            yield f"{kind} | {name} | {text}"


def test_signatures_are_as_committed() -> None:
    """Compared are the instances that the installed onnx has, nearly all."""
    if os.environ.get("GRAPHPRUNE_SNAPSHOT"):
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text("\n".join(written()) + "\n", encoding="utf-8")
    committed = [line.split(" | ", 2) for line in SNAPSHOT.read_text(encoding="utf-8").splitlines()]
    assert {kind for kind, _, _ in committed} == set(KINDS)
    by_name = {(kind, single.name): single for kind, found in instances().items() for single in found}
    compared = 0
    for kind, name, text in committed:
        if (kind, name) in by_name:
            assert (kind, name, said_of(kind, by_name[kind, name])) == (kind, name, text)
            compared += 1
    assert compared > 0.9 * len(committed)


# -- the registry -----------------------------------------------------------------------------------------------------


def test_a_malformed_signature_is_refused_at_registration() -> None:
    with pytest.raises(RuleError, match="expected a factor"):
        register("com.acme::Broken", "n ( -> n")
    assert "com.acme::Broken" not in registered()


def test_a_rule_for_an_op_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.rules.registry._RULES", dict(_RULES))
    op = Op("ScaleShift", "com.acme", 1, {}, [], [])
    assert find_rule(op) is None
    flows = flows_of(op)
    assert isinstance(flows, Refusal)
    assert flows.reason == "there is no rule for com.acme::ScaleShift"
    register("com.acme::ScaleShift", "n c S*, c, c -> n c S*")
    assert find_rule(op) is not None
    assert "com.acme::ScaleShift" in registered()


def test_the_standard_domain_has_two_spellings() -> None:
    assert find_rule(Op("Relu", "ai.onnx", 13, {}, [], [])) is find_rule(Op("Relu", "", 13, {}, [], []))
