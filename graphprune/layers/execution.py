"""Running a model piece by piece in ONNX Runtime, on many batches, with its weights free to change in between.

Repair goes front to back: it changes a layer and needs the next layer's input as it is then. Running the whole network
for each layer would be quadratic in depth; here every node runs once. Between two pieces only what later nodes read
is kept, in memory up to a limit and on disk above.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from graphprune.calibration import Array
from graphprune.errors import ModelError, said
from graphprune.model.nodes import captured, stored_tensor, subgraphs
from graphprune.runtime import make_session

if TYPE_CHECKING:
    import onnxruntime

#: Arrays by value name.
Feeds: TypeAlias = dict[str, Array]

#: Activations of all batches are held in memory up to this many bytes.
MEMORY_LIMIT = 2 << 30


def reads(node: ir.Node) -> list[ir.Value]:
    """All values that a node reads, those that its subgraphs capture included."""
    return [value for value in node.inputs if value is not None] + (captured(node) if subgraphs(node) else [])


class Piece:
    """Some nodes of a model's main graph as a model of its own."""

    def __init__(
        self,
        model: ir.Model,
        nodes: Sequence[ir.Node],
        outputs: Iterable[str],
        free: Iterable[str] = (),
        shifted: Mapping[str, str] | None = None,
        scaled: Mapping[tuple[ir.Node, int], str] | None = None,
    ) -> None:
        """Cut a piece out.

        Args:
            model: The model; not changed. Its functions must have been inlined.
            nodes: Nodes of its main graph, in order.
            outputs: Names of values to return.
            free: Names of constants that are given anew with each run.
            shifted: Value -> name of a further input that is added to it.
            scaled: (node, slot) -> name of a further input that this operand is multiplied with.
        """
        self._model = model
        self._scaled = dict(scaled or {})
        free = set(free)
        self._shifted = dict(shifted or {})
        self._nodes = [node for node in nodes if not all(output.name in free for output in node.outputs)]
        nodes = self._nodes
        made = {output.name for node in nodes for output in node.outputs if output.name}
        self.outputs = [name for name in dict.fromkeys(outputs) if name in made]
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: list[str] = []
        for value in dict.fromkeys(value for node in nodes for value in reads(node)):
            name = value.name or ""
            if name in made or not name:
                continue
            if value.is_initializer() and name not in free:
                self.initializers[name] = value
            else:
                self.inputs.append(name)
        self.inputs += [*self._shifted.values(), *self._scaled.values()]
        self._session: onnxruntime.InferenceSession | None = None

    def _build(self, feeds: Mapping[str, Array]) -> onnx.ModelProto:
        inputs = [_input_info(name, feeds[name]) for name in self.inputs]
        graph = onnx.helper.make_graph(
            list(self._protos()),
            "piece",
            inputs,
            [onnx.ValueInfoProto(name=name) for name in self.outputs],
        )
        for name, value in self.initializers.items():
            if value.const_value is None:
                raise ModelError(f"initializer {name!r} has no contents")
            proto = ir.serde.serialize_tensor(_in_memory(value.const_value))
            proto.name = name
            graph.initializer.append(proto)
        opsets = [
            onnx.helper.make_opsetid(domain, version) for domain, version in self._model.opset_imports.items()
        ]
        return onnx.helper.make_model(
            graph, opset_imports=opsets, ir_version=max(self._model.ir_version or 8, 4)
        )

    def _protos(self) -> Iterator[onnx.NodeProto]:
        for node in self._nodes:
            proto = ir.serde.serialize_node(node)
            for slot in range(len(proto.input)):
                if (node, slot) in self._scaled:
                    name = self._scaled[node, slot]
                    yield onnx.helper.make_node("Mul", [proto.input[slot], name], [f"{name}/scaled"])
                    proto.input[slot] = f"{name}/scaled"
            additions = []
            for slot, name in enumerate(proto.output):
                if name in self._shifted:
                    proto.output[slot] = f"{name}/unshifted"
                    additions.append(
                        onnx.helper.make_node("Add", [f"{name}/unshifted", self._shifted[name]], [name])
                    )
            yield proto
            yield from additions

    def run(self, feeds: Mapping[str, Array]) -> Feeds:
        """Run on one batch.

        Args:
            feeds: At least the values in ``inputs``.

        Raises:
            ModelError: ONNX Runtime cannot run the piece.
        """
        if not self.outputs:
            return {}
        if self._session is None:
            self._session = make_session(self._build(feeds))
        arrays = {name: feeds[name] for name in self.inputs}
        try:
            results = self._session.run(self.outputs, arrays)
        except Exception:
            # Some of its own rewrites make ops that it then refuses to run (MatMulIntegerToFloat of per-axis scales).
            self._session = make_session(self._build(feeds), optimise=False)
            try:
                results = self._session.run(self.outputs, arrays)
            except Exception as error:
                raise ModelError(f"ONNX Runtime cannot run the model: {said(error)}") from error
        return dict(zip(self.outputs, results, strict=True))


def _in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """External tensors would be written as references that the piece could not follow."""
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def _input_info(name: str, value: Any) -> onnx.ValueInfoProto:
    """The declaration of an input that takes such values: tensors, and sequences of them, which are lists."""
    if isinstance(value, list) and value and all(isinstance(item, np.ndarray) for item in value):
        code = int(ir.DataType.from_numpy(value[0].dtype))
        return onnx.helper.make_tensor_sequence_value_info(name, code, None)
    if not isinstance(value, np.ndarray):
        raise ModelError(f"{name!r} is no tensor: the model cannot be run piece by piece there")
    return onnx.helper.make_tensor_value_info(name, int(ir.DataType.from_numpy(value.dtype)), None)


def _bytes_of(value: Any) -> int:
    """What a value takes in memory, as far as it consists of tensors."""
    if isinstance(value, list):
        return sum(map(_bytes_of, value))
    return value.nbytes if isinstance(value, np.ndarray) else 0


def constant_contents(model: ir.Model, value: ir.Value) -> Array:
    """What a value of the main graph holds that no input of the model influences, as the model is now.

    Raises:
        ModelError: The value depends on inputs, or cannot be computed.
    """
    stored = stored_tensor(value)
    if stored is not None:
        return np.asarray(stored.numpy())
    nodes: dict[ir.Node, None] = {}
    todo = [value]
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in nodes:
            nodes[node] = None
            todo += reads(node)
    ordered = [node for node in model.graph if node in nodes]
    return np.asarray(Piece(model, ordered, [value.name or ""]).run({})[value.name or ""])


class StagedRun:
    """A model on its way through all batches: every node before ``position`` has been run, on every batch.

    Use as a context manager: what lies on disk is removed at the end.
    """

    def __init__(self, model: ir.Model, batches: Iterable[Feeds], memory: int = MEMORY_LIMIT) -> None:
        """Start before the first node.

        Args:
            model: The model; nodes that have not been run yet may be changed, and weights.
            batches: Feeds of the model's inputs; read once.
            memory: Bytes of activations that may be held in memory.
        """
        self._model = model
        self._memory = memory
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0
        self._held = 0
        self.nodes = list(model.graph)
        self.index = {node: index for index, node in enumerate(self.nodes)}
        self.position = 0
        self._last = self._last_reads()
        self._batches: list[Feeds] = []
        for feeds in batches:
            wanted = {name: feeds[name] for name in self._last if name in feeds}
            self._batches.append(self._store(wanted))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __len__(self) -> int:
        return len(self._batches)

    def _last_reads(self) -> dict[str, int]:
        """For each value the last node that reads it; outputs of the graph are read behind the last."""
        last: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            for value in reads(node):
                if value.name:
                    last[value.name] = index
        for output in self._model.graph.outputs:
            if output.name:
                last[output.name] = len(self.nodes)
        return last

    def _store(self, arrays: Mapping[str, Array]) -> Feeds:
        stored: Feeds = {}
        for name, array in arrays.items():
            size = _bytes_of(array)
            self._held += size
            if self._held > self._memory and size > 1 << 16 and isinstance(array, np.ndarray):
                self._held -= size
                if self._folder is None:
                    self._folder = tempfile.TemporaryDirectory(prefix="graphprune-")
                self._files += 1
                path = Path(self._folder.name) / f"{self._files}.npy"
                np.save(path, array)
                stored[name] = np.load(path, mmap_mode="r")
            else:
                stored[name] = array
        return stored

    def _drop(self, feeds: Feeds, name: str) -> None:
        array = feeds.pop(name)
        if isinstance(array, np.memmap):
            path = array.filename
            del array
            if path is not None:
                Path(path).unlink(missing_ok=True)
        else:
            self._held -= _bytes_of(array)

    def advance(self, position: int, keep: Iterable[str] = ()) -> None:
        """Run all nodes before ``position`` that have not been run.

        Args:
            position: Index into ``nodes``.
            keep: Names of further values to hold until they are released: results of nodes that are run now, or
                values that are held already and would be dropped.
        """
        kept = set(keep)
        if position > self.position:
            nodes = self.nodes[self.position : position]
            wanted = [
                output.name
                for node in nodes
                for output in node.outputs
                if output.name and (self._last.get(output.name, -1) >= position or output.name in kept)
            ]
            piece = Piece(self._model, nodes, wanted)
            for feeds in self._batches:
                feeds.update(self._store(piece.run(feeds)))
                for name in [n for n in feeds if self._last.get(n, -1) < position and n not in kept]:
                    self._drop(feeds, name)
            self.position = position

    def batches(self) -> Iterator[Feeds]:
        """What is held of each batch."""
        yield from self._batches

    def release(self, name: str) -> None:
        """Drop a value that was kept, unless a later node reads it."""
        if self._last.get(name, -1) < self.position:
            for feeds in self._batches:
                if name in feeds:
                    self._drop(feeds, name)

    def rest(
        self,
        free: Iterable[str] = (),
        shifted: Mapping[str, str] | None = None,
        scaled: Mapping[tuple[ir.Node, int], str] | None = None,
    ) -> Piece:
        """All nodes that have not been run, up to the graph's outputs (see :class:`Piece`)."""
        outputs = [output.name for output in self._model.graph.outputs if output.name]
        return Piece(self._model, self.nodes[self.position :], outputs, free, shifted, scaled)
