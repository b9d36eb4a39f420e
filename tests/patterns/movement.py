"""Data movement: reshapes, slices, gathers, pads, and what they do to the order of channels."""

from __future__ import annotations

import numpy as np

from .builder import Builder, family

PATTERNS, pattern = family()

OUTPUT = "a graph output keeps its shape"
INPUT = "a graph input keeps its shape"
POSITION = "what comes out is a position, not a value"


@pattern("stem.w:0 up.w:0 up.w:1 up.b:0 head.w:1")
def pixel_shuffle(b: Builder) -> None:
    """CRD order: four consecutive channels of `up` make one of the output, and go together."""
    x = b.conv("up", b.stem(16, size=4), 16, 32)
    b.head(b.relu(b.op("DepthToSpace", x, blocksize=2, mode="CRD")), 8)


@pattern("stem.w:0 up.w:0 up.w:1 head.w:1")
def depth_to_space_dcr(b: Builder) -> None:
    """DCR order: channels i, i + 8, i + 16 and i + 24 go together."""
    x = b.conv("up", b.stem(16, size=4), 16, 32)
    b.head(b.relu(b.op("DepthToSpace", x, blocksize=2, mode="DCR")), 8)


@pattern("stem.w:0 up.w:0 up.w:1 head.w:1")
def pixel_shuffle_by_reshapes(b: Builder) -> None:
    x = b.reshape(b.conv("up", b.stem(16, size=4), 16, 32), 2, 8, 2, 2, 4, 4)
    b.head(b.reshape(b.transpose(x, 0, 1, 4, 2, 5, 3), 2, 8, 8, 8), 8)


@pattern("stem.w:0 up.w:1", {"up.w:0": OUTPUT})
def pixel_shuffle_to_output(b: Builder) -> None:
    """Super-resolution's last layer: all twelve channels are the output."""
    x = b.conv("up", b.stem(16, size=4), 16, 12)
    b.output(b.op("DepthToSpace", x, blocksize=2, mode="CRD"))


@pattern("stem.w:0 mix.w:1 mix.w:0 head.w:1")
def pixel_unshuffle(b: Builder) -> None:
    x = b.op("SpaceToDepth", b.stem(8), blocksize=2)
    b.head(b.relu(b.conv("mix", x, 32, 16)), 16)


@pattern("focus.w:0 head.w:1", {"focus.w:1": INPUT})
def focus_on_the_input(b: Builder) -> None:
    """YOLOv5's first layer: four strided slices of the image side by side."""
    x = b.input("x", (2, 3, 8, 8))
    views = [b.slice(b.slice(x, 2, i, 8, 2), 3, j, 8, 2) for j in (0, 1) for i in (0, 1)]
    b.head(b.relu(b.conv("focus", b.concat(*views), 12, 16)), 16)


@pattern("stem.w:0 focus.w:1 focus.w:0 head.w:1")
def focus_inside(b: Builder) -> None:
    x = b.stem(8)
    views = [b.slice(b.slice(x, 2, i, 8, 2), 3, j, 8, 2) for j in (0, 1) for i in (0, 1)]
    b.head(b.relu(b.conv("focus", b.concat(*views), 32, 16)), 16)


@pattern("stem.w:0 a.w:1 c.w:1 head.w:1")
def channel_slice(b: Builder) -> None:
    """Two slices that overlap in channels 8..15; the second ends at int64's maximum, as exporters write it."""
    x = b.stem(24)
    first, other = b.slice(x, 1, 0, 16), b.slice(x, 1, -16, 2**63 - 1)
    b.head(b.relu(b.add(b.conv("a", first, 16, 12), b.conv("c", other, 16, 12))), 12)


@pattern("stem.w:0 a.w:1 c.w:1 head.w:1")
def channel_slice_with_step(b: Builder) -> None:
    """Even channels one way, odd channels backwards the other."""
    x = b.stem(24)
    even, odd = b.slice(x, 1, 0, 24, 2), b.slice(x, 1, -1, -(2**31), -2)
    b.head(b.relu(b.add(b.conv("a", even, 12, 12), b.conv("c", odd, 12, 12))), 12)


@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1")
def channel_gather(b: Builder) -> None:
    """A permutation of the channels with a few repeated and a few left out."""
    x = b.gather(b.stem(16), [3, 1, 15, 7, 7, 0, 12, 9, 2, -6, 5, 3], 1)
    b.head(b.relu(b.conv("c1", x, 12, 16)), 16)


@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1")
def gather_nd(b: Builder) -> None:
    x = b.op("GatherND", b.transpose(b.stem(16), 1, 0, 2, 3), [[i] for i in (3, 1, 15, 7, 6, 0, 12, 9, 2, 5)])
    b.head(b.relu(b.conv("c1", b.transpose(x, 1, 0, 2, 3), 10, 16)), 16)


@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1")
def gather_elements(b: Builder) -> None:
    order = np.array([3, 1, 15, 7, 6, 0, 12, 9, 2, 5]).reshape(1, 10, 1, 1)
    x = b.op("GatherElements", b.stem(16), np.broadcast_to(order, (2, 10, 8, 8)).copy(), axis=1)
    b.head(b.relu(b.conv("c1", x, 10, 16)), 16)


@pattern("stem.w:0 new.w:0 c1.w:1 c1.w:0 head.w:1")
def scatter_nd(b: Builder) -> None:
    """Half the channels of one tensor are overwritten by another; their producer's share in the first is dead."""
    x = b.stem(16)
    indices = [[i] for i in (2, 14, 5, 8, 11, 0, 7, 3)]
    new = b.transpose(b.conv("new", x, 16, 8), 1, 0, 2, 3)
    x = b.op("ScatterND", b.transpose(x, 1, 0, 2, 3), indices, new)
    b.head(b.relu(b.conv("c1", b.transpose(x, 1, 0, 2, 3), 16, 16)), 16)


@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1")
def pad_channels(b: Builder) -> None:
    """Padded channels are constants that c1 reads: they go only where c1's input positions go on their own."""
    x = b.op("Pad", b.stem(16), [0, 4, 1, 1, 0, 4, 1, 1], 0.0, mode="constant")
    b.head(b.relu(b.conv("c1", x, 24, 16)), 16)


@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1")
def tile_channels(b: Builder) -> None:
    x = b.op("Tile", b.stem(8), [1, 2, 1, 1])
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1")
def expand_channels(b: Builder) -> None:
    """Every channel twice in a row: Unsqueeze, Expand with literal sizes, Reshape."""
    x = b.op("Expand", b.op("Unsqueeze", b.stem(8), [2]), [2, 8, 2, 8, 8])
    b.head(b.relu(b.conv("c1", b.reshape(x, 2, 16, 8, 8), 16, 12)), 12)


@pattern("stem.w:0 row:1 c1.w:1 head.w:1")
def expand_constant(b: Builder) -> None:
    """A learnt row is expanded to the image's size with a literal channel count, then concatenated."""
    row = b.op("Expand", b.vector("row", 1, 8, 1, 1), [2, 8, 8, 8])
    b.head(b.relu(b.conv("c1", b.concat(b.stem(8), row), 16, 12)), 12)


@pattern("stem.w:0 c2.w:1 c2.w:0 head.w:1", oracle="everything")
def cumsum_over_channels(b: Builder) -> None:
    """A prefix sum reads its input as a triangle of ones would: a masked channel adds nothing to later ones."""
    x = b.op("CumSum", b.stem(16), np.asarray(1))
    b.head(b.relu(b.conv("c2", x, 16, 12)), 12)


@pattern("stem.w:0 c2.w:1 c2.w:0 head.w:1", oracle="everything")
def sums_over_channels(b: Builder) -> None:
    """A sum and a Euclidean length over channels gate them: masked channels add zeros to both."""
    x = b.stem(16)
    gate = b.add(b.op("ReduceSum", x, [1], keepdims=1), b.op("ReduceL2", x, [1], keepdims=1))
    b.head(b.relu(b.conv("c2", b.mul(x, b.sigmoid(b.mul(gate, b.const(0.1)))), 16, 12)), 12)


@pattern("embed.w:1 head.w:0")
def cumsum_over_tokens(b: Builder) -> None:
    x = b.op("CumSum", b.tokens(16), np.asarray(1), reverse=1)
    b.token_head(x, 16)


@pattern("stem.w:0 c1.w:1 c1.w:0 c2.w:0 c2.w:1 head.w:1")
def resize_with_sizes(b: Builder) -> None:
    """The sizes hold the channel count as a literal; the second Resize has scales instead."""
    x = b.relu(b.conv("c1", b.stem(16, size=4), 16, 12))
    x = b.op("Resize", x, None, None, [2, 12, 8, 8], mode="linear")
    x = b.op("Resize", b.relu(b.conv("c2", x, 12, 16)), None, [1.0, 1.0, 0.5, 0.5], mode="nearest")
    b.head(x, 16)


@pattern("stem.w:0 c1.w:0 c1.w:1 head.w:1")
def swapped_axes_and_squeeze(b: Builder) -> None:
    """Channels wander through the last axis and an axis of one on their way."""
    x = b.op("Unsqueeze", b.transpose(b.stem(16), 2, 3, 0, 1), [0, 3])
    x = b.transpose(b.op("Squeeze", x, [0, 3]), 2, 3, 0, 1)
    b.head(b.relu(b.conv("c1", x, 16, 12)), 12)


@pattern("stem.w:0 c1.w:0 head.w:1", {"off.w:0": "a sampling grid has two coordinates"})
def grid_sample(b: Builder) -> None:
    """Flow warping: the grid is computed, the features it samples keep their channels free."""
    x = b.stem(16)
    grid = b.op("Tanh", b.transpose(b.conv("off", x, 16, 2), 0, 2, 3, 1))
    x = b.op("GridSample", b.relu(b.conv("c1", x, 16, 12)), grid, padding_mode="border")
    b.head(x, 12)


@pattern("stem.w:0 fc.w:1 fc.w:0 head.w:1")
def roi_align(b: Builder) -> None:
    rois = [[0.0, 0.0, 5.0, 5.0], [1.0, 2.0, 7.0, 7.0], [2.0, 0.0, 6.0, 4.0]]
    x = b.op("RoiAlign", b.stem(12), rois, [0, 1, 1], output_height=3, output_width=3, sampling_ratio=2)
    b.vector_head(b.relu(b.gemm("fc", b.op("Flatten", x, axis=1), 108, 16)), 16)


@pattern("stem.w:0 c1.w:0 logits.w:1", {"logits.w:0": POSITION})
def argmax_head(b: Builder) -> None:
    """Segmentation: the class is the position of the largest logit."""
    x = b.conv("logits", b.relu(b.conv("c1", b.stem(16), 16, 16)), 16, 8)
    b.output(b.op("ArgMax", x, axis=1, keepdims=0))


@pattern("stem.w:0 logits.w:1", {"logits.w:0": POSITION})
def topk_head(b: Builder) -> None:
    x = b.gemm("logits", b.pool(b.stem(16)), 16, 12)
    values, indices = b.ops("TopK", 2, x, [3], axis=1)
    b.output(values)
    b.output(indices)


@pattern("embed.w:1 score.w:0 value.w:0 value.w:1 head.w:0", {"score.w:1": "its one column ranks the tokens"})
def topk_over_tokens(b: Builder) -> None:
    """The three best tokens are gathered by run-time positions; features pass through."""
    x = b.tokens(16)
    score = b.op("Squeeze", b.matmul(x, b.weight("score.w", 16, 1, fan=16)), [2])
    index = b.op("Unsqueeze", b.ops("TopK", 2, score, [3], axis=1)[1], [2])
    value = b.linear("value", x, 16, 12)
    index = b.op("Expand", index, [2, 3, 12])
    b.token_head(b.op("GatherElements", value, index, axis=1), 12)


@pattern(
    "stem.w:0 logits.w:1 table.w:1 head.w:1",
    {"logits.w:0": POSITION, "table.w:0": "indexed by the position of the largest logit"},
)
def one_hot_head(b: Builder) -> None:
    """The chosen class' row of a table, by OneHot and MatMul."""
    best = b.op("ArgMax", b.gemm("logits", b.pool(b.stem(16)), 16, 8), axis=1, keepdims=0)
    hot = b.op("OneHot", best, np.asarray(8), [0.0, 1.0], axis=-1)
    b.vector_head(b.relu(b.matmul(hot, b.weight("table.w", 8, 12, fan=4))), 12)


@pattern(
    "stem.w:0 scores.w:1 boxes.w:1 c1.w:0",
    {"scores.w:0": "one score a class", "boxes.w:0": "four sides a box"},
)
def non_max_suppression_head(b: Builder) -> None:
    """A detector's end: boxes and scores from convs, the survivors' features gathered by run-time positions."""
    x = b.relu(b.conv("c1", b.stem(16), 16, 12))
    scores = b.reshape(b.sigmoid(b.conv("scores", x, 12, 3)), 2, 3, 64)
    corners = b.transpose(b.reshape(b.conv("boxes", x, 12, 4), 2, 4, 64), 0, 2, 1)
    b.output(scores)
    b.output(corners)
    kept = b.op("NonMaxSuppression", corners, scores, np.asarray([2]), np.asarray([0.5]), np.asarray([-1.0]))
    b.output(kept, dims=("kept", 3))


@pattern("stem.w:0 c1.w:1 c1.w:0 head.w:1")
def depth_first_flatten_and_back(b: Builder) -> None:
    """(n, c, h, w) -> (n, h*w, c) tokens, a Linear, and back to an image."""
    x = b.transpose(b.reshape(b.stem(16), 2, 16, 64), 0, 2, 1)
    x = b.relu(b.matmul(x, b.transpose(b.weight("c1.w", 12, 16), 1, 0)))
    b.head(b.reshape(b.transpose(x, 0, 2, 1), 2, 12, 8, 8), 12)
