"""Fused operators of com.microsoft and the attention operators of opset 23.

A fused attention keeps its scale when head dimensions go: the default is taken from the original head size.
"""

from __future__ import annotations

import numpy as np

from .builder import MS, Builder, family

PATTERNS, pattern = family()

AXIS = "a normalised axis: its statistics would change"
VOCABULARY = "looked up by run-time ids"
SHARED = "embed.w:1 q.w:0 q.w:1 k.w:0 k.w:1 v.w:0 v.w:1 o.w:0 o.w:1 head.w:0"


def qkv(b: Builder, x: str, c: int, *widths: int) -> list[str]:
    return [b.linear(name, x, c, width) for name, width in zip("qkv", widths, strict=True)]


def finish(b: Builder, y: str, x: str) -> None:
    """The output projection back to 24 features, a residual, the head."""
    b.token_head(b.add(x, b.linear("o", y, 32, 24)), 24)


@pattern("embed.w:1 qkv.w:0 qkv.w:1 qkv.b:0 o.w:0 o.w:1 head.w:0", oracle="everything")
def ms_attention(b: Builder) -> None:
    x = b.tokens(24)
    y = b.ms("Attention", x, b.weight("qkv.w", 24, 96, fan=24), b.vector("qkv.b", 96), num_heads=4)
    finish(b, y, x)


@pattern("embed.w:1 qkv.w:0 qkv.w:1 qkv.b:0 o.w:0 o.w:1 head.w:0", oracle="everything")
def ms_attention_with_narrow_values(b: Builder) -> None:
    x = b.tokens(24)
    w, bias = b.weight("qkv.w", 24, 80, fan=24), b.vector("qkv.b", 80)
    y = b.ms("Attention", x, w, bias, num_heads=4, qkv_hidden_sizes=[24, 24, 32])
    finish(b, y, x)


@pattern(SHARED, oracle="everything")
def ms_multi_head_attention(b: Builder) -> None:
    x = b.tokens(24)
    finish(b, b.ms("MultiHeadAttention", *qkv(b, x, 24, 32, 32, 32), num_heads=4), x)


@pattern(SHARED + " bias:0", oracle="everything")
def ms_multi_head_attention_with_bias(b: Builder) -> None:
    """The operator's own bias is q's, k's and v's in a row; the linears before it have none."""
    x = b.tokens(24)
    q, k, v = (b.matmul(x, b.weight(f"{name}.w", 24, 32, fan=24)) for name in "qkv")
    finish(b, b.ms("MultiHeadAttention", q, k, v, b.vector("bias", 96), num_heads=4), x)


@pattern("embed.w:1 q.w:0 q.w:1 k.w:1 v.w:1 o.w:0 o.w:1 head.w:0", oracle="everything")
def ms_group_query_attention(b: Builder) -> None:
    """Two key and value heads for four query heads: a key head goes with both its query heads."""
    x = b.tokens(24)
    lengths, total = np.array([5, 5], np.int32), np.array(6, np.int32)
    y = b.ms("GroupQueryAttention", *qkv(b, x, 24, 32, 16, 16), None, None, lengths, total,
             num_heads=4, kv_num_heads=2)  # fmt: skip
    finish(b, y, x)


@pattern("fc1.w:1 fc2.w:0", {"embed.w:1": AXIS, "sln.scale:0": AXIS, "fc1.w:0": AXIS, "fc2.w:1": AXIS})
@pattern("embed.w:1 sln.scale:0 sln.bias:0 sln.add:0 fc1.w:0 fc1.w:1 fc2.w:0 fc2.w:1 head.w:0", residual=True)
def ms_skip_layer_normalization(b: Builder) -> None:
    x = b.tokens(24)
    y = b.linear("fc2", b.ms("FastGelu", b.linear("fc1", x, 24, 32)), 32, 24)
    extra = b.vector("sln.scale", 24, mean=1), b.vector("sln.bias", 24), b.vector("sln.add", 24)
    b.token_head(b.ms("SkipLayerNormalization", x, y, *extra, epsilon=1e-5), 24)


@pattern("fc1.w:1 fc2.w:0", {"embed.w:1": AXIS, "sln.scale:0": AXIS, "fc1.w:0": AXIS, "fc2.w:1": AXIS})
@pattern("embed.w:1 sln.scale:0 fc1.w:0 fc1.w:1 fc2.w:0 fc2.w:1 head.w:0", residual=True)
def ms_skip_simplified_layer_normalization(b: Builder) -> None:
    x = b.tokens(24)
    y = b.linear("fc2", b.ms("QuickGelu", b.linear("fc1", x, 24, 32), alpha=1.5), 32, 24)
    scale = b.vector("sln.scale", 24, mean=1)
    b.token_head(b.ms("SkipSimplifiedLayerNormalization", x, y, scale, epsilon=1e-5), 24)


@pattern("embed.w:1 fc1.w:0 fc1.w:1 q.w:0 q.w:1 k.w:1 head.w:0", oracle="everything")
def ms_fused_matmul(b: Builder) -> None:
    """A transposed weight, and a product of two activations with transB and a scale."""
    x = b.tokens(24)
    x = b.relu(b.ms("FusedMatMul", x, b.weight("fc1.w", 16, 24), transB=1, alpha=0.5))
    q, k = b.linear("q", x, 16, 32), b.linear("k", x, 16, 32)
    mixed = b.matmul(b.ms("FusedMatMul", q, k, transB=1, alpha=32**-0.5), x)
    b.token_head(mixed, 16)


@pattern("stem.w:0 c1.w:0 c1.w:1 c1.b:0 c2.w:0 c2.w:1 head.w:1")
def ms_fused_conv(b: Builder) -> None:
    """Conv, activation and, in the second, a sum with another tensor in one operator."""
    x = b.stem(16)
    same = {"kernel_shape": [3, 3], "pads": [1] * 4}
    y = b.ms("FusedConv", x, b.weight("c1.w", 24, 16, 3, 3), b.vector("c1.b", 24), activation="Relu", **same)
    y = b.ms(
        "FusedConv", y, b.weight("c2.w", 16, 24, 3, 3), b.vector("c2.b", 16), x, activation="Relu", **same
    )
    b.head(y, 16)


@pattern("embed.w:1 fc1.w:0 fc1.w:1 fast:0 fc2.w:0 fc2.w:1 bias:0 fc3.w:0 fc3.w:1 head.w:0")
def ms_gelus(b: Builder) -> None:
    """FastGelu with its bias, BiasGelu, QuickGelu and Gelu one after the other."""
    x = b.ms("Gelu", b.tokens(24))
    x = b.ms("FastGelu", b.matmul(x, b.weight("fc1.w", 24, 32, fan=24)), b.vector("fast", 32))
    x = b.ms("BiasGelu", b.matmul(x, b.weight("fc2.w", 32, 16, fan=32)), b.vector("bias", 16))
    b.token_head(b.ms("QuickGelu", b.linear("fc3", x, 16, 24)), 24)


def tables(b: Builder, half: int) -> tuple[str, str]:
    """Cosines and sines (12, half) of 12 positions."""
    angles = np.arange(12)[:, None] * 10.0 ** -np.arange(half)[None] + 0.3
    return b.weight("cos", value=np.cos(angles)), b.weight("sin", value=np.sin(angles))


@pattern(SHARED + " cos:1 sin:1", {"cos:0": "one row a position"}, oracle="everything")
def ms_rotary_embedding(b: Builder) -> None:
    """(b, s, h d) operands: the operator splits heads by the table's width, and d turns with d + 4."""
    x = b.tokens(24)
    cos, sin = tables(b, 4)
    positions = np.broadcast_to(np.arange(6), (2, 6)).copy()
    q, k, v = qkv(b, x, 24, 32, 32, 32)
    q, k = (b.ms("RotaryEmbedding", t, positions, cos, sin) for t in (q, k))
    finish(b, b.ms("MultiHeadAttention", q, k, v, num_heads=4), x)


EMBEDDED = {"words:1": AXIS, "places:1": AXIS, "eln.scale:0": AXIS, "fc1.w:0": AXIS}


@pattern("fc1.w:1 fc2.w:0", EMBEDDED | {"words:0": VOCABULARY})
@pattern("words:1 places:1 kinds:1 eln.scale:0 eln.bias:0 fc1.w:0 fc1.w:1 fc2.w:0", residual=True)
def ms_embed_layer_normalization(b: Builder) -> None:
    ids = b.input("ids", (2, 6), "int32", high=20)
    kind = b.input("kind", (2, 6), "int32", high=2)
    words = (
        b.weight("words", 20, 24, fan=1),
        b.weight("places", 8, 24, fan=1),
        b.weight("kinds", 2, 24, fan=1),
    )
    norm = b.vector("eln.scale", 24, mean=1), b.vector("eln.bias", 24)
    x = b.ops("EmbedLayerNormalization", 2, ids, kind, *words, *norm, domain=MS)[0]
    b.token_head(b.relu(b.linear("fc2", b.relu(b.linear("fc1", x, 24, 32)), 32, 16)), 16)


@pattern(SHARED, oracle="everything", opset=23)
def attention_on_heads(b: Builder) -> None:
    """Opset 23's Attention on (b, h, s, d) operands."""
    x = b.tokens(24)
    q, k, v = (b.transpose(b.reshape(t, 2, 6, 4, 8), 0, 2, 1, 3) for t in qkv(b, x, 24, 32, 32, 32))
    y = b.op("Attention", q, k, v, is_causal=1)
    finish(b, b.reshape(b.transpose(y, 0, 2, 1, 3), 2, 6, 32), x)


@pattern(SHARED, oracle="everything", opset=23)
def attention_on_rows(b: Builder) -> None:
    """Opset 23's Attention on (b, s, h d) operands, four query heads for two of keys and values."""
    x = b.tokens(24)
    finish(b, b.op("Attention", *qkv(b, x, 24, 32, 16, 16), q_num_heads=4, kv_num_heads=2), x)


@pattern(SHARED + " cos:1 sin:1", {"cos:0": "one row a position"}, oracle="everything", opset=23)
def rotary_embedding_op(b: Builder) -> None:
    """Opset 23's RotaryEmbedding on (b, s, h d) operands, then Attention."""
    x = b.tokens(24)
    cos, sin = tables(b, 4)
    positions = np.broadcast_to(np.arange(6), (2, 6)).copy()
    q, k, v = qkv(b, x, 24, 32, 32, 32)
    q, k = (b.op("RotaryEmbedding", t, cos, sin, positions, num_heads=4) for t in (q, k))
    finish(b, b.op("Attention", q, k, v, q_num_heads=4, kv_num_heads=4), x)


@pattern(SHARED + " cos:1 sin:1", oracle="everything", opset=23)
def rotary_embedding_op_interleaved(b: Builder) -> None:
    """Pairs (2 i, 2 i + 1) turn together, on (b, h, s, d) operands."""
    x = b.tokens(24)
    cos, sin = tables(b, 4)
    positions = np.broadcast_to(np.arange(6), (2, 6)).copy()
    q, k, v = (b.transpose(b.reshape(t, 2, 6, 4, 8), 0, 2, 1, 3) for t in qkv(b, x, 24, 32, 32, 32))
    q, k = (b.op("RotaryEmbedding", t, cos, sin, positions, interleaved=1) for t in (q, k))
    finish(b, b.reshape(b.transpose(b.op("Attention", q, k, v), 0, 2, 1, 3), 2, 6, 32), x)
