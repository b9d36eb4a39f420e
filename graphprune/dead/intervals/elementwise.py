"""Interval rules of elementwise ops.

An op that grows or falls in its operand has its ends where the operand has them, and is run on these by ONNX's
reference implementation, attributes and all. Of any other elementwise op only fixed elements are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphprune.dead.intervals.bounds import Bounds, Floats, between, bounds, hull, unknown, widened
from graphprune.dead.intervals.registry import Found, Site, registered, rule
from graphprune.graph.evaluate import run_reference
from graphprune.rules.elementwise import BROADCAST, UNARY

#: Units of precision that a runtime's exp, tanh or erf may be off.
FUNCTION_UNITS = 16
#: And its additions, multiplications and divisions.
ARITHMETIC_UNITS = 2

_INF = float("inf")

#: Ops that grow in their operand, with the smallest and greatest result, and units of precision.
INCREASING: dict[str, tuple[float, float, float]] = {
    "Relu": (0, _INF, 0),
    "Sigmoid": (0, 1, FUNCTION_UNITS),
    "HardSigmoid": (0, 1, FUNCTION_UNITS),
    "Tanh": (-1, 1, FUNCTION_UNITS),
    "Erf": (-1, 1, FUNCTION_UNITS),
    "Softsign": (-1, 1, FUNCTION_UNITS),
    "Atan": (-_INF, _INF, FUNCTION_UNITS),
    "Exp": (0, _INF, FUNCTION_UNITS),
    "Softplus": (0, _INF, FUNCTION_UNITS),
    "Elu": (-_INF, _INF, FUNCTION_UNITS),
    "Selu": (-_INF, _INF, FUNCTION_UNITS),
    "Celu": (-_INF, _INF, FUNCTION_UNITS),
    "Asinh": (-_INF, _INF, FUNCTION_UNITS),
    "Sinh": (-_INF, _INF, FUNCTION_UNITS),
    "LeakyRelu": (-_INF, _INF, ARITHMETIC_UNITS),
    "ThresholdedRelu": (-_INF, _INF, 0),
    "Floor": (-_INF, _INF, 0),
    "Ceil": (-_INF, _INF, 0),
    "Round": (-_INF, _INF, 0),
    "Sign": (-1, 1, 0),
    "Sqrt": (0, _INF, FUNCTION_UNITS),
    "Log": (-_INF, _INF, FUNCTION_UNITS),
    "Max": (-_INF, _INF, 0),
    "Min": (-_INF, _INF, 0),
    "Clip": (-_INF, _INF, 0),
}
#: Attributes that must not be negative for that.
_SLOPES = ("alpha", "gamma")
#: Ops that neither grow nor fall, with the smallest result; none is greater than its operand or zero.
BELOW_RELU = {
    "Gelu": -0.1701,
    "com.microsoft::Gelu": -0.1701,
    "HardSwish": -0.3751,
    "Mish": -0.3089,
}
#: Ops of whose result only the range is known.
RANGES = {"Sin": (-1.0, 1.0), "Cos": (-1.0, 1.0), "IsInf": (0.0, 1.0), "IsNaN": (0.0, 1.0)}
COMPARISONS = "And Or Xor Not Equal Greater GreaterOrEqual Less LessOrEqual"


def _run(site: Site, arrays: Sequence[Floats | None]) -> Floats | None:
    """The op itself on arrays that broadcast against its operands; None where it has no reference implementation."""
    given: list[Any] = []
    for slot, array in enumerate(arrays):
        tensor = site.tensor(slot)
        real = tensor is None or tensor.dtype is None or tensor.dtype.is_floating_point()
        # Whole numbers and flags in their own type: what is no number there is left out by the caller.
        given.append(
            array if array is None or real else np.nan_to_num(array).astype(tensor.dtype.numpy())  # type: ignore[union-attr]
        )
    try:
        result = run_reference(site.op, given)[0]
    except Exception:  # a reference op may raise anything; then nothing is known
        return None
    return np.asarray(result, dtype=np.float64)


def _values(site: Site, parts: Sequence[Bounds | None]) -> Floats | None:
    """What the op gives at elements that are fixed in all operands; NaN elsewhere."""
    if any(part is not None and np.isnan(part.value).all() for part in parts):
        return None
    result = _run(site, [None if part is None else part.value for part in parts])
    if result is None:
        return None
    fixed = np.ones((1,) * result.ndim, dtype=bool)
    for part in parts:
        if part is not None:
            fixed = fixed & part.fixed
    return np.where(fixed, result, np.nan)


def _operands(site: Site) -> list[Bounds | None]:
    return [None if tensor is None else site.bounds(slot) for slot, tensor in enumerate(site.op.inputs)]


def _of_rank(array: Floats, rank: int) -> Floats:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def pointwise(site: Site, units: float = FUNCTION_UNITS) -> Bounds:
    """Nothing but the fixed elements."""
    rank = site.rank()
    value = _values(site, _operands(site))
    if value is None:
        return unknown(rank, finite=site.finite)
    value = _of_rank(value, rank)
    lo, hi = widened(value, value, site.eps, units)
    return bounds(lo, hi, value, finite=site.finite)


def fixed_only(site: Site) -> Found:
    return [pointwise(site)] if _is_real(site) else [None]


def _is_real(site: Site) -> bool:
    dtype = site.op.outputs[0].dtype if site.op.outputs[0] is not None else None
    return dtype is not None and dtype.is_floating_point()


def increasing(site: Site) -> Found:
    """Ends at the operands' ends, within the op's range."""
    least, greatest, units = INCREASING[site.op.op_type]
    if not _is_real(site):
        return [None]
    if any(float(site.attribute(name, 1.0)) < 0 for name in _SLOPES if name in site.op.attributes):
        return fixed_only(site)
    parts = _operands(site)
    lo = _run(site, [None if part is None else part.lo for part in parts])
    hi = _run(site, [None if part is None else part.hi for part in parts])
    if lo is None or hi is None:
        return fixed_only(site)
    value = _values(site, parts)
    rank = site.rank()
    lo, hi = widened(_of_rank(lo, rank), _of_rank(hi, rank), site.eps, units)
    # A tanh may come out as one and a unit.
    beyond = units * site.eps if np.isfinite(greatest) else 0.0
    lo, hi = np.fmax(lo, least - beyond), np.fmin(hi, greatest + beyond)
    return [bounds(lo, hi, None if value is None else _of_rank(value, rank), finite=site.finite)]


def below_relu(site: Site) -> Found:
    """Between a small negative number and the operand."""
    part = site.bounds(0)
    found = pointwise(site)
    least = BELOW_RELU[site.op.kind]
    hi = np.fmin(found.hi, np.maximum(part.hi, 0) * (1 + FUNCTION_UNITS * site.eps))
    return [bounds(np.fmax(found.lo, np.full_like(found.lo, least)), hi, found.value, finite=site.finite)]


def ranged(site: Site) -> Found:
    found = pointwise(site) if _is_real(site) else unknown(site.rank())
    least, greatest = RANGES[site.op.op_type]
    return [bounds(np.fmax(found.lo, least), np.fmin(found.hi, greatest), found.value, finite=site.finite)]


@rule(COMPARISONS)
def comparison(site: Site) -> Found:
    """Zero or one."""
    value = _values(site, _operands(site))
    rank = site.rank()
    if value is None:
        return [between(rank, 0, 1)]
    value = _of_rank(value, rank)
    return [bounds(np.where(np.isnan(value), 0, value), np.where(np.isnan(value), 1, value), value)]


# -- arithmetic -----------------------------------------------------------------------------------------------------


def negated(part: Bounds) -> Bounds:
    return bounds(-part.hi, -part.lo, -part.value, finite=part.finite)


def added(a: Bounds, b: Bounds, eps: float) -> Bounds:
    """``a + b``, rounded once."""
    with np.errstate(invalid="ignore"):
        # A zero adds nothing, and so nothing is rounded.
        units = np.where(a.zero | b.zero, 0.0, eps * ARITHMETIC_UNITS)
        lo, hi = a.lo + b.lo, a.hi + b.hi
        return bounds(
            lo - np.where(np.isinf(lo), 0, np.abs(lo) * units),
            hi + np.where(np.isinf(hi), 0, np.abs(hi) * units),
            a.value + b.value,
            finite=a.finite and b.finite,
        )


def multiplied(a: Bounds, b: Bounds, eps: float) -> Bounds:
    """``a * b``, rounded once; zero times what is finite is zero, whatever it is."""
    zero = (a.zero & b.finite) | (b.zero & a.finite)
    with np.errstate(invalid="ignore"):
        corners = [x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
        # An end that is infinite is a bound that no element reaches: zero times it is zero.
        corners = [np.where(np.isnan(corner), 0, corner) for corner in corners]
        lo, hi = corners[0], corners[0]
        for corner in corners[1:]:
            lo, hi = np.minimum(lo, corner), np.maximum(hi, corner)
        lo, hi = widened(lo, hi, eps, ARITHMETIC_UNITS)
        value = a.value * b.value
    finite = a.finite and b.finite
    if not finite:
        lo, hi = np.where(zero, lo, -np.inf), np.where(zero, hi, np.inf)
    return bounds(np.where(zero, 0, lo), np.where(zero, 0, hi), np.where(zero, 0, value), finite=finite)


def reciprocal(part: Bounds, eps: float) -> Bounds:
    """``1 / x`` where x is never zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        crosses = (part.lo <= 0) & (part.hi >= 0)
        lo, hi = widened(1 / part.hi, 1 / part.lo, eps, ARITHMETIC_UNITS)
        value = np.where(part.value == 0, np.nan, 1 / part.value)
    return bounds(np.where(crosses, -np.inf, lo), np.where(crosses, np.inf, hi), value, finite=part.finite)


def _folded(site: Site, first: Bounds, others: Sequence[Bounds]) -> Bounds:
    for other in others:
        first = added(first, other, site.eps)
    return first


def _ranked(site: Site, part: Bounds) -> Found:
    rank = site.rank()
    arrays = [_of_rank(array, rank) for array in (part.lo, part.hi, part.value)]
    return [bounds(*arrays, finite=part.finite)] if _is_real(site) else [None]


@rule("Add Sum")
def add(site: Site) -> Found:
    first, *others = site.all_bounds()
    return _ranked(site, _folded(site, first, others))


@rule("Mean")
def mean(site: Site) -> Found:
    first, *others = site.all_bounds()
    total = _folded(site, first, others)
    return _ranked(site, multiplied(total, between(0, *(2 * [1 / (1 + len(others))])), site.eps))


@rule("Sub")
def subtract(site: Site) -> Found:
    return _ranked(site, added(site.bounds(0), negated(site.bounds(1)), site.eps))


@rule("Mul")
def multiply(site: Site) -> Found:
    return _ranked(site, multiplied(site.bounds(0), site.bounds(1), site.eps))


@rule("Div")
def divide(site: Site) -> Found:
    a, b = site.bounds(0), site.bounds(1)
    inverse = reciprocal(b, site.eps)
    found = multiplied(a, inverse, site.eps)
    # Zero over what may be zero may be NaN; what is divided is rounded once, not twice.
    crosses = (b.lo <= 0) & (b.hi >= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(a.zero & ~crosses, 0, a.value / b.value)
    return _ranked(
        site,
        bounds(
            np.where(crosses, -np.inf, found.lo),
            np.where(crosses, np.inf, found.hi),
            np.where(crosses, np.nan, value),
            finite=found.finite,
        ),
    )


@rule("Neg")
def negate(site: Site) -> Found:
    return _ranked(site, negated(site.bounds(0)))


@rule("Reciprocal")
def invert(site: Site) -> Found:
    return _ranked(site, reciprocal(site.bounds(0), site.eps))


def magnitude(part: Bounds) -> Bounds:
    """``|x|``."""
    crosses = (part.lo <= 0) & (part.hi >= 0)
    lo = np.where(crosses, 0, np.minimum(np.abs(part.lo), np.abs(part.hi)))
    return bounds(lo, np.maximum(np.abs(part.lo), np.abs(part.hi)), np.abs(part.value), finite=part.finite)


@rule("Abs")
def absolute(site: Site) -> Found:
    return _ranked(site, magnitude(site.bounds(0)))


@rule("Pow")
def power(site: Site) -> Found:
    """Known for a constant whole exponent, and for bases that are not negative."""
    base, exponent = site.bounds(0), site.contents(1)
    if exponent is None or exponent.size != 1:
        return fixed_only(site)
    p = float(exponent.ravel()[0])
    if p <= 0:
        return fixed_only(site)
    if p == int(p) and int(p) % 2 == 0:
        base = magnitude(base)
    elif p != int(p) and not (base.lo >= 0).all():
        return fixed_only(site)
    lo, hi = widened(base.lo**p, base.hi**p, site.eps, FUNCTION_UNITS)
    return _ranked(site, bounds(lo, hi, base.value**p, finite=base.finite))


@rule("PRelu")
def prelu(site: Site) -> Found:
    """``max(x, 0) + slope * min(x, 0)``."""
    part, slope = site.bounds(0), site.bounds(1)
    nothing = np.zeros((1,) * part.ndim)
    above = bounds(
        np.maximum(part.lo, 0), np.maximum(part.hi, 0), np.maximum(part.value, nothing), finite=part.finite
    )
    below = bounds(
        np.minimum(part.lo, 0), np.minimum(part.hi, 0), np.minimum(part.value, nothing), finite=part.finite
    )
    return _ranked(site, added(above, multiplied(below, slope, site.eps), site.eps))


@rule("Where")
def where(site: Site) -> Found:
    """One of the two, or either."""
    condition, a, b = (site.bounds(slot) for slot in range(3))
    either = hull([_like(part, max(condition.ndim, a.ndim, b.ndim)) for part in (a, b)])
    chosen = condition.value

    def pick(of_a: Floats, of_b: Floats, of_either: Floats) -> Floats:
        return np.where(np.isnan(chosen), of_either, np.where(chosen != 0, of_a, of_b))

    return _ranked(
        site,
        bounds(
            pick(a.lo, b.lo, either.lo),
            pick(a.hi, b.hi, either.hi),
            pick(a.value, b.value, either.value),
            finite=a.finite and b.finite,
        ),
    )


def _like(part: Bounds, rank: int) -> Bounds:
    return part.each(lambda array: _of_rank(array, rank))


@rule("Identity Dropout graphprune::Join")
def pass_on(site: Site) -> Found:
    """The first input, or any of them where branches join."""
    if site.op.domain:
        if any(t is None or t.shape is None or len(t.shape) != site.rank() for t in site.op.inputs):
            return [None] * len(site.op.outputs)
        return [hull(site.all_bounds())] * len(site.op.outputs)
    if site.op.op_type == "Dropout" and not site.flows:
        return [None]
    return [site.bounds(0)]


@rule("Cast CastLike")
def cast(site: Site) -> Found:
    """Reals are rounded to the new type's precision; flags become zero and one."""
    part, tensor = site.bounds(0), site.tensor(0)
    if not _is_real(site) or tensor is None or tensor.dtype is None:
        return [None]
    lo, hi = widened(part.lo, part.hi, site.eps, ARITHMETIC_UNITS)
    return [bounds(lo, hi, part.value, finite=part.finite)]


for _kind in INCREASING:
    rule(_kind)(increasing)
for _kind in BELOW_RELU:
    rule(_kind)(below_relu)
for _kind in RANGES:
    rule(_kind)(ranged)
for _kind in {*UNARY.split(), *BROADCAST.split()} - {*registered()}:
    rule(_kind)(fixed_only)
