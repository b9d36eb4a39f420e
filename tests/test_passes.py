"""Passes compose in ``onnx_ir.passes.Sequential`` and leave the model alone when they fail."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

import graphprune
from graphprune.passes.prune_channels import PruneChannelsPass

DIGITS = Path(__file__).parent.parent / "models" / "digits.onnx"


def digits() -> ir.Model:
    return ir.load(DIGITS)


def test_pass_prunes_in_place_like_prune() -> None:
    model = digits()
    prune = PruneChannelsPass(0.3)
    result = ir.passes.Sequential(prune, RemoveUnusedNodesPass())(model)
    assert result.model is model
    assert result.modified
    expected, report = graphprune.prune(digits(), channels=0.3)
    assert prune.report is not None
    assert prune.report.plan.to_dict() == report.plan.to_dict()
    assert {name: v.shape for name, v in model.graph.initializers.items()} == {
        name: v.shape for name, v in expected.graph.initializers.items()
    }


def test_pass_reports_that_nothing_was_modified() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["": 17]> agraph (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }'
    )
    result = PruneChannelsPass(0.5)(model)
    assert not result.modified


def test_pass_leaves_the_model_alone_when_an_option_is_wrong() -> None:
    model = digits()
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(graphprune.OptionError):
        PruneChannelsPass(1.5)(model)
    assert ir.to_proto(model).SerializeToString() == before
