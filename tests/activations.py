"""What the network computes inside, and what a layer sees of it: the oracle of statistics, scores and repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import scipy.linalg

from graphprune.calibration import Calibration

Array = npt.NDArray[Any]


def activations(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every value of the main graph that a node makes, inputs included, in ONNX Runtime without optimisation."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    there = {value.name for value in exposed.graph.output}
    names = [name for node in exposed.graph.node for name in node.output if name]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        exposed.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs = [value.name for value in session.get_outputs()]
    return {**feeds, **dict(zip(outputs, session.run(outputs, dict(feeds)), strict=True))}


def outputs(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """The model's own outputs, as float64 where they are real."""
    found = activations(model, feeds)
    return [
        found[value.name].astype(np.float64) if found[value.name].dtype.kind == "f" else found[value.name]
        for value in model.graph.output
    ]


def patches(
    x: Array,
    kernel: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
) -> Array:
    """What each output position of a convolution sees, ``[positions, channels * prod(kernel)]``, one at a time."""
    rank = len(kernel)
    strides, dilations, pads = strides or [1] * rank, dilations or [1] * rank, pads or [0] * 2 * rank
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    sizes = [(s - r) // step + 1 for s, r, step in zip(padded.shape[2:], reach, strides, strict=True)]
    rows = []
    for n in range(len(x)):
        for at in product(*map(range, sizes)):
            window = tuple(
                slice(i * step, i * step + r, d)
                for i, step, r, d in zip(at, strides, reach, dilations, strict=True)
            )
            index: Any = (n, slice(None), *window)
            rows.append(padded[index].ravel())
    return np.array(rows)


def affine_fit(
    x: Array, y: Array, prior: Array | None = None, damping: float = 0.0, bias: Array | None = None
) -> tuple[Array, Array]:
    """Least squares by :func:`scipy.linalg.lstsq` on the samples themselves, held towards a prior by further rows.

    Args:
        x, y: ``[n, d]`` and ``[n, m]``.
        prior: ``[d, m]``.
        damping: In units of the mean of the diagonal of the Gram matrix (of deviations, if there is an intercept).
        bias: ``[m]`` that is given; None: an intercept is fitted.

    Returns:
        float64 ``[d, m]`` and ``[m]``.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    n, d = x.shape
    centred = x - x.mean(axis=0) if bias is None else x
    penalty = damping * float(np.square(centred).sum()) / max(d, 1)
    columns = np.c_[x, np.ones(n)] if bias is None else x
    target = y if bias is None else y - bias
    if penalty and prior is not None:
        columns = np.r_[columns, np.sqrt(penalty) * np.eye(d, columns.shape[1])]
        target = np.r_[target, np.sqrt(penalty) * prior]
    fitted = scipy.linalg.lstsq(columns, target)[0]
    return fitted[:d], fitted[d] if bias is None else bias


def calibration(feeds: Mapping[str, Array]) -> Calibration:
    """Inputs whose samples lie along axis 0."""
    return Calibration(dict(feeds), {})
