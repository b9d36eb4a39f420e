"""Layers: one op as a model of its own, at any widths."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graphprune.axes.flow import SignatureFlow
from graphprune.choice.rounding import ROUND_TO, ROUNDED_FROM
from graphprune.cost import mac_terms
from graphprune.costs.widths import Widths
from graphprune.graph import Op, Tensor
from graphprune.graph.evaluate import node_proto
from graphprune.rules.registry import Refusal, find_rule

if TYPE_CHECKING:
    import onnx

#: Fractions of a factor at which a layer is measured: where one factor is cut, and where two are.
LINE = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
GRID = (1.0, 0.75, 0.5, 0.25, 0.125)
#: The same for sizes that are no multiple of the block.
RAGGED = (0.95, 0.6, 0.3, 0.1)
#: Sizes of kinds of op that do not care for blocks are measured at multiples of this where they are large.
STEP = 8


@dataclass(frozen=True, slots=True)
class Cut:
    """A factor of an op that plans may cut.

    Convolutions run another kernel where the number of channels is no multiple of a block, often slower than at the
    next larger multiple: such sizes have points of their own, and are never interpolated from the others.

    Attributes:
        factor: Its name in the op's signature.
        extent: The number of its extent.
        block: What aligned sizes are multiples of; 1 where the op does not care.
        aligned: Multiples of ``block`` at which the op is measured, ascending; may be empty.
        ragged: Other sizes, ascending; may be empty.
    """

    factor: str
    extent: int
    block: int
    aligned: tuple[int, ...]
    ragged: tuple[int, ...]

    @property
    def points(self) -> tuple[int, ...]:
        """All sizes, in the order of the table's axis."""
        return self.aligned + self.ragged


@dataclass(frozen=True)
class Layer:
    """A contraction with what plans may cut of it.

    Attributes:
        op: The op of the twin.
        flow: Its signature.
        cuts: One entry for each factor that shrinks, at most two; empty where none does.
        sizes: Original sizes of all factors.
    """

    op: Op
    flow: SignatureFlow
    cuts: tuple[Cut, ...]
    sizes: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of points along each cut."""
        return tuple(len(cut.points) for cut in self.cuts)

    @cached_property
    def key(self) -> dict[str, Any]:
        """What the layer's times depend on, beside the machine: plain data."""
        operands = [
            None if t is None else [t.dtype.name if t.dtype else None, list(t.shape or ()), bool(t.constant)]
            for t in (*self.op.inputs, *self.op.outputs)
        ]
        return {
            "op": self.op.kind,
            "version": self.op.version,
            "attributes": {name: _plain(value) for name, value in sorted(self.op.attributes.items())},
            "operands": operands,
            "cuts": [[cut.factor, cut.block, list(cut.points)] for cut in self.cuts],
        }

    def elements(self, point: tuple[int, ...]) -> int:
        """Number of elements of all inputs at a point."""
        sizes = {**self.sizes, **{cut.factor: n for cut, n in zip(self.cuts, point, strict=True)}}
        return sum(
            prod(self._input_shape(slot, sizes)) for slot, t in enumerate(self.op.inputs) if t is not None
        )

    def model(
        self, points: Sequence[tuple[int, ...]], seed: int = 0
    ) -> tuple[onnx.ModelProto, dict[str, Any]]:
        """The op once for each point, side by side in one model, and inputs for it.

        Args:
            points: Sizes of the cut factors.
            seed: For weights and inputs.

        Returns:
            The model, its nodes named ``p0``, ``p1``, ... and their outputs ``p0_0``, ...; random inputs by name.
        """
        import onnx

        rng = np.random.default_rng(seed)
        nodes, inputs, outputs, initializers, feeds = [], [], [], [], {}
        for number, point in enumerate(points):
            sizes = {**self.sizes, **{cut.factor: n for cut, n in zip(self.cuts, point, strict=True)}}
            node = node_proto(self.op)
            node.name = f"p{number}"
            self._set_attributes(node, sizes)
            for slot, tensor in enumerate(self.op.inputs):
                if tensor is None:
                    continue
                name = node.input[slot] = f"p{number}_i{slot}"
                array = _contents(tensor, self._input_shape(slot, sizes), rng)
                if tensor.constant:
                    initializers.append(onnx.numpy_helper.from_array(array, name))
                else:
                    feeds[name] = array
                    kind = int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
                    inputs.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
            for slot, made in enumerate(self.op.outputs):
                if made is not None and made.dtype is not None:
                    node.output[slot] = f"p{number}_{slot}"
                    free = [None] * len(made.shape or ())
                    info = onnx.helper.make_tensor_value_info(node.output[slot], int(made.dtype), free)
                    outputs.append(info)
            nodes.append(node)
        opsets = {self.op.domain: self.op.version}
        opsets.setdefault("", onnx.defs.onnx_opset_version() - 4)
        graph = onnx.helper.make_graph(nodes, "layer", inputs, outputs, initializers)
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
        return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), feeds

    def _set_attributes(self, node: onnx.NodeProto, sizes: Mapping[str, int]) -> None:
        import onnx

        rule = find_rule(self.op)
        for name, factors in (rule.attributes if rule is not None else {}).items():
            if name in self.op.attributes or (rule is not None and name in rule.defaults):
                kept = [attribute for attribute in node.attribute if attribute.name != name]
                del node.attribute[:]
                node.attribute.extend(kept)
                size = prod(sizes[factor] for factor in factors)
                node.attribute.append(onnx.helper.make_attribute(name, size))

    def _input_shape(self, slot: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
        tensor = self.op.inputs[slot]
        assert tensor is not None
        shape = list(tensor.shape or ())
        for view in self.flow.signature.views:
            if (view.is_output, view.slot) == (False, slot):
                for index, axis in enumerate(view.axes):
                    if axis.factors:
                        shape[index] = prod(sizes[name] for name in axis.factors)
        return tuple(shape)


def layer_of(op: Op, widths: Widths, *, block: int = 1, round_to: int | None = None) -> Layer | None:
    """The layer of an op that sums products; None where it cannot be run alone at other widths.

    That is where it costs no multiply-accumulates, has no plain signature, is cut along more than two factors, or
    reads operands in parts.

    Args:
        op: An op of the twin.
        widths: The sizes of its network.
        block: Channels that convolutions handle at once on this machine.
        round_to: What groups keep multiples of; None: the default of 8 for large ones.
    """
    analysis = widths.network.analysis
    flows = analysis.flows[op.index]
    if isinstance(flows, Refusal) or len(flows) != 1 or not mac_terms(op, analysis):
        return None
    flow = flows[0]
    if not isinstance(flow, SignatureFlow) or any(axis.take for v in flow.signature.views for axis in v.axes):
        return None
    if any(t is not None and (t.shape is None or t.dtype is None) for t in (*op.inputs, *op.outputs)):
        return None
    cuts = []
    for factor, number in widths.factors(op).items():
        groups = [widths.network.groups[group] for group in widths.extents[number].groups]
        free = [group for group in groups if group.frozen is None]
        if free:
            steps = [round_to or (ROUND_TO if group.size >= ROUNDED_FROM else 1) for group in free]
            cuts.append((factor, number, any(step % block for step in steps)))
    if len(cuts) > 2:
        return None
    fractions = GRID if len(cuts) == 2 else LINE
    block = block if "Conv" in op.op_type else 1
    return Layer(
        op,
        flow,
        tuple(
            Cut(factor, number, block, *points_of(widths.extents[number].size, fractions, block, ragged))
            for factor, number, ragged in cuts
        ),
        dict(flow.signature.sizes),
    )


def points_of(
    size: int, fractions: Sequence[float], block: int, ragged: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes to measure at: multiples of a block, and others. The original size is among them.

    >>> points_of(64, (1.0, 0.5, 0.25), 8, False)
    ((16, 32, 64), ())
    >>> points_of(64, (1.0, 0.5, 0.25), 8, True)
    ((16, 32, 64), (6, 19, 38, 61))
    """
    step = block if block > 1 else (STEP if size >= 2 * STEP else 1)
    aligned = {max(step, round(size * fraction / step) * step) for fraction in fractions}
    aligned = {n for n in aligned if n <= size}
    others = {max(1, round(size * fraction)) for fraction in RAGGED} if ragged and block > 1 else set()
    others = {n - 1 if n % block == 0 else n for n in others}
    (aligned if size % block == 0 else others).add(size)
    return tuple(sorted(aligned)), tuple(sorted(others))


def _contents(tensor: Tensor, shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[Any]:
    """What is known of an operand where its shape is as it was; else random numbers, integers 0 or 1."""
    if tensor.data is not None and tensor.data.shape == shape:
        return tensor.data
    assert tensor.dtype is not None
    dtype = tensor.dtype.numpy()
    if dtype.kind == "b":
        return np.ones(shape, dtype)
    if dtype.kind in "iu":
        return rng.integers(0, 2, shape).astype(dtype)
    # A short piece repeated: kernels take the same time on it, and large weights are made at once.
    return np.resize(rng.standard_normal(4099, dtype=np.float32).astype(dtype), shape)


def _plain(value: Any) -> Any:
    """An attribute as JSON can hold it."""
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    return repr(value)
