"""The command line: options, what is printed, and what is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import graphprune
from graphprune.verification import pruned
from tests.command import INPUT, Cli, Result, contents, network, process, shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(network(), str(tmp_path / "net.onnx"))
    return tmp_path


def test_the_first_command_of_all(folder: Path) -> None:
    before = (folder / "net.onnx").read_bytes()
    done = process("net.onnx", "--channels", 0.5, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(contents(folder)) == ["net.onnx", "net.pruned.onnx"]
    assert (folder / "net.onnx").read_bytes() == before
    assert shapes(folder / "net.pruned.onnx") == {
        "stem.weight": (6, 3, 3, 3),
        "stem.bias": (6,),
        "inner.weight": (8, 6, 1, 1),
        "back.weight": (6, 8, 1, 1),
        "head.weight": (5, 6),
    }
    for row in ("parameters", "MACs", "file size", "groups", "largest output change", "error", "seconds"):
        assert re.search(rf"^{row} ", done.stdout, re.MULTILINE), done.stdout
    assert "2 pruned, 0 free but not cut, 0 statistical, 2 frozen" in done.stdout
    assert "Traceback" not in done.stderr


def test_output_and_shape(cli: Cli, folder: Path) -> None:
    result = cli(
        "net.onnx", "--channels", "0.25", "-o", "small.onnx", "--input-shape", f"{INPUT}:2,3,6,6", "--json"
    )
    assert result.code == 0, result.err
    assert sorted(contents(folder)) == ["net.onnx", "small.onnx"]
    report = json.loads(result.out)
    assert report["input_shapes"] == {INPUT: [2, 3, 6, 6]}
    assert report["output"] == "small.onnx"
    assert report["bytes"]["after"] == (folder / "small.onnx").stat().st_size
    assert report["max_error"] < 1e-4 < report["output_change"]
    assert report["parameters"]["after"] < report["parameters"]["before"]
    assert report["verified"]


def test_a_small_verb_may_be_spelled(cli: Cli, folder: Path) -> None:
    assert cli("prune", "net.onnx", "--channels", "0.5", "-q").code == 0
    assert "net.pruned.onnx" in contents(folder)


def test_json_and_nothing_else(folder: Path) -> None:
    done = process("net.onnx", "--channels", 0.5, "--json", "-v", cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {entry["group"] for entry in report["pruned"]} == {"stem.weight[0]", "inner.weight[0]"}
    assert report["seconds"]["total"] > 0


def test_quiet(cli: Cli) -> None:
    assert cli("net.onnx", "--channels", "0.5", "-q") == Result(0, "", "")


def test_verbose_lists_groups(cli: Cli) -> None:
    plain = cli("net.onnx", "--channels", "0.5", "-v")
    assert re.search(r"^stem\.weight\[0\] +12 -> 6 ", plain.out, re.MULTILINE), plain.out
    assert "back.weight[0] pass-through" not in plain.out
    assert "back.weight[0] pass-through" in cli("net.onnx", "--channels", "0.5", "-vv").out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--channels", "0.5", "--include", "inner_[st]*"], {"inner.weight": (8, 12, 1, 1)}),
        (["--channels", "0.5", "--exclude", "inner_tanh"], {"back.weight": (6, 16, 1, 1)}),
        (
            ["--channels", "0.5", "--exclude", "stem.bias"],
            {"stem.weight": (12, 3, 3, 3), "back.weight": (12, 8, 1, 1)},
        ),
        (["--channels", "0.3", "--round-to", "4"], {"stem.weight": (8, 3, 3, 3)}),
        (["--channels", "0.25", "--channels-for", "stem.bias=0.5"], {"back.weight": (6, 12, 1, 1)}),
        (
            ["--channels-for", "inner.weight=0.25", "--channels-for", "stem.bias=0.5"],
            {"stem.weight": (6, 3, 3, 3)},
        ),
        (
            ["--channels", "0.5", "--score", "random", "--seed", "3", "--no-verify"],
            {"inner.weight": (8, 6, 1, 1)},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_goes(cli: Cli, folder: Path, options: list[str], expected: dict[str, tuple[int, ...]]) -> None:
    result = cli("net.onnx", *options)
    assert result.code == 0, result.err
    found = shapes(folder / "net.pruned.onnx")
    assert {name: found[name] for name in expected} == expected


def test_statistical_groups_are_left_alone_unless_asked_for(cli: Cli, folder: Path) -> None:
    onnx.save(network(normalise=True), str(folder / "norm.onnx"))
    assert "1 pruned, 0 free but not cut, 1 statistical" in cli("norm.onnx", "--channels", "0.5").out
    assert shapes(folder / "norm.pruned.onnx")["norm.weight"] == (12,)
    assert (
        "2 pruned, 0 free but not cut, 0 statistical"
        in cli("norm.onnx", "--channels", "0.5", "--residual").out
    )
    assert shapes(folder / "norm.pruned.onnx")["norm.weight"] == (6,)


def test_calibration(cli: Cli, folder: Path) -> None:
    arrays: dict[str, Any] = {INPUT: np.random.default_rng(0).random((16, 3, 6, 6), dtype=np.float32)}
    np.savez(folder / "calib.npz", **arrays)
    assert cli("net.onnx", "--channels", "0.5", "--calib", "calib.npz").code == 0


def test_no_verify_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("verification was called")

    monkeypatch.setattr(pruned, "verify", refuse)
    result = cli("net.onnx", "--channels", "0.5", "--no-verify")
    assert result.code == 0
    assert "not verified" in result.out


def test_plan_round_trip(cli: Cli, folder: Path) -> None:
    assert cli("net.onnx", "--channels", "0.4", "-o", "a.onnx", "--plan-out", "plan.json").code == 0
    assert sorted(contents(folder)) == ["a.onnx", "net.onnx", "plan.json"]
    assert cli("net.onnx", "--plan", "plan.json", "-o", "b.onnx", "--plan-out", "again.json").code == 0
    files = contents(folder)
    assert files["a.onnx"] == files["b.onnx"]
    assert files["plan.json"] == files["again.json"]
    # The plan names, for training code, what is kept of each axis.
    original = {t.name: numpy_helper.to_array(t) for t in network().graph.initializer}
    pruned = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(folder / "a.onnx")).graph.initializer}
    plan = json.loads(files["plan.json"])
    for name, entry in plan["initializers"].items():
        array = original[name]
        for axis, kept in entry["axes"].items():
            array = array.take(kept, axis=int(axis))
        np.testing.assert_array_equal(array, pruned[name])
    assert plan["initializers"].keys() == {
        name for name in original if original[name].shape != pruned[name].shape
    }


def test_an_output_is_replaced_and_its_neighbours_are_not(cli: Cli, folder: Path) -> None:
    (folder / "net.pruned.onnx").write_bytes(b"older")
    (folder / "notes.txt").write_bytes(b"mine")
    assert cli("net.onnx", "--channels", "0.5", "-q").code == 0
    files = contents(folder)
    assert sorted(files) == ["net.onnx", "net.pruned.onnx", "notes.txt"]
    assert files["net.pruned.onnx"] != b"older"
    assert files["notes.txt"] == b"mine"


# -- inspecting -------------------------------------------------------------------------------------------------


def test_inspect(cli: Cli, folder: Path) -> None:
    before = contents(folder)
    result = cli("inspect", "net.onnx")
    assert result.code == 0, result.err
    assert re.search(r"^inner\.weight\[0\] +16 +1 +384 +27\.6 k +free$", result.out, re.MULTILINE), result.out
    assert "frozen: it is visible in the model's output 'scores'" in result.out
    assert result.out.endswith("4 groups: 2 free, 0 statistical, 2 frozen\n")
    assert "contracted" not in result.out
    assert "back.weight[1] contracted" in cli("inspect", "net.onnx", "-v").out
    assert contents(folder) == before


def test_inspect_json(cli: Cli) -> None:
    data = json.loads(cli("inspect", "net.onnx", "--json", "--input-shape", f"{INPUT}:1,3,6,6").out)
    assert data["parameters"] == 12 * 27 + 12 + 2 * 12 * 16 + 60
    assert data["macs"] == 36 * (12 * 27 + 2 * 12 * 16) + 60
    inner = next(group for group in data["groups"] if group["name"] == "inner.weight[0]")
    assert inner["parameters"] == 2 * 12 * 16
    assert inner["macs"] == 36 * 2 * 12 * 16
    assert inner["frozen"] is None
    members = [(m["tensor"], m["axis"], m["role"], m["weight"]) for m in inner["members"]]
    assert members == [
        ("inner.weight", 0, "pass-through", True),
        ("inner", 1, "activation", False),
        ("inner_tanh", 1, "activation", False),
        ("back.weight", 1, "contracted", True),
    ]


def test_why(cli: Cli) -> None:
    result = cli("inspect", "net.onnx", "--why", "stem.weight", "head.weight[1]")
    assert result.code == 0, result.err
    assert result.out.startswith(
        "stem.weight and head.weight[1] go together, in group stem.weight[0] of 12 (free)\n"
    )
    assert [line.split()[0] for line in result.out.splitlines()[2::2]] == [
        "Conv", "Relu", "Add", "GlobalAveragePool", "Flatten", "Gemm",
    ]  # fmt: skip
    chain = json.loads(cli("inspect", "net.onnx", "--why", "stem.weight", "head.weight", "--json").out)
    assert chain["tied"]
    assert chain["chain"][-1]["tensor"] == "head.weight"


def test_why_not(cli: Cli) -> None:
    result = cli("inspect", "net.onnx", "--why", "stem.bias", "inner.weight[0]")
    assert result.code == 0
    assert result.out.splitlines() == [
        "stem.bias and inner.weight[0] are not tied",
        "  stem.bias[0] is in group stem.weight[0] of 12 (free)",
        "  inner.weight[0] is in group inner.weight[0] of 16 (free)",
    ]


def test_bad_input_as_a_process(folder: Path) -> None:
    before = contents(folder)
    (folder / "bad.onnx").write_bytes(network().SerializeToString()[:900])
    done = process("bad.onnx", "--channels", "0.5", "-q", cwd=folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"graphprune: error: [^\n]+\n", done.stderr), done.stderr
    assert contents(folder) == {**before, "bad.onnx": (folder / "bad.onnx").read_bytes()}


def test_a_reader_who_leaves(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    root = str(Path(graphprune.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "graphprune", "inspect", "net.onnx", "--json", "-q"],
        cwd=folder, env={**os.environ, "PYTHONPATH": root}, stdout=write, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_and_mistakes_import_nothing_heavy() -> None:
    code = """
import sys
from graphprune.cli import main
for arguments in (["--help"], ["inspect", "--help"], ["--version"], ["model.onnx"], ["model.onnx", "--oops"]):
    try:
        assert main(arguments) == 2
    except SystemExit:
        pass
heavy = {"numpy", "onnx", "onnx_ir", "onnxruntime", "scipy", "networkx", "rich"} & sys.modules.keys()
assert not heavy, heavy
"""
    root = Path(graphprune.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--channels RATIO" in done.stdout
    assert "--why A B" in done.stdout
    assert f"graphprune {graphprune.__version__}\n" in done.stdout
