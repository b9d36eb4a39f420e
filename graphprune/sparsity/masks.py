"""Which elements of a weight stay where those of least magnitude go, whatever the pattern."""

from __future__ import annotations

from graphprune.kernels.block_masks import Outputs, fraction_block_mask, nm_block_mask, unstructured_mask
from graphprune.kernels.nm import Mask, nm_mask, ranks
from graphprune.model.stream import Array
from graphprune.sparsity.pattern import NM, Layout, Pattern


def mask_of(array: Array, pattern: Pattern, layout: Layout) -> Mask:
    """What stays of a weight where the elements of least magnitude go.

    Args:
        array: ``[outer, contracted, inner]``.
        pattern: What it is to hold.
        layout: How it is contracted.
    """
    outputs = Outputs(layout.outputs_axis, layout.outputs, layout.outputs_step)
    if isinstance(pattern, NM):
        if pattern.block == (1, 1):
            return nm_mask(ranks(array), pattern.n, pattern.m)
        return nm_block_mask(array, pattern.n, pattern.m, *pattern.block, outputs)
    if pattern.block == (1, 1):
        return unstructured_mask(ranks(array), pattern.fraction)
    return fraction_block_mask(array, pattern.fraction, *pattern.block, outputs)
