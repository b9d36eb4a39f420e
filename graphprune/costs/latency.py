"""Latency: what a cut saves of the time that a network takes in ONNX Runtime on this machine.

The network is run whole and kernel by kernel. Of each kernel it is then known how its time shrinks:

- a convolution, a matrix product, a recurrent layer: by a table of the op's times at several widths, measured alone,
  and interpolated linearly (in two directions where inputs and outputs are cut);
- whatever else is left after fusion (pooling, Concat, Softmax, ...) moves memory: what its time is above that of the
  cheapest kernel shrinks with the bytes that it reads and writes.

What lies between the kernels stays. So fusion is that of the real network, and the tables need only tell ratios.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from graphprune.cost import mac_terms
from graphprune.costs.attribution import Stem, name_nodes, stems_of
from graphprune.costs.cache import Cache, machine
from graphprune.costs.layers import Cut, Layer, layer_of
from graphprune.costs.models import PolynomialCost, Term, bytes_each
from graphprune.costs.timing import Feeds, Profile, profile, run_times, stored
from graphprune.costs.widths import Floats, Kept, Widths
from graphprune.errors import ModelError

if TYPE_CHECKING:
    from graphprune.network import Network

#: Times of a layer at points: float seconds, one a point.
Measurer: TypeAlias = Callable[[Layer, Sequence[tuple[int, ...]], int], list[float]]
#: Runs a network kernel by kernel, on inputs or random ones, with so many threads.
Profiler: TypeAlias = Callable[["Network", "Feeds | None", int], Profile]
Progress: TypeAlias = Callable[[int, int], None]

#: Seconds that measuring one layer at all its widths may take, and the most runs of them.
LAYER_SECONDS, LAYER_RUNS = 0.8, 40
#: Elements of all weights and inputs that are measured together.
CHUNK_ELEMENTS = 1 << 26
#: Runs of the whole network, and the seconds after which no more are begun.
NETWORK_RUNS, NETWORK_SECONDS = 40, 8.0


def measure_layer(layer: Layer, points: Sequence[tuple[int, ...]], threads: int) -> list[float]:
    """Seconds of a layer's kernel at each point: many points in one model, run in turn.

    Raises:
        ModelError: ONNX Runtime cannot run the op alone, or its kernels cannot be told.
    """
    times = [0.0] * len(points)
    for chunk in _chunks([layer.elements(point) for point in points]):
        try:
            model, feeds = layer.model([points[i] for i in chunk])
        except Exception as error:  # a type that NumPy or ONNX's helpers cannot hold
            raise ModelError(f"{layer.op.kind} {layer.op.name!r} cannot be timed alone: {error}") from error
        seen = profile(model, feeds, runs=LAYER_RUNS, seconds=LAYER_SECONDS, threads=threads, outputs=False)
        for kernel in seen.kernels:
            match = re.search(r"(?<![A-Za-z0-9])p(\d+)(?![A-Za-z0-9])", kernel.name)
            if match and int(match[1]) < len(chunk):
                times[chunk[int(match[1])]] += kernel.seconds
    if not all(times):
        raise ModelError(
            f"{layer.op.kind} {layer.op.name!r} cannot be timed alone: its kernels are not found"
        )
    return times


def _chunks(elements: Sequence[int]) -> list[list[int]]:
    """Points that are measured together: neighbours, as many as memory is wanted for."""
    chunks: list[list[int]] = []
    total = 0
    for index, count in enumerate(elements):
        if not chunks or total + count > CHUNK_ELEMENTS:
            chunks.append([])
            total = 0
        chunks[-1].append(index)
        total += count
    return chunks


def channel_block(threads: int = 0, cache: Cache | None = None) -> int:
    """Channels that ONNX Runtime's convolutions handle at once on this machine; 1 if it has no blocked kernels.

    Found by trying: a convolution of three blocks runs as a blocked kernel, one of a block and a half does not.
    """
    cache = cache if cache is not None else Cache()
    key = {"what": "channel block", "machine": machine()}
    known = cache.get(key)
    if isinstance(known, int) and known > 0:
        return known
    block = next((block for block in (4, 8, 16, 32) if _is_blocked(3 * block, threads)), 1)
    cache.put(key, block)
    return block


def _is_blocked(channels: int, threads: int) -> bool:
    import onnx

    weight = onnx.numpy_helper.from_array(np.ones((channels, channels, 3, 3), np.float32), "w")
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", (1, channels, 6, 6)), ("y", (1, channels, 4, 4)))
    ]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"])], "probe", infos[:1], infos[1:], [weight]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    feeds = {"x": np.ones((1, channels, 6, 6), np.float32)}
    return any("nchwc" in kernel.name for kernel in profile(model, feeds, runs=1, threads=threads).kernels)


class LatencyTable:
    """Times of layers at several widths, measured when they are first asked for and kept on disk.

    Args:
        cache: Where they are kept; None: in the default folder.
        threads: Threads within an op; 0: as many as ONNX Runtime takes.
        measurer: Takes the times; tests give their own.
    """

    def __init__(
        self, cache: Cache | None = None, *, threads: int = 0, measurer: Measurer = measure_layer
    ) -> None:
        self.threads = threads
        self.cache = cache if cache is not None else Cache()
        self._measurer = measurer
        self._known: dict[str, Floats] = {}

    def times(self, layer: Layer) -> Floats:
        """Seconds of the layer on its grid: float64, one axis a cut; never falling with the width.

        Raises:
            ModelError: The layer cannot be run alone.
        """
        key = {**layer.key, "machine": machine(), "threads": self.threads}
        name = repr(key)
        if name not in self._known:
            stored = self.cache.get(key)
            times = _valid(stored, layer.shape)
            if times is None:
                points = [
                    tuple(cut.points[i] for cut, i in zip(layer.cuts, index, strict=True))
                    for index in np.ndindex(*layer.shape)
                ]
                times = np.array(self._measurer(layer, points, self.threads), dtype=np.float64).reshape(
                    layer.shape
                )
                self.cache.put(key, times.tolist())
            for axis, cut in enumerate(layer.cuts):
                times = _monotone(times, axis, len(cut.aligned))
            self._known[name] = times
        return self._known[name]


def _valid(stored: object, shape: tuple[int, ...]) -> Floats | None:
    try:
        times = np.array(stored, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return times if times.shape == shape and bool((times > 0).all()) else None


def _monotone(times: Floats, axis: int, aligned: int) -> Floats:
    """Disturbances only ever add time: what is wider and was measured faster tells of the narrower of its kind."""
    parts = np.split(times, [aligned], axis)
    falling = [np.flip(np.minimum.accumulate(np.flip(part, axis), axis), axis) for part in parts]
    return np.concatenate(falling, axis)


@dataclass(frozen=True)
class Curve:
    """A kernel's time as a function of one or two extents.

    Attributes:
        cuts: The extents and the sizes that were measured.
        seconds: Times there, one axis a cut.
    """

    cuts: tuple[Cut, ...]
    seconds: Floats

    def at(self, sizes: Floats) -> Floats:
        """Interpolated times for rows of all extents' sizes, float64 ``[rows, number of extents]`` -> ``[rows]``.

        Below the smallest size that was measured nothing more is saved.
        """
        table = np.broadcast_to(self.seconds, (len(sizes), *self.seconds.shape))
        for cut in self.cuts:
            where = sizes[:, cut.extent]
            stop = len(cut.aligned)
            if not cut.ragged:
                table = _interpolated(table, cut.aligned, where)
            elif not cut.aligned:
                table = _interpolated(table, cut.ragged, where)
            else:
                kinds = (
                    _interpolated(table[:, :stop], cut.aligned, where),
                    _interpolated(table[:, stop:], cut.ragged, where),
                )
                is_aligned = (where % cut.block == 0).reshape(-1, *[1] * (kinds[0].ndim - 1))
                table = np.where(is_aligned, *kinds)
        return np.asarray(table, dtype=np.float64)


def _interpolated(table: Floats, points: Sequence[int], where: Floats) -> Floats:
    """Linear interpolation along axis 1 of ``[rows, points, ...]``, at one place a row."""
    if len(points) == 1:
        return table[:, 0]
    grid = np.array(points, dtype=np.float64)
    where = np.clip(where, grid[0], grid[-1])
    low = np.clip(np.searchsorted(grid, where, side="right") - 1, 0, len(grid) - 2)
    part = ((where - grid[low]) / (grid[low + 1] - grid[low])).reshape(-1, *[1] * (table.ndim - 2))
    rows = np.arange(len(table))
    result: Floats = table[rows, low] * (1 - part) + table[rows, low + 1] * part
    return result


class LatencyCost(PolynomialCost):
    """Seconds of one run in ONNX Runtime on this machine, at the twin's input sizes.

    Args:
        network: The analysed model; it is run.
        table: Times of single layers.
        widths: Shared among the costs of one network.
        round_to: What groups will keep multiples of, as in :class:`graphprune.choice.choose.Request`.
        feeds: Inputs for the run; random ones at the twin's sizes if None.
        profiler: Runs the network; tests give their own.
        progress: Called with the number of kernels done and of all.

    Attributes:
        measured: Seconds of one run of the network as it is: the median.
        notes: What could not be measured, and how it is reckoned instead.

    Raises:
        ModelError: ONNX Runtime cannot run the network.
    """

    unit = "s"

    def __init__(
        self,
        network: Network,
        table: LatencyTable | None = None,
        widths: Widths | None = None,
        *,
        round_to: int | None = None,
        feeds: Feeds | None = None,
        profiler: Profiler | None = None,
        progress: Progress | None = None,
    ) -> None:
        widths = widths or Widths(network)
        self.table = table or LatencyTable()
        self.notes: list[str] = []
        seen = (profiler or profile_network)(network, feeds, self.table.threads)
        self.measured = seen.typical
        # The parts add up to what was measured: other processes slow all of them alike.
        self._scale = self.measured / max(seen.seconds, 1e-9)
        self._launch = min((kernel.seconds for kernel in seen.kernels), default=0.0)
        terms = [Term(seen.between * self._scale, ())]
        self._block, self._round_to = channel_block(self.table.threads, self.table.cache), round_to
        curves: dict[tuple[object, ...], tuple[float, Curve]] = {}
        stems = stems_of(network, seen.kernels)
        for done, stem in enumerate(stems):
            if progress is not None:
                progress(done, len(stems))
            curve = self._curve(stem, widths)
            if curve is None:
                terms += self._terms(stem, widths)
            else:
                key = curve.cuts, curve.seconds.tobytes()
                before = curves[key][0] if key in curves else 0.0
                curves[key] = before + stem.kernel.seconds * self._scale, curve
        if progress is not None:
            progress(len(stems), len(stems))
        super().__init__(widths, terms)
        whole = self._table.at(widths.full)[None]
        self._curves = [
            Curve(curve.cuts, curve.seconds * (seconds / float(curve.at(whole)[0])))
            for seconds, curve in curves.values()
        ]

    def _curve(self, stem: Stem, widths: Widths) -> Curve | None:
        """The times of the layer that a kernel is; None where no table can tell."""
        if not stem.sums or stem.op is None:
            return None
        layer = layer_of(stem.op, widths, block=self._block, round_to=self._round_to)
        if layer is None or not layer.cuts:
            return None
        try:
            times = self.table.times(layer)
        except ModelError as error:
            self.notes.append(f"{error}; its time is taken to shrink with its multiply-accumulates")
            return None
        return Curve(layer.cuts, times)

    def _terms(self, stem: Stem, widths: Widths) -> list[Term]:
        """A kernel's time as a sum of products: by its multiply-accumulates, or by the bytes that it moves."""
        seconds = stem.kernel.seconds * self._scale
        ops = (stem.op,) if stem.sums and stem.op is not None else stem.among
        if ops:
            analysis = widths.network.analysis
            products = [
                Term(1.0, tuple(widths.factors(op)[name] for name in names))
                for op in ops
                for names in mac_terms(op, analysis)
            ]
            return _shares(seconds, products, widths)
        floor = min(self._launch * self._scale, seconds)
        tensors = (
            widths.network.analysis.graph.tensors if stem.op is None else (*stem.op.inputs, *stem.op.outputs)
        )
        moved = [
            Term(bytes_each(t), widths.axes(t))
            for t in tensors
            if t is not None and t.shape is not None and not t.constant
        ]
        return [Term(floor, ()), *_shares(seconds - floor, moved, widths)]

    # -- the cost -----------------------------------------------------------------------------------------------

    def total(self, kept: Kept) -> float:
        """See :class:`CostModel`."""
        sizes = self._table.at(self.widths.checked(kept))[None]
        return super().total(kept) + sum(float(curve.at(sizes)[0]) for curve in self._curves)

    def saving(self, group: int, levels: Kept, kept: Kept) -> Floats:
        """See :class:`CostModel`."""
        kept = self.widths.checked(kept)
        saved = super().saving(group, levels, kept)
        touched = set(self._table.changed_by(group).tolist())
        curves = [curve for curve in self._curves if any(cut.extent in touched for cut in curve.cuts)]
        if curves:
            every = np.append(np.asarray(levels, dtype=np.int64), kept[group])
            sizes = self._table.at_levels(group, every, kept)
            for curve in curves:
                seconds = curve.at(sizes)
                saved = saved + seconds[-1] - seconds[:-1]
        return saved

    def describe(self) -> str:
        """See :class:`CostModel`."""
        threads = f"{self.table.threads} threads" if self.table.threads else "its own number of threads"
        return (
            f"seconds of one run in ONNX Runtime {machine()['onnxruntime']} on {machine()['cpu']} with {threads},"
            f" from times of single layers; measured as it is: {self.measured * 1e3:.3g} ms"
        )


def _shares(seconds: float, terms: Sequence[Term], widths: Widths) -> list[Term]:
    """Products in proportion to which a time shrinks, scaled to add up to it where nothing is cut."""
    whole = sum(term.coefficient * prod(widths.extents[i].size for i in term.extents) for term in terms)
    if whole <= 0:
        return [Term(seconds, ())]
    return [Term(term.coefficient * seconds / whole, term.extents) for term in terms]


def profile_network(network: Network, feeds: Feeds | None, threads: int) -> Profile:
    """Run a network, whole and kernel by kernel, at the twin's sizes; nodes have the names of :func:`name_nodes`.

    Raises:
        ModelError: ONNX Runtime cannot run it.
    """
    from graphprune.model import copy
    from graphprune.verification.feeds import random_feeds

    model = copy(network.model)
    name_nodes(model)
    given = feeds if feeds is not None else random_feeds(network.analysis.graph, 0)
    with stored(model) as path:
        seen = profile(path, given, runs=NETWORK_RUNS, seconds=NETWORK_SECONDS, threads=threads)
        return seen.unprofiled(run_times(path, given, NETWORK_RUNS, threads=threads, seconds=NETWORK_SECONDS))
