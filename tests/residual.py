"""Small residual networks, and what to do with them in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from graphprune.axes.analysis import Analysis
from graphprune.calibration import Calibration
from graphprune.cost import macs as count_macs
from graphprune.depth.blocks import Branch, find_branches
from graphprune.graph.twin import build_twin
from tests.twins import parse

Array = npt.NDArray[Any]


MODELS = Path(__file__).parents[1] / "models"


WIDTH = 6


def weights(names: str, seed: int = 0) -> dict[str, Array]:
    """Random matrices by name."""
    generator = np.random.default_rng(seed)
    return {
        name: (generator.standard_normal((WIDTH, WIDTH)) / 3).astype(np.float32) for name in names.split()
    }


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def run(model: ir.Model, feeds: dict[str, Array]) -> dict[str, Array]:
    """Outputs in ONNX Runtime of a model that ONNX's checker accepts."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def found(model: ir.Model) -> list[Branch]:
    return find_branches(Analysis(build_twin(model)))


def pairs(model: ir.Model) -> list[tuple[str, str, str]]:
    """(stream, result, sum) of each branch that can be removed."""
    return [
        (branch.stream.name, branch.result.name, branch.output.name)
        for branch in found(model)
        if branch.obstacle is None
    ]


def calibration(samples: int = 16, name: str = "x", width: int = WIDTH) -> Calibration:
    inputs = np.random.default_rng(1).standard_normal((samples, width)).astype(np.float32)
    return Calibration({name: inputs}, {})


#: Three branches one behind the other; the second is planted to be next to nothing.
STACK = """agraph (float[N, 6] x) => (float[N, 6] y) {
    a1 = MatMul(x, w1)  b1 = Relu(a1)  f1 = MatMul(b1, v1)  s1 = Add(x, f1)
    a2 = MatMul(s1, w2) b2 = Relu(a2)  f2 = MatMul(b2, v2)  s2 = Add(f2, s1)
    a3 = MatMul(s2, w3) b3 = Relu(a3)  f3 = MatMul(b3, v3)  s3 = Add(s2, f3)
    y = MatMul(s3, head)
}"""


def stack() -> tuple[ir.Model, dict[str, Array]]:
    arrays = weights("w1 v1 w2 v2 w3 v3 head")
    arrays["v2"] *= 1e-3
    return parse(STACK, **arrays), arrays


def stack_oracle(w: dict[str, Array], x: Array, without: tuple[int, ...] = ()) -> Array:
    for k in (1, 2, 3):
        if k not in without:
            x = x + relu(x @ w[f"w{k}"]) @ w[f"v{k}"]
    return x @ w["head"]


CONVOLUTIONAL = """agraph (float[2, 4, 8, 8] x) => (float[2, 8, 4, 4] y) {
    c1 = Conv<pads=[1,1,1,1]>(x, k1)   r1 = Relu(c1)  f1 = Conv<pads=[1,1,1,1]>(r1, k2)
    s1 = Add(x, f1)  t1 = Relu(s1)
    c2 = Conv<pads=[1,1,1,1], strides=[2,2]>(t1, k3)  r2 = Relu(c2)  f2 = Conv<pads=[1,1,1,1]>(r2, k4)
    even = Slice(t1, starts, ends, axes, steps)  wide = Pad(even, pads)
    s2 = Add(wide, f2)  t2 = Relu(s2)
    c3 = Conv<pads=[1,1,1,1]>(t2, k5)  p3 = Conv(t2, k6)
    s3 = Add(c3, p3)  y = Relu(s3)
}"""


def convolutional() -> ir.Model:
    generator = np.random.default_rng(0)
    shapes = {
        "k1": (4, 4, 3, 3),
        "k2": (4, 4, 3, 3),
        "k3": (8, 4, 3, 3),
        "k4": (8, 8, 3, 3),
        "k5": (8, 8, 3, 3),
        "k6": (8, 8, 1, 1),
    }
    kernels = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    literals = {
        "starts": np.array([0, 0]),
        "ends": np.array([8, 8]),
        "axes": np.array([2, 3]),
        "steps": np.array([2, 2]),
        "pads": np.array([0, 2, 0, 0, 0, 2, 0, 0]),
    }
    return parse(CONVOLUTIONAL, **kernels, **literals)


def image_calibration() -> Calibration:
    images = np.random.default_rng(2).standard_normal((4, 4, 8, 8)).astype(np.float32)
    return Calibration({"x": images}, {}, 2)


ATTENTION = """
    {n}q = MatMul({i}, wq{k})  {n}k = MatMul({i}, wk{k})  {n}v = MatMul({i}, wv{k})
    {n}kt = Transpose<perm=[0,2,1]>({n}k)  {n}d = MatMul({n}q, {n}kt)  {n}dm = Add({n}d, bias)
    {n}p = Softmax<axis=-1>({n}dm)  {n}o = MatMul({n}p, {n}v)  {n}f = MatMul({n}o, wo{k})
"""


MLP = "{n}a = MatMul({i}, up{k})  {n}g = Tanh({n}a)  {n}f = MatMul({n}g, down{k})"


PRENORM = """
    n{k}1 = LayerNormalization<axis=-1>({i}, g, b) {attention} h{k} = Add({i}, A{k}f)
    n{k}2 = LayerNormalization<axis=-1>(h{k}, g, b) {mlp} o{k} = Add(h{k}, M{k}f)
"""


POSTNORM = """
    {attention} r{k} = Add(A{k}f, {i})  h{k} = LayerNormalization<axis=-1>(r{k}, g, b)
    {mlp} u{k} = Add(M{k}f, h{k})  o{k} = LayerNormalization<axis=-1>(u{k}, g, b)
"""


PARALLEL = """
    n{k}1 = LayerNormalization<axis=-1>({i}, g, b) {attention} {mlp}
    h{k} = Add({i}, A{k}f)  o{k} = Add(h{k}, M{k}f)
"""


def transformer(form: str, mask: str = "input") -> ir.Model:
    """Two layers on embedded tokens; the attention mask is an input, or computed from the tokens."""
    body = "e = Gather(table, ids)"
    if mask == "input":
        body += " m = Unsqueeze(attention_mask, one) bias = Mul(m, low)"
    else:
        body += " empty = Equal(ids, zero) e2 = Unsqueeze(empty, one) bias = Where(e2, low, none)"
    stream = "e"
    for k in (0, 1):
        attention_in, mlp_in = {
            PRENORM: (f"n{k}1", f"n{k}2"),
            POSTNORM: (stream, f"h{k}"),
            PARALLEL: (f"n{k}1", f"n{k}1"),
        }[form]
        attention = ATTENTION.format(n=f"A{k}", i=attention_in, k=k)
        mlp = MLP.format(n=f"M{k}", i=mlp_in, k=k)
        body += form.format(i=stream, k=k, attention=attention, mlp=mlp)
        stream = f"o{k}"
    given = "int64[B, T] ids" + (", float[B, T] attention_mask" if mask == "input" else "")
    text = f"agraph ({given}) => (float[B, T, 6] y) {{ {body} y = MatMul({stream}, head) }}"
    matrices = weights("table head " + " ".join(f"wq{k} wk{k} wv{k} wo{k} up{k} down{k}" for k in (0, 1)))
    generator = np.random.default_rng(5)
    return parse(
        text,
        **matrices,
        g=generator.standard_normal(WIDTH).astype(np.float32),
        b=generator.standard_normal(WIDTH).astype(np.float32),
        one=np.array([1]),
        zero=np.array(0),
        low=np.array(-30, np.float32),
        none=np.array(0, np.float32),
    )


def macs(model: ir.Model) -> int:
    return count_macs(Analysis(build_twin(model)))


def accuracy(model: ir.Model) -> float:
    held_out = np.load(MODELS / "digits_test.npz")
    logits = run(model, {"image": held_out["image"].astype(np.float32) / 16})["logits"]
    return float((logits.argmax(1) == held_out["label"]).mean())


def digits_inputs() -> Calibration:
    held_out = np.load(MODELS / "digits_test.npz")
    return Calibration({"image": held_out["image"][:128].astype(np.float32) / 16}, {})
