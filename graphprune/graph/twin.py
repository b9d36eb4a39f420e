"""Builds the static twin of a model (:mod:`graphprune.graph`).

A walk (:mod:`graphprune.graph.walk`) gives shapes and known contents at one choice of input sizes. Where the model has
dynamic dimensions, a second walk at other sizes tells what depends on them. What inference and rules leave open is
measured by running the model once in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphprune.errors import ModelError
from graphprune.graph import TWIN_DOMAIN, Graph, Op, Tensor, sizes
from graphprune.graph.evaluate import is_random
from graphprune.graph.inference import Inference
from graphprune.graph.walk import Hint, NodeKey, Walk


def build_twin(
    model: ir.Model,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    dynamic_sizes: Mapping[str, int] | None = None,
) -> Graph:
    """The static twin of ``model``.

    Args:
        model: Any valid model, its nodes sorted; it is only read, and only small constants are loaded.
        input_shapes: Shapes for graph inputs, by name. They must agree with the model's static dimensions.
        dynamic_sizes: Sizes for symbolic dimensions, by symbol.

    Returns:
        The twin. ``Tensor.dynamic`` is set on what changes with the dynamic dimensions.

    Raises:
        OptionError: if ``input_shapes`` names no input or contradicts the model.
        ModelError: if the model is not sorted, or no sizes can be found at which it is consistent.
    """
    given = sizes.check_input_shapes(model, input_shapes or {})
    symbols = dict(dynamic_sizes or {})
    builder = _Builder(model, given, symbols)
    walk, policy = builder.first_walk()
    if sizes.is_dynamic(model) or walk.guessed:
        walk = builder.compare(walk, policy)
    notes = builder.notes
    _fill_uses(walk)
    _set_constant(walk)
    _unique_names(walk)
    for name, message in walk.errors:
        notes.append((name, f"shape inference: {message}"))
    notes.extend((tensor.name, "its shape is not known") for tensor in _unknown(walk))
    return Graph(model, walk.ops, walk.tensors, walk.inputs, walk.outputs, notes)


class _Builder:
    """The walks over one model, and what they learn from each other."""

    def __init__(
        self, model: ir.Model, given: Mapping[str, tuple[int, ...]], symbols: Mapping[str, int]
    ) -> None:
        self.model = model
        self.given = given
        self.symbols = symbols
        self.inference = Inference()
        self.undecided: set[NodeKey] = set()
        self.notes: list[tuple[str, str]] = []

    def walk(
        self,
        shapes: Mapping[str, tuple[int, ...] | None],
        hints: Mapping[ir.Value, Hint] | None = None,
        stretch: int = 0,
    ) -> Walk:
        """One walk at the given input shapes."""
        walk = Walk(self.model, shapes, self.inference, hints, self.undecided, stretch)
        walk.run()
        return walk

    def complete(
        self,
        walk: Walk,
        shapes: Mapping[str, tuple[int, ...] | None],
        bound: Mapping[str, int],
        stretch: int = 0,
    ) -> Walk:
        """Repeats a walk with what a run of the model shows about the values that inference left open."""
        from graphprune.graph import measure

        unknown = [tensor.value for tensor in _unknown(walk) if tensor.value is not None]
        if not unknown:
            return walk
        stored = measure.stored(unknown, bound)
        mine = [value for value in unknown if value.graph is self.model.graph]
        measured: dict[ir.Value, Hint] = {}
        reason: str | None = None
        if mine:
            try:
                measured = measure.measure(self.model, mine, shapes)
            except ModelError as error:
                reason = str(error)
        # Where the shape depends on contents, the model's word counts more than a run on random contents; where
        # nobody but the runtime knows the op, the run counts more.
        declared = {value: hint for value, hint in stored.items() if _is_standard(value)}
        best = self.walk(shapes, {**stored, **measured, **declared}, stretch)
        if best.errors and measured:
            other = self.walk(shapes, {**stored, **measured}, stretch)
            best = min(best, other, key=lambda each: len(each.errors))
        if reason is not None and _unknown(best):
            self.notes.append((self.model.graph.name or "model", reason))
        return best

    def first_walk(self) -> tuple[Walk, sizes.Policy]:
        """A walk at sizes at which the model is consistent."""
        failed: list[tuple[Walk, sizes.Policy]] = []
        dynamic = sizes.is_dynamic(self.model)
        tried: set[tuple[tuple[str, tuple[int, ...] | None], ...]] = set()
        for policy in sizes.POLICIES:
            shapes, bound = sizes.input_sizes(self.model, policy, self.given, self.symbols)
            if tuple(shapes.items()) in tried:
                continue
            tried.add(tuple(shapes.items()))
            walk = self.walk(shapes)
            problem = walk.errors[0] if walk.errors else _emptied(walk) if dynamic else None
            if problem is None or not dynamic:
                return self.complete(walk, shapes, bound), policy
            failed.append((walk, policy))
        # Perhaps it is ONNX's inference that is wrong: then the model runs all the same.
        for walk, policy in failed[:3]:
            if self._runs(walk):
                return self.complete(walk, walk.sizes, {}), policy
        name, reason = next(iter(failed[0][0].errors), None) or _emptied(failed[0][0]) or ("", "")
        raise ModelError(
            f"no sizes of the dynamic dimensions fit node {name!r} ({reason}): "
            "give them with --input-shape NAME:dims"
        )

    def _runs(self, walk: Walk) -> bool:
        from graphprune.graph import measure

        try:
            measure.measure(self.model, list(self.model.graph.outputs)[:1], walk.sizes)
        except ModelError:
            return False
        return True

    def compare(self, walk: Walk, policy: sizes.Policy) -> Walk:
        """Marks what differs at other sizes; an If whose condition differs is walked both ways."""
        while True:
            other = self._second_walk(policy, {name for name, _ in walk.errors})
            if other is None:
                _taint(walk)
                return walk
            differing = {
                key for key, taken in walk.decisions.items() if other.decisions.get(key) is not taken
            } - self.undecided
            if not differing:
                break
            self.undecided |= differing
            shapes, bound = sizes.input_sizes(self.model, policy, self.given, self.symbols)
            walk = self.complete(self.walk(shapes), shapes, bound)
        if [op.node for op in walk.ops] != [op.node for op in other.ops] or len(walk.tensors) != len(
            other.tensors
        ):
            _taint(walk)
            return walk
        for tensor, twin in zip(walk.tensors, other.tensors, strict=True):
            tensor.dynamic = tensor.shape != twin.shape or not _same(tensor.data, twin.data)
        for tensor in walk.guessed:
            tensor.dynamic = True
        return walk

    def _second_walk(self, policy: sizes.Policy, expected: set[str]) -> Walk | None:
        """A walk at larger sizes; None if it has errors at other nodes than those in ``expected``."""
        for doubled in (False, True):
            enlarge = _enlarge(doubled)
            symbols = {name: enlarge("sequence", size) for name, size in self.symbols.items()}
            shapes, bound = sizes.input_sizes(
                self.model, policy.larger(doubled), self.given, symbols, enlarge
            )
            walk = self.walk(shapes, stretch=1)
            if {name for name, _ in walk.errors} <= expected and _emptied(walk) is None:
                return self.complete(walk, shapes, bound, stretch=1)
        return None


def _enlarge(doubled: bool) -> Callable[[str, int], int]:
    def enlarge(role: str, size: int) -> int:
        if role == "batch":
            return size + 1
        if role == "image":
            return 2 * size if doubled else size + 32
        return 2 * size if doubled or size == 1 else size + size // 2

    return enlarge


def _is_standard(value: ir.Value) -> bool:
    """True if the value is made by an op of ONNX itself."""
    node = value.producer()
    return node is not None and not node.domain


def _unknown(walk: Walk) -> list[Tensor]:
    """The tensors without a shape that something reads; sequences and the like do not count."""
    read = {tensor for op in walk.ops for tensor in op.inputs if tensor is not None}
    read.update(walk.outputs)
    return [
        tensor
        for tensor in walk.tensors
        if tensor.shape is None and tensor not in walk.types and tensor in read
    ]


def _emptied(walk: Walk) -> tuple[str, str] | None:
    """The first op that makes an empty tensor of tensors that are not empty: a sign of too small an input."""
    for op in walk.ops:
        if op.domain or op.op_type not in ("Conv", "MaxPool", "AveragePool", "LpPool"):
            continue
        source, output = op.inputs[0], op.outputs[0]
        if source is None or output is None or source.shape is None or output.shape is None:
            continue
        if 0 in output.shape and 0 not in source.shape:
            return op.name, f"its output would be empty: {list(output.shape)}"
    return None


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f")))


def _taint(walk: Walk) -> None:
    """Without a second walk: whatever comes from a tensor with a dynamic dimension counts as dynamic."""
    for tensor in walk.inputs:
        shape = tensor.value.shape if tensor.value is not None else None
        tensor.dynamic = not sizes.is_static(shape)
    for tensor in walk.guessed:
        tensor.dynamic = True
    changed = True
    while changed:  # more than once only where a loop leads back
        changed = False
        for op in walk.ops:
            if not any(tensor is not None and tensor.dynamic for tensor in op.inputs):
                continue
            for output in op.outputs:
                if output is not None and not output.dynamic:
                    output.dynamic = changed = True


def _fill_uses(walk: Walk) -> None:
    for op in walk.ops:
        for slot, tensor in enumerate(op.inputs):
            if tensor is not None:
                tensor.uses.append((op, slot))


def _set_constant(walk: Walk) -> None:
    for op in walk.ops:
        constant = _is_constant(op)
        for output in op.outputs:
            if output is not None:
                output.constant = constant


def _is_constant(op: Op) -> bool:
    inputs = [tensor for tensor in op.inputs if tensor is not None]
    if not inputs and op.domain:
        return False
    if op.domain == TWIN_DOMAIN:
        return op.op_type == "Join" and len(inputs) == 1 and inputs[0].constant
    if op.op_type in ("Shape", "Size") and not op.domain:
        if inputs and inputs[0].shape is not None and not inputs[0].dynamic:
            return True
    return all(tensor.constant for tensor in inputs) and not is_random(op)


def _unique_names(walk: Walk) -> None:
    """Copies of a shared constant become ``name#k``; other names that occur twice get a suffix too."""
    count: dict[str, int] = {}
    for tensor in walk.tensors:
        count[tensor.name] = count.get(tensor.name, 0) + 1
    taken = {name for name, number in count.items() if number == 1}
    following: dict[str, int] = {}
    for tensor in walk.tensors:
        if count[tensor.name] == 1:
            continue
        plain = tensor.name
        # The first tensor that an op makes keeps its name; copies of constants are numbered from 0.
        if plain not in taken and not tensor.constant:
            taken.add(plain)
            continue
        k = following.get(plain, 0)
        while f"{plain}#{k}" in taken:
            k += 1
        following[plain] = k + 1
        tensor.name = f"{plain}#{k}"
        taken.add(tensor.name)
