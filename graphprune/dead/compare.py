"""Two forms of one model, compared in ONNX Runtime: what was cut must compute what it did before."""

from __future__ import annotations

import tempfile
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphprune.graph import Graph, Tensor
from graphprune.model import copy, save
from graphprune.plan import Masks
from graphprune.verification.difference import output_errors
from graphprune.verification.faults import Complaint, comparable_tensors, require_jumps
from graphprune.verification.feeds import Feeds, random_feeds
from graphprune.verification.runs import Outputs, check_valid, expose, open_session, run_session

_COMPLAINT = Complaint(
    "without its dead positions",
    "the original",
    "leave the model as it is (no --dead) and please report it",
)


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
    largest = 0.0
    with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
        folder = Path(name)
        save(original, folder / "original.onnx")
        save(model, folder / "cut.onnx")
        check_valid(folder / "cut.onnx", original)
        for each in feeds:
            expected, found = _both(folder, ("original", "cut"), each)
            error, wrong = output_errors(masks.analysis.graph, expected, found)
            if wrong:
                _explain(original, model, masks, each, folder, wrong, moved)
            largest = max(largest, error)
    return largest


def _both(folder: Path, names: tuple[str, str], feeds: Feeds) -> tuple[Outputs, Outputs]:
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
    tensors = comparable_tensors(masks.analysis.graph, moved)
    for each, name in ((original, "original_all"), (model, "cut_all")):
        exposed = copy(each)
        expose(exposed, {v.name: v for node in exposed.graph for v in node.outputs}, list(tensors))
        save(exposed, folder / f"{name}.onnx")
    expected, found = _both(folder, ("original_all", "cut_all"), feeds)
    require_jumps(masks.analysis.graph, tensors, masks, expected, found, wrong, _COMPLAINT)
