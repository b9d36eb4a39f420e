"""The loss that gradients are taken of, as adjoints of outputs (:mod:`graphprune.gradients.saliency` says which)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.axes.flow import SignatureFlow
from graphprune.axes.labels import Labels, varying_axes
from graphprune.axes.signature import Role
from graphprune.errors import OptionError
from graphprune.gradients.vjp.emit import Value
from graphprune.gradients.vjp.program import Program
from graphprune.graph import Op, Tensor
from graphprune.rules.registry import Refusal, flows_of

Array: TypeAlias = npt.NDArray[Any]

#: Name of the input that holds class labels as 0-1 vectors, and what names of inputs that hold signs begin with.
TARGETS, SIGNS = "graphprune_targets", "graphprune_signs"
#: Ops that hand on what they read, or add to it.
_PASSING = frozenset(
    {"Add", "Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "Transpose"}
)


@dataclass(frozen=True)
class Classes:
    """Class scores.

    Attributes:
        logits: What the softmax is taken of.
        axis: Along which the classes lie.
    """

    logits: Tensor
    axis: int


@dataclass
class Objective:
    """A loss.

    Attributes:
        seeds: Its derivative by tensors of the program.
        signs: Random signs that it reads: by input name the tensor of whose shape they are.
        classes: The class scores that it compares with labels, where it does.
        positions: Which sample an element of a tensor belongs to.
    """

    seeds: dict[Tensor, Value] = field(default_factory=dict)
    signs: dict[str, Tensor] = field(default_factory=dict)
    classes: Classes | None = None
    positions: Mapping[Tensor, Labels] = field(default_factory=dict)

    def checked(self, labels: Array | None, samples: int) -> Array | None:
        """Labels as int64 with the shape of the class scores less the classes.

        Raises:
            OptionError: They do not fit.
        """
        if self.classes is None or labels is None:
            return None
        shape = self.classes.logits.shape or ()
        rest = [size for axis, size in enumerate(shape) if axis not in (0, self.classes.axis)]
        count = shape[self.classes.axis]
        found = np.asarray(labels)
        if found.dtype.kind not in "iub" or found.size != samples * prod(rest):
            raise OptionError(
                f"labels for the output {self.classes.logits.name!r} must be {samples} x {rest or 'one'} integers;"
                f" those given are {found.dtype} {list(found.shape)}"
            )
        found = found.reshape([samples, *rest]).astype(np.int64)
        if found.size and not 0 <= int(found.min()) <= int(found.max()) < count:
            raise OptionError(
                f"labels must lie in 0 ... {count - 1}, the classes of {self.classes.logits.name!r}; those given lie"
                f" in {int(found.min())} ... {int(found.max())}"
            )
        return found

    def feeds(
        self, chosen: npt.NDArray[np.int64], seed: int, labels: Array | None, dtype: np.dtype[Any]
    ) -> dict[str, Array]:
        """What the program reads beside the model's inputs, for samples of these numbers."""
        feeds = {
            name: self._signs(number, tensor, chosen, seed).astype(dtype)
            for number, (name, tensor) in enumerate(self.signs.items())
        }
        if self.classes is not None and labels is not None:
            count = (self.classes.logits.shape or ())[self.classes.axis]
            hot = labels[chosen][..., None] == np.arange(count)
            feeds[TARGETS] = np.moveaxis(hot, -1, self.classes.axis).astype(dtype)
        return feeds

    def _signs(self, number: int, tensor: Tensor, chosen: npt.NDArray[np.int64], seed: int) -> Array:
        """+1 and -1, drawn for each sample by its number, whatever else is in the batch."""
        shape = list(tensor.shape or ())
        axis = self.sample_axis(tensor)
        if axis is None:
            chosen, axis = chosen[:1], None
        else:
            shape.pop(axis)
        drawn = [np.random.default_rng([seed, number, int(k)]).integers(0, 2, shape) for k in chosen]
        bits = drawn[0] if axis is None else np.stack(drawn, axis)
        return 2.0 * bits - 1.0

    def sample_axis(self, tensor: Tensor) -> int | None:
        """The axis of a tensor along which the samples lie; None where it is of one sample."""
        labels = self.positions.get(tensor)
        return None if labels is None else varying_axes(labels)[0]


def objective(
    program: Program, positions: Mapping[Tensor, Labels], loss: str, *, labelled: bool
) -> Objective:
    """Write a loss' derivative by the outputs.

    Args:
        program: The network; its forward ops are written.
        positions: Which sample an element of a tensor belongs to.
        loss: ``auto``, ``cross-entropy`` or ``distance``.
        labelled: There are labels.

    Raises:
        OptionError: There is no such loss, or no output that it could be taken of.
    """
    if loss not in ("auto", "cross-entropy", "distance"):
        raise OptionError(f"unknown loss {loss!r}; there are auto, cross-entropy and distance")
    made = Objective(positions=positions)
    outputs = [tensor for tensor in program.graph.outputs if _is_real(tensor)]
    if not outputs:
        raise OptionError("the model has no real-valued output to take a loss of")
    found = (
        None if loss == "distance" else classes_of(outputs[0], certain=labelled or loss == "cross-entropy")
    )
    if found is None and (loss == "cross-entropy" or (labelled and loss == "auto")):
        raise OptionError(
            f"the output {outputs[0].name!r} has no classes: the loss must be distance, without labels"
        )
    if found is None:
        for number, tensor in enumerate(outputs):
            _distance(program, made, tensor, f"{SIGNS}_{number}")
    else:
        _cross_entropy(program, made, found, labelled=labelled)
    return made


def _is_real(tensor: Tensor) -> bool:
    real = tensor.dtype is None or tensor.dtype.is_floating_point()
    return real and not tensor.constant and tensor.shape is not None and prod(tensor.shape) > 0


def _distance(program: Program, made: Objective, tensor: Tensor, name: str) -> None:
    """v = e / |y|, with the length of each sample's own output."""
    y = program.value(tensor)
    axis = made.sample_axis(tensor)
    length = (y * y).sum([a for a in range(y.rank) if a != axis]).apply("Sqrt")
    tiny = float(np.finfo(program.e.dtype).tiny)
    made.signs[name] = tensor
    made.seeds[tensor] = program.seed(name, y.shape) / program.e.op(
        "Max", [length, program.e.lift(tiny)], length.shape
    )


def _cross_entropy(program: Program, made: Objective, found: Classes, *, labelled: bool) -> None:
    """p - target with labels; sqrt(p) e - p (sqrt(p) . e) without."""
    z = program.value(found.logits)
    e, axis = program.e, found.axis
    # Shifted by the maximum: the exponential must not overflow.
    shape = tuple(1 if a == axis else n for a, n in enumerate(z.shape))
    if e.opset < 18:
        top = e.op("ReduceMax", [z], shape, axes=[axis], keepdims=1)
    else:
        top = e.op("ReduceMax", [z, e.integers([axis])], shape, keepdims=1)
    raised = (z - top).apply("Exp")
    p = raised / raised.sum([axis])
    if labelled:
        made.classes = found
        made.seeds[found.logits] = p - program.seed(TARGETS, z.shape)
        return
    made.signs[SIGNS] = found.logits
    drawn = p.apply("Sqrt") * program.seed(SIGNS, z.shape)
    made.seeds[found.logits] = drawn - p * drawn.sum([axis])


def classes_of(output: Tensor, *, certain: bool) -> Classes | None:
    """The class scores behind an output.

    Args:
        output: An output of the model.
        certain: It is known to hold classes: along the last axis, unless a softmax says otherwise.
    """
    tensor = output
    while tensor.producer is not None and tensor.producer.op_type in ("Identity", "Cast", "Join"):
        source = tensor.producer.inputs[0]
        if source is None or not _is_real(source):
            break
        tensor = source
    op, rank = tensor.producer, len(tensor.shape or ())
    if op is not None and op.op_type in ("Softmax", "LogSoftmax") and op.inputs[0] is not None:
        axis = int(op.attributes.get("axis", 1 if op.version < 13 else -1)) % rank
        flat = op.version < 13 and prod((tensor.shape or ())[axis + 1 :]) != 1
        return None if flat or rank < 2 else Classes(op.inputs[0], axis)
    if rank < 2 or (tensor.shape or ())[-1] < 2:
        return None
    return Classes(tensor, rank - 1) if certain or (rank == 2 and _is_weighted(tensor)) else None


def _is_weighted(tensor: Tensor) -> bool:
    """True if a tensor comes straight from a layer with weights."""
    while (op := tensor.producer) is not None:
        if _contracts_weights(op):
            return True
        sources = [t for t in op.inputs if t is not None and not t.constant and t.data is None]
        if op.op_type not in _PASSING or len(sources) != 1:
            return False
        tensor = sources[0]
    return False


def _contracts_weights(op: Op) -> bool:
    flows = flows_of(op)
    if isinstance(flows, Refusal):
        return False
    for flow in flows:
        if isinstance(flow, SignatureFlow):
            for view in flow.signature.views:
                weight = None if view.is_output else op.inputs[view.slot]
                if weight is not None and weight.constant and len(weight.shape or ()) > 1:
                    if any(flow.signature.role(name) is Role.CONTRACTED for name in view.factors):
                        return True
    return False
