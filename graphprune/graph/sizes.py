"""Numbers for the dynamic dimensions of a model's inputs, so that the analysis can work on static shapes.

A guess is a :class:`Policy`; :func:`input_sizes` turns it into shapes, :data:`POLICIES` lists the guesses in the order
in which they are tried.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from graphprune.errors import OptionError

#: Names of symbols that mean a batch.
BATCH = re.compile(r"batch|^(n|b|bs|bsz)$|^N\b", re.IGNORECASE)
_IMAGE = re.compile(r"height|width|^(h|w|ih|iw|img\w*|image\w*|\w*size_?[hwxy])$", re.IGNORECASE)
_PAST = re.compile(r"past|cache|prefix|history", re.IGNORECASE)
_TOTAL = re.compile(
    r"total|past_?(key)?\w*(plus|\+)|attention_mask\w*seq|kv_?(seq|len)|all_seq", re.IGNORECASE
)
_SEQUENCE = re.compile(r"seq|len|time|token|frame|step|word|^(t|s|l)$", re.IGNORECASE)
_CHANNEL = re.compile(r"channel|^c$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Policy:
    """Sizes by the role of a dimension.

    Attributes:
        batch: First axes and symbols that mean a batch. Never 1: a batch of one hides merged axes.
        image: Height and width.
        sequence: Lengths, and everything else.
        past: Length of a cache. ``total`` is ``past + sequence``.
        flat_past: True if a total length is to be the plain sequence length.
    """

    batch: int = 2
    image: int = 224
    sequence: int = 8
    past: int = 6
    flat_past: bool = False

    def larger(self, doubled: bool) -> Policy:
        """Other sizes of the same kind, for the second look that tells what depends on them."""
        if doubled:
            return replace(
                self,
                batch=self.batch + 1,
                image=2 * self.image,
                sequence=2 * self.sequence,
                past=2 * self.past,
            )
        return replace(
            self,
            batch=self.batch + 1,
            image=self.image + 32,
            sequence=self.sequence + self.sequence // 2,
            past=self.past + self.past // 2,
        )


#: Guesses in the order of trial.
POLICIES = (
    Policy(),
    Policy(image=64),
    Policy(image=256, sequence=32, past=32),
    Policy(flat_past=True),
    Policy(sequence=1, past=6),
    Policy(image=32, sequence=128, past=8),
    Policy(image=512, sequence=1024, past=8),
    Policy(image=640, sequence=4096, past=8),
    Policy(image=384, sequence=16000, past=8),
    Policy(image=299, sequence=16, past=16),
    Policy(batch=4, image=224, sequence=16),
)


def is_dynamic(model: ir.Model) -> bool:
    """True if an input of the main graph has a dimension, or a rank, that is not a number."""
    return any(not is_static(value.shape) for value in real_inputs(model) if is_tensor(value))


def is_static(shape: ir.Shape | None) -> bool:
    """True if every dimension is a number; some exporters write -1 for one that is not."""
    return shape is not None and all(isinstance(dim, int) and dim >= 0 for dim in shape)


def real_inputs(model: ir.Model) -> Iterator[ir.Value]:
    """The inputs of the main graph that have no initializer."""
    return (value for value in model.graph.inputs if not value.is_initializer())


def is_tensor(value: ir.Value) -> bool:
    """True unless the value is a sequence, an optional or a map."""
    return value.type is None or isinstance(value.type, ir.TensorType)


def check_input_shapes(
    model: ir.Model, input_shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """The user's shapes as tuples.

    Raises:
        OptionError: for an unknown input, a wrong rank, or a size that contradicts the model's own.
    """
    inputs = {value.name: value for value in real_inputs(model)}
    checked: dict[str, tuple[int, ...]] = {}
    for name, given in input_shapes.items():
        if name not in inputs:
            known = ", ".join(str(n) for n in inputs) or "none"
            raise OptionError(f"--input-shape {name}: the model has no such input (its inputs: {known})")
        shape = tuple(int(size) for size in given)
        declared = inputs[name].shape
        text = ",".join(map(str, shape))
        if any(size < 1 for size in shape):
            raise OptionError(f"--input-shape {name}:{text}: sizes must be positive")
        if declared is not None:
            if len(declared) != len(shape):
                raise OptionError(
                    f"--input-shape {name}:{text}: this is rank {len(shape)}, the model's input has {len(declared)}"
                )
            for axis, (size, dim) in enumerate(zip(shape, declared, strict=True)):
                if isinstance(dim, int) and dim > 0 and dim != size:
                    raise OptionError(
                        f"--input-shape {name}:{text}: axis {axis} is {size}, but the model fixes it to {dim}"
                    )
        checked[name] = shape
    return checked


def input_sizes(
    model: ir.Model,
    policy: Policy,
    given: Mapping[str, tuple[int, ...]],
    symbols: Mapping[str, int],
    enlarge: Callable[[str, int], int] | None = None,
) -> tuple[dict[str, tuple[int, ...] | None], dict[str, int]]:
    """A static shape for each tensor input.

    Args:
        model: Read only.
        policy: Sizes for what is not given.
        given: Shapes from the user, checked.
        symbols: Sizes of symbolic dimensions from the user.
        enlarge: For the second look: maps (role, size) of a given dynamic dimension to another size.

    Returns:
        Shapes by input name (None where not even the rank is known), and the sizes of the symbols.
    """
    bound = dict(symbols)
    for value in real_inputs(model):
        shape = given.get(value.name or "")
        if shape is None or value.shape is None:
            continue
        for axis, (size, dim) in enumerate(zip(shape, value.shape, strict=True)):
            name = None if isinstance(dim, int) else dim.value
            if name and name not in bound:
                bound[name] = enlarge(role_of(value, axis), size) if enlarge else size
    shapes: dict[str, tuple[int, ...] | None] = {}
    for value in real_inputs(model):
        if not is_tensor(value):
            continue
        mine = given.get(value.name or "")
        if value.shape is None:
            shapes[value.name or ""] = mine
            continue
        sizes: list[int] = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int) and (dim > 0 or (dim == 0 and mine is None)):
                sizes.append(dim)
                continue
            name = None if isinstance(dim, int) else dim.value
            role = role_of(value, axis)
            if name and name in bound:
                sizes.append(bound[name])
                continue
            if mine is not None:
                size = enlarge(role, mine[axis]) if enlarge else mine[axis]
            else:
                size = _from_weight(value, axis) or _from_sum(name, bound, policy) or _size(role, policy)
            if name:
                bound[name] = size
            sizes.append(size)
        shapes[value.name or ""] = tuple(sizes)
    return shapes, bound


def role_of(value: ir.Value, axis: int) -> str:
    """What a dynamic dimension means: batch, image, channel, total, past, or sequence."""
    shape = value.shape
    assert shape is not None
    dim = shape[axis]
    name = (dim.value if not isinstance(dim, int) else None) or ""
    for role, pattern in (("total", _TOTAL), ("past", _PAST), ("image", _IMAGE), ("channel", _CHANNEL)):
        if pattern.search(name):
            return role
    if BATCH.search(name):
        return "batch"
    if _SEQUENCE.search(name):
        return "sequence"
    if axis == 0:
        return "batch"
    if len(shape) == 4:
        channels_last = isinstance(shape[3], int) and shape[3] <= 4
        if channels_last:
            return "image"
        if axis >= 2:
            other = shape[5 - axis]
            few_channels = not isinstance(shape[1], int) or shape[1] <= 4
            return "image" if few_channels or not isinstance(other, int) else "sequence"
        return "channel"
    if len(shape) == 5 and axis >= 3:
        return "image"
    return "sequence"


def _size(role: str, policy: Policy) -> int:
    match role:
        case "batch":
            return policy.batch
        case "image":
            return policy.image
        case "channel":
            return 3
        case "past":
            return policy.past
        case "total":
            return policy.sequence if policy.flat_past else policy.sequence + policy.past
    return policy.sequence


def _from_weight(value: ir.Value, axis: int) -> int | None:
    """The size of a feature axis, read off the weight of the first Conv, MatMul or Gemm that uses the input."""
    rank = len(value.shape) if value.shape is not None else 0
    for node in value.consumers():
        if node.domain or len(node.inputs) < 2 or node.inputs[0] is not value:
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None:
            continue
        shape = [int(size) for size in weight.const_value.shape.numpy()]
        if node.op_type == "Conv" and axis == 1 and len(shape) == rank:
            group = node.attributes.get("group")
            return shape[1] * (group.as_int() if group is not None and not group.is_ref() else 1)
        if node.op_type == "MatMul" and axis == rank - 1 and rank > 1 and len(shape) > 1:
            return shape[-2]
        if node.op_type == "Gemm" and axis == 1 and len(shape) == 2:
            transposed = node.attributes.get("transB")
            return shape[1] if transposed is not None and transposed.value else shape[0]
    return None


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


def _from_sum(name: str | None, bound: dict[str, int], policy: Policy) -> int | None:
    """The size of a dimension named by an expression, such as ``past_sequence_length + 1``."""
    if not name or not re.search(r"[-+*/]", name):
        return None

    def value(node: ast.expr) -> int:
        match node:
            case ast.BinOp(left, sign, right) if type(sign) in _OPERATORS:
                return int(_OPERATORS[type(sign)](value(left), value(right)))
            case ast.Constant(int(number)):
                return number
            case ast.Name(symbol):
                if symbol not in bound:
                    role = "past" if _PAST.search(symbol) else "batch" if BATCH.search(symbol) else "sequence"
                    bound[symbol] = _size(role, policy)
                return bound[symbol]
        raise ValueError(name)

    try:
        size = value(ast.parse(name.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    return size if size > 0 else None
