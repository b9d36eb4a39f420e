"""Constants that dead positions leave behind, moved into the next bias or onto a carrier.

For a contraction that reads the constant c at a dead position d: ``bias += W[:, d] * c``, where every result sees the
position; where some do not (a window over a border), ``W[:, carrier] += W[:, d] * c_d / c_carrier``.

All arrays are worked out on the model as it was, and put in place after it has been cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.axes.labels import Labels
from graphprune.axes.signature import View
from graphprune.dead.contribution import Contraction, Step
from graphprune.dead.intervals.contraction import join_axes
from graphprune.graph import Op, Tensor
from graphprune.graph.evaluate import evaluate_constant
from graphprune.kernels.box import Mask, compact
from graphprune.model.nodes import is_constant_value, stored_tensor
from graphprune.model.splice import Splicer, base_name
from graphprune.plan import Masks

Array = npt.NDArray[Any]


@dataclass
class Fold:
    """What one op takes over.

    Attributes:
        op: The op that sums over the dead positions.
        count: How many positions' constants it takes over.
        bias: To be added to the op's result; of the result's rank, size 1 where it is the same. Cut already.
        slot: The input that ``replaced`` is put at.
        replaced: New contents of that input, cut already; None where ``bias`` is enough and the op has no bias input.
    """

    op: Op
    count: int
    bias: Array | None = None
    slot: int = -1
    replaced: Array | None = None

    @property
    def where(self) -> str:
        """``bias`` or ``carrier``."""
        return "carrier" if self.bias is None else "bias"


def folds_of(steps: Sequence[Step], removed: Labels, masks: Masks) -> list[Fold]:
    """What has to be moved when labels are removed, op by op.

    Args:
        steps: The ops that sum over something.
        removed: The labels that go.
        masks: What is left without them.
    """
    dead = np.zeros(len(masks.analysis.atoms), dtype=bool)
    dead[removed] = True
    found = []
    for step in steps:
        if isinstance(step, Contraction) and step.concerns(dead):
            lost = step.lost(dead)
            if lost is not None:
                found.append(_carried(step, lost, dead, masks) if step.padded else _added(step, lost, masks))
    return found


def _count(lost: Array) -> int:
    return int(np.count_nonzero(lost))


def _carried(step: Contraction, lost: Array, dead: npt.NDArray[np.bool_], masks: Masks) -> Fold:
    """New weights, in which carriers do the work of the dead."""
    assert step.weight is not None
    view, tensor = step.views[step.weight], step.tensors[step.weight]
    assert tensor is not None
    weights = step.weights()
    constant, here = step.carriers(dead)
    lanes = step.lanes()
    # A lane without a carrier loses nothing, or the search would have kept one.
    share = (weights * lost).sum(axis=lanes, keepdims=True) / np.where(constant == 0, 1, constant)
    new = _as_operand(weights + share * here, step, view, tensor)
    return Fold(
        step.op, _count(lost), None, step.slot_of(step.weight), _cast(compact_to(new, masks, tensor), tensor)
    )


def _added(step: Contraction, lost: Array, masks: Masks) -> Fold:
    """What the dead add to each result."""
    output = step.op.outputs[0]
    assert output is not None
    weights = step.weights()
    loose = tuple(i for i, f in enumerate(step.factors) if f not in step.views[2].factors)
    letters = ascii_letters[: weights.ndim]
    kept = "".join(letter for i, letter in enumerate(letters) if i not in loose)
    share = np.expand_dims(np.einsum(f"{letters},{letters}->{kept}", weights, lost), loose)
    share = share * float(step.op.attributes.get("alpha", 1.0))
    bias = _as_operand(share, step, step.views[2], output)
    fold = Fold(step.op, _count(lost), compact_to(bias, masks, output))
    slot = step.kind.bias
    old = step.op.inputs[slot] if slot is not None and slot < len(step.op.inputs) else None
    if slot is None or step.op.attributes.get("beta", 1.0) != 1.0 or (old is not None and not old.constant):
        return fold  # an Add behind the op will do it
    before = 0.0 if old is None else _as_result(evaluate_constant(old), step, output)
    total = before + bias
    if step.kind.spatial:  # its bias is a vector, one entry a channel
        total = np.broadcast_to(total, [s if i == 1 else 1 for i, s in enumerate(output.shape or ())])
    left = compact_to(total, masks, output)
    fold.slot = slot
    fold.replaced = _cast(left.reshape(-1) if step.kind.spatial else _shortest(left, 1), output)
    return fold


def _as_result(bias: Array, step: Contraction, output: Tensor) -> Array:
    """A bias as it is broadcast against the result."""
    rank = len(output.shape or ())
    shape = (1, -1, *[1] * (rank - 2)) if step.kind.spatial else (1,) * (rank - bias.ndim) + bias.shape
    return np.asarray(bias, dtype=np.float64).reshape(shape)


def _cast(array: Array, tensor: Tensor) -> Array:
    return array if tensor.dtype is None else array.astype(tensor.dtype.numpy())


def _as_operand(array: Array, step: Contraction, view: View, tensor: Tensor) -> Array:
    """From one axis a factor of the op to the axes of an operand."""
    order = [step.factors.index(f) for f in view.factors]
    rest = [i for i in range(array.ndim) if i not in order]
    array = array.transpose([*order, *rest]).reshape([array.shape[i] for i in order])
    return join_axes(array, view.factors, view, step.flow)


def compact_to(array: Array, masks: Masks, tensor: Tensor) -> Array:
    """What is left of an array that broadcasts against a tensor; axes of size 1 stay so."""
    parts: list[Mask] = []
    shape = list(array.shape)
    for part in masks.parts(tensor):
        axes = [i for i, size in enumerate(part.shape) if size > 1]
        if any(array.shape[i] > 1 for i in axes):
            parts.append(part)
            for i in axes:
                shape[i] = (tensor.shape or ())[i]
    return compact(np.ascontiguousarray(np.broadcast_to(array, shape)), *parts) if parts else array


def put_in_place(model: ir.Model, folds: Sequence[Fold]) -> None:
    """Give nodes their new weights and biases, in the model that has been cut already."""
    splice = Splicer(model)
    for fold in folds:
        node = fold.op.node
        assert node is not None
        if fold.replaced is not None:
            what = "bias" if fold.bias is not None else "weight"
            _set_constant(splice, node, fold.slot, what, fold.replaced)
        elif fold.bias is not None:
            output = fold.op.outputs[0]
            assert output is not None
            assert output.dtype is not None
            _add_behind(splice, node, fold.bias, output.dtype)


def _set_constant(splice: Splicer, node: ir.Node, slot: int, what: str, array: Array) -> None:
    """Give an input new contents; an initializer that nobody else reads keeps its name."""
    if slot >= len(node.inputs):
        node.resize_inputs(slot + 1)
    old = node.inputs[slot]
    if old is not None and old.is_initializer() and not old.is_graph_input() and len(list(old.uses())) == 1:
        old.const_value = ir.tensor(array, name=old.name)
        old.shape = ir.Shape(array.shape)
        return
    node.replace_input_with(slot, splice.constant(node, f"{base_name(node)}_{what}", array))
    _discard(old)


def _discard(value: ir.Value | None) -> None:
    """Remove an initializer, or what computes a constant, once nothing reads it."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    node = value.producer()
    if node is None:
        if value.is_initializer() and isinstance(value.graph, ir.Graph) and value.name is not None:
            del value.graph.initializers[value.name]
        return
    if node.graph is not None and not any(o.uses() or o.is_graph_output() for o in node.outputs):
        operands = list(node.inputs)
        node.graph.remove(node, safe=True)
        for operand in operands:
            _discard(operand)


def _add_behind(splice: Splicer, node: ir.Node, bias: Array, dtype: ir.DataType) -> None:
    """Add to a result: into the constant that is added next, or by an Add of its own."""
    value = node.outputs[0]
    array = bias.astype(dtype.numpy())
    uses = list(value.uses())
    if len(uses) == 1 and not value.is_graph_output():
        reader, slot = uses[0]
        other = reader.inputs[1 - slot] if reader.op_type == "Add" and not reader.domain else None
        stored = stored_tensor(other) if other is not None and is_constant_value(other) else None
        if stored is not None and reader.graph is node.graph:
            old = stored.numpy()
            total = _shortest(old.astype(np.float64) + bias, old.ndim).astype(old.dtype)
            _set_constant(splice, reader, 1 - slot, "bias", total)
            return
    constant = splice.constant(node, f"{base_name(node)}_bias", _shortest(array, 1))
    added = splice.insert(node, "Add", [value, constant], like=value, after=True)
    added.shape = value.shape
    producer = added.producer()
    for reader, slot in uses:
        if reader is not producer:
            reader.replace_input_with(slot, added)
    if value.is_graph_output() and isinstance(node.graph, ir.Graph):
        for position, output in enumerate(node.graph.outputs):
            if output is value:
                node.graph.outputs[position] = added
        value.name, added.name = splice.fresh(f"{value.name}_product"), value.name


def _shortest(array: Array, rank: int) -> Array:
    """Without leading axes of size 1 beyond a rank."""
    while array.ndim > rank and array.shape[0] == 1:
        array = array[0]
    return array
