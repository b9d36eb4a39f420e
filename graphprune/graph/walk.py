"""One forward walk over a model at fixed input sizes: makes the ops and tensors of the twin, with their shapes.

Functions are inlined, control flow is laid out flat (:mod:`graphprune.graph.controlflow`), and each tensor gets its
element type, its shape and, where that is small and known, its contents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphprune.errors import ModelError, said
from graphprune.graph import TWIN_DOMAIN, Op, Tensor
from graphprune.graph.evaluate import Array, Type, fits, is_random, schema_of
from graphprune.graph.inference import NOTHING, READS_FLOATS, Found, Inference
from graphprune.model.nodes import (
    captured,
    constant_array,
    is_constant_value,
    python_value,
    stored_tensor,
    subgraphs,
)

#: A node in its calling context; one If in a function called twice has two keys.
NodeKey: TypeAlias = tuple[ir.Node, ...]
#: Element type and shape of a value of the main graph, seen in a run or stored in the model.
Hint: TypeAlias = tuple[ir.DataType | None, tuple[int, ...]]

#: Constants up to this size, and vectors of any size, are not shared between their uses.
_SMALL = 1024
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


@dataclass(slots=True)
class Scope:
    """Where a walk is: the main graph, or one call of a function. Subgraphs share the scope around them."""

    tensors: dict[ir.Value, Tensor]
    opsets: Mapping[str, int]
    path: tuple[ir.Node, ...] = ()
    prefix: str = ""
    #: Attributes of the function call, that the body's nodes refer to.
    arguments: Mapping[str, ir.Attr] = field(default_factory=dict)
    #: Values that stand for a constant of another scope: parameters and results of a call.
    aliases: dict[ir.Value, tuple[ir.Value, Scope]] = field(default_factory=dict)
    #: Parameters that the call leaves out.
    missing: set[ir.Value] = field(default_factory=set)


class Walk:
    """Builds ops and tensors; see the module's docstring.

    Args:
        model: Read only.
        sizes: The shape of each graph input, by name; None where it is unknown.
        inference: Shared by all walks over the same model.
        hints: Element types and shapes for values of the main graph that inference cannot know.
        undecided: If nodes of which both branches are to be walked although the condition is known.
        stretch: Added to every size that depends on the contents of a tensor (NonZero, loops of unknown length), so
            that two walks tell what follows from it.

    Attributes:
        ops, tensors, inputs, outputs: As in :class:`graphprune.graph.Graph`.
        types: Types of sequences, optionals and maps.
        errors: (op name, message) of each op whose inputs contradict each other.
        decisions: Which branch was taken, for each If with a known condition.
        guessed: Tensors whose size depends on contents that only a run can tell.
    """

    def __init__(
        self,
        model: ir.Model,
        sizes: Mapping[str, tuple[int, ...] | None],
        inference: Inference,
        hints: Mapping[ir.Value, Hint] | None = None,
        undecided: Iterable[NodeKey] = (),
        stretch: int = 0,
    ) -> None:
        self.model = model
        self.sizes = sizes
        self.inference = inference
        self.hints = hints or {}
        self.undecided = frozenset(undecided)
        self.stretch = stretch
        self.ops: list[Op] = []
        self.tensors: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.types: dict[Tensor, Type] = {}
        self.errors: list[tuple[str, str]] = []
        self.decisions: dict[NodeKey, bool] = {}
        self.guessed: list[Tensor] = []
        self._shared: list[tuple[ir.Value, Scope]] = []

    def run(self) -> None:
        """Walks the main graph.

        Raises:
            ModelError: if a node reads a value that nothing before it makes.
        """
        graph = self.model.graph
        scope = Scope({}, self.model.opset_imports)
        for value in graph.inputs:
            if value.is_initializer():
                continue
            tensor = self.new_tensor(scope, value, value.dtype, self.sizes.get(value.name or ""))
            tensor.is_input = True
            self._set_other_type(tensor, value)
            self.inputs.append(tensor)
        self.walk_nodes(graph, scope)
        for value in graph.outputs:
            output = self.read(value, scope)
            output.is_output = True
            self.outputs.append(output)

    def walk_nodes(self, nodes: Iterable[ir.Node], scope: Scope) -> None:
        """Walks the nodes of a graph or of a function's body, in order."""
        from graphprune.graph import controlflow

        functions = self.model.functions
        for node in nodes:
            if node.op_type == "Constant" and not node.domain:
                continue  # made at each use, like an initializer
            function = functions.get(node.op_identifier()) if functions else None
            if function is not None:
                self._call(node, function, scope)
            elif not node.domain and node.op_type in controlflow.WALKERS:
                controlflow.WALKERS[node.op_type](self, node, scope)
            else:
                self.walk_plain(node, scope)

    def walk_plain(self, node: ir.Node, scope: Scope) -> None:
        """Makes one op; values that its subgraphs capture become further inputs."""
        inputs = [self.operand(value, scope) for value in node.inputs]
        if node.attributes:
            inputs.extend(self.operand(value, scope) for value in captured(node))
        self.emit(node, scope, node.op_type, node.domain, self.attributes(node, scope), inputs, node.outputs)

    def mark(self) -> tuple[int, ...]:
        """How far the walk has come, for :meth:`rewind`."""
        return len(self.ops), len(self.tensors), len(self.errors), len(self.guessed), len(self._shared)

    def rewind(self, mark: tuple[int, ...]) -> None:
        """Forgets all that was added since ``mark``."""
        ops, tensors, errors, guessed, shared = mark
        del self.ops[ops:], self.tensors[tensors:], self.errors[errors:], self.guessed[guessed:]
        for value, scope in self._shared[shared:]:
            del scope.tensors[value]
        del self._shared[shared:]

    # ----- tensors ---------------------------------------------------------------------------------------------

    def new_tensor(
        self,
        scope: Scope,
        value: ir.Value | None,
        dtype: ir.DataType | None = None,
        shape: tuple[int, ...] | None = None,
        name: str | None = None,
    ) -> Tensor:
        """Adds a tensor for ``value`` in ``scope``; names are made unique at the end."""
        name = name or (value.name if value is not None else None) or "unnamed"
        tensor = Tensor(scope.prefix + name, dtype, shape, value)
        self.tensors.append(tensor)
        if value is not None:
            scope.tensors[value] = tensor
        return tensor

    def operand(self, value: ir.Value | None, scope: Scope, keep: bool = True) -> Tensor | None:
        """Like :meth:`read`, None where an optional input is missing."""
        return None if value is None or value in scope.missing else self.read(value, scope, keep)

    def read(self, value: ir.Value, scope: Scope, keep: bool = True) -> Tensor:
        """The tensor that a node reads: a new one for each use of a small constant.

        Args:
            value: What the node reads.
            scope: Where the node is.
            keep: False to look at a constant without making it a tensor of the twin.
        """
        known = scope.tensors.get(value)
        if known is not None:
            return known
        if value in scope.aliases:
            return self.read(*scope.aliases[value], keep)
        if not is_constant_value(value):
            raise ModelError(
                f"a node reads {value.name!r}, which no node before it makes: the model is not sorted or not valid"
            )
        tensor = self._constant_tensor(value, scope)
        if keep:
            self.tensors.append(tensor)
            shape = tensor.shape
            if shape is not None and len(shape) > 1 and _size(shape) > _SMALL:
                scope.tensors[value] = tensor
                self._shared.append((value, scope))
        return tensor

    def _constant_tensor(self, value: ir.Value, scope: Scope) -> Tensor:
        tensor = Tensor(scope.prefix + (value.name or "unnamed"), value.dtype, None, value, constant=True)
        known = self.inference.constants.get(value)
        if known is not None:
            tensor.dtype, tensor.shape, tensor.data = known
            return tensor
        stored = stored_tensor(value)
        if stored is None:
            # A Constant node without a plain tensor, perhaps with a reference to the call's attributes.
            producer = value.producer()
            if producer is None:
                raise ModelError(f"initializer {value.name!r} has no contents")
            array = constant_array(self.attributes(producer, scope))
            strings = array.dtype.kind in "OUS"
            tensor.dtype = ir.DataType.STRING if strings else ir.DataType.from_numpy(array.dtype)
            tensor.shape = array.shape
            tensor.data = None if strings else array
            return tensor
        tensor.dtype = stored.dtype
        tensor.shape = tuple(int(size) for size in stored.shape.numpy())
        if fits(tensor.dtype, _size(tensor.shape)):
            tensor.data = _read_only(stored.numpy())
        self.inference.constants[value] = (tensor.dtype, tensor.shape, tensor.data)
        return tensor

    def _set_other_type(self, tensor: Tensor, value: ir.Value) -> None:
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            proto = ir.serde.serialize_type(value.type)
            tensor.dtype = None
            tensor.shape = None
            self.types[tensor] = proto

    # ----- ops -------------------------------------------------------------------------------------------------

    def attributes(self, node: ir.Node, scope: Scope) -> dict[str, Any]:
        """The node's attributes as Python values; references are resolved, subgraphs left out."""
        if not node.attributes:
            return {}
        values: dict[str, Any] = {}
        for name, attribute in node.attributes.items():
            found = self.resolve(attribute, scope)
            if found is not None and found.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                values[name] = python_value(found)
        return values

    def resolve(self, attribute: ir.Attr, scope: Scope) -> ir.Attr | None:
        """The attribute itself, or what it refers to in the call around it; None if the call leaves it out."""
        if not attribute.is_ref():
            return attribute
        return scope.arguments.get(attribute.ref_attr_name or "")

    def emit(
        self,
        node: ir.Node,
        scope: Scope,
        op_type: str,
        domain: str,
        attributes: Mapping[str, Any],
        inputs: list[Tensor | None],
        outputs: Sequence[ir.Value | None],
    ) -> Op:
        """Adds an op with new tensors for ``outputs`` and works out their types and contents."""
        tensors = [
            self.new_tensor(scope, value) if value is not None and value.name != "" else None
            for value in outputs
        ]
        op = self.add_op(node, scope, op_type, domain, attributes, inputs, tensors)
        self._infer(op, scope)
        return op

    def add_op(
        self,
        node: ir.Node,
        scope: Scope,
        op_type: str,
        domain: str,
        attributes: Mapping[str, Any],
        inputs: list[Tensor | None],
        outputs: list[Tensor | None],
    ) -> Op:
        """Adds an op as it is."""
        version = node.version if node.version is not None else scope.opsets.get(domain, 1)
        op = Op(
            op_type,
            domain,
            1 if domain == TWIN_DOMAIN else version,
            attributes,
            inputs,
            outputs,
            node,
            scope.path,
        )
        op.index = len(self.ops)
        self.ops.append(op)
        for tensor in outputs:
            if tensor is not None:
                tensor.producer = op
        return op

    def _infer(self, op: Op, scope: Scope) -> None:
        if op.domain == "" and op.op_type in ("Shape", "Size"):
            self._infer_shape_op(op)
            return
        found = [NOTHING] * len(op.outputs)
        nested = op.node is not None and bool(op.node.attributes) and bool(subgraphs(op.node))
        if not nested:
            try:
                found = self.inference.types(op, self.types)
            except Exception as error:  # InferenceError, or a ValueError for an attribute of the wrong type
                self.errors.append((op.name, said(error)))
        complete = True
        for tensor, result in zip(op.outputs, found, strict=True):
            if tensor is None:
                continue
            tensor.dtype, tensor.shape = result.dtype, result.shape
            if result.other is not None:
                self.types[tensor] = result.other
            elif result.shape is None or result.dtype is None:
                complete = False
        if not complete:
            self._complete(op, scope, found)
        self._check_sizes(op)
        if not nested:
            self._evaluate(op)

    def _infer_shape_op(self, op: Op) -> None:
        source, output = op.inputs[0], op.outputs[0]
        if output is None:
            return
        output.dtype = ir.DataType.INT64
        if op.op_type == "Size":
            output.shape = ()
        if source is None or source.shape is None:
            return
        if op.op_type == "Size":
            data = np.asarray(int(np.prod(source.shape, dtype=np.int64)), np.int64)
        else:
            data = np.asarray(
                source.shape[op.attributes.get("start", 0) : op.attributes.get("end")], np.int64
            )
        output.shape = data.shape
        output.data = _read_only(data)

    def _complete(self, op: Op, scope: Scope, found: Sequence[Found]) -> None:
        """Fills in what ONNX's inference left open: rules first, then what was seen or stored in the model."""
        from graphprune import rules

        # A rule knows how sizes follow from sizes, not from contents.
        shapes = None if _reads_contents(op) else rules.output_shapes(op)
        known_op = schema_of(op.op_type, op.version, op.domain) is not None
        dtypes = [tensor.dtype for tensor in op.inputs if tensor is not None and tensor.dtype is not None]
        # Foreign ops mostly return what they compute with: the first real type, before the type of an index.
        first = next((dtype for dtype in dtypes if dtype.is_floating_point()), next(iter(dtypes), None))
        for k, tensor in enumerate(op.outputs):
            if tensor is None or tensor in self.types:
                continue
            value = tensor.value
            hint = self.hints.get(value) if value is not None and not scope.path else None
            if tensor.shape is None and shapes is not None and k < len(shapes) and shapes[k] is not None:
                tensor.shape = shapes[k]
            if tensor.shape is None and hint is not None:
                self.guess(tensor, hint[1], _free_axes(op, found[k], len(hint[1])))
            if tensor.dtype is None and value is not None:
                tensor.dtype = (hint[0] if hint is not None else None) or value.dtype
                if value.type is not None and not isinstance(value.type, ir.TensorType):
                    self._set_other_type(tensor, value)
                elif tensor.dtype is None and not known_op:
                    tensor.dtype = first

    def guess(self, tensor: Tensor, shape: tuple[int, ...], free: Iterable[int]) -> None:
        """Gives a tensor the shape seen in a run; the axes ``free`` depend on contents."""
        axes = set(free)
        tensor.shape = tuple(size + self.stretch if axis in axes else size for axis, size in enumerate(shape))
        if axes:
            self.guessed.append(tensor)

    def _check_sizes(self, op: Op) -> None:
        """Contradictions that ONNX's inference lets pass."""
        for tensor in op.outputs:
            if tensor is not None and tensor.shape is not None and min(tensor.shape, default=0) < 0:
                self.errors.append(
                    (op.name, f"output {tensor.name!r} would have the shape {list(tensor.shape)}")
                )
                tensor.shape = None
        if op.op_type == "Conv" and not op.domain and len(op.inputs) > 1:
            x, w = op.inputs[0], op.inputs[1]
            if (
                x is not None
                and w is not None
                and x.shape
                and w.shape
                and len(x.shape) > 1
                and len(w.shape) > 1
            ):
                expected = w.shape[1] * int(op.attributes.get("group", 1))
                if x.shape[1] != expected:
                    self.errors.append(
                        (op.name, f"it has {x.shape[1]} input channels, its weight {expected}")
                    )

    def _evaluate(self, op: Op) -> None:
        if op.domain or not op.inputs or any(t is not None and t.data is None for t in op.inputs):
            return
        if is_random(op) or not any(op.inputs):
            return
        for tensor in op.outputs:
            if tensor is None:
                continue
            if tensor in self.types or not fits(tensor.dtype, _size(tensor.shape)):
                return
        results = self.inference.data(op)
        if results is None:
            return
        for tensor, array in zip(op.outputs, results, strict=False):
            if tensor is None or tensor.dtype is None:
                continue
            dtype = tensor.dtype.numpy()
            if array.dtype != dtype:
                array = _read_only(array.astype(dtype))
            tensor.shape = array.shape
            if fits(tensor.dtype, array.size):
                tensor.data = array

    # ----- functions -------------------------------------------------------------------------------------------

    def _call(self, node: ir.Node, function: ir.Function, scope: Scope) -> None:
        inner = Scope(
            {},
            function.opset_imports or scope.opsets,
            (*scope.path, node),
            f"{scope.prefix}{node.name or node.op_type + '_' + str(len(self.ops))}/",
            self._arguments(node, function, scope),
        )
        arguments = list(node.inputs) + [None] * (len(function.inputs) - len(node.inputs))
        for parameter, argument in zip(function.inputs, arguments, strict=False):
            if argument is None or argument in scope.missing:
                inner.missing.add(parameter)
            elif argument in scope.tensors:
                inner.tensors[parameter] = scope.tensors[argument]
            else:  # a constant: each use in the body is a tensor of its own
                inner.aliases[parameter] = (argument, scope)
        self.walk_nodes(function, inner)
        for result, value in zip(function.outputs, node.outputs, strict=False):
            if result in inner.tensors:
                scope.tensors[value] = inner.tensors[result]
            else:
                scope.aliases[value] = (result, inner)

    def _arguments(self, node: ir.Node, function: ir.Function, scope: Scope) -> dict[str, ir.Attr]:
        arguments = {
            name: attribute
            for name, attribute in function.attributes.items()
            if attribute.value is not None and not attribute.is_ref()
        }
        for name, attribute in node.attributes.items():
            found = self.resolve(attribute, scope)
            if found is not None:
                arguments[name] = found
        return arguments


def _reads_contents(op: Op) -> bool:
    """True if an operand that is not known before the run may decide the shape of the result."""
    if op.domain:
        return False
    kinds = (*_INTEGERS, ir.DataType.FLOAT) if op.op_type in READS_FLOATS else _INTEGERS
    return any(
        tensor is not None and tensor.data is None and tensor.dtype in kinds and len(tensor.shape or ()) < 2
        for tensor in op.inputs[1:]
    )


def _free_axes(op: Op, found: Found, rank: int) -> Sequence[int]:
    """The axes of an output whose sizes depend on the contents of an operand."""
    if found.rank is not None:
        return found.open_axes
    return range(rank) if _reads_contents(op) else ()


def _size(shape: tuple[int, ...] | None) -> int:
    size = 1
    for length in shape or ():
        size *= length
    return size


def _read_only(array: Array) -> Array:
    view: Array = array.view()
    view.flags.writeable = False
    return view
