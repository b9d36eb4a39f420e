"""Normalisations. A normalised axis is statistical: it keeps its size unless residual groups were asked for.

What a normalisation passes through (InstanceNorm's channels, whole groups of a GroupNorm) is pruned exactly.
"""

from __future__ import annotations

from .builder import Builder, family

PATTERNS, pattern = family()

AXIS = "a normalised axis: its statistics would change"
STREAM = {"embed.w:1": AXIS, "head.w:0": AXIS, "fc2.w:1": AXIS}


@pattern("fc1.w:1 fc1.b:0 fc2.w:0", STREAM | {"ln.scale:0": AXIS})
@pattern("embed.w:1 ln.scale:0 ln.bias:0 fc1.w:0 fc1.w:1 fc2.w:0 fc2.w:1 end.scale:0 head.w:0", residual=True)
def layer_norm_ffn(b: Builder) -> None:
    x = b.tokens(24)
    y = b.gelu(b.linear("fc1", b.layer_norm("ln", x, 24), 24, 32))
    x = b.add(x, b.linear("fc2", y, 32, 24))
    b.token_head(b.layer_norm("end", x, 24), 24)


@pattern("fc1.w:1 fc1.b:0 fc2.w:0", STREAM | {"ln.scale:0": AXIS})
@pattern("embed.w:1 ln.scale:0 fc1.w:0 fc1.w:1 fc2.w:0 fc2.w:1 head.w:0", residual=True)
def layer_norm_by_primitives(b: Builder) -> None:
    """Opset 9's LayerNorm: means, a square, a square root."""
    x = b.tokens(24)
    centred = b.op("Sub", x, b.op("ReduceMean", x, [-1]))
    variance = b.op("ReduceMean", b.op("Pow", centred, 2.0), [-1])
    y = b.op("Div", centred, b.op("Sqrt", b.add(variance, b.const(1e-5))))
    y = b.add(b.mul(y, b.vector("ln.scale", 24, mean=1)), b.vector("ln.bias", 24))
    y = b.gelu(b.linear("fc1", y, 24, 32))
    b.token_head(b.add(x, b.linear("fc2", y, 32, 24)), 24)


@pattern("fc1.w:1 gate.w:1 fc2.w:0", STREAM | {"rms.scale:0": AXIS})
@pattern("embed.w:1 rms.scale:0 fc1.w:0 fc1.w:1 gate.w:0 gate.w:1 fc2.w:0 fc2.w:1 head.w:0", residual=True)
def rms_norm_ffn(b: Builder) -> None:
    """Llama's block, RMSNorm by primitives, gate and up apart."""
    x = b.tokens(24)
    power = b.op("ReduceMean", b.op("Pow", x, 2.0), [-1])
    y = b.mul(x, b.op("Reciprocal", b.op("Sqrt", b.add(power, b.const(1e-6)))))
    y = b.mul(b.vector("rms.scale", 24, mean=1), y)
    y = b.mul(b.silu(b.linear("gate", y, 24, 32)), b.linear("fc1", y, 24, 32))
    b.token_head(b.add(x, b.linear("fc2", y, 32, 24)), 24)


@pattern("fc1.w:1 fc2.w:0", STREAM | {"rms.scale:0": AXIS}, opset=23)
@pattern("embed.w:1 rms.scale:0 fc1.w:0 fc1.w:1 fc2.w:0 fc2.w:1 head.w:0", residual=True, opset=23)
def rms_normalization_op(b: Builder) -> None:
    x = b.tokens(24)
    y = b.op("RMSNormalization", x, b.vector("rms.scale", 24, mean=1), axis=-1, epsilon=1e-6)
    y = b.op("Gelu", b.linear("fc1", y, 24, 32))
    b.token_head(b.add(x, b.linear("fc2", y, 32, 24)), 24)


@pattern("pw1.w:1 pw1.b:0 pw2.w:0", {"stem.w:0": AXIS, "dw.w:0": AXIS, "gamma:0": AXIS})
@pattern("stem.w:0 dw.w:0 ln.scale:0 pw1.w:0 pw1.w:1 pw2.w:0 pw2.w:1 gamma:0 head.w:1", residual=True)
def convnext_block(b: Builder) -> None:
    x = b.conv("stem", b.input("x", (2, 3, 8, 8)), 3, 16)
    y = b.transpose(b.conv("dw", x, 16, 16, group=16), 0, 2, 3, 1)
    y = b.gelu(b.linear("pw1", b.layer_norm("ln", y, 16), 16, 32))
    y = b.mul(b.vector("gamma", 16, mean=1), b.linear("pw2", y, 32, 16))
    b.head(b.add(x, b.transpose(y, 0, 3, 1, 2)), 16)


@pattern("stem.w:0 gn.scale:0 gn.bias:0 c1.w:1 c1.w:0 head.w:1", opset=21)
def group_norm(b: Builder) -> None:
    """Whole groups of a GroupNorm share no statistics: of four, two go, exactly."""
    x = b.conv("stem", b.input("x", (2, 3, 8, 8)), 3, 16)
    scale, bias = b.vector("gn.scale", 16, mean=1), b.vector("gn.bias", 16)
    x = b.relu(b.op("GroupNormalization", x, scale, bias, num_groups=4))
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


def group_norm_by_reshape(b: Builder, name: str, x: str, c: int, groups: int) -> str:
    """As both exporters of torch write it below opset 18."""
    ones, zeros = b.const([1.0] * groups), b.const([0.0] * groups)
    y = b.op("InstanceNormalization", b.reshape(x, 0, groups, -1), ones, zeros)
    y = b.reshape(y, 2, c, 8, 8)
    return b.add(b.mul(y, b.vector(f"{name}.scale", c, 1, 1, mean=1)), b.vector(f"{name}.bias", c, 1, 1))


@pattern("stem.w:0 gn.scale:0 gn.bias:0 c1.w:1 c1.w:0 head.w:1")
def group_norm_of_torch(b: Builder) -> None:
    x = b.conv("stem", b.input("x", (2, 3, 8, 8)), 3, 16)
    x = b.relu(group_norm_by_reshape(b, "gn", x, 16, 4))
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


@pattern("c1.w:0 head.w:1", {"stem.w:0": AXIS, "gn.scale:0": AXIS, "c1.w:1": AXIS})
@pattern("stem.w:0 gn.scale:0 gn.bias:0 c1.w:1 c1.w:0 head.w:1", residual=True)
def group_norm_with_one_group(b: Builder) -> None:
    """PoolFormer's norm: one group, so no whole group can go."""
    x = b.conv("stem", b.input("x", (2, 3, 8, 8)), 3, 16)
    x = b.relu(group_norm_by_reshape(b, "gn", x, 16, 1))
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


def group_norms_across_a_residual(b: Builder, c: int, first: int, second: int) -> None:
    x = b.conv("stem", b.input("x", (2, 3, 8, 8)), 3, c)
    y = b.relu(group_norm_by_reshape(b, "gn1", b.conv("c1", b.relu(x), c, c), c, first))
    z = b.relu(group_norm_by_reshape(b, "gn2", b.conv("c2", y, c, c), c, second))
    b.head(b.relu(b.conv("c3", b.add(y, z), c, 12)), 12)


@pattern("stem.w:0 c1.w:0 c1.w:1 gn1.scale:0 c2.w:0 c2.w:1 gn2.scale:0 c3.w:1 c3.w:0")
def group_norms_of_four_and_two_groups(b: Builder) -> None:
    """A group of the second covers two of the first: eight channels go at once, exactly."""
    group_norms_across_a_residual(b, 16, 4, 2)


@pattern(
    "stem.w:0 c1.w:1 c3.w:0",
    {"c1.w:0": "groups of 8 and of 12 overlap: no whole group is free", "gn2.scale:0": AXIS, "c3.w:1": AXIS},
)
@pattern("stem.w:0 c1.w:0 gn1.scale:0 c2.w:0 c2.w:1 gn2.scale:0 c3.w:1 c3.w:0", residual=True)
def group_norms_of_three_and_two_groups(b: Builder) -> None:
    group_norms_across_a_residual(b, 24, 3, 2)


@pattern("stem.w:0 in.scale:0 in.bias:0 c1.w:1 c1.w:0 head.w:1")
def instance_norm(b: Builder) -> None:
    x = b.conv("stem", b.input("x", (2, 3, 8, 8)), 3, 16)
    scale, bias = b.vector("in.scale", 16, mean=1), b.vector("in.bias", 16)
    x = b.relu(b.op("InstanceNormalization", x, scale, bias))
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


LRN = "a window over neighbouring channels"


@pattern("c1.w:0 head.w:1", {"stem.w:0": LRN, "c1.w:1": LRN})
def lrn(b: Builder) -> None:
    x = b.op("LRN", b.stem(16), size=5, alpha=2.0, beta=0.75, bias=1.0)
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


@pattern("c1.w:0 head.w:1", {"stem.w:0": LRN, "c1.w:1": LRN})
@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1", residual=True)
def lrn_over_all_channels(b: Builder) -> None:
    """A window wider than all channels: the masked statistics are those of the pruned tensor at any order."""
    x = b.op("LRN", b.stem(16), size=33, alpha=2.0, beta=0.75, bias=1.0)
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


@pattern("c1.w:0 head.w:1", {"stem.w:0": AXIS, "c1.w:1": AXIS})
@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1", residual=True)
def lp_normalization(b: Builder) -> None:
    x = b.op("LpNormalization", b.conv("stem", b.input("x", (2, 3, 8, 8)), 3, 16), axis=1, p=2)
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1")
def lp_normalization_over_the_image(b: Builder) -> None:
    x = b.op("LpNormalization", b.conv("stem", b.input("x", (2, 3, 8, 8)), 3, 16), axis=3, p=2)
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


@pattern("c1.w:0 head.w:1", {"stem.w:0": AXIS, "c1.w:1": AXIS})
@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1", residual=True)
def softmax_over_channels(b: Builder) -> None:
    x = b.op("Softmax", b.conv("stem", b.input("x", (2, 3, 8, 8)), 3, 16), axis=1)
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


@pattern("c1.w:0 head.w:1", {"stem.w:0": AXIS, "c1.w:1": AXIS})
@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1", residual=True)
def mean_over_channels_gate(b: Builder) -> None:
    """CBAM's spatial gate, the half with the mean: removal changes what it divides by."""
    x = b.stem(16)
    gate = b.conv("gate", b.op("ReduceMean", x, [1], keepdims=1), 1, 1)
    b.head(b.relu(b.conv("c1", b.mul(x, b.sigmoid(gate)), 16, 12)), 12)


@pattern(
    "embed.w:1 q.w:0 q.w:1 k.w:1 v.w:1 o.w:0", {"qn.scale:0": AXIS, "kn.scale:0": AXIS}, oracle="everything"
)
@pattern("embed.w:1 q.w:0 q.w:1 qn.scale:0 kn.scale:0 v.w:1 o.w:0", residual=True)
def query_and_key_norm(b: Builder) -> None:
    """Heads of a query norm are apart: they go whole; head dimensions are normalised."""
    x = b.tokens(24)
    q, k, v = (b.transpose(b.reshape(b.linear(n, x, 24, 32), 2, 6, 4, 8), 0, 2, 1, 3) for n in "qkv")
    q, k = b.layer_norm("qn", q, 8), b.layer_norm("kn", k, 8)
    weights = b.op("Softmax", b.matmul(q, b.transpose(k, 0, 1, 3, 2)), axis=-1)
    y = b.reshape(b.transpose(b.matmul(weights, v), 0, 2, 1, 3), 2, 6, 32)
    b.token_head(b.linear("o", y, 32, 24), 24)
