"""Statistics of what contractions read, streamed over the calibration's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from graphprune.axes.labels import Labels
from graphprune.calibration import Array, Calibration
from graphprune.graph.evaluate import evaluate_constant
from graphprune.layers.contractions import Contraction, find_contraction
from graphprune.layers.execution import Piece, reads
from graphprune.network import Network

#: Samples that run through the network at once.
BATCH = 16
#: Statistics of so many bytes are gathered in one pass over the inputs; more take further passes.
MEMORY_LIMIT = 2 << 30
#: Rows that enter a Gram matrix, for each of its features: more would cost time and change little.
ROWS_PER_FEATURE = 40
#: Never fewer rows than this where there are as many.
LEAST_ROWS = 1 << 15

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reader:
    """A contraction of the analysed model, and which label each feature of its input bears.

    Attributes:
        contraction: The op.
        labels: int32 ``[g, features]`` for each labelling of its weight along the contracted axis; 0: no label.
    """

    contraction: Contraction
    labels: tuple[Labels, ...]

    @cached_property
    def matrices(self) -> Array:
        """The weight, float64 ``[g, features, outputs]``."""
        form = self.contraction.form
        weight = evaluate_constant(self.contraction.weight_tensor)
        return form.arrange(np.asarray(weight, dtype=np.float64)) * form.scale

    @property
    def size(self) -> tuple[int, int]:
        """Number of products, and of features of each."""
        groups, features = self.labels[0].shape
        return groups, features


def find_readers(network: Network) -> list[Reader]:
    """All contractions of the main graph that sum over a labelled axis, in the order of the graph."""
    found = []
    inside = set(network.model.graph)
    for op in network.analysis.graph.ops:
        contraction = find_contraction(op)
        if not isinstance(contraction, Contraction) or op.node not in inside:
            continue
        labels = tuple(_feature_labels(network, contraction))
        if labels:
            found.append(Reader(contraction, labels))
    return found


def _feature_labels(network: Network, contraction: Contraction) -> Iterator[Labels]:
    weight = contraction.weight_tensor
    for labels in network.analysis.labellings(weight):
        arranged = contraction.form.arrange(np.broadcast_to(labels, weight.shape or ()))
        if arranged.shape[2] and (arranged == arranged[:, :, :1]).all():
            rows = np.ascontiguousarray(arranged[:, :, 0])
            if rows.any():
                yield rows


class Accumulator(Protocol):
    """What rows of a contraction's input are added to."""

    def add(self, x: Array) -> None:
        """Add rows, float32 ``[n, features]``."""


Gathered = TypeVar("Gathered", bound=Accumulator)


def gather(
    network: Network,
    readers: Sequence[Reader],
    calibration: Calibration,
    make: Callable[[int], Gathered],
    size_of: Callable[[int], int],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[Reader, list[Gathered]]]:
    """Accumulate the rows that each reader sees in the unpruned network.

    Args:
        network: The analysed model.
        readers: Some of its readers.
        calibration: Inputs.
        make: Makes an accumulator for so many features.
        size_of: Bytes that such an accumulator takes.
        seed: For the choice of rows where there are more than a statistic needs.
        progress: Called with (batches done, batches in all).

    Yields:
        Each reader with one accumulator a product (conv group). They are made in passes over the inputs, so that
        what is held at a time stays below :data:`MEMORY_LIMIT`.
    """
    passes = list(_passes(readers, size_of))
    done, total = 0, len(passes) * -(-calibration.samples // (calibration.batch or BATCH))
    for chosen in passes:
        gathered = [[make(reader.size[1]) for _ in range(reader.size[0])] for reader in chosen]
        names = [_input_name(reader) for reader in chosen]
        piece = Piece(network.model, nodes_before(network.model, names), names)
        random = np.random.default_rng(seed)
        for feeds in calibration.batches(BATCH):
            if progress is not None:
                progress(done, total)
            held = {**feeds, **piece.run(feeds)}
            for reader, accumulators, name in zip(chosen, gathered, names, strict=True):
                rows = _rows(reader, held[name], total // len(passes), random)
                for accumulator, block in zip(accumulators, rows, strict=True):
                    accumulator.add(block)
            done += 1
        yield from zip(chosen, gathered, strict=True)
    if progress is not None:
        progress(total, total)


def _passes(readers: Sequence[Reader], size_of: Callable[[int], int]) -> Iterator[list[Reader]]:
    chosen: list[Reader] = []
    held = 0
    for reader in readers:
        size = reader.size[0] * size_of(reader.size[1])
        if chosen and held + size > MEMORY_LIMIT:
            yield chosen
            chosen, held = [], 0
        chosen.append(reader)
        held += size
    if chosen:
        yield chosen


def _input_name(reader: Reader) -> str:
    node = reader.contraction.op.node
    value = node.inputs[reader.contraction.activation] if node is not None else None
    return "" if value is None else value.name or ""


def nodes_before(model: ir.Model, names: Iterable[str]) -> list[ir.Node]:
    """The nodes that make some values, in order."""
    wanted = set(names)
    nodes = []
    for node in reversed(list(model.graph)):
        if any(output.name in wanted for output in node.outputs):
            nodes.append(node)
            wanted.update(value.name for value in reads(node) if value.name)
    return nodes[::-1]


def _rows(reader: Reader, x: Array, batches: int, random: np.random.Generator) -> Array:
    """Rows of one batch, float32 ``[g, n, features]``; a random choice where there are more than are of use."""
    form, weight = reader.contraction.form, reader.contraction.weight_tensor.shape or ()
    count = form.count(x.shape, weight)
    limit = -(-max(LEAST_ROWS, ROWS_PER_FEATURE * reader.size[1]) // max(batches, 1))
    positions = np.sort(random.choice(count, limit, replace=False)) if count > limit else None
    return form.rows(x, weight, positions)
