"""The command line in tests: a network to run it on, its result, and what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import graphprune

INPUT = "pixels:0"  # names may hold colons


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.out)
        return data


Cli = Callable[..., Result]


def network(name: str = "net", *, batch: int | str = "batch", normalise: bool = False) -> onnx.ModelProto:
    """Two convolutions, a residual block, a classifier; random weights."""
    generator = np.random.default_rng(7)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32) / 3, name)

    nodes = [
        helper.make_node(
            "Conv", [INPUT, "stem.weight", "stem.bias"], ["stem"], "stem_conv", pads=[1, 1, 1, 1]
        ),
        helper.make_node("Relu", ["stem"], ["stem_relu"], "stem_relu"),
        helper.make_node("Conv", ["stem_relu", "inner.weight"], ["inner"], "inner_conv"),
        helper.make_node("Tanh", ["inner"], ["inner_tanh"], "inner_tanh"),
        helper.make_node("Conv", ["inner_tanh", "back.weight"], ["back"], "back_conv"),
        helper.make_node("Add", ["stem_relu", "back"], ["sum"], "join"),
        helper.make_node("GlobalAveragePool", ["sum"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
    ]
    last = "flat"
    weights = [
        weight("stem.weight", 12, 3, 3, 3),
        weight("stem.bias", 12),
        weight("inner.weight", 16, 12, 1, 1),
        weight("back.weight", 12, 16, 1, 1),
        weight("head.weight", 5, 12),
    ]
    if normalise:
        nodes.append(helper.make_node("LayerNormalization", [last, "norm.weight"], ["normed"], "norm"))
        weights.append(weight("norm.weight", 12))
        last = "normed"
    nodes.append(helper.make_node("Gemm", [last, "head.weight"], ["scores"], "head_gemm", transB=1))
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [batch, 3, 6, 6])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 5])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def process(*arguments: object, cwd: Path, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    root = str(Path(graphprune.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-m", "graphprune", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **keywords,
    )


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in onnx.load(str(path)).graph.initializer}
