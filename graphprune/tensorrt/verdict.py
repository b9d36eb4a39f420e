"""One verdict on what an engine does with the sparse weights of its file, from all the evidence there is.

Three witnesses: our own check of the file (does the pattern hold, may TensorRT use it), the build log (how many layers
were found and chosen), the engine inspector (which kernel each layer has). The kernels are what runs, so they decide
where their names tell something; the log decides else; the file alone can only deny.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from graphprune.tensorrt.inspector import EngineLayers, Layer, split_layer
from graphprune.tensorrt.log import Mention, SparsityLog

#: Layers named in a sentence; all are in the lists.
_NAMED = 3
#: Patterns of which 2:4 follows: it itself, fewer of four, one of every two.
_SPARSE_ENOUGH = re.compile(r"[012]:4|[01]:2")


class Verdict(enum.Enum):
    """What became of the sparse weights."""

    SPARSE_USED = "SPARSE_USED"
    ELIGIBLE_NOT_CHOSEN = "ELIGIBLE_NOT_CHOSEN"
    NOT_ELIGIBLE = "NOT_ELIGIBLE"
    UNKNOWN = "UNKNOWN"


class CheckedWeight(Protocol):
    """What a check of the saved file says of one weight (:class:`graphprune.sparsity.report.WeightReport` is one)."""

    @property
    def name(self) -> str:
        """The initializer."""

    @property
    def node(self) -> str:
        """The first node that contracts it."""

    @property
    def dtype(self) -> str:
        """Its element type, such as "FLOAT16"."""

    @property
    def holds(self) -> str | None:
        """The pattern that it truly holds, as "2:4" or "1:4"; None for none."""

    @property
    def eligible(self) -> bool:
        """TensorRT may use it: op, axis, alignment."""

    @property
    def reason(self) -> str | None:
        """Why TensorRT may not."""

    @property
    def unlikely(self) -> str | None:
        """Why a sparse kernel is not likely to be the faster one; None if it is."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict and what it rests on.

    Attributes:
        verdict: The verdict.
        reason: Why, in one sentence.
        sparse: Layers with a sparse kernel, by TensorRT's names.
        dense: Layers that were eligible and have a dense kernel, or whose kernel is not a sparse one by the log.
        eligible, chosen: Counts of the log's last pair; None where the log has none.
        holding: Weights of the file that hold 2:4, by their names.
    """

    verdict: Verdict
    reason: str
    sparse: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    eligible: int | None = None
    chosen: int | None = None
    holding: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "sparse": list(self.sparse),
            "dense": list(self.dense),
            "eligible": self.eligible,
            "chosen": self.chosen,
            "holding": list(self.holding),
        }


def judge(
    weights: Sequence[CheckedWeight] | None,
    log: SparsityLog | None = None,
    layers: EngineLayers | None = None,
) -> Judgement:
    """Say what became of the sparse weights.

    Parameters
    ----------
    weights : sequence of CheckedWeight, optional
        The check of the saved file; None where it was not made.
    log : SparsityLog, optional
        Of the build; None where there was none.
    layers : EngineLayers, optional
        Of the engine; None where there is none.

    Returns
    -------
    Judgement
        Never SPARSE_USED without a layer that the log or the inspector counts as sparse.
    """
    holding = tuple(weight for weight in weights or () if _SPARSE_ENOUGH.fullmatch(weight.holds or ""))
    pair = log.last if log is not None else None
    found = pair.eligible if pair is not None else None
    chosen = pair.chosen if pair is not None else None
    facts: dict[str, Any] = {
        "eligible": found.count if found is not None else None,
        "chosen": chosen.count if chosen is not None else None,
        "holding": tuple(weight.name for weight in holding),
    }
    kernels = layers.sparse if layers is not None else ()
    if kernels or (chosen is not None and chosen.count):
        return _used(found, chosen, kernels, layers, facts)
    if found is not None and found.count == 0:
        return Judgement(Verdict.NOT_ELIGIBLE, _why_none_found(weights, holding), **facts)
    if found is not None and chosen is not None:
        reason = (
            f"TensorRT found {_count(found.count, 'layer')} with 2:4 weights, timed their sparse kernels, and kept"
            f" dense ones as faster{_hint(holding)}"
        )
        return Judgement(Verdict.ELIGIBLE_NOT_CHOSEN, reason, dense=found.names, **facts)
    if weights is not None and not any(weight.eligible for weight in holding):
        return Judgement(Verdict.NOT_ELIGIBLE, _why_none_eligible(weights, holding), **facts)
    return _from_kernels(holding, found, layers, facts)


def _used(
    found: Mention | None,
    chosen: Mention | None,
    kernels: Sequence[Layer],
    layers: EngineLayers | None,
    facts: dict[str, Any],
) -> Judgement:
    """At least one sparse layer, by the engine or by the log."""
    by_log = chosen.names if chosen is not None else ()
    sparse = tuple(layer.name for layer in kernels) or by_log
    dense = _left_dense(found, by_log, layers, kernels)
    if kernels:
        source = (
            f"{_count(len(kernels), 'layer')} of the engine {_plural(len(kernels), 'has a', 'have')} sparse"
        )
        reason = f"{source} {_plural(len(kernels), 'kernel', 'kernels')}: {_some(sparse)}"
        if chosen is not None and chosen.count == 0:
            reason += "; the build log's last count says none, and the engine is what runs"
    else:
        assert chosen is not None
        total = f" of {found.count} eligible ones" if found is not None else ""
        names = f": {_some(by_log)}" if by_log else ""
        reason = f"the build log says that {_count(chosen.count, 'layer')}{total} got sparse kernels{names}"
        if layers is not None:
            reason += "; the inspector's names of kernels neither confirm nor deny it"
    return Judgement(Verdict.SPARSE_USED, reason, sparse, dense, **facts)


def _left_dense(
    found: Mention | None, by_log: Sequence[str], layers: EngineLayers | None, kernels: Sequence[Layer]
) -> tuple[str, ...]:
    """Eligible layers that did not get a sparse kernel."""
    if found is None:
        return ()
    sparse = {node for layer in kernels for node in layer.nodes} | set(by_log)
    return tuple(name for name in found.names if name not in sparse and not sparse & set(split_layer(name)))


def _why_none_found(weights: Sequence[CheckedWeight] | None, holding: Sequence[CheckedWeight]) -> str:
    """TensorRT found nothing eligible: what the file has to do with it."""
    if weights is None:
        return "TensorRT found no layer with 2:4 weights that it has sparse kernels for"
    if not any(weight.eligible for weight in holding):
        return _why_none_eligible(weights, holding)
    usable = [weight for weight in holding if weight.eligible]
    if all(weight.dtype.upper() in {"FLOAT", "FLOAT32"} for weight in usable):
        return f"{_holding(usable)} 2:4 in float32, which has no sparse kernels; cast to float16 or bfloat16"
    return (
        f"TensorRT found no layer that it has sparse kernels for, although {_holding(usable)} 2:4:"
        f" {_some([weight.name for weight in usable])}"
    )


def _why_none_eligible(weights: Sequence[CheckedWeight], holding: Sequence[CheckedWeight]) -> str:
    """The file itself has nothing that sparse kernels could use."""
    if not weights:
        return "the file has no weights that products or convolutions contract"
    if not holding:
        return f"none of the file's {_count(len(weights), 'weight')} holds 2:4"
    first = holding[0]
    return f"{_holding(holding)} 2:4, and TensorRT can use none: {first.name!r}: {first.reason or 'no reason known'}"


def _from_kernels(
    holding: Sequence[CheckedWeight],
    found: Mention | None,
    layers: EngineLayers | None,
    facts: dict[str, Any],
) -> Judgement:
    """No sparse kernel is known, and no complete pair in the log."""
    half = found is not None
    if layers is None:
        reason = (
            "the build log ends between its two lines on sparse weights" if half
            else "there is neither an engine nor a build log that speaks of sparse weights"
        )  # fmt: skip
        return Judgement(Verdict.UNKNOWN, reason, **facts)
    if not layers.detailed:
        reason = "the engine was built without profiling verbosity 'detailed', so its kernels have no names"
        return Judgement(Verdict.UNKNOWN, reason, **facts)
    wanted = {weight.node for weight in holding if weight.eligible}
    bearing = [layer for layer in layers.layers if wanted & set(layer.nodes)]
    seen = {node for layer in bearing for node in layer.nodes}
    opaque = [layer for layer in bearing if layer.sparse is None]
    if not wanted or opaque or wanted - seen:
        count = len(opaque) + len(wanted - seen)
        reason = (
            f"the kernels of {_count(count, 'layer')} with 2:4 weights have names that tell nothing, and the build log"
            " has no counts"
            if count
            else "neither the names of the kernels nor the build log tell of sparse weights"
        )
        return Judgement(Verdict.UNKNOWN, reason, **facts)
    names = tuple(layer.name for layer in bearing)
    reason = f"all {_count(len(names), 'layer')} with 2:4 weights have dense kernels: {_some(names)}{_hint(holding)}"
    return Judgement(Verdict.ELIGIBLE_NOT_CHOSEN, reason, dense=names, **facts)


def _hint(holding: Sequence[CheckedWeight]) -> str:
    """What the file has to do with it that dense kernels are faster.

    That int8 layers get sparse kernels only where their results stay int8 is said by the llm_sparsity example of
    NVIDIA/Model-Optimizer.
    """
    usable = [weight for weight in holding if weight.eligible]
    small = [weight for weight in usable if weight.unlikely is not None]
    if small:
        share = (
            "all weights" if len(small) == len(usable) else f"{len(small)} of {_count(len(usable), 'weight')}"
        )
        return f"; little was to be gained by {share}: {small[0].unlikely}"
    if any(weight.dtype.upper() in {"INT8", "UINT8"} for weight in usable):
        return "; int8 layers gain only where what they compute stays int8: quantize their outputs too"
    return ""


def _holding(weights: Sequence[CheckedWeight]) -> str:
    return f"{_count(len(weights), 'weight')} {_plural(len(weights), 'holds', 'hold')}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _plural(number: int, one: str, many: str) -> str:
    return one if number == 1 else many


def _some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
