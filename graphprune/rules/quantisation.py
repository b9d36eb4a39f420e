"""Quantisation: scales and zero points go with the channel that they belong to."""

from __future__ import annotations

from graphprune.graph import Op
from graphprune.rules.elementwise import term
from graphprune.rules.registry import has_input, normal_axis, register, shape_of


def quantise(op: Op) -> str:
    """Per tensor, per axis, or in blocks along an axis (whole blocks may go)."""
    whole = shape_of(op, 0)
    scale = shape_of(op, 1)
    factors = [f"x{i}" for i in range(len(whole))]
    if len(scale) == 0 or (len(scale) == 1 and scale[0] == 1):
        parameter, data = "?", factors
    elif len(scale) == 1:
        parameter, data = factors[normal_axis(int(op.attributes.get("axis", 1)), len(whole))], factors
    else:
        axis = normal_axis(int(op.attributes.get("axis", 1)), len(whole))
        parameter = " ".join(factors)
        data = [f"({f} k!)" if i == axis else f for i, f in enumerate(factors)]
    zero_point = parameter if has_input(op, 2) else "?"
    text = " ".join(data)
    return f"{text}, {parameter}, {zero_point} -> {text}"


def dynamic_quantise(op: Op) -> str:
    """The scale is taken from the greatest and smallest element of all."""
    text = " ".join(f"x{i}~" for i in range(len(shape_of(op, 0))))
    return f"{text} -> {text}, ?, ?"


def qlinear_binary(op: Op) -> str:
    """``A, A_scale, A_zero, B, B_scale, B_zero, C_scale, C_zero``: A and B broadcast."""
    a, b = shape_of(op, 0), shape_of(op, 3)
    rank = max(len(a), len(b))
    padded = [(1,) * (rank - len(s)) + s for s in (a, b)]
    whole = tuple(max(x, y) for x, y in zip(*padded, strict=True))
    return f"{term(a, whole)}, ?, ?, {term(b, whole)}, ?, ?, ?, ? -> {term(whole, whole)}"


register("QuantizeLinear", quantise)
register("DequantizeLinear", quantise, layout=True)
register("com.microsoft::QuantizeLinear", quantise)
register("com.microsoft::DequantizeLinear", quantise, layout=True)
register("DynamicQuantizeLinear", dynamic_quantise)
register("com.microsoft::QLinearAdd com.microsoft::QLinearMul", qlinear_binary)
register("com.microsoft::QLinearSigmoid com.microsoft::QLinearLeakyRelu", "S*, ?, ?, ?, ? -> S*")
register("com.microsoft::QLinearGlobalAveragePool", "n c S!*, ?, ?, ?, ? -> n c T!*")
