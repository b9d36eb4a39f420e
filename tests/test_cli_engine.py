"""``graphprune engine`` and ``--tensorrt``: what is written without TensorRT, and with a stand-in for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from graphprune.tensorrt import handover
from graphprune.tensorrt.probe import DEVICE, Device, Found, State, probe
from tests.command import Cli

from .test_sparsify import network
from .test_tensorrt_build import STAND_INS, VERSIONS

SHAPES = ("--shapes", "x:1x16x6x6,4x16x6x6,8x16x6x6")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command's own folder, where no package of NVIDIA's is found."""
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS / "empty"))
    onnx.save(network(), tmp_path / "net.onnx")
    return tmp_path


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Puts a stand-in for TensorRT, and a device, on this machine."""

    def install(major: int, **asked: Any) -> None:
        monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
        monkeypatch.setenv("STAND_IN", json.dumps({**VERSIONS[major], **asked}))
        monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls"))
        device = Found(DEVICE, State.WORKS, devices=(Device("a GPU", (9, 0)),))
        monkeypatch.setattr(handover, "probe", lambda name: device if name == DEVICE else probe(name))

    return install


def test_without_tensorrt_there_are_files_a_report_and_no_error(cli: Cli) -> None:
    result = cli("engine", "net.onnx", *SHAPES, "--json")
    assert result.code == 0
    engine = result.json["engine"]
    assert engine["engine"] is None
    assert engine["verdict"]["verdict"] == "NOT_ELIGIBLE"
    assert any("no engine was built" in note for note in engine["notes"])
    assert any("float32" in note for note in engine["notes"])
    plan = json.loads(Path("net.trt.json").read_text())
    assert plan["major"] == 11
    assert os.access("net.trt.sh", os.X_OK)
    assert "--onnx=net.onnx" in Path("net.trt.sh").read_text()
    assert not Path("net.plan").exists()


def test_an_engine_that_is_required_is_missed(cli: Cli) -> None:
    result = cli("engine", "net.onnx", *SHAPES, "--require-engine")
    assert result.code == 1
    assert "net.trt.sh builds it" in result.err


@pytest.mark.parametrize("major", [8, 10, 11])
def test_the_chain_with_an_engine(cli: Cli, tensorrt: Callable[..., None], major: int) -> None:
    log = [
        "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv, product",
        "(Sparsity) Chose 1 layer(s) using sparse tactics: conv",
    ]
    tensorrt(major, log=log)
    result = cli("net.onnx", "--nm", "2:4", "--tensorrt", "net.plan", *SHAPES, "--json")
    assert result.code == 0, result.err
    engine = result.json["engine"]
    assert engine["tensorrt"] == major
    assert engine["engine"]["version"] == VERSIONS[major]["version"]
    assert Path("net.plan").exists()
    assert set(engine["verdict"]["holding"]) == {"conv.w", "product.w", "gemm.w"}
    assert result.json["sparsity"]["pattern"] == "2:4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "dynamic shape"),
        (("--shapes", "y:1,2,3"), "no such input"),
        (("--shapes", "x:8x16x6x6,4x16x6x6,1x16x6x6"), "x"),
        ((*SHAPES, "--trt-version", "7"), "7"),
        ((*SHAPES, "--workspace", "0"), "workspace"),
        ((*SHAPES, "--engine", "net.onnx"), "never changed"),
        ((*SHAPES, "--engine", "there/net.plan"), "does not exist"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(
    cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    result = cli("engine", "net.onnx", *arguments)
    assert result.code == 2
    assert message in result.err
    assert sorted(path.name for path in Path().iterdir()) == ["net.onnx"]


def test_shapes_are_checked_before_the_work(cli: Cli) -> None:
    result = cli("net.onnx", "--nm", "2:4", "--tensorrt", "net.plan")
    assert result.code == 2
    assert "dynamic shape" in result.err
    assert sorted(path.name for path in Path().iterdir()) == ["net.onnx"]


def test_a_table_for_people(cli: Cli) -> None:
    cli("net.onnx", "--nm", "2:4", "-q")
    result = cli("engine", "net.pruned.onnx", *SHAPES)
    assert result.code == 0
    for words in ("TensorRT 11", "3 of 3 that can be 2:4 hold it", "UNKNOWN"):
        assert words in result.out


def test_the_whole_chain_casts_too(cli: Cli) -> None:
    result = cli(
        "net.onnx",
        "--channels",
        "0.3",
        "--nm",
        "2:4",
        "--precision",
        "fp16",
        "--tensorrt",
        "net.plan",
        *SHAPES,
        "--json",
    )
    assert result.code == 0, result.err
    data = result.json
    assert data["parameters"]["after"] < data["parameters"]["before"]
    assert data["precision"]["lowered"]["Conv"] == 2
    assert max(data["precision"]["max_error"].values()) < 0.1
    assert data["engine"]["verdict"]["verdict"] == "UNKNOWN"  # no longer float32; only an engine can tell
    assert len(data["engine"]["verdict"]["holding"]) == 3
    assert cli("inspect", "net.pruned.onnx", "--require", "2:4").code == 0


def test_casting_alone_and_its_exceptions(cli: Cli) -> None:
    assert cli("net.onnx", "--precision", "bf16", "--keep-float32", "Gemm").code == 0
    types = {tensor.name: tensor.data_type for tensor in onnx.load("net.pruned.onnx").graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in types.values()
    assert types["gemm.w"] == onnx.TensorProto.FLOAT
    assert cli("net.onnx", "--nm", "2:4", "--keep-float32", "Gemm").code == 2


@pytest.mark.parametrize(
    "given",
    [
        ("--bench",),
        ("--provider",),
        ("--baseline", "net.onnx"),
        SHAPES,
        ("--trt-version", "10"),
        ("--no-sparsity",),
        ("--workspace", "0"),
        ("--timing-cache", "times"),
        ("--require-engine",),
    ],
)
def test_options_of_an_engine_want_one(cli: Cli, given: tuple[str, ...]) -> None:
    assert cli("net.onnx", "--nm", "2:4", *given).code == 2


def test_engine_and_model_have_names_of_their_own(cli: Cli) -> None:
    result = cli("net.onnx", "--nm", "2:4", "--tensorrt", "net.pruned.onnx", *SHAPES)
    assert result.code == 2
    assert "both be written" in result.err
    assert not Path("net.pruned.onnx").exists()
