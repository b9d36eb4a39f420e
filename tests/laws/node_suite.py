"""The single-node conformance models that ship in onnx's own package, made by its generator."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.laws.single import Single, session


@lru_cache(maxsize=1)
def newest() -> tuple[int, int]:
    """The newest IR version and the newest version of the standard operators that ONNX Runtime loads."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1,))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1,))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [value], [result])

    def loads(ir_version: int, opset: int) -> bool:
        try:
            session(
                helper.make_model(
                    graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", opset)]
                )
            )
        except Exception:
            return False
        return True

    ir_version = next(version for version in range(int(onnx.IR_VERSION), 3, -1) if loads(version, 13))
    return ir_version, next(v for v in range(onnx.defs.onnx_opset_version(), 1, -1) if loads(ir_version, v))


def _loadable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The suite stamps models with onnx's own newest versions, though most ops have long been what they are."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    ir_version, opset = newest()
    result.ir_version = min(result.ir_version, ir_version)
    for entry in result.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = min(entry.version, opset)
    try:
        onnx.checker.check_model(result)
    except onnx.checker.ValidationError:
        return model  # the op has changed since
    return result


def _array(value: Any) -> Any:
    if hasattr(value, "data_type"):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


@lru_cache(maxsize=1)
def node_suite() -> tuple[Single, ...]:
    """All models of one test each, with their first set of inputs; sorted by name."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    found: dict[str, Single] = {}
    for case in cases:
        if case.model is None or not case.data_sets:
            continue
        names = [value.name for value in case.model.graph.input]
        arrays = [_array(value) for value in case.data_sets[0][0]]
        found[case.name] = Single(case.name, _loadable(case.model), dict(zip(names, arrays, strict=False)))
    return tuple(found[name] for name in sorted(found))
