"""The command line of sparse weights: options, exit codes, what is written and what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphprune.sparsity.packed import PackedReader
from tests.command import Cli

from .test_sparsify import network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(network(), tmp_path / "net.onnx")
    return tmp_path


def weights(path: str) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_two_of_four(cli: Cli) -> None:
    result = cli("net.onnx", "--nm", "2:4")
    assert result.code == 0
    assert "3 of 4 weights" in result.out
    assert "nothing else changed" in result.out
    assert "depthwise" in result.out  # why one was left as it was
    groups = weights("net.pruned.onnx")["gemm.w"].reshape(24, 16, 4)
    assert (np.count_nonzero(groups, axis=2) == 2).all()
    assert cli("inspect", "net.pruned.onnx", "--require", "2:4").code == 0
    short = cli("inspect", "net.onnx", "--require", "2:4")
    assert short.code == 1
    assert "3 of 3 weights do not hold 2:4: conv.w (dense)" in short.err


def test_json_says_everything(cli: Cli) -> None:
    result = cli("net.onnx", "--nm", "2:4", "--json")
    data = json.loads(result.out)
    assert result.code == 0
    assert data["verified"] is True
    sparsity = data["sparsity"]
    assert sparsity["pattern"] == "2:4"
    entry = next(entry for entry in sparsity["weights"] if entry["name"] == "product.w")
    assert entry["eligible"] is True
    assert entry["likely_to_gain"] is False
    assert entry["holds"] == "2:4"
    assert 0.6 < entry["magnitude_kept"] < 0.9
    listed = json.loads(cli("inspect", "net.onnx", "--sparsity", "--json").out)["sparsity"]["weights"]
    assert [entry["holds"] for entry in listed if entry["eligible"]] == ["dense"] * 3


def test_channels_first_and_still_eligible(cli: Cli) -> None:
    result = cli("net.onnx", "--channels", "0.5", "--nm", "2:4", "--json")
    assert result.code == 0
    data = json.loads(result.out)
    assert data["parameters"]["after"] < data["parameters"]["before"]
    cut = weights("net.pruned.onnx")
    assert cut["gemm.w"].shape == (24, 32)  # the group of 64 keeps a multiple of what TensorRT asks for
    assert (np.count_nonzero(cut["gemm.w"].reshape(24, 8, 4), axis=2) == 2).all()
    assert {e["name"] for e in data["sparsity"]["weights"] if e["eligible"]} == {
        "conv.w",
        "product.w",
        "gemm.w",
    }


def test_packed_beside_the_model(cli: Cli) -> None:
    assert cli("net.onnx", "--nm", "2:4", "--nm-packed", "net.safetensors").code == 0
    with PackedReader("net.safetensors") as packed:
        for name in ("conv.w", "product.w", "gemm.w"):
            assert packed.read(name).tobytes() == weights("net.pruned.onnx")[name].tobytes()


def test_what_is_packed_is_what_a_cast_has_left(cli: Cli) -> None:
    assert cli("net.onnx", "--nm", "2:4", "--precision", "fp16", "--nm-packed", "net.safetensors").code == 0
    held = weights("net.pruned.onnx")
    with PackedReader("net.safetensors") as packed:
        assert len(packed.weights) == 3
        for name in packed.weights:
            assert packed.read(name).dtype == np.float16
            assert packed.read(name).tobytes() == held[name].tobytes()


def test_weights_without_an_order_are_named(cli: Cli) -> None:
    model = onnx.load("net.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "product.w":
            array = numpy_helper.to_array(tensor).copy()
            array[3, 5] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, "nan.onnx")
    result = cli("nan.onnx", "--nm", "2:4")
    assert result.code == 1
    assert "'product.w'" in result.err
    assert "NaN" in result.err
    assert not Path("nan.pruned.onnx").exists()
    assert cli("nan.onnx", "--nm", "2:4", "--exclude", "product.w").code == 0


def test_inputs_choose_and_fit(cli: Cli) -> None:
    x = np.random.default_rng(0).standard_normal((64, 16, 6, 6)).astype(np.float32)
    np.savez("calib.npz", x=x)
    result = cli(
        "net.onnx", "--nm", "2:4", "--calib", "calib.npz", "--permute", "--permute-seconds", "1", "--json"
    )
    assert result.code == 0, result.err
    sparsity = json.loads(result.out)["sparsity"]
    assert sparsity["method"] == "alps + refit + permutation"
    assert {e["method"] for e in sparsity["weights"] if e["eligible"]} == {"alps"}
    assert cli("inspect", "net.pruned.onnx", "--require", "2:4").code == 0
    plain = cli(
        "net.onnx",
        "--nm",
        "2:4",
        "--calib",
        "calib.npz",
        "--no-repair",
        "--nm-method",
        "wanda",
    )
    assert plain.code == 0, plain.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--nm", "4:2"), 2, "4:2"),
        (("--nm", "two"), 2, "no N:M pattern"),
        (("--nm", "1:4"), 2, "only for 2:4"),
        (("--nm", "2:4", "--unstructured", "0.5"), 2, "exclude each other"),
        (("--block", "4x1"), 2, "give --nm"),
        (("--nm-method", "wanda"), 2, "give --nm"),
        (("--nm", "2:4", "--nm-method", "wanda"), 2, "--calib"),
        (("--nm", "2:4", "--include", "nothing"), 2, "matches no weight"),
        (("--nm", "2:4", "--include", "depthwise"), 1, "depthwise convolution"),
        (("--unstructured", "1.5", "--nm-target", "any"), 2, "between 0 and 1"),
        (("--unstructured", "0.5", "--nm-target", "any", "--nm-packed", "p"), 2, "--nm-packed"),
        (("--nm", "2:4", "--nm-packed", "net.onnx"), 2, "never changed"),
        (("--nm", "2:4", "--nm-packed", "net.pruned.onnx"), 2, "would both be written"),
        (("--nm", "2:4", "--nm-target", "tpu"), 2, "no target 'tpu'"),
    ],
)
def test_bad_input_writes_nothing(cli: Cli, arguments: tuple[str, ...], code: int, message: str) -> None:
    before = sorted(Path().iterdir())
    result = cli("net.onnx", *arguments)
    assert result.code == code
    assert message in result.err
    assert sorted(Path().iterdir()) == before


def test_quiet_is_quiet(cli: Cli) -> None:
    result = cli("net.onnx", "--nm", "2:4", "-q")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_why_and_sparsity_exclude_each_other(cli: Cli) -> None:
    assert cli("inspect", "net.onnx", "--sparsity", "--why", "conv.w", "gemm.w").code == 2
