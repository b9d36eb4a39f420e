"""Faults: where two forms of a network first differ, and whether a jump explains it."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphprune.errors import VerificationError
from graphprune.graph import Graph, Op, Tensor
from graphprune.kernels.box import compact
from graphprune.plan import Masks
from graphprune.verification.difference import difference, dtype_of, least_scale, tolerance_of

#: Ops whose result jumps: what enters them is compared where what leaves them differs.
DISCONTINUOUS = frozenset(
    [
        "ArgMax",
        "ArgMin",
        "TopK",
        "NonMaxSuppression",
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "Round",
        "Floor",
        "Ceil",
        "Sign",
        "Greater",
        "Less",
        "GreaterOrEqual",
        "LessOrEqual",
        "Equal",
        "Hardmax",
        "NonZero",
        "Unique",
        "Cast",
        "Where",
        "Mod",
        "RoiAlign",
        "MaxRoiPool",
        "QLinearConv",
        "QLinearMatMul",
        "QLinearAdd",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearGlobalAveragePool",
    ]
)
_CONTINUOUS_CASTS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


@dataclass(frozen=True)
class Complaint:
    """How a difference is told.

    Attributes:
        form: The form of the network that is at fault, such as ``in the pruned model``.
        reference: What it differs from.
        advice: What to do.
        where: What else is known of a tensor that differs, such as its group.
    """

    form: str
    reference: str
    advice: str
    where: Callable[[Tensor], str] = lambda tensor: ""

    def of_tensor(self, op: Op, tensor: Tensor, error: float) -> VerificationError:
        """For the first tensor that differs."""
        return VerificationError(
            f"{self.form}, tensor {tensor.name!r}{self.where(tensor)}, made by {op.kind} {op.name!r}, differs from"
            f" {self.reference} by {error:.2g} of its scale; {self.advice}"
        )

    def of_output(self, name: str) -> VerificationError:
        """For an output that differs though no tensor before it does."""
        return VerificationError(f"{self.form}, output {name!r} differs from {self.reference}; {self.advice}")


def comparable_tensors(graph: Graph, moved: Container[Tensor] = ()) -> dict[str, Tensor]:
    """By name what two forms of a network have in common: activations of the main graph, but for those ``moved``."""
    return {
        tensor.name: tensor
        for op in graph.ops
        if not op.path
        for tensor in op.outputs
        if tensor is not None and tensor.shape is not None and not tensor.constant and tensor not in moved
    }


def require_jumps(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    masks: Masks,
    expected: Mapping[str, Any],
    found: Mapping[str, Any],
    wrong: Sequence[str],
    complaint: Complaint,
) -> None:
    """Accept outputs that differ only behind ops whose result jumps.

    Args:
        graph, tensors, masks, expected, found: As of :func:`first_fault`.
        wrong: Names of the outputs that differ.
        complaint: How to tell that something else differs.

    Raises:
        VerificationError: Something differs that no jump explains.
    """
    fault, behind = first_fault(graph, tensors, masks, expected, found)
    if fault is not None:
        raise complaint.of_tensor(*fault)
    for name in wrong:
        if tensors.get(name) not in behind:
            raise complaint.of_output(name)


def first_fault(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    masks: Masks,
    expected: Mapping[str, Any],
    found: Mapping[str, Any],
) -> tuple[tuple[Op, Tensor, float] | None, set[Tensor]]:
    """Where two forms of a network first differ though no jump explains it.

    Args:
        graph: The twin.
        tensors: What is compared, by name.
        masks: What the cut leaves of them.
        expected, found: Contents before the cut, whole, and after it, by name.

    Returns:
        The op, its output and the difference, or None; and the tensors that differ, or may, behind jumps.
    """
    differs: dict[Tensor, float] = {}
    for name, tensor in tensors.items():
        if name not in expected or name not in found or tensor.data is not None:
            continue
        mask = masks.mask(tensor)
        reference = expected[name]
        if mask is not None and isinstance(reference, np.ndarray):
            if any(m not in (1, s) for m, s in zip(mask.shape, reference.shape, strict=True)):
                continue
            reference = compact(reference, mask)
        error = difference(reference, found[name], least_scale(tensor.producer))
        if not error <= tolerance_of(dtype_of(reference)):
            differs[tensor] = error
    behind = _behind_jumps(graph, differs)
    for op in graph.ops:
        for output in op.outputs:
            if output is not None and output in differs and output not in behind:
                return (op, output, differs[output]), behind
    return None, behind


def _behind_jumps(graph: Graph, differs: Mapping[Tensor, float]) -> set[Tensor]:
    """Tensors that differ behind an op whose result jumps, though what enters it does not differ."""
    behind: set[Tensor] = set()
    for op in graph.ops:
        jump = op.op_type in DISCONTINUOUS and not _is_smooth(op)
        inherited = any(tensor in behind for tensor in op.inputs if tensor is not None)
        fresh = jump and not any(tensor in differs for tensor in op.inputs if tensor is not None)
        if inherited or fresh:
            behind.update(tensor for tensor in op.outputs if tensor is not None)
    return behind


def _is_smooth(op: Op) -> bool:
    """A Cast between reals, or a choice made by what no weight influences, does not jump."""
    if op.op_type == "Cast":
        output = op.outputs[0]
        return output is not None and output.dtype in _CONTINUOUS_CASTS
    return op.op_type == "Where"
