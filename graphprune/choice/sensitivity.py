"""Sensitivity: what the network's outputs lose when one group alone is cut, at several levels.

Each group is cut alone, the weights that read it are corrected in closed form, and the rest of the network is run: no
model is rewritten, since a contraction whose weights are zero at removed positions is what masking means. These are the
error-against-cost curves that a budget is spent by (as in Frantar & Alistarh, SPDY, ICML 2022, section 4.1, there by
layers), and what ``--sensitivity`` shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphprune.axes.groups import Group
from graphprune.calibration import Array, Calibration
from graphprune.cost import macs
from graphprune.gradients.gates import Gate, find_gates
from graphprune.graph import Op
from graphprune.kernels import obs
from graphprune.layers.execution import Feeds, StagedRun
from graphprune.scores.evidence import Evidence, Scores
from graphprune.scores.reconstruction import DAMPING, GroupReader, group_readers

#: Samples on which the curves are measured, at most and at least.
SAMPLES = (128, 16)
#: Multiply-accumulates that measuring all curves may take before it makes do with fewer samples: some minutes on two
#: cores. Not a time, so that the result does not depend on the machine.
WORK = 10**13
#: Samples that run through the network at once.
BATCH = 64


@dataclass
class Curve:
    """What the network loses when one group alone is cut.

    Attributes:
        group: The group's name.
        index: Its index.
        kept: How many of the group's ``unit`` parts stay, descending; the first is all of them.
        errors: Squared distance of the outputs from the original's, relative to their variance, at each; never falls.
        measured: False where nothing could be run and the error is that of the score alone.
    """

    group: str
    index: int
    kept: list[int]
    errors: list[float]
    measured: bool = True

    def at(self, kept: int) -> float:
        """The error where so many parts stay, by linear interpolation."""
        return float(np.interp(-kept, [-k for k in self.kept], self.errors))


def outputs_error(found: Sequence[Feeds], expected: Sequence[Feeds]) -> float:
    """Squared distance of real outputs relative to their variance over samples, averaged over outputs.

    Samples of different shapes have means of their own. Where the original is infinite (the logarithm of a probability
    of zero) nothing is compared; infinity where only the network is.
    """
    errors = []
    for name, first in expected[0].items():
        if not isinstance(first, np.ndarray) or first.dtype.kind not in "fV":
            continue
        wanted = [np.atleast_1d(batch[name]).astype(np.float64) for batch in expected]
        here = [np.isfinite(array) for array in wanted]
        wanted = [np.where(there, array, 0.0) for there, array in zip(here, wanted, strict=True)]
        sums: dict[tuple[int, ...], list[Array]] = {}
        for there, array in zip(here, wanted, strict=True):
            total = sums.setdefault(array.shape[1:], [np.zeros(array.shape[1:]), np.zeros(array.shape[1:])])
            total[0] += array.sum(axis=0)
            total[1] += there.sum(axis=0)
        means = {shape: total / np.maximum(count, 1) for shape, (total, count) in sums.items()}
        distance = variance = 0.0
        for batch, array, there in zip(found, wanted, here, strict=True):
            other = np.atleast_1d(batch[name]).astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):
                distance += float(np.square(other - array, where=there, out=np.zeros(array.shape)).sum())
            variance += float(np.square(array - means[array.shape[1:]])[there].sum())
        if not np.isfinite(distance):
            errors.append(float("inf"))
        elif variance > 0:
            errors.append(distance / variance)
    return float(np.mean(errors)) if errors else 0.0


class Sensitivity:
    """Measures the curves of all groups that may be cut."""

    def __init__(self, evidence: Evidence, scores: Scores, levels: Mapping[int, Sequence[int]]) -> None:
        """Prepare.

        Args:
            evidence: The network and its inputs.
            scores: What goes first.
            levels: For each group (by index) the numbers of parts to try, below the group's ``unit``.
        """
        self._evidence = evidence
        self._scores = scores
        self._levels = levels

    def measure(self) -> list[Curve]:
        """All curves, in the order of the groups."""
        network = self._evidence.network
        calibration = self._evidence.inputs("sensitivity")
        calibration = calibration.subset(self._samples(calibration))
        curves: dict[int, Curve] = {}
        with StagedRun(network.model, calibration.batches(BATCH)) as run:
            whole = run.rest()
            expected = [whole.run(feeds) for feeds in run.batches()]
            consumers = self._consumers(run)
            corrected = {
                group.index: (readers, self._corrections(group, readers))
                for group, readers in group_readers(self._evidence, "sensitivity")
                if group.index in consumers
            }
            order = sorted(consumers, key=lambda index: self._start(run, consumers[index]))
            for number, index in enumerate(order):
                if self._evidence.progress is not None:
                    self._evidence.progress(number, len(order))
                readers, corrections = corrected.pop(index)
                curves[index] = self._curve(
                    run, network.groups[index], readers, corrections, consumers[index], expected
                )
        for index, levels in self._levels.items():
            if index not in curves:
                curves[index] = score_curve(network.groups[index], self._scores, levels)
        return [curves[index] for index in sorted(curves)]

    def _samples(self, calibration: Calibration) -> int:
        """How many samples the work allows for: each trial runs what lies behind a group, on average half of all."""
        network = self._evidence.network
        name = next(iter(calibration.inputs), None)
        together = 1 if name is None else network.input_shapes[name][calibration.axes.get(name, 0)]
        trials = sum(len(levels) for levels in self._levels.values())
        most, least = SAMPLES
        each = trials * macs(network.analysis) / max(together, 1) / 2
        return int(np.clip(WORK / max(each, 1.0), least, most))

    def _consumers(self, run: StagedRun) -> dict[int, list[Gate]]:
        """For each group all operands that sum over it; groups that are consumed where no piece reaches are absent."""
        network = self._evidence.network
        owner = np.full(len(network.analysis.atoms), -1, dtype=np.int64)
        for index in self._levels:
            owner[network.groups[index].labels] = index
        found: dict[int, list[Gate]] = {}
        hidden: set[int] = set()
        for gate in find_gates(network.analysis, owner >= 0):
            inside = gate.op.node in run.index and not gate.op.path
            for index in np.unique(owner[gate.labels]).tolist():
                if index >= 0:
                    found.setdefault(index, []).append(gate)
                    if not inside:
                        hidden.add(index)
        return {index: gates for index, gates in found.items() if index not in hidden}

    @staticmethod
    def _start(run: StagedRun, gates: Sequence[Gate]) -> int:
        return min(run.index[_op_node(gate.op)] for gate in gates)

    def _kept_units(self, group: Group, level: int) -> Array:
        """Positions in ``group.labels`` that stay at a level."""
        kept, start = [], 0
        for block in group.blocks:
            count = level * len(block) // group.unit
            ranked = np.lexsort((block, self._scores[block]))
            kept.append(start + np.sort(ranked[len(block) - count :]))
            start += len(block)
        return np.concatenate(kept)

    def _corrections(self, group: Group, readers: Sequence[GroupReader]) -> list[list[Array]]:
        """For each level each reader's corrected weight, float32 ``[features, outputs]``, zero where removed."""
        found = []
        for level in self._levels[group.index]:
            gone = np.setdiff1d(np.arange(group.size), self._kept_units(group, level))
            weights = []
            for reader in readers:
                lost = np.concatenate([reader.features[unit] for unit in gone] or [np.zeros(0, np.int64)])
                weight = np.zeros(reader.weight.shape, dtype=np.float32)
                stays = np.ones(len(weight), dtype=bool)
                stays[lost] = False
                weight[stays] = obs.corrected_weight(reader.as_obs(), gone, damping=DAMPING)
                weights.append(weight)
            found.append(weights)
        return found

    def _curve(
        self,
        run: StagedRun,
        group: Group,
        readers: Sequence[GroupReader],
        corrections: Sequence[Sequence[Array]],
        gates: Sequence[Gate],
        expected: Sequence[Feeds],
    ) -> Curve:
        run.advance(self._start(run, gates))
        corrected = {
            (reader.reader.contraction.op, reader.reader.contraction.activation) for reader in readers
        }
        masked = [gate for gate in gates if (gate.op, gate.slot) not in corrected]
        names = {(_op_node(gate.op), gate.slot): f"{gate.op.name}/{gate.slot}/mask" for gate in masked}
        nodes = list(dict.fromkeys(_node(reader) for reader in readers))
        shifted = {_output(node): f"{_output(node)}/shift" for node in nodes}
        piece = run.rest([_weight(reader) for reader in readers], shifted, names)
        kept, errors = [group.unit], [0.0]
        for level, weights in zip(self._levels[group.index], corrections, strict=True):
            trial = {**self._trial(readers, weights), **self._masks(group, level, masked)}
            found = [piece.run({**feeds, **trial}) for feeds in run.batches()]
            kept.append(level)
            errors.append(max(errors[-1], outputs_error(found, expected)))
        return Curve(group.name, group.index, kept, errors)

    def _masks(self, group: Group, level: int, gates: Sequence[Gate]) -> Feeds:
        """What operands are multiplied with that are not the input of a corrected contraction, by input name."""
        gone = np.zeros(len(self._evidence.network.analysis.atoms), dtype=bool)
        gone[group.labels] = True
        gone[group.labels[self._kept_units(group, level)]] = False
        feeds: Feeds = {}
        for gate in gates:
            name = f"{gate.op.name}/{gate.slot}/mask"
            tensor = gate.op.inputs[gate.slot]
            dtype = (
                tensor.dtype.numpy()
                if tensor is not None and tensor.dtype is not None
                else np.dtype(np.float32)
            )
            mask = (~gone[gate.labels]).astype(dtype)
            feeds[name] = feeds[name] * mask if name in feeds else mask
        return feeds

    @staticmethod
    def _trial(readers: Sequence[GroupReader], weights: Sequence[Array]) -> Feeds:
        """Corrected weights and the shift that makes up for what is constant, by input name of the piece."""
        by_node: dict[ir.Node, list[tuple[GroupReader, Array]]] = {}
        for reader, weight in zip(readers, weights, strict=True):
            by_node.setdefault(_node(reader), []).append((reader, weight))
        feeds: Feeds = {}
        for node, there in by_node.items():
            contraction = there[0][0].reader.contraction
            matrices = there[0][0].reader.matrices.astype(np.float32)
            shift = np.zeros(matrices.shape[::2], dtype=np.float32)
            for reader, weight in there:
                shift[reader.product] = reader.mean @ (matrices[reader.product] - weight)
                matrices[reader.product] = weight
            shape = contraction.weight_tensor.shape or ()
            dtype = contraction.weight_tensor.dtype
            plain = contraction.form.restore(matrices / contraction.form.scale, shape)
            numpy = dtype.numpy() if dtype is not None else np.dtype(np.float32)
            feeds[_weight(there[0][0])] = plain.astype(numpy)
            feeds[f"{_output(node)}/shift"] = contraction.form.spread(
                shift.ravel(), len(contraction.output.shape or ())
            ).astype(numpy)
        return feeds


def score_curve(group: Group, scores: Scores, levels: Sequence[int]) -> Curve:
    """A curve without a measurement: the share of the group's squared scores that is removed."""
    squares = np.square(np.where(np.isfinite(scores[group.labels]), scores[group.labels], 0.0))
    ranked = np.cumsum(np.sort(squares))
    total = float(ranked[-1]) or 1.0
    kept, errors = [group.unit], [0.0]
    for level in levels:
        gone = group.size - level * group.size // group.unit
        kept.append(level)
        errors.append(float(ranked[gone - 1]) / total if gone else 0.0)
    return Curve(group.name, group.index, kept, errors, measured=False)


def save_curves(curves: Sequence[Curve], groups: Sequence[Group], path: Path) -> None:
    """Write the curves as JSON."""
    data = [
        {
            "group": curve.group,
            "size": groups[curve.index].size,
            "kept": [k / groups[curve.index].unit for k in curve.kept],
            "errors": curve.errors,
            "measured": curve.measured,
        }
        for curve in curves
    ]
    path.write_text(
        json.dumps({"graphprune_sensitivity": 1, "groups": data}, indent=1) + "\n", encoding="utf-8"
    )


def _node(reader: GroupReader) -> ir.Node:
    node = reader.reader.contraction.op.node
    assert node is not None
    return node


def _op_node(op: Op) -> ir.Node:
    assert op.node is not None
    return op.node


def _weight(reader: GroupReader) -> str:
    value = _node(reader).inputs[reader.reader.contraction.weight]
    return "" if value is None else value.name or ""


def _output(node: ir.Node) -> str:
    return node.outputs[0].name or ""
