"""The build plan: everything that decides what TensorRT builds, as one value.

It is made and written whether or not TensorRT is there: as JSON (``NAME.trt.json``), and as a shell script for trtexec
(``NAME.trt.sh``, :mod:`graphprune.tensorrt.script`) that another machine can run.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import ModelError, OptionError
from graphprune.tensorrt.profiles import Profile, check_profiles, network_inputs

if TYPE_CHECKING:
    import onnx_ir as ir

#: Major versions of TensorRT that plans can be made for; of 8, it is 8.6.
MAJORS = (8, 10, 11)
#: Element types that sparse tensor cores take ("Structured Sparsity", TensorRT developer guide; float32 is not one).
SPARSE_TYPES = frozenset({"FLOAT16", "BFLOAT16", "INT8", "FLOAT8E4M3FN"})
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Precision:
    """What is in the file, which a strongly typed network follows to the letter.

    Attributes:
        floats: Floating element types of the initializers, by descending number of elements.
        quantized: The network has QuantizeLinear or DequantizeLinear nodes.
    """

    floats: tuple[str, ...]
    quantized: bool = False

    @property
    def can_be_sparse(self) -> bool:
        """Some of it is in a type that sparse kernels exist for."""
        return self.quantized or not SPARSE_TYPES.isdisjoint(self.floats)


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What to build.

    Attributes:
        model: The network's file.
        engine: The file to write.
        major: TensorRT's major version.
        precision: Types in the network.
        sparsity: Let TensorRT use sparse kernels where they are faster. It is never told to make weights sparse itself.
        profiles: Shapes of inputs; those without one are static.
        workspace: Memory that kernels may use while they run, in MiB; None for all that the device has.
        timing_cache: File of kernels' times, read and written, which makes the next build faster and alike.
        layers: File that the engine's layers are written to.
        verbose: Log everything, which the counts of sparse layers need from version 10 on.
    """

    model: str
    engine: str
    major: int
    precision: Precision
    sparsity: bool = True
    profiles: tuple[Profile, ...] = ()
    workspace: int | None = None
    timing_cache: str | None = None
    layers: str | None = None
    verbose: bool = True

    def __post_init__(self) -> None:
        if self.major not in MAJORS:
            known = ", ".join(str(major) for major in MAJORS)
            raise OptionError(f"there are no plans for TensorRT {self.major}; there are for {known}")
        if self.workspace is not None and self.workspace < 1:
            raise OptionError(f"a workspace of {self.workspace} MiB is too small; give 1 or more")
        if self.major == 8 and "BFLOAT16" in self.precision.floats:
            raise OptionError("TensorRT 8.6 has no bfloat16; cast to float16, or plan for 10 or 11")
        if Path(self.model) == Path(self.engine):
            raise OptionError(f"{self.engine}: is the network's own file; give the engine another name")

    @property
    def strongly_typed(self) -> bool:
        """Each layer computes in the type that the file says: from 10 on; 11 knows nothing else."""
        return self.major >= 10

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know before the build."""
        if self.sparsity and not self.precision.can_be_sparse:
            return (
                "the network is float32, which sparse tensor cores do not take: cast it to float16 or bfloat16, or"
                " 2:4 weights gain nothing",
            )
        return ()

    def to_json(self) -> str:
        """The plan as JSON; :func:`from_json` reads it."""
        document: dict[str, Any] = {"format": _FORMAT}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "profiles":
                value = [profile.to_dict() for profile in value]
            document[entry.name] = asdict(value) if isinstance(value, Precision) else value
        document["strongly_typed"] = self.strongly_typed
        document["notes"] = list(self.notes)
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> BuildPlan:
    """Read a plan.

    Raises
    ------
    OptionError
        If it is no plan, or one that cannot be built.
    """
    try:
        document: Mapping[str, Any] = json.loads(text)
        if document["format"] != _FORMAT:
            raise OptionError(
                f"the plan has format {document['format']}, and {_FORMAT} is known; write it anew"
            )
        values = {entry.name: document[entry.name] for entry in fields(BuildPlan)}
        values["precision"] = Precision(
            tuple(document["precision"]["floats"]), bool(document["precision"]["quantized"])
        )
        values["profiles"] = tuple(
            Profile(entry["name"], *(tuple(map(int, entry[key])) for key in ("smallest", "usual", "largest")))
            for entry in document["profiles"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"this is no build plan ({type(error).__name__}: {error}); write it anew"
        ) from error
    return BuildPlan(**values)


def network_precision(model: ir.Model) -> Precision:
    """The floating types of a network's initializers and constants, and whether it is quantized."""
    from graphprune.model.nodes import stored_tensor
    from graphprune.model.read import all_graphs, all_nodes

    sizes: dict[str, int] = {}
    quantized = False
    values = [value for graph in all_graphs(model) for value in graph.initializers.values()]
    for node in all_nodes(model):
        quantized |= node.op_type in {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
        if node.op_type == "Constant":
            values.append(node.outputs[0])
    for value in values:
        tensor = value.const_value if value.const_value is not None else stored_tensor(value)
        if tensor is not None and tensor.dtype.is_floating_point():
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.size
    return Precision(tuple(sorted(sizes, key=lambda name: (-sizes[name], name))), quantized)


def make_plan(
    model: ir.Model,
    path: str | os.PathLike[str],
    engine: str | os.PathLike[str],
    *,
    major: int = MAJORS[-1],
    sparsity: bool = True,
    shapes: Sequence[Profile] = (),
    workspace: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
) -> BuildPlan:
    """A plan for a network.

    Parameters
    ----------
    model : onnx_ir.Model
        The network, read for its inputs and types only.
    path, engine : path
        Its file, and the engine to write. The layers go to the engine's name with ".layers.json".
    major : {8, 10, 11}
        TensorRT's major version.
    sparsity : bool
        Let TensorRT use sparse kernels.
    shapes : sequence of Profile
        For the inputs; every dynamic one needs one.
    workspace : int, optional
        In MiB.
    timing_cache : path, optional
        The engine's name with ".timing" by default.

    Raises
    ------
    OptionError
        For profiles that do not fit, and plans that cannot be built.
    """
    engine = os.fspath(engine)
    return BuildPlan(
        model=os.fspath(path),
        engine=engine,
        major=major,
        precision=network_precision(model),
        sparsity=sparsity,
        profiles=check_profiles(network_inputs(model), shapes),
        workspace=workspace,
        timing_cache=f"{engine}.timing" if timing_cache is None else os.fspath(timing_cache),
        layers=f"{engine}.layers.json",
    )


def write_plan(plan: BuildPlan, base: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write ``BASE.trt.json`` and ``BASE.trt.sh``.

    Returns
    -------
    plan, script : pathlib.Path
        The two files; the script can be run.

    Raises
    ------
    ModelError
        If they cannot be written.
    OptionError
        If the plan has no form that trtexec reads.
    """
    from graphprune.tensorrt.script import shell_script

    target = Path(base)
    texts = {
        target.with_name(f"{target.name}.trt.json"): (plan.to_json(), 0o644),
        target.with_name(f"{target.name}.trt.sh"): (shell_script(plan, target.parent), 0o755),
    }
    for path, (text, mode) in texts.items():
        write_whole(path, text.encode(errors="surrogateescape"), mode)  # names of files need not be UTF-8
    return tuple(texts)  # type: ignore[return-value]


def write_whole(path: Path, contents: bytes, mode: int = 0o644) -> None:
    """Write a file, or leave it as it was.

    Raises
    ------
    ModelError
        If it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(mode)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be written: {error.strerror or error}; choose another folder"
        ) from error
