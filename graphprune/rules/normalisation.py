"""Normalisations: what is divided by a statistic, and over which factors the statistic is taken."""

from __future__ import annotations

from graphprune.graph import Op
from graphprune.rules.elementwise import term
from graphprune.rules.registry import Description, has_input, normal_axis, register, shape_of


def _marked(shape: tuple[int, ...], whole: tuple[int, ...], start: int) -> str:
    """A broadcasting term whose factors from axis ``start`` of the whole on are normalised over."""
    skip = len(whole) - len(shape)
    return " ".join(
        word + ("~" if word != "1" and skip + i >= start else "")
        for i, word in enumerate(term(shape, whole).split())
    )


def layer_norm(op: Op) -> str:
    """Statistics over all axes from ``axis`` on; scale and bias broadcast."""
    whole = shape_of(op, 0)
    axis = normal_axis(int(op.attributes.get("axis", -1)), len(whole))
    inputs = [_marked(shape_of(op, slot), whole, axis) if has_input(op, slot) else "?" for slot in (0, 1, 2)]
    statistic = " ".join([f"x{i}" for i in range(axis)] + ["1"] * (len(whole) - axis))
    return f"{', '.join(inputs)} -> {_marked(whole, whole, axis)}, {statistic}, {statistic}"


def skip_layer_norm(op: Op) -> str:
    """``norm(input + skip + bias)``, and the sum itself as the fourth output."""
    whole = shape_of(op, 0)
    last = len(whole) - 1
    inputs = [
        _marked(shape_of(op, s), whole, last) if has_input(op, s) else "?" for s in range(len(op.inputs))
    ]
    result = _marked(whole, whole, last)
    return f"{', '.join(inputs)} -> {result}, ?, ?, {result}"


def group_norm(op: Op) -> str:
    """Groups are independent; within a group channels share mean and variance.

    Scale and bias had one entry a group in opset 18 and have one a channel since 21.
    """
    groups, channels = int(op.attributes["num_groups"]), shape_of(op, 0)[1]
    affine = "g" if shape_of(op, 1)[0] == groups != channels else "(g c~)"
    return f"n (g c~) S!*, {affine}, {affine} -> n (g c~) S!*"


def over_axes(op: Op) -> str:
    """MeanVarianceNormalization: statistics over ``axes``."""
    rank = len(shape_of(op, 0))
    axes = {normal_axis(int(axis), rank) for axis in op.attributes.get("axes", [0, 2, 3])}
    text = " ".join(f"x{i}~" if i in axes else f"x{i}" for i in range(rank))
    return f"{text} -> {text}"


def lp_norm(op: Op) -> str:
    rank = len(shape_of(op, 0))
    axis = normal_axis(int(op.attributes.get("axis", -1)), rank)
    text = " ".join(f"x{i}~" if i == axis else f"x{i}" for i in range(rank))
    return f"{text} -> {text}"


def batch_norm(op: Op) -> Description:
    """Channels are independent: running statistics go with their channel."""
    outputs = ", ".join(["n c S*"] + ["c"] * (len(op.outputs) - 1))
    if len(shape_of(op, 0)) == 1:
        return f"n, ?, ?, ?, ? -> {', '.join(['n'] + ['?'] * (len(op.outputs) - 1))}"
    if op.attributes.get("training_mode", 0):
        return f"n! c S!*, c, c, c, c -> {outputs}"  # its statistics are the batch's
    return f"n c S*, c, c, c, c -> {outputs}"


def embed_layer_norm(op: Op) -> str:
    """``norm(word[id] + position[i] + segment[s])`` over the hidden axis d; the last output is the sum."""
    segment = "q! d~" if has_input(op, 4) else "?"
    outputs = ["b s! d~", "b", "b s! d~"][: max(1, len(op.outputs))]
    ids = ["b s!" if has_input(op, slot) and len(shape_of(op, slot)) == 2 else "?" for slot in (1, 7, 8)]
    return f"b s!, {ids[0]}, v! d~, p! d~, {segment}, d~, d~, {ids[1]}, {ids[2]} -> {', '.join(outputs)}"


register("BatchNormalization", batch_norm)
# Space is normalised over rather than blocked: GroupNorm is exported with the channels of a group folded into it.
register("InstanceNormalization", "n c S~*, c, c -> n c S~*")
register("LayerNormalization RMSNormalization SimplifiedLayerNormalization", layer_norm)
register("com.microsoft::LayerNormalization com.microsoft::SimplifiedLayerNormalization", layer_norm)
register(
    "com.microsoft::SkipLayerNormalization com.microsoft::SkipSimplifiedLayerNormalization", skip_layer_norm
)
register("GroupNormalization", group_norm, attributes={"num_groups": "g"})
register("com.microsoft::EmbedLayerNormalization", embed_layer_norm)
register("MeanVarianceNormalization", over_axes)
register("LpNormalization", lp_norm)
register("LRN", "n c~ S* -> n c~ S*")
