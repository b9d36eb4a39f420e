"""ONNX's own shape inference, one op at a time, remembered: repeated layers cost a lookup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphprune.graph import Op, Tensor
from graphprune.graph.evaluate import Array, Type, node_proto, run_reference, schema_of, type_of

#: Largest integer operand that is shown to shape inference (a Reshape target, axes, Slice starts).
_MAX_OPERAND = 2**10
#: Ops whose output shape depends on the contents of a floating-point operand.
READS_FLOATS = frozenset({"Resize", "Upsample", "Range", "MelWeightMatrix", "OneHot"})


@dataclass(frozen=True, slots=True)
class Found:
    """What inference knows of one output.

    Attributes:
        dtype: Element type of a tensor.
        shape: Its shape if all sizes are known.
        rank: Its rank if that is known.
        open_axes: The axes whose sizes are not known.
        other: The whole type of a sequence, an optional or a map.
    """

    dtype: ir.DataType | None = None
    shape: tuple[int, ...] | None = None
    rank: int | None = None
    open_axes: tuple[int, ...] = ()
    other: Type | None = None


NOTHING = Found()


def _found(proto: Type | None) -> Found:
    if proto is None or proto.WhichOneof("value") is None:
        return NOTHING
    if not proto.HasField("tensor_type"):
        return Found(other=proto)
    tensor_type = proto.tensor_type
    dtype = ir.DataType(tensor_type.elem_type) if tensor_type.elem_type else None
    if not tensor_type.HasField("shape"):
        return Found(dtype)
    dims = tensor_type.shape.dim
    free = tuple(axis for axis, dim in enumerate(dims) if not dim.HasField("dim_value"))
    shape = None if free else tuple(dim.dim_value for dim in dims)
    return Found(dtype, shape, len(dims), free)


class Inference:
    """Shape inference of single ops, remembered by op type, attributes, input types and small integer inputs."""

    def __init__(self) -> None:
        self._found: dict[Any, list[Found]] = {}
        self._data: dict[Any, list[Array] | None] = {}
        #: Element type, shape and (where small) contents of the model's constants: one look for all walks.
        self.constants: dict[ir.Value, tuple[ir.DataType | None, tuple[int, ...] | None, Array | None]] = {}

    def types(self, op: Op, other: Mapping[Tensor, Type]) -> list[Found]:
        """The types of ``op``'s outputs as far as ONNX's inference knows them.

        Args:
            op: The op; its inputs must have what is known of their types.
            other: Types of the sequences and optionals among the inputs.

        Raises:
            onnx.shape_inference.InferenceError: if the inputs contradict each other.
        """
        schema = schema_of(op.op_type, op.version, op.domain)
        unknown = [NOTHING] * len(op.outputs)
        if schema is None:
            return unknown
        types: dict[str, Type] = {}
        data: dict[str, Array] = {}
        reads_floats = op.op_type in READS_FLOATS
        cacheable = True
        for slot, tensor in enumerate(op.inputs):
            if tensor is None:
                continue
            found = other.get(tensor)
            if found is not None:
                cacheable = False
            else:
                found = type_of(tensor)
            if found is None:
                return unknown
            types[f"i{slot}"] = found
            contents = tensor.data
            if contents is not None and contents.size <= _MAX_OPERAND:
                if contents.dtype.kind in "iub" or (reads_floats and contents.dtype.kind == "f"):
                    data[f"i{slot}"] = contents
        key = (
            signature_key(op),
            tuple([None if tensor is None else (tensor.dtype, tensor.shape) for tensor in op.inputs]),
            tuple([(name, array.tobytes()) for name, array in data.items()]),
        )
        if cacheable and (known := self._found.get(key)) is not None:
            return known
        outputs = onnx.shape_inference.infer_node_outputs(
            schema,
            node_proto(op),
            types,
            {name: onnx.numpy_helper.from_array(array) for name, array in data.items()},
            opset_imports=[onnx.helper.make_opsetid(op.domain, op.version)],
        )
        result = [_found(outputs.get(f"o{k}")) for k in range(len(op.outputs))]
        if cacheable:
            self._found[key] = result
        return result

    def data(self, op: Op) -> list[Array] | None:
        """The contents of ``op``'s outputs from its inputs' ``data``; None where the reference op fails."""
        arrays = [None if tensor is None else tensor.data for tensor in op.inputs]
        if sum(array.size for array in arrays if array is not None) > _MAX_OPERAND:
            return _try_reference(op, arrays)
        key = (
            signature_key(op),
            tuple(None if array is None else (array.dtype, array.shape, array.tobytes()) for array in arrays),
        )
        if key not in self._data:
            self._data[key] = _try_reference(op, arrays)
        return self._data[key]


def signature_key(op: Op) -> tuple[Any, ...]:
    """What an op does, without its operands: hashable."""
    return (
        op.op_type,
        op.domain,
        op.version,
        tuple([tensor is None for tensor in op.outputs]),
        tuple([(name, _hashable(value)) for name, value in op.attributes.items()]) if op.attributes else (),
    )


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, np.ndarray):
        return (value.dtype, value.shape, value.tobytes())
    return repr(value) if isinstance(value, ir.TypeAndShape) else value


def _try_reference(op: Op, arrays: Sequence[Array | None]) -> list[Array] | None:
    # A reference op may raise anything; what it cannot compute is simply not known.
    try:
        results = run_reference(op, arrays)
    except Exception:
        return None
    if not all(isinstance(result, np.ndarray) for result in results):
        return None
    for result in results:
        result.flags.writeable = False
    return results
