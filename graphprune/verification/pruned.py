"""The pruned model is valid, loads, and equals the masked original."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphprune.errors import VerificationError
from graphprune.graph import Tensor
from graphprune.masked import SWITCH, mask_model
from graphprune.model import copy, save
from graphprune.model.stream import release_all
from graphprune.verification.difference import difference, dtype_of, output_errors
from graphprune.verification.faults import Complaint, comparable_tensors, require_jumps
from graphprune.verification.feeds import Feeds, feeds_of
from graphprune.verification.runs import Outputs, check_valid, expose, open_session, run_session

if TYPE_CHECKING:
    from graphprune.calibration import Calibration
    from graphprune.network import Pruned


def verify(
    pruned: Pruned,
    *,
    calibration: Calibration | None = None,
    seed: int = 0,
    path: Path | None = None,
) -> None:
    """Check a pruned model against its masked original; fills in the report's errors.

    Args:
        pruned: What :func:`graphprune.pipeline.prune_ir` returned.
        calibration: Inputs to compare on (the first few); random ones otherwise.
        seed: For random inputs.
        path: The pruned model as a file, if it has been written already.

    Raises:
        VerificationError: The model is invalid, does not load, or differs; the message names the first tensor that
            differs, and its group.
    """
    graph = pruned.network.analysis.graph
    feeds = feeds_of(graph, calibration, seed)
    with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
        folder = Path(name)
        if path is None:
            path = folder / "pruned.onnx"
            save(pruned.model, path)
        check_valid(path, pruned.original)
        masked_path = folder / "masked.onnx"
        _save_masked(pruned, masked_path)
        release_all(pruned.original)
        expected, original = _run_masked(masked_path, feeds)
        with open_session(path, "the pruned model") as session:
            found = run_session(session, feeds, "the pruned model")
        pruned.report.max_error, wrong = output_errors(graph, expected, found)
        if wrong:
            _explain(pruned, feeds, folder, wrong)
            pruned.report.notes.append(
                f"{len(wrong)} of {len(expected)} outputs lie behind ops whose result jumps (rounding, comparing,"
                " picking); what enters those was compared instead"
            )
        pruned.report.output_change = max(
            (difference(original[o], found[o]) for o in found if dtype_of(found[o]).kind in "fV"), default=0.0
        )


def verify_sound(
    pruned: Pruned,
    original: ir.Model,
    *,
    calibration: Calibration | None = None,
    seed: int = 0,
    path: Path | None = None,
) -> None:
    """Check a model whose cut was verified and whose weights were changed since: it is valid, loads, and answers.

    Fills in how far its outputs are from the original's.

    Args:
        pruned: The model.
        original: What it was made from.
        calibration: Inputs to run on (the first few); random ones otherwise.
        seed: For random inputs.
        path: The model as a file, if it has been written already.

    Raises:
        VerificationError: It is not valid, or its outputs have other shapes than the original's or are not finite where
            those are.
    """
    feeds = feeds_of(pruned.network.analysis.graph, calibration, seed)
    with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
        folder = Path(name)
        if path is None:
            path = folder / "repaired.onnx"
            save(pruned.model, path)
        check_valid(path, original)
        save(original, folder / "original.onnx")
        with open_session(folder / "original.onnx", "the original") as session:
            expected = run_session(session, feeds, "the original")
        with open_session(path, "the repaired model") as session:
            found = run_session(session, feeds, "the repaired model")
    changes = [0.0]
    for output, array in expected.items():
        other = found.get(output)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fV":
            continue
        finite = np.isfinite(array.astype(np.float64)).all()
        if not isinstance(other, np.ndarray) or other.ndim != array.ndim or other.dtype != array.dtype:
            raise VerificationError(
                f"output {output!r} of the repaired model is of another kind than the original's"
            )
        if finite and not np.isfinite(other.astype(np.float64)).all():
            raise VerificationError(
                f"output {output!r} of the repaired model is not finite; use --no-repair, or give more calibration"
                " inputs"
            )
        if other.shape == array.shape:
            changes.append(difference(array, other))
    pruned.report.output_change = max(changes)


def _save_masked(pruned: Pruned, path: Path, exposed: Sequence[str] = ()) -> None:
    model = copy(pruned.original)
    mapping = dict(zip(pruned.original.graph.all_nodes(), model.graph.all_nodes(), strict=True))
    node_of = {op: mapping[node] for op, node in pruned.node_of.items()}
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    mask_model(model, node_of, pruned.network.analysis, pruned.masks, pruned.edits)
    expose(model, by_name, exposed)
    save(model, path)


def _run_masked(path: Path, feeds: Feeds) -> tuple[Outputs, Outputs]:
    with open_session(path, "the masked original") as session:
        masked = run_session(session, {**feeds, SWITCH: np.asarray(False)}, "the masked original")
        original = run_session(session, {**feeds, SWITCH: np.asarray(True)}, "the original")
    return masked, original


def _explain(pruned: Pruned, feeds: Feeds, folder: Path, wrong: Sequence[str]) -> None:
    """Compare intermediate tensors; accept outputs that differ only behind a jump.

    Raises:
        VerificationError: Something differs that no jump explains.
    """
    graph = pruned.network.analysis.graph
    tensors = comparable_tensors(graph)
    _save_masked(pruned, folder / "masked_all.onnx", list(tensors))
    expected, _ = _run_masked(folder / "masked_all.onnx", feeds)
    exposed = copy(pruned.model)
    expose(exposed, {v.name: v for node in exposed.graph for v in node.outputs}, list(tensors))
    save(exposed, folder / "pruned_all.onnx")
    with open_session(folder / "pruned_all.onnx", "the pruned model") as session:
        found = run_session(session, feeds, "the pruned model")
    complaint = Complaint(
        "in the pruned model",
        "the masked original",
        "this is a fault of graphprune: please report it with the model, and prune with --exclude until it is mended",
        lambda tensor: _group_of(pruned, tensor),
    )
    require_jumps(graph, tensors, pruned.masks, expected, found, wrong, complaint)


def _group_of(pruned: Pruned, tensor: Tensor) -> str:
    """The first group that is cut and that a tensor has positions of."""
    labels = {int(label) for a in pruned.network.analysis.labellings(tensor) for label in np.unique(a)}
    cut = {c.group for c in pruned.report.plan.cuts}
    groups = [g.name for g in pruned.network.groups if g.name in cut and labels & set(g.labels.tolist())]
    return f" of group {groups[0]!r}" if groups else ""
