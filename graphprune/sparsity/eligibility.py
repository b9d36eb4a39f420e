"""What a runtime asks of a weight before it uses its sparsity. Data, one entry a runtime.

TensorRT: 2:4 along the contracted axis of convolutions and of products whose right operand is the weight. Its kernels
want 16 input channels and 8 outputs at a time, and below some 256 of each the dense ones are as fast (NVIDIA,
"Accelerating Inference with Sparsity Using the NVIDIA Ampere Architecture and NVIDIA TensorRT", 2021). ONNX Runtime
computes with sparse weights as with dense ones; a pattern matters there for storage and for what comes after.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.errors import OptionError
from graphprune.sparsity.pattern import NM, Pattern
from graphprune.sparsity.report import WeightReport
from graphprune.sparsity.sites import Site


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime, and what it asks for.

    Attributes:
        name: How it is asked for.
        ops: Op types whose weights it takes; None for all.
        patterns: Patterns that it knows; None for all.
        channels, outputs: The contracted axis and the outputs must be multiples of these.
        gain_from: With fewer channels or outputs than this a gain is not likely; None where none is to be had.
        left: It takes weights that are the left operand of a product.
    """

    name: str
    ops: frozenset[str] | None = None
    patterns: frozenset[str] | None = None
    channels: int = 1
    outputs: int = 1
    gain_from: int | None = None
    left: bool = True


TARGETS = {
    target.name: target
    for target in (
        Target(
            "tensorrt",
            ops=frozenset({"Conv", "MatMul", "Gemm"}),
            patterns=frozenset({"2:4"}),
            channels=16,
            outputs=8,
            gain_from=256,
            left=False,
        ),
        Target("onnxruntime"),
        Target("any"),
    )
}


def find_target(name: str, pattern: Pattern) -> Target:
    """A runtime by name.

    Raises:
        OptionError: There is none of that name, or it does not know the pattern.
    """
    target = TARGETS.get(name)
    if target is None:
        raise OptionError(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    if target.patterns is not None and str(pattern) not in target.patterns:
        known = " or ".join(sorted(target.patterns))
        raise OptionError(
            f"{target.name} has no fast arithmetic for {pattern}, only for {known}; give --nm-target any"
        )
    return target


def obstacle(site: Site, pattern: Pattern, target: Target) -> str | None:
    """Why a weight gets no pattern; None if it does.

    A contracted axis that M does not divide is no obstacle where the target asks for no alignment: its last channels
    stay dense (:func:`tail`).
    """
    if site.reason is not None:
        return site.reason
    layout, use = site.layout, site.use
    assert layout is not None
    if layout.contracted == 1:
        return "each sum has one term only (a depthwise convolution)"
    if target.ops is not None and use.op not in target.ops:
        return f"{target.name} has no sparse {use.op}"
    if use.left and not target.left:
        return f"the weight is the left operand of {use.op}, where {target.name} takes the right one"
    for size, unit, what in (
        (layout.contracted, target.channels, "input channels"),
        (layout.outputs, target.outputs, "outputs"),
    ):
        if size % unit:
            return f"{size} {what} are no multiple of {unit}, as {target.name} needs"
    if isinstance(pattern, NM) and layout.contracted < pattern.m:
        return f"its {layout.contracted} input channels are fewer than {pattern.m}"
    return None


def tail(site: Site, pattern: Pattern) -> int:
    """Channels at the end of the contracted axis that fill no group of M."""
    if not isinstance(pattern, NM) or site.layout is None:
        return 0
    return site.layout.contracted % (pattern.m * pattern.block[1])


def gain(site: Site, target: Target) -> str | None:
    """Why the pattern is not likely to make the network faster on its target; None if it is."""
    layout = site.layout
    if layout is None:
        return None
    if target.gain_from is None:
        return "this target has no sparse arithmetic"
    if min(layout.contracted, layout.outputs) < target.gain_from:
        return f"{layout.contracted} x {layout.outputs} is small: below {target.gain_from} dense kernels are as fast"
    return None


def judged(site: Site, pattern: Pattern, target: Target) -> WeightReport:
    """What a target says of a weight; its contents are not looked at."""
    reason = obstacle(site, pattern, target)
    return WeightReport(
        site.name,
        site.use.node,
        site.use.op,
        site.shape,
        site.dtype.name,
        site.layout,
        reason is None,
        reason,
        gain(site, target),
        tail(site, pattern) if reason is None else 0,
    )
