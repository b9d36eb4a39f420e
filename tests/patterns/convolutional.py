"""Convolutional networks: how channels split, join, shuffle and gate one another."""

from __future__ import annotations

from .builder import Builder, family

PATTERNS, pattern = family()

LAST = "the last member of a group stays"
OUTPUT = "a graph output keeps its shape"
INPUT = "a graph input keeps its shape"


def shuffle(b: Builder, x: str, c: int, groups: int, size: int = 8) -> str:
    """Channel shuffle as ShuffleNet writes it: (g c) -> (c g)."""
    apart = b.transpose(b.reshape(x, 2, groups, c // groups, size, size), 0, 2, 1, 3, 4)
    return b.reshape(apart, 2, c, size, size)


@pattern("stem.w:0 stem.b:0 bn.scale:0 bn.mean:0 head.w:1", {"head.w:0": OUTPUT})
def plain_chain(b: Builder) -> None:
    b.head(b.relu(b.batch_norm("bn", b.stem(16), 16)), 16)


# Through the transpose a position of one grouped conv's group becomes a whole group of the next, so whole groups go.
@pattern("stem.w:0 g1.w:0 bn.var:0 g2.w:0 g2.b:0 head.w:1")
def shuffle_grouped(b: Builder) -> None:
    x = b.conv("g1", b.stem(16), 16, 16, group=4)
    x = shuffle(b, b.relu(b.batch_norm("bn", x, 16)), 16, 4)
    b.head(b.relu(b.conv("g2", x, 16, 16, group=4)), 16)


@pattern("stem.w:0 c1.w:0 c1.b:0 c2.w:1 c2.w:0 head.w:1")
def shuffle_dense(b: Builder) -> None:
    x = shuffle(b, b.relu(b.conv("c1", b.stem(16), 16, 24)), 24, 4)
    b.head(b.relu(b.conv("c2", x, 24, 16)), 16)


@pattern("stem.w:0 b1.w:0 b1.w:1 dw.w:0 b2.w:0 b2.w:1 d1.w:0 d1.w:1 d2.w:0 d2.w:1 last.w:1")
def shufflenet_v2_unit(b: Builder) -> None:
    """A unit that splits and one that does not: shuffles tie the halves of both."""
    left, right = b.split(b.stem(16), 8, 8)
    y = b.cbr("b1", right, 8, 8, k=1)
    y = b.batch_norm("dw_bn", b.conv("dw", y, 8, 8, group=8), 8)
    x = shuffle(b, b.concat(left, b.cbr("b2", y, 8, 8, k=1)), 16, 2)
    x = b.concat(b.cbr("d1", x, 16, 12, k=1), b.cbr("d2", x, 16, 12, k=1))
    b.head(b.relu(b.conv("last", shuffle(b, x, 24, 2), 24, 16, k=1)), 16)


@pattern("stem.w:0 a.w:1 c.w:1 a.w:0 head.w:1")
def split_even(b: Builder) -> None:
    left, right = b.ops("Split", 2, b.stem(16), axis=1, num_outputs=2)
    b.head(b.relu(b.add(b.conv("a", left, 8, 12), b.conv("c", right, 8, 12))), 12)


@pattern("stem.w:0 a.w:1 c.w:1 e.w:1")
def split_uneven(b: Builder) -> None:
    p, q, r = b.split(b.stem(24), 4, 8, 12)
    x = b.add(b.conv("a", p, 4, 12), b.conv("c", q, 8, 12))
    b.head(b.relu(b.add(x, b.conv("e", r, 12, 12))), 12)


@pattern("stem.w:0 c1.w:0 c1.w:1 c1.b:0 c2.w:1 c2.w:0 head.w:1")
def simple_gate(b: Builder) -> None:
    """NAFNet: the two halves of c1 multiply, so position i goes with position i + 16."""
    x = b.stem(16)
    left, right = b.split(b.conv("c1", x, 16, 32, k=1), 16, 16)
    b.head(b.add(x, b.conv("c2", b.mul(left, right), 16, 16, k=1)), 16)


@pattern("stem.w:0 d1.w:0 d1.w:1 d2.w:0 d2.w:1 n2.scale:0 trans.w:1 trans.w:0 head.w:1")
def densenet_concat(b: Builder) -> None:
    x = b.stem(16)
    x = b.concat(x, b.conv("d1", b.relu(b.batch_norm("n1", x, 16)), 16, 8))
    x = b.concat(x, b.conv("d2", b.relu(b.batch_norm("n2", x, 24)), 24, 8))
    x = b.conv("trans", b.relu(b.batch_norm("n3", x, 32)), 32, 16, k=1)
    b.head(b.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), 16)


@pattern("stem.w:0 a.w:0 c.w:0 head.w:1", {"head.w:0": OUTPUT})
def concat_flatten_linear(b: Builder) -> None:
    x = b.stem(8, size=4)
    x = b.relu(b.concat(b.conv("a", x, 8, 8), b.conv("c", x, 8, 12)))
    b.vector_head(b.op("Flatten", x, axis=1), 20 * 16)


@pattern("stem.w:0 fc.w:1 fc.w:0 head.w:1")
def flatten_after_permute(b: Builder) -> None:
    x = b.transpose(b.stem(12, size=4), 0, 2, 3, 1)
    b.vector_head(b.relu(b.gemm("fc", b.reshape(x, 2, -1), 192, 16)), 16)


@pattern("c1.w:0 c2.w:0 c2.w:1 head.w:1")
def conv1d_flatten(b: Builder) -> None:
    x = b.relu(b.conv("c1", b.input("x", (2, 3, 8)), 3, 16, rank=1))
    x = b.op("MaxPool", b.relu(b.conv("c2", x, 16, 12, rank=1)), kernel_shape=[2], strides=[2])
    b.vector_head(b.reshape(x, 2, 48), 48)


@pattern("stem.w:0 se1.w:1 se1.w:0 se2.w:1 se2.w:0 se2.b:0 head.w:1")
def squeeze_excite_conv(b: Builder) -> None:
    x = b.stem(16)
    gate = b.relu(b.conv("se1", b.op("GlobalAveragePool", x), 16, 8, k=1))
    b.head(b.mul(x, b.sigmoid(b.conv("se2", gate, 8, 16, k=1))), 16)


@pattern("stem.w:0 se1.w:1 se1.w:0 se2.w:1 se2.w:0 head.w:1")
def squeeze_excite_linear(b: Builder) -> None:
    x = b.stem(16)
    gate = b.relu(b.gemm("se1", b.reshape(b.op("GlobalAveragePool", x), 2, 16), 16, 8))
    gate = b.sigmoid(b.gemm("se2", gate, 8, 16))
    b.head(b.mul(x, b.reshape(gate, 2, 16, 1, 1)), 16)


@pattern("stem.w:0 c1.w:0 c1.w:1 g.w:0 g.w:1 c2.w:1 head.w:1")
def grouped_conv_of_eight(b: Builder) -> None:
    """ResNeXt's bottleneck: each of the eight groups keeps its own channels, equally many."""
    x = b.stem(16)
    y = b.cbr("g", b.cbr("c1", x, 16, 32, k=1), 32, 32, group=8)
    b.head(b.relu(b.add(x, b.conv("c2", y, 32, 16, k=1))), 16)


@pattern("stem.w:0 g1.w:0 g1.w:1 g2.w:0 g2.w:1 head.w:1")
def grouped_convs_of_three_then_four(b: Builder) -> None:
    """Between the two, channels must stay balanced over thirds and over quarters at once."""
    x = b.relu(b.conv("g1", b.stem(24), 24, 24, group=3))
    b.head(b.relu(b.conv("g2", x, 24, 24, group=4)), 24)


@pattern(
    "stem.w:0 dw.w:0 pw.w:1 pw.w:0 head.w:1", {"dw.w:1": "a depthwise conv has one input channel a group"}
)
def depthwise_separable(b: Builder) -> None:
    x = b.cbr("dw", b.stem(16), 16, 16, group=16)
    b.head(b.cbr("pw", x, 16, 24, k=1), 24)


@pattern("stem.w:0 dw.w:0 dw.b:0 pw.w:1 head.w:1")
def depthwise_multiplier_two(b: Builder) -> None:
    x = b.relu(b.conv("dw", b.stem(12), 12, 24, group=12))
    b.head(b.relu(b.conv("pw", x, 24, 16, k=1)), 16)


@pattern("stem.w:0 down.w:0 down.w:1 mid.w:0 up.w:0 up.w:1 up.b:0 join.w:1 join.w:0 head.w:1")
def unet(b: Builder) -> None:
    skip = b.stem(16)
    x = b.relu(b.conv("down", skip, 16, 24, stride=2))
    x = b.relu(b.conv("mid", x, 24, 24))
    x = b.relu(b.deconv("up", x, 24, 16))
    b.head(b.relu(b.conv("join", b.concat(skip, x), 32, 16)), 16)


@pattern("stem.w:0 up.w:0 up.w:1 up.b:0 mix.w:1 head.w:1")
def conv_transpose_groups(b: Builder) -> None:
    x = b.relu(b.deconv("up", b.stem(16, size=4), 16, 12, group=2))
    b.head(b.relu(b.conv("mix", x, 12, 8, k=1)), 8)


@pattern("twin.w:0 twin.b:0 head.w:1", {"twin.w:1": INPUT})
def one_conv_twice_in_parallel(b: Builder) -> None:
    """A Siamese pair: one weight, one group."""
    first = b.relu(b.conv("twin", b.input("x", (2, 3, 8, 8)), 3, 16))
    other = b.op("Conv", b.input("y", (2, 3, 8, 8)), "twin.w", "twin.b", kernel_shape=[3, 3], pads=[1] * 4)
    b.head(b.op("Abs", b.op("Sub", first, b.relu(other))), 16)


@pattern("stem.w:0 twice.w:0 twice.w:1 twice.b:0 head.w:1")
def one_conv_twice_in_sequence(b: Builder) -> None:
    """What comes out of it goes into it: both its axes are one group, with the stem's."""
    x = b.relu(b.conv("twice", b.stem(16), 16, 16))
    x = b.relu(b.op("Conv", x, "twice.w", "twice.b", kernel_shape=[3, 3], pads=[1] * 4))
    b.head(x, 16)


@pattern("stem.w:0 p2.w:0 p2.w:1 tower.w:0 tower.w:1 head.w:1", {"head.w:0": OUTPUT})
def head_shared_by_two_levels(b: Builder) -> None:
    p1 = b.stem(16)
    p2 = b.relu(b.conv("p2", p1, 16, 16, stride=2))
    first = b.relu(b.conv("tower", p1, 16, 12))
    other = b.relu(b.op("Conv", p2, "tower.w", "tower.b", kernel_shape=[3, 3], pads=[1] * 4))
    b.head(first, 12)
    b.output(b.op("Conv", other, "head.w", "head.b", kernel_shape=[1, 1]))


@pattern("stem.w:0 fc1.w:0 fc1.w:1 fc2.w:0 fc2.w:1 gamma:0 gamma2:1 head.w:1")
def layer_scale(b: Builder) -> None:
    x = b.stem(16)
    x = b.add(x, b.mul(b.conv("fc1", x, 16, 16), b.vector("gamma", 16, 1, 1, mean=1)))
    x = b.add(x, b.mul(b.conv("fc2", b.relu(x), 16, 16), b.vector("gamma2", 1, 16, 1, 1, mean=1)))
    b.head(x, 16)


@pattern("stem.w:0 gate.w:1 head.w:1", {"gate.w:0": LAST})
def spatial_gate(b: Builder) -> None:
    x = b.stem(16)
    b.head(b.mul(x, b.sigmoid(b.conv("gate", x, 16, 1))), 16)


@pattern("stem.w:0 cv1.w:0 cv1.w:1 m1.w:0 m1.w:1 m2.w:0 m2.w:1 cv2.w:1 cv2.w:0 head.w:1")
def yolo_c2f(b: Builder) -> None:
    x = b.silu(b.conv("cv1", b.stem(16), 16, 24, k=1))
    left, right = b.split(x, 12, 12)
    y = b.silu(b.conv("m1", right, 12, 8))
    y = b.add(right, b.silu(b.conv("m2", y, 8, 12)))
    b.head(b.silu(b.conv("cv2", b.concat(left, right, y), 36, 16, k=1)), 16)


@pattern(
    "stem.w:0 box.w:1",
    {"box.w:0": "4 sides are the output, 8 bins go through a softmax", "dfl.w:1": "bins of a softmax"},
)
def dfl_view(b: Builder) -> None:
    """YOLOv8's box head: the expectation of a softmax over bins, as a 1x1 conv."""
    x = b.reshape(b.conv("box", b.stem(16), 16, 32, k=1), 2, 4, 8, 64)
    x = b.op("Softmax", b.transpose(x, 0, 2, 1, 3), axis=1)
    bins = b.weight("dfl.w", 1, 8, 1, 1)
    b.output(b.reshape(b.op("Conv", x, bins, kernel_shape=[1, 1]), 2, 4, 64))


@pattern("stem.w:0 c1.w:0 c1.b:0 c1.w:1 head.w:1")
def maxout(b: Builder) -> None:
    """Pairs of channels compete: a pair goes as a whole, or nothing of it."""
    x = b.reshape(b.conv("c1", b.stem(16), 16, 24), 2, 12, 2, 8, 8)
    b.head(b.op("ReduceMax", x, [2], keepdims=0), 12)


@pattern("stem.w:0 c1.w:0 c1.w:1 c2.w:1 c2.w:0 head.w:1")
def crelu(b: Builder) -> None:
    x = b.conv("c1", b.stem(16), 16, 16)
    x = b.concat(b.relu(x), b.relu(b.op("Neg", x)))
    b.head(b.relu(b.conv("c2", x, 32, 12)), 12)


@pattern("stem.w:0 after.w:0 head.w:1", {"feature.w:0": OUTPUT, "after.w:1": "reads a graph output"})
def feature_is_also_output(b: Builder) -> None:
    x = b.conv("feature", b.stem(16), 16, 8)
    b.output(x)
    b.head(b.relu(b.conv("after", b.relu(x), 8, 16)), 16)


@pattern("c1.w:0 c2.w:1", {"c1.w:1": INPUT, "c2.w:0": INPUT, "head.w:1": INPUT})
def residual_with_graph_input(b: Builder) -> None:
    x = b.input("x", (2, 8, 8, 8))
    b.head(b.relu(b.add(x, b.conv("c2", b.relu(b.conv("c1", x, 8, 16)), 16, 8))), 8)


@pattern(
    "c2.w:0 head.w:1",
    {"stem.w:0": "a 1-D conv slides over the channels", "c2.w:1": "a 1-D conv slides over the channels"},
)
def eca(b: Builder) -> None:
    x = b.stem(16)
    squeezed = b.transpose(b.op("Squeeze", b.op("GlobalAveragePool", x), [3]), 0, 2, 1)
    k = b.weight("k.w", 1, 1, 3)
    gate = b.transpose(b.op("Conv", squeezed, k, kernel_shape=[3], pads=[1, 1]), 0, 2, 1)
    x = b.mul(x, b.op("Unsqueeze", b.sigmoid(gate), [3]))
    b.head(b.relu(b.conv("c2", x, 16, 12)), 12)


@pattern("stem.w:0 c1.w:0 c1.w:1 c2.w:0 c2.w:1 c2.b:0 head.w:1")
def resnet_block(b: Builder) -> None:
    x = b.stem(16)
    y = b.batch_norm("bn", b.conv("c2", b.cbr("c1", x, 16, 24), 24, 16), 16)
    b.head(b.relu(b.add(x, y)), 16)


# The shortcut is padded with 8 zero channels on each side: those 16 of the main branch are free on their own.
@pattern("stem.w:0 c1.w:0 c2.w:0 c2.w:1 c2.b:0 head.w:1")
def resnet_option_a(b: Builder) -> None:
    x = b.stem(16)
    y = b.conv("c2", b.relu(b.conv("c1", x, 16, 16, stride=2)), 16, 32)
    short = b.op("Slice", x, [0, 0], [8, 8], [2, 3], [2, 2])
    short = b.op("Pad", short, [0, 8, 0, 0, 0, 8, 0, 0], 0.0, mode="constant")
    b.head(b.relu(b.add(y, short)), 32)


@pattern("stem.w:0 slope:0 c2.w:1 c2.w:0 slope2:0 head.w:1")
def prelu_per_channel(b: Builder) -> None:
    x = b.conv("stem", b.input("x", (2, 3, 8, 8)), 3, 16)
    x = b.op("PRelu", x, b.vector("slope", 16, 1, 1))
    x = b.op("PRelu", b.conv("c2", x, 16, 16), b.vector("slope2", 16, 1, 1))
    b.head(x, 16)


@pattern("stem.w:0 a.w:0 c.w:0 mask:1 head.w:1")
def clip_and_where(b: Builder) -> None:
    """Where chooses per channel between two branches by a constant: both branches and the mask are one group."""
    x = b.op("Clip", b.stem(16), 0.0, 6.0)
    mask = b.const((b.rng.random((1, 16, 1, 1)) < 0.5), "mask")
    x = b.op("Where", mask, b.conv("a", x, 16, 16), b.conv("c", x, 16, 16))
    b.head(b.op("Clip", x, -2.0, 2.0), 16)


@pattern("stem.w:0 a.w:0 head.w:1")
def where_by_condition_on_activations(b: Builder) -> None:
    x = b.stem(16)
    y = b.conv("a", x, 16, 16)
    b.head(b.op("Where", b.op("Greater", x, y), x, b.op("Tanh", y)), 16)
