"""What TensorRT's engine inspector says of each layer: its kernel, and whether that kernel is a sparse one.

The JSON is that of ``IEngineInspector.get_engine_information`` and of ``trtexec --exportLayerInfo``. Its fields, and
how names of sparse kernels look, are facts taken from: NVIDIA/TensorRT issues 4020 and 4056 (detailed engines of 10),
the engines under tools/experimental/trt-engine-explorer in NVIDIA/TensorRT 10.0, and kernels of cuSPARSELt and CUTLASS.

- ``sm80_xmma_fprop_sparse_conv_..._sptensor16x8x32_...``, ``sm80_xmma_fprop_avdt_sparse_int8int8_...``,
  ``sm80_xmma_fprop_sparse_conv_interleaved_...``, ``sm80_xmma_sparse_gemm_...``: sparse.
- ``sm80_xmma_fprop_implicit_gemm_...``, ``sm80_xmma_fprop_avdt_dense_int8int8_...``: dense.
- ``__myl_...``, ``__myelin_...``, or nothing: made by the compiler back end; the name tells nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from graphprune.errors import ModelError

_SPARSE = re.compile(r"sparse|sptensor|spgemm|sp_gemm|spmma", re.IGNORECASE)
_OPAQUE = re.compile(r"^(__my(l|elin)|0x)", re.IGNORECASE)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1e|\[ONNX Layer: |\s*$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's name, such as "Conv_1 + Relu_2".
        kind: Its LayerType, such as "CaskConvolution"; empty where the engine was built without details.
        tactic: Name of its kernel; None where there is none.
        nodes: Names of the network's nodes that it computes.
        sparse: Its kernel is a sparse one; None where the name of the kernel does not tell.
        sparse_weights: HasSparseWeights, where the layer has that field.
        weights: Element type of its weights as TensorRT writes it, such as "Half".
    """

    name: str
    kind: str = ""
    tactic: str | None = None
    nodes: tuple[str, ...] = ()
    sparse: bool | None = None
    sparse_weights: bool | None = None
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class EngineLayers:
    """All layers of an engine.

    Attributes:
        layers: In the order of the engine.
        detailed: Built with profiling verbosity "detailed": without, there are only names.
    """

    layers: tuple[Layer, ...]
    detailed: bool

    @property
    def sparse(self) -> tuple[Layer, ...]:
        """Layers whose kernel is known to be a sparse one."""
        return tuple(layer for layer in self.layers if layer.sparse)


def is_sparse_tactic(name: str | None) -> bool | None:
    """Whether a kernel computes with sparse weights, by its name; None where the name does not tell.

    >>> is_sparse_tactic("sm80_xmma_fprop_avdt_sparse_int8int8_tilesize64x64x64_tapsperload3")
    True
    >>> is_sparse_tactic("sm80_xmma_fprop_avdt_dense_int8int8_tilesize64x64x64")
    False
    >>> is_sparse_tactic("__myelin_CASK_STUB") is None
    True
    """
    if not name:
        return None
    if _SPARSE.search(name):
        return True
    return None if _OPAQUE.match(name) else False


def parse_layers(text: str) -> EngineLayers:
    """Read the inspector's JSON of a whole engine.

    Raises
    ------
    ModelError
        If it is no JSON, or has no list of layers.
    """
    try:
        document = json.loads(text, strict=False)  # names may hold control characters
    except ValueError as error:
        raise ModelError(
            f"the engine's layer information is no JSON: {error}; export it once more"
        ) from error
    entries = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ModelError(
            "the engine's layer information has no list 'Layers'; use get_engine_information or --exportLayerInfo"
        )
    layers = tuple(_layer(entry) for entry in entries)
    return EngineLayers(layers, any(isinstance(entry, dict) for entry in entries))


def _layer(entry: Any) -> Layer:
    if not isinstance(entry, dict):
        return Layer(str(entry), nodes=_nodes(str(entry), ""))
    name = str(entry.get("Name", ""))
    tactic = entry.get("TacticName")
    flag = entry.get("HasSparseWeights")
    weights = entry.get("Weights")
    return Layer(
        name=name,
        kind=str(entry.get("LayerType", "")),
        tactic=str(tactic) if tactic else None,
        nodes=_nodes(name, str(entry.get("Metadata", ""))),
        sparse=is_sparse_tactic(str(tactic) if tactic else None),
        sparse_weights=None if flag is None else bool(flag),
        weights=str(weights["Type"]) if isinstance(weights, dict) and "Type" in weights else None,
    )


def _nodes(name: str, metadata: str) -> tuple[str, ...]:
    """The network's nodes: from the metadata that the parser leaves (10 and 11), else from the layer's name."""
    return tuple(_NODE.findall(metadata)) or split_layer(name)


def split_layer(name: str) -> tuple[str, ...]:
    """The names that TensorRT joined into the name of a fused layer.

    >>> split_layer("Conv_276 + Add_277 + Relu_278")
    ('Conv_276', 'Add_277', 'Relu_278')
    """
    return tuple(part for part in (piece.strip() for piece in name.split(" + ")) if part)
