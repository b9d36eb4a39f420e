"""Models with dead positions, and what is asked of each once those are gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphprune.passes.remove_dead import DeadReport, remove_dead

from .patterns import run
from .twins import parse

Array = np.ndarray[Any, Any]


def whole(*shape: int, seed: int = 0) -> Array:
    """Whole numbers, none of them zero, on which float arithmetic is exact."""
    drawn = np.random.default_rng(seed).integers(-3, 4, shape)
    return np.where(drawn == 0, 1, drawn).astype(np.float32)


def vector(*numbers: float) -> Array:
    return np.asarray(numbers, np.float32)


def without(array: Array, axis: int, *positions: int) -> Array:
    """The array with positions along an axis set to zero."""
    array = array.copy()
    array[(slice(None),) * axis + (list(positions),)] = 0
    return array


def feeds_of(model: onnx.ModelProto, seed: int = 7) -> dict[str, Array]:
    feeds = {}
    for value in model.graph.input:
        dims = [d.dim_value or 2 for d in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = whole(*dims, seed=seed).astype(dtype)
    return feeds


def same(before: onnx.ModelProto, after: onnx.ModelProto, *, exact: bool = True) -> None:
    """Both models give the same on whole numbers, bit for bit."""
    for seed in (7, 8):
        feeds = feeds_of(before, seed)
        for expected, found in zip(run(before, feeds), run(after, feeds), strict=True):
            if exact:
                np.testing.assert_array_equal(found, expected)
            else:
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def shrunk(
    text: str, arrays: dict[str, Array], *, exact: bool = True, once: bool = True
) -> tuple[DeadReport, ir.Model]:
    """The model without its dead positions; it computes what it did before, and nothing more is found in it.

    A carrier may be found dead later, where what it takes over cancels what it held: then ``once`` is false.
    """
    model = parse(text, **arrays)
    before = ir.to_proto(model)
    report = remove_dead(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    same(before, after, exact=exact)
    if once:
        assert remove_dead(ir.from_proto(after), verify=False).removed == {}
    return report, model


def size(model: ir.Model, name: str) -> tuple[int, ...]:
    shape = model.graph.initializers[name].shape
    assert shape is not None
    return tuple(shape.numpy())


def reasons(report: DeadReport) -> str:
    return "; ".join(f"{s.count}: {s.reason}" for s in report.stayed)


MLP = """g (float[2, 5] x) => (float[2, 3] y) {
    h = Gemm(x, w1, b1)
    r = Relu(h)
    y = Gemm(r, w2, b2)
}"""


def mlp(**changed: Array) -> dict[str, Array]:
    plain = {"w1": whole(5, 6), "b1": whole(6, seed=1), "w2": whole(6, 3, seed=2), "b2": whole(3, seed=3)}
    return plain | changed
