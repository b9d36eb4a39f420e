"""N:M sparsity as a pass, to be composed with others in ``onnx_ir.passes.Sequential``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphprune.errors import SparsityError
from graphprune.pipeline import sparsify

if TYPE_CHECKING:
    from graphprune.sparsity.pattern import Pattern
    from graphprune.sparsity.report import SparsityReport


class SparsifyWeightsPass(ir.passes.InPlacePass):
    """Gives every weight that can have it an N:M pattern.

    The model is changed only after a copy of it has been made sparse and, unless ``verify=False``, checked. A model of
    which no weight can have the pattern is left as it is, and the result says that nothing was modified.

    Attributes:
        report: What the last call did; None before the first, and where there was nothing to do.

    Example:
        >>> import onnx_ir as ir
        >>> from graphprune.passes.prune_channels import PruneChannelsPass
        >>> pipeline = ir.passes.Sequential(PruneChannelsPass(0.3, round_to=16), SparsifyWeightsPass("2:4"))
    """

    def __init__(self, pattern: str | Pattern = "2:4", **options: Any) -> None:
        """Configure the pass.

        Args:
            pattern: "2:4" or the like, or a value of :mod:`graphprune.sparsity.pattern`.
            **options: Further arguments of :func:`graphprune.sparsify`.
        """
        super().__init__()
        self.pattern = pattern
        self.options = options
        self.report: SparsityReport | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Make ``model``'s weights sparse, in place.

        Raises:
            GraphPruneError: An option is wrong, or the result is not what it should be; the model is then as it was.
        """
        self.report = None
        try:
            sparse, report = sparsify(model, self.pattern, **self.options)
        except SparsityError:
            return ir.passes.PassResult(model, modified=False)
        model.graph = sparse.graph
        model.functions.clear()
        model.functions.update(sparse.functions)
        self.report = report
        return ir.passes.PassResult(model, modified=True)
