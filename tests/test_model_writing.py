"""Writing is atomic: a failure leaves everything as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphprune import model as gm
from graphprune.errors import ModelError, OptionError
from graphprune.model import wire
from tests.model_files import external, network, rich_network, run, written


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fails", ["weights", "fsync", "model rename", "data rename"])
def test_a_failure_leaves_everything_as_it_was(
    data: bool, existing: bool, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    model = gm.load(written(source / "m.onnx", network()))
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "m.onnx"
    if existing:
        gm.save(model, target, external_data=True)
        with (folder / "m.onnx.data").open("ab") as file:
            file.write(b"an older file")
    before = files(folder)
    replace = os.replace

    def broken_replace(old: Any, new: Any, **options: Any) -> None:
        if (
            Path(new).name == ("m.onnx" if fails == "model rename" else "m.onnx.data")
            and Path(old).suffix != ".data"
        ):
            raise OSError(28, "No space left on device")
        if fails == "data rename" and Path(old).name == "m.onnx.data":
            raise OSError(28, "No space left on device")
        replace(old, new, **options)

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if fails == "weights":
        monkeypatch.setattr(ir.Tensor, "tobytes", broken)
    elif fails == "fsync":
        monkeypatch.setattr(os, "fsync", broken)
    else:
        monkeypatch.setattr(os, "replace", broken_replace)
    if fails == "data rename" and not data:
        gm.save(model, target, external_data=False)  # no data file, nothing to fail
        return
    with pytest.raises(ModelError, match="No space left"):
        gm.save(model, target, external_data=data)
    assert files(folder) == before
    assert [path for path in folder.iterdir() if path.name not in before] == [], "temporary files are left"


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ir.Tensor, "tobytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gm.save(model, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("data", [False, True])
def test_staged_files_can_be_loaded_and_vanish(data: bool, tmp_path: Path) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))
    target = tmp_path / "out.onnx"
    with gm.staged(model, target, external_data=data) as file:
        assert not target.exists()
        onnx.checker.check_model(file.path, full_check=True)
        expected = run(file.path)
        assert file.size == sum(path.stat().st_size for path in file.path.parent.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    with gm.staged(model, target, external_data=data) as file:
        assert file.commit() == target
    np.testing.assert_array_equal(run(target), expected)
    assert len(list(tmp_path.iterdir())) == (3 if data else 2)
    with gm.staged(model, target, external_data=data) as file:  # replaces an existing pair
        file.commit()
    np.testing.assert_array_equal(run(target), expected)


def test_without_hard_links_the_old_data_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))
    gm.save(model, tmp_path / "out.onnx", external_data=True)
    before = files(tmp_path)

    def unsupported(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    gm.save(model, tmp_path / "out.onnx", external_data=True)
    assert files(tmp_path) == before


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    external(path)
    model = gm.load(path)
    (tmp_path / "soft.onnx").symlink_to(path)
    os.link(path, tmp_path / "hard.onnx")
    (tmp_path / "x.onnx.data").symlink_to(tmp_path / "m.onnx.data")
    before = files(tmp_path)
    for name in ("m.onnx", "soft.onnx", "hard.onnx", "m.onnx.data", "x.onnx"):
        with pytest.raises(OptionError, match="never overwritten"):
            gm.save(model, tmp_path / name)
        with pytest.raises(OptionError, match="never overwritten"):
            gm.save(gm.copy(model), tmp_path / name)
    with (
        pytest.raises(OptionError, match="never overwritten"),
        gm.staged(model, tmp_path / "other.onnx", sources=[tmp_path / "other.onnx"]),
    ):
        pass
    assert files(tmp_path) == before


def test_bad_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))
    with pytest.raises(OptionError, match="a folder"):
        gm.save(model, tmp_path)
    with pytest.raises(OptionError, match="does not exist"):
        gm.save(model, tmp_path / "none" / "out.onnx")
    monkeypatch.setattr(
        "tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(ModelError, match="Permission denied"):
        gm.save(model, tmp_path / "out.onnx")


def test_large_models_get_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))
    monkeypatch.setattr("graphprune.model.write.EXTERNAL_BYTES", 6000)
    gm.save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").exists()
    monkeypatch.setattr("graphprune.model.write.MAXIMUM_MESSAGE", 6000)
    with pytest.raises(OptionError, match="use external data"):
        gm.save(model, tmp_path / "one.onnx", external_data=False)
    monkeypatch.undo()
    monkeypatch.setattr("graphprune.model.wire.MAXIMUM_MESSAGE", 6000)
    with pytest.raises(ModelError, match="2 GB"):
        gm.save(model, tmp_path / "one.onnx", external_data=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "out.onnx", "out.onnx.data"]


def test_a_tensor_that_writes_too_little_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gm.load(written(tmp_path / "m.onnx", network()))
    monkeypatch.setattr(wire, "_chunks_of", lambda _: [b"sh", memoryview(b"ort")])
    for data in (False, True):
        with pytest.raises(ModelError, match="5 written"):
            gm.save(model, tmp_path / "out.onnx", external_data=data)
    monkeypatch.undo()
    monkeypatch.setattr(wire, "STREAM_BYTES", 0)  # nothing is too small to be written without a copy
    save = gm.save(model, tmp_path / "streamed.onnx")
    monkeypatch.undo()
    assert save.read_bytes() == gm.save(model, tmp_path / "whole.onnx").read_bytes()


def test_file_size_is_what_is_written(tmp_path: Path) -> None:
    model = gm.load(written(tmp_path / "m.onnx", rich_network()))
    size = gm.save(model, tmp_path / "out.onnx").stat().st_size
    assert gm.file_size(model) == pytest.approx(size, abs=100)
