"""Reading: nothing is lost on the way to the IR and back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from graphprune import model as gm
from tests.model_files import (
    RNG,
    WEIGHT,
    assert_refused,
    canonical,
    external,
    network,
    rich_network,
    run,
    weight,
    without_defaults,
    written,
)


def test_model_caches_link_both_files(tmp_path: Path) -> None:
    """blobs/ holds the contents, snapshots/ symbolic links to them, as huggingface_hub lays out its cache."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    external(blobs / "m.onnx")
    for name in ("m.onnx", "m.onnx.data"):
        (blobs / name).rename(blobs / f"hash_{name}")
        (snapshot / name).symlink_to(blobs / f"hash_{name}")
    model = gm.load(snapshot / "m.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)  # type: ignore[union-attr]


def test_hard_linked_external_data_is_read(tmp_path: Path) -> None:
    external(tmp_path / "m.onnx")
    os.link(tmp_path / "m.onnx.data", tmp_path / "backup")
    model = gm.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)  # type: ignore[union-attr]
    gm.save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").exists()


def test_external_data_stays_external(tmp_path: Path) -> None:
    external(tmp_path / "m.onnx")
    gm.save(gm.load(tmp_path / "m.onnx"), tmp_path / "out.onnx")
    proto = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert {e.key: e.value for e in weight(proto).external_data}["location"] == "out.onnx.data"
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    np.testing.assert_array_equal(run(tmp_path / "out.onnx"), run(tmp_path / "m.onnx"))
    gm.save(gm.load(tmp_path / "m.onnx"), tmp_path / "one.onnx", external_data=False)
    assert not (tmp_path / "one.onnx.data").exists()
    np.testing.assert_array_equal(run(tmp_path / "one.onnx"), run(tmp_path / "m.onnx"))


def test_external_attributes_and_empty_tensors(tmp_path: Path) -> None:
    """Constant nodes may keep their tensor in external data; a tensor without elements has no bytes to map."""
    proto = network()
    proto.graph.node.insert(0, h.make_node("Constant", [], ["w"], value=weight(proto)))
    proto.graph.initializer[0].CopyFrom(T(name="none", data_type=T.FLOAT, dims=[0, 3], raw_data=b""))
    onnx.save_model(
        proto,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="d",
        size_threshold=0,
        convert_attribute=True,
    )
    gm.save(gm.load(tmp_path / "m.onnx"), tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(tmp_path / "out.onnx"), run(tmp_path / "m.onnx"))
    (tmp_path / "d").unlink()
    assert_refused(tmp_path / "m.onnx", "missing")


# --- Nothing is lost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [network, rich_network])
@pytest.mark.parametrize("data", [False, True])
def test_round_trip_keeps_everything(make: Callable[[], onnx.ModelProto], data: bool, tmp_path: Path) -> None:
    proto = make()
    gm.save(gm.load(written(tmp_path / "m.onnx", proto)), tmp_path / "out.onnx", external_data=data)
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    assert canonical(onnx.load(tmp_path / "out.onnx")) == canonical(proto)
    assert canonical(gm.as_ir(proto)[1](gm.as_ir(proto)[0])) == canonical(proto)


def test_the_models_in_the_onnx_package_come_back_unchanged(tmp_path: Path) -> None:
    """Exports of PyTorch and Caffe2 from 2017 on. (So do the 1,884 of the operator tests; making those is slow.)"""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
    paths = sorted(folder.rglob("*.onnx"))
    assert len(paths) > 100
    for path in paths:
        gm.save(gm.load(path), tmp_path / "out.onnx")
        before, after = onnx.load(path), onnx.load(tmp_path / "out.onnx")
        for proto in (before, after):
            proto.ParseFromString(canonical(proto))
            without_defaults(proto)
        assert before == after, path


def test_stale_value_info_is_no_error(tmp_path: Path) -> None:
    proto = network()
    proto.graph.value_info.append(h.make_tensor_value_info("y", T.INT8, [1, 2]))
    assert gm.load(written(tmp_path / "m.onnx", proto)).graph.num_nodes() == 2


def test_outputs_of_unknown_rank_are_no_error(tmp_path: Path) -> None:
    """Exporters leave them so, and ONNX Runtime runs them, but onnx.checker asks for a shape."""
    proto = network()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    path = written(tmp_path / "m.onnx", proto)
    assert run(path).shape == (2, 64, 6, 6)
    assert gm.load(path).graph.outputs[0].shape is None


def test_ops_that_only_the_runtime_defines_are_no_error(tmp_path: Path) -> None:
    """ONNX Runtime's optimizer writes SimplifiedLayerNormalization into the standard domain."""
    proto = network()
    proto.graph.node[1].CopyFrom(h.make_node("SimplifiedLayerNormalization", ["y", "s"], ["z"], axis=-1))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(6, np.float32), "s"))
    path = written(tmp_path / "m.onnx", proto)
    assert run(path).shape == (2, 64, 6, 6)
    assert gm.load(path).graph[1].op_type == "SimplifiedLayerNormalization"


def test_the_standard_domain_may_be_spelt_out(tmp_path: Path) -> None:
    proto = network()
    proto.opset_import[0].domain = "ai.onnx"
    assert gm.load(written(tmp_path / "m.onnx", proto)).graph.opset_imports == {"": 17}


@pytest.mark.parametrize("columns", [1, 2])
def test_sparse_initializers_become_dense(columns: int, tmp_path: Path) -> None:
    dense = np.zeros((64, 3, 3, 3), np.float32)
    positions = RNG.choice(dense.size, 100, replace=False)
    positions.sort()
    dense.reshape(-1)[positions] = values = RNG.standard_normal(100).astype(np.float32)
    indices = positions if columns == 1 else np.stack(np.unravel_index(positions, dense.shape), axis=1)
    proto = network()
    del proto.graph.initializer[0]
    proto.graph.sparse_initializer.append(
        h.make_sparse_tensor(
            numpy_helper.from_array(values, "w"),
            numpy_helper.from_array(indices.astype(np.int64)),
            dense.shape,
        )
    )
    path = written(tmp_path / "m.onnx", proto)
    model = gm.load(path)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), dense)  # type: ignore[union-attr]
    gm.save(model, tmp_path / "out.onnx")
    np.testing.assert_allclose(run(tmp_path / "out.onnx"), run(path), atol=1e-6)


def test_sparse_constants_become_dense(tmp_path: Path) -> None:
    proto = network()
    values = h.make_tensor("v", T.FLOAT, [1], [5.0])
    constant = h.make_sparse_tensor(values, h.make_tensor("", T.INT64, [1], [3]), [64])
    del proto.graph.initializer[1]
    proto.graph.node.insert(0, h.make_node("Constant", [], ["b"], sparse_value=constant))
    node = gm.load(written(tmp_path / "m.onnx", proto)).graph[0]
    np.testing.assert_array_equal(
        node.attributes["value"].as_tensor().numpy(), np.eye(64, dtype=np.float32)[3] * 5
    )


def test_training_info_is_reported_as_lost(tmp_path: Path) -> None:
    proto = network()
    proto.training_info.add().algorithm.name = "step"
    with pytest.warns(gm.ConversionWarning, match="training_info"):
        gm.load(written(tmp_path / "m.onnx", proto))


def test_weights_are_views_of_the_file(tmp_path: Path) -> None:
    """A model of 200 MB is loaded and written within 60 MB of additional memory."""
    proto = network()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(50_000_000, np.float32), "large"))
    path = written(tmp_path / "m.onnx", proto)
    script = (
        "import sys, resource, onnx, onnx_ir, onnx.checker\n"
        "from graphprune import model\n"
        "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"
        "before = peak(); m = model.load(sys.argv[1]); loaded = peak()\n"
        "model.save(m, sys.argv[2]); model.save(m, sys.argv[3], external_data=True)\n"
        "print(before, loaded, peak(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    outputs = [str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]
    result = subprocess.run(
        [sys.executable, "-c", script, str(path), *outputs], capture_output=True, text=True, check=True
    )
    before, loaded, after, _ = map(int, result.stdout.split())
    assert loaded - before < 60_000
    assert after - before < 60_000
    assert Path(outputs[0]).stat().st_size == path.stat().st_size
