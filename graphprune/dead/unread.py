"""Elements that no output depends on, because what reads them multiplies them by a stored zero.

One backward pass over the twin. Only zeros that are stored count, in a BatchNorm's scale or as a factor: a zero that is
computed may depend on what is to be removed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from graphprune.dead.intervals import Intervals
from graphprune.graph import Graph, Op, Tensor
from graphprune.rules.elementwise import BROADCAST, UNARY

Bools = npt.NDArray[np.bool_]

#: Ops that read each element for the one result at its place.
_ELEMENTWISE = frozenset([*UNARY.split(), *BROADCAST.split(), "Identity", "Dropout", "Cast"])


class Unread:
    """Which elements of which tensors are never read; masks broadcast against the tensors."""

    def __init__(self, graph: Graph, intervals: Intervals) -> None:
        self._intervals = intervals
        self._known: dict[Tensor, Bools] = {}
        for op in reversed(graph.ops):
            for tensor in op.outputs:
                if tensor is not None and not tensor.constant and tensor.shape is not None:
                    self._known[tensor] = self._of(tensor)

    def of(self, tensor: Tensor) -> Bools:
        """Elements of a tensor that nothing depends on."""
        found = self._known.get(tensor)
        return np.zeros((1,) * len(tensor.shape or ()), dtype=bool) if found is None else found

    def all_of(self, op: Op) -> bool:
        """True if nothing depends on any result of an op."""
        return all(output is None or bool(self.of(output).all()) for output in op.outputs)

    def _of(self, tensor: Tensor) -> Bools:
        rank = len(tensor.shape or ())
        unread = np.asarray(np.full((1,) * rank, not tensor.is_output))
        for op, slot in tensor.uses:
            if not unread.any():
                break
            unread = unread & _reduced(self._by(op, slot), tensor)
        return unread

    def _by(self, op: Op, slot: int) -> Bools:
        """Which elements of an input one op leaves unread; of the rank of its result, or of rank 0."""
        if not op.outputs or op.outputs[0] is None:
            return np.asarray(False)
        if self.all_of(op):
            return np.asarray(True)
        unread = self.of(op.outputs[0])
        if op.kind == "BatchNormalization" and slot == 0 and not any(op.outputs[1:]):
            return unread | self._zero(op, 1, (1, -1, *[1] * (unread.ndim - 2)))
        if op.kind == "Mul":
            return unread | self._zero(op, 1 - slot, None)
        if op.kind == "Transpose":
            order = op.attributes.get("perm", list(range(unread.ndim))[::-1])
            return unread.transpose(np.argsort(order))
        return unread if op.kind in _ELEMENTWISE else np.asarray(False)

    def _zero(self, op: Op, slot: int, shape: tuple[int, ...] | None) -> Bools:
        """Where a stored factor is zero, and the other operand finite."""
        factor = op.inputs[slot]
        finite = all(self._intervals.finite(tensor) for tensor in op.inputs if tensor is not None)
        if factor is None or not factor.constant or not finite:
            return np.asarray(False)
        zero = np.asarray(self._intervals.contents(factor) == 0)
        return zero if shape is None else zero.reshape(shape)


def _reduced(mask: Bools, tensor: Tensor) -> Bools:
    """What holds for all results that an element of an operand is broadcast to."""
    rank = len(tensor.shape or ())
    if mask.ndim < rank:
        return mask.reshape((1,) * (rank - mask.ndim) + mask.shape)
    mask = np.asarray(mask.all(axis=tuple(range(mask.ndim - rank))))
    spread = tuple(i for i, size in enumerate(tensor.shape or ()) if size == 1 < mask.shape[i])
    return np.asarray(mask.all(axis=spread, keepdims=True)) if spread else mask
