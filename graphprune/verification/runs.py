"""Runs: files that are valid, and what ONNX Runtime makes of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx_ir as ir

from graphprune import runtime
from graphprune.errors import ModelError, VerificationError, said
from graphprune.model import save
from graphprune.verification.feeds import Feeds

if TYPE_CHECKING:
    import onnxruntime

#: What a model returns, by name: arrays, or sequences and maps of them.
Outputs: TypeAlias = dict[str, Any]

#: Weights are not copied into the layouts of kernels: that takes memory and time, and one run is all there is.
_UNPACKED = {"session.disable_prepacking": "1"}


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
        session = runtime.make_session(
            path, optimise=False, what=what, entries=_UNPACKED, enable_mem_pattern=False
        )
    except ModelError as error:
        raise VerificationError(
            f"{error}; if it does not know an op or type of the original either, nothing can be verified here: use"
            " --no-verify"
        ) from error
    yield session


def run_session(session: onnxruntime.InferenceSession, feeds: Feeds, what: str) -> Outputs:
    """All outputs by name, on those of the feeds that the model takes.

    Raises:
        VerificationError: ONNX Runtime cannot run it.
    """
    try:
        return runtime.run_session(session, feeds, what)
    except ModelError as error:
        raise VerificationError(
            f"{error}; if it cannot run the original on random inputs either, give inputs that it can with --calib"
        ) from error


def expose(model: ir.Model, by_name: Mapping[str | None, ir.Value], names: Sequence[str]) -> None:
    """Make further values of the main graph outputs, in place."""
    present = {value.name for value in model.graph.outputs}
    for name in names:
        value = by_name.get(name)
        if value is not None and value.name not in present:
            model.graph.outputs.append(value)
            present.add(value.name)
