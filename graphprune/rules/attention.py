"""Attention ops: heads h (k key heads, each read by r query heads), query-key dimensions d, value dimensions e.

The scale of the scores is a function of d where the node does not state it; it is stated when d shrinks.
"""

from __future__ import annotations

from graphprune.graph import Op
from graphprune.rules.registry import Change, Description, Refusal, has_input, register, shape_of


def _mask(op: Op, slot: int, whole: tuple[str, ...]) -> str:
    """The term of a mask that broadcasts to ``whole``, whose factors may be products written in brackets."""
    if not has_input(op, slot):
        return "?"
    shape = shape_of(op, slot)
    words = whole[len(whole) - len(shape) :]
    return " ".join("1" if size == 1 else word for size, word in zip(shape, words, strict=True))


def attention(op: Op) -> Description:
    """The standard's Attention: rank 4 with heads apart, or rank 3 with heads inside the last axis."""
    rank = len(shape_of(op, 0))
    outputs = [tensor is not None for tensor in op.outputs]
    past = has_input(op, 4)
    # Where it is causal, which query a position is counts.
    s = "s!" if op.attributes.get("is_causal", 0) else "s"
    if rank == 4:
        q, k, v = f"b (k r) {s} d^", "b k t! d^", "b k t! e"
        y = f"b (k r) {s} e"
        if not past:
            known = {"k": shape_of(op, 1)[1]}
            if shape_of(op, 0)[1] % known["k"]:
                return Refusal("its query heads are no multiple of its key heads")
    else:
        q, k, v = f"b {s} (k r d^)", "b t! (k d^)", "b t! (k e)"
        y = f"b {s} (k r e)"
    total = "u!" if past else "t!"
    mask = _mask(op, 3, ("b", "(k r)", "s", total))
    past_key, past_value = ("b k p! d^", "b k p! e") if past else ("?", "?")
    inputs = [q, k, v, mask, past_key, past_value, "b" if has_input(op, 6) else "?"]
    results = [y, f"b k {total} d", f"b k {total} e", f"b (k r) s {total}"]
    present = [text if there else "?" for text, there in zip(results, outputs, strict=False)]
    return f"{', '.join(inputs)} -> {', '.join(present)}"


def keep_scale(change: Change) -> None:
    """State the ``1 / sqrt(d)`` of the original head size when d has shrunk and the node states no scale."""
    old, new = change.factor_sizes("d")
    if old != new and not change.op.attributes.get("scale", 0.0):
        change.set_attribute("scale", float(old) ** -0.5)


def _packed(width: int, value_width: int) -> str:
    """Query, key and value side by side on one axis, as three views of it."""
    return (
        f"(h d^)[0:{width}] | PREFIX(h d^)[{width}:{2 * width}] | "
        f"PREFIX(h e)[{2 * width}:{2 * width + value_width}]"
    )


def _side_by_side(prefix: str, width: int, value_width: int) -> str:
    return prefix + _packed(width, value_width).replace("PREFIX", prefix)


def fused_attention(op: Op) -> Description:
    """com.microsoft Attention: projections of query, key and value stacked in one weight."""
    total = shape_of(op, 1)[1]
    sizes = [int(size) for size in op.attributes.get("qkv_hidden_sizes", [total // 3] * 3)]
    if sizes[0] != sizes[1]:
        return Refusal("its query and key widths differ")
    if int(op.attributes.get("do_rotary", 0)):
        return Refusal("it rotates pairs of head dimensions itself")
    if has_input(op, 4) or (len(op.outputs) > 1 and op.outputs[1] is not None):
        return Refusal("its past keys and values are stacked in one tensor")
    weight = _side_by_side("i ", sizes[0], sizes[2]).replace("d^", "d")
    bias = _side_by_side("", sizes[0], sizes[2]).replace("d^", "d") if has_input(op, 2) else "?"
    return f"b s! i, {weight}, {bias}, ?, ?, ?, ? -> b s! (h e)"


def rewrite_fused_attention(change: Change) -> None:
    """Widths of query, key and value are stated where they differ by now."""
    keep_scale(change)
    h, d, e = (change.factor_sizes(factor)[1] for factor in "hde")
    if "qkv_hidden_sizes" in change.op.attributes or d != e:
        change.set_attribute("qkv_hidden_sizes", [h * d, h * d, h * e])


def multi_head_attention(op: Op) -> Description:
    """com.microsoft MultiHeadAttention on separate query, key and value of rank 3."""
    if not has_input(op, 1) or not has_input(op, 2) or any(len(shape_of(op, s)) != 3 for s in range(3)):
        return Refusal("its query, key and value are packed")
    q_width, v_width = shape_of(op, 0)[2], shape_of(op, 2)[2]
    bias = _side_by_side("", q_width, v_width) if has_input(op, 3) else "?"
    past = has_input(op, 6)
    past_key, past_value = ("b h p! d^", "b h p! e") if past else ("?", "?")
    total = "u!" if past or (len(op.outputs) > 1 and op.outputs[1] is not None) else "t!"
    mask = _mask(op, 5, ("b", "h", "s", total))
    results = ["b s (h e)", f"b h {total} d", f"b h {total} e", f"b h s {total}"]
    present = [text if tensor is not None else "?" for text, tensor in zip(results, op.outputs, strict=False)]
    return f"b s (h d^), b t! (h d^), b t! (h e), {bias}, ?, {mask}, {past_key}, {past_value} -> {', '.join(present)}"


def group_query_attention(op: Op) -> Description:
    """com.microsoft GroupQueryAttention: heads may go, head dimensions have fixed strides in its kernels."""
    if not has_input(op, 1) or not has_input(op, 2):
        return Refusal("its query, key and value are packed")
    outputs = ["b s! (k r d!)", "b k u! d!", "b k u! d!"][: len(op.outputs)]
    past = "b k p! d!" if has_input(op, 3) else "?"
    return f"b s! (k r d!), b t! (k d!), b t! (k d!), {past}, {past}, b, ?, ?, ?, ?, ?, ? -> {', '.join(outputs)}"


def rotary(op: Op) -> Description:
    """Pairs of head dimensions turn by angles d, which all heads share: heads may go, and pairs.

    The two of a pair lie side by side where the op is interleaved, half a head apart where it is not. Where only some
    of the dimensions turn, none of them may go.
    """
    foreign = op.domain == "com.microsoft"
    shape = shape_of(op, 0)
    cos = shape_of(op, 2 if foreign else 1)
    heads = int(op.attributes.get("num_heads", 0))
    turned = int(op.attributes.get("rotary_embedding_dim", 0))
    if len(shape) == 4:
        width = shape[3]
    elif heads:
        width = shape[2] // heads
    elif foreign and not turned:
        width = 2 * cos[-1]
    else:
        return Refusal("it does not say how many heads there are")
    if turned in (0, width) and 2 * cos[-1] == width:
        pair, table = ("d t!" if int(op.attributes.get("interleaved", 0)) else "t! d"), "d"
    else:
        pair, table = "d!", "_"
    slot = 1 if foreign else 3
    places, lead, s = "?", ["_"] * (len(cos) - 1), "s"
    if not has_input(op, slot):
        lead = ["b", "s"]
    elif len(shape_of(op, slot)) == 2:
        places = "b s"
    else:
        s = "s!"  # one offset for all: which position it is counts
    text = f"b h {s} ({pair})" if len(shape) == 4 else f"b {s} (h {pair})"
    cache = " ".join([*lead, table])
    inputs = [text, places, cache, cache] if foreign else [text, cache, cache, places]
    return f"{', '.join(inputs[: len(op.inputs)])} -> {text}", {"t": 2} if "t!" in pair else {"d": width}


register(
    "Attention",
    attention,
    attributes={"q_num_heads": "k r", "kv_num_heads": "k"},
    rewrite=keep_scale,
    macs="b k r s t d + b k r s t e",
)
register(
    "com.microsoft::Attention",
    fused_attention,
    attributes={"num_heads": "h"},
    rewrite=rewrite_fused_attention,
    macs="b s i h d + b s i h d + b s i h e + b h s s d + b h s s e",
)
register(
    "com.microsoft::MultiHeadAttention",
    multi_head_attention,
    attributes={"num_heads": "h"},
    rewrite=keep_scale,
    macs="b h s t d + b h s t e",
)
register(
    "com.microsoft::GroupQueryAttention",
    group_query_attention,
    attributes={"num_heads": "k r", "kv_num_heads": "k"},
    macs="b k r s t d + b k r s t d",
)
register("RotaryEmbedding com.microsoft::RotaryEmbedding", rotary, attributes={"num_heads": "h"})
