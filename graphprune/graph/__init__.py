"""The static twin of a model: a flat list of ops over tensors whose shapes are numbers.

The analysis reads this and nothing else. The twin is never run and never written; every :class:`Tensor` and
:class:`Op` remembers the ``onnx_ir`` object it stands for, so that a plan made on the twin is applied to the model
itself, dynamic dimensions, subgraphs and functions included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

#: Domain of the pseudo-ops that the twin adds; no model contains them.
TWIN_DOMAIN = "graphprune"


@dataclass(eq=False, slots=True)
class Tensor:
    """One value of the twin.

    Attributes:
        name: Unique in the twin.
        dtype: Element type, None if unknown (sequences, optionals).
        shape: Static shape at the sizes the twin was built for; None if unknown.
        value: The value in the model that this tensor stands for. Several tensors may share one value: each use of a
            small initializer is a tensor of its own, and so is each inlined copy of a function's value.
        constant: True if no graph input influences the contents.
        data: The contents where they are known and small (shape arithmetic, indices); None otherwise.
        dynamic: True if ``shape`` or ``data`` depend on a dynamic dimension of the model.
        producer: The op that makes it; None for graph inputs and initializers.
        uses: (op, input slot) pairs that read it.
        is_input: It is an input of the main graph.
        is_output: It is an output of the main graph.
    """

    name: str
    dtype: ir.DataType | None
    shape: tuple[int, ...] | None
    value: ir.Value | None = None
    constant: bool = False
    data: np.ndarray[Any, Any] | None = None
    dynamic: bool = False
    producer: Op | None = None
    uses: list[tuple[Op, int]] = field(default_factory=list)
    is_input: bool = False
    is_output: bool = False

    def __repr__(self) -> str:
        shape = "?" if self.shape is None else "x".join(map(str, self.shape))
        return f"<{self.name}: {self.dtype.name if self.dtype else '?'}[{shape}]>"


@dataclass(eq=False, slots=True)
class Op:
    """One node of the twin.

    Attributes:
        op_type, domain, version: As in ONNX; ``version`` is the opset version that the model imports for the domain.
        attributes: Attribute values as Python objects (int, float, str, lists, numpy arrays); defaults not filled in.
            Subgraphs are not among them: their nodes are ops of the twin.
        inputs: None where an optional input is missing.
        outputs: None where an optional output is missing.
        node: The node in the model that this op stands for (the If / Loop / Scan node for pseudo-ops).
        path: The call nodes that lead to ``node`` when it lies in a model-local function; outermost first.
        index: Position in the twin's topological order.
    """

    op_type: str
    domain: str
    version: int
    attributes: Mapping[str, Any]
    inputs: list[Tensor | None]
    outputs: list[Tensor | None]
    node: ir.Node | None = None
    path: tuple[ir.Node, ...] = ()
    index: int = -1

    @property
    def name(self) -> str:
        """The node's name, prefixed by those of the calls around it; the op type where the node has none."""
        node_name = (self.node.name if self.node is not None else None) or f"{self.op_type}_{self.index}"
        return "/".join([*(call.name or call.op_type for call in self.path), node_name])

    @property
    def kind(self) -> str:
        """``domain::op_type``, the domain left out for the standard one."""
        return f"{self.domain}::{self.op_type}" if self.domain else self.op_type

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name!r} {self.inputs} -> {self.outputs}>"


@dataclass(eq=False, slots=True)
class Graph:
    """The twin: ops in topological order, and all tensors."""

    model: ir.Model
    ops: list[Op]
    tensors: list[Tensor]
    inputs: list[Tensor]
    outputs: list[Tensor]
    #: What could not be worked out, for the report: (name of a value or node, reason).
    notes: list[tuple[str, str]] = field(default_factory=list)
