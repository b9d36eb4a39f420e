"""Ops through which no label flows, each with the reason."""

from __future__ import annotations

from graphprune.rules.registry import Refusal, register

REFUSALS = {
    "which elements there are depends on the data": "NonZero Unique Compress NonMaxSuppression",
    "it holds a sequence or an optional, whose elements have no fixed shape": """SequenceAt SequenceConstruct
        SequenceEmpty SequenceErase SequenceInsert SequenceLength SplitToSequence ConcatFromSequence Optional
        OptionalGetElement OptionalHasElement""",
    "it is random, so that a pruned network could not be compared": """Bernoulli Multinomial RandomNormal
        RandomNormalLike RandomUniform RandomUniformLike""",
    "it transforms the whole axis at once": "DFT STFT Det EyeLike MelWeightMatrix AffineGrid",
    "its indices count through all channels": "MaxUnpool",
}

for _reason, _kinds in REFUSALS.items():
    register(_kinds, lambda op, reason=_reason: Refusal(reason))  # type: ignore[misc]
