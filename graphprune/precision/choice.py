"""Which nodes compute in the low format, and why the others do not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx_ir as ir

from graphprune.errors import OptionError
from graphprune.graph import Graph
from graphprune.model.nodes import constant_array, is_constant_value, python_value, stored_tensor
from graphprune.precision.formats import (
    ARITHMETIC,
    CONTRACTIONS,
    DENIED,
    EXACT,
    HANDS_ON_HUGE,
    HANDS_ON_TINY,
    MOVEMENT,
    READS_TINY,
    Format,
)
from graphprune.precision.stored import LAZY_FROM, greatest
from graphprune.precision.typing import Operands, low_operands, types_of, version_of

#: Key of the metadata of nodes that a measurement kept in float32: another pass must not decide otherwise.
MARK = "graphprune.float32"
#: Ops that read whichever form of a value there is: what they make does not depend on it, or follows an attribute.
INDIFFERENT = frozenset({"Shape", "Size", "Cast", "Constant"})
_INTEGERS = frozenset(
    ir.DataType[f"{sign}INT{bits}"].value for sign in ("", "U") for bits in (4, 8, 16, 32, 64)
)


@dataclass(frozen=True)
class Choice:
    """What is done with the nodes that have float32 operands.

    Attributes:
        lowered: Nodes that compute in the low format, and which of their operands are of it.
        kept: Nodes that stay float32, and why.
    """

    lowered: Mapping[ir.Node, Operands]
    kept: Mapping[ir.Node, str]

    def is_low(self, value: ir.Value) -> bool:
        """True if the node that makes a value makes it in the low format."""
        node = value.producer()
        operands = self.lowered.get(node) if node is not None else None
        return operands is not None and value.index() in operands.outputs


def kind_of(node: ir.Node) -> str:
    """``domain::op_type``, the domain left out for ONNX's own."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def title(node: ir.Node) -> str:
    """A node as messages name it."""
    return node.name or next((o.name for o in node.outputs if o.name), "") or node.op_type


class Chooser:
    """Decides what can be lowered; further nodes may be kept afterwards."""

    def __init__(
        self, model: ir.Model, twin: Graph, low: Format, *, io: bool = False, deny: Sequence[str] = ()
    ) -> None:
        """Look at all nodes.

        Args:
            model: Without functions; not changed.
            twin: Its twin.
            low: The low format.
            io: Graph inputs and outputs are of the low format too.
            deny: Globs on op types and on names of nodes that stay float32.

        Raises:
            OptionError: A glob matches nothing.
        """
        self.model = model
        self.low = low
        self.io = io
        self.types = types_of(model, twin)
        self._shapes = {t.value: t.shape for t in twin.tensors if t.value is not None}
        self._computed = {
            t.value: t.data
            for t in twin.tensors
            if t.value is not None and t.constant and t.data is not None and t.dtype == ir.DataType.FLOAT
        }
        self._greatest: dict[ir.Value, float | None] = {}
        self._huge: set[ir.Node] = set()
        self._tiny: set[ir.Node] = set()
        self._static: dict[ir.Node, str] = {}
        self._candidates: dict[ir.Node, Operands] = {}
        self._denied = self._matching(deny)
        for node in all_nodes(model):
            self._look_at(node)
        self._keep_exact()

    def _matching(self, deny: Sequence[str]) -> dict[ir.Node, str]:
        found: dict[ir.Node, str] = {}
        for pattern in deny:
            hits = [
                node
                for node in all_nodes(self.model)
                if any(fnmatchcase(name, pattern) for name in (kind_of(node), node.op_type, title(node)))
            ]
            if not hits:
                raise OptionError(f"no op type and no node matches {pattern!r}, which is to stay float32")
            found.update((node, f"it was denied ({pattern})") for node in hits)
        return found

    def _look_at(self, node: ir.Node) -> None:
        if kind_of(node) in INDIFFERENT:
            return
        operands = low_operands(node, version_of(self.model, node), self.types, self.low)
        if operands is None:
            return
        denied = self._denied.get(node) or DENIED.get(kind_of(node)) or node.metadata_props.get(MARK)
        if isinstance(operands, str) or denied:
            self._static[node] = denied or str(operands)
            return
        reason = self._unfit_constant(node, operands)
        if reason is None:
            self._candidates[node] = operands
        else:
            self._static[node] = reason

    # -- constants --------------------------------------------------------------------------------------------------

    def _unfit_constant(self, node: ir.Node, operands: Operands) -> str | None:
        """Why a constant that the node reads cannot be rounded."""
        for slot in operands.inputs:
            value = node.inputs[slot]
            top = self._magnitude(value) if value is not None else None
            if value is None or top is None:
                continue
            # Bounds that become infinite, or 0 where they are all but 0, still bound.
            if top >= self.low.first_infinite and kind_of(node) != "Clip":
                self._huge.add(node)
                return f"its constant {value.name!r} holds {top:.3g}, beyond the range of {self.low.title}"
            if 0 < top <= self.low.last_zero:
                self._tiny.add(node)
                return f"its constant {value.name!r} ({top:.3g}) would become 0 in {self.low.title}"
        return None

    def _magnitude(self, value: ir.Value) -> float | None:
        """The greatest finite magnitude of a constant; None for what is none."""
        if value not in self._greatest:
            self._greatest[value] = self._find_magnitude(value)
        return self._greatest[value]

    def _find_magnitude(self, value: ir.Value) -> float | None:
        stored = stored_tensor(value) if is_constant_value(value) else None
        if stored is not None:
            return greatest(stored)
        node = value.producer()
        array: Any = self._computed.get(value)
        if array is None and node is not None and kind_of(node) == "Constant":
            array = constant_array({k: python_value(a) for k, a in node.attributes.items() if not a.is_ref()})
        if array is None and node is not None and kind_of(node) == "ConstantOfShape":
            fill = node.attributes.get("value")
            array = None if fill is None else python_value(fill)
        if array is None:
            return None
        magnitudes = np.abs(np.asarray(array, np.float64))
        return float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))

    # -- exact arithmetic -------------------------------------------------------------------------------------------

    def _keep_exact(self) -> None:
        """Keep what leads to angles, coordinates and indices."""
        for node in all_nodes(self.model):
            found = EXACT.get(kind_of(node))
            if found is None or (kind_of(node) == "Cast" and not _to_integer(node)):
                continue
            slots, what = found
            todo = [node.inputs[slot] for slot in slots if slot < len(node.inputs)]
            while todo:
                value = todo.pop()
                producer = value.producer() if value is not None else None
                if producer is None or producer in self._static or not self._is_arithmetic(producer):
                    continue
                if producer in self._candidates:
                    del self._candidates[producer]
                    self._static[producer] = f"{what} is computed from it ({kind_of(node)} {title(node)!r})"
                    todo += producer.inputs

    def _is_arithmetic(self, node: ir.Node) -> bool:
        kind = kind_of(node)
        if kind == "MatMul":  # an outer product sums nothing
            shape = self._shapes.get(node.inputs[0]) if node.inputs[0] is not None else None
            return bool(shape) and shape is not None and shape[-1] == 1
        return kind in ARITHMETIC or kind in MOVEMENT

    # -- settling ---------------------------------------------------------------------------------------------------

    def settle(self, kept: Mapping[ir.Node, str] | None = None) -> Choice:
        """What is lowered if these nodes stay float32 as well, for these reasons."""
        reasons = dict(self._static)
        reasons.update({node: reason for node, reason in (kept or {}).items() if node in self._candidates})
        lowered = {node: o for node, o in self._candidates.items() if node not in reasons}

        def keep(node: ir.Node, reason: str) -> None:
            if lowered.pop(node, None) is not None:
                reasons[node] = reason

        title_ = self.low.title
        self._spread(
            self._huge,
            lambda node, source: keep(
                node, f"it may read numbers beyond the range of {title_} from {source!r}"
            ),
            HANDS_ON_HUGE,
        )
        self._spread(
            self._tiny,
            lambda node, source: keep(
                node, f"numbers that {title_} takes for 0 may reach it from {source!r}"
            ),
            HANDS_ON_TINY,
            READS_TINY,
        )
        self._drop_unworthy(lowered, keep)
        return Choice(lowered, reasons)

    @staticmethod
    def _spread(
        sources: set[ir.Node],
        keep: Callable[[ir.Node, str], None],
        hands_on: frozenset[str],
        reads: frozenset[str] | None = None,
    ) -> None:
        """Keep the readers of what some nodes make, and theirs where an op hands it on."""
        for source in sources:
            todo, seen = deque([source]), {source}
            while todo:
                for value in todo.popleft().outputs:
                    for reader, _ in value.uses():
                        kind = kind_of(reader)
                        if reader in seen or (reads is not None and kind not in reads | hands_on):
                            continue
                        seen.add(reader)
                        keep(reader, title(source))
                        if kind in hands_on:
                            todo.append(reader)

    def _drop_unworthy(self, lowered: dict[ir.Node, Operands], keep: Callable[[ir.Node, str], None]) -> None:
        """Keep islands without a contraction or a large weight: the casts around them cost more than they gain."""
        left = dict(lowered)
        while left:
            start = next(iter(left))
            island, todo, worthy = [start], [start], False
            del left[start]
            while todo:
                node = todo.pop()
                worthy = worthy or node.op_type in CONTRACTIONS or self._reads_weight(node, lowered[node])
                worthy = worthy or (self.io and self._at_border(node))
                for other in _linked(node, lowered):
                    if other in left:
                        del left[other]
                        island.append(other)
                        todo.append(other)
            if not worthy:
                for node in island:
                    keep(node, f"no contraction in {self.low.title} is next to it")

    @staticmethod
    def _reads_weight(node: ir.Node, operands: Operands) -> bool:
        values = [node.inputs[slot] for slot in operands.inputs]
        stored = [stored_tensor(v) for v in values if v is not None and is_constant_value(v)]
        return any(tensor is not None and tensor.size >= LAZY_FROM for tensor in stored)

    def _at_border(self, node: ir.Node) -> bool:
        inputs = set(self.model.graph.inputs)
        return any(value in inputs for value in node.inputs) or any(
            value.is_graph_output() and value.graph is self.model.graph for value in node.outputs
        )


def _linked(node: ir.Node, lowered: Mapping[ir.Node, Operands]) -> Iterator[ir.Node]:
    """The lowered nodes that a node gets low values from, or gives some to."""
    operands = lowered[node]
    for slot in operands.inputs:
        value = node.inputs[slot]
        producer = value.producer() if value is not None else None
        if value is None or producer is None or producer not in lowered:
            continue
        if value.index() in lowered[producer].outputs:
            yield producer
    for slot in operands.outputs:
        for reader, index in node.outputs[slot].uses():
            if reader in lowered and index in lowered[reader].inputs:
                yield reader


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of all graphs of a model without functions."""
    yield from model.graph.all_nodes()


def _to_integer(node: ir.Node) -> bool:
    target = node.attributes.get("to")
    return target is not None and not target.is_ref() and target.as_int() in _INTEGERS
