"""Gates: a factor of 1 at every place where a label matters, whose derivative says how much.

Removing a label means that whatever sums over it reads zeros there (:mod:`graphprune.masked`). A factor g, one number a
label, put on those operands says the same for g = 0, and is the original for g = 1. Of the operands of one op one alone
bears each label's gate: a product of two operands, both of which bear the label, would be squared in g, and its
derivative twice too large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphprune.axes.analysis import Analysis
from graphprune.axes.flow import Operand, SignatureFlow
from graphprune.axes.labels import Atoms, Labels, varying_axes
from graphprune.graph import Graph, Op, Tensor
from graphprune.masked import own_factors
from graphprune.rules.registry import Refusal, flows_of, tensor_at


@dataclass(frozen=True)
class Gate:
    """Labels that an operand of an op bears, and over which the op sums there.

    Attributes:
        op, slot: The operand.
        labels: int32, broadcasts against the operand; 0 where there is no gate.
    """

    op: Op
    slot: int
    labels: Labels


def free_labels(analysis: Analysis) -> npt.NDArray[np.bool_]:
    """By label, whether it may be removed; label 0 may not."""
    every = np.arange(len(analysis.atoms), dtype=np.int32)
    free = ~analysis.atoms.is_frozen(every)
    free[0] = False
    return np.asarray(free, dtype=np.bool_)


def find_gates(analysis: Analysis, free: npt.NDArray[np.bool_]) -> list[Gate]:
    """The gates of a network, in the order of its ops.

    Args:
        analysis: The analysis.
        free: By label, whether it has a gate (:func:`free_labels`).
    """
    found: list[Gate] = []
    for op in analysis.graph.ops:
        flows = analysis.flows[op.index]
        if isinstance(flows, Refusal) or analysis.is_leaf(op):
            continue
        for flow in flows:
            if isinstance(flow, SignatureFlow):
                found += _gates_of(analysis, free, op, flow)
    return found


def _gates_of(analysis: Analysis, free: npt.NDArray[np.bool_], op: Op, flow: SignatureFlow) -> list[Gate]:
    """Gates on an op's operands: on activations first, so that weights need none."""
    slots = [slot for slot, tensor in enumerate(op.inputs) if tensor is not None]
    covered: dict[str, npt.NDArray[np.bool_]] = {}
    found: list[Gate] = []
    for slot in sorted(slots, key=lambda s: (_is_constant(op.inputs[s]), s)):
        seen: set[bytes] = set()
        for own, labels in own_factors(analysis, op, flow, Operand(False, slot)):
            key = labels.tobytes()
            if not own.endswith("^") or key in seen:
                continue
            seen.add(key)
            here = free[labels]
            if own in covered:
                here &= ~covered[own][labels]
            if here.any():
                found.append(Gate(op, slot, np.where(here, labels, 0).astype(np.int32)))
                covered.setdefault(own, np.zeros_like(free))[labels[here]] = True
    return found


def _is_constant(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.constant


# -- samples --------------------------------------------------------------------------------------------------------


def sample_positions(graph: Graph, axes: Mapping[str, int], samples: int) -> dict[Tensor, Labels] | None:
    """Which sample each element of each tensor belongs to.

    The samples are labelled in the inputs, and the labels are pushed forward by the flows that push
    channels (:mod:`graphprune.axes.flow`): a batch that is merged with heads or transposed behind the time axis stays
    known.

    Args:
        graph: The twin, at ``samples`` samples.
        axes: By name of the inputs that hold samples, the axis along which they lie.
        samples: How many.

    Returns:
        By tensor an int32 array of sample numbers from 0 that broadcasts against its shape; tensors that are the same
        for all samples are absent. None where an op mixes samples, or is not known not to.
    """
    atoms = Atoms()
    first = atoms.new(samples)
    found: dict[Tensor, Labels] = {}
    for tensor in graph.inputs:
        if tensor.name in axes:
            found[tensor] = first.reshape(
                [-1 if a == axes[tensor.name] else 1 for a in range(len(tensor.shape or ()))]
            )
    for op in graph.ops:
        borne = [(slot, t) for slot, t in enumerate(op.inputs) if t is not None and t in found]
        if not borne:
            continue
        try:
            flows = flows_of(op)
        except ValueError:  # the model's literals say otherwise than its inputs
            return None
        if isinstance(flows, Refusal):
            flows = []
        made: dict[Tensor, Labels] = {}
        for slot, tensor in borne:
            source = Operand(False, slot)
            for flow in flows:
                if source not in flow.operands():
                    continue
                for target, carried in flow.push(atoms, source, found[tensor], op.name):
                    output = tensor_at(op, target)
                    if target.is_output and output is not None:
                        known = _joined(made[output], carried) if output in made else carried
                        if known is None:
                            return None
                        made[output] = known
        for output in op.outputs:
            if output is None or output.data is not None or not (output.uses or output.is_output):
                continue
            whole = _filled(made[output]) if output in made else None
            if whole is None:
                return None
            found[output] = whole
    if atoms.unions or bool(atoms.is_frozen(first).any()) or bool(atoms.is_statistical(first).any()):
        return None
    return {tensor: (labels - first[0]).astype(np.int32) for tensor, labels in found.items()}


def _joined(left: Labels, right: Labels) -> Labels | None:
    """What two operands say of a result, a piece each perhaps; None where they contradict each other."""
    left, right = np.broadcast_arrays(left, right)
    if ((left != right) & (left > 0) & (right > 0)).any():
        return None
    return np.where(left > 0, left, right).astype(np.int32)


def _filled(labels: Labels) -> Labels | None:
    """Labels with elements that bore none, because they come from constants, given that of their neighbours.

    None where neighbours along no axis agree.
    """
    for axis, size in enumerate(labels.shape):
        if size > 1:
            top = labels.max(axis=axis, keepdims=True)
            if ((labels == top) | (labels == 0)).all():
                labels = top
    return None if (labels == 0).any() or not varying_axes(labels) else labels
