"""N:M masks chosen by what a network's inputs look like, and the weights that stay fitted to what it gave before.

Front to back (:class:`graphprune.repair.refit.FrontToBack`): a weight is pruned on the inputs that it gets once those
before it are sparse, and what is left is fitted to what the original made of its own inputs, bias and residual stream
included.

Sources: Frantar and Alistarh, SparseGPT, ICML 2023; Sun et al., A simple and effective pruning approach for large
language models, ICLR 2024; Meng et al., ALPS, NeurIPS 2024, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.calibration import Array, Calibration
from graphprune.errors import ModelError, OptionError, SparsityError
from graphprune.graph import Op, Tensor
from graphprune.graph.twin import build_twin
from graphprune.kernels.alps import alps_mask
from graphprune.kernels.box import Mask
from graphprune.kernels.gram import GramAccumulator
from graphprune.kernels.masked_refit import masked_refit
from graphprune.kernels.refit import refit
from graphprune.kernels.sparsegpt import largest_of_groups, sparsegpt, wanda_scores
from graphprune.layers.contractions import Contraction, find_contraction
from graphprune.layers.weights import attributes_now
from graphprune.model import copy
from graphprune.model.inlining import inline, inlined
from graphprune.model.nodes import stored_tensor
from graphprune.repair.refit import FrontToBack, Layer, Pair
from graphprune.sparsity.masks import mask_of
from graphprune.sparsity.pattern import NM, Layout

Ints = npt.NDArray[np.int64]

#: Ways to choose which elements stay.
SELECTIONS = ("magnitude", "wanda", "sparsegpt", "alps")
#: Weight of the ridge toward the weights that were, relative to the mean diagonal of the Gram matrix.
DAMPING = 1e-2
#: Added to the diagonal of SparseGPT's Hessian, in the same unit: the paper's.
HESSIAN_DAMPING = 1e-2
#: Of conjugate gradients, where a weight is too large for a Cholesky factor for each output.
ITERATIONS = 100


@dataclass(frozen=True)
class Method:
    """How masks are chosen and what becomes of the rest.

    Attributes:
        selection: "magnitude"; "wanda" (magnitude times input); "sparsegpt"; "alps" (all groups at once, again and
            again: the best, a few seconds slower; it chooses only, so it wants a refit).
        refit: Fit what stays, and the biases, to what the original made; the choice then is among the weights that
            would fit best if all stayed.
        others: With ``refit``, also fit contractions that are to have no pattern; zeros that they hold stay.
        damping: Of the fit.
        hessian_damping: Of SparseGPT's Hessian.
    """

    selection: str = "alps"
    refit: bool = True
    others: bool = True
    damping: float = DAMPING
    hessian_damping: float = HESSIAN_DAMPING

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise OptionError(
                f"there is no way {self.selection!r} to choose weights; there are {', '.join(SELECTIONS)}"
            )
        if self.selection == "alps" and not self.refit:
            raise OptionError("alps says only which weights stay: it goes with a refit")

    @property
    def needs_inputs(self) -> bool:
        """False for what the weights alone decide."""
        return self.refit or self.selection != "magnitude"


@dataclass
class Reconstructed:
    """What became of one contraction.

    Attributes:
        weight: Name of the stored weight.
        node: The node's name.
        sparse: It was given the pattern; else it was only fitted to what is sparse before it.
        before: Squared error of its output relative to the variance of the original's, before it was touched: what
            comes from the layers before.
        after: The same after.
    """

    weight: str
    node: str
    sparse: bool
    before: float
    after: float


@dataclass
class ReconstructionReport:
    """What a reconstruction did.

    Attributes:
        layers: Contractions in the order of the graph.
        masks: For each weight its mask: bool, of the stored weight's shape.
        by_magnitude: (weight, reason) of those for which inputs could not be used.
    """

    layers: list[Reconstructed] = field(default_factory=list)
    masks: dict[ir.Value, Mask] = field(default_factory=dict)
    by_magnitude: list[tuple[ir.Value, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "layers": [
                {
                    "weight": e.weight,
                    "node": e.node,
                    "sparse": e.sparse,
                    "error_before": e.before,
                    "error_after": e.after,
                }
                for e in self.layers
            ],
            "by_magnitude": [{"weight": value.name, "reason": reason} for value, reason in self.by_magnitude],
        }


class _Whole:
    """Nothing was cut."""

    def parts(self, tensor: Tensor) -> list[Mask]:
        return []

    def mask(self, tensor: Tensor) -> Mask | None:
        return None

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        if tensor.shape is None:
            raise ModelError(f"the shape of {tensor.name!r} is not known")
        return tensor.shape


@dataclass(frozen=True)
class _Target:
    """A stored weight and the contraction that reads it.

    Attributes:
        value: What holds the weight.
        indices: Flat positions in the stored weight, in the shape in which the op reads it.
        groups: For each product of the contraction, ``[groups, m]`` its features; None for a weight that stays dense.
    """

    value: ir.Value
    indices: Ints
    groups: list[Ints] | None


class Reconstruction(FrontToBack):
    """Gives weights of a model an N:M pattern, in place."""

    def __init__(
        self,
        pair: Pair,
        weights: Mapping[ir.Value, Layout],
        pattern: NM,
        method: Method,
        calibration: Calibration,
        report: ReconstructionReport,
        *,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Find out which contraction reads which weight; weights that none does are pruned by magnitude at once.

        Args:
            pair: The model and its original.
            weights: Weights of the model, as they are contracted.
            pattern: What they are to hold.
            method: How.
            calibration: Inputs; labels are not needed.
            report: Is added to.
            seed: For the choice of rows.
            progress: Called with (contractions done, contractions in all).
        """
        super().__init__(pair, calibration, seed=seed, progress=progress)
        self.pattern = pattern
        self.method = method
        self.report = report
        self._layouts = weights
        self._targets: dict[Op, _Target] = {}
        self._find_targets()

    def _find_targets(self) -> None:
        reasons = dict.fromkeys(self._layouts, "no contraction of the main graph reads it")
        for op in self.pair.ops:
            contraction = find_contraction(op, attributes_now(op))
            if isinstance(contraction, Contraction):
                found = self._target(contraction)
                if isinstance(found, _Target):
                    self._targets[op] = found
                    reasons.pop(found.value, None)
                elif found is not None and found[0] in reasons:
                    reasons[found[0]] = found[1]
            elif contraction is not None and op.node is not None:
                for operand in op.node.inputs:
                    stored = None if operand is None else _stored(operand)
                    if stored is not None and stored[0] in reasons:
                        reasons[stored[0]] = contraction
        for value, reason in reasons.items():
            self._mask(value, reason)

    def _target(self, contraction: Contraction) -> _Target | tuple[ir.Value, str] | None:
        """The weight that a contraction reads; why it cannot be changed by inputs; None if it is computed."""
        op = contraction.op
        value = op.node.inputs[contraction.weight] if op.node is not None else None
        stored = None if value is None else _stored(value)
        if stored is None:
            return None
        value, indices, reason = stored
        if reason is not None:
            return value, reason
        if value not in self._layouts:
            return _Target(value, indices, None)
        groups = _groups(contraction, indices, self._layouts[value], self.pattern.m)
        if groups is None:
            return value, "its groups do not lie within single outputs"
        return _Target(value, indices, groups)

    def wants(self, op: Op) -> bool:
        """True if an op's weight is to be sparse, or to be fitted to what is."""
        target = self._targets.get(op)
        if target is None:
            return False
        return target.groups is not None or (self.method.refit and self.method.others)

    def skip(self, op: Op, reason: str) -> None:
        """Prune by magnitude what cannot be had otherwise."""
        target = self._targets.pop(op)
        if target.groups is not None:
            self._mask(target.value, reason)

    def _mask(self, value: ir.Value, reason: str) -> None:
        self.report.by_magnitude.append((value, reason))
        self.report.masks[value] = mask_by_magnitude(value, self._layouts[value], self.pattern)

    def solve(self, layer: Layer) -> None:
        """Choose what stays of a weight, and fit it."""
        target = self._targets[layer.contraction.op]
        matrices, biases, masks = [], [], []
        for number, gram in enumerate(layer.grams):
            matrix, bias = layer.matrices[number], layer.biases[number]
            if target.groups is None:
                mask: Mask = matrix != 0  # a zero that is there stays: it may be a pattern's
                matrix, shift = self._fitted(gram, matrix, bias, mask, layer.intercept)
            else:
                matrix, shift, mask = self._sparse(gram, matrix, bias, target.groups[number], layer.intercept)
            matrices.append(matrix)
            biases.append(bias if shift is None else shift)
            masks.append(mask)
        made, shifts = np.stack(matrices), np.stack(biases)
        if not self._store(layer, target, made, np.stack(masks)):
            self.skip(layer.contraction.op, "its fitted weights are beyond the range of its type")
            return
        if layer.place is not None and self.method.refit:
            self.weights.write_bias(layer.contraction, shifts, layer.place, layer.weight.dtype)
        self.report.layers.append(
            Reconstructed(
                target.value.name or "",
                layer.contraction.op.name,
                target.groups is not None,
                layer.error(layer.matrices, layer.biases),
                layer.error(made, shifts),
            )
        )

    def _sparse(
        self, gram: GramAccumulator, matrix: Array, bias: Array, groups: Ints, intercept: bool
    ) -> tuple[Array, Array | None, Mask]:
        """Weight, bias and mask of one product."""
        method, pattern = self.method, self.pattern
        if method.refit:
            matrix, _ = refit(gram, matrix, bias, intercept=intercept, damping=method.damping)
        if method.selection == "sparsegpt":
            # A bias that is fitted makes up for what the means of the inputs do.
            hessian = gram.moments(centred=intercept and method.refit).xx
            matrix, mask = sparsegpt(
                matrix, hessian, pattern.n, pattern.m, groups=groups, damping=method.hessian_damping
            )
        elif method.selection == "alps":
            mask = alps_mask(matrix, gram.moments(centred=intercept).xx, pattern.n, groups)
            matrix = np.where(mask, matrix, 0.0)
        else:
            scores = np.abs(matrix)
            if method.selection == "wanda":
                scores = wanda_scores(matrix, np.diagonal(gram.xx))
            mask = largest_of_groups(scores, pattern.n, groups)
            matrix = np.where(mask, matrix, 0.0)
        if not method.refit:
            return matrix, None, mask
        return *self._fitted(gram, matrix, bias, mask, intercept), mask

    def _fitted(
        self, gram: GramAccumulator, matrix: Array, bias: Array, mask: Mask, intercept: bool
    ) -> tuple[Array, Array | None]:
        """Weight and bias of one product, fitted within a mask."""
        damping = self.method.damping
        if mask.all():
            return refit(gram, matrix, bias, intercept=intercept, damping=damping)
        return masked_refit(
            gram, matrix, bias, mask, intercept=intercept, damping=damping, iterations=ITERATIONS
        )

    def _store(self, layer: Layer, target: _Target, matrices: Array, masks: Mask) -> bool:
        """Write a weight where it is stored; False if its type cannot hold it."""
        tensor = stored_tensor(target.value)
        assert tensor is not None
        old = tensor.numpy()
        mask = np.ones(old.size, dtype=bool)
        mask[target.indices.ravel()] = layer.contraction.form.restore(masks, layer.weight.shape).ravel()
        made = np.zeros(old.size, dtype=np.float64)
        made[target.indices.ravel()] = layer.restored(matrices).ravel()
        with np.errstate(over="ignore"):
            rounded = made.astype(old.dtype)
        if not np.isfinite(rounded.astype(np.float64)).all():
            return False
        rounded[~mask] = 0
        _write(target.value, rounded.reshape(old.shape))
        if target.groups is not None:
            self.report.masks[target.value] = mask.reshape(old.shape)
        return True


def mask_by_magnitude(value: ir.Value, layout: Layout, pattern: NM) -> Mask:
    """Leave the largest elements of each group of a stored weight; what stays, in the weight's shape."""
    tensor = stored_tensor(value)
    assert tensor is not None
    array = np.array(tensor.numpy())
    if tensor.dtype.is_floating_point() and np.isnan(array.astype(np.float32)).any():
        raise SparsityError(f"weight {value.name!r} holds NaN: its elements have no order")
    mask = mask_of(array.reshape(layout.shape), pattern, layout).reshape(array.shape)
    array[~mask] = 0
    _write(value, array)
    return mask


def _write(value: ir.Value, array: Array) -> None:
    """Replace a stored weight by one of the same type."""
    tensor = stored_tensor(value)
    assert tensor is not None
    made = ir.Tensor(array, dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)
    node = value.producer()
    if node is None:
        value.const_value = made
    else:
        node.attributes["value"] = ir.AttrTensor("value", made)


def _stored(value: ir.Value) -> tuple[ir.Value, Ints, str | None] | None:
    """What an operand is stored as: the value, its positions in the operand's shape, and why it cannot be changed.

    None where the operand is computed.
    """
    orders: list[Sequence[int] | None] = []
    reason: str | None = None
    while True:
        if len(list(value.uses())) + value.is_graph_output() > 1:
            reason = "it is read in several places"
        tensor = stored_tensor(value)
        if tensor is not None:
            if not tensor.dtype.is_floating_point():
                reason = reason or "it is stored as integers"
            break
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
            return None
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            reason = "it is quantised"
        elif node.op_type == "Transpose":
            order = node.attributes.get("perm")
            orders.append(None if order is None else order.as_ints())
        elif node.op_type not in ("Identity", "Cast", "CastLike"):
            return None
        value = node.inputs[0]
    indices = np.arange(tensor.size, dtype=np.int64).reshape(tuple(tensor.shape.numpy()))
    for axes in reversed(orders):
        indices = indices.transpose(axes)
    return value, indices, reason


def _groups(contraction: Contraction, indices: Ints, layout: Layout, m: int) -> list[Ints] | None:
    """For each product the features of each group of m; None where a group is no part of a column."""
    outer, channel, inner = np.unravel_index(contraction.form.arrange(indices), layout.shape)
    whole = layout.contracted // m
    keys = np.where(channel < whole * m, (outer * whole + channel // m) * layout.inner + inner, -1)
    found = []
    for product, channels in zip(keys, channel, strict=True):
        first = product[:, 0]
        order = np.lexsort((channels[:, 0], first))
        order = order[np.count_nonzero(first < 0) :]
        if len(order) % m:
            return None
        groups = order.reshape(-1, m)
        members = product[groups]  # [groups, m, outputs]
        tail = np.setdiff1d(np.arange(len(product)), order)
        if (members != members[:, :1]).any() or (members < 0).any() or (product[tail] >= 0).any():
            return None
        found.append(groups)
    return found


def reconstruct(
    model: ir.Model,
    weights: Mapping[ir.Value, Layout],
    pattern: NM,
    method: Method,
    calibration: Calibration | None = None,
    *,
    original: ir.Model | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ReconstructionReport:
    """Give weights of a model an N:M pattern.

    Args:
        model: Changed in place; functions are inlined where inputs are needed, which run through it piece by piece.
        weights: Stored weights of the model (initializers, or outputs of Constant nodes) and how each is contracted.
        pattern: What they are to hold; channels at the end that fill no group stay dense.
        method: How elements are chosen, and whether the rest is fitted.
        calibration: Inputs; not needed where magnitudes alone decide.
        original: The model whose outputs are wanted, node by node the same but for contents; by default ``model`` as it
            is.
        input_shapes: Sizes for inputs with dynamic dimensions.
        seed: For the choice of rows.
        progress: Called with (contractions done, contractions in all).

    Returns:
        What was done, with the masks.

    Raises:
        OptionError: The method needs inputs and there are none, or the pattern is of blocks.
        SparsityError: A weight holds NaN.
        ModelError: ``original`` is another network, or ONNX Runtime cannot run a piece of the model.
    """
    if pattern.block != (1, 1):
        raise OptionError(
            f"{pattern}: patterns are chosen and fitted by inputs for single weights, not for blocks"
        )
    if not method.needs_inputs:
        report = ReconstructionReport()
        for number, (value, layout) in enumerate(weights.items()):
            if progress is not None:
                progress(number, len(weights))
            report.masks[value] = mask_by_magnitude(value, layout, pattern)
        return report
    if calibration is None:
        raise OptionError(f"{method.selection}{' with a refit' if method.refit else ''} needs inputs")
    original = copy(model) if original is None else original
    report = ReconstructionReport()
    if model.functions:
        inside = {
            value
            for function in model.functions.values()
            for node in function.all_nodes()
            for value in node.outputs
        }
        for value in [value for value in weights if value in inside]:
            report.by_magnitude.append((value, "it is stored in a function"))
            report.masks[value] = mask_by_magnitude(value, weights[value], pattern)
        weights = {value: layout for value, layout in weights.items() if value not in report.masks}
        inline(model, {function.identifier() for function in model.functions.values()})
        original = inlined(original, {function.identifier() for function in original.functions.values()})
    nodes, others = list(model.graph.all_nodes()), list(original.graph.all_nodes())
    if [node.op_type for node in nodes] != [node.op_type for node in others]:
        raise ModelError("the model and its original do not have the same nodes")
    counterpart = dict(zip(nodes, others, strict=True))
    ops = build_twin(model, input_shapes).ops
    node_of = {op: counterpart[op.node] for op in ops if op.node in counterpart}
    pair = Pair(original, model, ops, node_of, _Whole())
    made = Reconstruction(pair, weights, pattern, method, calibration, report, seed=seed, progress=progress)
    made.run()
    return report
