"""Stored weights in another floating-point type, converted when they are read: never held beside their source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from graphprune.model.stream import STRETCH_BYTES, Array, element_type, reading, release, stretches

#: Weights of at least this many elements are converted when they are read.
LAZY_FROM = 1 << 16


def cast_array(array: Array, dtype: ir.DataType) -> Array:
    """An array in another type, rounded to nearest, ties to even; what is beyond the range becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.dtype(dtype.numpy()))


def cast_tensor(source: ir.TensorProtocol, dtype: ir.DataType, name: str | None) -> ir.TensorProtocol:
    """A stored tensor in another type; at once if it is small."""
    if source.size < LAZY_FROM:
        return ir.Tensor(cast_array(source.numpy(), dtype), dtype=dtype, name=name)
    return CastTensor(source, dtype, name)


class CastTensor(ir.LazyTensor):
    """A tensor that is another in another floating-point type, worked out stretch by stretch when it is written."""

    def __init__(self, source: ir.TensorProtocol, dtype: ir.DataType, name: str | None = None) -> None:
        """State what it is made of.

        Args:
            source: Of any type whose elements take whole bytes.
            dtype: The new element type.
            name: The new name; the source's if None.
        """
        super().__init__(
            self._whole,
            dtype,
            ir.Shape(tuple(source.shape.numpy())),
            name=source.name if name is None else name,
            doc_string=source.doc_string,
            metadata_props=dict(source.metadata_props),
        )
        self._source = source

    def _whole(self) -> ir.Tensor[Any]:
        made = np.empty(self.size, np.dtype(self.dtype.numpy()))
        start = 0
        for part in contents(self._source):
            made[start : start + len(part)] = cast_array(part, self.dtype)
            start += len(part)
        release(self._source)
        return ir.Tensor(made.reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)

    def chunks(self) -> Iterator[memoryview]:
        """The tensor's bytes, in stretches."""
        for part in contents(self._source):
            yield cast_array(part, self.dtype).view(np.uint8).data
        release(self._source)


def contents(tensor: ir.TensorProtocol) -> Iterator[Array]:
    """A tensor's elements in stretches, flat; each is good until the next is asked for."""
    dtype = element_type(tensor)
    chunks = getattr(tensor, "chunks", None)
    if chunks is not None:
        for chunk in chunks():
            yield np.frombuffer(chunk, dtype)
        return
    length = STRETCH_BYTES // dtype.itemsize
    buffer = np.empty(min(length, tensor.size), dtype)
    with reading(tensor) as read:
        for start, stop in stretches(tensor.size, length):
            read(start, buffer[: stop - start])
            yield buffer[: stop - start]


def greatest(tensor: ir.TensorProtocol) -> float:
    """The greatest finite magnitude among a tensor's elements; 0 if there is none."""
    found = 0.0
    for part in contents(tensor):
        magnitudes = np.abs(part.astype(np.float32, copy=False))
        top = float(magnitudes.max(initial=0.0))
        if not np.isfinite(top):
            top = float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))
        found = max(found, top)
    release(tensor)
    return found
