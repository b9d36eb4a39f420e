"""Inlining: calls of model-local functions become nodes of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphprune.model import copy

if TYPE_CHECKING:
    import onnx_ir as ir


def inline(model: ir.Model, functions: set[tuple[str, str, str]]) -> None:
    """Inline all calls of some functions, in place, and drop functions that nothing calls any more."""
    from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass

    InlinePass(criteria=lambda function: function.identifier() in functions)(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]


def inlined(model: ir.Model, functions: set[tuple[str, str, str]]) -> ir.Model:
    """A copy of a model, some functions inlined."""
    made = copy(model)
    inline(made, functions)
    return made
