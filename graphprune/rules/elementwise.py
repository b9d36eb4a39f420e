"""Elementwise ops: broadcasting says it all."""

from __future__ import annotations

from graphprune.errors import RuleError
from graphprune.graph import Op
from graphprune.rules.registry import Description, Refusal, has_input, known_data, register


def term(shape: tuple[int, ...], whole: tuple[int, ...], letter: str = "x") -> str:
    """The term of an operand that broadcasts to ``whole``: axis i of the whole is the factor ``x{i}``."""
    skip = len(whole) - len(shape)
    if skip < 0:
        raise RuleError(f"shape {shape} does not broadcast to {whole}")
    return " ".join(
        "1" if size == 1 and whole[skip + i] != 1 else f"{letter}{skip + i}" for i, size in enumerate(shape)
    )


def broadcast_shape(op: Op) -> tuple[int, ...]:
    """The shape that all inputs broadcast to."""
    whole: list[int] = []
    for tensor in op.inputs:
        if tensor is None or tensor.shape is None:
            continue
        shape = tensor.shape
        if len(shape) > len(whole):
            whole = [1] * (len(shape) - len(whole)) + whole
        for i, size in enumerate(shape, len(whole) - len(shape)):
            if whole[i] == 1:
                whole[i] = size
            elif size not in (1, whole[i]):
                raise RuleError(f"{op.kind} {op.name!r}: {shape} does not broadcast to {tuple(whole)}")
    return tuple(whole)


def broadcasting(op: Op) -> str:
    """Every input broadcasts against every other; every output has the shape of the whole."""
    whole = broadcast_shape(op)
    inputs = ["?" if t is None else term(t.shape or (), whole) for t in op.inputs]
    outputs = [term(whole, whole) for _ in op.outputs]
    return f"{', '.join(inputs)} -> {', '.join(outputs)}"


def trailing_bias(op: Op) -> str:
    """An input of any rank and an optional bias along its last axis."""
    return f"{'S* c, c' if len(op.inputs) > 1 and op.inputs[1] is not None else 'S* c'} -> S* c"


def dropout(op: Op) -> Description:
    """What it drops in training is drawn at random."""
    if has_input(op, 2):
        training = known_data(op, 2)
        if training is None or bool(training.any()):
            return Refusal("it may be in training mode, where it drops elements at random")
    return "S*, ?, ? -> S*, S*"


UNARY = """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu
    HardSigmoid HardSwish IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin
    Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu com.microsoft::Gelu com.microsoft::QuickGelu"""

BROADCAST = """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Clip Div Equal Greater GreaterOrEqual Less LessOrEqual
    Max Mean Min Mod Mul Or Pow PRelu Sub Sum Where Xor"""

register(UNARY, "S* -> S*")
register(BROADCAST, broadcasting)
# These leave every element what it is, so labels flow through them on constants too.
register("Identity Cast", "S* -> S*", layout=True)
register("CastLike", "S*, ? -> S*", layout=True)
register("Dropout", dropout)
register("com.microsoft::BiasGelu com.microsoft::FastGelu", trailing_bias)
