"""Stored tensors read in stretches, and tensors that are worked out stretch by stretch when they are written.

External data are read with plain reads into one buffer rather than mapped: a page fault costs more than the copy of its
page, and mapped pages count as memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.errors import ModelError

Array: TypeAlias = npt.NDArray[Any]
#: Reads some of a tensor's elements, from a position on, into an array.
Read = Callable[[int, Array], None]
#: Bytes worked on at a time: enough that the interpreter's share of the time is small.
STRETCH_BYTES = 1 << 22
#: Threads that read and work while another writes.
THREADS = 2


def element_type(tensor: ir.TensorProtocol) -> np.dtype[Any]:
    """NumPy's dtype of a tensor's elements, one element an item."""
    return np.dtype(tensor.dtype.numpy())


@contextmanager
def reading(tensor: ir.TensorProtocol) -> Iterator[Read]:
    """Read a stored tensor's elements in any order, from any thread.

    Args:
        tensor: Of a type whose elements take whole bytes.

    Yields:
        A function of (position of the first element, array to fill).
    """
    if not isinstance(tensor, ir.ExternalTensor):
        flat = tensor.numpy().reshape(-1)

        def copy(start: int, out: Array) -> None:
            np.copyto(out, flat[start : start + len(out)])

        yield copy
        return
    path, width = Path(tensor.path), element_type(tensor).itemsize
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    try:

        def read(start: int, out: Array) -> None:
            view = out.view(np.uint8).data
            position = (tensor.offset or 0) + start * width
            while view:
                got = os.preadv(descriptor, [view], position)
                if not got:
                    raise ModelError(f"{path}: ends within tensor {tensor.name!r}")
                view, position = view[got:], position + got

        yield read
    finally:
        os.close(descriptor)


def stretches(size: int, elements: int) -> Iterator[tuple[int, int]]:
    """Cut ``size`` elements into (start, stop) of so many."""
    for start in range(0, size, elements):
        yield start, min(start + elements, size)


class StreamedTensor(ir.LazyTensor):
    """A tensor that is made of another, stretch by stretch: it is never held as a whole when it is written."""

    def __init__(
        self,
        source: ir.TensorProtocol,
        parts: Sequence[tuple[int, int]],
        change: Callable[[int, int, Array], None],
    ) -> None:
        """State how it is made.

        Args:
            source: What it is made of, of the same type and shape.
            parts: (start, stop) of its stretches, in order.
            change: Given (start, stop, elements), changes the elements in place; called from several threads.
        """
        super().__init__(
            self._whole,
            source.dtype,
            ir.Shape(tuple(source.shape.numpy())),
            name=source.name,
            doc_string=source.doc_string,
            metadata_props=dict(source.metadata_props),
        )
        self._source, self._parts, self._change = source, parts, change

    def _whole(self) -> ir.Tensor[Any]:
        made = np.empty(self.size, element_type(self._source))
        with reading(self._source) as read:
            for start, stop in self._parts:
                read(start, made[start:stop])
                self._change(start, stop, made[start:stop])
        return ir.Tensor(made.reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)

    def chunks(self) -> Iterator[memoryview]:
        """The tensor's bytes, in stretches; each view is good until the next is asked for."""
        longest = max((stop - start for start, stop in self._parts), default=0)
        free = [np.empty(longest, element_type(self._source)) for _ in range(THREADS + 1)]
        waiting: deque[tuple[Future[Array], Array]] = deque()
        with reading(self._source) as read, ThreadPoolExecutor(THREADS) as pool:

            def make(start: int, stop: int, buffer: Array) -> Array:
                part = buffer[: stop - start]
                read(start, part)
                self._change(start, stop, part)
                return part

            for start, stop in self._parts:
                if not free:
                    made, buffer = waiting.popleft()
                    yield made.result().view(np.uint8).data
                    free.append(buffer)
                buffer = free.pop()
                waiting.append((pool.submit(make, start, stop, buffer), buffer))
            for made, _ in waiting:
                yield made.result().view(np.uint8).data


def release(tensor: ir.TensorProtocol) -> None:
    """Let go of a mapped file: its pages count as memory while they are mapped."""
    if isinstance(tensor, ir.ExternalTensor):
        with suppress(BufferError):  # somebody looks at the contents
            tensor.release()


def release_all(model: ir.Model) -> None:
    """Let go of every mapped file that the model's initializers are read from."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                release(value.const_value)
