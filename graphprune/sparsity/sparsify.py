"""Give a model's weights a pattern.

Weights that are chosen by magnitude alone are worked out when they are written, one after another: neither the model
nor its result is ever held. What needs inputs goes through :mod:`graphprune.sparsity.reconstruction`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.errors import OptionError, SparsityError
from graphprune.kernels.nm import kept, sparsify
from graphprune.model.inlining import inline
from graphprune.model.nodes import stored_tensor
from graphprune.model.stream import STRETCH_BYTES, StreamedTensor, element_type
from graphprune.progress import Progress, part_of, timed
from graphprune.sparsity.eligibility import find_target, judged, obstacle
from graphprune.sparsity.masks import mask_of
from graphprune.sparsity.pattern import NM, Layout, Pattern
from graphprune.sparsity.proof import check_file, most_held
from graphprune.sparsity.report import SparsityReport, WeightReport
from graphprune.sparsity.sites import Site, find_sites

if TYPE_CHECKING:
    from graphprune.calibration import Calibration

Array = npt.NDArray[Any]

#: Ways to choose which elements stay; all but the first need inputs.
METHODS = ("magnitude", "wanda", "sparsegpt", "alps")


@dataclass(frozen=True)
class SparsitySettings:
    """What to do.

    Attributes:
        pattern: What each weight is to hold.
        target: The runtime that it is for: "tensorrt", "onnxruntime" or "any".
        method: How the elements that stay are chosen: "magnitude", "wanda", "sparsegpt" or "alps"; None for the last
            where there are inputs and what stays is fitted, sparsegpt where it is not, magnitude without inputs.
        refit: Fit what stays to the original's outputs; None for wherever there are inputs.
        permute: Reorder channels first, so that the elements that stay are larger.
        permute_seconds: How long the search for an order may take.
        tail: What happens where M does not divide an axis: "dense" leaves its last channels dense, "refuse" the weight.
        include, exclude: Globs on names of weights and of the nodes that contract them.
        input_shapes: Sizes for inputs with dynamic dimensions.
        seed: For searches and choices at random.
    """

    pattern: Pattern
    target: str = "tensorrt"
    method: str | None = None
    refit: bool | None = None
    permute: bool = False
    permute_seconds: float = 30.0
    tail: str = "dense"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    input_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        find_target(self.target, self.pattern)
        if self.tail not in ("dense", "refuse"):
            raise OptionError(f"--nm-tail {self.tail}: give dense or refuse")
        if self.method is not None and self.method not in METHODS:
            raise OptionError(
                f"there is no way {self.method!r} to choose weights; there are {', '.join(METHODS)}"
            )
        if self.permute_seconds <= 0:
            raise OptionError(f"--permute-seconds {self.permute_seconds:g}: give more than 0")
        if not isinstance(self.pattern, NM) or self.pattern.block != (1, 1):
            if self.permute:
                raise OptionError(
                    f"channels are reordered for N:M patterns of single weights, not for {self.pattern}"
                )
            if self.method not in (None, "magnitude") or self.refit:
                raise OptionError(f"inputs choose and fit N:M patterns of single weights, not {self.pattern}")


class Sparsifier:
    """A model on its way to sparse weights."""

    def __init__(
        self,
        model: ir.Model,
        settings: SparsitySettings,
        calibration: Calibration | None = None,
        progress: Progress | None = None,
        *,
        verify: bool = True,
    ) -> None:
        """Find the weights.

        Args:
            model: Changed in place by :meth:`run`.
            settings: What to do.
            calibration: Inputs to choose and to fit by.
            progress: Called with the name of each step.
            verify: Compare a model with its reordered form.

        Raises:
            OptionError: What was asked for needs inputs, or a glob matches nothing.
            SparsityError: No weight can have the pattern.
        """
        self.model = model
        self.settings = settings
        self._calibration = calibration
        self._progress = progress
        self._verifies = verify
        plain = isinstance(settings.pattern, NM) and settings.pattern.block == (1, 1)
        given = calibration is not None
        self.refit = (given and plain) if settings.refit is None else settings.refit
        by_inputs = "alps" if self.refit else "sparsegpt"
        self.method = settings.method or (by_inputs if given and plain else "magnitude")
        if given and self.method == "alps" and not self.refit:
            raise OptionError(
                "alps chooses weights that are fitted afterwards: leave the repair on, or take sparsegpt"
            )
        self.permute = settings.permute
        if not given and (self.method != "magnitude" or self.refit):
            what = self.method if self.method != "magnitude" else "a refit"
            raise OptionError(f"{what} needs inputs: give some with --calib")
        self.report = SparsityReport(str(settings.pattern), settings.target, self._spelled(), [])
        if given and model.functions:  # inputs of layers are seen, and their weights fitted, call by call
            inline(model, {function.identifier() for function in model.functions.values()})
        with self._timed("weights"):
            self.sites = self._find()
        #: The stored tensors of the weights that only lose elements, and of those that are fitted.
        self._sources: dict[ir.Value, ir.TensorProtocol] = {}
        self._masked: dict[ir.Value, Layout] = {}
        self._fitted: dict[ir.Value, Layout] = {}

    def _spelled(self) -> str:
        parts = [self.method, *(["refit"] if self.refit else []), *(["permutation"] if self.permute else [])]
        return " + ".join(parts)

    def _timed(self, step: str) -> AbstractContextManager[None]:
        return timed(self.report.seconds, step, self._progress)

    # -- which weights ----------------------------------------------------------------------------------------------

    def _find(self) -> dict[ir.Value, tuple[Site, WeightReport]]:
        settings = self.settings
        target = find_target(settings.target, settings.pattern)
        sites = find_sites(self.model)
        names = [(site.name, *(use.node for use in site.uses)) for site in sites]
        included = _matching(settings.include, names) if settings.include else [True] * len(sites)
        excluded = _matching(settings.exclude, names)
        found = {}
        for site, wanted, unwanted in zip(sites, included, excluded, strict=True):
            entry = judged(site, settings.pattern, target)
            if entry.tail and settings.tail == "refuse":
                entry.reason = (
                    f"{settings.pattern} does not divide its input channels: {entry.tail} are left over"
                )
            elif entry.eligible and (unwanted or not wanted):
                entry.reason = "it was excluded"
            if entry.reason is None:
                found[site.value] = (site, entry)
            else:
                entry.eligible, entry.tail = False, 0
            self.report.weights.append(entry)
        if not found:
            raise SparsityError(f"no weight can be made {settings.pattern}: {_reasons(self.report.weights)}")
        if tails := [entry for entry in self.report.weights if entry.tail]:
            self.report.notes.append(
                f"{len(tails)} weights keep a dense tail, since {settings.pattern} does not divide their input"
                f" channels: {_some(entry.name for entry in tails)}"
            )
        return found

    # -- the work ---------------------------------------------------------------------------------------------------

    def run(self) -> SparsityReport:
        """Reorder channels, choose elements, fit what stays; weights by magnitude follow when the model is written."""
        if self.permute:
            self._permute()
        if self.method != "magnitude" or self.refit:
            self._reconstruct()
        else:
            for value, (site, entry) in self.sites.items():
                self._set_masked(value, site, entry)
        return self.report

    def _permute(self) -> None:
        from graphprune.passes.permute_channels import permute_channels

        pattern = self.settings.pattern
        assert isinstance(pattern, NM)
        with self._timed("permutation"):
            done = permute_channels(
                self.model,
                pattern,
                seconds=self.settings.permute_seconds,
                input_shapes=self.settings.input_shapes,
                seed=self.settings.seed,
                wanted=lambda reading: reading.stored in self.sites,
                feeds=[] if self._calibration is None else list(self._calibration.subset(1).batches(1)),
                verify=self._verifies,
                progress=lambda done: part_of(self._progress, "permutation")(round(100 * done), 100),
            )
        self.report.permutation = done.to_dict()
        # An order that one use of a weight needs and another does not gives it a weight of its own.
        self.report.weights.clear()
        self.report.notes.clear()
        self.sites = self._find()

    def _reconstruct(self) -> None:
        """Choose and fit by inputs."""
        from graphprune.sparsity.reconstruction import Method, reconstruct

        pattern = self.settings.pattern
        assert isinstance(pattern, NM)
        assert self._calibration is not None
        layouts = {value: site.layout for value, (site, _) in self.sites.items() if site.layout is not None}
        sources = {value: tensor for value in layouts if (tensor := stored_tensor(value)) is not None}
        with self._timed("reconstruction"):
            done = reconstruct(
                self.model,
                layouts,
                pattern,
                Method(self.method, self.refit),
                self._calibration,
                input_shapes=self.settings.input_shapes,
                seed=self.settings.seed,
                progress=part_of(self._progress, "reconstruction"),
            )
        fallen_back = {value.name: reason for value, reason in done.by_magnitude}
        for value, mask in done.masks.items():
            site, entry = self.sites[value]
            entry.method = "magnitude" if site.name in fallen_back else self.method
            whole = sources[value].numpy().reshape(layouts[value].shape)
            entry.kept = kept(whole, mask.reshape(whole.shape))
            self._fitted[value] = layouts[value]
        self.report.notes += [f"{name} was chosen by magnitude: {why}" for name, why in fallen_back.items()]
        self.report.layers = done.to_dict()["layers"]

    def _set_masked(self, value: ir.Value, site: Site, entry: WeightReport) -> None:
        """Replace a weight by one that is worked out each time that it is read."""
        source = stored_tensor(value)
        layout, pattern = site.layout, self.settings.pattern
        assert source is not None
        assert layout is not None
        entry.method = "magnitude"
        self._sources[value], self._masked[value] = source, layout
        parts = [(0, source.size)]  # blocks and fractions are chosen among all elements
        if isinstance(pattern, NM) and pattern.block == (1, 1):
            parts = list(layout.stretches(pattern.m, STRETCH_BYTES // element_type(source).itemsize))
        sums: dict[int, tuple[float, float]] = {}

        def change(start: int, stop: int, elements: Array) -> None:
            before = _magnitude(elements)
            try:
                _mask(elements.reshape(layout.view(start, stop)), pattern, layout)
            except ValueError as error:
                raise SparsityError(f"weight {site.name!r}: {error}; leave it out with --exclude") from error
            sums[start] = before, _magnitude(elements)
            if len(sums) == len(parts):
                total, left = (sum(column) for column in zip(*sums.values(), strict=True))
                entry.kept = left / total if total else 1.0

        lazy = StreamedTensor(source, parts, change)
        if value.is_initializer():
            value.const_value = lazy
            return
        node = value.producer()
        assert node is not None
        made = ir.Tensor(lazy.numpy(), dtype=source.dtype, name=source.name)  # attributes are written whole
        node.attributes["value"] = ir.AttrTensor("value", made)

    # -- what is written beside the model ---------------------------------------------------------------------------

    def save_packed(self, path: Path) -> None:
        """Write the weights that hold the pattern packed (:mod:`graphprune.sparsity.packed`), one after another.

        Raises:
            OptionError: The pattern, or a weight's type, cannot be packed.
            ModelError: The file cannot be written.
        """
        from graphprune.sparsity.packed import PackedWeight, PackedWriter

        pattern = self.settings.pattern
        if not isinstance(pattern, NM):
            raise OptionError(f"{pattern} cannot be packed, only N:M patterns")
        # Found anew: a cast stores what was chosen under other names.
        target = find_target(self.settings.target, pattern)
        sites = [
            site
            for site in find_sites(self.model)
            if obstacle(site, pattern, target) is None
            and site.layout is not None
            and most_held(site.tensor, site.layout, pattern.m) <= pattern.n
        ]
        weights = [
            PackedWeight(site.name, element_type(site.tensor), site.shape, site.layout, pattern)
            for site in sites
            if site.layout is not None
        ]
        with self._timed("packing"), PackedWriter(path, weights) as writer:
            for site in sites:
                writer.write(site.name, site.tensor.numpy())

    # -- the proof --------------------------------------------------------------------------------------------------

    def check(self, path: Path | None = None) -> None:
        """Look at the result: it holds the patterns, and nothing else changed.

        Args:
            path: Its file, which is read again; None for the model in memory.

        Raises:
            VerificationError: It does not, or something did.
        """
        from graphprune.model import load

        with self._timed("verification"):
            written = self.model if path is None else load(path)
            check_file(written, self.model, self._sources, self._masked, self._fitted, self.settings.pattern)
        for weight in self.report.sparse:
            weight.holds = str(self.settings.pattern)


def _mask(array: Array, pattern: Pattern, layout: Layout) -> None:
    """Zero the elements of least magnitude, in place.

    Args:
        array: A whole weight, ``[outer, contracted, inner]``; a stretch of it where single elements make up groups.
        pattern: What it is to hold.
        layout: The whole weight's.
    """
    if isinstance(pattern, NM) and pattern.block == (1, 1):
        sparsify(array, pattern.n, pattern.m, out=array)
    else:
        array[~mask_of(array, pattern, layout)] = 0


def _magnitude(elements: Array) -> float:
    """Sum of absolute values, to the precision of a report."""
    if elements.dtype.kind != "f" or elements.dtype.itemsize < 4:
        elements = elements.astype(np.float32)
    return float(np.abs(elements).sum())


def _matching(globs: Sequence[str], names: Sequence[Sequence[str]]) -> list[bool]:
    hits = [[any(n == glob or fnmatchcase(n, glob) for n in each) for each in names] for glob in globs]
    for glob, hit in zip(globs, hits, strict=True):
        if not any(hit):
            raise OptionError(f"the glob {glob!r} matches no weight and no node that contracts one")
    return [any(column) for column in zip(*hits, strict=True)] if hits else [False] * len(names)


def _some(names: Iterator[str], most: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _reasons(weights: Sequence[WeightReport]) -> str:
    """Why, most frequent first."""
    if not weights:
        return "it has no weight that an op sums over"
    by_reason: dict[str, list[str]] = {}
    for weight in weights:
        by_reason.setdefault(weight.reason or "", []).append(weight.name)
    ranked = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{reason} ({_some(iter(names), 2)})" for reason, names in ranked[:4])
