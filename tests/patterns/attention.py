"""Attention in the ways exporters write it with standard operators: heads, head dimensions, rotary tables, windows."""

from __future__ import annotations

import numpy as np

from .builder import Builder, family

PATTERNS, pattern = family()

OUTPUT = "a graph output keeps its shape"
INPUT = "a graph input keeps its shape"
VOCABULARY = "looked up by run-time ids"
POSITIONS = "one row a token: tokens are not channels"
SHARED = "embed.w:1 q.w:0 q.w:1 k.w:0 k.w:1 v.w:0 v.w:1 o.w:0 o.w:1 head.w:0"
FUSED = "embed.w:1 qkv.w:0 qkv.w:1 qkv.b:0 proj.w:0 proj.w:1 head.w:0"


def heads(b: Builder, x: str, n: int, d: int, *perm: int, length: int = 6) -> str:
    """(b, s, n d) -> (b, n, s, d), or the order that `perm` asks for."""
    return b.transpose(b.reshape(x, 2, length, n, d), *(perm or (0, 2, 1, 3)))


def merge(b: Builder, x: str, c: int, length: int = 6) -> str:
    """(b, n, s, d) -> (b, s, n d)."""
    return b.reshape(b.transpose(x, 0, 2, 1, 3), 2, length, c)


def attend(b: Builder, q: str, k: str, v: str, d: int) -> str:
    """Softmax attention on (b, n, s, d) operands."""
    logits = b.matmul(q, b.transpose(k, 0, 1, 3, 2))
    return b.matmul(b.op("Softmax", b.mul(logits, b.const(d**-0.5)), axis=-1), v)


@pattern(FUSED, oracle="everything")
def fused_qkv_three_first(b: Builder) -> None:
    """timm's ViT: (b, s, 3 h d) -> (3, b, h, s, d), then Gather 0, 1 and 2."""
    x = b.tokens(24)
    qkv = b.transpose(b.reshape(b.linear("qkv", x, 24, 96), 2, 6, 3, 4, 8), 2, 0, 3, 1, 4)
    q, k, v = (b.gather(qkv, i, 0) for i in range(3))
    y = b.linear("proj", merge(b, attend(b, q, k, v, 8), 32), 32, 24)
    b.token_head(b.add(x, y), 24)


@pattern(FUSED, oracle="everything")
def fused_qkv_heads_first(b: Builder) -> None:
    """GPT-NeoX: (b, s, h 3d), each head's q, k and v side by side."""
    x = b.tokens(24)
    qkv = b.transpose(b.reshape(b.linear("qkv", x, 24, 96), 2, 6, 4, 24), 0, 2, 1, 3)
    q, k, v = b.split(qkv, 8, 8, 8, axis=3)
    y = b.linear("proj", merge(b, attend(b, q, k, v, 8), 32), 32, 24)
    b.token_head(b.add(x, y), 24)


@pattern(FUSED, oracle="everything")
def fused_qkv_split_first(b: Builder) -> None:
    """GPT-2: Split of the flat axis into three, then heads."""
    x = b.tokens(24)
    q, k, v = (heads(b, part, 4, 8) for part in b.split(b.linear("qkv", x, 24, 96), 32, 32, 32, axis=2))
    y = b.linear("proj", merge(b, attend(b, q, k, v, 8), 32), 32, 24)
    b.token_head(b.add(x, y), 24)


@pattern(SHARED + " q.b:0 k.b:0 v.b:0", oracle="everything")
def separate_qkv(b: Builder) -> None:
    """BERT without its LayerNorms."""
    x = b.tokens(24)
    q, k, v = (heads(b, b.linear(name, x, 24, 32), 4, 8) for name in "qkv")
    y = b.linear("o", merge(b, attend(b, q, k, v, 8), 32), 32, 24)
    b.token_head(b.add(x, y), 24)


@pattern(SHARED, oracle="everything")
def grouped_query_attention(b: Builder) -> None:
    """Llama: two key and value heads, each repeated for two query heads by Unsqueeze, Expand and Reshape."""
    x = b.tokens(24)
    q = heads(b, b.linear("q", x, 24, 32), 4, 8)
    k, v = (heads(b, b.linear(name, x, 24, 16), 2, 8) for name in "kv")
    k, v = (b.reshape(b.op("Expand", b.op("Unsqueeze", t, [2]), [2, 2, 2, 6, 8]), 2, 4, 6, 8) for t in (k, v))
    b.token_head(b.linear("o", merge(b, attend(b, q, k, v, 8), 32), 32, 24), 24)


@pattern("embed.w:1 in.w:0 in.w:1 in.b:0 out.w:0 out.w:1 head.w:0", oracle="everything")
def multihead_attention(b: Builder) -> None:
    """nn.MultiheadAttention: sequence first, (b h) merged for a batched product, a Gemm on (s b) rows after."""
    x = b.transpose(b.tokens(24), 1, 0, 2)
    product = b.matmul(x, b.transpose(b.weight("in.w", 96, 24), 1, 0))
    packed = b.add(product, b.vector("in.b", 96))
    packed = b.transpose(b.op("Unsqueeze", b.reshape(packed, 6, 2, 3, 32), [0]), 3, 1, 2, 0, 4)
    packed = b.op("Squeeze", packed, [3])
    q, k, v = (b.transpose(b.reshape(b.gather(packed, i, 0), 6, 8, 8), 1, 0, 2) for i in range(3))
    logits = b.matmul(b.mul(q, b.const(8**-0.5)), b.transpose(k, 0, 2, 1))
    y = b.transpose(b.matmul(b.op("Softmax", logits, axis=-1), v), 1, 0, 2)
    y = b.op("Gemm", b.reshape(y, 12, 32), b.weight("out.w", 24, 32), b.vector("out.b", 24), transB=1)
    b.token_head(b.transpose(b.reshape(y, 6, 2, 24), 1, 0, 2), 24)


@pattern(SHARED, oracle="everything")
def einsum_of_two_activations(b: Builder) -> None:
    x = b.tokens(24)
    q, k, v = (b.reshape(b.linear(name, x, 24, 32), 2, 6, 4, 8) for name in "qkv")
    weights = b.op("Softmax", b.op("Einsum", q, k, equation="bihd,bjhd->bhij"), axis=-1)
    y = b.reshape(b.op("Einsum", weights, v, equation="bhij,bjhd->bihd"), 2, 6, 32)
    b.token_head(b.linear("o", y, 32, 24), 24)


@pattern("embed.w:1 q.w:0 q.w:2 k.w:0 k.w:2 v.w:0 v.w:2 o.w:1 o.w:2 head.w:0", oracle="everything")
def einsum_with_weight(b: Builder) -> None:
    """Keras' MultiHeadAttention: weights (c, h, d) into and (h, d, c) out of the heads; no reshape anywhere."""
    x = b.tokens(24)
    q, k, v = (
        b.op("Einsum", x, b.weight(f"{name}.w", 24, 4, 8, fan=24), equation="bsc,chd->bhsd") for name in "qkv"
    )
    y = attend(b, q, k, v, 8)
    b.token_head(b.op("Einsum", y, b.weight("o.w", 4, 8, 24, fan=32), equation="bhsd,hdc->bsc"), 24)


@pattern("embed.w:1 q.w:1 k.w:1 v.w:1 o.w:0", {"mem.w:0": INPUT}, oracle="everything")
def cross_attention(b: Builder) -> None:
    """Queries from one sequence, keys and values from another."""
    x = b.tokens(24)
    memory = b.linear("mem", b.input("memory", (2, 6, 12)), 12, 16)
    q = heads(b, b.linear("q", x, 24, 32), 4, 8)
    k, v = (heads(b, b.linear(name, memory, 16, 32), 4, 8) for name in "kv")
    b.token_head(b.linear("o", merge(b, attend(b, q, k, v, 8), 32), 32, 24), 24)


@pattern(SHARED, oracle="everything")
def linear_attention(b: Builder) -> None:
    """Keys meet values first: head dimensions of k and v both survive into a (d, d) product."""
    x = b.tokens(24)
    q, k, v = (heads(b, b.linear(name, x, 24, 32), 4, 8) for name in "qkv")
    context = b.matmul(b.transpose(b.relu(k), 0, 1, 3, 2), v)
    b.token_head(b.linear("o", merge(b, b.matmul(b.relu(q), context), 32), 32, 24), 24)


@pattern(SHARED + " inv_freq:1", oracle="everything")
def rotary_embedding(b: Builder) -> None:
    """Llama's: a table cos, sin of positions times inv_freq, shared by all heads; the scale comes from a Shape.

    Positions d and d + 4 turn together, in every head of q and of k; the scale stays that of eight dimensions.
    """
    x = b.tokens(24)
    q, k, v = (heads(b, b.linear(name, x, 24, 32), 4, 8) for name in "qkv")
    frequencies = b.weight("inv_freq", value=(10.0 ** -np.arange(4)).reshape(1, 4, 1))
    positions = b.op("Cast", b.input("position_ids", (1, 6), "int64", high=40), to=1)
    angles = b.transpose(b.matmul(frequencies, b.op("Unsqueeze", positions, [1])), 0, 2, 1)
    angles = b.op("Unsqueeze", b.concat(angles, angles, axis=-1), [1])
    cos, sin = b.op("Cos", angles), b.op("Sin", angles)

    def turn(t: str) -> str:
        back = b.op("Neg", b.slice(t, 3, 4, 2**63 - 1))
        return b.add(b.mul(t, cos), b.mul(b.concat(back, b.slice(t, 3, 0, 4), axis=-1), sin))

    q, k = turn(q), turn(k)
    width = b.op("Cast", b.gather(b.op("Shape", q), -1, 0), to=1)
    logits = b.op("Div", b.matmul(q, b.transpose(k, 0, 1, 3, 2)), b.op("Sqrt", width))
    y = merge(b, b.matmul(b.op("Softmax", logits, axis=-1), v), 32)
    b.token_head(b.linear("o", y, 32, 24), 24)


@pattern("patch.w:0 cls:2 fc.w:0 fc.w:1 head.w:1", {"pos:1": POSITIONS, "head.w:0": OUTPUT})
def class_token_and_position_embedding(b: Builder) -> None:
    patches = b.op(
        "Conv",
        b.input("x", (2, 3, 8, 8)),
        b.weight("patch.w", 24, 3, 4, 4),
        b.vector("patch.b", 24),
        strides=[4, 4],
    )
    x = b.transpose(b.reshape(patches, 2, 24, 4), 0, 2, 1)
    token = b.op("Expand", b.vector("cls", 1, 1, 24), [2, 1, 1])
    x = b.add(b.concat(token, x, axis=1), b.vector("pos", 1, 5, 24))
    x = b.add(x, b.linear("fc", b.op("Tanh", b.op("ReduceMean", x, [1])), 24, 24))
    b.vector_head(b.gather(x, 0, 1), 24)


@pattern("table:1 fc1.w:0 fc1.w:1 fc2.w:0 fc2.w:1", {"table:0": VOCABULARY})
def tied_embedding(b: Builder) -> None:
    """The table that embeds the ids, transposed, is the last layer."""
    table = b.weight("table", 20, 24, fan=4)
    x = b.lookup(table, b.input("ids", (2, 6), "int64", high=20))
    x = b.add(x, b.linear("fc2", b.relu(b.linear("fc1", x, 24, 32)), 32, 24))
    b.output(b.matmul(x, b.transpose(table, 1, 0)))


@pattern("embed.w:1 up.w:0 up.w:1 down.w:0 down.w:1 head.w:0")
def swiglu_with_fused_gate_up(b: Builder) -> None:
    x = b.tokens(24)
    gate, up = b.split(b.linear("up", x, 24, 64), 32, 32, axis=2)
    b.token_head(b.add(x, b.linear("down", b.mul(b.silu(gate), up), 32, 24)), 24)


@pattern(
    "embed.w:1 w1:1 w1:2 w2:1 w2:2 head.w:0",
    {"w1:0": "indexed at run time", "router.w:1": "ranked at run time"},
)
def mixture_of_experts_by_gather(b: Builder) -> None:
    """Each token's expert is chosen by ArgMax, and its weights are gathered from a stack of four."""
    x = b.tokens(16)
    chosen = b.op("ArgMax", b.linear("router", x, 16, 4), axis=2, keepdims=0)
    w1, w2 = b.weight("w1", 4, 16, 24, fan=16), b.weight("w2", 4, 24, 16, fan=24)
    rows = b.op("Unsqueeze", x, [2])
    hidden = b.relu(b.matmul(rows, b.lookup(w1, chosen)))
    y = b.op("Squeeze", b.matmul(hidden, b.lookup(w2, chosen)), [2])
    b.token_head(b.add(x, y), 16)


def windows(b: Builder, x: str, c: int) -> str:
    """(2, 4, 4, c) -> (8, 4, c): windows of two by two."""
    return b.reshape(b.transpose(b.reshape(x, 2, 2, 2, 2, 2, c), 0, 1, 3, 2, 4, 5), -1, 4, c)


def unwindow(b: Builder, x: str, c: int) -> str:
    return b.reshape(b.transpose(b.reshape(x, 2, 2, 2, 2, 2, -1), 0, 1, 3, 2, 4, 5), 2, 4, 4, c)


def roll(b: Builder, x: str, by: int) -> str:
    """torch.roll over both image axes, as Slice and Concat."""
    for axis in (1, 2):
        x = b.concat(b.slice(x, axis, by, 2**63 - 1), b.slice(x, axis, 0, by), axis=axis)
    return x


def patch_merging(b: Builder, x: str) -> str:
    views = [b.slice(b.slice(x, 1, i, 4, 2), 2, j, 4, 2) for j in (0, 1) for i in (0, 1)]
    return b.concat(*views, axis=-1)


def patches(b: Builder, c: int) -> str:
    """An image of 4 x 4 tokens (2, 4, 4, c)."""
    return b.transpose(b.conv("stem", b.input("x", (2, 3, 4, 4)), 3, c), 0, 2, 3, 1)


@pattern("stem.w:0 qkv.w:0 qkv.w:1 proj.w:0 proj.w:1 merge.w:0 merge.w:1 head.w:0", oracle="everything")
def swin_block(b: Builder) -> None:
    """Cyclic shift, window partition, attention within windows, all of it backwards, then patch merging."""
    x = patches(b, 16)
    y = windows(b, roll(b, x, 1), 16)
    qkv = b.transpose(b.reshape(b.linear("qkv", y, 16, 48), 8, 4, 3, 2, 8), 2, 0, 3, 1, 4)
    q, k, v = (b.op("Squeeze", part, [0]) for part in b.split(qkv, 1, 1, 1, axis=0))
    logits = b.matmul(b.mul(q, b.const(8**-0.5)), b.transpose(k, 0, 1, 3, 2))
    logits = b.add(logits, b.vector("bias_table", 1, 2, 4, 4))
    y = b.transpose(b.matmul(b.op("Softmax", logits, axis=-1), v), 0, 2, 1, 3)
    y = b.linear("proj", b.reshape(y, 8, 4, 16), 16, 16)
    x = b.add(x, roll(b, unwindow(b, y, 16), -1))
    x = b.linear("merge", patch_merging(b, x), 64, 32)
    b.token_head(x, 32)


MERGED = {
    "stem.w:0": "normalised by the LayerNorm of patch merging",
    "merge_norm.scale:0": "a LayerNorm's axis",
}


@pattern("merge.w:1 head.w:0", MERGED)
@pattern("stem.w:0 merge_norm.scale:0 merge_norm.bias:0 merge.w:0 merge.w:1 head.w:0", residual=True)
def swin_patch_merging_with_norm(b: Builder) -> None:
    x = b.layer_norm("merge_norm", patch_merging(b, patches(b, 16)), 64)
    b.token_head(b.linear("merge", x, 64, 32), 32)
