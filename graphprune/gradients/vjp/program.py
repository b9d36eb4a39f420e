"""A twin as one flat ONNX graph that also gives derivatives.

The twin (:mod:`graphprune.graph`) has static shapes, no functions and no branches that are never taken. Its ops are
written out once more, all real numbers in one type (float16 gradients underflow, and one type needs one set of
kernels), constants folded; then adjoints are carried from the loss back to where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from graphprune.errors import OptionError
from graphprune.gradients.vjp.emit import Array, Emitter, NoGradientError, Value
from graphprune.gradients.vjp.site import Site, find_vjp
from graphprune.graph import TWIN_DOMAIN, Graph, Op, Tensor
from graphprune.graph.evaluate import evaluate_constant, node_proto

#: What to do where there is no derivative.
WITHOUT = "scores from weights or activations need no gradients"

_REAL = {int(t) for t in ir.DataType if t.is_floating_point()}


class Place(NamedTuple):
    """An operand of an op: what the op reads there, not what others read of the same tensor."""

    op: Op
    slot: int


@dataclass
class Program:
    """A graph under construction.

    Attributes:
        graph: The twin at the sizes at which the program is to run.
        dtype: float32, or float64 where the kernels know it.
        live: Constants that are differentiated: what is made of them is computed at run time.
    """

    graph: Graph
    dtype: npt.DTypeLike = np.float32
    live: frozenset[Tensor] = frozenset()
    e: Emitter = field(init=False)

    def __post_init__(self) -> None:
        opsets = {op.domain: op.version for op in self.graph.ops if op.domain != TWIN_DOMAIN}
        self._opsets = opsets
        opsets.setdefault("", max(self.graph.model.opset_imports.get("", 0), 1))
        self.e = Emitter(opsets[""], np.dtype(self.dtype))
        self._inputs = {tensor.name: tensor for tensor in self.graph.inputs}
        self._folded: dict[str, Tensor] = {}
        self._outputs: list[Value] = []
        self._seeds: dict[str, tuple[int, ...]] = {}
        self._alive = self._reached(self.live)

    def _reached(self, sources: Iterable[Tensor]) -> set[Tensor]:
        """The sources, and the constants that are made of them."""
        reached = set(sources)
        for op in self.graph.ops if reached else ():
            if any(tensor in reached for tensor in op.inputs if tensor is not None):
                reached.update(tensor for tensor in op.outputs if tensor is not None and tensor.constant)
        return reached

    # -- forward ------------------------------------------------------------------------------------------------

    def value(self, tensor: Tensor) -> Value:
        """The forward value of a tensor.

        Raises:
            NoGradientError: Its shape is not known.
        """
        if tensor.shape is None:
            raise NoGradientError(f"the shape of {tensor.name!r} is not known")
        if self._is_folded(tensor):
            self._folded.setdefault(tensor.name, tensor)
        return self.e.value(tensor.name, tensor.shape)

    def _is_folded(self, tensor: Tensor) -> bool:
        known = tensor.constant or (tensor.data is not None and not tensor.is_input)
        return known and tensor not in self._alive

    def write_forward(self, gates: Mapping[Place, Value] | None = None) -> None:
        """Write the twin's ops.

        Args:
            gates: Factors of operands: what an op reads is multiplied by them.
        """
        for op in self.graph.ops:
            outputs = [tensor for tensor in op.outputs if tensor is not None]
            if all(self._is_folded(tensor) for tensor in outputs):
                continue
            names = []
            for slot, tensor in enumerate(op.inputs):
                gate = gates.get(Place(op, slot)) if gates else None
                if tensor is None:
                    names.append("")
                elif gate is not None:
                    names.append((self.value(tensor) * gate).name)
                else:
                    if self._is_folded(tensor):
                        self._folded.setdefault(tensor.name, tensor)
                    names.append(tensor.name)
            if op.domain == TWIN_DOMAIN:
                if op.op_type != "Join" or len(names) != 1:
                    continue  # a loop, or an If that goes either way: an error if its results are needed
                node = onnx.helper.make_node("Identity", names, [outputs[0].name])
            else:
                node = self._node(op, names)
            self.e.nodes.append(node)

    def _node(self, op: Op, names: list[str]) -> onnx.NodeProto:
        node = node_proto(op)
        node.name = op.name
        del node.input[:], node.output[:]
        node.input.extend(names)
        node.output.extend("" if tensor is None else tensor.name for tensor in op.outputs)
        real = onnx.helper.np_dtype_to_tensor_dtype(self.e.dtype)
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _REAL:
                attribute.i = real
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in _REAL:
                array = onnx.numpy_helper.to_array(attribute.t).astype(self.e.dtype)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))
        return node

    # -- backward -----------------------------------------------------------------------------------------------

    def seed(self, name: str, shape: tuple[int, ...]) -> Value:
        """An input of the program beside the model's own, of its real type."""
        self._seeds[name] = shape
        return self.e.value(name, shape)

    def adjoints(
        self, seeds: Mapping[Tensor, Value], places: Iterable[Place], tensors: Iterable[Tensor] = ()
    ) -> tuple[dict[Place, Value], dict[Tensor, Value]]:
        """Carry adjoints back.

        Args:
            seeds: The loss' derivative by each of these tensors.
            places: Operands whose adjoint is asked for.
            tensors: Constants whose adjoint is asked for; they must be ``live``.

        Returns:
            The adjoints; absent where the loss does not depend on them.

        Raises:
            OptionError: An op between has no derivative.
        """
        asked = set(places)
        wanted_tensors = set(tensors)
        active = self._active(asked, wanted_tensors)
        pending: dict[Tensor, list[Value]] = {tensor: [value] for tensor, value in seeds.items()}
        at_place: dict[Place, Value] = {}
        at_tensor: dict[Tensor, Value] = {}

        def collected(tensor: Tensor | None) -> Value | None:
            if tensor is None or tensor not in pending:
                return None
            total = self.e.total(pending.pop(tensor))
            if tensor in wanted_tensors:
                at_tensor[tensor] = total
            return total

        for op in reversed(self.graph.ops):
            if not any(tensor in pending for tensor in op.outputs if tensor is not None):
                continue
            grads = [collected(tensor) for tensor in op.outputs]
            wanted = frozenset(
                slot
                for slot, tensor in enumerate(op.inputs)
                if tensor is not None and _is_real(tensor) and (tensor in active or Place(op, slot) in asked)
            )
            if not wanted:
                continue
            for slot, value in self._contributions(op, grads, wanted).items():
                tensor = op.inputs[slot] if slot < len(op.inputs) else None
                if tensor is None or slot not in wanted:
                    continue
                assert value.shape == tensor.shape, (op, slot, value.shape, tensor.shape)
                if Place(op, slot) in asked:
                    at_place[Place(op, slot)] = value
                if tensor in active:
                    pending.setdefault(tensor, []).append(value)
        for tensor in wanted_tensors:
            collected(tensor)
        return at_place, at_tensor

    def _active(self, places: set[Place], tensors: set[Tensor]) -> set[Tensor]:
        """Tensors on which what is asked for has an influence."""
        ops = {place.op for place in places}
        active = set(tensors)
        for op in self.graph.ops:
            if op in ops or any(tensor in active for tensor in op.inputs if tensor is not None):
                active.update(tensor for tensor in op.outputs if tensor is not None)
        return active

    def _contributions(
        self, op: Op, grads: list[Value | None], wanted: frozenset[int]
    ) -> Mapping[int, Value]:
        if op.domain == TWIN_DOMAIN and op.op_type == "Join" and len(op.inputs) == 1 and grads[0] is not None:
            return {0: grads[0]}
        rule = find_vjp(op)
        reason = f"there is no derivative rule for {op.kind}"
        if op.domain == TWIN_DOMAIN:
            kind = op.node.op_type if op.node is not None else "a branch"
            rule, reason = None, f"gradients are not carried through {kind}"
        if rule is not None:
            try:
                return rule(Site(op, self.e, grads, wanted, self.value))
            except NoGradientError as error:
                reason = f"{op.kind} {error}"
        raise OptionError(f"no gradient through {op.kind} {op.name!r}: {reason}; {WITHOUT}")

    # -- the model ----------------------------------------------------------------------------------------------

    def output(self, value: Value) -> None:
        """Make a value an output of the model; outputs are given in the order of these calls."""
        self._outputs.append(self.e.op("Identity", [value], value.shape))

    def finish(self) -> onnx.ModelProto:
        """The model: what its outputs need, and no more.

        Raises:
            OptionError: They need what only a loop or a branch gives.
        """
        nodes = _needed(self.e.nodes, {value.name for value in self._outputs})
        made = {name for node in nodes for name in node.output}
        used = {name for node in nodes for name in _reads(node)} - made
        inputs, initializers = [], []
        for name in sorted(used):
            if name in self.e.constants:
                initializers.append(onnx.numpy_helper.from_array(self.e.constants[name], name))
            elif name in self._folded:
                initializers.append(self._initializer(self._folded[name]))
            elif name in self._seeds:
                inputs.append(self._info(name, None, self._seeds[name]))
            elif name in self._inputs:
                tensor = self._inputs[name]
                inputs.append(self._info(name, tensor.dtype, tensor.shape or ()))
            else:
                constants = [
                    tensor for tensor in self._alive if tensor.name == name and tensor.producer is None
                ]
                if not constants:
                    raise OptionError(
                        f"{name!r} comes from an If, Loop or Scan, which has no gradient; {WITHOUT}"
                    )
                initializers.append(self._initializer(constants[0]))
        outputs = [self._info(value.name, None, value.shape) for value in self._outputs]
        graph = onnx.helper.make_graph(nodes, "gradients", inputs, outputs, initializers)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self._ir_version())

    def _ir_version(self) -> int:
        return max(self.graph.model.ir_version, 8)

    def _initializer(self, tensor: Tensor) -> onnx.TensorProto:
        array: Array = tensor.data if tensor.data is not None else evaluate_constant(tensor)
        if tensor.dtype is not None and int(tensor.dtype) in _REAL:
            array = np.asarray(array).astype(self.e.dtype)
        return onnx.numpy_helper.from_array(np.array(array, order="C"), tensor.name)

    def _info(self, name: str, dtype: ir.DataType | None, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        real = dtype is None or int(dtype) in _REAL
        element = int(onnx.helper.np_dtype_to_tensor_dtype(self.e.dtype)) if real else int(dtype or 0)
        return onnx.helper.make_tensor_value_info(name, element, shape)


def _is_real(tensor: Tensor) -> bool:
    """True if the adjoint of a tensor means something: reals, and integers that stand for reals."""
    if tensor.dtype is None or tensor.dtype.is_floating_point():
        return True
    return tensor.producer is not None and tensor.producer.op_type == "QuantizeLinear"


def _reads(node: onnx.NodeProto) -> Iterable[str]:
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            own = {value.name for value in attribute.g.input}
            own.update(name for inner in attribute.g.node for name in inner.output)
            for inner in attribute.g.node:
                yield from (name for name in _reads(inner) if name not in own)


def _needed(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that ``wanted`` depends on."""
    wanted = set(wanted)
    kept: list[Any] = []
    for node in reversed(nodes):
        if any(name in wanted for name in node.output):
            kept.append(node)
            wanted.update(_reads(node))
    return kept[::-1]
