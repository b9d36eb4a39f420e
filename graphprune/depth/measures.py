"""Measures of residual branches: how much each matters, on inputs.

Three questions, dearer and better in turn: how far a branch turns the stream, what the network's outputs lose without
it, and what of it no refit of the layers that read the stream can make good.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.linalg

from graphprune.axes.analysis import Analysis
from graphprune.axes.labels import varying_axes
from graphprune.calibration import Calibration
from graphprune.depth import Criterion, check_criterion
from graphprune.depth.blocks import Branch
from graphprune.depth.removal import RANDOM_RUNS, Cut, ResidualNetwork, cut_branches, node_at
from graphprune.errors import ModelError, OptionError
from graphprune.graph import Tensor
from graphprune.kernels.gram import GramAccumulator, damped_factor
from graphprune.model import copy, save
from graphprune.runtime import make_session, run_session
from graphprune.verification.feeds import Feeds

if TYPE_CHECKING:
    import onnxruntime

Array: TypeAlias = npt.NDArray[Any]
Progress: TypeAlias = Callable[[str], None]
#: Samples on which the error is measured: the network runs once for each branch.
ERROR_SAMPLES = 128
#: The network's own outputs are remembered up to this many bytes, and computed again above.
OUTPUT_BYTES = 512 << 20
#: Rows that tell what a refit can make good, for each channel of the stream; more are drawn from.
ROWS_PER_CHANNEL = 128
#: Damping of that refit, in units of the mean of the Gram matrix' diagonal: as that of the repair.
DAMPING = 1e-3


def measure_branches(
    network: ResidualNetwork,
    calibration: Calibration | None = None,
    *,
    by: Criterion = "cosine",
    removed: Sequence[Branch] = (),
    branches: Sequence[Branch] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[Branch, float]:
    """How much each branch matters: at least 0, and 0 for a branch that does nothing.

    ``cosine``
        ``1 - E[cos(s, s + f)]`` of the stream before and after the branch: the Block Influence of Men et al.,
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (2024), eq. 1. They take the
        cosine over the channels of each token; here it is taken over all that a sample holds (the tensor flattened
        but for axis 0), which needs no notion of a channel axis, and the mean over samples. One run of the network.

    ``error``
        The relative change of the network's outputs when the branch is removed, ``|y' - y| / |y|`` in the 2-norm over
        all samples, averaged over outputs; for outputs that are not real, the share of elements that change.
        One run of the network for each branch, on the first 128 samples.

    ``refit``
        What repair cannot make good: the layers behind a removed branch are refitted, so whatever is an affine function
        of the stream that is left costs nothing. The sum ``s + f`` of the whole network is fitted, channel by channel,
        to the stream without the branch and to the sum with it; the measure is by how much the share of its variance
        that stays unexplained is larger without. One run of the network, two where branches are removed already.

    Args:
        network: The network.
        calibration: Inputs; random ones if None.
        by: What to measure.
        removed: Branches that are removed already; ``error`` still compares with the whole network.
        branches: What to measure; all removable branches that are not removed if None.
        seed: For random inputs.
        progress: Called with what is being done.

    Returns:
        A number for each branch; infinity where NaN or infinities come up.

    Raises:
        OptionError: ``by`` is unknown, or a branch is not removable.
        ModelError: ONNX Runtime cannot run the network on the inputs.
    """
    if branches is None:
        gone = {op for branch in removed for op in (branch.op, *branch.ops)}
        branches = [branch for branch in network.removable if branch.op not in gone]
    for branch in (*branches, *removed):
        if branch.obstacle is not None:
            raise OptionError(f"branch {branch.name!r} cannot be removed: {branch.obstacle}")
    check_criterion(by)
    if by == "error":
        return _errors(network, branches, removed, calibration, seed, progress)
    if progress is not None:
        progress("measuring blocks")
    measure = _influence if by == "cosine" else _unexplained
    return measure(network, branches, removed, calibration, seed)


class _Streams:
    """A network without some branches, whose streams and whose other branches' results can be read."""

    def __init__(
        self, network: ResidualNetwork, removed: Sequence[Branch], branches: Sequence[Branch], path: Path
    ) -> None:
        model = copy(network.model)
        node_of = dict(zip(network.model.graph.all_nodes(), model.graph.all_nodes(), strict=True))
        gone = sorted(removed, key=lambda branch: branch.op.index)
        sums = [node_of[node_at(branch)] for branch in branches]
        cut_branches(model, [Cut(node_of[node_at(b)], b.kept, b.dropped) for b in gone])
        self._pairs: list[tuple[str, str]] = []
        for node, branch in zip(sums, branches, strict=True):
            values = node.inputs[branch.kept], node.inputs[branch.dropped]
            for value in values:
                # A stream may be an input of the graph: that is no output, and its feed is at hand.
                if value is not None and not value.is_graph_output() and not value.is_graph_input():
                    model.graph.outputs.append(value)
            self._pairs.append((_name(values[0]), _name(values[1])))
        self._session = _session(model, path)

    def read(self, feeds: Feeds) -> list[tuple[Array, Array]]:
        """For each branch the stream that it is added to, and its result."""
        found = {**feeds, **_run(self._session, feeds)}
        return [(found[stream], found[result]) for stream, result in self._pairs]


def _influence(
    network: ResidualNetwork,
    branches: Sequence[Branch],
    removed: Sequence[Branch],
    calibration: Calibration | None,
    seed: int,
) -> dict[Branch, float]:
    total = np.zeros(len(branches))
    samples = np.zeros(len(branches))
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        streams = _Streams(network, removed, branches, Path(folder) / "exposed.onnx")
        for feeds in network.batches(calibration, seed):
            for k, (stream, result) in enumerate(streams.read(feeds)):
                changes = change_of_direction(stream, result)
                total[k] += changes.sum()
                samples[k] += len(changes)
    return {
        branch: _finite(total[k] / samples[k] if samples[k] else np.nan) for k, branch in enumerate(branches)
    }


def change_of_direction(stream: Array, result: Array) -> npt.NDArray[np.float64]:
    """``1 - cos(s, s + f)`` for each sample; 0 where both are zero, 1 where one is.

    Args:
        stream, result: Real arrays of one shape, samples along axis 0; a scalar or a vector is one sample.
    """
    rows = (len(stream), -1) if stream.ndim > 1 else (1, -1)
    before = stream.astype(np.float64).reshape(rows)
    added = result.astype(np.float64).reshape(rows)
    after = before + added
    # 1 - cos = |u - v|^2 / 2 for unit vectors u, v: exact for small changes, where 1 - cos would cancel.
    lengths = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = before / lengths[0][:, None] - after / lengths[1][:, None]
        changes: npt.NDArray[np.float64] = np.square(distance).sum(axis=1) / 2
    empty = (lengths[0] == 0) | (lengths[1] == 0)
    return np.where(empty, (lengths[0] != lengths[1]).astype(np.float64), changes)


def _unexplained(
    network: ResidualNetwork,
    branches: Sequence[Branch],
    removed: Sequence[Branch],
    calibration: Calibration | None,
    seed: int,
) -> dict[Branch, float]:
    axes = [channel_axis(network.analysis, branch.stream) for branch in branches]
    sizes = [
        1 if axis is None else (b.stream.shape or (1,))[axis] for axis, b in zip(axes, branches, strict=True)
    ]
    without = [GramAccumulator(size, size) for size in sizes]
    with_branch = [GramAccumulator(size, size) for size in sizes]
    draw = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        whole = _Streams(network, (), branches, Path(folder) / "whole.onnx")
        rest = _Streams(network, removed, branches, Path(folder) / "rest.onnx") if removed else None
        for feeds in network.batches(calibration, seed):
            wanted = whole.read(feeds)
            left = wanted if rest is None else rest.read(feeds)
            for k, ((s, f), (stream, result)) in enumerate(zip(wanted, left, strict=True)):
                target = rows_of(s + f, axes[k])
                share = 1 / RANDOM_RUNS if calibration is None else len(s) / calibration.samples
                most = max(1, ceil(ROWS_PER_CHANNEL * sizes[k] * share))
                drawn = np.sort(draw.permutation(len(target))[:most])
                without[k].add(rows_of(stream, axes[k])[drawn], target[drawn])
                with_branch[k].add(rows_of(stream + result, axes[k])[drawn], target[drawn])
    return {
        branch: _finite(max(unexplained_share(before) - unexplained_share(after), 0.0))
        for branch, before, after in zip(branches, without, with_branch, strict=True)
    }


def channel_axis(analysis: Analysis, tensor: Tensor) -> int | None:
    """The axis of a stream that its readers sum over, told by its labels; None where it bears none."""
    axes = [(max(labels.shape), varying_axes(labels)) for labels in analysis.labellings(tensor)]
    axes = [(size, varying) for size, varying in axes if varying]
    if not axes or tensor.shape is None:
        return None
    return max(axes)[1][-1]


def rows_of(array: Array, axis: int | None) -> Array:
    """Activations as rows of channels: float32 ``[elements / channels, channels]``; one channel without an axis."""
    array = np.asarray(array, dtype=np.float32)
    if axis is None or array.ndim == 0:
        return array.reshape(-1, 1)
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


def unexplained_share(gram: GramAccumulator) -> float:
    """The share of the variance of y that no affine function of x explains, up to a little damping.

    Args:
        gram: Of x and y.

    Returns:
        A number from 0 to 1; 0 where y does not vary, infinity where something is not finite.
    """
    moments = gram.moments(centred=True)
    variance = float(moments.yy.sum())
    if not (np.isfinite(variance) and np.isfinite(moments.xx.sum())):
        return float("inf")
    if variance <= 0:
        return 0.0
    factor, _ = damped_factor(moments.xx, DAMPING)
    weight = scipy.linalg.cho_solve((factor, True), moments.xy, check_finite=False)
    # |y - W'x|^2 of the damped solution, which is not orthogonal to its residual.
    left = variance - 2 * np.vdot(weight, moments.xy) + np.vdot(weight, moments.xx @ weight)
    return float(np.clip(left / variance, 0.0, 1.0))


def _errors(
    network: ResidualNetwork,
    branches: Sequence[Branch],
    removed: Sequence[Branch],
    calibration: Calibration | None,
    seed: int,
    progress: Progress | None,
) -> dict[Branch, float]:
    errors: dict[Branch, float] = {}
    calibration = calibration.subset(ERROR_SAMPLES) if calibration is not None else None
    with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
        folder = Path(name)
        original = _session(network.model, folder / "original.onnx")
        remembered: list[Feeds] = []
        held = 0
        for number, branch in enumerate(branches):
            if progress is not None:
                progress(f"measuring blocks: {number + 1} of {len(branches)}")
            trial = _session(network.without([*removed, branch]), folder / "trial.onnx")
            change = _Change()
            for index, feeds in enumerate(network.batches(calibration, seed)):
                if index < len(remembered):
                    expected = remembered[index]
                else:
                    expected = _run(original, feeds)
                    held += sum(a.nbytes for a in expected.values() if isinstance(a, np.ndarray))
                    if held <= OUTPUT_BYTES and index == len(remembered):
                        remembered.append(expected)
                change.add(expected, _run(trial, feeds))
            errors[branch] = _finite(change.value())
    return errors


class _Change:
    """The relative change of outputs, summed up batch by batch."""

    def __init__(self) -> None:
        self._changed: dict[str, float] = {}
        self._total: dict[str, float] = {}
        self._real: dict[str, bool] = {}

    def add(self, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        for name, before in expected.items():
            after = found[name]
            if not isinstance(before, np.ndarray) or not isinstance(after, np.ndarray):
                continue
            self._real[name] = before.dtype.kind in "fV"
            if self._real[name] and before.shape == after.shape:
                reference = before.astype(np.float64)
                changed = float(np.square(after.astype(np.float64) - reference).sum())
                total = float(np.square(reference).sum())
            else:  # a result of another length is another result
                same = before.shape == after.shape
                changed = float((before != after).sum()) if same else float(before.size)
                total = float(before.size)
            self._changed[name] = self._changed.get(name, 0.0) + changed
            self._total[name] = self._total.get(name, 0.0) + total

    def value(self) -> float:
        """The mean over outputs; that of the real ones where there are any."""
        names = [name for name, real in self._real.items() if real] or list(self._real)
        changes = []
        for name in names:
            share = self._changed[name] / self._total[name] if self._total[name] else self._changed[name]
            changes.append(share**0.5 if self._real[name] else share)
        return float(np.mean(changes)) if changes else 0.0


def _finite(number: float) -> float:
    return float(number) if np.isfinite(number) else float("inf")


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name


def _session(model: ir.Model, path: Path) -> onnxruntime.InferenceSession:
    save(model, path)
    return make_session(path)


def _run(session: onnxruntime.InferenceSession, feeds: Feeds) -> Feeds:
    try:
        return run_session(session, feeds, "the network to measure its blocks")
    except ModelError as error:
        raise ModelError(f"{error}; give inputs that it can run with --calib") from error
