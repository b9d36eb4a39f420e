"""Running programs in double precision, and central differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import scipy.special
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Array = np.ndarray[Any, Any]

# ONNX's reference implementation computes these in float32, whatever it is given.


class Erf(OpRun):
    def _run(self, x: Array) -> tuple[Array]:
        return (scipy.special.erf(x),)


class Gelu(OpRun):
    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
        if approximate == "tanh":
            return (x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),)
        return (x * scipy.special.ndtr(x),)


class LayerNormalization(OpRun):
    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array | float = 0.0,
        axis: int = -1,
        epsilon: float = 1e-5,
        stash_type: int = 1,
    ) -> tuple[Array]:
        axes = tuple(range(axis % x.ndim, x.ndim))
        middle = x - x.mean(axes, keepdims=True)
        return (middle / np.sqrt((middle**2).mean(axes, keepdims=True) + epsilon) * scale + bias,)


class RMSNormalization(OpRun):
    def _run(
        self, x: Array, scale: Array, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> tuple[Array]:
        axes = tuple(range(axis % x.ndim, x.ndim))
        return (x / np.sqrt((x**2).mean(axes, keepdims=True) + epsilon) * scale,)


DOUBLE = [Erf, Gelu, LayerNormalization, RMSNormalization]
Runner = Callable[[Mapping[str, Array]], list[Array]]


def in_double(model: onnx.ModelProto) -> Runner:
    """Runs a model with ONNX's reference implementation; reals may be float64."""
    evaluator = ReferenceEvaluator(model, new_ops=DOUBLE)
    names = set(evaluator.input_names)
    return lambda feeds: list(evaluator.run(None, {n: a for n, a in feeds.items() if n in names}))


def in_runtime(model: onnx.ModelProto) -> Runner:
    """Runs a model in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = {value.name for value in session.get_inputs()}
    return lambda feeds: list(session.run(None, {n: a for n, a in feeds.items() if n in names}))


def slope(function: Callable[[Any], float], at: Array, along: Array | float, step: float) -> float:
    """The derivative of a function along a direction, by central differences."""
    return (function(at + step * along) - function(at - step * along)) / (2 * step)
