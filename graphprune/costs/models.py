"""What a network costs as a function of its widths: multiply-accumulates, parameters, bytes.

Each is a constant and a sum of products of sizes, so that what a cut of one group saves is known at once for all its
levels: only the products that the group touches are worked out anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

from graphprune.cost import counted_ops, is_parameter, mac_terms, parameters
from graphprune.costs.widths import Floats, Indices, Kept, Widths
from graphprune.graph import Tensor

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphprune.axes.analysis import Analysis
    from graphprune.network import Network


@runtime_checkable
class CostModel(Protocol):
    """A cost that depends on how much each group keeps.

    Attributes:
        unit: What the numbers count: ``MACs``, ``parameters``, ``bytes``, ``J``, ``s``.
    """

    unit: str

    def total(self, kept: Kept) -> float:
        """The cost where group i keeps ``kept[i]`` of its ``unit`` equal parts.

        Raises:
            OptionError: ``kept`` does not fit the groups.
        """

    def saving(self, group: int, levels: Kept, kept: Kept) -> Floats:
        """What is saved when one group keeps each of ``levels`` instead of what ``kept`` says of it.

        Returns:
            float64 ``[number of levels]``; negative where a level is above what is kept.

        Raises:
            OptionError: ``kept`` does not fit the groups.
        """

    def describe(self) -> str:
        """One line for people: what is counted, and how."""


class Term(NamedTuple):
    """A product of sizes times a coefficient; ``extents`` are numbers of :attr:`Widths.extents`."""

    coefficient: float
    extents: tuple[int, ...]


class PolynomialCost:
    """A constant and a sum of products of sizes.

    Args:
        widths: Where the sizes come from; share one among the costs of a network.
        terms: The products.
        constant: What does not depend on any group.
    """

    unit = ""

    def __init__(self, widths: Widths, terms: Iterable[Term], constant: float = 0.0) -> None:
        self.widths = widths
        self.constant = constant
        # Layers repeat: equal products are one. What no group cuts goes to the constant.
        merged: dict[tuple[int, ...], float] = {}
        for coefficient, extents in terms:
            varying, fixed = [], coefficient
            for number in extents:
                if widths.extents[number].cells:
                    varying.append(number)
                else:
                    fixed *= widths.extents[number].size
            if varying:
                key = tuple(sorted(varying))
                merged[key] = merged.get(key, 0.0) + fixed
            else:
                self.constant += fixed
        self._table = widths.table()
        arity = max(map(len, merged), default=1)
        self._coefficients: Floats = np.array(list(merged.values()), dtype=np.float64)
        self._extents: Indices = np.array(
            [[*extents, *[0] * (arity - len(extents))] for extents in merged], dtype=np.intp
        ).reshape(len(merged), arity)

    @cached_property
    def _terms_of(self) -> list[Indices]:
        """For each group the terms that it touches."""
        by_extent: dict[int, list[int]] = {}
        for term, extents in enumerate(self._extents.tolist()):
            for number in dict.fromkeys(extents):
                by_extent.setdefault(number, []).append(term)
        found = []
        for group in range(len(self.widths.units)):
            hit = {t for number in self._table.changed_by(group).tolist() for t in by_extent.get(number, ())}
            found.append(np.array(sorted(hit), dtype=np.intp))
        return found

    def total(self, kept: Kept) -> float:
        """See :class:`CostModel`."""
        sizes = self._table.at(self.widths.checked(kept))
        return float(self.constant + (self._coefficients * sizes[self._extents].prod(axis=1)).sum())

    def saving(self, group: int, levels: Kept, kept: Kept) -> Floats:
        """See :class:`CostModel`."""
        kept = self.widths.checked(kept)
        terms = self._terms_of[group]
        if not len(terms):
            return np.zeros(len(levels))
        levels = np.append(np.asarray(levels, dtype=np.int64), kept[group])
        sizes = self._table.at_levels(group, levels, kept)
        costs = sizes[:, self._extents[terms]].prod(axis=2) @ self._coefficients[terms]
        return np.asarray(costs[-1] - costs[:-1], dtype=np.float64)

    def describe(self) -> str:
        """See :class:`CostModel`."""
        return f"{self.total(self.widths.full):,.0f} {self.unit}"


class MacsCost(PolynomialCost):
    """Multiply-accumulates at the twin's input sizes, as the ops' rules count them."""

    unit = "MACs"

    def __init__(self, network: Network, widths: Widths | None = None) -> None:
        widths = widths or Widths(network)
        super().__init__(widths, mac_products(widths))

    def describe(self) -> str:
        """See :class:`CostModel`."""
        return "multiply-accumulates of convolutions, matrix products, attention and recurrent layers"


def mac_products(widths: Widths) -> list[Term]:
    """The multiply-accumulates of all ops as products of sizes."""
    analysis = widths.network.analysis
    return [
        Term(1.0, tuple(widths.factors(op)[name] for name in names))
        for op in counted_ops(analysis)
        for names in mac_terms(op, analysis)
    ]


class ParametersCost(PolynomialCost):
    """Real and quantised weights that the model stores (as :func:`graphprune.cost.parameters` counts them)."""

    unit = "parameters"

    def __init__(self, network: Network, widths: Widths | None = None) -> None:
        widths = widths or Widths(network)
        weights = [tensor for tensor in stored_constants(network) if is_parameter(tensor.dtype)]
        super().__init__(widths, (Term(1.0, widths.axes(tensor)) for tensor in weights))
        # Whatever is not cut is there all the same: shape literals, bodies of subgraphs, weights that nothing reads.
        self.constant += parameters(network.model) - self.total(widths.full)

    def describe(self) -> str:
        """See :class:`CostModel`."""
        return "parameters that the model stores"


class BytesCost(PolynomialCost):
    """Bytes of the model in one file: what is stored of each constant, in its type, and a constant for all else."""

    unit = "bytes"

    def __init__(self, network: Network, widths: Widths | None = None) -> None:
        from graphprune.model import file_size

        widths = widths or Widths(network)
        super().__init__(
            widths, (Term(bytes_each(t), widths.axes(t)) for t in stored_constants(network) if bytes_each(t))
        )
        self.constant += file_size(network.model) - self.total(widths.full)

    def describe(self) -> str:
        """See :class:`CostModel`."""
        return "bytes of the model's file"


def bytes_each(tensor: Tensor) -> float:
    """Bytes that one element of a tensor takes; 0 where its type is unknown or has no fixed size."""
    if tensor.dtype is None or tensor.dtype.name in ("UNDEFINED", "STRING"):
        return 0.0
    return tensor.dtype.bitwidth / 8


def stored_constants(network: Network) -> Iterator[Tensor]:
    """The constants that the pruned model will store and a plan may cut, one tensor each.

    A stored value that several uses cut in different ways (small vectors only: exporters share equal biases) is left
    out: it takes no less after, as each use gets a value of its own.
    """
    analysis = network.analysis
    uses: dict[ir.Value, list[Tensor]] = {}
    for tensor in analysis.graph.tensors:
        if not tensor.constant or tensor.shape is None:
            continue
        if tensor.producer is None:
            if tensor.value is not None:
                uses.setdefault(tensor.value, []).append(tensor)
        elif (
            tensor in analysis.colourings
            and analysis.is_leaf(tensor.producer)
            and any(not analysis.is_leaf(op) for op, _ in tensor.uses)
        ):
            yield tensor  # computed from constants, and stored once it is cut
    for tensors in uses.values():
        if tensors[0] in analysis.colourings and all(
            _cut_alike(analysis, tensors[0], other) for other in tensors[1:]
        ):
            yield tensors[0]


def _cut_alike(analysis: Analysis, left: Tensor, right: Tensor) -> bool:
    """True if a plan removes the same of two uses of one value."""
    cuts = [
        {(a.shape, a.tobytes()) for a in analysis.labellings(tensor) if not analysis.atoms.all_frozen(a)}
        for tensor in (left, right)
    ]
    return cuts[0] == cuts[1]
