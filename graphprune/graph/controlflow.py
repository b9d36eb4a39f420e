"""If, Loop and Scan laid out flat: the ops of their bodies, joined to the graph around them by pseudo-ops.

The pseudo-ops (domain :data:`graphprune.graph.TWIN_DOMAIN`) say which tensors must agree along every axis:

``Join``
    All its inputs and outputs are the same tensor at different times. If: ``[then, else] -> [out]``, or
    ``[taken] -> [out]`` where the condition is known. Loop and Scan: ``[initial, body_out] -> [body_in, final]``,
    where ``body_out`` is made by a later op.
``Stack``
    ``[body_out] -> [out]``: ``out`` has one more axis, attribute ``axis``, as long as the number of iterations.
``Unstack``
    ``[x] -> [body_in]``: one slice of ``x`` along ``axis``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphprune.graph import TWIN_DOMAIN, Op, Tensor

if TYPE_CHECKING:
    from graphprune.graph.walk import Scope, Walk

#: Size of a stacked axis where the number of iterations is not known before the run.
UNKNOWN_ITERATIONS = 4


def walk_if(walk: Walk, node: ir.Node, scope: Scope) -> None:
    """Walks the taken branch where the condition is known, both where it is not."""
    branches = [_body(walk, node, scope, name) for name in ("then_branch", "else_branch")]
    condition = walk.operand(node.inputs[0], scope, keep=False)
    key = (*scope.path, node)
    if condition is not None and condition.data is not None and condition.data.size == 1:
        taken = bool(condition.data.reshape(()))
        walk.decisions[key] = taken
        if key not in walk.undecided:
            branches = [branches[0 if taken else 1]]
    for branch in branches:
        walk.walk_nodes(branch, scope)
    for k, value in enumerate(node.outputs):
        inputs: list[Tensor | None] = [walk.read(branch.outputs[k], scope) for branch in branches]
        output = walk.new_tensor(scope, value)
        walk.add_op(node, scope, "Join", TWIN_DOMAIN, {}, inputs, [output])
        _copy_type(walk, inputs[0], output)
        if len(inputs) == 1 and inputs[0] is not None:
            output.data = inputs[0].data
        elif inputs[1] is not None and inputs[1].shape != output.shape:
            _use_hint(walk, scope, value, output)


def walk_loop(walk: Walk, node: ir.Node, scope: Scope) -> None:
    """Walks the body once; carried values are joined, scan outputs stacked."""
    body = _body(walk, node, scope, "body")
    initial = [walk.operand(value, scope) for value in node.inputs[2:]]

    def enter() -> None:
        walk.new_tensor(scope, body.inputs[0], ir.DataType.INT64, ())
        walk.new_tensor(scope, body.inputs[1], ir.DataType.BOOL, ())

    finals = node.outputs[: len(initial)]
    _iterate(walk, node, scope, body, initial, body.inputs[2:], body.outputs[1:], finals, enter)
    trips = _trips(walk, node, scope, body)
    for value, result in zip(node.outputs[len(initial) :], body.outputs[1 + len(initial) :], strict=False):
        _stack(walk, node, scope, result, value, 0, trips)


def walk_scan(walk: Walk, node: ir.Node, scope: Scope) -> None:
    """Walks the body once; scan inputs are unstacked, states joined, scan outputs stacked."""
    if scope.opsets.get("", 1) < 9:  # Scan-8 has a batch axis and sequence lengths: no rule covers it
        walk.walk_plain(node, scope)
        return
    body = _body(walk, node, scope, "body")
    attributes = walk.attributes(node, scope)
    count = int(attributes["num_scan_inputs"])
    states = len(node.inputs) - count
    operands = [walk.operand(value, scope) for value in node.inputs]
    in_axes: Sequence[int] = attributes.get("scan_input_axes") or [0] * count
    out_axes: Sequence[int] = attributes.get("scan_output_axes") or [0] * (len(node.outputs) - states)
    trips: int | None = None
    for operand, axis in zip(operands[states:], in_axes, strict=True):
        if operand is not None and operand.shape is not None:
            trips = operand.shape[axis]

    def enter() -> None:
        for operand, axis, value in zip(operands[states:], in_axes, body.inputs[states:], strict=True):
            tensor = walk.new_tensor(scope, value)
            if operand is not None:
                tensor.dtype = operand.dtype
                if operand.shape is not None:
                    axis %= len(operand.shape)
                    tensor.shape = operand.shape[:axis] + operand.shape[axis + 1 :]
            walk.add_op(node, scope, "Unstack", TWIN_DOMAIN, {"axis": axis}, [operand], [tensor])

    finals = node.outputs[:states]
    _iterate(walk, node, scope, body, operands[:states], body.inputs[:states], body.outputs, finals, enter)
    for k, axis in enumerate(out_axes):
        _stack(walk, node, scope, body.outputs[states + k], node.outputs[states + k], axis, trips)


def _iterate(
    walk: Walk,
    node: ir.Node,
    scope: Scope,
    body: ir.Graph,
    initial: Sequence[Tensor | None],
    entering: Sequence[ir.Value],
    leaving: Sequence[ir.Value],
    finals: Sequence[ir.Value],
    enter: Callable[[], None],
) -> None:
    """Walks a body until the shapes of its carried values settle: one that changes is of unknown shape."""
    changing: set[int] = set()
    while True:
        mark = walk.mark()
        joins: list[Op] = []
        for k, value in enumerate(entering):
            first, last = initial[k], walk.new_tensor(scope, finals[k])
            carried = walk.new_tensor(scope, value)
            for tensor in (carried, last):
                _copy_type(walk, first, tensor)
                if k in changing:
                    tensor.shape = None
            joins.append(walk.add_op(node, scope, "Join", TWIN_DOMAIN, {}, [first, None], [carried, last]))
        enter()
        walk.walk_nodes(body, scope)
        changed = False
        for k, join in enumerate(joins):
            result = walk.read(leaving[k], scope)
            join.inputs[1] = result
            carried = scope.tensors[entering[k]]
            if k not in changing and result.shape != carried.shape:
                changing.add(k)
                changed = True
        if not changed:
            break
        walk.rewind(mark)
    for k in changing:
        _use_hint(walk, scope, finals[k], scope.tensors[finals[k]])


def _stack(
    walk: Walk,
    node: ir.Node,
    scope: Scope,
    result: ir.Value,
    value: ir.Value,
    axis: int,
    trips: int | None,
) -> None:
    item = walk.read(result, scope)
    output = walk.new_tensor(scope, value, item.dtype)
    if item.shape is not None:
        axis %= len(item.shape) + 1
        length = UNKNOWN_ITERATIONS + walk.stretch if trips is None else trips
        output.shape = (*item.shape[:axis], length, *item.shape[axis:])
    walk.add_op(node, scope, "Stack", TWIN_DOMAIN, {"axis": axis}, [item], [output])
    if trips is None:
        walk.guessed.append(output)


def _trips(walk: Walk, node: ir.Node, scope: Scope, body: ir.Graph) -> int | None:
    """Number of iterations of a Loop; None if it depends on contents."""
    limit = walk.operand(node.inputs[0], scope, keep=False) if len(node.inputs) > 0 else None
    condition = walk.operand(node.inputs[1], scope, keep=False) if len(node.inputs) > 1 else None
    if condition is not None:
        if condition.data is None:
            return None
        if not bool(np.all(condition.data)):
            return 0
    if limit is None or limit.data is None or limit.data.size != 1:
        return None
    # The body's own condition: passed through, or known to be true.
    going_on = body.outputs[0]
    producer = going_on.producer()
    while producer is not None and producer.op_type == "Identity" and producer.inputs[0] is not None:
        going_on = producer.inputs[0]
        producer = going_on.producer()
    if going_on is not body.inputs[1]:
        known = walk.read(going_on, scope, keep=False).data
        if known is None or not bool(np.all(known)):
            return None
    return max(int(limit.data.reshape(())), 0)


def _body(walk: Walk, node: ir.Node, scope: Scope, name: str) -> ir.Graph:
    attribute = walk.resolve(node.attributes[name], scope)
    assert attribute is not None
    return attribute.as_graph()


def _use_hint(walk: Walk, scope: Scope, value: ir.Value, output: Tensor) -> None:
    """For a result whose shape depends on the run: the shape seen in one, if there was one."""
    output.shape = None
    if not scope.path and value in walk.hints:
        output.shape = walk.hints[value][1]
        walk.guessed.append(output)


def _copy_type(walk: Walk, source: Tensor | None, target: Tensor) -> None:
    if source is None:
        return
    target.dtype, target.shape = source.dtype, source.shape
    if source in walk.types:
        walk.types[target] = walk.types[source]


#: How each control-flow op of the standard domain is walked.
WALKERS: dict[str, Callable[[Walk, ir.Node, Scope], None]] = {
    "If": walk_if,
    "Loop": walk_loop,
    "Scan": walk_scan,
}
