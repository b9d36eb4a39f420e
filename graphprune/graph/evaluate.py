"""Contents of constants: single ops run with ONNX's reference implementation, in ONNX Runtime where that ends."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, SupportsInt, TypeAlias, cast

import numpy as np
import onnx
import onnx_ir as ir

from graphprune.errors import ModelError, said
from graphprune.graph import TWIN_DOMAIN, Op, Tensor
from graphprune.model.nodes import stored_tensor
from graphprune.runtime import make_session

Array: TypeAlias = np.ndarray[Any, Any]
#: An ONNX type; needed where a value may also be a sequence, an optional or a map.
Type: TypeAlias = onnx.TypeProto

#: Largest contents that the twin keeps; above, a tensor is known by its shape only.
MAX_INTEGERS = 2**22
MAX_FLOATS = 2**12
#: Ops that do not give the same result twice.
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def is_random(op: Op) -> bool:
    """True if two runs of ``op`` on the same inputs may differ."""
    if op.domain:
        return False
    if op.op_type in RANDOM:
        return True
    if op.op_type != "Dropout":
        return False
    training = op.inputs[2] if len(op.inputs) > 2 else None
    if op.version < 7:
        return not op.attributes.get("is_test", 0)
    return training is not None and (training.data is None or bool(training.data))


def fits(dtype: ir.DataType | None, size: int) -> bool:
    """True if contents of ``size`` elements are small enough for the twin to keep."""
    if dtype is None or dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return False
    return size <= (MAX_FLOATS if dtype.is_floating_point() or "COMPLEX" in dtype.name else MAX_INTEGERS)


@functools.cache
def schema_of(op_type: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    """The op's schema in ONNX itself; None for other people's ops."""
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


def node_proto(op: Op) -> onnx.NodeProto:
    """A NodeProto with ``op``'s attributes and with canonical names: i0, i1, ... -> o0, o1, ..."""
    node = onnx.NodeProto(op_type=op.op_type, domain=op.domain)
    node.input.extend("" if tensor is None else f"i{k}" for k, tensor in enumerate(op.inputs))
    node.output.extend("" if tensor is None else f"o{k}" for k, tensor in enumerate(op.outputs))
    schema = schema_of(op.op_type, op.version, op.domain)
    for name, value in op.attributes.items():
        declared = schema.attributes.get(name) if schema is not None else None
        if isinstance(value, np.ndarray):
            value = ir.serde.serialize_tensor(ir.Tensor(value))
        elif isinstance(value, ir.TypeAndShape):
            if value.type is None:
                continue
            proto = ir.serde.serialize_type(value.type)
            if value.shape is not None:
                ir.serde.serialize_shape_into(proto, value.shape)
            value = proto
        elif isinstance(value, list) and not value and declared is None:
            continue
        kind = int(cast(SupportsInt, declared.type)) if declared is not None else None
        node.attribute.append(onnx.helper.make_attribute(name, value, attr_type=kind))
    return node


def type_of(tensor: Tensor) -> Type | None:
    """The TypeProto of a tensor, with its shape where that is known; None without an element type."""
    if tensor.dtype is None:
        return None
    return _tensor_type(int(tensor.dtype), tensor.shape)


@functools.lru_cache(maxsize=4096)
def _tensor_type(dtype: int, shape: tuple[int, ...] | None) -> Type:
    return onnx.helper.make_tensor_type_proto(dtype, shape)


def run_reference(op: Op, arrays: Sequence[Array | None]) -> list[Array]:
    """Runs one op of the standard domain with ONNX's reference implementation.

    Args:
        op: The op; its tensors' own ``data`` is not used.
        arrays: One array an input, None where an optional input is missing.

    Raises:
        Exception: whatever the reference op raises; NotImplementedError where there is none.
    """
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.ops import load_op

    if op.domain:
        raise NotImplementedError(f"no reference implementation of {op.kind}")
    node = node_proto(op)
    types = [type_of(tensor) or onnx.TypeProto() for tensor in op.inputs if tensor is not None]
    implementation = load_op(
        "", op.op_type, op.version, node=node, input_types=types, evaluator_cls=ReferenceEvaluator
    )
    parameters = {
        "log": lambda *_: None,
        "opsets": {"": op.version},
        "verbose": 0,
        "new_ops": {},
        "existing_functions": {},
        "evaluator_cls": ReferenceEvaluator,
    }
    arguments = list(arrays)
    while arguments and arguments[-1] is None:
        arguments.pop()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        outputs = implementation(node, parameters).run(*arguments)
    # Copies: some reference ops return views of their input.
    return [np.array(output) if isinstance(output, np.ndarray) else output for output in outputs]


def run_onnxruntime(op: Op, arrays: Sequence[Array | None]) -> list[Array | None]:
    """Runs one op in ONNX Runtime on the CPU: for other domains and ops without a reference implementation."""
    node = node_proto(op)
    inputs = [
        onnx.helper.make_tensor_value_info(f"i{slot}", int(ir.DataType.from_numpy(array.dtype)), array.shape)
        for slot, array in enumerate(arrays)
        if array is not None
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    opsets = {op.domain: op.version}
    opsets.setdefault("", onnx.defs.onnx_opset_version() - 4)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one_op", inputs, outputs),
        opset_imports=[onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        ir_version=10,
    )
    session = make_session(model)
    results = iter(session.run(None, {f"i{k}": array for k, array in enumerate(arrays) if array is not None}))
    return [next(results) if name else None for name in node.output]


def evaluate_constant(tensor: Tensor) -> Array:
    """The exact contents of a constant tensor, however large.

    Walks back through the ops that make it and runs each with ONNX's reference implementation, or in ONNX Runtime
    where there is none. Nothing is kept between calls.

    Args:
        tensor: A tensor with ``constant`` set.

    Returns:
        The contents, with the tensor's shape and the NumPy (or ml_dtypes) type of its element type; read-only where
        it shares memory with the model.

    Raises:
        ModelError: if the tensor is not constant, or an op that makes it cannot be run.
    """
    known: dict[Tensor, Array] = {}
    stack = [tensor]
    while stack:
        current = stack[-1]
        if current in known:
            stack.pop()
            continue
        if current.data is not None:
            known[current] = current.data
            continue
        if not current.constant:
            raise ModelError(f"{current.name}: not a constant, its contents depend on the model's inputs")
        op = current.producer
        if op is None:
            known[current] = _stored(current)
            continue
        operands = [operand for operand in op.inputs if operand is not None]
        waiting = [operand for operand in operands if operand not in known]
        if waiting:
            stack.extend(waiting)
            continue
        arrays = [None if operand is None else known[operand] for operand in op.inputs]
        for output, array in zip(op.outputs, _run(op, arrays), strict=False):
            if output is not None and array is not None:
                known[output] = np.asarray(array)
        if current not in known:
            raise ModelError(f"{current.name}: {op.kind} gave no contents for it")
    return known[tensor]


def _run(op: Op, arrays: list[Array | None]) -> Sequence[Array | None]:
    if op.domain == TWIN_DOMAIN:  # a constant Join has one input: the branch that is taken
        return arrays
    try:
        if not op.domain:
            try:
                return run_reference(op, arrays)
            except Exception:
                return run_onnxruntime(op, arrays)
        return run_onnxruntime(op, arrays)
    except Exception as error:
        raise ModelError(f"{op.name}: the constant it computes cannot be evaluated: {said(error)}") from error


def _stored(tensor: Tensor) -> Array:
    stored = stored_tensor(tensor.value) if tensor.value is not None else None
    if stored is None:
        raise ModelError(f"{tensor.name}: the model holds no contents for it")
    return stored.numpy()
