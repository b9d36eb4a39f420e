"""Writing a model: staged beside its target, loadable there, and renamed into place only when it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from graphprune.errors import ModelError, OptionError
from graphprune.model.check import one_line, parts
from graphprune.model.read import EXTERNAL, SOURCES, all_graphs, explained
from graphprune.model.wire import LIFT_BYTES, MAXIMUM_MESSAGE, Payload, WireError, write_model, write_tensor

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

#: From this size on weights go to an external data file: one message must stay below 2 GB, graph included.
EXTERNAL_BYTES = 1_900_000_000
#: Smaller tensors stay in the model file: shape inference and optimizers read them there.
EXTERNAL_THRESHOLD = 1024
#: Offsets of tensors of 1 MiB and more are multiples of this, so that runtimes can map them.
ALIGNMENT = 4096


@dataclass(frozen=True)
class StagedFile:
    """A model written into a temporary folder beside its target.

    Attributes:
        path: The model file as written: ONNX Runtime and onnx.checker can load it, external data included.
        target: Where :meth:`commit` puts it.
    """

    path: Path
    target: Path
    external_data: bool

    @property
    def size(self) -> int:
        """Bytes on disk, external data included."""
        return sum(file.stat().st_size for file in self.path.parent.iterdir())

    def commit(self) -> Path:
        """Rename the file (external data first) to its target, replacing what is there.

        Returns
        -------
        pathlib.Path
            The target.

        Raises
        ------
        ModelError
            If renaming fails; an existing target, its data included, is then as it was.
        """
        data = data_path(self.target)
        staged_data = self.path.parent / data.name
        backup = self.path.parent / "replaced.data"
        try:
            if not self.external_data:
                self.path.replace(self.target)
            else:
                had_data = data.exists()
                if had_data:
                    _keep(data, backup)
                try:
                    staged_data.replace(data)
                    self.path.replace(self.target)
                except BaseException:
                    if had_data:
                        backup.replace(data)
                    else:
                        data.unlink(missing_ok=True)
                    raise
            _sync_folder(self.target.parent)
        except OSError as error:
            raise ModelError(
                f"{self.target}: cannot be written: {one_line(error)}; nothing was changed"
            ) from error
        return self.target


def _keep(file: Path, backup: Path) -> None:
    """Keep the contents of ``file`` at ``backup``; by a hard link, so that the file never is missing."""
    try:
        os.link(file, backup)
    except OSError:  # not every file system has hard links
        shutil.copy2(file, backup)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable where the system can (not on Windows)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def data_path(target: Path) -> Path:
    """The external data file of a model file: ``model.onnx`` has ``model.onnx.data``."""
    return target.with_name(f"{target.stem}.onnx.data")


def save(model: ir.Model, path: str | os.PathLike[str], *, external_data: bool | None = None) -> Path:
    """Write a model atomically.

    Parameters
    ----------
    model : onnx_ir.Model
        Not changed. Weights stream to disk one tensor after another.
    path : str or os.PathLike
        The target. Its folder must exist.
    external_data : bool, optional
        Keep weights in ``<stem>.onnx.data`` beside the model. By default if the model was read so, or if it is
        larger than 1.9 GB.

    Returns
    -------
    pathlib.Path
        The target.

    Raises
    ------
    OptionError
        If the target is one of the files that the model was read from, is a folder or lies in none, or if
        ``external_data=False`` and the model exceeds 2 GB.
    ModelError
        If writing fails. Nothing temporary is left then, and an existing target is as it was.
    """
    with staged(model, path, external_data=external_data) as file:
        return file.commit()


@contextmanager
def staged(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    sources: Sequence[str | os.PathLike[str]] = (),
) -> Iterator[StagedFile]:
    """Write a model beside its target, to be looked at before :meth:`StagedFile.commit` puts it there.

    On leaving the context everything that was not committed is removed.

    Parameters
    ----------
    model, path, external_data
        See :func:`save`.
    sources : sequence of paths
        More files that must not be overwritten.

    Raises
    ------
    OptionError, ModelError
        See :func:`save`.

    Examples
    --------
    >>> with staged(model, "small.onnx") as file:          # doctest: +SKIP
    ...     session = onnxruntime.InferenceSession(file.path)
    ...     file.commit()
    """
    target = Path(path)
    if target.is_dir():
        raise OptionError(f"{target}: a folder; give the name of the file to write")
    if not target.parent.is_dir():
        raise OptionError(f"{target}: the folder {str(target.parent)!r} does not exist; create it first")
    weights = _weights(model)
    external = _is_external(model, weights, target, external_data)
    written = [target, data_path(target)] if external else [target]
    _refuse_sources(written, weights, (*sources, *model.meta.get(SOURCES, ())))
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {one_line(error)}; choose another folder") from error
    try:
        file = StagedFile(folder / target.name, target, external)
        try:
            _write(model, weights, file.path, external)
        except WireError as error:
            raise ModelError(f"{target}: cannot be written: {one_line(error)}") from error
        except OSError as error:
            raise ModelError(
                f"{target}: cannot be written: {one_line(error)}; free space or choose another folder"
            ) from error
        yield file
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _weights(model: ir.Model) -> list[ir.Value]:
    """All initializers that have contents, those of subgraphs too."""
    return [
        v for graph in all_graphs(model) for v in graph.initializers.values() if v.const_value is not None
    ]


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    """The contents of one of :func:`_weights`."""
    assert value.const_value is not None
    return value.const_value


def file_size(model: ir.Model) -> int:
    """Bytes that the model takes in one file, to within some bytes a tensor. No weights are read."""
    weights = _weights(model)
    values = [value for value in weights if _streams(value)]
    proto = _skeleton(model, weights, values, [0] * len(values), "")
    for tensor in (tensor for graph in parts(proto).graphs for tensor in graph.initializer):
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return int(proto.ByteSize()) + sum(
        value.const_value.nbytes for value in values if value.const_value is not None
    )


def _is_external(model: ir.Model, weights: list[ir.Value], target: Path, wanted: bool | None) -> bool:
    import onnx_ir as ir

    total = sum(_tensor(value).nbytes for value in weights)
    if wanted is False and total > MAXIMUM_MESSAGE:
        raise OptionError(
            f"{target}: {total / 1e9:.1f} GB of weights do not fit one ONNX file; use external data"
        )
    if wanted is not None:
        return wanted
    had = bool(model.meta.get(EXTERNAL)) or any(isinstance(v.const_value, ir.ExternalTensor) for v in weights)
    return had or total > EXTERNAL_BYTES


def _refuse_sources(
    targets: list[Path], weights: list[ir.Value], sources: Sequence[str | os.PathLike[str]]
) -> None:
    """OptionError if a target is a file that the model's weights are still read from, under whatever name."""
    import onnx_ir as ir

    files = {Path(source) for source in sources}
    files |= {Path(v.const_value.path) for v in weights if isinstance(v.const_value, ir.ExternalTensor)}
    for target in targets:
        for file in files:
            same = file.resolve() == target.resolve()
            if not same and target.exists() and file.exists():
                same = file.samefile(target)  # hard links
            if same:
                raise OptionError(
                    f"{target}: the model is read from this file and is never overwritten; choose another output"
                )


def _streams(value: ir.Value, threshold: int = LIFT_BYTES) -> bool:
    """Whether an initializer is written apart from the graph's message."""
    import onnx_ir as ir

    tensor = value.const_value
    return tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes >= threshold


def _skeleton(
    model: ir.Model, weights: list[ir.Value], streamed: list[ir.Value], offsets: list[int], location: str
) -> onnx.ModelProto:
    """The serialized model, with references to external data in place of the contents of ``streamed``.

    The model's initializers are exchanged for the time of the call and put back: copying the graph would cost more.
    """
    import onnx_ir as ir

    kept = [(value, _tensor(value)) for value in weights]
    apart = {id(value): offset for value, offset in zip(streamed, offsets, strict=True)}
    try:
        for value, tensor in kept:
            described: dict[str, Any] = {
                "name": value.name or "",
                "doc_string": tensor.doc_string,
                "metadata_props": dict(tensor.metadata_props),
            }
            if id(value) in apart:
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor(
                    location, apart[id(value)], tensor.nbytes, tensor.dtype, shape=shape, **described
                )
            elif isinstance(tensor, ir.ExternalTensor):  # small, or in a subgraph: into the message
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, **described)
        with explained("the pruned model", "serialized"):
            proto = ir.serde.serialize_model(model)
    finally:
        for value, tensor in kept:
            value.const_value = tensor
    drop_initializer_info(proto)
    return proto


def bare_proto(model: ir.Model) -> onnx.ModelProto:
    """The serialized model without the contents of its large or external weights: for checks of its structure."""
    import onnx_ir as ir

    weights = _weights(model)
    values = [v for v in weights if isinstance(v.const_value, ir.ExternalTensor) or _streams(v)]
    return _skeleton(model, weights, values, [0] * len(values), "weights")


def drop_initializer_info(proto: onnx.ModelProto) -> None:
    """Remove the ``value_info`` that onnx_ir writes for initializers, which repeats their type and shape."""
    for graph in parts(proto).graphs:
        initializers = {tensor.name for tensor in graph.initializer}
        kept = [
            info
            for info in graph.value_info
            if info.name not in initializers or info.doc_string or info.metadata_props or info.type.denotation
        ]
        if len(kept) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(kept)


def _write(model: ir.Model, weights: list[ir.Value], path: Path, external: bool) -> None:
    """Write the model, and its external data beside it, and wait until both are on disk."""
    if external:
        values = [value for value in weights if _streams(value, EXTERNAL_THRESHOLD)]
        offsets = _layout(values)
        data = data_path(path)
        with data.open("wb") as file:
            for value, offset in zip(values, offsets, strict=True):
                file.write(bytes(offset - file.tell()))
                write_tensor(file, _tensor(value))
            _sync(file)
        proto = _skeleton(model, weights, values, offsets, data.name)
        if proto.ByteSize() > MAXIMUM_MESSAGE:
            raise WireError(
                "the graph alone, without its initializers, exceeds 2 GB; move large constants to initializers"
            )
        with path.open("wb") as file:
            file.write(proto.SerializeToString())
            _sync(file)
        return
    main = model.graph.initializers
    values = [v for v in main.values() if v.const_value is not None and _streams(v)]
    proto = _skeleton(model, weights, values, [0] * len(values), "")
    by_name = {value.name: value for value in values}
    payloads: list[Payload | None] = []
    for tensor in proto.graph.initializer:
        if tensor.name not in by_name:
            payloads.append(None)
            continue
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        payloads.append(_tensor(by_name[tensor.name]))
    with path.open("wb") as file:
        write_model(proto, payloads, file)
        _sync(file)


def _layout(values: list[ir.Value]) -> list[int]:
    """Offsets of the weights in the data file, in the order of the model."""
    offsets, end = [], 0
    for value in values:
        nbytes = _tensor(value).nbytes
        step = ALIGNMENT if nbytes >= 2**20 else 64
        offsets.append(-(-end // step) * step)
        end = offsets[-1] + nbytes
    return offsets


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
