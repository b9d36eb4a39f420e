"""Elementwise ops."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, sqrt

import numpy as np

from graphprune.gradients.vjp.emit import Emitter, NoGradientError, Value
from graphprune.gradients.vjp.site import Adjoints, Site, constant, elementwise, vjp

MS = "com.microsoft::"


def _step(condition: Value) -> Value:
    return condition.cast()


def _sigmoid(x: Value) -> Value:
    return x.apply("Sigmoid")


def _between(x: Value, low: float, high: float) -> Value:
    return _step(x.above(low)) * _step(x.below(high))


def _hard_sigmoid(x: Value, s: Site) -> Value:
    alpha, beta = float(s.attribute("alpha", 0.2)), float(s.attribute("beta", 0.5))
    return _between(x, -beta / alpha, (1 - beta) / alpha) * alpha


def _normal_cdf(x: Value) -> Value:
    return 0.5 * ((x * sqrt(0.5)).apply("Erf") + 1.0)


def _normal_density(x: Value) -> Value:
    return (x * x * -0.5).apply("Exp") * (1 / sqrt(2 * pi))


def _tanh_gelu(x: Value) -> Value:
    """Derivative of x / 2 (1 + tanh u), u = sqrt(2 / pi) (x + .044715 x^3)."""
    square = x * x
    t = (x * (square * 0.044715 + 1.0) * sqrt(2 / pi)).apply("Tanh")
    inner = (square * (3 * 0.044715) + 1.0) * sqrt(2 / pi)
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner


def _gelu(x: Value, y: Value, s: Site) -> Value:
    if s.attribute("approximate", "none") in ("tanh", b"tanh"):
        return _tanh_gelu(x)
    return _normal_cdf(x) + x * _normal_density(x)


def _silu(x: Value, alpha: float) -> Value:
    """Derivative of x sigmoid(alpha x)."""
    gate = _sigmoid(x * alpha)
    return gate * (1.0 + alpha * x * (1.0 - gate))


def _mish(x: Value, y: Value, s: Site) -> Value:
    t = x.apply("Softplus").apply("Tanh")
    return t + x * (1.0 - t * t) * _sigmoid(x)


def _selu(x: Value, y: Value, s: Site) -> Value:
    alpha, gamma = s.attribute("alpha", 1.6732632423543772), s.attribute("gamma", 1.0507009873554805)
    return s.e.where(x.above(0.0), gamma, y + alpha * gamma)


elementwise("Relu", lambda x, y, s: _step(y.above(0.0)))
elementwise("Sigmoid", lambda x, y, s: y * (1.0 - y))
elementwise("Tanh", lambda x, y, s: 1.0 - y * y)
elementwise("Exp", lambda x, y, s: y)
elementwise("Log", lambda x, y, s: 1.0 / x)
elementwise("Sqrt", lambda x, y, s: 0.5 / y)
elementwise("Reciprocal", lambda x, y, s: -(y * y))
elementwise("Neg", lambda x, y, s: -1.0)
elementwise("Abs", lambda x, y, s: x.apply("Sign"))
elementwise("Erf", lambda x, y, s: (-(x * x)).apply("Exp") * (2 / sqrt(pi)))
elementwise("Sin", lambda x, y, s: x.apply("Cos"))
elementwise("Cos", lambda x, y, s: -x.apply("Sin"))
elementwise("Tan", lambda x, y, s: 1.0 + y * y)
elementwise("Asin", lambda x, y, s: 1.0 / (1.0 - x * x).apply("Sqrt"))
elementwise("Acos", lambda x, y, s: -1.0 / (1.0 - x * x).apply("Sqrt"))
elementwise("Atan", lambda x, y, s: 1.0 / (1.0 + x * x))
elementwise("Sinh", lambda x, y, s: x.apply("Cosh"))
elementwise("Cosh", lambda x, y, s: x.apply("Sinh"))
elementwise("Softplus", lambda x, y, s: _sigmoid(x))
elementwise("Softsign", lambda x, y, s: (1.0 + x.apply("Abs")).power(-2.0))
elementwise("LeakyRelu", lambda x, y, s: s.e.where(x.above(0.0), 1.0, s.attribute("alpha", 0.01)))
elementwise("Elu", lambda x, y, s: s.e.where(x.above(0.0), 1.0, y + s.attribute("alpha", 1.0)))
elementwise("Celu", lambda x, y, s: s.e.where(x.above(0.0), 1.0, y * (1 / s.attribute("alpha", 1.0)) + 1.0))
elementwise("Selu", _selu)
elementwise("ThresholdedRelu", lambda x, y, s: _step(x.above(s.attribute("alpha", 1.0))))
elementwise("HardSigmoid", lambda x, y, s: _hard_sigmoid(x, s))
elementwise(
    "HardSwish", lambda x, y, s: s.e.where(x.above(3.0), 1.0, _step(x.above(-3.0)) * (x * (1 / 3) + 0.5))
)
elementwise("Mish", _mish)
elementwise(f"Gelu {MS}Gelu", _gelu)
elementwise("Swish", lambda x, y, s: _silu(x, s.attribute("alpha", 1.0)))
elementwise(f"{MS}QuickGelu", lambda x, y, s: _silu(x, s.attribute("alpha", 1.702)))
constant(
    "Shape Size Sign Floor Ceil Round Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not IsNaN IsInf"
    " ArgMax ArgMin NonZero OneHot Hardmax EyeLike ConstantOfShape RandomNormalLike RandomUniformLike Mod"
    " BitwiseAnd BitwiseOr BitwiseXor BitwiseNot Range"
)


@vjp(f"{MS}BiasGelu {MS}FastGelu")
def _bias_gelu(s: Site) -> Adjoints:
    x = s.x() + s.x(1) if s.has(1) else s.x()
    slope = _tanh_gelu(x) if s.op.op_type == "FastGelu" else _gelu(x, x, s)
    g = s.g * slope
    return {slot: g.unbroadcast(s.shape(slot)) for slot in s.wanted}


@vjp("Identity")
def _identity(s: Site) -> Adjoints:
    return {0: s.g}


@vjp("Dropout")
def _dropout(s: Site) -> Adjoints:
    training = s.tensor(2)
    old = s.op.version < 7 and not s.attribute("is_test", 0)
    if old or (training is not None and (training.data is None or training.data.any())):
        raise NoGradientError("it drops at random: export the model for inference")
    return {0: s.g}


@vjp("Cast CastLike")
def _cast(s: Site) -> Adjoints:
    source = s.tensor(0)
    real = source is not None and source.dtype is not None and source.dtype.is_floating_point()
    return {0: s.g} if real else {}


@vjp("QuantizeLinear")
def _quantize(s: Site) -> Adjoints:
    """Rounding counts as the identity (Bengio et al., Estimating or Propagating Gradients, 2013, section 4)."""
    return {0: s.g / _along(s)}


@vjp("DequantizeLinear")
def _dequantize(s: Site) -> Adjoints:
    return {0: s.g * _along(s)}


def _along(s: Site) -> Value:
    scale = s.x(1)
    if s.attribute("block_size", 0):
        raise NoGradientError("it has a scale for each block")
    if not scale.rank or scale.shape == (1,):
        return scale.reshape(())
    axis = s.axis(1)
    return scale.reshape([n if a == axis else 1 for a, n in enumerate(s.shape())])


# -- two and more operands ----------------------------------------------------------------------------------------


def _each(s: Site, factors: dict[int, Value]) -> Adjoints:
    return {slot: factors[slot].unbroadcast(s.shape(slot)) for slot in s.wanted}


@vjp("Add Sum")
def _add(s: Site) -> Adjoints:
    return {slot: s.g.unbroadcast(s.shape(slot)) for slot in s.wanted}


@vjp("Mean")
def _mean(s: Site) -> Adjoints:
    share = s.g * (1 / len(s.op.inputs))
    return {slot: share.unbroadcast(s.shape(slot)) for slot in s.wanted}


@vjp("Sub")
def _sub(s: Site) -> Adjoints:
    return {slot: (-s.g if slot else s.g).unbroadcast(s.shape(slot)) for slot in s.wanted}


@vjp("Mul")
def _mul(s: Site) -> Adjoints:
    return {slot: (s.g * s.x(1 - slot)).unbroadcast(s.shape(slot)) for slot in s.wanted}


@vjp("Div")
def _div(s: Site) -> Adjoints:
    by_slot = {}
    share = s.g / s.x(1)
    if s.wants(0):
        by_slot[0] = share
    if s.wants(1):
        by_slot[1] = -(share * s.y())
    return _each(s, by_slot)


@vjp("Pow")
def _pow(s: Site) -> Adjoints:
    if s.wants(1):
        raise NoGradientError("its exponent depends on what is to be removed")
    exponent = np.asarray(s.literal(1), dtype=np.float64)
    base = s.x()
    if exponent.size == 1 and float(exponent.ravel()[0]) == 2.0:
        return {0: (s.g * base * 2.0).unbroadcast(base.shape)}
    slope = base.power(exponent - 1.0) * exponent
    return {0: (s.g * slope).unbroadcast(base.shape)}


@vjp("Where")
def _where(s: Site) -> Adjoints:
    zero = s.e.lift(0.0)
    by_slot = {}
    if s.wants(1):
        by_slot[1] = s.e.where(s.x(0), s.g, zero)
    if s.wants(2):
        by_slot[2] = s.e.where(s.x(0), zero, s.g)
    return _each(s, by_slot)


@vjp("Max Min")
def _extremum(s: Site) -> Adjoints:
    """The gradient goes to the operand that is the extremum; where several are, they share it."""
    y = s.y()
    hits = [_step(s.x(slot).equals(y)) for slot in range(len(s.op.inputs))]
    share = s.g / _sum(s.e, hits) if len(hits) > 1 else s.g
    return {slot: (share * hits[slot]).unbroadcast(s.shape(slot)) for slot in s.wanted}


def _sum(e: Emitter, values: Sequence[Value]) -> Value:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


@vjp("Clip")
def _clip(s: Site) -> Adjoints:
    if s.wanted - {0}:
        raise NoGradientError("its bounds depend on what is to be removed")
    x, g = s.x(), s.g
    for slot, name in ((1, "min"), (2, "max")):
        bound = s.attribute(name)
        if bound is None and s.has(slot):
            bound = s.x(slot)
        if bound is not None:
            g = g * _step(x.above(bound) if slot == 1 else x.below(bound))
    return {0: g}


@vjp("PRelu")
def _prelu(s: Site) -> Adjoints:
    x, slope = s.x(), s.x(1)
    by_slot = {}
    if s.wants(0):
        by_slot[0] = s.g * s.e.where(x.above(0.0), 1.0, slope)
    if s.wants(1):
        by_slot[1] = s.g * s.e.where(x.above(0.0), 0.0, x)
    return _each(s, by_slot)
