"""The cast network against the original: how far outputs are off, what they may be off, and which nodes do the harm."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphprune.graph import Graph
from graphprune.model import copy, save
from graphprune.model.nodes import captured, is_constant_value, subgraphs
from graphprune.model.stream import release_all
from graphprune.precision.choice import Choice, all_nodes, kind_of
from graphprune.precision.emulation import emulate
from graphprune.precision.formats import MOVEMENT, Format
from graphprune.precision.lowering import Done, Lowering
from graphprune.precision.ranges import MAXIMA, add_probes
from graphprune.precision.typing import Types
from graphprune.verification.difference import difference
from graphprune.verification.faults import DISCONTINUOUS
from graphprune.verification.feeds import Feeds
from graphprune.verification.runs import check_valid, open_session, run_session

#: Rounds of a body that count when roundings in a row are counted; most bodies are short, and contract their errors.
_STEPS = 16
_REAL = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass
class Reference:
    """What the original does.

    Attributes:
        feeds: The inputs, batch by batch.
        outputs: What comes out, for the first batches; and float values that enter jumps, by name.
        maxima: Greatest finite magnitude of float32 values on all batches.
    """

    feeds: list[Feeds]
    outputs: list[dict[str, Any]]
    maxima: dict[ir.Value, float] = field(default_factory=dict)


class Comparison:
    """Runs of an original and of what is made of it, in files of their own."""

    def __init__(
        self, model: ir.Model, twin: Graph, types: Types, low: Format, choice: Choice, *, io: bool
    ) -> None:
        """Prepare.

        Args:
            model: The original, without functions; not changed.
            twin: Its twin.
            types: Element types of its values.
            low: The format.
            choice: The most that will be lowered.
            io: Inputs and outputs become low too.
        """
        self.model, self._twin, self.types, self.low, self._io = model, twin, types, low, io
        self._folder = tempfile.TemporaryDirectory(prefix="graphprune-")
        behind, entering = self._jumps(choice)
        #: What enters jumps, where an output lies behind one.
        self.entering = entering if any(output in behind for output in model.graph.outputs) else []

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def path(self, name: str) -> Path:
        """A file that lives as long as the comparison."""
        return Path(self._folder.name) / name

    # -- the original -----------------------------------------------------------------------------------------------

    def run_original(self, feeds: Sequence[Feeds], wanted: Collection[ir.Value], compared: int) -> Reference:
        """Run the original, its ranges measured.

        Args:
            feeds: All batches.
            wanted: Values to measure.
            compared: Batches of which outputs are kept.

        Raises:
            VerificationError: ONNX Runtime cannot load or run it.
        """
        probed = copy(self.model)
        values = dict(zip(values_of(self.model), values_of(probed), strict=True))
        back = {new: old for old, new in values.items()}
        filled = {t.value for t in self._twin.tensors if t.shape is not None and 0 not in t.shape}
        for value in self.entering:
            probed.graph.outputs.append(values[value])
        order = add_probes(
            probed,
            [values[value] for value in wanted],
            [values[value] for value in filled if value is not None and value in values],
        )
        path = self.path("original.onnx")
        _write(probed, path)
        reference = Reference([], [])
        with open_session(path, "the original") as session:
            for index, feed in enumerate(feeds):
                results = run_session(session, feed, "the original")
                maxima = results.pop(MAXIMA, np.zeros(0))
                for probe, found in zip(order, maxima, strict=True):
                    value = back[probe]
                    reference.maxima[value] = max(reference.maxima.get(value, 0.0), float(found))
                if index < compared:
                    reference.feeds.append(feed)
                    reference.outputs.append(results)
        return reference

    # -- what is made of it -----------------------------------------------------------------------------------------

    def lowered(self, choice: Choice) -> tuple[ir.Model, Done]:
        """A copy of the original that computes by a choice."""
        candidate = copy(self.model)
        done = lower(self.model, candidate, choice, self.types, self.low, io=self._io)
        return candidate, done

    def check(self, candidate: ir.Model) -> Path:
        """Write what is made of the original; ONNX's checker accepts it.

        Raises:
            VerificationError: It does not.
        """
        path = self.path(f"{self.low.name}.onnx")
        save(candidate, path)
        check_valid(path, self.model, f"the model in {self.low.title}")
        return path

    def errors(
        self, reference: Reference, candidate: ir.Model, bounds: Mapping[str, float]
    ) -> dict[str, float]:
        """How far each output of the emulation is off, relative to its greatest magnitude, on all batches.

        Args:
            reference: Of the original.
            candidate: What was made of it; not changed.
            bounds: What is compared, and what it may be off.
        """
        emulated = copy(candidate)
        self._expose(emulated, [value.name or "" for value in self.entering])
        emulate(emulated, self.low.dtype)
        path = self.path("emulated.onnx")
        save(emulated, path)
        return self._run(reference, path, "the emulation", bounds)

    def errors_of_file(
        self, reference: Reference, path: Path, bounds: Mapping[str, float]
    ) -> dict[str, float]:
        """The same for the model that was written, as ONNX Runtime computes it."""
        return self._run(reference, path, f"the model in {self.low.title}", bounds)

    @staticmethod
    def _expose(model: ir.Model, names: Collection[str]) -> None:
        wanted = set(names)
        present = {value.name for value in model.graph.outputs}
        for node in model.graph:
            model.graph.outputs.extend(
                value for value in node.outputs if value.name in wanted and value.name not in present
            )

    def _run(
        self, reference: Reference, path: Path, what: str, bounds: Mapping[str, float]
    ) -> dict[str, float]:
        errors: dict[str, float] = {}
        with open_session(path, what) as session:
            for feeds, expected in zip(reference.feeds, reference.outputs, strict=True):
                found = run_session(session, self._as_taken(session, feeds), what)
                for name in bounds:
                    if name in expected and name in found:
                        error = difference(expected[name], found[name])
                        errors[name] = max(errors.get(name, 0.0), error)
        return errors

    @staticmethod
    def _as_taken(session: Any, feeds: Feeds) -> Feeds:
        """Feeds of the types that the session's inputs are of."""
        kinds = {value.name: value.type for value in session.get_inputs()}
        with np.errstate(over="ignore"):
            return {
                name: array.astype(np.float16)
                if kinds.get(name) == "tensor(float16)" and array.dtype == np.float32
                else array
                for name, array in feeds.items()
            }

    # -- bounds -----------------------------------------------------------------------------------------------------

    def bounds(self, choice: Choice) -> dict[str, float]:
        """What each output, and each float value that enters a jump, may be off."""
        depth = depths(self.model, choice)
        compared = [*self.model.graph.outputs, *self.entering]
        return {value.name or "": self.low.bound(depth.get(value, 0) + 1) for value in compared}

    def wrong(
        self, errors: Mapping[str, float], bounds: Mapping[str, float], choice: Choice
    ) -> tuple[list[str], list[str]]:
        """What is off by more than it may be.

        Args:
            errors: How far outputs and values that enter jumps are off.
            bounds: What each may be off.
            choice: What is lowered.

        Returns:
            What is wrong; and outputs that are off, but lie behind a jump (a comparison, a choice of the largest) that
            what was rounded leads to: they are right if all floats that enter jumps are.
        """
        behind, entering = self._jumps(choice)
        off = [name for name in errors if not errors[name] <= bounds[name]]
        jumped = {value.name for value in self.model.graph.outputs if value in behind}
        direct = {value.name for value in self.model.graph.outputs} - jumped
        excused = [name for name in off if name in jumped]
        at_jumps = {value.name for value in entering} if excused else set()
        wrong = [name for name in off if name in direct or name in at_jumps]
        return wrong, excused

    def _jumps(self, choice: Choice) -> tuple[set[ir.Value], list[ir.Value]]:
        """Values of the main graph behind jumps that something rounded enters; and the floats that enter them first."""
        rounded: set[ir.Value] = set()
        if self._io:
            rounded.update(value for value in self.model.graph.inputs if _is_activation(value, self.types))
        behind: set[ir.Value] = set()
        entering: dict[ir.Value, None] = {}
        for node in self.model.graph:
            inside = [node, *(n for g in subgraphs(node) for n in g.all_nodes())]
            reads = [value for value in (*node.inputs, *captured(node)) if value is not None]
            lowered = any(each in choice.lowered for each in inside)
            touched = lowered or any(value in rounded for value in reads)
            if touched and any(_jumps(each, self.types) for each in inside):
                behind.update(node.outputs)
                entering.update(
                    (value, None)
                    for value in reads
                    if _is_activation(value, self.types)
                    and value not in behind
                    and value.producer() is not None
                    and not value.is_graph_output()
                )
            if any(value in behind for value in reads):
                behind.update(node.outputs)
            if touched:
                rounded.update(node.outputs)
        return behind, list(entering)

    # -- who does the harm ------------------------------------------------------------------------------------------

    def harm(self, reference: Reference, choice: Choice, wrong: Collection[str]) -> dict[ir.Node, float]:
        """By how much the results of nodes are further off than what they read, relative to their scales.

        All float32 values of the first batch are held.

        Args:
            reference: Of the original.
            choice: What is lowered.
            wrong: Outputs, or values that enter jumps, that are off by too much.

        Returns:
            The nodes of the main graph that compute in the low format, or whose bodies do, and that lead to what is
            wrong; the most harmful first.
        """
        candidate, _ = self.lowered(choice)
        values = [
            value
            for node in self.model.graph
            for value in node.outputs
            if value.name and self.types.get(value) == ir.DataType.FLOAT
        ]
        names = [value.name or "" for value in values]
        exposed = copy(self.model)
        self._expose(exposed, names)
        _write(exposed, self.path("exposed.onnx"))
        self._expose(candidate, names)
        emulate(candidate, self.low.dtype)
        save(candidate, self.path("emulated.onnx"))
        feeds = reference.feeds[0]
        with open_session(self.path("exposed.onnx"), "the original") as session:
            expected = run_session(session, feeds, "the original")
        with open_session(self.path("emulated.onnx"), "the emulation") as session:
            found = run_session(session, feeds, "the emulation")
        off = {
            value: difference(expected[value.name], found[value.name])
            for value in values
            if value.name in expected and value.name in found
        }
        leading = _leading_to(self.model, wrong)
        harm: dict[ir.Node, float] = {}
        for node in self.model.graph:
            inside = [node, *(n for g in subgraphs(node) for n in g.all_nodes())]
            if node not in leading or not any(each in choice.lowered for each in inside):
                continue
            reads = [value for value in (*node.inputs, *captured(node)) if value is not None]
            before = max((off.get(value, 0.0) for value in reads), default=0.0)
            after = max((off.get(value, 0.0) for value in node.outputs), default=0.0)
            if after > before:
                harm[node] = after - before if np.isfinite(after) else np.inf
        return dict(sorted(harm.items(), key=lambda item: -item[1]))


def _write(model: ir.Model, path: Path) -> None:
    """Write a model, and let go of the files that it was read from."""
    save(model, path)
    release_all(model)


def values_of(model: ir.Model) -> Iterator[ir.Value]:
    """All values of a model without functions, in an order that its copies share."""
    for graph in model.graphs():
        yield from graph.inputs
        yield from (value for value in graph.initializers.values() if not value.is_graph_input())
        for node in graph:
            yield from node.outputs


def lower(source: ir.Model, target: ir.Model, choice: Choice, types: Types, low: Format, *, io: bool) -> Done:
    """Lower ``target``, a copy of ``source`` or itself, by a choice made on ``source``."""
    nodes = dict(zip(all_nodes(source), all_nodes(target), strict=True))
    values = dict(zip(values_of(source), values_of(target), strict=True))
    moved = Choice(
        {nodes[node]: operands for node, operands in choice.lowered.items()},
        {nodes[node]: reason for node, reason in choice.kept.items()},
    )
    return Lowering(target, moved, {values[v]: t for v, t in types.items() if v in values}, low, io=io).run()


def depths(model: ir.Model, choice: Choice) -> dict[ir.Value, int]:
    """Roundings in a row that lead to each value of the main graph."""
    found: dict[ir.Value, int] = {}

    def walk(graph: ir.Graph) -> None:
        for node in graph:
            reads = [value for value in (*node.inputs, *captured(node)) if value is not None]
            depth = max((found.get(value, 0) for value in reads), default=0)
            if node in choice.lowered and kind_of(node) not in MOVEMENT:
                depth += 1
            for body in subgraphs(node):
                # what the body starts from has the depth of what the node reads
                for value in body.inputs:
                    found[value] = depth
                walk(body)
                inner = max((found.get(value, 0) for value in body.outputs), default=0)
                steps = _STEPS if kind_of(node) in ("Loop", "Scan") else 1
                depth = max(depth, depth + steps * max(inner - depth, 0))
            for value in node.outputs:
                found[value] = depth

    walk(model.graph)
    return found


# -- jumps ----------------------------------------------------------------------------------------------------------


def _jumps(node: ir.Node, types: Types) -> bool:
    """True if small changes of a float that the node reads may change its result a lot."""
    if node.op_type not in DISCONTINUOUS or node.op_type == "Where":
        return False
    if kind_of(node) == "Cast" and node.attributes["to"].as_int() in _REAL:
        return False
    return any(_is_activation(value, types) for value in node.inputs)


def _is_activation(value: ir.Value | None, types: Types) -> bool:
    return value is not None and types.get(value) == ir.DataType.FLOAT and not is_constant_value(value)


def _leading_to(model: ir.Model, names: Collection[str]) -> set[ir.Node]:
    """The nodes of the main graph that some values depend on."""
    todo = [value for node in model.graph for value in node.outputs if value.name in set(names)]
    found: set[ir.Node] = set()
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            todo += [value for value in (*node.inputs, *captured(node)) if value is not None]
    return found
