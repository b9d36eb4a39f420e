"""Patches: a convolution is a matrix product over them, as ONNX's reference implementation has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from graphprune.kernels.patches import conv_patches, conv_transpose_patches

Array = npt.NDArray[Any]


def by_onnx(op: str, x: Array, weight: Array, **attributes: Any) -> Array:
    """The op itself, float64, by the reference evaluator."""
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    info = [
        helper.make_tensor_value_info(name, TensorProto.DOUBLE, array.shape)
        for name, array in (("x", x), ("w", weight))
    ]
    graph = helper.make_graph(
        [node], "g", info, [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)]
    )
    model = helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    (y,) = ReferenceEvaluator(model).run(None, {"x": x, "w": weight})
    return np.asarray(y)


def channels_last(y: Array, groups: int) -> Array:
    """``[N, g * k, *T]`` to ``[g, N * prod(T), k]``."""
    k = y.shape[1] // groups
    return np.moveaxis(y, 1, -1).reshape(-1, groups, k).swapaxes(0, 1)


def whole(x: Array) -> Array:
    """Small integers: sums of their products are exact in any order."""
    return np.asarray(np.round(x * 8), dtype=np.float64)


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool) -> dict[str, Any]:
    rank = draw(st.integers(1, 3 if not transposed else 2))
    small = st.integers(1, 3)
    each = {name: draw(st.tuples(*[small] * rank)) for name in ("kernel", "strides", "dilations")}
    pads = draw(st.tuples(*[st.integers(0, 2)] * 2 * rank))
    groups = draw(st.integers(1, 3))
    sizes = draw(st.tuples(*[st.integers(1, 6)] * rank))
    return {
        "x": (draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), *sizes),
        "k": draw(st.integers(1, 2)),
        "groups": groups,
        "pads": pads,
        "seed": draw(st.integers(0, 99)),
        **each,
    }


@given(convolutions(transposed=False))
@settings(max_examples=150, deadline=None)
def test_conv_is_a_product_with_its_patches(case: dict[str, Any]) -> None:
    kernel, strides, pads, dilations = case["kernel"], case["strides"], case["pads"], case["dilations"]
    rank, groups, k = len(kernel), case["groups"], case["k"]
    for axis in range(rank):
        extent = dilations[axis] * (kernel[axis] - 1) + 1
        assume(case["x"][2 + axis] + pads[axis] + pads[rank + axis] >= extent)
    rng = np.random.default_rng(case["seed"])
    x = whole(rng.standard_normal(case["x"]))
    weight = whole(rng.standard_normal((groups * k, case["x"][1] // groups, *kernel)))
    wanted = direct_conv(x, weight, strides, pads, dilations, groups)
    patches = conv_patches(x, kernel, strides, pads, dilations, groups)
    assert np.array_equal(
        patches @ weight.reshape(groups, k, -1).swapaxes(1, 2), channels_last(wanted, groups)
    )
    rows = rng.permutation(patches.shape[1])[: 1 + patches.shape[1] // 2]
    some = conv_patches(x, kernel, strides, pads, dilations, groups, positions=rows)
    assert np.array_equal(some, patches[:, rows])


def direct_conv(
    x: Array,
    weight: Array,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> Array:
    """The definition, one output element at a time."""
    rank = weight.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    sizes = [
        (x.shape[2 + a] - dilations[a] * (weight.shape[2 + a] - 1) - 1) // strides[a] + 1 for a in range(rank)
    ]
    c, k = weight.shape[1], weight.shape[0] // groups
    y = np.zeros((x.shape[0], weight.shape[0], *sizes))
    for where in np.ndindex(*sizes):
        window = (
            slice(
                where[a] * strides[a],
                where[a] * strides[a] + dilations[a] * (weight.shape[2 + a] - 1) + 1,
                dilations[a],
            )
            for a in range(rank)
        )
        seen = x[(slice(None), slice(None), *window)]
        for out in range(weight.shape[0]):
            group = out // k
            part = seen[:, group * c : (group + 1) * c]
            y[(slice(None), out, *where)] = (part * weight[out]).sum(axis=tuple(range(1, part.ndim)))
    return y


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_agrees_with_onnx(groups: int) -> None:
    rng = np.random.default_rng(0)
    x, weight = whole(rng.standard_normal((2, 4, 7, 6))), whole(rng.standard_normal((6, 4 // groups, 3, 2)))
    attributes: dict[str, Any] = {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]}
    wanted = by_onnx("Conv", x, weight, group=groups, **attributes)
    patches = conv_patches(x, (3, 2), groups=groups, **attributes)
    assert np.array_equal(
        patches @ weight.reshape(groups, 6 // groups, -1).swapaxes(1, 2), channels_last(wanted, groups)
    )


def direct_conv_transpose(
    x: Array,
    weight: Array,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    output_padding: Sequence[int],
) -> Array:
    """The definition: every input element scatters the kernel into the output, which then is cropped."""
    rank = weight.ndim - 2
    c, k = weight.shape[0] // groups, weight.shape[1]
    full = [
        strides[a] * (x.shape[2 + a] - 1) + output_padding[a] + dilations[a] * (weight.shape[2 + a] - 1) + 1
        for a in range(rank)
    ]
    y = np.zeros((x.shape[0], groups * k, *full))
    for where in np.ndindex(*x.shape[2:]):
        for offset in np.ndindex(*weight.shape[2:]):
            at = tuple(where[a] * strides[a] + offset[a] * dilations[a] for a in range(rank))
            for group in range(groups):
                part = x[(slice(None), slice(group * c, (group + 1) * c), *where)]
                kernel = weight[(slice(group * c, (group + 1) * c), slice(None), *offset)]
                y[(slice(None), slice(group * k, (group + 1) * k), *at)] += part @ kernel
    kept: tuple[Any, ...] = (..., *(slice(pads[a], full[a] - pads[rank + a]) for a in range(rank)))
    return np.asarray(y[kept])


@given(convolutions(transposed=True), st.integers(0, 1))
@settings(max_examples=150, deadline=None)
def test_conv_transpose_is_a_product_with_its_patches(case: dict[str, Any], more: int) -> None:
    kernel, strides, pads, dilations = case["kernel"], case["strides"], case["pads"], case["dilations"]
    rank, groups, k = len(kernel), case["groups"], case["k"]
    output_padding = tuple(min(more, max(strides[a], dilations[a]) - 1) for a in range(rank))
    c = case["x"][1] // groups
    rng = np.random.default_rng(case["seed"])
    x = whole(rng.standard_normal(case["x"]))
    weight = whole(rng.standard_normal((groups * c, k, *kernel)))
    wanted = direct_conv_transpose(x, weight, strides, pads, dilations, groups, output_padding)
    assume(all(size > 0 for size in wanted.shape))
    patches = conv_transpose_patches(
        x, kernel, strides, pads, dilations, groups, output_padding=output_padding
    )
    matrix = weight.reshape(groups, c, k, -1).swapaxes(2, 3).reshape(groups, -1, k)
    assert np.array_equal(patches @ matrix, channels_last(wanted, groups))


def test_conv_transpose_agrees_with_onnx() -> None:
    rng = np.random.default_rng(0)
    x, weight = whole(rng.standard_normal((2, 3, 4, 5))), whole(rng.standard_normal((3, 2, 3, 2)))
    wanted = by_onnx("ConvTranspose", x, weight, strides=[2, 3], pads=[1, 0, 0, 1], output_padding=[1, 0])
    patches = conv_transpose_patches(x, (3, 2), (2, 3), (1, 0, 0, 1), output_padding=(1, 0))
    matrix = weight.reshape(3, 2, -1).swapaxes(1, 2).reshape(-1, 2)
    assert np.array_equal(patches[0] @ matrix, channels_last(wanted, 1)[0])


def test_negative_pads_crop() -> None:
    x = whole(np.random.default_rng(0).standard_normal((1, 2, 8)))
    assert np.array_equal(conv_patches(x, (3,), pads=(-2, -1)), conv_patches(x[:, :, 2:-1], (3,)))


def test_dtype_is_kept() -> None:
    assert conv_patches(np.ones((1, 1, 4), np.float32), (2,), pads=(1, 1)).dtype == np.float32
    assert conv_transpose_patches(np.ones((1, 1, 4), np.float32), (2,)).dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": (3, 3)}, "attributes do not fit"),
        ({"kernel": (3,), "strides": (1, 1)}, "attributes do not fit"),
        ({"kernel": (3,), "pads": (1,)}, "attributes do not fit"),
        ({"kernel": (3,), "groups": 2}, "3 channels do not divide into 2 groups"),
        ({"kernel": (6,)}, "larger than the padded input"),
    ],
)
def test_sizes_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_patches(np.zeros((1, 3, 4)), **arguments)
