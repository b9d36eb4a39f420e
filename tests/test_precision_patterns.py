"""Every pattern network in low precision: valid, within its bounds, and what ONNX Runtime loads."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

from graphprune.model import as_ir, to_proto
from graphprune.passes.cast_precision import cast_precision

from .patterns import PATTERNS, Pattern, run

#: Patterns that are declared twice (without and with their normalised axes) are one network.
NETWORKS = list({pattern.graph.__name__: pattern for pattern in PATTERNS}.values())
#: The opset whose convolutions, poolings and recurrent layers take bfloat16.
BFLOAT16_OPSET = 22

every_network = pytest.mark.parametrize("pattern", NETWORKS, ids=lambda pattern: pattern.graph.__name__)


@every_network
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_pattern(pattern: Pattern, precision: str) -> None:
    built = pattern.build()
    model, _ = as_ir(built.model)
    report = cast_precision(model, precision, input_shapes=pattern.input_shapes)
    proto = to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    for before, after in (
        (built.model.graph.input, proto.graph.input),
        (built.model.graph.output, proto.graph.output),
    ):
        assert [(v.name, v.type.tensor_type.elem_type) for v in before] == [
            (v.name, v.type.tensor_type.elem_type) for v in after
        ]
    if precision == "fp16":
        assert report.contractions[0] > 0
        assert report.bytes_after < report.bytes_before
        for array in run(proto, built.feeds):
            assert array.dtype.kind != "f" or np.isfinite(array).all()
    assert not report.lowered or report.max_error
    once = proto.SerializeToString(deterministic=True)
    assert not cast_precision(model, precision, input_shapes=pattern.input_shapes).lowered
    assert to_proto(model).SerializeToString(deterministic=True) == once


@every_network
def test_pattern_in_bfloat16_of_an_opset_that_knows_it(pattern: Pattern) -> None:
    if pattern.opset > BFLOAT16_OPSET:
        pytest.skip("its opset is newer, and is tested as it is")
    try:
        built = dataclasses.replace(pattern, opset=BFLOAT16_OPSET).build()
        onnx.checker.check_model(built.model, full_check=True)
    except Exception as error:
        pytest.skip(f"its ops are not of opset {BFLOAT16_OPSET}: {str(error).splitlines()[0]}")
    model, _ = as_ir(built.model)
    report = cast_precision(model, "bf16", input_shapes=pattern.input_shapes)
    onnx.checker.check_model(to_proto(model), full_check=True)
    assert report.contractions[0] > 0
    assert report.max_error
