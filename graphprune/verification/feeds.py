"""Inputs to compare networks on: the user's, or random ones that the network accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.errors import VerificationError
from graphprune.graph import Graph, Tensor

if TYPE_CHECKING:
    from graphprune.calibration import Calibration

#: Arrays by input name.
Feeds: TypeAlias = dict[str, npt.NDArray[Any]]

#: Calibration samples that are compared on.
SAMPLES = 8


def random_feeds(graph: Graph, seed: int, shapes: Mapping[str, Sequence[int]] | None = None) -> Feeds:
    """Seeded inputs of the twin's sizes: normal reals, integers within the range that their readers accept.

    Args:
        graph: The twin.
        seed: Seed of the generator.
        shapes: Other sizes, by input name.
    """
    generator = np.random.default_rng(seed)
    feeds: Feeds = {}
    for tensor in graph.inputs:
        shape = tuple((shapes or {}).get(tensor.name, tensor.shape or ()))
        if tensor.dtype is None:
            raise VerificationError(
                f"input {tensor.name!r} is no tensor; give inputs with --calib, or --no-verify"
            )
        dtype = tensor.dtype.numpy()
        if tensor.dtype.is_floating_point():
            feeds[tensor.name] = generator.standard_normal(shape).astype(dtype)
        elif tensor.dtype == ir.DataType.BOOL or "mask" in tensor.name.lower():
            feeds[tensor.name] = np.ones(shape, dtype=dtype)
        elif tensor.dtype == ir.DataType.STRING:
            raise VerificationError(
                f"input {tensor.name!r} holds strings; give inputs with --calib, or --no-verify"
            )
        else:
            limit = _index_limit(tensor)
            feeds[tensor.name] = generator.integers(0, limit, shape).astype(dtype)
    return feeds


def _index_limit(tensor: Tensor) -> int:
    """The smallest table that an integer input is looked up in; 2 where it is none."""
    limit: int | None = None
    todo, seen = [tensor], {tensor}
    while todo:
        current = todo.pop()
        for op, slot in current.uses:
            if op.op_type in ("Gather", "EmbedLayerNormalization") and (
                slot == 1 or (slot == 0 and op.op_type != "Gather")
            ):
                table = op.inputs[0] if op.op_type == "Gather" else op.inputs[2 + 2 * slot]
                axis = int(op.attributes.get("axis", 0)) if op.op_type == "Gather" else 0
                if table is not None and table.shape:
                    limit = min(limit or table.shape[axis], table.shape[axis])
            elif op.op_type in (
                "Cast",
                "Reshape",
                "Unsqueeze",
                "Squeeze",
                "Identity",
                "Where",
                "Slice",
                "Flatten",
                "Join",
            ):
                for output in op.outputs:
                    if output is not None and output not in seen:
                        seen.add(output)
                        todo.append(output)
    return max(limit or 2, 1)


def feeds_of(graph: Graph, calibration: Calibration | None, seed: int) -> Feeds:
    """Inputs to compare on: the first of the user's, random ones where there are none."""
    if calibration is None:
        return random_feeds(graph, seed)
    return next(iter(calibration.subset(SAMPLES).batches(SAMPLES)))
