"""Sparse initializers and constants, which onnx_ir would drop silently, made dense."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from graphprune.errors import ModelError
from graphprune.model.check import check_tensor, nbytes_of, parts

if TYPE_CHECKING:
    import onnx

#: They are made dense up to this many bytes in all.
DENSE_LIMIT = 256 * 2**20


def make_dense(proto: onnx.ModelProto, where: str) -> None:
    """Replace, in place, sparse initializers and sparse constants by dense ones: onnx_ir would drop them silently.

    Raises
    ------
    ModelError
        If they are malformed, or take more than ``DENSE_LIMIT`` bytes in all.
    """
    import onnx

    left = DENSE_LIMIT
    found = parts(proto)
    for graph in found.graphs:
        for sparse in graph.sparse_initializer:
            dense = _densify(sparse, f"sparse initializer {sparse.values.name!r}", where, left)
            left -= len(dense.raw_data)
            graph.initializer.append(dense)
        del graph.sparse_initializer[:]
    for node in found.nodes:
        for attribute in node.attribute:
            if not attribute.HasField("sparse_tensor") and not attribute.sparse_tensors:
                continue
            if node.op_type != "Constant" or attribute.name != "sparse_value":
                raise ModelError(
                    f"{where}: {node.op_type} {node.name!r} has a sparse attribute; make it dense"
                )
            dense = _densify(attribute.sparse_tensor, f"sparse constant {node.name!r}", where, left)
            left -= len(dense.raw_data)
            attribute.ClearField("sparse_tensor")
            attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
            attribute.t.CopyFrom(dense)


def _densify(sparse: onnx.SparseTensorProto, what: str, where: str, limit: int) -> onnx.TensorProto:
    import numpy as np
    import onnx

    for part, name in ((sparse.values, "values"), (sparse.indices, "indices")):
        check_tensor(part, f"{name} of {what}", where)
        if part.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(
                f"{where}: {what} keeps its {name} in external data; save it as a dense initializer"
            )
    if any(size < 0 for size in sparse.dims):
        raise ModelError(f"{where}: {what} has a negative dimension, {list(sparse.dims)}; save it as dense")
    nbytes = nbytes_of(sparse.values.data_type, sparse.dims)
    if nbytes is None or nbytes > limit:
        raise ModelError(
            f"{where}: {what} of shape {list(sparse.dims)} takes {nbytes or 0} bytes when dense, more than the"
            f" {limit} that are left of {DENSE_LIMIT}; save it as a dense initializer"
        )
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    rank, count = len(sparse.dims), math.prod(sparse.dims)
    if (
        indices.dtype != np.int64
        or values.ndim != 1
        or indices.shape not in ((values.size,), (values.size, rank))
    ):
        raise ModelError(
            f"{where}: {what} has indices of {indices.dtype}{indices.shape} for {values.shape} values;"
            " save it as dense"
        )
    bounds = np.asarray(sparse.dims if indices.ndim == 2 else [count])
    if ((indices < 0) | (indices >= bounds)).any():
        raise ModelError(
            f"{where}: {what} has an index outside its shape {list(sparse.dims)}; save it as dense"
        )
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 2:
        dense[tuple(indices.T)] = values
    else:
        dense.reshape(-1)[indices] = values
    return onnx.numpy_helper.from_array(dense, sparse.values.name)
