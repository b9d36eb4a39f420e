"""Channel permutation as a pass, to be composed with others in ``onnx_ir.passes.Sequential``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.model import copy, save
from graphprune.model.inlining import inline
from graphprune.pipeline import analyze_ir
from graphprune.plan import Masks
from graphprune.sparsity.exchange import Exchange, functions_bearing
from graphprune.sparsity.pattern import NM
from graphprune.sparsity.permutation import (
    ClassReport,
    Progress,
    Reading,
    Scores,
    apply_orders,
    find_orders,
    find_stripes,
)
from graphprune.verification.difference import output_errors
from graphprune.verification.faults import Complaint, comparable_tensors, require_jumps
from graphprune.verification.feeds import Feeds, random_feeds
from graphprune.verification.runs import Outputs, check_valid, expose, open_session, run_session


@dataclass
class PermutationReport:
    """What :func:`permute_channels` did.

    Attributes:
        pattern: The pattern that the orders are made for.
        classes: One entry for each class of channels with a choice, in the order of the graph.
        moved: Number of channels that stand in another place than before.
        inlined: Functions whose calls were inlined, because each needs an order of its own.
        max_error: Largest difference from the unpermuted model, relative to the output's scale; None if not compared.
        seconds: Wall time of each step.
    """

    pattern: NM
    classes: list[ClassReport] = field(default_factory=list)
    moved: int = 0
    inlined: list[str] = field(default_factory=list)
    max_error: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def unpermuted(self) -> float:
        """The part of all scores that an N:M mask keeps without a permutation."""
        return self._part(sum(each.unpermuted for each in self.classes))

    @property
    def permuted(self) -> float:
        """The part that it keeps now."""
        return self._part(sum(each.permuted for each in self.classes))

    @property
    def bound(self) -> float:
        """The part that as many elements can hold, wherever they lie in the weights of their class."""
        return self._part(sum(each.bound for each in self.classes))

    def _part(self, kept: float) -> float:
        total = sum(each.total for each in self.classes)
        return kept / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "pattern": str(self.pattern),
            "kept": {"unpermuted": self.unpermuted, "permuted": self.permuted, "bound": self.bound},
            "classes": [
                {
                    "name": each.name,
                    "channels": each.channels,
                    "weights": list(each.weights),
                    "kept": {
                        "unpermuted": each.unpermuted,
                        "permuted": each.permuted,
                        "bound": each.bound,
                        "total": each.total,
                    },
                    "seconds": each.seconds,
                }
                for each in self.classes
            ],
            "moved": self.moved,
            "inlined": self.inlined,
            "max_error": self.max_error,
            "seconds": self.seconds,
        }


def permute_channels(
    model: ir.Model,
    pattern: NM,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    seconds: float | None = 30.0,
    sweeps: int | None = None,
    seed: int = 0,
    scores: Scores | None = None,
    wanted: Callable[[Reading], bool] | None = None,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]] = (),
    verify: bool = True,
    progress: Progress | None = None,
) -> PermutationReport:
    """Put channels into an order in which an N:M mask keeps more, in place; the model computes what it did before.

    Args:
        model: Changed in place: constants are stored in another order, no node is added.
        pattern: The pattern.
        input_shapes: Sizes for inputs with dynamic dimensions, by input name.
        seconds: Time for the search.
        sweeps: Limit of the search in sweeps; with ``seconds=None`` the result depends on ``seed`` only.
        seed: For the search, and for random inputs.
        scores: Importance of weights (:data:`graphprune.sparsity.permutation.Scores`); by default their magnitude.
        wanted: Which weights are to become sparse, and count; all by default.
        feeds: Inputs to compare on, beside random ones.
        verify: Compare with the unpermuted model in ONNX Runtime.
        progress: Called with the fraction of the search that is done.

    Returns:
        The classes that were permuted and what an N:M mask keeps of their weights. There are none, and the model is as
        it was, where no class has a choice.

    Raises:
        OptionError: ``input_shapes`` does not fit the model.
        VerificationError: The result differs from the unpermuted model; ``model`` is as it was.
    """
    original = copy(model)
    report = PermutationReport(pattern)
    clock = time.perf_counter
    try:
        start = clock()
        while True:
            network = analyze_ir(model, input_shapes)
            stripes = find_stripes(network, pattern.m, wanted)
            labels = np.concatenate([np.zeros(0, np.int32), *(each.labels for each in stripes)])
            functions = functions_bearing(network.analysis, labels)
            if not functions:
                break
            inline(model, functions)
            report.inlined += sorted(name for _, name, _ in functions)
        report.seconds["analysis"] = clock() - start
        start = clock()
        orders, report.classes = find_orders(
            network,
            pattern,
            seconds=seconds,
            sweeps=sweeps,
            seed=seed,
            scores=scores,
            stripes=stripes,
            progress=progress,
        )
        report.seconds["search"] = clock() - start
        start = clock()
        exchange = apply_orders(network, orders)
        network.fills.join()
        report.moved = len(exchange.moving)
        report.seconds["permutation"] = clock() - start
        if verify and report.moved:
            start = clock()
            trials = [*map(dict, feeds), random_feeds(network.analysis.graph, seed)]
            report.max_error = compare_permuted(original, model, exchange, trials)
            report.seconds["verification"] = clock() - start
    except BaseException:
        model.graph = original.graph
        model.functions.clear()
        model.functions.update(original.functions)
        raise
    return report


def compare_permuted(
    original: ir.Model, model: ir.Model, exchange: Exchange, feeds: Sequence[Feeds]
) -> float:
    """Check that a permuted model computes what the original does.

    Args:
        original: The model before.
        model: The model after.
        exchange: What changed places, on the twin of the model.
        feeds: Inputs to compare on.

    Returns:
        The largest difference of an output, relative to its scale; outputs behind ops whose result jumps (rounding,
        comparing, picking) do not count, if what enters those is the same.

    Raises:
        VerificationError: The model is invalid, does not load, or differs; the message names the first node at which
            it does.
    """
    largest = 0.0
    with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
        folder = Path(name)
        save(model, folder / "permuted.onnx")
        check_valid(folder / "permuted.onnx", original)
        for each in feeds:
            expected, found = _outputs(original, model, each, folder)
            error, wrong = output_errors(exchange.analysis.graph, expected, found)
            if wrong:
                _explain(original, model, exchange, each, folder, wrong)
            largest = max(largest, error)
    return largest


def _outputs(original: ir.Model, model: ir.Model, feeds: Feeds, folder: Path) -> tuple[Outputs, Outputs]:
    results = []
    for which, what in ((original, "the original"), (model, "the permuted model")):
        save(which, folder / "run.onnx")
        with open_session(folder / "run.onnx", what) as session:
            results.append(run_session(session, feeds, what))
    return results[0], results[1]


def _explain(
    original: ir.Model, model: ir.Model, exchange: Exchange, feeds: Feeds, folder: Path, wrong: Sequence[str]
) -> None:
    """Compare what lies between, in its new order; accept outputs that differ only behind a jump.

    Raises:
        VerificationError: Something differs that no jump explains.
    """
    graph = exchange.analysis.graph
    tensors = comparable_tensors(graph)
    exposed = []
    for each in (original, model):
        made = copy(each)
        expose(made, {v.name: v for node in made.graph for v in node.outputs}, list(tensors))
        exposed.append(made)
    expected, found = _outputs(exposed[0], exposed[1], feeds, folder)
    for name, tensor in tensors.items():
        change = exchange.of(tensor)
        if change is not None and isinstance(expected.get(name), np.ndarray):
            if expected[name].shape == change.shape:
                expected[name] = change.apply(expected[name])
            else:  # at the user's sizes, which are not the twin's
                del expected[name]
    nothing = Masks(exchange.analysis, np.zeros(0, dtype=np.int32))
    complaint = Complaint(
        "with its channels permuted",
        "the original",
        "leave the channels as they are (no permutation) and please report it",
    )
    require_jumps(graph, tensors, nothing, expected, found, wrong, complaint)


class PermuteChannelsPass(ir.passes.InPlacePass):
    """Puts channels into an order in which an N:M mask keeps more (:func:`permute_channels`).

    Attributes:
        report: What the last call did; None before the first.

    Example:
        >>> import onnx_ir as ir
        >>> from graphprune.passes.prune_channels import PruneChannelsPass
        >>> pipeline = ir.passes.Sequential(PruneChannelsPass(0.3), PermuteChannelsPass(NM(2, 4)))
    """

    def __init__(self, pattern: NM, **options: Any) -> None:
        """Configure the pass.

        Args:
            pattern: The pattern.
            **options: Further arguments of :func:`permute_channels`.
        """
        super().__init__()
        self.pattern = pattern
        self.options = options
        self.report: PermutationReport | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Permute in place.

        Raises:
            GraphPruneError: An option is wrong, or the result differs; the model is then as it was.
        """
        self.report = None
        report = permute_channels(model, self.pattern, **self.options)
        self.report = report
        return ir.passes.PassResult(model, modified=report.moved > 0 or bool(report.inlined))
