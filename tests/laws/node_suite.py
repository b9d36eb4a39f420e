"""The single-node conformance models that ship in onnx's own package, made by its generator."""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
from onnx import numpy_helper

from tests.laws.single import Single


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
        inputs = case.data_sets[0][0]
        names = [value.name for value in case.model.graph.input]
        arrays = [numpy_helper.to_array(a) if hasattr(a, "data_type") else a for a in inputs]
        found[case.name] = Single(case.name, case.model, dict(zip(names, arrays, strict=False)))
    return tuple(found[name] for name in sorted(found))
