"""The command line: options, exit codes, bad input, and that nothing is written but what was verified."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphprune
from graphprune import rules, verify
from graphprune.cli import main
from graphprune.rules import registry

INPUT = "pixels:0"  # names may hold colons


class Result(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


def network(name: str = "net", *, batch: int | str = "batch", normalise: bool = False) -> onnx.ModelProto:
    """Two convolutions, a residual block, a classifier; random weights."""
    generator = np.random.default_rng(7)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32) / 3, name)

    nodes = [
        helper.make_node(
            "Conv", [INPUT, "stem.weight", "stem.bias"], ["stem"], "stem_conv", pads=[1, 1, 1, 1]
        ),
        helper.make_node("Relu", ["stem"], ["stem_relu"], "stem_relu"),
        helper.make_node("Conv", ["stem_relu", "inner.weight"], ["inner"], "inner_conv"),
        helper.make_node("Tanh", ["inner"], ["inner_tanh"], "inner_tanh"),
        helper.make_node("Conv", ["inner_tanh", "back.weight"], ["back"], "back_conv"),
        helper.make_node("Add", ["stem_relu", "back"], ["sum"], "join"),
        helper.make_node("GlobalAveragePool", ["sum"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
    ]
    last = "flat"
    weights = [
        weight("stem.weight", 12, 3, 3, 3),
        weight("stem.bias", 12),
        weight("inner.weight", 16, 12, 1, 1),
        weight("back.weight", 12, 16, 1, 1),
        weight("head.weight", 5, 12),
    ]
    if normalise:
        nodes.append(helper.make_node("LayerNormalization", [last, "norm.weight"], ["normed"], "norm"))
        weights.append(weight("norm.weight", 12))
        last = "normed"
    nodes.append(helper.make_node("Gemm", [last, "head.weight"], ["scores"], "head_gemm", transB=1))
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [batch, 3, 6, 6])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 5])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(network(), str(tmp_path / "net.onnx"))
    return tmp_path


@pytest.fixture
def cli(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in ``folder``, in this process."""
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return Result(code, *capfd.readouterr())

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def process(*arguments: object, cwd: Path, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    root = str(Path(graphprune.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-m", "graphprune", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **keywords,
    )


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in onnx.load(str(path)).graph.initializer}


# -- pruning ----------------------------------------------------------------------------------------------------


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

    monkeypatch.setattr(verify, "verify", refuse)
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


# -- failing ----------------------------------------------------------------------------------------------------


def refused(cli: Cli, folder: Path, *arguments: object, says: str, code: int = 2) -> str:
    """One line on stderr, nothing on stdout, no traceback, nothing written."""
    before = contents(folder)
    result = cli(*arguments)
    assert result.code == code, result
    assert result.out == ""
    assert re.fullmatch(r"graphprune: error: [^\n]+\n", result.err), result.err
    assert re.search(says, result.err), result.err
    assert contents(folder) == before
    return result.err


BAD_OPTIONS = {
    "nothing asked for": (["net.onnx"], r"--channels RATIO .*--channels-for GLOB=RATIO.*--plan FILE"),
    "no model": ([], r"required: MODEL"),
    "ratio of one": (["net.onnx", "--channels", "1"], r"ratio for channels is 1\.0; .*at least 0, below 1"),
    "negative ratio": (["net.onnx", "--channels=-0.1"], r"ratio for channels is -0\.1"),
    "ratio nan": (["net.onnx", "--channels", "nan"], r"ratio for channels is nan"),
    "ratio no number": (["net.onnx", "--channels", "third"], r"--channels: invalid float value: 'third'"),
    "ratio of a glob": (["net.onnx", "--channels-for", "inner*=2"], r"ratio for inner\* is 2\.0"),
    "glob without ratio": (["net.onnx", "--channels-for", "inner"], r"'inner' is not of the form GLOB=RATIO"),
    "include nothing": (
        ["net.onnx", "--channels", ".5", "--include", "outer*"],
        r"glob 'outer\*' matches no",
    ),
    "exclude nothing": (
        ["net.onnx", "--channels", ".5", "--exclude", "outer*"],
        r"glob 'outer\*' matches no",
    ),
    "channels for nothing": (["net.onnx", "--channels-for", "outer*=.5"], r"glob 'outer\*' matches no"),
    "exclude everything": (
        ["net.onnx", "--channels", ".5", "--exclude", "*"],
        r"none of the 4 groups may be cut",
    ),
    "round to zero": (["net.onnx", "--channels", ".5", "--round-to", "0"], r"round_to is 0; give a positive"),
    "unknown score": (
        ["net.onnx", "--channels", ".5", "--score", "l7"],
        r"unknown score 'l7'; there are l1, l2",
    ),
    "negative seed": (["net.onnx", "--channels", ".5", "--seed", "-1"], r"--seed: '-1' is no non-negative"),
    "unknown option": (["net.onnx", "--chanels", ".5"], r"unrecognized arguments: --chanels .*--help"),
    "shape of no input": (["net.onnx", "--channels", ".5", "--input-shape", "x:1,3,6,6"], r"no such input"),
    "shape without name": (
        ["net.onnx", "--channels", ".5", "--input-shape", "1,3,6,6"],
        r"form NAME:1,3,224,224",
    ),
    "shape of another rank": (["net.onnx", "--channels", ".5", "--input-shape", f"{INPUT}:1,3"], r"rank 2"),
    "shape against the model": (
        ["net.onnx", "--channels", ".5", "--input-shape", f"{INPUT}:1,4,6,6"],
        r"pixels:0",
    ),
    "shape given twice": (
        ["net.onnx", "--channels", ".5", *(["--input-shape", f"{INPUT}:1,3,6,6"] * 2)],
        r"gives 'pixels:0' twice",
    ),
    "output is the input": (["net.onnx", "--channels", ".5", "-o", "./net.onnx"], r"the input itself"),
    "output is a folder": (["net.onnx", "--channels", ".5", "-o", "."], r"a folder"),
    "output in no folder": (
        ["net.onnx", "--channels", ".5", "-o", "no/a.onnx"],
        r"folder 'no' .* does not exist",
    ),
    "plan over the input": (["net.onnx", "--channels", ".5", "--plan-out", "net.onnx"], r"the input itself"),
    "plan over the output": (
        ["net.onnx", "--channels", ".5", "-o", "a", "--plan-out", "a"],
        r"both be written",
    ),
    "plan in no folder": (["net.onnx", "--channels", ".5", "--plan-out", "no/p.json"], r"folder 'no'"),
    "plan that is missing": (["net.onnx", "--plan", "p.json"], r"cannot read the plan 'p\.json'"),
    "plan that is a model": (["net.onnx", "--plan", "net.onnx"], r"net\.onnx"),
    "plan and a ratio": (["net.onnx", "--plan", "p.json", "--channels", ".5"], r"--plan says what goes"),
    "calibration missing": (
        ["net.onnx", "--channels", ".5", "--calib", "c.npz"],
        r"--calib 'c\.npz'.*numpy\.savez",
    ),
    "calibration no npz": (["net.onnx", "--channels", ".5", "--calib", "net.onnx"], r"no \.npz file"),
    "why of an unknown name": (
        ["inspect", "net.onnx", "--why", "stem.weigt", "inner"],
        r"did you mean 'stem\.weight'",
    ),
    "why of an unknown axis": (["inspect", "net.onnx", "--why", "inner[4]", "inner"], r"'inner' has 4 axes"),
    "why of one": (
        ["inspect", "net.onnx", "--why", "inner"],
        r"--why: expected 2 arguments .*inspect --help",
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(cli: Cli, folder: Path, case: str) -> None:
    arguments, says = BAD_OPTIONS[case]
    refused(cli, folder, *arguments, says=says)


def _external(location: str) -> onnx.ModelProto:
    model = network()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    return model


def _unknown_type() -> onnx.ModelProto:
    model = network()
    model.graph.initializer[0].data_type = 99
    return model


def _invalid_graph() -> onnx.ModelProto:
    model = network()
    model.graph.node[1].input[0] = "nobody makes this"
    return model


def _frozen() -> onnx.ModelProto:
    """Both axes of the only weight are visible from outside."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "frozen",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 6])],
        [numpy_helper.from_array(np.ones((4, 6), dtype=np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


BAD_MODELS: dict[str, tuple[Callable[[], bytes], str]] = {
    "not ONNX": (lambda: b"# a text file\n" * 40, r"bad\.onnx"),
    "empty": (lambda: b"", r"empty"),
    "a PyTorch checkpoint": (lambda: b"PK\x03\x04" + bytes(60), r"zip archive"),
    "truncated": (lambda: network().SerializeToString()[:-300], r"bad\.onnx"),
    "invalid graph": (lambda: _invalid_graph().SerializeToString(), r"nobody makes this"),
    "missing external data": (lambda: _external("gone.bin").SerializeToString(), r"gone\.bin"),
    "path traversal": (lambda: _external("../secret.bin").SerializeToString(), r"secret\.bin"),
    "absolute external path": (lambda: _external("/etc/passwd").SerializeToString(), r"/etc/passwd"),
    "unknown element type": (lambda: _unknown_type().SerializeToString(), r"stem\.weight"),
    "no free group": (lambda: _frozen().SerializeToString(), r"none of the 2 groups may be cut"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(cli: Cli, folder: Path, case: str) -> None:
    make, says = BAD_MODELS[case]
    inner = folder / "models"
    inner.mkdir()
    (inner / "bad.onnx").write_bytes(make())
    (folder / "secret.bin").write_bytes(bytes(4096))
    refused(cli, folder, "models/bad.onnx", "--channels", "0.5", says=says)
    if case != "no free group":
        refused(cli, folder, "inspect", "models/bad.onnx", says=says)


def test_missing_models(cli: Cli, folder: Path) -> None:
    refused(cli, folder, "gone.onnx", "--channels", "0.5", says=r"gone\.onnx: no such file")
    refused(cli, folder, ".", "--channels", "0.5", says=r"a folder")
    refused(cli, folder, "inspect", ".", says=r"a directory")


def test_a_plan_for_another_model(cli: Cli, folder: Path) -> None:
    onnx.save(network(normalise=True), str(folder / "norm.onnx"))
    assert cli("net.onnx", "--channels", "0.5", "-o", "a.onnx", "--plan-out", "plan.json").code == 0
    plan = json.loads((folder / "plan.json").read_text())
    plan["groups"][0]["size"] = 99
    (folder / "bad.json").write_text(json.dumps(plan))
    refused(cli, folder, "net.onnx", "--plan", "bad.json", says=r"of 99; in this model it has 12")
    plan["groups"][0] = {"name": "other[0]", "size": 3, "removed": [1]}
    (folder / "bad.json").write_text(json.dumps(plan))
    refused(
        cli, folder, "net.onnx", "--plan", "bad.json", says=r"'other\[0\]', which the model does not have"
    )
    (folder / "bad.json").write_text('{"graphprune_plan": 99, "groups": []}')
    refused(cli, folder, "net.onnx", "--plan", "bad.json", says=r"format 99")


def test_calibration_for_another_model(cli: Cli, folder: Path) -> None:
    wrong = np.ones((4, 3, 6, 6), dtype=np.float32)
    np.savez(folder / "calib.npz", other=wrong, another=wrong)
    refused(cli, folder, "net.onnx", "--channels", "0.5", "--calib", "calib.npz", says=r"pixels:0")


@pytest.fixture
def wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax over channels taken for an elementwise op: what is pruned by it differs from the masked original."""
    assert rules.registered()
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    registry.register("Softmax", "n c S* -> n c S*")


def test_failed_verification(cli: Cli, folder: Path, wrong_rule: None) -> None:
    model = network()
    model.graph.node[3].op_type = "Softmax"
    model.graph.node[3].attribute.append(helper.make_attribute("axis", 1))
    onnx.save(model, str(folder / "wrong.onnx"))
    before = contents(folder)
    line = refused(
        cli, folder, "wrong.onnx", "--channels", "0.5", "--plan-out", "p.json", says=r"inner_tanh", code=1
    )
    assert "inner.weight[0]" in line
    assert contents(folder) == before
    assert cli("wrong.onnx", "--channels", "0.5", "--no-verify").code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    during: list[str] = []

    def stop(*_: object, **__: object) -> None:
        during.extend(contents(folder))
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did not arrive")

    monkeypatch.setattr(verify, "verify", stop)
    # Jobs in the background start with SIGINT ignored, and Python then installs no handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        options = ("--channels", "0.5", "--plan-out", "p.json")
        refused(cli, folder, "net.onnx", *options, says="nothing was written", code=code)
    finally:
        signal.signal(signal.SIGINT, before)
    assert any(".tmp" in name for name in during), "nothing was staged: the test proves nothing"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Renaming the result into place fails."""
    tried: list[Path] = []
    replace = Path.replace

    def fail(self: Path, target: str | Path) -> Path:
        if Path(target).name == "net.pruned.onnx":
            tried.append(Path(target))
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        yield tried


def test_a_full_disk(cli: Cli, folder: Path, full_disk: list[Path]) -> None:
    (folder / "net.pruned.onnx").write_bytes(b"older")
    refused(
        cli, folder, "net.onnx", "--channels", "0.5", "--plan-out", "p.json", says="No space left on device"
    )
    assert [path.name for path in full_disk] == ["net.pruned.onnx"]


def test_a_bug_is_not_bad_input(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(verify, "verify", fail)
    before = contents(folder)
    result = cli("net.onnx", "--channels", "0.5")
    assert result.code == 70
    assert "Traceback" in result.err
    assert result.err.endswith("graphprune: error: internal error, please report it with the lines above: "
                               "ZeroDivisionError('a bug')\n")  # fmt: skip
    assert contents(folder) == before


# -- processes --------------------------------------------------------------------------------------------------


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
