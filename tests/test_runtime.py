"""Sessions: how threads and memory behave in all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphprune.errors import ModelError, said
from graphprune.runtime import make_session, run_session
from tests.twins import parse


def product() -> onnx.ModelProto:
    net = parse("agraph (float[2,4] x) => (float[2,4] y) { y = MatMul(x, w) }", w=np.eye(4, dtype=np.float32))
    return ir.serde.serialize_model(net)


def test_a_model_runs_from_memory_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "product.onnx"
    onnx.save(product(), path)
    feeds = {"x": np.ones((2, 4), np.float32)}
    sources = (product(), product().SerializeToString(), path, str(path))
    results = [make_session(source).run(None, feeds)[0] for source in sources]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_threads_spin_only_where_runs_are_timed_and_never_after_a_run() -> None:
    entry = make_session(product()).get_session_options().get_session_config_entry
    assert entry("session.intra_op.allow_spinning") == "0"
    entry = make_session(product(), spin=True).get_session_options().get_session_config_entry
    assert entry("session.force_spinning_stop") == "1"
    with pytest.raises(RuntimeError):  # not set: ONNX Runtime's default, which is to spin
        entry("session.intra_op.allow_spinning")


def test_settings_are_taken() -> None:
    plain = make_session(product()).get_session_options()
    assert not plain.enable_cpu_mem_arena
    session = make_session(
        product(), threads=1, entries={"session.disable_prepacking": "1"}, enable_cpu_mem_arena=True
    )
    options = session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.enable_cpu_mem_arena
    assert options.get_session_config_entry("session.disable_prepacking") == "1"


def test_what_cannot_be_loaded_is_named() -> None:
    with pytest.raises(ModelError, match="cannot load the gradient model: "):
        make_session(b"no model", what="the gradient model")


def test_what_another_package_says_becomes_one_line() -> None:
    error = ValueError("\n  first  \n\n second\nthird")
    assert said(error) == "first"
    assert said(error, 2) == "first second"
    assert said(ValueError()) == "ValueError"


def test_a_run_takes_the_feeds_that_it_knows_and_says_what_failed() -> None:
    session = make_session(product())
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert np.array_equal(run_session(session, {"x": x, "unknown": x})["y"], x)
    with pytest.raises(ModelError, match="cannot run the product: "):
        run_session(session, {"x": x[:, :3]}, "the product")
