"""One forward pass over the twin that bounds every tensor (abstract interpretation over intervals; Cousot and Cousot
1977)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.axes.analysis import Analysis
from graphprune.dead.intervals.bounds import Bounds, between, exactly, unknown
from graphprune.dead.intervals.registry import Site, find_rule
from graphprune.errors import OptionError, RuleError
from graphprune.graph import Op, Tensor
from graphprune.graph.evaluate import evaluate_constant
from graphprune.rules.registry import Refusal


class Intervals:
    """Bounds of all tensors of an analysed twin.

    What is assumed of the model: its inputs are finite and lie in the ranges given, it does not overflow on them, and
    it computes in IEEE arithmetic of its tensors' types or wider, summing in any order (which leaves out fast
    convolutions by transforms, and TF32).
    """

    def __init__(
        self, analysis: Analysis, input_range: Mapping[str, tuple[float, float]] | None = None
    ) -> None:
        """Bound every tensor.

        Args:
            analysis: The analysed twin.
            input_range: Smallest and greatest value of inputs, by name; others are unbounded.

        Raises:
            OptionError: A range names no input, is not finite, or its ends are in the wrong order.
        """
        self._analysis = analysis
        self._known: dict[Tensor, Bounds] = {}
        self._finite: dict[Tensor, bool] = {}
        ranges = dict(input_range or {})
        for tensor in analysis.graph.inputs:
            if tensor.name in ranges:
                self._known[tensor] = _given(tensor, *ranges.pop(tensor.name))
        if ranges:
            names = ", ".join(repr(t.name) for t in analysis.graph.inputs)
            raise OptionError(
                f"the model has no input {next(iter(ranges))!r} to give a range; it has {names}"
            )
        for op in analysis.graph.ops:
            self._run(op)

    def of(self, tensor: Tensor) -> Bounds:
        """The bounds of a tensor; those of a constant are its contents."""
        found = self._known.get(tensor)
        if found is None:
            if tensor.constant and _is_number(tensor):
                found = exactly(self.contents(tensor))
            else:  # an input, or what a loop makes later
                found = unknown(len(tensor.shape or ()))
            self._known[tensor] = found
        return found

    def finite(self, tensor: Tensor) -> bool:
        """True if no element is infinite or NaN because of a constant (see :class:`Bounds`)."""
        if tensor in self._known:
            return self._known[tensor].finite
        if not tensor.constant or tensor.dtype is None or not tensor.dtype.is_floating_point():
            return True
        if tensor not in self._finite:
            self._finite[tensor] = bool(np.isfinite(self.contents(tensor)).all())
        return self._finite[tensor]

    def contents(self, tensor: Tensor) -> npt.NDArray[Any]:
        """The contents of a constant tensor (:func:`graphprune.graph.evaluate.evaluate_constant`); nothing is kept."""
        return evaluate_constant(tensor)

    def _run(self, op: Op) -> None:
        if not any(output is not None and not output.constant for output in op.outputs):
            return
        transfer = find_rule(op)
        flows = self._analysis.flows[op.index]
        site = Site(op, [] if isinstance(flows, Refusal) else flows, self)
        found: list[Bounds | None] = []
        if transfer is not None and not any(t is not None and t.shape is None for t in op.inputs):
            try:
                with np.errstate(all="ignore"):
                    found = transfer(site)
            except RuleError:
                found = []
        for slot, output in enumerate(op.outputs):
            if output is None or output.constant:
                continue
            known = found[slot] if slot < len(found) else None
            if known is None or output.shape is None or known.ndim != len(output.shape):
                finite = op.op_type in _QUIET or site.finite
                known = unknown(len(output.shape or ()), finite=finite)
            self._known[output] = known


#: Ops whose result is finite whatever infinite constants they read.
_QUIET = frozenset(["ArgMax", "ArgMin", "Shape", "Size", "IsInf", "IsNaN", "NonZero"])


def _is_number(tensor: Tensor) -> bool:
    dtype = tensor.dtype
    return dtype is not None and (
        dtype.is_floating_point() or dtype.is_integer() or dtype == ir.DataType.BOOL
    )


def _given(tensor: Tensor, lo: float, hi: float) -> Bounds:
    if not (np.isfinite([lo, hi]).all() and lo <= hi):
        raise OptionError(
            f"the range of input {tensor.name!r} is [{lo}, {hi}]; give two finite numbers in order"
        )
    return between(len(tensor.shape or ()), lo, hi)
