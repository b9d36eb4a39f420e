"""Calibration: the inputs that statistics are taken on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graphprune.calibration.inputs import Input, find_batch
from graphprune.calibration.npz import Member
from graphprune.calibration.rows import Rows
from graphprune.calibration.sources import LABELS, NAMELESS, Feeds, Offer, Wanted, open_source
from graphprune.errors import OptionError

if TYPE_CHECKING:
    from graphprune.calibration.preprocess import Preprocess
    from graphprune.graph import Graph

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Calibration:
    """Inputs, checked against the model's.

    Attributes:
        inputs: By input name, samples along axis 0; all of one length. Arrays, or rows that are read when they are
            sliced. Inputs without a batch axis are in ``fixed``.
        fixed: Inputs that are the same for every sample.
        batch: Samples that the model takes at once where its batch size is fixed; None where any number will do.
        labels: int64 ``[samples]`` or whatever the metric understands; None where there are none.
        axes: The model's batch axis of inputs for which it is not 0: feeds have the samples there.

    Raises:
        OptionError: Lengths differ, or are no multiple of ``batch``.
    """

    inputs: Mapping[str, Array | Rows]
    fixed: Mapping[str, Array]
    batch: int | None = None
    labels: Array | None = None
    axes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(rows) for name, rows in self.inputs.items()}
        if self.labels is not None and self.inputs:
            lengths["labels"] = len(self.labels)
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
            raise OptionError(f"the calibration inputs have different numbers of samples: {shown}")
        if self.batch is not None and self.inputs and self.samples % self.batch:
            raise OptionError(
                f"{self.samples} samples are no multiple of the {self.batch} that the model takes at once"
            )

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values()))) if self.inputs else 1

    def pick(self, index: Indices) -> Calibration:
        """The samples at these positions.

        Where samples differ in shape they stay in the order they are in, so that batches stay long.
        """
        if any(isinstance(rows, Rows) and len(rows.shapes) > 1 for rows in self.inputs.values()):
            index = np.sort(index)
        inputs = {
            name: rows.pick(index) if isinstance(rows, Rows) else rows[index]
            for name, rows in self.inputs.items()
        }
        labels = None if self.labels is None else self.labels[index]
        return Calibration(inputs, self.fixed, self.batch, labels, self.axes)

    def subset(self, samples: int) -> Calibration:
        """The first samples; whole batches where the model fixes their size, so perhaps a few more."""
        count = min(-(-samples // (self.batch or 1)) * (self.batch or 1), self.samples)
        if count == self.samples:
            return self
        inputs = {
            name: rows.pick(np.arange(count)) if isinstance(rows, Rows) else rows[:count]
            for name, rows in self.inputs.items()
        }
        labels = None if self.labels is None else self.labels[:count]
        return Calibration(inputs, self.fixed, self.batch, labels, self.axes)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Feeds of at most ``size`` samples, in order; of exactly ``batch`` where the model fixes that.

        Samples that differ in shape do not come in one feed.

        Raises:
            OptionError: A file cannot be read, or holds NaN or infinity.
        """
        size = self.batch or size
        start, samples = 0, self.samples
        while start < samples:
            stop = min(start + size, samples)
            for rows in self.inputs.values():
                if isinstance(rows, Rows):
                    stop = rows.run(start, stop)
            if self.batch and stop - start < self.batch:
                raise OptionError(
                    f"samples {start} to {start + self.batch - 1} differ in shape; the model takes {self.batch} at once"
                )
            feed = {name: np.asarray(rows[start:stop]) for name, rows in self.inputs.items()}
            for name, axis in self.axes.items():
                feed[name] = np.moveaxis(feed[name], 0, axis)
            yield {**feed, **self.fixed}
            start = stop


def load_calibration(
    source: object,
    graph: Graph,
    *,
    preprocess: Preprocess | None = None,
    labels: npt.ArrayLike | None = None,
    samples: int | None = None,
    seed: int = 0,
    least: int = 1,
) -> Calibration:
    """Open inputs that a user gives, and check them against the model's.

    What is large stays where it is: .npy files and uncompressed .npz archives are mapped, files in folders are read
    batch by batch, of compressed archives only the samples that are taken are held.

    Args:
        source: The path of an .npz (an array for each input; ``labels`` or ``y`` beside them are labels), of an .npy,
            or of a folder of images or .npy files, taken in the order of their names; a mapping of arrays; an array,
            for a model with one input; an iterable of feeds, each a mapping of arrays or, for a model with one input,
            an array, of the model's rank or a single sample; or a Calibration.
        graph: The model's twin.
        preprocess: What makes inputs of images: of files, and of uint8 arrays ``[N, H, W, C]`` or ``[N, H, W]`` (real
            ones too, where the model has one input, of rank 4). Other inputs are taken as they are.
        labels: One for each sample; goes before labels in ``source``.
        samples: At most so many: a random subset, in random order, or the first ones of an iterator.
        seed: Of that choice.
        least: Fewer samples than this are too few.

    Returns:
        The inputs. An axis whose symbol says batch is the batch axis, or else axis 0 where it is dynamic. If no input
        has one, it is axis 0 of the first input that is no scalar or vector, and of all that have the same first size;
        the batch size is then fixed, and samples that fill no batch are dropped.

    Raises:
        OptionError: The source cannot be read, does not fit the model, or holds NaN or infinity.
    """
    wanted = [Wanted.of(tensor) for tensor in graph.inputs]
    for want in wanted:
        if want.dtype is None:
            raise OptionError(
                f"input {want.name!r} of the model is no tensor, so no calibration inputs can be given"
            )
    if samples is not None and samples < 1:
        raise OptionError(f"samples must be at least 1, not {samples}")
    if isinstance(source, Calibration):
        _check_names(source.inputs.keys() | source.fixed.keys(), wanted)
        loaded = source
        if labels is not None:
            loaded = Calibration(source.inputs, source.fixed, source.batch, np.asarray(labels), source.axes)
        count = loaded.samples
        return _enough(_chosen(loaded, _choice(count, samples, seed, loaded.batch)), least)
    offers = open_source(source, wanted, preprocess, samples)
    found_labels = _take_labels(offers, wanted)
    given = found_labels if labels is None else np.asarray(labels)
    _match_names(offers, wanted)
    inputs = [Input(want, offers[want.name], preprocess, len(wanted) == 1) for want in wanted]
    if preprocess is not None and not any(each.prepared for each in inputs):
        shown = ", ".join(f"{each.wanted.name!r} {each.offer.dtype}" for each in inputs)
        raise OptionError(
            f"--preprocess is for images, uint8 or of rank 4: none is among the inputs given: {shown}"
        )
    batch, count = find_batch(inputs)
    if given is not None and count and len(given) != count:
        raise OptionError(f"there are {len(given)} labels for {count} samples")
    index = _choice(count, samples, seed, batch)
    if index is not None and any(each.ragged for each in inputs):
        index = np.sort(index)
    return _enough(
        Calibration(
            {each.wanted.name: each.rows(index) for each in inputs if each.axis is not None},
            {each.wanted.name: each.single() for each in inputs if each.axis is None},
            batch,
            given if given is None or index is None else given[index],
            {each.wanted.name: each.axis for each in inputs if each.axis},
        ),
        least,
    )


def _choice(count: int, samples: int | None, seed: int, batch: int | None) -> Indices | None:
    """Which samples to take; None for all. Any beginning of them is a fair choice too."""
    index: Indices | None = None
    if samples is not None and samples < count:
        index = np.random.default_rng(seed).permutation(count)[:samples]
        count = samples
    if batch and count % batch:
        if count < batch:
            raise OptionError(f"the model takes {batch} samples at once; the calibration inputs have {count}")
        warnings.warn(
            f"the model takes {batch} samples at once: the last {count % batch} of {count} are left out",
            stacklevel=3,
        )
        index = (np.arange(count) if index is None else index)[: count - count % batch]
    return index


def _chosen(calibration: Calibration, index: Indices | None) -> Calibration:
    return calibration if index is None else calibration.pick(index)


def _enough(calibration: Calibration, least: int) -> Calibration:
    least = max(least, 1)
    if calibration.samples < least:
        raise OptionError(
            f"the calibration inputs have {calibration.samples} samples; at least {least} are needed"
        )
    return calibration


# -- names ----------------------------------------------------------------------------------------------------------


def _take_labels(offers: dict[str, Offer], wanted: Sequence[Wanted]) -> Array | None:
    """Take the labels out of what is offered."""
    names = {want.name for want in wanted}
    for name in LABELS:
        if name in offers and name not in names:
            offer = offers.pop(name)
            if isinstance(offer, Feeds):
                return np.concatenate([np.atleast_1d(array) for array in offer.arrays])
            return offer.load() if isinstance(offer, Member) else np.asarray(offer)
    return None


def _match_names(offers: dict[str, Offer], wanted: Sequence[Wanted]) -> None:
    """Name what is meant though it is called otherwise; complain about what is missing."""
    names = [want.name for want in wanted]
    if len(names) == 1 and names[0] not in offers and offers:
        only = next(iter(offers)) if len(offers) == 1 else "x"
        if only in offers:
            if only != NAMELESS:
                warnings.warn(f"the array {only!r} is taken for the model's input {names[0]!r}", stacklevel=4)
            offers[names[0]] = offers.pop(only)
    _check_names(offers.keys(), wanted)
    extra = [name for name in offers if name not in names]
    if extra:
        warnings.warn(
            f"these arrays are no inputs of the model and are ignored: {', '.join(extra)}", stacklevel=4
        )


def _check_names(given: Any, wanted: Sequence[Wanted]) -> None:
    missing = [want.name for want in wanted if want.name not in given]
    if missing:
        here = ", ".join(name or "one array without a name" for name in given) or "nothing"
        raise OptionError(
            f"the calibration inputs lack {', '.join(map(repr, missing))}: the model wants"
            f" {', '.join(map(str, wanted))}; given: {here}"
        )
