"""Channel permutations: before a weight is made N:M sparse, its channels are put into an order that loses less.

The channels of a class (:mod:`graphprune.sparsity.exchange`) stand in one order everywhere, so that all weights that
sum over them are scored together. What is moved with them costs nothing: no op is added, every constant that bears
their labels is stored in the new order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.axes.analysis import Analysis, weight_views
from graphprune.axes.flow import SignatureFlow
from graphprune.axes.labels import Labels, varying_axes
from graphprune.axes.members import own_axis, rows_of
from graphprune.axes.signature import Role
from graphprune.constants import ConstantChanges
from graphprune.errors import PlanError
from graphprune.graph import Op, Tensor
from graphprune.graph.evaluate import evaluate_constant
from graphprune.kernels.permutation import kept_of, search_permutation
from graphprune.model.splice import Splicer
from graphprune.model.stream import release_all
from graphprune.network import Network
from graphprune.rules.registry import Refusal
from graphprune.sparsity.exchange import Exchange, exchange_classes, functions_bearing
from graphprune.sparsity.pattern import NM

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float32]
Progress = Callable[[float], None]
#: What makes the importance of each element of a weight, as an op reads it: same shape, not negative, or None for its
#: magnitude.
Scores = Callable[["Reading"], "Array | None"]
#: Labels, and those whose elements come to their places.
Orders = list[tuple[Labels, Labels]]

#: A class is searched on so many elements of its weights at most; of larger ones on rows drawn at random.
MOST_ELEMENTS = 1 << 26
#: Least time for one class, in seconds.
LEAST_SECONDS = 0.02


@dataclass(frozen=True, eq=False)
class Reading:
    """A constant that an op sums over along an axis.

    Attributes:
        op: The op.
        tensor: The constant as the op reads it, behind a Transpose of what is stored, say.
        axis: The axis that is summed over: groups of M run along it.
        labels: A labelling of the tensor whose own axis that is.
    """

    op: Op
    tensor: Tensor
    axis: int
    labels: Labels

    @property
    def stored(self) -> ir.Value | None:
        """What the model stores: ``tensor``, or what a Transpose, Cast or DequantizeLinear makes it of."""
        tensor = self.tensor
        while (
            tensor.producer is not None and tensor.producer.inputs and tensor.producer.inputs[0] is not None
        ):
            tensor = tensor.producer.inputs[0]
        return tensor.value


def find_readings(analysis: Analysis) -> list[Reading]:
    """All constants that ops sum over, one entry for each labelling along the axis, in the order of the graph."""
    found = []
    for op, flows in zip(analysis.graph.ops, analysis.flows, strict=True):
        if isinstance(flows, Refusal):
            continue
        for flow in flows:
            if not isinstance(flow, SignatureFlow):
                continue
            for view, tensor in weight_views(op, flow.signature):
                for labels in analysis.labellings(tensor):
                    spread = flow.spread(view, labels)
                    varying = () if spread is None else varying_axes(spread)
                    if not varying:
                        continue
                    factor = view.factors[varying[-1]]
                    if flow.signature.role(factor) is Role.CONTRACTED or factor in view.summed:
                        found.append(Reading(op, tensor, own_axis(labels), labels))
    return found


@dataclass(frozen=True, eq=False)
class _Columns:
    """Where the labels of one class lie in the rows of a constant.

    Attributes:
        reading: The constant.
        contexts: Which of the labelling's rows; all bear the labels at the same positions.
        positions: int64 ``[occurrences, slots]``: positions along the contracted axis.
    """

    reading: Reading
    contexts: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]


@dataclass(eq=False)
class Stripes:
    """A class of channels that may be permuted, and the weights that gain by it.

    Attributes:
        name: The coupling group that it belongs to.
        labels: The labels, int32 ``[slots]``, a multiple of M: each M of them fill a group of M in every weight below.
        columns: Where they lie.
    """

    name: str
    labels: Labels
    columns: list[_Columns] = field(default_factory=list)

    @property
    def weights(self) -> list[str]:
        """Names of the constants."""
        return list(dict.fromkeys(columns.reading.tensor.name for columns in self.columns))


def find_stripes(network: Network, m: int, wanted: Callable[[Reading], bool] | None = None) -> list[Stripes]:
    """All classes with a choice: two groups of ``m`` and more that some weight is contracted over.

    Where weights bear the labels of a class in groups of different composition, the composition that most elements are
    in counts; the others are carried along.

    Args:
        network: The analysed model.
        m: Size of the groups.
        wanted: Which weights are to become sparse; all by default. The others are carried along.
    """
    analysis = network.analysis
    classes = exchange_classes(analysis)
    class_of = np.full(len(analysis.atoms), -1, dtype=np.int64)
    for number, labels in enumerate(classes):
        class_of[labels] = number
    groups: list[dict[tuple[int, ...], int]] = [{} for _ in classes]
    held: list[list[tuple[Reading, npt.NDArray[np.int64], Labels]]] = [[] for _ in classes]
    for reading in find_readings(analysis):
        if wanted is not None and not wanted(reading):
            continue
        shape = reading.tensor.shape or ()
        rows = rows_of(reading.labels, reading.axis)
        outputs = prod(shape) // max(rows.size, 1)
        for row, contexts in _distinct(rows):
            whole = row[: len(row) // m * m].reshape(-1, m)
            kinds = class_of[whole]
            alike = np.flatnonzero((kinds[:, 0] >= 0) & (kinds == kinds[:, :1]).all(axis=1))
            for members in np.sort(whole[alike], axis=1):
                if (members[1:] != members[:-1]).all():
                    number = int(class_of[members[0]])
                    key = tuple(members.tolist())
                    groups[number][key] = groups[number].get(key, 0) + outputs * len(contexts)
            for number in np.unique(kinds[alike, 0]).tolist():
                held[number].append((reading, contexts, row))
    found = []
    for number, labels in enumerate(classes):
        slots = _compatible(groups[number], labels)
        if len(slots) < 2 * m:
            continue
        stripes = Stripes("", slots)
        chosen = {tuple(sorted(part)) for part in slots.reshape(-1, m).tolist()}
        for reading, contexts, row in held[number]:
            positions = _positions(row, slots)
            filled = positions[:, ::m] // m
            grouped = (positions.reshape(len(positions), -1, m) // m == filled[:, :, None]).all(axis=2)
            useful = grouped.any(axis=1)
            if useful.any() and chosen:
                stripes.columns.append(_Columns(reading, contexts, positions[useful]))
        if stripes.columns:
            found.append(stripes)
    _name(network, found)
    return found


def _distinct(rows: Labels) -> Iterator[tuple[Labels, npt.NDArray[np.int64]]]:
    """Each distinct row, and where it stands."""
    places: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(row.tobytes(), []).append(index)
    for indices in places.values():
        yield rows[indices[0]], np.asarray(indices, dtype=np.int64)


def _compatible(groups: dict[tuple[int, ...], int], labels: Labels) -> Labels:
    """Groups that do not overlap, those with most elements first; their labels, group by group."""
    taken: set[int] = set()
    chosen: list[tuple[int, ...]] = []
    for members in sorted(groups, key=lambda key: -groups[key]):
        if taken.isdisjoint(members):
            taken.update(members)
            chosen.append(members)
    place = {label: index for index, label in enumerate(labels.tolist())}
    chosen = sorted(
        (tuple(sorted(part, key=place.__getitem__)) for part in chosen), key=lambda part: place[part[0]]
    )
    return np.asarray([label for part in chosen for label in part], dtype=np.int32)


def _positions(row: Labels, labels: Labels) -> npt.NDArray[np.int64]:
    """Where in a row each label lies, int64 ``[occurrences, labels]``; all lie there equally often."""
    order = np.argsort(row, kind="stable")
    begins = np.searchsorted(row[order], labels)
    count = int(np.searchsorted(row[order], labels[0], side="right") - begins[0])
    return np.asarray(order[begins + np.arange(count)[:, None]], dtype=np.int64)


def _name(network: Network, found: Sequence[Stripes]) -> None:
    owner = np.full(len(network.analysis.atoms), -1, dtype=np.int64)
    for number, group in enumerate(network.groups):
        owner[group.labels] = number
    by_group: dict[int, list[Stripes]] = {}
    for stripes in found:
        by_group.setdefault(int(owner[stripes.labels[0]]), []).append(stripes)
    for number, parts in by_group.items():
        name = network.groups[number].name
        for index, stripes in enumerate(parts, 1):
            stripes.name = name if len(parts) == 1 else f"{name}/{index}"


# -- scores ---------------------------------------------------------------------------------------------------------


def _contexts(reading: Reading) -> int:
    shape: tuple[int, ...] = reading.labels.shape
    return prod(shape) // shape[reading.axis]


class _Importance:
    """Matrices of scores, class by class; one weight is held at a time."""

    def __init__(self, scores: Scores | None, seed: int) -> None:
        self._scores = scores
        self._seed = seed
        self._held: tuple[Reading | None, Matrix] = (None, np.zeros((0, 0), dtype=np.float32))

    def matrix(self, stripes: Stripes) -> Matrix:
        """Scores of a class, float32 ``[rows, slots]``: a row for each output, kernel position and repetition."""
        counts = [self._count(columns) for columns in stripes.columns]
        part = min(1.0, MOST_ELEMENTS / max(sum(counts) * len(stripes.labels), 1))
        random = np.random.default_rng(self._seed)
        blocks = []
        for columns in stripes.columns:
            rows = self._rows(columns)
            if part < 1:
                rows = rows[np.sort(random.permutation(len(rows))[: max(int(part * len(rows)), 1)])]
            blocks += [rows[:, positions] for positions in columns.positions]
        return np.concatenate(blocks)

    @staticmethod
    def _count(columns: _Columns) -> int:
        reading = columns.reading
        shape = reading.tensor.shape or ()
        outputs = prod(shape) // max(_contexts(reading) * shape[reading.axis], 1)
        return outputs * len(columns.contexts) * len(columns.positions)

    def _rows(self, columns: _Columns) -> Matrix:
        """The scores of some contexts, float32 ``[outputs, contracted axis]``."""
        reading = columns.reading
        held, whole = self._held
        if held is None or held.tensor is not reading.tensor or held.op is not reading.op:
            whole = self._whole(reading)
            self._held = reading, whole
        shape = [size for axis, size in enumerate(reading.tensor.shape or ()) if axis != reading.axis]
        varying = [size for axis, size in enumerate(reading.labels.shape) if axis != reading.axis]
        if len(columns.contexts) == prod(varying):
            return whole
        chosen = np.zeros(prod(varying), dtype=bool)
        chosen[columns.contexts] = True
        part: Matrix = whole[np.broadcast_to(chosen.reshape(varying), shape).ravel()]
        return part

    def _whole(self, reading: Reading) -> Matrix:
        given = None if self._scores is None else self._scores(reading)
        array = evaluate_constant(reading.tensor) if given is None else given
        last = np.moveaxis(np.asarray(array), reading.axis, -1)
        rows: Matrix = np.abs(last.reshape(-1, last.shape[-1]).astype(np.float32))
        rows[~np.isfinite(rows)] = 0  # what is not finite decides nothing
        return rows


# -- search ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassReport:
    """What a permutation did for one class of channels.

    Attributes:
        name: The coupling group.
        channels: How many channels were put in order.
        weights: The weights that are contracted over them.
        unpermuted, permuted: The sum of the scores that an N:M mask keeps of these weights, before and after.
        bound: What the same number of elements can hold, wherever they lie.
        total: The sum of all scores.
        seconds: Time spent on the search.
    """

    name: str
    channels: int
    weights: tuple[str, ...]
    unpermuted: float
    permuted: float
    bound: float
    total: float
    seconds: float

    @property
    def recovered(self) -> float:
        """The part of the gap between the unpermuted mask and the bound that was closed."""
        gap = self.bound - self.unpermuted
        return (self.permuted - self.unpermuted) / gap if gap > 0 else 0.0


def find_orders(
    network: Network,
    pattern: NM,
    *,
    seconds: float | None = 30.0,
    sweeps: int | None = None,
    seed: int = 0,
    scores: Scores | None = None,
    stripes: Sequence[Stripes] | None = None,
    progress: Progress | None = None,
) -> tuple[Orders, list[ClassReport]]:
    """Search an order of the channels of every class in which an N:M mask keeps more.

    Args:
        network: The analysed model.
        pattern: The pattern.
        seconds: Time for all searches; each class gets a share by what it could gain.
        sweeps: Limit of the sweeps of each search; with ``seconds=None`` the result depends on ``seed`` only.
        seed: For the searches.
        scores: Importance of weights; by default their magnitude.
        stripes: What :func:`find_stripes` found, where that is known.
        progress: Called with the fraction that is done.

    Returns:
        The orders, and a report on each class.
    """
    n, m, begin = pattern.n, pattern.m, time.perf_counter()
    found = find_stripes(network, m) if stripes is None else list(stripes)
    importance = _Importance(scores, seed)
    limits = []
    for each in found:
        matrix = importance.matrix(each)
        release_all(network.model)
        limits.append((_kept(matrix, n, m), _bound(matrix, n, m), float(matrix.sum(dtype=np.float64))))
    gaps = np.asarray([max(bound - kept, 0.0) for kept, bound, _ in limits])
    parts = gaps / max(float(gaps.sum()), 1e-30)
    orders: Orders = []
    reports: list[ClassReport] = []
    for number, each in enumerate(found):
        kept, bound, total = limits[number]
        start = time.perf_counter()
        matrix = importance.matrix(each)
        order, permuted = search_permutation(
            matrix,
            n,
            m,
            seconds=None if seconds is None else _share(seconds - (start - begin), gaps[number:]),
            sweeps=sweeps,
            seed=seed + number,
            progress=None if progress is None else _part(progress, parts[:number].sum(), parts[number]),
        )
        orders.append((each.labels, each.labels[order]))
        release_all(network.model)
        took = time.perf_counter() - start
        names = tuple(each.weights)
        reports.append(ClassReport(each.name, len(order), names, kept, permuted, bound, total, took))
    if progress is not None:
        progress(1.0)
    return orders, reports


def _share(seconds: float, gaps: npt.NDArray[np.float64]) -> float:
    """The first class' share of the time that is left, by what each could gain at most."""
    return max(seconds * float(gaps[0]) / max(float(gaps.sum()), 1e-30), LEAST_SECONDS)


def _part(progress: Progress, begin: float, share: float) -> Progress:
    return lambda done: progress(float(begin + share * done))


def _kept(matrix: Matrix, n: int, m: int) -> float:
    return float(kept_of(np.ascontiguousarray(matrix.T), np.arange(matrix.shape[1]).reshape(-1, m), n).sum())


def _bound(matrix: Matrix, n: int, m: int) -> float:
    count = matrix.size * n // m
    flat = matrix.ravel()
    return float(np.partition(flat, flat.size - count)[flat.size - count :].sum(dtype=np.float64))


def apply_orders(network: Network, orders: Orders) -> Exchange:
    """Put channels into their orders, in place: every constant that bears their labels is stored anew.

    The network's analysis remembers contents of before: analyse the model again where they are needed.
    Large weights are reordered when they are read. Uses of one initializer that need different orders get initializers
    of their own.

    Args:
        network: The analysed model, which is changed.
        orders: Pairs of labels and those whose elements come to their places, each pair of one exchange class.

    Returns:
        What was done to every tensor.

    Raises:
        PlanError: Labels were to be exchanged that cannot be, or a constant lies in a function that must be inlined
            first (:func:`graphprune.sparsity.exchange.functions_bearing`).
    """
    exchange = Exchange(network.analysis, orders)
    functions = functions_bearing(network.analysis, exchange.moving)
    if functions:
        names = ", ".join(sorted(name for _, name, _ in functions))
        raise PlanError(f"constants inside functions would change places; inline {names} first")
    splice = Splicer(network.analysis.graph.model)
    constants = ConstantChanges(network.analysis, splice, exchange.of, "permuted")
    constants.run()
    splice.remove_unread(constants.loose)
    return exchange
