"""Repair: refit what reads a cut so that the pruned network answers as the original did, without training.

Front to back, each contraction behind a cut gets the weights that map the *pruned* network's inputs to the *original*
network's outputs with the least squared error, bias included. Where its result is added to a residual stream, the
shift that the stream has already is part of what it has to make good.

Nothing but weights and biases changes: what was verified before the repair, the shape of the network, stays verified.
Sources: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.1.2 (multi-branch
compensation in 3.2); Frantar & Alistarh, Optimal Brain Compression, NeurIPS 2022 (ridge toward what is there).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from graphprune.calibration import Array, Calibration
from graphprune.graph import Op, Tensor
from graphprune.kernels.box import Mask, compact
from graphprune.kernels.gram import GramAccumulator
from graphprune.kernels.refit import matched_variance, refit, training_error
from graphprune.layers.contractions import Contraction, find_contraction
from graphprune.layers.execution import Feeds, StagedRun
from graphprune.layers.weights import LayerWeights, Place, attributes_now, node_of, trimmed
from graphprune.network import Pruned

#: Samples that run through the network at once.
BATCH = 64
#: Rows that a refit sees, for each of its unknowns: more would cost time and change little.
ROWS_PER_FEATURE = 40
#: Never fewer rows than this where there are as many.
LEAST_ROWS = 1 << 15
#: Weight of the ridge toward the sliced weights, relative to the mean diagonal of the Gram matrix.
DAMPING = 1e-3
#: A stream's shift is not charged to channels that are scaled by less than this part of the largest scale.
LEAST_SCALE = 1e-3


@dataclass
class Refitted:
    """What the repair did to one contraction.

    Attributes:
        name: The node's name.
        before, after: Squared error of its output relative to the variance of the original's, on the calibration; None
            where nothing was measured.
    """

    name: str
    before: float | None
    after: float | None


@dataclass
class RepairReport:
    """What a repair did.

    Attributes:
        refitted: Contractions in the order of the graph.
        skipped: (node, reason) of contractions that read a cut and were left as they were.
    """

    refitted: list[Refitted] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "refitted": [
                {"node": each.name, "error_before": each.before, "error_after": each.after}
                for each in self.refitted
            ],
            "skipped": [{"node": name, "reason": reason} for name, reason in self.skipped],
        }


@dataclass(frozen=True)
class Sum:
    """A sum of a contraction's result (scaled) and another activation: a residual connection.

    Attributes:
        op: The Add.
        slot: Slot of the other activation.
        scale: What the result is multiplied with on its way, broadcasting against it.
    """

    op: Op
    slot: int
    scale: Array


class Cuts(Protocol):
    """What is left of each tensor: :class:`graphprune.plan.Masks`, or that nothing was cut."""

    def parts(self, tensor: Tensor) -> list[Mask]:
        """What is kept, one array for each labelling that loses something."""

    def mask(self, tensor: Tensor) -> Mask | None:
        """What is kept; None where all is."""

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of what is kept."""


@dataclass(frozen=True)
class Pair:
    """A changed model beside its original; functions inlined in both.

    Attributes:
        original, model: The two.
        ops: The twin's ops; their nodes are those of ``model``.
        node_of: The original's node for each op.
        masks: What ``model`` has left of each tensor.
    """

    original: ir.Model
    model: ir.Model
    ops: Sequence[Op]
    node_of: dict[Op, ir.Node]
    masks: Cuts

    @classmethod
    def of(cls, pruned: Pruned) -> Pair:
        """A pruned model beside what it was made from."""
        ops = pruned.network.analysis.graph.ops
        return cls(pruned.original, pruned.model, ops, pruned.node_of, pruned.masks)


@dataclass
class Layer:
    """A contraction whose turn has come, as a matrix product for each conv group.

    Attributes:
        contraction: The op.
        weight: What it is multiplied with now, as the op reads it.
        matrices: The same, float64 ``[g, features, outputs]``, times the form's scale.
        biases: float64 ``[g, outputs]``, zeros where there is no bias.
        place: Where a bias goes; None: there is no place for one.
        grams: Statistics, of each group, of its inputs in the changed model and of what it is to make of them.
    """

    contraction: Contraction
    weight: Array
    matrices: Array
    biases: Array
    place: Place | None
    grams: list[GramAccumulator]

    @property
    def intercept(self) -> bool:
        """True if the bias may change."""
        return self.place is not None

    def error(self, matrices: Array, biases: Array) -> float:
        """Squared error of other weights, relative to the variance of what is wanted."""
        parts = zip(self.grams, matrices, biases, strict=True)
        error = sum(float(np.sum(training_error(gram, matrix, bias))) for gram, matrix, bias in parts)
        variance = sum(float(np.sum(gram.yy - gram.y**2 / max(gram.count, 1))) for gram in self.grams)
        return error / (variance or 1.0)

    def restored(self, matrices: Array) -> Array:
        """Matrices as the op reads them, in the weight's shape; float64."""
        form = self.contraction.form
        return form.restore(matrices / form.scale, self.weight.shape)


class FrontToBack(ABC):
    """Gives contractions of a model new weights, in the order of the graph.

    When a contraction's turn comes, those before it have theirs already: it sees its inputs as they will be. What it is
    to make of them is what the original made, and what its residual stream lacks.
    """

    def __init__(
        self,
        pair: Pair,
        calibration: Calibration,
        *,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            pair: The model and its original.
            calibration: Inputs; labels are not needed.
            seed: For the choice of rows.
            progress: Called with (contractions done, contractions in all).
        """
        self.pair = pair
        self.masks = pair.masks
        self.weights = LayerWeights(pair)
        self._calibration = calibration
        self._random = np.random.default_rng(seed)
        self._progress = progress or (lambda done, total: None)

    @abstractmethod
    def wants(self, op: Op) -> bool:
        """True if an op is to get a new weight."""

    @abstractmethod
    def solve(self, layer: Layer) -> None:
        """Find the weights of a layer and write them."""

    @abstractmethod
    def skip(self, op: Op, reason: str) -> None:
        """Called with a contraction that was wanted, once it is known that it cannot be had."""

    def run(self) -> None:
        """Solve front to back."""
        batches = list(self._calibration.batches(BATCH))
        with (
            StagedRun(self.pair.model, batches) as now,
            StagedRun(self.pair.original, batches) as before,
        ):
            todo = sorted(self._contractions(now, before), key=lambda item: now.index[node_of(item[0])])
            for number, (contraction, original) in enumerate(todo):
                self._progress(number, len(todo))
                self._next(contraction, original, now, before)
            self._progress(len(todo), len(todo))

    # -- what is solved -------------------------------------------------------------------------------------------

    def _contractions(self, now: StagedRun, before: StagedRun) -> Iterator[tuple[Contraction, ir.Node]]:
        """Contractions to solve, with the original's node."""
        for op in self.pair.ops:
            if not self.wants(op):
                continue
            found = find_contraction(op, attributes_now(op))
            if found is None:
                continue
            reason = found if isinstance(found, str) else self._obstacle(found, now, before)
            if reason is None and isinstance(found, Contraction):
                yield found, self.pair.node_of[op]
            else:
                self.skip(op, reason or "")

    def _obstacle(self, contraction: Contraction, now: StagedRun, before: StagedRun) -> str | None:
        """Why a contraction cannot be solved; None if it can."""
        op = contraction.op
        node, original = op.node, self.pair.node_of.get(op)
        if node not in now.index or original not in before.index:
            return "it lies in a subgraph"
        value = node.inputs[contraction.weight] if node is not None else None
        if value is None or len(list(value.uses())) > 1:
            return "its weight is shared with another layer"
        bias = contraction.bias_tensor
        if bias is not None and not _is_along_outputs(bias):
            return "its bias is no constant vector"
        if contraction.bias is None and any(op.inputs[2:]):
            return "it adds a constant that is no bias"
        return None

    # -- one layer --------------------------------------------------------------------------------------------------

    def _next(self, contraction: Contraction, original: ir.Node, now: StagedRun, before: StagedRun) -> None:
        node = node_of(contraction)
        x_name, y_name = _name(node.inputs[contraction.activation]), _name(original.outputs[0])
        now.advance(now.index[node])
        before.advance(before.index[original] + 1, keep=[y_name])
        weight = self.weights.constant(contraction.op, contraction.weight)
        form = contraction.form
        matrices = form.arrange(weight).astype(np.float64) * form.scale
        residual = self._sum_behind(contraction, now, before)
        grams = self._statistics(
            contraction, x_name, y_name, weight.shape, matrices.shape, residual, now, before
        )
        before.release(y_name)
        if grams is None:
            self.skip(contraction.op, "its activations do not line up with the original's")
            return
        bias, place = self.weights.bias(contraction)
        biases = np.zeros(matrices.shape[::2]) if bias is None else bias.reshape(matrices.shape[::2])
        self.solve(Layer(contraction, weight, matrices, biases, place, grams))

    def _statistics(
        self,
        contraction: Contraction,
        x_name: str,
        y_name: str,
        weight_shape: tuple[int, ...],
        size: tuple[int, ...],
        residual: Sum | None,
        now: StagedRun,
        before: StagedRun,
    ) -> list[GramAccumulator] | None:
        form = contraction.form
        grams = [GramAccumulator(size[1], size[2]) for _ in range(size[0])]
        mask = self.masks.mask(contraction.output)
        limit = max(LEAST_ROWS, ROWS_PER_FEATURE * size[1])
        per_batch = -(-limit // max(len(now), 1))
        for pruned_batch, original_batch in zip(now.batches(), before.batches(), strict=True):
            x, y = pruned_batch[x_name], self._compacted(original_batch[y_name], mask)
            if y is None:
                return None
            if residual is not None:
                y = y + self._lacks(residual, pruned_batch, original_batch, y)
            count = form.count(x.shape, weight_shape)
            positions = None
            if count > per_batch:
                positions = np.sort(self._random.choice(count, per_batch, replace=False))
            rows, results = form.rows(x, weight_shape, positions), form.results(y, positions)
            if rows.shape[:2] != results.shape[:2] or rows.shape[::2] != size[:2]:
                return None
            for gram, row, result in zip(grams, rows, results, strict=True):
                gram.add(row, np.asarray(result, dtype=np.float32))
        return grams

    @staticmethod
    def _compacted(array: Array, mask: Array | None) -> Array | None:
        if mask is None:
            return array
        if any(m not in (1, s) for m, s in zip(mask.shape, array.shape, strict=True)):
            return None
        return compact(array, mask)

    # -- residual streams -------------------------------------------------------------------------------------------

    def _sum_behind(self, contraction: Contraction, now: StagedRun, before: StagedRun) -> Sum | None:
        """The residual connection that a contraction's result enters, where the stream is known by now."""
        scale: Array = np.ones((), dtype=np.float32)
        tensor = contraction.output
        while len(tensor.uses) == 1 and not tensor.is_output:
            op, slot = tensor.uses[0]
            if op.kind == "BatchNormalization" and slot == 0 and not op.attributes.get("training_mode", 0):
                scale = scale * self._normalisation_scale(op, len(tensor.shape or ()))
            elif op.kind in ("Add", "Mul", "Sum") and len(op.inputs) == 2:
                other = op.inputs[1 - slot]
                if other is None:
                    return None
                if other.constant:
                    scale = scale * self.weights.constant(op, 1 - slot) if op.kind == "Mul" else scale
                elif op.kind == "Mul" or other.shape != tensor.shape:
                    return None
                else:
                    made = Sum(op, 1 - slot, np.asarray(scale, dtype=np.float32))
                    return made if self._is_known(made, now, before) else None
            elif op.kind != "Identity":
                return None
            following = op.outputs[0]
            if following is None:
                return None
            tensor = following
        return None

    def _normalisation_scale(self, op: Op, rank: int) -> Array:
        scale, variance = (self.weights.constant(op, slot) for slot in (1, 4))
        factor = scale / np.sqrt(variance + float(op.attributes.get("epsilon", 1e-5)))
        return np.asarray(factor).reshape(1, -1, *(1,) * (rank - 2))

    def _is_known(self, made: Sum, now: StagedRun, before: StagedRun) -> bool:
        names = self._stream_names(made)
        runs = (now, before)
        return all(name in next(iter(run.batches()), {}) for name, run in zip(names, runs, strict=True))

    def _stream_names(self, made: Sum) -> tuple[str, str]:
        """The other activation's name in the pruned model and in the original."""
        node = made.op.node
        original = self.pair.node_of.get(made.op)
        return (
            _name(node.inputs[made.slot]) if node is not None else "",
            _name(original.inputs[made.slot]) if original is not None else "",
        )

    def _lacks(self, made: Sum, now: Feeds, before: Feeds, like: Array) -> Array:
        """What the stream lacks, in units of the contraction's result."""
        names = self._stream_names(made)
        stream = made.op.inputs[made.slot]
        wanted = self._compacted(before[names[1]], self.masks.mask(stream) if stream is not None else None)
        have = now[names[0]]
        if wanted is None or wanted.shape != have.shape or have.shape != like.shape:
            return np.zeros((), dtype=np.float32)
        usable = np.abs(made.scale) > LEAST_SCALE * np.abs(made.scale).max()
        inverse = np.where(usable, 1 / np.where(usable, made.scale, 1), 0).astype(np.float32)
        return np.asarray((wanted - have) * inverse)


class Repair(FrontToBack):
    """Refits a pruned model in place."""

    def __init__(
        self,
        pruned: Pruned,
        calibration: Calibration,
        *,
        damping: float = DAMPING,
        everywhere: bool = False,
        match_variance: bool = False,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prepare a repair.

        Args:
            pruned: A pruned model and its original; functions inlined.
            calibration: Inputs; labels are not needed.
            damping: Weight of the ridge toward the sliced weights.
            everywhere: Refit all contractions rather than only those that read a cut: for changes that are no cuts.
            match_variance: Scale each refitted output so that its variance is the original's, not only its mean: least
                squares shrinks what it cannot explain. Off: it gives up some of the squared error for the scale.
            seed: For the choice of rows.
            progress: Called with (refits done, refits in all).
        """
        super().__init__(Pair.of(pruned), calibration, seed=seed, progress=progress)
        self.damping = damping
        self.everywhere = everywhere
        self.match_variance = match_variance
        self.report = RepairReport()

    def wants(self, op: Op) -> bool:
        """True if an op reads a cut."""
        return self.everywhere or self._reads_cut(op)

    def _reads_cut(self, op: Op) -> bool:
        """True if the op's activation loses positions that the op sums over."""
        found = find_contraction(op)
        if found is None:
            return False
        if isinstance(found, str):
            return any(self.masks.parts(tensor) for tensor in op.inputs if tensor is not None)
        form = found.form
        weight = found.weight_tensor
        parts = [np.broadcast_to(part, weight.shape or ()) for part in self.masks.parts(weight)]
        return any(not form.arrange(part).any(axis=2).all() for part in parts)

    def skip(self, op: Op, reason: str) -> None:
        """Report what reads a cut and is left as it is."""
        if self._reads_cut(op):
            self.report.skipped.append((op.name, reason))

    def solve(self, layer: Layer) -> None:
        """Least squares, held toward the sliced weights."""
        matrices, biases = [], []
        for gram, matrix, old in zip(layer.grams, layer.matrices, layer.biases, strict=True):
            new, shift = refit(gram, matrix, old, intercept=layer.intercept, damping=self.damping)
            if self.match_variance and layer.intercept:
                new, shift = matched_variance(gram, new)
            matrices.append(new)
            biases.append(old if shift is None else shift)
        new, shift = np.stack(matrices), np.stack(biases)
        before, after = layer.error(layer.matrices, layer.biases), layer.error(new, shift)
        self.report.refitted.append(Refitted(layer.contraction.op.name, before, after))
        weight = layer.restored(new).astype(layer.weight.dtype)
        self.weights.write(layer.contraction, weight, shift, layer.place)


def _is_along_outputs(bias: Tensor) -> bool:
    """True if a bias is a constant with one number for each output, or one for all."""
    shape = bias.shape or ()
    return bias.constant and (trimmed(shape) == shape[-1:] or not trimmed(shape))


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""


def repair(pruned: Pruned, calibration: Calibration, **options: Any) -> RepairReport:
    """Refit a pruned model in place (see :class:`Repair`)."""
    made = Repair(pruned, calibration, **options)
    made.run()
    return made.report
