"""The kinds of object that a model may be given as, and the way back to the same kind."""

from __future__ import annotations

import copy as copies
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import ModelError, OptionError
from graphprune.model.check import check_model, one_line, parts
from graphprune.model.read import (
    EXTERNAL,
    SOURCES,
    ConversionWarning,
    all_graphs,
    bind_external,
    explained,
    load,
    parse,
)
from graphprune.model.write import bare_proto, drop_initializer_info

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

ACCEPTED = "a path, an onnx.ModelProto, an onnx_ir.Model or an onnx_graphsurgeon.Graph"


def as_ir(model: object) -> tuple[ir.Model, Callable[[ir.Model], Any]]:
    """An independent, checked ``onnx_ir.Model``, and the function that turns a result into the kind that was given.

    Parameters
    ----------
    model : path, onnx.ModelProto, onnx_ir.Model or onnx_graphsurgeon.Graph
        Never changed. Weights are shared, not copied, where the kind allows it: they are treated as immutable.

    Returns
    -------
    model : onnx_ir.Model
        Shares no graph, node or value with the argument.
    same_kind : callable
        ``onnx_ir.Model`` to an object of the argument's kind; a path gives an ``onnx_ir.Model``.

    Raises
    ------
    OptionError
        For any other kind of object, or a graphsurgeon Graph where that package cannot be imported.
    ModelError
        If the model is invalid: see :func:`graphprune.model.load`.

    Warns
    -----
    ConversionWarning
        If the conversion from or to graphsurgeon loses something.
    """
    if isinstance(model, (str, os.PathLike)):
        return load(os.fspath(model)), _identity
    if type(model).__module__.partition(".")[0] == "onnx_graphsurgeon":
        return _import_warning(model), _export_warning
    import onnx
    import onnx_ir as ir

    if isinstance(model, onnx.ModelProto):
        return _from_proto(model, "the ModelProto"), to_proto
    if isinstance(model, ir.Model):
        duplicate = copy(model)
        with explained("the onnx_ir.Model"):
            check_model(bare_proto(duplicate), "the onnx_ir.Model")
            bind_external(duplicate, "the onnx_ir.Model")
        duplicate.meta[SOURCES] = (*model.meta.get(SOURCES, ()), *duplicate.meta[SOURCES])
        duplicate.meta[EXTERNAL] = duplicate.meta[EXTERNAL] or bool(model.meta.get(EXTERNAL))
        return duplicate, _identity
    raise OptionError(f"a model of type {type(model).__name__} is not supported; give {ACCEPTED}")


def _identity(model: ir.Model) -> ir.Model:
    return model


def _from_proto(proto: onnx.ModelProto, where: str) -> ir.Model:
    try:
        # one copy, which the weights of the result are views of
        serialized = proto.SerializeToString()
    except Exception as error:  # protobuf: ValueError or EncodeError above 2 GB, by version
        raise ModelError(
            f"{where}: cannot be serialized ({one_line(error)}); above 2 GB save it with external data and give"
            " the path"
        ) from error
    return parse(serialized, where, [Path.cwd()])


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Serialize a model in memory; external tensors stay references to their files."""
    import onnx_ir as ir

    proto = ir.serde.serialize_model(model)
    drop_initializer_info(proto)
    return proto


def copy(model: ir.Model) -> ir.Model:
    """A copy of graphs, nodes, values, types and metadata that shares the weights' data.

    Unlike ``model.clone()`` it also copies ``model.meta``, the types of values (``value.dtype = x`` changes a type in
    place) and the objects that bear a tensor's name (serializing a renamed initializer renames its tensor).

    Raises
    ------
    ModelError
        If the graph is not in topological order.
    """
    try:
        duplicate = model.clone(deep_copy=False)
    except Exception as error:  # onnx_ir wraps what went wrong in RuntimeErrors with a traceback of its own
        raise ModelError(
            f"the onnx_ir.Model cannot be copied: {one_line(error)}; its nodes must be in topological order"
        ) from error
    duplicate.meta.update(model.meta)
    for graph in [*all_graphs(duplicate), *(function.graph for function in duplicate.functions.values())]:
        for value in [
            *graph.inputs,
            *graph.initializers.values(),
            *(o for node in graph for o in node.outputs),
        ]:
            value.type = _copy_type(value.type)
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _renamable(value.const_value)
    return duplicate


def _copy_type(kind: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    """A copy of a type; those of tensors, nearly all, without the cost of deepcopy."""
    import onnx_ir as ir

    if type(kind) is ir.TensorType:
        return ir.TensorType(kind.dtype, denotation=kind.denotation)
    return copies.deepcopy(kind)


def _renamable(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same contents under an object whose name can change without the original's."""
    import onnx_ir as ir

    if isinstance(tensor, ir.ExternalTensor):
        # a mapping of its own: it can be released while the other is read
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=tensor.base_dir,
        )
    if not isinstance(tensor, ir.serde.TensorProtoTensor):
        return copies.copy(tensor)
    # its name is the proto's: wrap it, contents still read from the original
    return ir.LazyTensor(
        lambda: tensor,
        tensor.dtype,
        ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def to_graphsurgeon(model: object) -> tuple[Any, list[str]]:
    """A model as a graphsurgeon Graph, and what of it such a Graph cannot hold.

    Parameters
    ----------
    model : path, onnx.ModelProto, onnx_ir.Model or onnx_graphsurgeon.Graph
        Never changed.

    Returns
    -------
    graph : onnx_graphsurgeon.Graph
        Weights of external files are read: a Graph does not know where those lie.
    losses : list of str
        What the Graph lacks; empty if it holds all of the model.

    Raises
    ------
    OptionError
        For any other kind of object, or where graphsurgeon cannot be imported.
    ModelError
        If the model is invalid: see :func:`graphprune.model.load`.
    """
    import onnx_ir as ir

    _graphsurgeon()  # said before the work
    source, _ = as_ir(model)
    for graph in all_graphs(source):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.Tensor(
                    value.const_value.numpy().copy(), dtype=value.const_value.dtype, name=value.name
                )
    return _to_graphsurgeon(source)


def from_graphsurgeon(graph: object) -> tuple[ir.Model, list[str]]:
    """A graphsurgeon Graph as an ``onnx_ir.Model``, and what the way there changed.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        Never changed.

    Returns
    -------
    model : onnx_ir.Model
        An independent, checked model.
    losses : list of str
        What is different; empty if nothing is.

    Raises
    ------
    OptionError
        If it is no Graph, or graphsurgeon cannot be imported.
    ModelError
        If the Graph makes no valid model.
    """
    gs = _graphsurgeon()
    if not isinstance(graph, gs.Graph):
        raise OptionError(f"an object of type {type(graph).__name__} is no onnx_graphsurgeon.Graph")
    return _from_graphsurgeon(graph)


def _from_graphsurgeon(graph: Any) -> tuple[ir.Model, list[str]]:
    """Export a graphsurgeon Graph; its outer-scope constants are not repeated in subgraphs."""
    import onnx

    gs = _graphsurgeon()
    domains = None if graph.import_domains is None else list(graph.import_domains)
    with explained("the graphsurgeon Graph"):
        duplicate = graph.copy()  # exporting renames tensors and extends the list of domains in place
        duplicate.import_domains = domains
        duplicate.producer_name, duplicate.producer_version = graph.producer_name, graph.producer_version
        proto = gs.export_onnx(duplicate)
        tensors = graph.tensors()
        lost = [
            f"element type {onnx.helper.tensor_dtype_to_string(tensor.data_type)} of {tensor.name!r}, which was"
            f" {tensors[tensor.name].dtype}"
            for tensor in proto.graph.initializer
            if _changed(tensors[tensor.name].dtype, tensor.data_type)
        ]
        _share_outer(proto.graph.node, {tensor.name for tensor in proto.graph.initializer})
    return _from_proto(proto, "the graphsurgeon Graph"), lost


def _to_graphsurgeon(model: ir.Model) -> tuple[Any, list[str]]:
    """Import into graphsurgeon, which has no place for some of what ONNX models hold."""
    gs = _graphsurgeon()
    proto = to_proto(model)
    lacks = _graphsurgeon_lacks(proto)
    with explained("the result"):
        return gs.import_onnx(proto), lacks


def _import_warning(graph: Any) -> ir.Model:
    model, losses = _from_graphsurgeon(graph)
    _warn("exporting the graphsurgeon Graph changed", losses)
    return model


def _export_warning(model: ir.Model) -> Any:
    graph, losses = _to_graphsurgeon(model)
    _warn("graphsurgeon Graphs cannot hold, and the result lacks,", losses)
    return graph


def _graphsurgeon_lacks(proto: onnx.ModelProto) -> list[str]:
    """What of ``proto`` has no field in graphsurgeon's classes (0.6.1: ``importers/onnx_importer.py``)."""
    import onnx

    kinds = onnx.AttributeProto
    known = {
        kinds.FLOAT,
        kinds.INT,
        kinds.STRING,
        kinds.TENSOR,
        kinds.GRAPH,
        kinds.FLOATS,
        kinds.INTS,
        kinds.STRINGS,
    }
    graphs, nodes, _ = parts(proto)
    infos = [info for graph in graphs for info in (*graph.input, *graph.output, *graph.value_info)]
    lacks = {
        "the model's metadata_props": proto.metadata_props,
        "the model's doc_string": proto.doc_string,
        "the model's domain and version": proto.domain or proto.model_version,
        "quantization annotations": any(graph.quantization_annotation for graph in graphs),
        "metadata_props of the graph": any(graph.metadata_props for graph in graphs),
        "doc strings and metadata_props of nodes": any(
            node.doc_string or node.metadata_props for node in nodes
        ),
        "doc strings and metadata_props of values": any(
            info.doc_string or info.metadata_props for info in infos
        ),
        "attributes that are lists of graphs or tensors, or types": any(
            attribute.type not in known for node in nodes for attribute in node.attribute
        ),
        "overloads of functions": any(function.overload for function in proto.functions),
    }
    return [name for name, present in lacks.items() if present]


def _changed(dtype: Any, data_type: int) -> bool:
    """Whether exporting gave a tensor another element type; graphsurgeon keeps types numpy lacks as their number."""
    import onnx

    if isinstance(dtype, int):
        return dtype != data_type
    return bool(onnx.helper.tensor_dtype_to_np_dtype(data_type) != dtype)


def _share_outer(nodes: Any, outer: set[str]) -> None:
    """Remove the copies of outer constants that graphsurgeon writes into subgraphs: the names are visible there."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                own = [tensor for tensor in attribute.g.initializer if tensor.name not in outer]
                del attribute.g.initializer[:]
                attribute.g.initializer.extend(own)
                _share_outer(attribute.g.node, outer | {tensor.name for tensor in own})


def _graphsurgeon() -> Any:
    try:
        import onnx_graphsurgeon
    except ImportError as error:
        raise OptionError(
            f"onnx_graphsurgeon cannot be imported ({one_line(error)}); install graphprune[graphsurgeon]"
        ) from error
    return onnx_graphsurgeon


def _warn(what: str, items: list[str]) -> None:
    if items:
        warnings.warn(f"{what} {'; '.join(items)}", ConversionWarning, stacklevel=4)
