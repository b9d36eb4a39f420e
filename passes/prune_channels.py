"""Channel pruning as a pass, to be composed with others in ``onnx_ir.passes.Sequential``."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from graphprune.errors import NothingToPruneError
from graphprune.pipeline import apply_plan, prune
from graphprune.report import Report


class PruneChannelsPass(ir.passes.InPlacePass):
    """Removes channels, filters, heads and hidden units, with everything that is coupled to them, and repairs the rest.

    The model is changed only after a copy of it has been pruned and, unless ``verify=False``, compared with its
    masked original. A model with nothing to prune is left as it is, and the result says that nothing was modified.

    Attributes:
        report: What the last call did; None before the first, and where there was nothing to prune.

    Example:
        >>> import onnx_ir as ir
        >>> from onnx_ir.passes.common import ShapeInferencePass
        >>> pipeline = ir.passes.Sequential(PruneChannelsPass(0.3), ShapeInferencePass())
    """

    def __init__(self, channels: float = 0.0, **options: Any) -> None:
        """Configure the pass.

        Args:
            channels: Fraction of every free group to remove.
            **options: Further arguments of :func:`graphprune.prune`.
        """
        super().__init__()
        self.channels = channels
        self.options = options
        self.report: Report | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Prune ``model`` in place.

        Raises:
            GraphPruneError: An option is wrong, or the result differs from the masked original; the model is then
                as it was.
        """
        self.report = None
        try:
            pruned, report = prune(model, self.channels, **self.options)
        except NothingToPruneError:
            return ir.passes.PassResult(model, modified=False)
        if report.repaired is None and not (self.options.get("dead") or self.options.get("blocks")):
            apply_plan(model, report.plan, input_shapes=self.options.get("input_shapes"))
        else:  # a plan is not all that was done
            model.graph = pruned.graph
            model.functions.clear()
            model.functions.update(pruned.functions)
        self.report = report
        return ir.passes.PassResult(model, modified=True)
