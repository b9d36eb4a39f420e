"""Two forms of one model, compared in ONNX Runtime: what was cut must compute what it did before."""

from __future__ import annotations

import tempfile
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.errors import VerificationError
from graphprune.graph import Graph, Tensor
from graphprune.model import copy, save
from graphprune.plan import Masks
from graphprune.verify import (
    check_valid,
    difference,
    dtype_of,
    expose,
    first_fault,
    least_scale,
    open_session,
    random_feeds,
    run_session,
    tolerance_of,
)

Array = npt.NDArray[Any]
Feeds = dict[str, Array]


def feeds_within(graph: Graph, ranges: Mapping[str, tuple[float, float]], seed: int) -> Feeds:
    """Random inputs; those that have a range are uniform in it."""
    feeds = random_feeds(graph, seed)
    generator = np.random.default_rng(seed)
    for name, (lo, hi) in ranges.items():
        feeds[name] = generator.uniform(lo, hi, feeds[name].shape).astype(feeds[name].dtype)
    return feeds


def compare(
    original: ir.Model, model: ir.Model, masks: Masks, feeds: Sequence[Feeds], moved: Container[Tensor] = ()
) -> float:
    """Check that a cut model computes what the original does.

    Args:
        original: The model before.
        model: The model after.
        masks: What the cut left, on the twin of the model.
        feeds: Inputs to compare on.
        moved: Tensors that are not what they were, though what is made of them is.

    Returns:
        The largest difference of an output, relative to its scale; outputs behind ops whose result jumps (rounding,
        comparing, picking) do not count, if what enters those is the same.

    Raises:
        VerificationError: The model is invalid, does not load, or differs.
    """
    graph = masks.analysis.graph
    made_by = {tensor.name: tensor.producer for tensor in graph.outputs}
    largest = 0.0
    with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
        folder = Path(name)
        save(original, folder / "original.onnx")
        save(model, folder / "cut.onnx")
        check_valid(folder / "cut.onnx", original)
        for each in feeds:
            expected, found = _both(folder, ("original", "cut"), each)
            errors = {
                name: difference(expected[name], found.get(name), least_scale(made_by.get(name)))
                for name in expected
            }
            wrong = [o for o, error in errors.items() if not error <= tolerance_of(dtype_of(expected[o]))]
            if wrong:
                _explain(original, model, masks, each, folder, wrong, moved)
            largest = max([largest, *(errors[o] for o in errors if o not in wrong)])
    return largest


def _both(folder: Path, names: tuple[str, str], feeds: Feeds) -> tuple[dict[str, Any], dict[str, Any]]:
    results = []
    for name, what in zip(names, ("the original", "the model without its dead positions"), strict=True):
        with open_session(folder / f"{name}.onnx", what) as session:
            results.append(run_session(session, feeds, what))
    return results[0], results[1]


def _explain(
    original: ir.Model,
    model: ir.Model,
    masks: Masks,
    feeds: Feeds,
    folder: Path,
    wrong: Sequence[str],
    moved: Container[Tensor],
) -> None:
    """Compare what lies between; accept outputs that differ only behind a jump.

    Raises:
        VerificationError: Something differs that no jump explains.
    """
    graph = masks.analysis.graph
    tensors = {
        tensor.name: tensor
        for op in graph.ops
        if not op.path
        for tensor in op.outputs
        if tensor is not None and tensor.shape is not None and not tensor.constant and tensor not in moved
    }
    for each, name in ((original, "original_all"), (model, "cut_all")):
        exposed = copy(each)
        expose(exposed, {v.name: v for node in exposed.graph for v in node.outputs}, list(tensors))
        save(exposed, folder / f"{name}.onnx")
    expected, found = _both(folder, ("original_all", "cut_all"), feeds)
    fault, behind = first_fault(graph, tensors, masks, expected, found)
    if fault is not None:
        op, output, error = fault
        raise VerificationError(
            f"without its dead positions, tensor {output.name!r}, made by {op.kind} {op.name!r}, differs from"
            f" the original by {error:.2g} of its scale; leave the model as it is (no --dead) and"
            " please report it"
        )
    unexplained = [name for name in wrong if tensors.get(name) not in behind]
    if unexplained:
        raise VerificationError(
            f"without its dead positions, output {unexplained[0]!r} differs from the original; leave the model as it is"
            " (no --dead) and please report it"
        )
