"""Patches: a convolution as a matrix product, so that what is known of linear maps holds for it.

``Conv`` of x with W is ``conv_patches(x) @ W.reshape(g, k, c * prod(R)).T`` in each group; ``ConvTranspose`` likewise,
on its input with zeros between the elements and with the kernel turned round (Dumoulin and Visin, A guide to
convolution arithmetic for deep learning, 2016, section 4).

Symbols: ``N`` batch, ``g`` groups, ``c`` input and ``k`` output channels of a group, ``S`` / ``T`` spatial sizes of the
input / output, ``R`` sizes of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Sizes = Sequence[int]
Index = tuple[Any, ...]


def conv_patches(
    x: Array,
    kernel: Sizes,
    strides: Sizes | None = None,
    pads: Sizes | None = None,
    dilations: Sizes | None = None,
    groups: int = 1,
    *,
    positions: npt.NDArray[np.integer[Any]] | None = None,
) -> Array:
    """What each element of a convolution's output sees of its input.

    Args:
        x: ``[N, g * c, *S]``, any dtype, any number of spatial axes.
        kernel: Sizes ``R`` of the kernel.
        strides: One a spatial axis; ones by default.
        pads: All begins, then all ends, as ONNX has it; none by default. Padding is with zeros; negative pads crop.
        dilations: One a spatial axis; ones by default.
        groups: ``g``.
        positions: Rows wanted, as indices into ``N * prod(T)``; only these are built. All by default.

    Returns:
        ``[g, N * prod(T), c * prod(R)]`` (or as many rows as ``positions``) of x's dtype. Rows run over n, then over
        output positions row-major: the order of the output ``[N, g * k, *T]`` with its channels last. Columns run over
        c, then over kernel positions: the order of ``weight.reshape(g, k, c * prod(R))``. It may be a view whose memory
        is column-major.

    Raises:
        ValueError: The sizes do not fit each other.

    Examples:
        >>> conv_patches(np.arange(4.0).reshape(1, 1, 4), (2,))[0]
        array([[0., 1.],
               [1., 2.],
               [2., 3.]])
    """
    windows = _windows(x, kernel, strides, pads, dilations, groups)
    return _rows(windows, len(kernel), groups, positions)


def conv_transpose_patches(
    x: Array,
    kernel: Sizes,
    strides: Sizes | None = None,
    pads: Sizes | None = None,
    dilations: Sizes | None = None,
    groups: int = 1,
    *,
    output_padding: Sizes | None = None,
    positions: npt.NDArray[np.integer[Any]] | None = None,
) -> Array:
    """What each element of a transposed convolution's output sees of its input, zeros where it sees none.

    Args: as of `conv_patches`, and ``output_padding``: elements appended to the output, one number a spatial axis.

    Returns:
        ``[g, N * prod(T), c * prod(R)]``. Columns run over c, then over kernel positions. The weight, which is
        ``[g * c, k, *R]``, must be brought into that order: ``reshape(g, c, k, prod(R))``, then axes (g, c, R, k).

    Raises:
        ValueError: The sizes do not fit each other.
    """
    rank = len(kernel)
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    pads, output_padding = pads or (0,) * 2 * rank, output_padding or (0,) * rank
    if (
        not len(strides) == len(dilations) == len(output_padding) == rank == x.ndim - 2
        or len(pads) != 2 * rank
    ):
        raise ValueError(f"a kernel of {rank} axes over {x.ndim - 2} spatial axes: attributes do not fit")
    spread = np.zeros(
        x.shape[:2] + tuple((s - 1) * step + 1 for s, step in zip(x.shape[2:], strides, strict=True)),
        dtype=x.dtype,
    )
    apart: Index = (..., *(slice(None, None, step) for step in strides))
    spread[apart] = x
    reach = [dilation * (size - 1) for size, dilation in zip(kernel, dilations, strict=True)]
    begins = [r - pad for r, pad in zip(reach, pads[:rank], strict=True)]
    ends = [r - pad + more for r, pad, more in zip(reach, pads[rank:], output_padding, strict=True)]
    windows = _windows(spread, kernel, None, (*begins, *ends), dilations, groups)
    turned: Index = (..., *(slice(None, None, -1),) * rank)
    return _rows(windows[turned], rank, groups, positions)


def _windows(
    x: Array, kernel: Sizes, strides: Sizes | None, pads: Sizes | None, dilations: Sizes | None, groups: int
) -> Array:
    """A view ``[N, g * c, *T, *R]`` of the padded input."""
    rank = len(kernel)
    strides, dilations, pads = strides or (1,) * rank, dilations or (1,) * rank, pads or (0,) * 2 * rank
    if not len(strides) == len(dilations) == rank == x.ndim - 2 or len(pads) != 2 * rank:
        raise ValueError(f"a kernel of {rank} axes over {x.ndim - 2} spatial axes: attributes do not fit")
    if x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels do not divide into {groups} groups")
    begins, ends = pads[:rank], pads[rank:]
    crop: Index = (
        ...,
        *(slice(max(0, -b), size - max(0, -e)) for b, e, size in zip(begins, ends, x.shape[2:], strict=True)),
    )
    x = x[crop]
    if any(pad > 0 for pad in pads):
        around = [(max(0, b), max(0, e)) for b, e in zip(begins, ends, strict=True)]
        x = np.pad(x, [(0, 0), (0, 0), *around])
    extents = [dilation * (size - 1) + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    if any(extent > size for extent, size in zip(extents, x.shape[2:], strict=True)):
        raise ValueError(f"a kernel that spans {extents} is larger than the padded input {list(x.shape[2:])}")
    windows = np.lib.stride_tricks.sliding_window_view(x, extents, axis=tuple(range(2, 2 + rank)))
    steps: Index = (slice(None), slice(None), *(slice(None, None, step) for step in (*strides, *dilations)))
    return np.asarray(windows[steps])


def _rows(windows: Array, rank: int, groups: int, positions: npt.NDArray[np.integer[Any]] | None) -> Array:
    """Copies a view ``[N, g * c, *T, *R]`` into rows ``[g, N * prod(T), c * prod(R)]``, or some of the rows."""
    batch, channels = windows.shape[:2]
    outs = windows.shape[2 : 2 + rank]
    features = channels // groups * int(np.prod(windows.shape[2 + rank :], dtype=np.int64))
    if positions is not None:
        where = np.unravel_index(positions, (batch, *outs))
        rows: Index = (where[0], slice(None), *where[1:])
        picked = windows[rows]  # [rows, g * c, *R]
        return np.asarray(picked.reshape(len(positions), groups, features).swapaxes(0, 1))
    # Written column by column: the copy then runs along whole lines of the image, not along the few kernel positions.
    order = (1, *range(2 + rank, 2 + 2 * rank), 0, *range(2, 2 + rank))
    columns = np.ascontiguousarray(windows.transpose(order)).reshape(groups, features, -1)
    return np.asarray(columns.swapaxes(1, 2))
