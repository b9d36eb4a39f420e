"""Verification: the pruned model is valid, loads, and equals the masked original."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.errors import ModelError, VerificationError, said
from graphprune.graph import Graph, Op, Tensor
from graphprune.kernels.box import compact
from graphprune.masked import SWITCH, mask_model
from graphprune.model import copy, save
from graphprune.model.stream import release_all
from graphprune.plan import Masks
from graphprune.runtime import make_session

if TYPE_CHECKING:
    import onnxruntime

    from graphprune.calibration import Calibration
    from graphprune.network import Pruned

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

#: Weights are not copied into the layouts of kernels: that takes memory and time, and one run is all there is.
_UNPACKED = {"session.disable_prepacking": "1"}
#: Largest difference allowed, relative to the greatest magnitude of an output.
TOLERANCE = 1e-4
#: For narrower types the tolerance is this many units of their precision, where that is more.
ULPS = 16
#: Calibration samples that are compared on.
SAMPLES = 8
#: Ops whose result jumps: what enters them is compared where what leaves them differs.
DISCONTINUOUS = frozenset(
    [
        "ArgMax",
        "ArgMin",
        "TopK",
        "NonMaxSuppression",
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "Round",
        "Floor",
        "Ceil",
        "Sign",
        "Greater",
        "Less",
        "GreaterOrEqual",
        "LessOrEqual",
        "Equal",
        "Hardmax",
        "NonZero",
        "Unique",
        "Cast",
        "Where",
        "Mod",
        "RoiAlign",
        "MaxRoiPool",
        "QLinearConv",
        "QLinearMatMul",
        "QLinearAdd",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearGlobalAveragePool",
    ]
)
#: Functions whose range is 1.
BOUNDED = frozenset(["Sigmoid", "HardSigmoid", "Tanh", "Softmax", "Softsign", "Erf", "Sin", "Cos"])
#: Units of float32's precision that such a function may be off.
BOUNDED_ULPS = 4
_CONTINUOUS_CASTS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


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


def check_valid(path: Path, original: ir.Model, what: str = "the pruned model") -> None:
    """ONNX's checker with full shape inference accepts the file; ``what`` it is called in complaints.

    Raises:
        VerificationError: It does not, though it accepts the original.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        with tempfile.TemporaryDirectory() as folder:
            before = Path(folder) / "original.onnx"
            save(original, before)
            try:
                onnx.checker.check_model(str(before), full_check=True)
            except Exception:
                return  # the original has the same fault, or a worse one: it is not ours
        raise VerificationError(f"{what} is not valid: {said(error, 2)}") from error


@contextlib.contextmanager
def open_session(path: Path, what: str) -> Iterator[onnxruntime.InferenceSession]:
    """A file in ONNX Runtime, unoptimised; ``what`` it is called in complaints.

    Raises:
        VerificationError: ONNX Runtime cannot load it.
    """
    try:
        # Unoptimised: both models then run the same kernels, so that rounding alone can differ.
        session = make_session(path, optimise=False, what=what, entries=_UNPACKED, enable_mem_pattern=False)
    except ModelError as error:
        raise VerificationError(
            f"{error}; if it does not know an op or type of the original either, nothing can be verified here: use"
            " --no-verify"
        ) from error
    yield session


def run_session(session: onnxruntime.InferenceSession, feeds: Feeds, what: str) -> dict[str, Any]:
    """All outputs by name, on those of the feeds that the model takes.

    Raises:
        VerificationError: ONNX Runtime cannot run it.
    """
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    try:
        results = session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    except Exception as error:
        raise VerificationError(
            f"ONNX Runtime cannot run {what}: {said(error, 2)}; if it cannot run the original on random inputs"
            " either, give inputs that it can with --calib"
        ) from error
    return dict(zip(names, results, strict=True))


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
        made_by = {tensor.name: tensor.producer for tensor in graph.outputs}
        errors = {
            name: difference(expected[name], found.get(name), least_scale(made_by.get(name)))
            for name in expected
        }
        wrong = [o for o, error in errors.items() if not error <= tolerance_of(dtype_of(expected[o]))]
        if wrong:
            _explain(pruned, feeds, folder, wrong)
            pruned.report.notes.append(
                f"{len(wrong)} of {len(errors)} outputs lie behind ops whose result jumps (rounding, comparing,"
                " picking); what enters those was compared instead"
            )
        right = [errors[o] for o in errors if o not in wrong]
        pruned.report.max_error = max(right, default=0.0)
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


def dtype_of(array: Any) -> np.dtype[Any]:
    """The type of an output's elements; object where it is no tensor."""
    return array.dtype if isinstance(array, np.ndarray) else np.dtype(object)


def _save_masked(pruned: Pruned, path: Path, exposed: Sequence[str] = ()) -> None:
    model = copy(pruned.original)
    mapping = dict(zip(pruned.original.graph.all_nodes(), model.graph.all_nodes(), strict=True))
    node_of = {op: mapping[node] for op, node in pruned.node_of.items()}
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    mask_model(model, node_of, pruned.network.analysis, pruned.masks, pruned.edits)
    expose(model, by_name, exposed)
    save(model, path)


def expose(model: ir.Model, by_name: Mapping[str | None, ir.Value], names: Sequence[str]) -> None:
    """Make further values of the main graph outputs, in place."""
    present = {value.name for value in model.graph.outputs}
    for name in names:
        value = by_name.get(name)
        if value is not None and value.name not in present:
            model.graph.outputs.append(value)
            present.add(value.name)


def _run_masked(path: Path, feeds: Feeds) -> tuple[dict[str, Any], dict[str, Any]]:
    with open_session(path, "the masked original") as session:
        masked = run_session(session, {**feeds, SWITCH: np.asarray(False)}, "the masked original")
        original = run_session(session, {**feeds, SWITCH: np.asarray(True)}, "the original")
    return masked, original


# -- finding the fault ----------------------------------------------------------------------------------------------


def _explain(pruned: Pruned, feeds: Feeds, folder: Path, wrong: Sequence[str]) -> None:
    """Compare intermediate tensors; accept outputs that differ only behind a jump.

    Raises:
        VerificationError: Something differs that no jump explains.
    """
    graph = pruned.network.analysis.graph
    tensors = {
        tensor.name: tensor
        for op in graph.ops
        if not op.path
        for tensor in op.outputs
        if tensor is not None and tensor.shape is not None and not tensor.constant
    }
    names = list(tensors)
    _save_masked(pruned, folder / "masked_all.onnx", names)
    expected, _ = _run_masked(folder / "masked_all.onnx", feeds)
    exposed = copy(pruned.model)
    expose(exposed, {v.name: v for node in exposed.graph for v in node.outputs}, names)
    save(exposed, folder / "pruned_all.onnx")
    with open_session(folder / "pruned_all.onnx", "the pruned model") as session:
        found = run_session(session, feeds, "the pruned model")
    fault, behind_jump = first_fault(graph, tensors, pruned.masks, expected, found)
    if fault is not None:
        raise VerificationError(_message(pruned, *fault))
    unexplained = [name for name in wrong if tensors.get(name) not in behind_jump]
    if unexplained:
        raise VerificationError(
            f"output {unexplained[0]!r} of the pruned model differs from the masked original; this is a fault of"
            " graphprune: please report it with the model, and prune with --exclude until it is mended"
        )


def first_fault(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    masks: Masks,
    expected: Mapping[str, Any],
    found: Mapping[str, Any],
) -> tuple[tuple[Op, Tensor, float] | None, set[Tensor]]:
    """Where two forms of a network first differ though no jump explains it.

    Args:
        graph: The twin.
        tensors: What is compared, by name.
        masks: What the cut leaves of them.
        expected, found: Contents before the cut, whole, and after it, by name.

    Returns:
        The op, its output and the difference, or None; and the tensors that differ, or may, behind jumps.
    """
    differs: dict[Tensor, float] = {}
    for name, tensor in tensors.items():
        if name not in expected or name not in found or tensor.data is not None:
            continue
        mask = masks.mask(tensor)
        reference = expected[name]
        if mask is not None and isinstance(reference, np.ndarray):
            if any(m not in (1, s) for m, s in zip(mask.shape, reference.shape, strict=True)):
                continue
            reference = compact(reference, mask)
        error = difference(reference, found[name], least_scale(tensor.producer))
        if not error <= tolerance_of(dtype_of(reference)):
            differs[tensor] = error
    behind = _behind_jumps(graph, differs)
    for op in graph.ops:
        for output in op.outputs:
            if output is not None and output in differs and output not in behind:
                return (op, output, differs[output]), behind
    return None, behind


def _behind_jumps(graph: Graph, differs: Mapping[Tensor, float]) -> set[Tensor]:
    """Tensors that differ behind an op whose result jumps, though what enters it does not differ."""
    behind: set[Tensor] = set()
    for op in graph.ops:
        jump = op.op_type in DISCONTINUOUS and not _is_smooth(op)
        inherited = any(tensor in behind for tensor in op.inputs if tensor is not None)
        fresh = jump and not any(tensor in differs for tensor in op.inputs if tensor is not None)
        if inherited or fresh:
            behind.update(tensor for tensor in op.outputs if tensor is not None)
    return behind


def _is_smooth(op: Op) -> bool:
    """A Cast between reals, or a choice made by what no weight influences, does not jump."""
    if op.op_type == "Cast":
        output = op.outputs[0]
        return output is not None and output.dtype in _CONTINUOUS_CASTS
    return op.op_type == "Where"


def _message(pruned: Pruned, op: Op, tensor: Tensor, error: float) -> str:
    labels = {int(label) for a in pruned.network.analysis.labellings(tensor) for label in np.unique(a)}
    cut = {c.group for c in pruned.report.plan.cuts}
    groups = [g.name for g in pruned.network.groups if g.name in cut and labels & set(g.labels.tolist())]
    where = f" of group {groups[0]!r}" if groups else ""
    return (
        f"tensor {tensor.name!r}{where}, made by {op.kind} {op.name!r}, differs from the masked original by"
        f" {error:.2g} of its scale; this is a fault of graphprune: please report it with the model, and prune with"
        " --exclude until it is mended"
    )
