"""Difference: how far apart two results are, and how far rounding alone may take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from graphprune.graph import Graph, Op

#: Largest difference allowed, relative to the greatest magnitude of an output.
TOLERANCE = 1e-4
#: For narrower types the tolerance is this many units of their precision, where that is more.
ULPS = 16
#: Functions whose range is 1.
BOUNDED = frozenset(["Sigmoid", "HardSigmoid", "Tanh", "Softmax", "Softsign", "Erf", "Sin", "Cos"])
#: Units of float32's precision that such a function may be off.
BOUNDED_ULPS = 4


def tolerance_of(dtype: np.dtype[Any]) -> float:
    """What may differ in outputs of a type, relative to their scale."""
    try:
        import ml_dtypes

        eps = float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]
        return max(TOLERANCE, ULPS * eps)
    except (ValueError, TypeError):
        return TOLERANCE


def difference(expected: Any, found: Any, least_scale: float = 0.0) -> float:
    """Largest absolute difference relative to the greatest magnitude expected; infinity where shapes differ.

    The scale is at least ``least_scale`` (see :func:`least_scale`).
    Equal infinities and equal NaNs do not differ.
    """
    if not isinstance(expected, np.ndarray) or not isinstance(found, np.ndarray):
        return 0.0 if _same_structure(expected, found) else float("inf")
    if expected.shape != found.shape:
        return float("inf")
    if expected.size == 0:
        return 0.0
    if expected.dtype.kind not in "fiubV" or expected.dtype.kind in "SUO":
        return 0.0 if np.array_equal(expected, found) else float("inf")
    a, b = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    if not (finite == np.isfinite(b)).all() or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    scale = max(float(np.abs(a[finite]).max(initial=0.0)), least_scale)
    error = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    return 0.0 if error == 0.0 else error / scale if scale > 0 else float("inf")


def least_scale(op: Op | None) -> float:
    """The scale below which an op's results mean nothing.

    A function whose range is 1 is computed to so many units of the precision of 1, not of its result: sigmoid(-20) is
    2e-9 give or take 1e-7.
    """
    if op is None or op.op_type not in BOUNDED:
        return 0.0
    return BOUNDED_ULPS * float(np.finfo(np.float32).eps) / TOLERANCE


def _same_structure(expected: Any, found: Any) -> bool:
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return all(
            isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and difference(a, b) <= TOLERANCE
            for a, b in zip(expected, found, strict=True)
        )
    return bool(expected == found)


def output_errors(
    graph: Graph, expected: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[float, list[str]]:
    """The largest difference among outputs that agree, and the names of those that do not.

    Args:
        graph: The twin; its outputs' ops say how large results mean something (see :func:`least_scale`).
        expected, found: Outputs by name.
    """
    made_by = {tensor.name: tensor.producer for tensor in graph.outputs}
    largest, wrong = 0.0, []
    for name, array in expected.items():
        error = difference(array, found.get(name), least_scale(made_by.get(name)))
        if error <= tolerance_of(dtype_of(array)):
            largest = max(largest, error)
        else:
            wrong.append(name)
    return largest, wrong


def dtype_of(array: Any) -> np.dtype[Any]:
    """The type of an output's elements; object where it is no tensor."""
    return array.dtype if isinstance(array, np.ndarray) else np.dtype(object)
