"""Shapes that only a run can tell: the model is run once in ONNX Runtime with the values in question as outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from graphprune.errors import ModelError, said
from graphprune.graph.walk import Hint
from graphprune.runtime import make_session

#: ONNX's limit for a model in one message.
_MAX_PROTO = 2**31 - 2**20
#: Newest format version that ONNX Runtime is asked to read; the versions after it only added optional fields.
_MAX_IR_VERSION = 11


def measure(
    model: ir.Model, values: Sequence[ir.Value], sizes: Mapping[str, tuple[int, ...] | None]
) -> dict[ir.Value, Hint]:
    """Element types and shapes of ``values`` in one run on random inputs (integers are 0 or 1).

    Args:
        model: Read only; initializers in external files stay there.
        values: Values of the main graph.
        sizes: The shape of each input.

    Raises:
        ModelError: if ONNX Runtime cannot load or run the model.
    """
    if any(shape is None for shape in sizes.values()):
        raise ModelError("the model cannot be run: the rank of an input is not known")
    stored = sum(
        initializer.const_value.nbytes
        for initializer in model.graph.initializers.values()
        if initializer.const_value is not None and not isinstance(initializer.const_value, ir.ExternalTensor)
    )
    if stored > _MAX_PROTO:
        raise ModelError("the model cannot be run to see unknown shapes: it is larger than 2 GB in memory")
    proto = ir.serde.serialize_model(model)
    proto.ir_version = min(proto.ir_version, _MAX_IR_VERSION)
    del proto.graph.value_info[:]
    for value_info in proto.graph.input:
        shape = sizes.get(value_info.name)
        if shape is not None and value_info.type.HasField("tensor_type"):
            elem_type = value_info.type.tensor_type.elem_type
            value_info.type.CopyFrom(onnx.helper.make_tensor_type_proto(elem_type, shape))
    present = {output.name for output in proto.graph.output}
    for output in proto.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    names = [value.name for value in values if value.name]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    directory = _external_directory(model)
    entries = {"session.model_external_initializers_file_folder_path": directory} if directory else {}
    try:
        session = make_session(proto, optimise=False, entries=entries)
        results = session.run(
            names, {i.name: random_input(i.type, sizes[i.name]) for i in session.get_inputs()}
        )
    except Exception as error:
        reason = said(error).split(" Status Message: ")[-1]
        raise ModelError(f"the model cannot be run to see unknown shapes: {reason}") from error
    seen = dict(zip(names, results, strict=True))
    hints: dict[ir.Value, Hint] = {}
    for value in values:
        array = seen.get(value.name or "")
        if isinstance(array, np.ndarray):
            strings = array.dtype.kind in "OUS"
            dtype = ir.DataType.STRING if strings else ir.DataType.from_numpy(array.dtype)
            hints[value] = (value.dtype or dtype, array.shape)
    return hints


def random_input(kind: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """A random array for an ONNX Runtime input type such as ``tensor(float)``.

    Raises:
        ModelError: for inputs that are not dense numeric tensors.
    """
    types = {
        "tensor(float)": np.float32,
        "tensor(double)": np.float64,
        "tensor(float16)": np.float16,
        "tensor(bool)": np.bool_,
    }
    for bits in (8, 16, 32, 64):
        types[f"tensor(int{bits})"] = np.dtype(f"int{bits}").type
        types[f"tensor(uint{bits})"] = np.dtype(f"uint{bits}").type
    if kind not in types or shape is None:
        raise ModelError(f"no random input of type {kind} can be made")
    random = np.random.default_rng(0)
    dtype = np.dtype(types[kind])
    if dtype.kind == "b":
        return np.ones(shape, np.bool_)
    if dtype.kind in "iu":
        return random.integers(0, 2, shape).astype(dtype)
    return random.standard_normal(shape).astype(dtype)


def stored(values: Iterable[ir.Value], bound: Mapping[str, int]) -> dict[ir.Value, Hint]:
    """What the model itself says about ``values``, with its symbols replaced by their sizes."""
    hints: dict[ir.Value, Hint] = {}
    for value in values:
        if value.shape is None:
            continue
        shape = [dim if isinstance(dim, int) else bound.get(dim.value or "") for dim in value.shape]
        known = tuple(size for size in shape if size is not None and size >= 0)
        if len(known) == len(shape):
            hints[value] = (value.dtype, known)
    return hints


def _external_directory(model: ir.Model) -> str:
    for initializer in model.graph.initializers.values():
        if isinstance(initializer.const_value, ir.ExternalTensor):
            return str(initializer.const_value.base_dir)
    return ""
