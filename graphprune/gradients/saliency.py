"""Derivatives of a loss by gates and by weights, computed by an ONNX model.

For a network with loss L and gates g (:mod:`graphprune.gradients.gates`), dL/dg_l at g = 1 is, with the sign turned,
the first order of what removing label l does to the loss (Molchanov et al., Importance Estimation for
Neural Network Pruning, 2019, section 3.1). Samples do not see each other, so that one backward run of a batch gives one
row a sample.

The loss
--------
*With labels* it is the cross-entropy of the first output.

*Without labels* any distance between the outputs of the original and of the pruned network has gradient zero at the
original: it is there that it is least. What counts is its curvature H = J^T A J, with J the outputs' derivative by the
gates and A the distance's Hessian by the outputs. With A = E[v v^T] for a random v, each v gives a row v^T J, and

    E[(v^T J)_l ^ 2] = H_ll

(Hutchinson, A stochastic estimator of the trace, 1990; Martens, New insights on the natural gradient, 2020, section 9,
for the Gauss-Newton matrix as a Fisher matrix). So half the mean square of the rows is the second-order change of the
distance, and their mean absolute value its first-order size. Two distances:

- ``cross-entropy`` between the class probabilities p of the original and those of the pruned network;
  A = diag(p) - p p^T, and
  v = sqrt(p) e - p (sqrt(p) . e) with signs e drawn evenly has E[v v^T] = A: unlike labels drawn from p, which give the
  same mean, it is no rare event where p is near 0 or 1;
- ``distance``: the squared distance of each real output divided by its squared length, A = I / |y|^2, v = e / |y|.

``auto`` takes the cross-entropy where there are labels, or where the first output is a (log-)softmax or, of shape
``[samples, classes]``, comes straight from a layer with weights; else the distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse

from graphprune.axes.groups import Group
from graphprune.axes.labels import Labels
from graphprune.calibration import Calibration
from graphprune.errors import GraphPruneError, ModelError, OptionError
from graphprune.gradients.gates import Gate, find_gates, free_labels, sample_positions
from graphprune.gradients.objective import objective
from graphprune.gradients.vjp.emit import Value
from graphprune.gradients.vjp.program import WITHOUT, Place, Program
from graphprune.graph import Graph, Tensor
from graphprune.graph.twin import build_twin
from graphprune.network import Network
from graphprune.runtime import make_session
from graphprune.scores.weights import weights_of

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Array: TypeAlias = npt.NDArray[Any]
Rows: TypeAlias = npt.NDArray[np.float64]
Loss: TypeAlias = Literal["auto", "cross-entropy", "distance"]
#: Called with the number of samples done and of all.
Progress: TypeAlias = Callable[[int, int], None]

#: What to do about sizes.
_SIZES = "analyse it at these sizes, with input_shapes (--input-shape)"
#: Samples at once, at most; fewer where activations are large.
MAX_BATCH = 32
#: Elements of all activations together that a batch may have: 256 MB in float32, and as much again for adjoints.
MAX_ACTIVATIONS = 1 << 26


def gate_gradients(
    network: Network,
    calibration: Calibration,
    *,
    groups: Iterable[Group] | None = None,
    labels: Array | None = None,
    loss: Loss = "auto",
    seed: int = 0,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Rows]:
    """Derivatives of each sample's loss by the gates of all labels.

    Args:
        network: The analysed model.
        calibration: The samples.
        groups: The groups whose labels are asked about; those that are not frozen where None.
        labels: int ``[samples]`` (one axis more for each that the output has beside samples and classes); those of the
            calibration where None.
        loss: What is differentiated (see the module).
        seed: For the random directions. Rows do not depend on ``batch``.
        batch: Samples at once; worked out from the size of the activations where None.
        progress: Called after each batch.

    Yields:
        float64 ``[n, number of atoms]``, one row a sample, in order; zero for labels that are frozen or not asked
        about. Where a model takes several samples at once and mixes them, the first row of each batch is their sum.

    Raises:
        OptionError: An op on the way has no derivative, or labels do not fit the output.
    """
    free = _asked(network, groups)
    task = _Task(network, loss, free, gates=find_gates(network.analysis, free))
    yield from _rows(task, calibration, labels, seed, progress, batch)


def weight_fisher(
    network: Network,
    calibration: Calibration,
    *,
    groups: Iterable[Group] | None = None,
    labels: Array | None = None,
    loss: Loss = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[Rows]:
    """For each sample and label, the sum of ``(dL/dw * w) ** 2`` over the weights w that bear the label.

    The mean of ``(dL/dw) ** 2`` over samples is the diagonal of the weights' empirical Fisher matrix. Gradients of a
    batch cannot be told apart in a weight, so that samples are taken one by one.

    Args:
        network, calibration, groups, labels, loss, seed, progress: As for :func:`gate_gradients`.

    Yields:
        float64 ``[1, number of atoms]``, one row a sample; zero for labels that are frozen or not asked about.

    Raises:
        OptionError: As for :func:`gate_gradients`; or the model takes several samples at once and no fewer.
    """
    if (calibration.batch or 1) > 1:
        raise OptionError(
            f"the model takes batches of {calibration.batch}, in which the gradients of samples cannot be told apart:"
            f" give it a dynamic batch size; {WITHOUT}"
        )
    weights = [
        tensor
        for tensor in weights_of(network.analysis)
        if tensor.dtype is not None and tensor.dtype.is_floating_point()
    ]
    task = _Task(network, loss, _asked(network, groups), weights=weights)
    yield from _rows(task, calibration, labels, seed, progress, 1)


def _asked(network: Network, groups: Iterable[Group] | None) -> npt.NDArray[np.bool_]:
    """By label, whether it is asked about."""
    free = free_labels(network.analysis)
    if groups is None:
        return free
    asked = np.zeros_like(free)
    for group in groups:
        asked[group.labels] = True
    return asked & free


# -- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What is differentiated.

    Attributes:
        network: The analysed model.
        loss: The loss.
        asked: By label, whether it is asked about.
        gates: The gates.
        weights: Weights whose gradients are squared and summed.
        dtype: In what everything is computed.
    """

    network: Network
    loss: Loss
    asked: npt.NDArray[np.bool_]
    gates: Sequence[Gate] = ()
    weights: Sequence[Tensor] = ()
    dtype: npt.DTypeLike = np.float32


def _rows(
    task: _Task,
    calibration: Calibration,
    labels: Array | None,
    seed: int,
    progress: Progress | None,
    batch: int | None,
) -> Iterator[Rows]:
    """One row a sample, batch by batch; a model is built for each shape that samples have."""
    labels = calibration.labels if labels is None else labels
    axes = {name: calibration.axes.get(name, 0) for name in calibration.inputs}
    size = calibration.batch or _batch_size(task, calibration, axes, batch)
    model: _Model | None = None
    start = 0
    for feed in calibration.batches(size):
        count = next((feed[name].shape[axis] for name, axis in axes.items()), 1)
        if model is None or not model.takes(feed):
            shapes = {name: array.shape for name, array in feed.items()}
            model = _Model(task, shapes, axes, count, labelled=labels is not None)
        chosen = np.arange(start, start + count)
        yield model.run(feed, chosen, labels, calibration.samples, seed)
        start += count
        if progress is not None:
            progress(start, calibration.samples)


def _batch_size(task: _Task, calibration: Calibration, axes: Mapping[str, int], batch: int | None) -> int:
    """How many samples to take at once: 1 where an op mixes them, or where a gate lies on a weight."""
    most = max(1, min(batch or MAX_BATCH, calibration.samples))
    if most == 1 or any(_is_constant(gate) for gate in task.gates):
        return 1
    feed = next(calibration.batches(1))
    shapes = {
        name: tuple(2 if axes.get(name) == axis else n for axis, n in enumerate(array.shape))
        for name, array in feed.items()
    }
    try:
        probe = twin_at(task.network, shapes)
    except GraphPruneError:
        return 1
    if sample_positions(probe, axes, 2) is None:
        return 1
    if batch is None:
        elements = sum(
            prod(tensor.shape or ())
            for op in probe.ops
            for tensor in op.outputs
            if tensor is not None and not tensor.constant
        )
        most = max(1, min(most, 2 * MAX_ACTIVATIONS // max(elements, 1)))
    return most


def _is_constant(gate: Gate) -> bool:
    tensor = gate.op.inputs[gate.slot]
    return tensor is not None and tensor.constant


def twin_at(network: Network, shapes: Mapping[str, tuple[int, ...]]) -> Graph:
    """The twin of the network's model at other sizes of its inputs.

    Raises:
        OptionError: The model takes another branch at these sizes than at those that it was analysed at.
    """
    twin = build_twin(network.model, shapes)
    here, there = network.analysis.graph.ops, twin.ops
    if [op.kind for op in here] != [op.kind for op in there]:
        raise OptionError(f"at the sizes of the inputs given the model takes another branch: {_SIZES}")
    return twin


# -- the model ------------------------------------------------------------------------------------------------------


class _Output(NamedTuple):
    """One output of the gradient model.

    Attributes:
        labels, samples: The label and the sample that each element belongs to; both of the output's shape.
    """

    labels: Labels
    samples: Labels


class _Model:
    """A model that gives derivatives at one choice of sizes, and what its outputs mean."""

    def __init__(
        self,
        task: _Task,
        shapes: Mapping[str, tuple[int, ...]],
        axes: Mapping[str, int],
        samples: int,
        *,
        labelled: bool,
    ) -> None:
        """Build it.

        Args:
            task: What is differentiated.
            shapes: Of the inputs.
            axes: Along which of their axes the samples lie; inputs that are the same for all are absent.
            samples: How many there are.
            labelled: There are labels.
        """
        self._task, self._shapes, self._axes, self._samples = task, dict(shapes), axes, samples
        self.twin = twin_at(task.network, shapes)
        self._positions: Mapping[Tensor, Labels] = {}
        # Samples that cannot be told apart count as one.
        if samples > 1 and not any(_is_constant(gate) for gate in task.gates):
            self._positions = sample_positions(self.twin, axes, samples) or {}
        self._tensors = _same_tensors(task.network.analysis.graph, self.twin)
        program = Program(self.twin, task.dtype, frozenset(self._tensors[t] for t in task.weights))
        program.write_forward()
        self.objective = objective(program, self._positions, task.loss, labelled=labelled)
        self._outputs: list[_Output] = []
        self._write(program)
        self.proto = program.finish()
        self._free = np.flatnonzero(task.asked)
        self._gather = self._summation()
        self._session: onnxruntime.InferenceSession | None = None

    def takes(self, feed: Mapping[str, Array]) -> bool:
        """True if a feed has these sizes, with as many samples or fewer."""
        return all(
            len(shape) == feed[name].ndim
            and all(
                n == s or (axis == self._axes.get(name) and s < n)
                for axis, (n, s) in enumerate(zip(shape, feed[name].shape, strict=True))
            )
            for name, shape in self._shapes.items()
        )

    def _write(self, program: Program) -> None:
        task = self._task
        places: dict[Place, list[Labels]] = {}
        for gate in task.gates:
            places.setdefault(Place(self.twin.ops[gate.op.index], gate.slot), []).append(gate.labels)
        weights = {self._tensors[tensor]: tensor for tensor in task.weights}
        at_place, at_tensor = program.adjoints(self.objective.seeds, places, weights)
        for place, adjoint in at_place.items():
            tensor = place.op.inputs[place.slot]
            assert tensor is not None
            product = program.value(tensor) * adjoint
            for labels in places[place]:
                self._sum(program, product, labels, self._positions.get(tensor))
        for tensor, adjoint in at_tensor.items():
            product = program.value(tensor) * adjoint
            for labels in task.network.analysis.labellings(weights[tensor]):
                if task.asked[labels].any():
                    self._sum(program, product * product, labels, None)

    def _sum(self, program: Program, product: Value, labels: Labels, samples: Labels | None) -> None:
        """Sum a product over all but labels and samples."""
        if any(n not in (1, s) for n, s in zip(labels.shape, product.shape, strict=True)):
            raise OptionError(
                f"an axis that is pruned has another size on the inputs given than it was analysed at: {_SIZES}"
            )
        if samples is None:
            samples = np.zeros((1,) * product.rank, dtype=np.int32)
        kept = np.broadcast_shapes(labels.shape, samples.shape)
        program.output(product.sum([axis for axis, size in enumerate(kept) if size == 1]))
        self._outputs.append(_Output(np.broadcast_to(labels, kept), np.broadcast_to(samples, kept)))

    def _summation(self) -> scipy.sparse.csr_array:
        """Adds up what the outputs, flat and joined, hold for each sample and label."""
        column = np.full(len(self._task.asked), -1, dtype=np.int64)
        column[self._free] = np.arange(len(self._free))
        targets = [np.zeros(0, dtype=np.int64)]
        for output in self._outputs:
            at = column[output.labels]
            targets.append(np.where(at >= 0, output.samples * np.int64(len(self._free)) + at, -1).ravel())
        flat = np.concatenate(targets)
        used = np.flatnonzero(flat >= 0)
        shape = (self._samples * len(self._free), len(flat))
        return scipy.sparse.csr_array((np.ones(len(used)), (flat[used], used)), shape=shape)

    def run(
        self,
        feed: Mapping[str, Array],
        chosen: npt.NDArray[np.int64],
        labels: Array | None,
        samples: int,
        seed: int,
    ) -> Rows:
        """One row for each sample of a feed.

        Args:
            feed: The model's inputs, of at most as many samples as the model takes.
            chosen: The numbers of these samples.
            labels: Of all samples.
            samples: How many these are.
            seed: For random directions.
        """
        rows = np.zeros((len(chosen), len(self._task.asked)))
        checked = self.objective.checked(labels, samples)
        if not self._outputs:
            return rows
        # A batch that is not full is filled up with copies of its last sample.
        fill = np.minimum(np.arange(self._samples), len(chosen) - 1)
        feeds = {
            name: np.take(array, fill, self._axes[name]) if name in self._axes else array
            for name, array in feed.items()
        }
        feeds.update(self.objective.feeds(chosen[fill], seed, checked, np.dtype(self._task.dtype)))
        if self._session is None:
            self._session = _session(self.proto)
        wanted = {value.name for value in self._session.get_inputs()}
        found = self._session.run(
            None, {name: self._real(array) for name, array in feeds.items() if name in wanted}
        )
        flat = np.concatenate([np.asarray(array, dtype=np.float64).ravel() for array in found])
        summed = (self._gather @ flat).reshape(self._samples, len(self._free))
        rows[:, self._free] = summed[: len(chosen)]
        return rows

    def _real(self, array: Array) -> Array:
        return array.astype(self._task.dtype) if array.dtype.kind in "fV" else array


def _same_tensors(here: Graph, there: Graph) -> dict[Tensor, Tensor]:
    """The tensors of one twin of a model, to those of another."""
    return {
        a: b
        for one, other in zip(here.ops, there.ops, strict=True)
        for a, b in zip((*one.inputs, *one.outputs), (*other.inputs, *other.outputs), strict=True)
        if a is not None and b is not None
    }


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    try:
        return make_session(model, what="the gradient model")
    except ModelError as error:
        raise OptionError(f"{error}; {WITHOUT}") from error
