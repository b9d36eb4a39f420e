"""Reading a model: from a file or bytes to an ``onnx_ir.Model`` whose weights stay on disk until they are used."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graphprune.errors import ModelError
from graphprune.model.check import (
    check_model,
    locate_external,
    nbytes_of,
    one_line,
)
from graphprune.model.sparse import make_dense
from graphprune.model.wire import MAXIMUM_MESSAGE, Buffer, Lifted, WireError, lift

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

#: Keys in ``ir.Model.meta``: the files that a model was read from, and whether it kept weights in external data.
SOURCES, EXTERNAL = "graphprune.calibration.sources", "graphprune.external_data"

#: Files at least this large are memory-mapped, not read.
MAP_BYTES = 16 * 2**20

#: Files that are often taken for ONNX models, by their first bytes (and where those stand).
FOREIGN = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the model itself: run `git lfs pull`"),
    (
        0,
        b"PK\x03\x04",
        "a zip archive (a PyTorch checkpoint?): export the network with torch.onnx.export first",
    ),
    (0, b"\x80", "a Python pickle (a PyTorch checkpoint?): export the network with torch.onnx.export first"),
    (0, b"\x1f\x8b", "gzip-compressed: decompress it first"),
    (0, b"<", "an XML or HTML page: download the model file itself"),
    (4, b"ORTM", "an ORT-format model: give the ONNX file that it was made from"),
    (4, b"TFL3", "a TensorFlow Lite model: convert it to ONNX first"),
)


class ConversionWarning(UserWarning):
    """Something in the model has no place in the kind of object that it is converted from or to."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read and check an ONNX file.

    Large weights are not read: those inside the file are views of the memory-mapped file, those in external data files
    ``onnx_ir.ExternalTensor``. Sparse initializers become dense ones.

    Parameters
    ----------
    path : str or os.PathLike
        An ONNX model in protobuf form, its external data beside it.

    Returns
    -------
    onnx_ir.Model
        Checked. It remembers its files, and :func:`graphprune.model.save` refuses to overwrite them.

    Raises
    ------
    ModelError
        One line that says what is wrong, where, and what to do: no such file, not ONNX, truncated, an invalid graph, a
        version or element type that onnx does not know, weights of a wrong size, external data that is missing, too
        short or outside the model's folder, a file of more than 2 GB.

    Warns
    -----
    ConversionWarning
        If the file has ``training_info``, which is dropped.
    """
    where = os.fspath(path)
    file = Path(path)
    try:
        if not file.exists():
            raise ModelError(f"{where}: no such file; check the path")
        if file.is_dir():
            raise ModelError(f"{where}: a directory; give the .onnx file in it")
        if not file.is_file():
            raise ModelError(f"{where}: not a regular file; save the model to disk first")
        size = file.stat().st_size
        if size == 0:
            raise ModelError(f"{where}: the file is empty; export or copy the model again")
        if size > MAXIMUM_MESSAGE:
            raise ModelError(
                f"{where}: {size / 1e9:.1f} GB in one file, and an ONNX file cannot exceed 2 GB; export it with"
                " external data (onnx.save(model, path, save_as_external_data=True))"
            )
        with file.open("rb") as stream:
            buffer: Buffer
            if size >= MAP_BYTES:
                buffer = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            else:
                buffer = stream.read()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ModelError(f"{where}: cannot be read: {one_line(error)}") from error
    model = parse(buffer, where, [file.absolute().parent, file.resolve().parent])
    model.meta[SOURCES] = (file.absolute(), *model.meta[SOURCES])
    return model


def parse(buffer: Buffer, where: str, folders: list[Path]) -> ir.Model:
    """Check and deserialize a ``ModelProto``; the weights remain views of ``buffer``.

    Parameters
    ----------
    buffer : bytes or mmap.mmap
        The serialized model.
    where : str
        The file or object, for messages.
    folders : list of Path
        Folders that external data may lie in; locations are relative to the first.

    Raises
    ------
    ModelError
        See :func:`load`.
    """
    import onnx
    import onnx_ir as ir

    for position, magic, reason in FOREIGN:
        if buffer[position : position + len(magic)] == magic:
            raise ModelError(f"{where}: not an ONNX file but {reason}")
    try:
        skeleton, lifted = lift(buffer)
        proto = onnx.ModelProto.FromString(skeleton)
    except WireError as error:
        if error.truncated and buffer[0] == 0x08:  # field 1, ir_version: every exporter writes it first
            raise ModelError(
                f"{where}: the file is truncated ({one_line(error)}); copy or export the model again"
            ) from error
        raise ModelError(
            f"{where}: not an ONNX file ({one_line(error)}); export the network to ONNX first"
        ) from error
    except Exception as error:  # protobuf's DecodeError is not the only one: its parsers differ
        raise ModelError(
            f"{where}: not an ONNX file ({one_line(error)}); export the network to ONNX first"
        ) from error
    with explained(where):
        _normalise(proto)
        if proto.training_info:
            text = f"{where}: its training_info (a training graph) is not kept: pruning would make it wrong"
            warnings.warn(text, ConversionWarning, stacklevel=4)
        make_dense(proto, where)
        found = check_model(proto, where, {part.ordinal: part.end - part.start for part in lifted})
        names = [tensor.name for tensor in proto.graph.initializer]
        model = ir.serde.deserialize_model(proto)
        _bind(model, buffer, [(names[part.ordinal], part) for part in lifted])
        model.meta.update({SOURCES: (), EXTERNAL: False})
        if found.is_external:
            bind_external(model, where, folders)
    return model


@contextmanager
def explained(where: str, action: str = "read") -> Iterator[None]:
    """Turn what onnx_ir, protobuf and numpy raise on a malformed model (many types, some bare) into ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # onnx_ir wraps the reason once for each object around the fault
            cause = cause.__cause__
        raise ModelError(f"{where}: cannot be {action}: {one_line(cause)}; export the model again") from error


def _normalise(proto: onnx.ModelProto) -> None:
    """Name the standard domain by the empty string, as nearly every exporter does, instead of ``ai.onnx``."""
    for owner in (proto, *proto.functions):
        domains = {opset.domain for opset in owner.opset_import}
        for opset in owner.opset_import:
            if opset.domain == "ai.onnx" and "" not in domains:
                opset.domain = ""


def _tensor(buffer: Any, offset: int, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """``tensor`` with its data taken from ``buffer`` at ``offset``: a view, not a copy."""
    import numpy as np
    import onnx_ir as ir

    shape = tensor.shape  # a new object each time: onnx_ir makes it from the message
    dims = shape.numpy()
    nbytes = nbytes_of(tensor.dtype, dims)
    assert nbytes is not None  # strings are never raw
    described: dict[str, Any] = {
        "name": tensor.name,
        "doc_string": tensor.doc_string,
        "metadata_props": dict(tensor.metadata_props),
    }
    raw = np.frombuffer(buffer, np.uint8, nbytes, offset)
    if tensor.dtype.bitwidth < 8:
        return ir.PackedTensor(raw, tensor.dtype, shape=dims, **described)
    array = raw.view(tensor.dtype.numpy().newbyteorder("<")).reshape(dims)
    return ir.Tensor(array, dtype=tensor.dtype, shape=cast(ir.Shape, shape), **described)


def _bind(model: ir.Model, buffer: Buffer, lifted: list[tuple[str, Lifted]]) -> None:
    """Give the initializers that were cut out their data back."""
    for name, part in lifted:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = _tensor(buffer, part.start, value.const_value)


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph and all subgraphs, those in functions too."""
    yield from model.graphs()
    for function in model.functions.values():
        yield from function.graph.subgraphs()


def bind_external(model: ir.Model, where: str, folders: list[Path] | None = None) -> None:
    """Check every external tensor and make it readable; record the files in ``model.meta``.

    Parameters
    ----------
    model : onnx_ir.Model
        Changed in place.
    where : str
        For messages.
    folders : list of Path, optional
        See :func:`graphprune.model.check.locate_external`; by default each tensor's own ``base_dir``.

    Raises
    ------
    ModelError
        If external data is missing, too short, of a wrong size or outside the folders.
    """
    import onnx_ir as ir

    sources: dict[Path, None] = {}

    def bound(tensor: ir.ExternalTensor, what: str, inline: bool) -> ir.TensorProtocol:
        base = folders if folders is not None else [Path(tensor.base_dir).absolute()]
        nbytes = nbytes_of(tensor.dtype, tensor.shape.numpy())
        assert nbytes is not None  # strings were refused
        location = os.fspath(tensor.location)
        region = locate_external(location, tensor.offset, tensor.length, nbytes, base, what, where)
        sources[region.path] = None
        if nbytes == 0:
            return _tensor(b"", 0, tensor)
        linked = (
            not region.path.resolve().is_relative_to(base[0].resolve()) or region.path.stat().st_nlink > 1
        )
        if inline or linked:
            # onnx_ir writes external attributes back as they are, and does not read files that are hard-linked (as
            # package and model caches keep them) or reached by a link out of the folder: map those here
            with region.path.open("rb") as stream:
                return _tensor(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), region.offset, tensor)
        tensor.base_dir = base[0]
        return tensor

    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = bound(value.const_value, f"initializer {value.name!r}", inline=False)
    for node in all_nodes(model):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                what = f"attribute {name!r} of {node.op_type} {node.name!r}"
                node.attributes[name] = ir.AttrTensor(
                    name, bound(attribute.value, what, inline=True), doc_string=attribute.doc_string
                )
    model.meta[SOURCES] = tuple(sources)
    model.meta[EXTERNAL] = bool(sources)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the main graph, its subgraphs and the functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.graph.all_nodes()
