"""Element types: of every value of a model, and which operands of a node may take another type by its schema."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
import onnx_ir as ir

from graphprune.graph.evaluate import schema_of
from graphprune.model.nodes import is_constant_value, stored_tensor
from graphprune.precision.formats import Format

if TYPE_CHECKING:
    from graphprune.graph import Graph

#: Element types of values; what is missing is unknown, or no tensor.
Types: TypeAlias = Mapping[ir.Value, ir.DataType]


def types_of(model: ir.Model, twin: Graph) -> dict[ir.Value, ir.DataType]:
    """Element types of all values of a model without functions, those in branches that are never taken as stored."""
    types: dict[ir.Value, ir.DataType] = {}
    for tensor in twin.tensors:
        if tensor.value is not None and tensor.dtype is not None:
            types[tensor.value] = tensor.dtype
    for graph in model.graphs():
        for value in (
            *graph.inputs,
            *graph.initializers.values(),
            *(o for node in graph for o in node.outputs),
        ):
            if value not in types:
                stored = stored_tensor(value) if is_constant_value(value) else None
                dtype = stored.dtype if stored is not None else value.dtype
                if dtype is not None:
                    types[value] = dtype
    return types


@dataclass(frozen=True)
class Parameter:
    """An input or output of a schema: the name of its type (a type variable, or a type), and whether it repeats."""

    type_name: str
    repeats: bool
    homogeneous: bool


@dataclass(frozen=True)
class Schema:
    """What an op's schema says of types.

    Attributes:
        inputs, outputs: In order; the last may repeat.
        allowed: The types that each type variable may stand for.
    """

    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    allowed: Mapping[str, frozenset[str]]

    def parameter(self, slot: int, *, output: bool = False) -> Parameter | None:
        """The parameter at a position."""
        parameters = self.outputs if output else self.inputs
        if slot < len(parameters):
            return parameters[slot]
        return parameters[-1] if parameters and parameters[-1].repeats else None

    def allows(self, type_name: str, dtype: ir.DataType) -> bool:
        """True if a type variable may stand for an element type."""
        return _SPELLED[dtype] in self.allowed.get(type_name, frozenset((type_name,)))


_SPELLED = {
    ir.DataType.FLOAT: "tensor(float)",
    ir.DataType.FLOAT16: "tensor(float16)",
    ir.DataType.BFLOAT16: "tensor(bfloat16)",
}


@functools.cache
def find_schema(op_type: str, version: int, domain: str) -> Schema | None:
    """The schema of an op: ONNX's own, or ONNX Runtime's for its contributed ops; None for other people's ops."""
    domain = "" if domain == "ai.onnx" else domain
    standard = schema_of(op_type, version, domain)
    if standard is not None:
        variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
        return Schema(
            tuple(Parameter(p.type_str, p.option == variadic, p.is_homogeneous) for p in standard.inputs),
            tuple(Parameter(p.type_str, p.option == variadic, p.is_homogeneous) for p in standard.outputs),
            {c.type_param_str: frozenset(c.allowed_type_strs) for c in standard.type_constraints},
        )
    known = [s for s in _runtime_schemas().get((domain, op_type), ()) if s.since_version <= version]
    if not known:
        return None
    schema = max(known, key=lambda each: int(each.since_version))
    variadic = schema.FormalParameterOption.Variadic
    return Schema(
        tuple(Parameter(p.typeStr, p.option == variadic, p.isHomogeneous) for p in schema.inputs),
        tuple(Parameter(p.typeStr, p.option == variadic, p.isHomogeneous) for p in schema.outputs),
        {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints},
    )


@functools.cache
def _runtime_schemas() -> Mapping[tuple[str, str], list[Any]]:
    """ONNX Runtime's schemas by domain and op; none where its build does not show them."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        schemas = state.get_all_operator_schema()
    except (ImportError, AttributeError):
        return {}
    found: dict[tuple[str, str], list[Any]] = {}
    for schema in schemas:
        found.setdefault((schema.domain, schema.name), []).append(schema)
    return found


@dataclass(frozen=True)
class Operands:
    """The float32 operands of a node that may take the low type, by position."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def version_of(model: ir.Model, node: ir.Node) -> int:
    """The opset version that a node is of."""
    if node.version is not None:
        return node.version
    imports = model.opset_imports
    return imports.get(node.domain, imports.get("ai.onnx", 1) if not node.domain else 1)


def low_operands(node: ir.Node, version: int, types: Types, low: Format) -> Operands | str | None:
    """Which operands of a node may be of a low type.

    The type variables that float32 inputs bind are free to stand for any type that their constraint lists; outputs of
    the same variable follow. What an attribute types (Cast, ConstantOfShape, EyeLike, random numbers) is bound by no
    input, and stays what it is.

    Args:
        node: The node.
        version: Its opset version.
        types: Element types of its values.
        low: The low format.

    Returns:
        The operands; why there are none; None where the node has no float32 input.
    """
    floats = [slot for slot, value in enumerate(node.inputs) if _is_float(value, types)]
    unknown = next((v for v in node.inputs if v is not None and v not in types), None)
    if not floats:
        return None
    schema = find_schema(node.op_type, version, node.domain)
    if schema is None:
        return f"the schema of {node.domain or 'ai.onnx'}::{node.op_type} is not known"
    if unknown is not None or any(v.name and v not in types for v in node.outputs):
        return "it takes or makes something whose element type is not known, or that is no tensor"
    parameters = {slot: schema.parameter(slot) for slot in floats}
    if any(parameter is None or not parameter.homogeneous for parameter in parameters.values()):
        return "its operands may be of different types"
    names = {slot: parameter.type_name for slot, parameter in parameters.items() if parameter is not None}
    free = {name for name in names.values() if name in schema.allowed and schema.allows(name, low.dtype)}
    if not free:
        return _refusal(node, version, names.values(), low)
    outputs = []
    for slot, value in enumerate(node.outputs):
        parameter = schema.parameter(slot, output=True)
        if _is_float(value, types) and parameter is not None and parameter.type_name in free:
            outputs.append(slot)
    return Operands(tuple(slot for slot, name in names.items() if name in free), tuple(outputs))


def _is_float(value: ir.Value | None, types: Types) -> bool:
    return value is not None and types.get(value) == ir.DataType.FLOAT


def _refusal(node: ir.Node, version: int, names: Sequence[str] | Any, low: Format) -> str:
    """That the op takes no low type, and from which opset on it does."""
    wanted = set(names)
    later = [
        schema.since_version
        for schema in _history().get((node.domain, node.op_type), ())
        if schema.since_version > version
        and any(
            constraint.type_param_str in wanted and _SPELLED[low.dtype] in constraint.allowed_type_strs
            for constraint in schema.type_constraints
        )
    ]
    reason = f"{node.op_type} of opset {version} does not take {low.title}"
    return f"{reason}; from opset {min(later)} on it does" if later else reason


@functools.cache
def _history() -> Mapping[tuple[str, str], list[onnx.defs.OpSchema]]:
    found: dict[tuple[str, str], list[onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        found.setdefault((schema.domain, schema.name), []).append(schema)
    return found
