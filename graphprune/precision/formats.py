"""The low formats, and what is known of ops beyond their schemas: tables of data, each line with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import onnx_ir as ir

from graphprune.errors import OptionError


@dataclass(frozen=True)
class Format:
    """A floating-point format of 16 bits.

    Attributes:
        name: As on the command line.
        dtype: The element type.
        title: As in messages.
        greatest: The greatest finite number.
        first_infinite: Magnitudes from here on round to infinity (to nearest, ties to even).
        last_zero: Magnitudes up to here round to zero.
        roundoff: Largest relative error of rounding a normal number, 2^-(bits of the fraction + 1).
    """

    name: str
    dtype: ir.DataType
    title: str
    greatest: float
    first_infinite: float
    last_zero: float
    roundoff: float

    @property
    def limit(self) -> float:
        """Activations beyond this stay float32: another input may well hold twice what was seen."""
        return self.greatest / 2

    def bound(self, depth: int) -> float:
        """What an output may differ by, relative to its greatest magnitude, behind so many roundings in a row.

        Independent roundings add up like a random walk: each op adds about one roundoff of its result's scale, so that
        ``depth`` of them make ``sqrt(depth)`` (Higham and Mary, A New Approach to Probabilistic Rounding Error
        Analysis, SIAM J. Sci. Comput. 41(5), 2019, theorem 2.4). ``BOUND_FACTOR`` is what ops and their scales may
        amplify.
        """
        return BOUND_FACTOR * self.roundoff * sqrt(max(depth, 1))


#: How often the random walk of roundings an output may be off: the largest deviation of many elements is some four
#: standard deviations, and normalisations enlarge what enters them.
BOUND_FACTOR = 4.0

FORMATS: dict[str, Format] = {
    # 5 bits of exponent, 10 of fraction
    "fp16": Format("fp16", ir.DataType.FLOAT16, "float16", 65504.0, 65520.0, 2.0**-25, 2.0**-11),
    # 8 bits of exponent, 7 of fraction
    "bf16": Format(
        "bf16",
        ir.DataType.BFLOAT16,
        "bfloat16",
        (2 - 2.0**-7) * 2.0**127,
        (2 - 2.0**-8) * 2.0**127,
        2.0**-134,
        2.0**-8,
    ),
}


def find_format(name: str) -> Format:
    """The format of a name.

    Raises:
        OptionError: There is none.
    """
    if name not in FORMATS:
        raise OptionError(f"there is no precision {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


#: Ops that stay float32, by kind, and why.
DENIED: dict[str, str] = {
    "If": "control flow keeps float32 at its borders; its bodies are lowered inside",
    "Loop": "control flow keeps float32 at its borders; its bodies are lowered inside",
    "Scan": "control flow keeps float32 at its borders; its bodies are lowered inside",
    "SequenceMap": "control flow keeps float32 at its borders",
    "QuantizeLinear": "a scale that is rounded gives other integers",
    "DequantizeLinear": "its scale would lose precision",
    "DynamicQuantizeLinear": "a scale that is rounded gives other integers",
    "QLinearConv": "its scales would lose precision",
    "QLinearMatMul": "its scales would lose precision",
    "com.microsoft::QuantizeLinear": "a scale that is rounded gives other integers",
    "com.microsoft::DequantizeLinear": "its scale would lose precision",
    "CumSum": "a running sum adds up its roundings",
    "LRN": "it squares and sums its input inside",
    "LpNormalization": "it squares and sums its input inside",
    "ReduceL2": "it squares and sums its input inside",
    "ReduceSumSquare": "it squares and sums its input inside",
    "ReduceLogSumExp": "it exponentiates and sums its input inside",
    "ReduceProd": "products leave the range quickly",
    "Det": "products leave the range quickly",
    "GridSample": "coordinates of pixels need more than 11 bits",
    "AffineGrid": "coordinates of pixels need more than 11 bits",
    "RoiAlign": "coordinates of boxes need more than 11 bits",
    "MaxRoiPool": "coordinates of boxes need more than 11 bits",
    "Range": "its steps are counted, and integers beyond 2048 (float16) or 256 (bfloat16) are not exact",
    "Sin": "an angle's error does not shrink with its period",
    "Cos": "an angle's error does not shrink with its period",
    "Tan": "an angle's error does not shrink with its period",
    "DFT": "float16 spectra lose their small terms",
    "STFT": "float16 spectra lose their small terms",
    "MelWeightMatrix": "frequencies need more than 11 bits",
    "SoftmaxCrossEntropyLoss": "it sums a loss",
    "NegativeLogLikelihoodLoss": "it sums a loss",
}

#: What is computed for these must be exact: the arithmetic that leads to an operand stays float32. By kind: slots, and
#: what they hold.
EXACT: dict[str, tuple[tuple[int, ...], str]] = {
    "Sin": ((0,), "an angle"),
    "Cos": ((0,), "an angle"),
    "Tan": ((0,), "an angle"),
    "GridSample": ((1,), "coordinates"),
    "RoiAlign": ((1,), "coordinates"),
    "MaxRoiPool": ((1,), "coordinates"),
    "NonMaxSuppression": ((0,), "coordinates"),
    "Resize": ((1, 2), "a size"),
    "Upsample": ((1,), "a size"),
    "Range": ((0, 1, 2), "counted steps"),
    "CumSum": ((0,), "a running sum"),
    "Cast": ((0,), "an index"),  # to an integer type
}

#: Ops through which exact arithmetic is followed back; a product of matrices only where it sums nothing.
ARITHMETIC = frozenset([
    "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt", "Exp", "Log", "Pow", "Floor", "Ceil",
    "Round", "Mod", "Min", "Max", "Clip", "Where", "MatMul", "Reciprocal", "Sign", "CumSum", "Sum",
    "Mean",
])  # fmt: skip

#: Ops that move elements and compute nothing.
MOVEMENT = frozenset([
    "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split",
    "Concat", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "Pad", "DepthToSpace",
    "SpaceToDepth", "Dropout", "ScatterElements", "ScatterND", "Cast", "CastLike", "Compress",
    "ReverseSequence",
])  # fmt: skip

#: Ops that hand on a huge operand, such as the -3.4e38 of a mask.
HANDS_ON_HUGE = MOVEMENT | frozenset(["Add", "Sub", "Mul", "Div", "Neg", "Abs", "Where", "Min", "Max", "Sum"])
#: Ops that a tiny operand, such as an epsilon, matters to, and those that hand it on.
READS_TINY = frozenset(["Sqrt", "Pow", "Reciprocal", "Div", "Log"])
HANDS_ON_TINY = MOVEMENT | frozenset(["Sqrt", "Pow", "Add", "Max"])

#: Ops whose cost low precision is for: worth two casts even between float32 neighbours.
CONTRACTIONS = frozenset([
    "Conv", "ConvTranspose", "DeformConv", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN",
    "Attention", "FusedConv", "FusedMatMul", "FusedGemm", "MultiHeadAttention",
    "GroupQueryAttention", "QAttention", "PackedAttention", "PackedMultiHeadAttention",
    "TransposeMatMul", "NhwcConv", "NhwcFusedConv",
])  # fmt: skip
