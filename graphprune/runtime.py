"""Sessions of ONNX Runtime on the CPU, the way the whole package makes them.

ONNX Runtime's threads spin after a run, ready for the next one. Between two runs of ours lie matrix products in NumPy,
or the run of another session: on few cores what spins takes them from what works (repair of ResNet-56 takes a fifth
less without). So threads do not spin here; where a run's time is measured they do, as they will for the user, but only
until the run is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import ModelError, said

if TYPE_CHECKING:
    import onnx
    import onnxruntime


def make_session(
    model: onnx.ModelProto | bytes | str | Path,
    *,
    threads: int = 0,
    optimise: bool = True,
    spin: bool = False,
    what: str = "the model",
    entries: Mapping[str, str] | None = None,
    **settings: Any,
) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Args:
        model: The model, serialised or not, or its path.
        threads: Within an op; 0: as many as there are cores.
        optimise: Let ONNX Runtime rewrite the model before it runs.
        spin: Threads spin within a run, as they do by default in ONNX Runtime.
        what: What it is called in complaints.
        entries: Of the session's configuration.
        settings: Attributes of ``SessionOptions``; the memory arena is off unless one turns it on.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Memory is given back when a tensor dies: statistics and weights need it too.
    options.enable_cpu_mem_arena = False
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    spinning = {"session.force_spinning_stop": "1"} if spin else {"session.intra_op.allow_spinning": "0"}
    for key, value in (spinning | dict(entries or {})).items():
        options.add_session_config_entry(key, value)
    for name, value in settings.items():
        setattr(options, name, value)
    if isinstance(model, str | Path):
        payload: bytes | str = str(model)
    else:
        payload = model if isinstance(model, bytes) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"ONNX Runtime cannot load {what}: {said(error, 2)}") from error


def run_session(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, Any], what: str = "the model"
) -> dict[str, Any]:
    """All outputs by name, on those of the feeds that the model takes; ``what`` it is called in complaints.

    Raises:
        ModelError: ONNX Runtime cannot run it.
    """
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    try:
        results = session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    except Exception as error:
        raise ModelError(f"ONNX Runtime cannot run {what}: {said(error, 2)}") from error
    return dict(zip(names, results, strict=True))
