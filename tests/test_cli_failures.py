"""The command line on bad input and bad luck: exit codes, one line, and nothing is written but what was verified."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune import rules
from graphprune.rules import registry
from graphprune.verification import pruned
from tests.command import INPUT, Cli, contents, network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(network(), str(tmp_path / "net.onnx"))
    return tmp_path


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

    monkeypatch.setattr(pruned, "verify", stop)
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

    monkeypatch.setattr(pruned, "verify", fail)
    before = contents(folder)
    result = cli("net.onnx", "--channels", "0.5")
    assert result.code == 70
    assert "Traceback" in result.err
    assert result.err.endswith("graphprune: error: internal error, please report it with the lines above: "
                               "ZeroDivisionError('a bug')\n")  # fmt: skip
    assert contents(folder) == before
