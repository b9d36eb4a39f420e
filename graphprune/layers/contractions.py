"""Contractions as matrix products: what an op with a constant weight does to the rows of its input.

A convolution, a Gemm and a MatMul are all ``rows(x) @ matrix(w) = rows(y)``, per conv group. Statistics, refits and
second-order saliency are stated on that form and know no op types; this file is where op types are told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.graph import Op, Tensor
from graphprune.kernels.patches import conv_patches, conv_transpose_patches

Array: TypeAlias = npt.NDArray[Any]
Positions: TypeAlias = npt.NDArray[np.int64]


class MatrixForm(Protocol):
    """How one op's tensors are matrices; ``g`` is the number of independent products (conv groups)."""

    def count(self, x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> int:
        """Number of rows."""

    def rows(self, x: Array, weight_shape: tuple[int, ...], positions: Positions | None = None) -> Array:
        """Rows of the input, float32 ``[g, rows, features]``; only those at ``positions`` if given."""

    def results(self, y: Array, positions: Positions | None = None) -> Array:
        """Rows of an array of the output's shape, ``[g, rows, outputs]``; only those at ``positions`` if given."""

    def arrange(self, weight: Array) -> Array:
        """An array of the weight's shape as ``[g, features, outputs]``."""

    def restore(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of :meth:`arrange`, for a weight of that shape."""

    def spread(self, vector: Array, rank: int) -> Array:
        """A vector ``[outputs of all products]`` in the shape in which it is added to the op's result."""

    @property
    def scale(self) -> float:
        """The op multiplies with the arranged weight times this."""


@dataclass(frozen=True)
class Contraction:
    """An op that multiplies an activation with a constant weight.

    Attributes:
        op: The op of the twin.
        activation, weight: Slots of the operands.
        bias: Slot of the bias, whether or not the op has one; None where the op type takes none.
        form: Its tensors as matrices.
    """

    op: Op
    activation: int
    weight: int
    bias: int | None
    form: MatrixForm

    @property
    def weight_tensor(self) -> Tensor:
        tensor = self.op.inputs[self.weight]
        assert tensor is not None
        return tensor

    @property
    def input(self) -> Tensor:
        """The activation that it reads."""
        tensor = self.op.inputs[self.activation]
        assert tensor is not None
        return tensor

    @property
    def output(self) -> Tensor:
        """The activation that it makes."""
        tensor = self.op.outputs[0]
        assert tensor is not None
        return tensor

    @property
    def bias_tensor(self) -> Tensor | None:
        """The bias that the op itself adds; None where it adds none."""
        slot = self.bias
        return self.op.inputs[slot] if slot is not None and slot < len(self.op.inputs) else None


@dataclass(frozen=True)
class _ConvForm:
    """Patches of the input, times filters."""

    attributes: Mapping[str, Any]

    @property
    def _groups(self) -> int:
        return int(self.attributes.get("group", 1))

    def _kernel(self, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        return weight_shape[2:]

    def _pads(self, x_shape: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
        rank = len(kernel)
        mode = self.attributes.get("auto_pad", "NOTSET")
        if mode in ("NOTSET", ""):
            return tuple(self.attributes.get("pads") or (0,) * (2 * rank))
        if mode == "VALID":
            return (0,) * (2 * rank)
        begins, ends = [], []
        for size, width, stride, dilation in zip(
            x_shape[2:], kernel, self._strides(rank), self._dilations(rank), strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
            less, more = total // 2, total - total // 2
            begins.append(less if mode == "SAME_UPPER" else more)
            ends.append(more if mode == "SAME_UPPER" else less)
        return (*begins, *ends)

    def _strides(self, rank: int) -> tuple[int, ...]:
        return tuple(self.attributes.get("strides") or (1,) * rank)

    def _dilations(self, rank: int) -> tuple[int, ...]:
        return tuple(self.attributes.get("dilations") or (1,) * rank)

    def _geometry(
        self, x_shape: tuple[int, ...], weight_shape: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """Kernel, strides, pads, dilations and groups."""
        kernel = self._kernel(weight_shape)
        rank = len(kernel)
        return kernel, self._strides(rank), self._pads(x_shape, kernel), self._dilations(rank), self._groups

    def count(self, x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> int:
        kernel, strides, pads, dilations, _ = self._geometry(x_shape, weight_shape)
        rank = len(kernel)
        return x_shape[0] * prod(
            (size + pads[i] + pads[rank + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1
            for i, size in enumerate(x_shape[2:])
        )

    def rows(self, x: Array, weight_shape: tuple[int, ...], positions: Positions | None = None) -> Array:
        geometry = self._geometry(x.shape, weight_shape)
        return conv_patches(np.asarray(x, dtype=np.float32), *geometry, positions=positions)

    def results(self, y: Array, positions: Positions | None = None) -> Array:
        flat = np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])
        flat = flat if positions is None else flat[positions]
        return np.moveaxis(flat.reshape(len(flat), self._groups, -1), 1, 0)

    def spread(self, vector: Array, rank: int) -> Array:
        return vector.reshape(1, -1, *(1,) * (rank - 2))

    @property
    def scale(self) -> float:
        return 1.0

    def arrange(self, weight: Array) -> Array:
        filters = weight.reshape(self._groups, weight.shape[0] // self._groups, -1)
        return np.ascontiguousarray(np.swapaxes(filters, 1, 2))

    def restore(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        return np.ascontiguousarray(np.swapaxes(matrix, 1, 2)).reshape(shape)


@dataclass(frozen=True)
class _ConvTransposeForm(_ConvForm):
    """What each element of the output sees of the input, times filters ``[g c, k, *R]``."""

    def _padding(self, rank: int) -> tuple[int, ...]:
        return tuple(self.attributes.get("output_padding") or (0,) * rank)

    def count(self, x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> int:
        kernel, strides, pads, dilations, _ = self._geometry(x_shape, weight_shape)
        rank, padding = len(kernel), self._padding(len(kernel))
        return x_shape[0] * prod(
            (size - 1) * strides[i]
            + dilations[i] * (kernel[i] - 1)
            + 1
            + padding[i]
            - pads[i]
            - pads[rank + i]
            for i, size in enumerate(x_shape[2:])
        )

    def rows(self, x: Array, weight_shape: tuple[int, ...], positions: Positions | None = None) -> Array:
        geometry, padding = self._geometry(x.shape, weight_shape), self._padding(len(weight_shape) - 2)
        return conv_transpose_patches(
            np.asarray(x, dtype=np.float32), *geometry, output_padding=padding, positions=positions
        )

    def arrange(self, weight: Array) -> Array:
        groups, outputs = self._groups, weight.shape[1]
        filters = weight.reshape(groups, weight.shape[0] // groups, outputs, -1)
        return np.ascontiguousarray(np.swapaxes(filters, 2, 3)).reshape(groups, -1, outputs)

    def restore(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        filters = matrix.reshape(self._groups, shape[0] // self._groups, prod(shape[2:]), shape[1])
        return np.ascontiguousarray(np.swapaxes(filters, 2, 3)).reshape(shape)


@dataclass(frozen=True)
class _ProductForm:
    """A matrix product: the weight may be transposed, the activation may be, and either may stand on the left.

    Attributes:
        transposed_activation: The contracted axis of the activation is the last but one.
        transposed_weight: The weight is ``[outputs, features]``.
        transposed_result: The outputs lie along the last axis but one of the result.
        scale: Factor of the product.
    """

    transposed_activation: bool = False
    transposed_weight: bool = False
    transposed_result: bool = False
    scale: float = 1.0

    def spread(self, vector: Array, rank: int) -> Array:
        return vector.reshape(-1, 1) if self.transposed_result else vector

    @staticmethod
    def _flat(array: Array, transposed: bool, positions: Positions | None) -> Array:
        if transposed:
            array = np.swapaxes(array, -1, -2)
        rows = array.reshape(-1, array.shape[-1])
        return (rows if positions is None else rows[positions])[None]

    def count(self, x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> int:
        contracted = x_shape[-2] if self.transposed_activation else x_shape[-1]
        return prod(x_shape) // max(contracted, 1)

    def rows(self, x: Array, weight_shape: tuple[int, ...], positions: Positions | None = None) -> Array:
        return np.asarray(self._flat(x, self.transposed_activation, positions), dtype=np.float32)

    def results(self, y: Array, positions: Positions | None = None) -> Array:
        return self._flat(y, self.transposed_result, positions)

    def arrange(self, weight: Array) -> Array:
        return np.ascontiguousarray(weight.T if self.transposed_weight else weight)[None]

    def restore(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        return np.ascontiguousarray(matrix[0].T if self.transposed_weight else matrix[0])


Found: TypeAlias = "tuple[int, int, int | None, MatrixForm] | str | None"


def _conv(op: Op, attributes: Mapping[str, Any]) -> Found:
    if not _constant(op, 1):
        return "its weight is computed"
    return 0, 1, 2, _ConvForm(attributes)


def _conv_transpose(op: Op, attributes: Mapping[str, Any]) -> Found:
    if not _constant(op, 1):
        return "its weight is computed"
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "") or attributes.get("output_shape"):
        return "its padding follows from a wanted size"
    return 0, 1, 2, _ConvTransposeForm(attributes)


def _gemm(op: Op, attributes: Mapping[str, Any]) -> Found:
    a, b = bool(attributes.get("transA", 0)), bool(attributes.get("transB", 0))
    alpha = float(attributes.get("alpha", 1.0))
    if _constant(op, 1) and not _constant(op, 0):
        return 0, 1, 2, _ProductForm(a, b, False, alpha)
    if _constant(op, 0) and not _constant(op, 1):  # (w x)^T = x^T w^T
        return 1, 0, None, _ProductForm(not b, not a, True, alpha)
    return None


def _matmul(op: Op, attributes: Mapping[str, Any]) -> Found:
    shapes = [tensor.shape if tensor is not None else None for tensor in op.inputs[:2]]
    if None in shapes:
        return "a shape is not known"
    constant = [_constant(op, slot) for slot in (0, 1)]
    if constant[1] and not constant[0]:
        if len(shapes[1] or ()) != 2:
            return "its weight is no matrix"
        return 0, 1, None, _ProductForm()
    if constant[0] and not constant[1]:
        if len(shapes[0] or ()) != 2 or len(shapes[1] or ()) < 2:
            return "its weight is no matrix"
        return 1, 0, None, _ProductForm(True, True, True)
    return None


def _constant(op: Op, slot: int) -> bool:
    tensor = op.inputs[slot] if slot < len(op.inputs) else None
    return tensor is not None and tensor.constant


#: How the tensors of each op type are matrices: slots of activation, weight and bias, and the form; or why not; None
#: for products of two activations.
FORMS: dict[str, Callable[[Op, Mapping[str, Any]], Found]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}


def find_contraction(op: Op, attributes: Mapping[str, Any] | None = None) -> Contraction | str | None:
    """An op as a matrix product.

    Args:
        op: An op of the twin.
        attributes: Its attributes where they differ from the twin's: pruning changes the number of conv groups.

    Returns:
        The contraction; a reason where the op is one that cannot be stated so; None where it is none.
    """
    describe = FORMS.get(op.kind)
    if describe is None or all(tensor is None or tensor.constant for tensor in op.inputs):
        return None
    found = describe(op, op.attributes if attributes is None else attributes)
    if found is None or isinstance(found, str):
        return found
    activation, weight, bias, form = found
    dtype = op.inputs[weight].dtype  # type: ignore[union-attr]
    if dtype is None or not dtype.is_floating_point():
        return f"its weight is of type {dtype}"
    if op.path:
        return "it lies in a function"
    return Contraction(op, activation, weight, bias, form)
