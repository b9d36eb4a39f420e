"""One small model an op where onnx's own suite has none, or none of several channels."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.laws.single import Single

MS = "com.microsoft"


def _model(
    kind: str,
    inputs: Sequence[Any],
    outputs: int = 1,
    suffix: str = "",
    shapes: Sequence[Sequence[int] | None] | None = None,
    opset: int = 17,
    **attributes: Any,
) -> Single:
    """One node; inputs are arrays, shapes of random float32 arrays, or "" where one is missing."""
    domain, _, op_type = kind.rpartition("::")
    rng = np.random.default_rng(zlib.crc32(f"{kind}{suffix}".encode()))
    feeds: dict[str, Any] = {}
    names, infos = [], []
    for slot, value in enumerate(inputs):
        if isinstance(value, str):
            names.append(value)
            continue
        array = (
            rng.standard_normal(value).astype(np.float32) if isinstance(value, tuple) else np.asarray(value)
        )
        name = f"x{slot}"
        names.append(name)
        feeds[name] = array
        infos.append(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        )
    node = helper.make_node(op_type, names, [f"y{i}" for i in range(outputs)], domain=domain, **attributes)
    types = [_OUTPUT_TYPES.get(kind, TensorProto.FLOAT)] * outputs
    if op_type == "EmbedLayerNormalization":
        types[1] = TensorProto.INT32
    graph = helper.make_graph(
        [node],
        op_type,
        infos,
        [
            helper.make_tensor_value_info(f"y{i}", t, shapes[i] if shapes else None)
            for i, t in enumerate(types)
        ],
    )
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return Single(f"{kind}{suffix}", helper.make_model(graph, ir_version=9, opset_imports=imports), feeds)


_OUTPUT_TYPES = {
    "ConvInteger": TensorProto.INT32,
    "QLinearConv": TensorProto.UINT8,
    f"{MS}::QLinearAdd": TensorProto.UINT8,
    f"{MS}::QLinearMul": TensorProto.UINT8,
    f"{MS}::QLinearSigmoid": TensorProto.UINT8,
    f"{MS}::QLinearLeakyRelu": TensorProto.UINT8,
    f"{MS}::QLinearGlobalAveragePool": TensorProto.UINT8,
    f"{MS}::QuantizeLinear": TensorProto.UINT8,
}


def _positive(*shape: int) -> np.ndarray[Any, Any]:
    return (0.5 + np.random.default_rng(7).random(shape)).astype(np.float32)


def _bytes(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(11).integers(0, 256, shape, dtype=np.uint8)


def _float32(values: Any) -> np.ndarray[Any, Any]:
    return np.asarray(values, dtype=np.float32)


def _int32(*values: int) -> np.ndarray[Any, Any]:
    return np.asarray(values, dtype=np.int32)


_SCALE, _ZERO = np.float32(0.05), np.uint8(128)
_QUANTISED = [
    _bytes(2, 6, 3),
    _SCALE,
    _ZERO,
    _bytes(6, 1),
    np.float32(0.1),
    np.uint8(120),
    np.float32(0.12),
    _ZERO,
]
_ANGLES = [(9, 4), (9, 4)]
_IDS = np.arange(10, dtype=np.int64).reshape(2, 5) % 9


def contrib_suite() -> tuple[Single, ...]:
    """All models."""
    return (
        _model("Conv", [(2, 6, 5, 5), (8, 3, 3, 3), (8,)], suffix="_grouped", group=2),
        _model("Conv", [(2, 6, 5, 5), (12, 1, 3, 3), (12,)], suffix="_depthwise", group=6),
        _model("Conv", [(2, 6, 9), (4, 6, 3)], suffix="_1d", strides=[2]),
        _model(
            "ConvTranspose", [(2, 6, 4, 4), (6, 4, 2, 2), (8,)], suffix="_grouped", group=2, strides=[2, 2]
        ),
        _model(
            "ConvInteger", [_bytes(2, 6, 5, 5), _bytes(8, 3, 3, 3), np.uint8(3)], suffix="_grouped", group=2
        ),
        _model(
            "QLinearConv",
            [
                _bytes(2, 6, 5, 5),
                _SCALE,
                _ZERO,
                _bytes(8, 6, 1, 1),
                _positive(8),
                _bytes(1)[0],
                np.float32(3),
                _ZERO,
            ],
            suffix="_per_channel",
        ),
        _model("DeformConv", [(2, 6, 5, 5), (8, 6, 3, 3), (2, 18, 3, 3), (8,)], opset=19),
        _model("Resize", [(2, 3, 4, 4), "", _float32([1, 1, 2, 2])], suffix="_channels", mode="linear"),
        _model(
            "Upsample", [(2, 3, 4, 4), _float32([1, 1, 2, 2])], suffix="_channels", opset=9, mode="nearest"
        ),
        _model("GridSample", [(2, 3, 5, 5), (2, 4, 4, 2)], suffix="_channels"),
        _model(
            "RoiAlign",
            [(2, 3, 8, 8), _float32([[0, 0, 5, 5], [1, 2, 6, 7]]), np.asarray([0, 1])],
            suffix="_channels",
            opset=16,
            output_height=2,
            output_width=2,
        ),
        _model("GlobalLpPool", [(2, 6, 4, 4)]),
        _model(
            "MaxRoiPool", [(1, 6, 8, 8), _float32([[0, 0, 0, 7, 7], [0, 1, 1, 5, 6]])], pooled_shape=[2, 2]
        ),
        _model("SimplifiedLayerNormalization", [(2, 5, 6), (6,)], axis=-1),
        _model(f"{MS}::FusedMatMul", [(2, 3, 6), (6, 4)], alpha=0.5),
        _model(f"{MS}::FusedMatMul", [(2, 6, 3), (2, 4, 6)], suffix="_transposed", transA=1, transB=1),
        _model(f"{MS}::FusedGemm", [(3, 6), (4, 6), (4,)], transB=1, activation="Relu"),
        _model(f"{MS}::Gelu", [(2, 5, 6)]),
        _model(f"{MS}::QuickGelu", [(2, 5, 6)], alpha=1.702),
        _model(f"{MS}::BiasGelu", [(2, 5, 6), (6,)]),
        _model(f"{MS}::FastGelu", [(2, 5, 6), (6,)]),
        _model(f"{MS}::FastGelu", [(2, 5, 6)], suffix="_without_bias"),
        _model(f"{MS}::SkipLayerNormalization", [(2, 5, 8), (2, 5, 8), (8,), (8,), (8,)]),
        _model(f"{MS}::SkipLayerNormalization", [(2, 5, 8), (2, 5, 8), (8,)], suffix="_without_bias"),
        _model(f"{MS}::SkipSimplifiedLayerNormalization", [(2, 5, 8), (2, 5, 8), (8,), (8,)]),
        _model(f"{MS}::EmbedLayerNormalization", _embedding(), 2),
        _model(f"{MS}::FusedConv", [(2, 6, 5, 5), (8, 3, 3, 3), (8,)], group=2, activation="Relu"),
        _model(
            f"{MS}::FusedConv",
            [(2, 6, 5, 5), (8, 6, 3, 3), (8,), (2, 8, 3, 3)],
            suffix="_residual",
            activation="Relu",
        ),
        _model(f"{MS}::Attention", [(2, 5, 6), (6, 24), (24,)], num_heads=2),
        _model(
            f"{MS}::Attention",
            [(2, 5, 6), (6, 20), (20,)],
            suffix="_widths",
            num_heads=2,
            qkv_hidden_sizes=[8, 8, 4],
        ),
        _model(f"{MS}::MultiHeadAttention", [(2, 5, 12), (2, 7, 12), (2, 7, 12)], num_heads=3),
        _model(
            f"{MS}::MultiHeadAttention",
            [(2, 5, 12), (2, 7, 12), (2, 7, 12), (36,)],
            suffix="_bias",
            num_heads=3,
        ),
        _model(
            f"{MS}::GroupQueryAttention",
            [(2, 5, 64), (2, 5, 32), (2, 5, 32), "", "", _int32(4, 4), np.asarray(5, dtype=np.int32)],
            3,
            shapes=[(2, 5, 64), (2, 2, 5, 16), (2, 2, 5, 16)],
            num_heads=4,
            kv_num_heads=2,
        ),
        _model(f"{MS}::RotaryEmbedding", [(2, 3, 5, 8), _IDS, *_ANGLES]),
        _model(f"{MS}::RotaryEmbedding", [(2, 5, 24), _IDS, *_ANGLES], suffix="_flat", num_heads=3),
        _model(
            f"{MS}::RotaryEmbedding", [(2, 3, 5, 8), _IDS[:1, 0], *_ANGLES], suffix="_offset", interleaved=1
        ),
        _model(f"{MS}::QLinearAdd", _QUANTISED),
        _model(f"{MS}::QLinearMul", _QUANTISED),
        _model(f"{MS}::QLinearSigmoid", [_bytes(2, 6, 3), _SCALE, _ZERO, np.float32(1 / 256), np.uint8(0)]),
        _model(f"{MS}::QLinearLeakyRelu", [_bytes(2, 6, 3), _SCALE, _ZERO, _SCALE, _ZERO], alpha=0.1),
        _model(
            f"{MS}::QLinearGlobalAveragePool",
            [_bytes(2, 6, 4, 4), _SCALE, _ZERO, np.float32(0.04), _ZERO],
            channels_last=0,
        ),
        _model(f"{MS}::QuantizeLinear", [(2, 6, 3), _positive(6), _bytes(6)], axis=1),
        _model(f"{MS}::DequantizeLinear", [_bytes(2, 6, 3), _positive(6), _bytes(6)], axis=1),
    )


def _embedding() -> list[Any]:
    ids = _int32(*range(10)).reshape(2, 5)
    segments = ids % 2
    return [ids, segments, (12, 8), (5, 8), (2, 8), (8,), (8,)]
