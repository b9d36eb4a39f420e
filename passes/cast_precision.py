"""A float32 network that computes in float16 or bfloat16 where that is safe, verified against the original."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphprune.errors import VerificationError
from graphprune.graph.twin import build_twin
from graphprune.model import copy
from graphprune.model.inlining import inline
from graphprune.model.nodes import stored_tensor, subgraphs
from graphprune.precision.choice import MARK, Choice, Chooser, kind_of, title
from graphprune.precision.comparison import Comparison, Reference, lower
from graphprune.precision.formats import CONTRACTIONS, Format, find_format
from graphprune.progress import Progress, timed
from graphprune.verification.feeds import Feeds, random_feeds

if TYPE_CHECKING:
    from graphprune.calibration import Calibration
    from graphprune.graph import Graph

#: Samples that ranges are measured on, in batches of so many, and batches of them that outputs are compared on.
SAMPLES = 64
BATCH = 8
COMPARED = 2
#: Random inputs where there are no others.
RANDOM_BATCHES = 2
#: Nodes that go back to float32 at once when a bound is missed: so many at first, twice as many each time.
FIRST_TRIED = 1
#: Only those are tried that do at least this share of the harm that the worst one does.
LEAST_HARM = 0.2
#: Outputs named in a reason.
LISTED = 3


@dataclass(frozen=True)
class LoweredNode:
    """A node that computes in the low format."""

    node: str
    op: str


@dataclass(frozen=True)
class KeptNode:
    """A node that stays float32, and why."""

    node: str
    op: str
    reason: str


@dataclass
class PrecisionReport:
    """What casting did.

    Attributes:
        precision: ``fp16`` or ``bf16``.
        lowered: Nodes that compute in it.
        kept: Nodes with float32 operands that do not.
        casts: Cast nodes that were put in.
        weights: Constants that are stored in the low format; ``doubled`` of them in float32 too.
        bytes_before, bytes_after: What the constants take.
        max_error: How far each output is from the original's, relative to its greatest magnitude, where every low
            result is rounded (:mod:`graphprune.precision.emulation`); empty if not verified.
        runtime_error: The same as ONNX Runtime computes the model on the CPU; empty if it cannot.
        bounds: What each may be off.
        notes: Whatever the user should know.
        seconds: Wall time of each step.
    """

    precision: str
    lowered: list[LoweredNode] = field(default_factory=list)
    kept: list[KeptNode] = field(default_factory=list)
    casts: int = 0
    weights: int = 0
    doubled: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    max_error: dict[str, float] = field(default_factory=dict)
    runtime_error: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def contractions(self) -> tuple[int, int]:
        """Contractions that were lowered, and that were kept."""
        return (
            sum(node.op.rpartition("::")[2] in CONTRACTIONS for node in self.lowered),
            sum(kept.op.rpartition("::")[2] in CONTRACTIONS for kept in self.kept),
        )

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "precision": self.precision,
            "lowered": dict(Counter(node.op for node in self.lowered)),
            "kept": [vars(kept) for kept in self.kept],
            "casts": self.casts,
            "weights": self.weights,
            "doubled": self.doubled,
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "max_error": self.max_error,
            "runtime_error": self.runtime_error,
            "bounds": self.bounds,
            "notes": self.notes,
            "seconds": self.seconds,
        }


class CastPrecisionPass(ir.passes.InPlacePass):
    """Lets a network compute in float16 or bfloat16 where that is safe.

    Attributes:
        report: What the last call did; None before the first.

    Example:
        >>> import onnx_ir as ir
        >>> from onnx_ir.passes.common import ShapeInferencePass
        >>> pipeline = ir.passes.Sequential(CastPrecisionPass("fp16"), ShapeInferencePass())
    """

    def __init__(self, precision: str = "fp16", **options: Any) -> None:
        """Configure the pass.

        Args:
            precision: ``fp16`` or ``bf16``.
            **options: Further arguments of :func:`cast_precision`.
        """
        super().__init__()
        self.precision = precision
        self.options = options
        self.report: PrecisionReport | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cast ``model`` in place.

        Raises:
            GraphPruneError: See :func:`cast_precision`; the model is then as it was.
        """
        self.report = None
        self.report = cast_precision(model, self.precision, **self.options)
        return ir.passes.PassResult(model, modified=bool(self.report.lowered))


def cast_precision(
    model: ir.Model,
    precision: str,
    *,
    io: bool = False,
    calibration: Calibration | None = None,
    deny: Sequence[str] = (),
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> PrecisionReport:
    """Let a float32 network compute in a low format wherever that is safe, in place.

    A node is lowered if its schema allows the type at the model's opset, no table denies it
    (:data:`graphprune.precision.formats.DENIED`), its constants survive the rounding, nothing exact is computed from it
    (angles, coordinates, indices), its operands and results stay within half the format's range on the inputs, and a
    contraction in the low format is near. Weights are cast once, and streamed when they are written. Functions are
    inlined. What stays float32 exchanges values through one Cast a value.

    Args:
        model: Changed in place; as it was if anything is raised. Running it twice changes nothing more.
        precision: ``fp16`` or ``bf16``.
        io: Graph inputs and outputs become low too; otherwise they keep their types.
        calibration: Inputs that ranges and errors are measured on; random ones if None.
        deny: Globs on op types and names of nodes that stay float32.
        input_shapes: Sizes for inputs with dynamic dimensions, by input name.
        verify: Compare with the original. Where an output is off by more than its bound
            (:meth:`graphprune.precision.formats.Format.bound`), the nodes that do most harm stay float32.
        seed: For random inputs.
        progress: Called with what is being done.

    Returns:
        What was lowered, and what was not and why.

    Raises:
        OptionError: There is no such precision, or a glob matches nothing.
        ModelError: The model cannot be analysed.
        VerificationError: The result is invalid, or an output is off by more than its bound whatever stays float32.
    """
    return _Casting(model, find_format(precision), io, input_shapes, progress).run(
        calibration, deny, verify=verify, seed=seed
    )


@dataclass(frozen=True)
class _Attempt:
    """A choice, what it makes of the model, and how far that is off (:meth:`Comparison.wrong`)."""

    choice: Choice
    candidate: ir.Model
    bounds: Mapping[str, float]
    errors: dict[str, float]
    wrong: list[str]
    excused: list[str]

    @classmethod
    def of(
        cls,
        comparison: Comparison,
        reference: Reference,
        choice: Choice,
        bounds: Mapping[str, float],
    ) -> _Attempt:
        candidate, _ = comparison.lowered(choice)
        errors = comparison.errors(reference, candidate, bounds)
        return cls(choice, candidate, bounds, errors, *comparison.wrong(errors, bounds, choice))


class _Casting:
    """One model on its way to low precision."""

    def __init__(
        self,
        model: ir.Model,
        low: Format,
        io: bool,
        input_shapes: Mapping[str, Sequence[int]] | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.low, self.io = model, low, io
        self.input_shapes, self._progress = input_shapes, progress
        self.report = PrecisionReport(low.name)

    def _timed(self, step: str) -> AbstractContextManager[None]:
        return timed(self.report.seconds, step, self._progress)

    def run(
        self, calibration: Calibration | None, deny: Sequence[str], *, verify: bool, seed: int
    ) -> PrecisionReport:
        """Choose, verify on copies, and then change the model itself."""
        report = self.report
        report.bytes_before = _bytes(self.model)
        with self._timed("precision"):
            work = copy(self.model)
            _inline_all(work)
            twin = build_twin(work, self.input_shapes)
            chooser = Chooser(work, twin, self.low, io=self.io, deny=deny)
            choice = chooser.settle()
        measured: dict[ir.Node, str] = {}
        if choice.lowered:
            feeds = self._feeds(twin, calibration, seed)
            with Comparison(work, twin, chooser.types, self.low, choice, io=self.io) as comparison:
                choice = self._measured(comparison, chooser, choice, feeds, measured, verify)
        self._finish(work, chooser, choice, measured)
        return report

    def _feeds(self, twin: Graph, calibration: Calibration | None, seed: int) -> list[Feeds]:
        if calibration is not None:
            return list(calibration.subset(SAMPLES).batches(BATCH))
        self.report.notes.append(
            f"ranges were measured on random inputs: give real ones, or {self.low.title} may overflow on them"
        )
        return [random_feeds(twin, seed + turn) for turn in range(RANDOM_BATCHES)]

    # -- measuring --------------------------------------------------------------------------------------------------

    def _measured(
        self,
        comparison: Comparison,
        chooser: Chooser,
        choice: Choice,
        feeds: list[Feeds],
        measured: dict[ir.Node, str],
        verify: bool,
    ) -> Choice:
        """Keep what overflows, and what does harm; fills in ``measured`` with those nodes and why."""
        with self._timed("ranges"):
            wanted = _operands(choice)
            try:
                reference = comparison.run_original(feeds, wanted, COMPARED if verify else 0)
            except VerificationError as error:
                if verify:
                    raise
                self.report.notes.append(f"ranges were not measured: {error}")
                return choice
            unseen = sum(value not in reference.maxima for value in wanted)
            if unseen:
                self.report.notes.append(f"the ranges of {unseen} values in bodies could not be measured")
            measured.update(self._overflowing(choice, reference))
            choice = chooser.settle(measured)
        if verify and choice.lowered:
            with self._timed("verification"):
                choice = self._verified(comparison, chooser, choice, reference, measured)
        return choice

    def _overflowing(self, choice: Choice, reference: Reference) -> dict[ir.Node, str]:
        found = {}
        for node, operands in choice.lowered.items():
            values = [node.inputs[slot] for slot in operands.inputs]
            values += [node.outputs[slot] for slot in operands.outputs]
            tops = {value: reference.maxima.get(value, 0.0) for value in values if value is not None}
            value = max(tops, key=lambda each: tops[each], default=None)
            if value is not None and tops[value] > self.low.limit:
                found[node] = (
                    f"{value.name!r} reaches {tops[value]:.4g}, more than half the range of {self.low.title}"
                )
        return found

    def _verified(
        self,
        comparison: Comparison,
        chooser: Chooser,
        choice: Choice,
        reference: Reference,
        measured: dict[ir.Node, str],
    ) -> Choice:
        """Keep ever more of the nodes that do harm, until all outputs are within their bounds; of the last ones no more
        than it takes.
        """
        bounds = comparison.bounds(choice)  # what stays float32 does not make them tighter
        attempt = _Attempt.of(comparison, reference, choice, bounds)
        count = FIRST_TRIED
        while attempt.wrong:
            harm = comparison.harm(reference, attempt.choice, attempt.wrong)
            least = LEAST_HARM * max(harm.values(), default=0.0)
            harmful = [node for node, amount in harm.items() if amount >= least][:count]

            def keep(nodes: Sequence[ir.Node], before: _Attempt = attempt) -> dict[ir.Node, str]:
                off = ", ".join(repr(name) for name in before.wrong[:LISTED])
                reason = f"lowered, it leaves {off} off by more than the bound"
                return dict.fromkeys(_with_producers(nodes, before.choice), reason)

            choice = chooser.settle({**measured, **keep(harmful)})
            if not harmful or not choice.lowered:
                raise self._refusal(attempt)
            attempt = _Attempt.of(comparison, reference, choice, bounds)
            enough, few = len(harmful), 0
            while not attempt.wrong and enough - few > 1:
                half = (enough + few) // 2
                fewer = chooser.settle({**measured, **keep(harmful[:half])})
                trial = _Attempt.of(comparison, reference, fewer, bounds)
                if trial.wrong:
                    few = half
                else:
                    attempt, enough = trial, half
            measured.update(keep(harmful[:enough]))
            count = 2 * count
        choice, errors = attempt.choice, attempt.errors
        if attempt.excused:
            self.report.notes.append(
                f"{len(attempt.excused)} outputs lie behind ops whose result jumps (rounding, comparing, picking); what"
                " enters those was compared instead"
            )
        path = comparison.check(attempt.candidate)
        self.report.bounds, self.report.max_error = dict(bounds), errors
        self._run_file(comparison, choice, reference, path, bounds)
        return choice

    def _refusal(self, attempt: _Attempt) -> VerificationError:
        errors, bounds = attempt.errors, attempt.bounds
        worst = max(attempt.wrong, key=lambda name: errors[name] / bounds[name])
        return VerificationError(
            f"output {worst!r} in {self.low.title} is off by {errors[worst]:.2g} of its scale, where"
            f" {bounds[worst]:.2g} is allowed, and no choice of nodes that stay float32 mends it; use another"
            " precision, or keep float32"
        )

    def _run_file(
        self,
        comparison: Comparison,
        choice: Choice,
        reference: Reference,
        path: Path,
        bounds: Mapping[str, float],
    ) -> None:
        """Run what is written itself, where ONNX Runtime can."""
        names = {value.name for value in comparison.model.graph.outputs}
        try:
            errors = comparison.errors_of_file(
                reference, path, {name: bound for name, bound in bounds.items() if name in names}
            )
        except VerificationError as error:
            if self.low.dtype == ir.DataType.FLOAT16:
                raise
            emulated = max(self.report.max_error.values(), default=0.0)
            self.report.notes.append(
                f"{self.low.title} was verified in an emulation that rounds every low result (error"
                f" {emulated:.2g}); ONNX Runtime's CPU provider lacks kernels for the model itself"
                f" ({str(error).partition(';')[0]})"
            )
            return
        self.report.runtime_error = errors
        wrong, _ = comparison.wrong(errors, bounds, choice)
        if wrong:
            raise VerificationError(
                f"output {wrong[0]!r} in {self.low.title} as ONNX Runtime computes it is off by"
                f" {errors[wrong[0]]:.2g} of its scale, where {bounds[wrong[0]]:.2g} is allowed"
            )

    # -- the model itself -------------------------------------------------------------------------------------------

    def _finish(
        self, work: ir.Model, chooser: Chooser, choice: Choice, measured: Mapping[ir.Node, str]
    ) -> None:
        report = self.report
        report.lowered = [LoweredNode(title(node), kind_of(node)) for node in choice.lowered]
        report.kept = [KeptNode(title(node), kind_of(node), why) for node, why in choice.kept.items()]
        held = Counter(kept.reason for kept in report.kept if kept.op.rpartition("::")[2] in CONTRACTIONS)
        if held:
            report.notes.append(
                f"{held.total()} of {sum(report.contractions)} contractions stay float32, most of them because"
                f" {held.most_common(1)[0][0]}"
            )
        if choice.lowered:
            _inline_all(self.model)
            for node, other in zip(work.graph.all_nodes(), self.model.graph.all_nodes(), strict=True):
                if node in measured and node in choice.kept:
                    other.metadata_props[MARK] = measured[node]
            done = lower(work, self.model, choice, chooser.types, self.low, io=self.io)
            report.casts, report.weights, report.doubled = done.casts, done.weights, done.doubled
        report.bytes_after = _bytes(self.model)


def _inline_all(model: ir.Model) -> None:
    if model.functions:
        inline(model, {function.identifier() for function in model.functions.values()})


def _bytes(model: ir.Model) -> int:
    """What initializers and Constant nodes take."""
    values = [
        *(value for graph in model.graphs() for value in graph.initializers.values()),
        *(node.outputs[0] for node in model.graph.all_nodes() if kind_of(node) == "Constant"),
    ]
    return sum(tensor.nbytes for value in values if (tensor := stored_tensor(value)) is not None)


def _operands(choice: Choice) -> list[ir.Value]:
    """The activations that would be low."""
    found: dict[ir.Value, None] = {}
    for node, operands in choice.lowered.items():
        values = [node.inputs[slot] for slot in operands.inputs]
        values += [node.outputs[slot] for slot in operands.outputs]
        found.update((value, None) for value in values if value is not None and not value.is_initializer())
    return [value for value in found if not _is_constant_node(value)]


def _is_constant_node(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and kind_of(node) == "Constant"


def _with_producers(nodes: Sequence[ir.Node], choice: Choice) -> list[ir.Node]:
    """Nodes, what is inside them, and what makes their operands: those must not be rounded either."""
    found: dict[ir.Node, None] = {}
    for node in nodes:
        inside = [node] if node in choice.lowered else _bodies(node)
        for each in inside:
            found[each] = None
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and value is not None and choice.is_low(value):
                found[producer] = None
    return list(found)


def _bodies(node: ir.Node) -> list[ir.Node]:
    return [inner for graph in subgraphs(node) for inner in graph.all_nodes()]
