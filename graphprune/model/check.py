"""What a model must satisfy before anything is computed from it: one clear line for everything that is wrong.

Sizes are checked against the bytes that are there before an array is made, so that a small file cannot claim
a huge amount of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, NamedTuple

from graphprune.errors import ModelError

if TYPE_CHECKING:
    import onnx

#: Ops that ONNX Runtime registers in the standard domain although ONNX does not define them there, or only in later
#: opsets. Its own optimizer and older exporters write them, so such a file is not a broken one.
RUNTIME_OPS = {
    "Affine",
    "Crop",
    "DynamicSlice",
    "GivenTensorFill",
    "ImageScaler",
    "LayerNormalization",
    "ParametricSoftplus",
    "Scale",
    "ScaledTanh",
    "SimplifiedLayerNormalization",
    "ThresholdedRelu",
}


def one_line(error: object) -> str:
    """The text of an exception without line breaks, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def bit_width(data_type: int) -> int | None:
    """Bits of one element; None for strings and for numbers that name no element type."""
    import onnx_ir as ir

    try:
        return ir.DataType(data_type).bitwidth
    except (TypeError, ValueError):
        return None


def nbytes_of(data_type: int, dims: Sequence[int]) -> int | None:
    """Bytes that a tensor takes packed; None for strings."""
    width = bit_width(data_type)
    return None if width is None else (math.prod(int(size) for size in dims) * width + 7) // 8


class Parts(NamedTuple):
    """All that a model is made of, subgraphs and functions included, gathered in one walk."""

    graphs: list[onnx.GraphProto]
    nodes: list[onnx.NodeProto]
    #: Tensors in attributes, with the attribute's name and the node.
    constants: list[tuple[onnx.TensorProto, str, onnx.NodeProto]]

    @property
    def is_external(self) -> bool:
        """Whether any tensor lies in external data."""
        tensors = [tensor for graph in self.graphs for tensor in graph.initializer]
        return any(
            tensor.data_location == 1 for tensor in [*tensors, *(constant[0] for constant in self.constants)]
        )


def parts(proto: onnx.ModelProto) -> Parts:
    """Walk through a model; outer graphs come before inner ones, and the main graph is first."""
    found = Parts([proto.graph], [], [])

    def visit(nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            found.nodes.append(node)
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    found.constants.append((attribute.t, attribute.name, node))
                found.constants.extend((tensor, attribute.name, node) for tensor in attribute.tensors)
                for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                    found.graphs.append(graph)
                    visit(graph.node)

    visit(proto.graph.node)
    for function in proto.functions:
        visit(function.node)
    return found


def check_model(proto: onnx.ModelProto, where: str, lifted: Mapping[int, int] | None = None) -> Parts:
    """Check versions, names, tensor sizes and structure.

    Parameters
    ----------
    proto : onnx.ModelProto
        Sparse initializers already made dense (``graphprune.model.sparse``).
    where : str
        The file or object, for messages.
    lifted : dict, optional
        Index of an initializer of the main graph to the number of bytes of its raw data, where that was cut out.

    Returns
    -------
    Parts
        What the model is made of.

    Raises
    ------
    ModelError
        The first thing that is wrong. Shapes and types recorded for intermediate values (``value_info``) are not looked
        at: exporters leave stale ones behind, and they are inferred again anyway.
    """
    import onnx

    if not proto.HasField("graph") or not proto.graph.node:
        raise ModelError(
            f"{where}: the graph has no nodes, so there is nothing to prune; is this the right file?"
        )
    _check_versions(proto, where)
    found = parts(proto)
    for graph in found.graphs:
        name = f"graph {graph.name!r}"
        _check_unique([t.name for t in graph.initializer], "initializer", name, where)
        _check_unique([v.name for v in graph.input], "input", name, where)
        for index, tensor in enumerate(graph.initializer):
            size = lifted.get(index) if lifted is not None and graph is proto.graph else None
            check_tensor(tensor, f"initializer {tensor.name!r}", where, size)
        for info in (*graph.input, *graph.output):
            kind = info.type.tensor_type
            if kind.HasField("elem_type") and not _is_known(kind.elem_type):
                raise ModelError(
                    f"{where}: input or output {info.name!r} of {name} has element type {kind.elem_type}, which onnx"
                    f" {onnx.__version__} does not know; export the model again, or upgrade onnx"
                )
    _check_unique([(f.domain, f.name, f.overload) for f in proto.functions], "function", "the model", where)
    _check_texts(proto, found, where)
    for tensor, name, node in found.constants:
        check_tensor(tensor, f"attribute {name!r} of {node.op_type} {node.name!r}", where)
    try:
        onnx.checker.check_model(_without_weights(proto))
    except onnx.checker.ValidationError as error:
        raise ModelError(
            f"{where}: not a valid ONNX graph: {one_line(error)}; export the model again"
        ) from error
    return found


def _check_versions(proto: onnx.ModelProto, where: str) -> None:
    import onnx

    upgrade = f"onnx {onnx.__version__} knows; upgrade onnx (and onnxruntime), or export with an older"
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{where}: IR version {proto.ir_version} is newer than version {onnx.IR_VERSION}, the latest {upgrade} one"
        )
    _check_unique([o.domain for o in proto.opset_import], "opset import", "the model", where)
    latest = {domain: versions[1] for domain, versions in onnx.defs.C.schema_version_map().items()}
    latest["ai.onnx"] = latest[""]
    for opset in proto.opset_import:
        if opset.version > latest.get(opset.domain, opset.version):
            raise ModelError(
                f"{where}: opset {opset.version} of domain {opset.domain or 'ai.onnx'!r} is newer than opset"
                f" {latest[opset.domain]}, the latest {upgrade} opset"
            )


def _check_texts(proto: onnx.ModelProto, found: Parts, where: str) -> None:
    """Refuse text that is not UTF-8: protobuf gives it out as bytes, and cannot write it again."""
    texts = [proto.producer_name, proto.producer_version, proto.domain, proto.doc_string]
    for graph in found.graphs:
        texts += [graph.name, graph.doc_string, *(tensor.name for tensor in graph.initializer)]
        for info in (*graph.input, *graph.output, *graph.value_info):
            texts += [info.name, info.doc_string, *(d.dim_param for d in info.type.tensor_type.shape.dim)]
    for node in found.nodes:
        texts += [node.name, node.op_type, node.domain, node.doc_string, *node.input, *node.output]
        texts += [attribute.name for attribute in node.attribute]
    for text in texts:
        if not isinstance(text, str):
            raise ModelError(
                f"{where}: the text {text!r} is not UTF-8; the file is damaged, export the model again"
            )


def _check_unique(names: Sequence[object], what: str, owner: str, where: str) -> None:
    if len(set(names)) == len(names):
        return
    seen: set[object] = set()
    for name in names:
        if name in seen:
            raise ModelError(f"{where}: {what} {name!r} occurs twice in {owner}; rename one of them")
        seen.add(name)


def _is_known(data_type: int) -> bool:
    """Whether a number names an element type."""
    import onnx

    return data_type != onnx.TensorProto.UNDEFINED and data_type in onnx.TensorProto.DataType.values()


def check_tensor(tensor: onnx.TensorProto, what: str, where: str, raw_bytes: int | None = None) -> None:
    """Check the element type and that a tensor's data has the size its dimensions ask for.

    Parameters
    ----------
    tensor : onnx.TensorProto
        External ones have their type and dimensions checked only: see :func:`locate_external`.
    what, where : str
        For messages.
    raw_bytes : int, optional
        Size of its raw data where that was cut out of the message.

    Raises
    ------
    ModelError
        Unknown element type, negative dimension, or data of another size.
    """
    import onnx

    if not _is_known(tensor.data_type):
        raise ModelError(
            f"{where}: {what} has element type {tensor.data_type}, which onnx {onnx.__version__} does not know;"
            " export the model again, or upgrade onnx"
        )
    dtype = onnx.TensorProto.DataType.Name(tensor.data_type)
    shape = f"{dtype}{list(tensor.dims)}"
    if any(size < 0 for size in tensor.dims):
        raise ModelError(f"{where}: {what} has a negative dimension, {shape}; export the model again")
    if tensor.HasField("segment"):
        raise ModelError(
            f"{where}: {what} is stored in segments, which ONNX has deprecated; export the model again"
        )
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if tensor.data_type == onnx.TensorProto.STRING:
            raise ModelError(
                f"{where}: {what} holds strings in external data, which ONNX forbids; save them inside"
            )
        for entry in tensor.external_data:
            if entry.key in ("offset", "length") and not entry.value.isdecimal():
                raise ModelError(
                    f"{where}: external data of {what} has the {entry.key} {entry.value!r}, which is no number of"
                    " bytes; export the model again"
                )
        return
    expected, unit = nbytes_of(tensor.data_type, tensor.dims), "bytes"
    if raw_bytes is not None or tensor.HasField("raw_data"):
        found = raw_bytes if raw_bytes is not None else len(tensor.raw_data)
        if expected is None:
            raise ModelError(
                f"{where}: {what} holds strings as raw data, which ONNX forbids; export it again"
            )
    else:
        found, expected, unit = _typed_values(tensor), _typed_length(tensor), "values"
    if found != expected:
        raise ModelError(
            f"{where}: {what}, {shape}, needs {expected} {unit} and holds {found}; the file is damaged, export it again"
        )


def _typed_values(tensor: onnx.TensorProto) -> int:
    """Number of entries in the typed field that belongs to the element type."""
    import onnx

    data = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    return len(getattr(tensor, data))


def _typed_length(tensor: onnx.TensorProto) -> int:
    """Number of entries its typed field must have: complex numbers take two, packed 4- and 2-bit types share one."""
    import onnx

    count = math.prod(int(size) for size in tensor.dims)
    if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        return 2 * count
    width = bit_width(tensor.data_type)
    return (count * width + 7) // 8 if width in (2, 4) else count


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for the structural checker: no tensor contents, no intermediate shapes, no ops private to ONNX Runtime."""
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    found = parts(bare)
    for graph in found.graphs:
        del graph.value_info[:]
        for tensor in graph.initializer:
            _empty(tensor)
        for info in (*graph.input, *graph.output):
            if info.type.HasField("tensor_type"):
                info.type.tensor_type.shape.SetInParent()  # unknown ranks: the checker objects, runtimes do not
    for tensor, _, _ in found.constants:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _empty(tensor)
    opsets = {o.domain: o.version for o in bare.opset_import}
    version = opsets.get("", opsets.get("ai.onnx", 1))
    private = False
    for node in found.nodes:
        if node.op_type in RUNTIME_OPS and node.domain in ("", "ai.onnx"):
            if not onnx.defs.has(node.op_type, version, ""):
                node.domain, private = "com.microsoft", True
    if private and "com.microsoft" not in opsets:
        bare.opset_import.add(domain="com.microsoft", version=1)
    return bare


def _empty(tensor: onnx.TensorProto) -> None:
    """Turn a tensor whose contents were checked elsewhere into a valid one without contents."""
    name, data_type = tensor.name, tensor.data_type
    tensor.Clear()
    tensor.name, tensor.data_type = name, data_type
    tensor.dims.append(0)


class Region(NamedTuple):
    """Where external data lies: a file that was checked, and a range inside it."""

    path: Path
    offset: int
    nbytes: int


def locate_external(
    location: str,
    offset: int | None,
    length: int | None,
    nbytes: int,
    folders: Sequence[Path],
    what: str,
    where: str,
) -> Region:
    """Check a reference to external data.

    Parameters
    ----------
    location : str
        Path relative to the model's folder.
    offset, length : int, optional
        As recorded; the offset is 0 and the length the tensor's where missing.
    nbytes : int
        Size of the tensor by its type and dimensions.
    folders : sequence of Path
        The model's folder first; then the real folder of the file where the model's path is a symbolic link (model
        caches keep both files in one folder of blobs and link to them).
    what, where : str
        For messages.

    Raises
    ------
    ModelError
        No file there, a path that leaves the folder (by ``..``, absolutely, or through a symbolic link), or a range
        that does not lie in the file or is not the tensor's size.
    """
    advice = "external data must lie in the model's folder; move it there and save the model again"
    if not location or "\0" in location:
        raise ModelError(f"{where}: {what} has external data without a location; export the model again")
    lexical = PureWindowsPath(location)  # understands both kinds of slash, and drives
    if lexical.drive or lexical.root:
        raise ModelError(
            f"{where}: {what} refers to external data by the absolute path {location!r}; {advice}"
        )
    path = folders[0] / location
    real = path.resolve()
    if ".." in lexical.parts or not any(real.is_relative_to(folder.resolve()) for folder in folders):
        raise ModelError(
            f"{where}: {what} refers to external data that leaves the folder: {location!r}; {advice}"
        )
    if not path.exists():
        raise ModelError(
            f"{where}: external data file {location!r} of {what} is missing in {str(folders[0])!r};"
            " copy it beside the model"
        )
    if not path.is_file():
        raise ModelError(f"{where}: external data {location!r} of {what} is not a file; {advice}")
    start, size = offset or 0, nbytes if length is None else length
    if size != nbytes:
        raise ModelError(
            f"{where}: external data of {what} has {size} bytes and its type and shape need {nbytes};"
            " the model file is damaged, export it again"
        )
    total = path.stat().st_size
    if start < 0 or start + size > total:
        raise ModelError(
            f"{where}: external data of {what} lies at bytes {start} to {start + size} of {location!r}, which has"
            f" {total}; the data file is truncated or belongs to another model: copy it again"
        )
    return Region(path, start, nbytes)
