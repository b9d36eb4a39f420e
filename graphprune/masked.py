"""The masked original: what the pruned model must equal.

Masked means that whatever reads a removed position reads zeros there: every op that sums over a cut factor gets its
operands masked at the removed positions. (Zeroing what *makes* a removed channel would not do: sigmoid(0) is 0.5.)
An op that normalises over a cut factor is run on what is kept, and its result is spread out again: that is the
original with its statistics taken over the kept positions.

Masks can be switched off at run time, so that one model is both the original and its masked form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import onnx_ir as ir

from graphprune.axes.analysis import Analysis
from graphprune.axes.flow import Operand, SignatureFlow
from graphprune.axes.labels import Labels, varying_axes
from graphprune.axes.signature import Role
from graphprune.errors import VerificationError
from graphprune.graph import Op, Tensor
from graphprune.kernels.box import Mask, combined, separable
from graphprune.model.splice import Splicer, base_name
from graphprune.plan import Masks
from graphprune.rewrite import Edits
from graphprune.rules.registry import Refusal, tensor_at

#: Name of the added input: true switches all masks off.
SWITCH = "graphprune_unmasked"

#: The opset that brought Where; before, masks are factors.
WHERE_SINCE = 9

#: Where quantised ops keep the zero point of a weight: a masked weight is the zero point, not zero.
_ZERO_POINTS = {
    ("", "QLinearConv", 3): 5,
    ("", "QLinearMatMul", 3): 5,
    ("", "ConvInteger", 1): 3,
    ("", "MatMulInteger", 1): 3,
}


def mask_model(
    model: ir.Model,
    node_of: Mapping[Op, ir.Node],
    analysis: Analysis,
    masks: Masks,
    edits: Mapping[ir.Node, Edits],
) -> None:
    """Turn ``model`` into the masked original, in place.

    Args:
        model: A copy of the original.
        node_of: Its node for each op of the twin.
        analysis: The analysis that the plan was made on.
        masks: What the plan leaves.
        edits: What rewriting does to each node of the twin's model: normalising ops get the same attributes here.
    """
    masker = _Masker(model, masks)
    for op in analysis.graph.ops:
        node = node_of.get(op)
        flows = analysis.flows[op.index]
        if node is None or isinstance(flows, Refusal) or op.domain == "graphprune":
            continue
        signatures = [flow for flow in flows if isinstance(flow, SignatureFlow)]
        if any(masker.is_statistical(op, flow) for flow in signatures):
            masker.compact(op, node, edits.get(op.node) if op.node is not None else None)
        else:
            for flow in signatures:
                masker.mask_operands(op, flow, node)


def own_factors(
    analysis: Analysis, op: Op, flow: SignatureFlow, operand: Operand
) -> Iterator[tuple[str, Labels]]:
    """For each labelling of an operand the factor along which it varies, with ``^`` if the op sums over it there."""
    tensor = tensor_at(op, operand)
    for labels in analysis.labellings(tensor) if tensor is not None else ():
        for view in flow.signature.views:
            if (view.is_output, view.slot) != operand:
                continue
            spread = flow.to_factors(analysis.atoms, view, labels, op.name)
            if spread is not None and (varying := varying_axes(spread)):
                own = view.factors[varying[-1]]
                yield (own + "^" if own in view.summed else own), labels


class _Masker:
    def __init__(self, model: ir.Model, masks: Masks) -> None:
        self._masks = masks
        self._splice = Splicer(model)
        self._opset = model.opset_imports.get("", WHERE_SINCE)
        self._switch = ir.Value(name=SWITCH, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(()))
        model.graph.inputs.append(self._switch)

    def is_statistical(self, op: Op, flow: SignatureFlow) -> bool:
        """True if the op normalises over a factor that loses positions."""
        return any(
            flow.signature.role(own) is Role.NORMALISED
            for view in flow.signature.views
            for own, _ in self._cut_factors(op, flow, Operand(view.is_output, view.slot))
        )

    def _cut_factors(self, op: Op, flow: SignatureFlow, operand: Operand) -> list[tuple[str, Mask]]:
        """For each labelling of an operand that loses something: the factor that it cuts, and what it keeps."""
        tensor = tensor_at(op, operand)
        if tensor is None or not self._masks.parts(tensor):
            return []
        return [
            (own, kept)
            for own, labels in own_factors(self._masks.analysis, op, flow, operand)
            if not (kept := self._masks.kept(labels)).all()
        ]

    def mask_operands(self, op: Op, flow: SignatureFlow, node: ir.Node) -> None:
        """Zero what the op sums over and the plan removes.

        A product with zero is zero, whichever operand is: a weight is masked only for the factors for which no
        activation can be, so that weights need not be copied. A vector may be a bias that the op adds to an activation
        before it sums (com.microsoft's MultiHeadAttention), and costs nothing to mask.
        """
        cuts: dict[int, dict[str, Mask]] = {}
        for slot, tensor in enumerate(op.inputs):
            for name, kept in self._cut_factors(op, flow, Operand(False, slot)) if tensor is not None else ():
                if name.endswith("^"):
                    masks = cuts.setdefault(slot, {})
                    masks[name] = masks[name] & kept if name in masks else kept
        quantised = any((op.domain, op.op_type, slot) in _ZERO_POINTS for slot in range(len(op.inputs)))
        by_activations = {
            name
            for slot, masks in cuts.items()
            for name in masks
            if not quantised and (tensor := op.inputs[slot]) is not None and not tensor.constant
        }
        for slot, masks in cuts.items():
            tensor = op.inputs[slot]
            if tensor is None:
                continue
            matrix = tensor.constant and len(tensor.shape or ()) > 1
            needed = [m for name, m in masks.items() if not (matrix and name in by_activations)]
            if needed:
                self._mask(op, node, slot, tensor, combined(needed))

    def _mask(self, op: Op, node: ir.Node, slot: int, tensor: Tensor, mask: Mask) -> None:
        value = node.inputs[slot]
        if value is None:
            return
        base = f"{base_name(node)}_mask"
        zero_slot = _ZERO_POINTS.get((op.domain, op.op_type, slot))
        quantised = any((op.domain, op.op_type, s) in _ZERO_POINTS for s in range(len(op.inputs)))
        if quantised and zero_slot is None:
            return  # the weight's mask is enough, and this operand's zero point need not be zero
        zero = node.inputs[zero_slot] if zero_slot is not None and zero_slot < len(node.inputs) else None
        if zero is None:
            # Where inference left the operand's type open, what it is multiplied with has the same.
            dtype = next(
                (t.dtype for t in (tensor, *op.inputs) if t is not None and t.dtype is not None), None
            )
            if dtype is None:
                raise VerificationError(f"{op.name!r}: an operand has no type, so that it cannot be masked")
            zero = self._splice.constant(node, base, np.zeros((), dtype=dtype.numpy()))
        elif (zero_tensor := op.inputs[zero_slot or 0]) is not None and len(zero_tensor.shape or ()) == 1:
            if (zero_tensor.shape or (0,))[0] > 1:
                column = op.op_type in ("QLinearConv", "ConvInteger")
                shape = [-1] + [1] * (len(tensor.shape or ()) - 1) if column else [1, -1]
                target = self._splice.integers(node, base, shape)
                zero = self._splice.insert(node, "Reshape", [zero, target], like=zero)
        keep = self._splice.constant(node, base, mask)
        either = self._splice.insert(node, "Or", [keep, self._switch], like=self._switch)
        if self._opset < WHERE_SINCE:
            factor = self._splice.insert(node, "Cast", [either], {"to": int(tensor.dtype or 1)}, like=value)
            node.replace_input_with(slot, self._splice.insert(node, "Mul", [value, factor], like=value))
            return
        node.replace_input_with(slot, self._splice.insert(node, "Where", [either, value, zero], like=value))

    # -- statistics ---------------------------------------------------------------------------------------------

    def compact(self, op: Op, node: ir.Node, edit: Edits | None) -> None:
        """Run the op on what is kept beside the op itself, and let the switch choose."""
        if self._opset < WHERE_SINCE:
            raise VerificationError(
                f"{op.kind} {op.name!r} normalises over a cut axis, which cannot be masked in opset {self._opset};"
                f" convert the model to opset {WHERE_SINCE} or newer"
            )
        inputs: list[ir.Value | None] = []
        for slot, value in enumerate(node.inputs):
            tensor = op.inputs[slot] if slot < len(op.inputs) else None
            mask = self._masks.mask(tensor) if tensor is not None else None
            if value is None or tensor is None or mask is None:
                inputs.append(value)
            else:
                inputs.append(self._gather(node, value, tensor, mask))
        attributes = dict(node.attributes)
        if edit is not None:
            attributes.update({n: ir.convenience.convert_attribute(n, v) for n, v in edit.attributes.items()})
            for slot, array in edit.constants.items():
                inputs += [None] * (slot + 1 - len(inputs))
                inputs[slot] = self._splice.constant(node, f"{base_name(node)}_literal", array)
        twin = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            attributes=list(attributes.values()),
            num_outputs=len(node.outputs),
            name=self._splice.fresh(f"{base_name(node)}_kept"),
            overload=node.overload,
            version=node.version,
        )
        graph = self._splice.graph_of(node)
        graph.insert_after(node, twin)
        last = twin
        for slot, (old, new) in enumerate(zip(node.outputs, twin.outputs, strict=True)):
            new.name = self._splice.fresh(f"{base_name(node)}_kept_{slot}")
            new.type = old.type
            readers = list(old.uses())
            tensor = op.outputs[slot] if slot < len(op.outputs) else None
            if tensor is None or not (readers or old.is_graph_output()):
                continue
            mask = self._masks.mask(tensor)
            anchor = _Anchor(self._splice, last)
            spread = new if mask is None else self._spread(anchor, new, tensor, mask)
            chosen = self._choose(anchor, old, spread)
            for reader, index in readers:
                reader.replace_input_with(index, chosen)
            for position, output in enumerate(graph.outputs):
                if output is old:
                    graph.outputs[position] = chosen
                    old.name, chosen.name = self._splice.fresh(f"{old.name}_unmasked"), old.name
            last = anchor.node

    def _choose(self, anchor: _Anchor, old: ir.Value, spread: ir.Value) -> ir.Value:
        """``old`` where the switch is on, else ``spread``."""
        if old.dtype != ir.DataType.BOOL:
            return anchor.insert("Where", [self._switch, old, spread], like=old)
        # ONNX Runtime has no Where for bools.
        off = anchor.insert("Not", [self._switch], like=self._switch)
        parts = [
            anchor.insert("And", [switch, value], like=old)
            for switch, value in ((self._switch, old), (off, spread))
        ]
        return anchor.insert("Or", parts, like=old)

    def _region(self, tensor: Tensor, mask: Mask) -> tuple[int, int]:
        """First and last axis on which a mask depends."""
        axes = [axis for axis, size in enumerate(mask.shape) if size > 1]
        return axes[0], axes[-1]

    def _gather(self, node: ir.Node, value: ir.Value, tensor: Tensor, mask: Mask) -> ir.Value:
        base = f"{base_name(node)}_kept"
        factors = separable(mask)
        if factors is not None:
            for axis, factor in enumerate(factors):
                if not factor.all():
                    index = self._splice.integers(node, base, np.flatnonzero(factor).tolist())
                    value = self._splice.insert(node, "Gather", [value, index], {"axis": axis}, like=value)
            return value
        first, last = self._region(tensor, mask)
        shape, new = tensor.shape or (), self._masks.shape(tensor)
        flat = np.broadcast_to(mask, [s if first <= a <= last else 1 for a, s in enumerate(shape)]).ravel()
        joined = [0] * first + [prod(shape[first : last + 1]), *shape[last + 1 :]]
        split = [0] * first + [*new[first : last + 1], *shape[last + 1 :]]
        value = self._splice.insert(
            node, "Reshape", [value, self._splice.integers(node, base, joined)], like=value
        )
        index = self._splice.integers(node, base, np.flatnonzero(flat).tolist())
        value = self._splice.insert(node, "Gather", [value, index], {"axis": first}, like=value)
        return self._splice.insert(
            node, "Reshape", [value, self._splice.integers(node, base, split)], like=value
        )

    def _spread(self, anchor: _Anchor, value: ir.Value, tensor: Tensor, mask: Mask) -> ir.Value:
        """Back to the original positions; what stands at removed ones does not matter, and is the first kept one."""
        factors = separable(mask)
        if factors is not None:
            for axis, factor in enumerate(factors):
                if not factor.all():
                    index = np.where(factor, np.cumsum(factor) - 1, 0)
                    value = anchor.insert(
                        "Gather", [value, anchor.integers(index.tolist())], {"axis": axis}, like=value
                    )
            return value
        first, last = self._region(tensor, mask)
        shape, new = tensor.shape or (), self._masks.shape(tensor)
        flat = np.broadcast_to(mask, [s if first <= a <= last else 1 for a, s in enumerate(shape)]).ravel()
        joined = [0] * first + [prod(new[first : last + 1]), *shape[last + 1 :]]
        split = [0] * first + list(shape[first:])
        value = anchor.insert("Reshape", [value, anchor.integers(joined)], like=value)
        index = np.where(flat, np.cumsum(flat) - 1, 0)
        value = anchor.insert("Gather", [value, anchor.integers(index.tolist())], {"axis": first}, like=value)
        return anchor.insert("Reshape", [value, anchor.integers(split)], like=value)


class _Anchor:
    """Appends nodes one behind the other."""

    def __init__(self, splice: Splicer, node: ir.Node) -> None:
        self._splice = splice
        self.node = node

    def insert(
        self,
        op_type: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        attributes: Mapping[str, int] | None = None,
        *,
        like: ir.Value,
    ) -> ir.Value:
        value = self._splice.insert(self.node, op_type, inputs, attributes, like=like, after=True)
        producer = value.producer()
        assert producer is not None
        self.node = producer
        return value

    def integers(self, values: list[int]) -> ir.Value:
        return self._splice.integers(self.node, f"{base_name(self.node)}_index", values)
