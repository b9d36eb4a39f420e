"""Proof: what a written file holds, against what it was made from. Files are read, not what is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from graphprune.errors import VerificationError
from graphprune.kernels.nm import most_nonzero
from graphprune.model.nodes import stored_tensor
from graphprune.model.read import all_graphs, all_nodes
from graphprune.model.stream import STRETCH_BYTES, THREADS, element_type, reading, stretches
from graphprune.sparsity.masks import mask_of
from graphprune.sparsity.pattern import NM, Layout, Pattern

#: What holds a tensor, and the tensor.
Stored: TypeAlias = tuple[ir.Value, ir.TensorProtocol]


def compare(name: str, source: ir.TensorProtocol, found: ir.TensorProtocol, *, zeroed: bool = False) -> None:
    """A written tensor is what it was made from, to the bit.

    Args:
        name: For messages.
        source, found: What it was made from, and what the file holds.
        zeroed: Elements may have become zero.

    Raises:
        VerificationError: Something else is different.
    """
    if source.dtype != found.dtype or tuple(source.shape.numpy()) != tuple(found.shape.numpy()):
        raise VerificationError(f"tensor {name!r} was written with another type or shape")
    if source.dtype == ir.DataType.STRING or source.dtype.bitwidth < 8:
        if source.tobytes() != found.tobytes():
            raise VerificationError(f"tensor {name!r} was to stay as it was, and was written otherwise")
        return
    dtype = element_type(source)
    unit = np.dtype(f"u{dtype.itemsize}") if dtype.itemsize <= 8 else np.dtype("u8")
    step = max(STRETCH_BYTES // dtype.itemsize, 1)
    before, after = np.empty(min(step, source.size), dtype), np.empty(min(step, source.size), dtype)
    with reading(source) as read_source, reading(found) as read_found:
        for start, stop in stretches(source.size, step):
            old, new = before[: stop - start], after[: stop - start]
            read_source(start, old)
            read_found(start, new)
            if zeroed:
                # As integers: an element that is kept keeps its bits, one that is not is +0.
                differs = np.not_equal(new.view(unit), old.view(unit))
                np.logical_and(differs, new.view(unit), out=differs)
                place = start + int(differs.argmax()) if differs.any() else None
            else:
                place = None if np.array_equal(new.view(unit), old.view(unit)) else start
            if place is not None:
                wanted = "itself nor zero" if zeroed else "what it was"
                raise VerificationError(f"element {place} of tensor {name!r} was not written as {wanted}")


def check_holds(name: str, tensor: ir.TensorProtocol, layout: Layout, pattern: Pattern) -> None:
    """A weight holds its pattern.

    Raises:
        VerificationError: A group of M has more than N units that are not zero, or too few elements are zero.
    """
    if isinstance(pattern, NM) and pattern.block == (1, 1):
        most = most_held(tensor, layout, pattern.m)
        if most > pattern.n:
            raise VerificationError(
                f"weight {name!r} was to be {pattern}, and has {most} nonzeros in a group"
            )
        return
    array = tensor.numpy().reshape(layout.shape)
    if (array[~mask_of(array, pattern, layout)] != 0).any():
        raise VerificationError(f"weight {name!r} was to be {pattern}, and is not")


def most_held(tensor: ir.TensorProtocol, layout: Layout, m: int) -> int:
    """The largest number of nonzeros in any full group of ``m`` along a stored weight's contracted axis."""
    most = 0
    with reading(tensor) as read:
        dtype = element_type(tensor)
        for start, stop in layout.stretches(m, STRETCH_BYTES // dtype.itemsize):
            part = np.empty(stop - start, dtype)
            read(start, part)
            most = max(most, most_nonzero(part.reshape(layout.view(start, stop)), m))
            if most == m:
                break
    return most


def stored_tensors(model: ir.Model) -> Iterator[Stored]:
    """All initializers and constants, in the order in which files hold them."""
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
    for node in all_nodes(model):
        tensor = stored_tensor(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is not None:
            yield node.outputs[0], tensor


def check_file(
    written: ir.Model,
    model: ir.Model,
    sources: Mapping[ir.Value, ir.TensorProtocol],
    masked: Mapping[ir.Value, Layout],
    fitted: Mapping[ir.Value, Layout],
    pattern: Pattern,
) -> None:
    """A file holds the model, with nothing changed but elements of the chosen weights that became zero.

    Args:
        written: The file, read again.
        model: What was written.
        sources: What the chosen weights were.
        masked: Weights that only lost elements.
        fitted: Weights whose other elements were fitted to data; only their pattern is checked.
        pattern: What they all hold.

    Raises:
        VerificationError: Something else changed, or a pattern does not hold.
    """
    stored, read = list(stored_tensors(model)), list(stored_tensors(written))
    if len(stored) != len(read):
        raise VerificationError(f"the file holds {len(read)} tensors where {len(stored)} were written")

    def check(item: tuple[Stored, Stored]) -> None:
        (value, tensor), (twin, found) = item
        name = value.name or ""
        if value.name != twin.name:
            raise VerificationError(f"tensor {name!r} was written under the name {twin.name!r}")
        if value in masked:
            compare(name, sources[value], found, zeroed=True)
        else:
            compare(name, tensor, found)
        layout = masked.get(value) or fitted.get(value)
        if layout is not None:
            check_holds(name, found, layout, pattern)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(check, zip(stored, read, strict=True)):
            pass  # raises what was found first in the order of the file
