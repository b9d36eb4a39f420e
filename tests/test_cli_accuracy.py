"""The command line on calibration inputs: budgets, scores, repair, and bad inputs that leave nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from graphprune.depth import Criterion
from graphprune.passes.prune_channels import PruneChannelsPass
from tests.command import Cli, Result

MODELS = Path(__file__).resolve().parent.parent / "models"
SAMPLES = 96


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(MODELS / "digits.onnx", tmp_path / "net.onnx")
    with np.load(MODELS / "digits_calibration.npz") as data:
        images, labels = data["image"][:SAMPLES], data["labels"][:SAMPLES]
    np.savez(tmp_path / "calib.npz", image=images, labels=labels)
    return tmp_path


def report_of(result: Result) -> dict[str, Any]:
    assert result.code == 0, result
    report: dict[str, Any] = json.loads(result.out)
    return report


def kept(report: dict[str, Any], what: str) -> float:
    return float(report[what]["after"] / report[what]["before"])


def correct(path: Path) -> int:
    with np.load(MODELS / "digits_test.npz") as data:
        images, labels = data["image"].astype(np.float32) / 16, data["label"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return int((session.run(None, {"image": images})[0].argmax(axis=1) == labels).sum())


@pytest.mark.parametrize("kind", ["macs", "params", "energy"])
@pytest.mark.parametrize("scope", ["local", "global", "isomorphic", "allocated"])
def test_budgets_hold(cli: Cli, folder: Path, kind: str, scope: str) -> None:
    report = report_of(cli("net.onnx", f"--{kind}", "0.6", "--scope", scope, "--json", "-q"))
    if kind == "energy":  # a model of its own; less work in any case
        assert kept(report, "macs") < 0.9
        return
    share = kept(report, {"macs": "macs", "params": "parameters"}[kind])
    assert 0.4 < share <= 0.6 + 1e-9


@pytest.mark.parametrize("repaired", [False, True])
def test_size_is_the_file_at_most(cli: Cli, folder: Path, repaired: bool) -> None:
    """Biases that a repair adds count."""
    inputs = ["--calib", "calib.npz", "--scope", "local", "--score", "l2"] if repaired else []
    report_of(cli("net.onnx", "--size", "150kB", *inputs, "--json", "-q"))
    assert 100_000 < (folder / "net.pruned.onnx").stat().st_size <= 150_000


def test_repair_is_on_with_inputs_and_can_be_turned_off(cli: Cli, folder: Path) -> None:
    base = ("net.onnx", "--channels", ".3", "--score", "l2", "--calib", "calib.npz", "--json", "-q")
    with_it = report_of(cli(*base, "-o", "a.onnx"))
    without = report_of(cli(*base, "--no-repair", "-o", "b.onnx"))
    assert with_it["repaired"]["refitted"]
    assert without["repaired"] is None
    assert with_it["macs"] == without["macs"]
    assert correct(folder / "a.onnx") > 300 > correct(folder / "b.onnx")


def test_what_is_repaired_is_the_cut_that_was_verified(cli: Cli, folder: Path) -> None:
    """The same plan with and without repair: same tensors, other contents, and those of weights and biases only."""
    base = ("net.onnx", "--channels", ".3", "--score", "l2", "--calib", "calib.npz", "-q")
    assert cli(*base, "-o", "a.onnx").code == 0
    assert cli(*base, "--no-repair", "-o", "b.onnx").code == 0
    repaired, plain = (onnx.load(folder / name) for name in ("a.onnx", "b.onnx"))
    assert [n.op_type for n in repaired.graph.node] == [n.op_type for n in plain.graph.node]
    shapes = [{i.name: tuple(i.dims) for i in m.graph.initializer} for m in (plain, repaired)]
    assert {name: shapes[1].get(name) for name in shapes[0]} == shapes[0]
    assert all(name.endswith(("bias", "_bias")) for name in shapes[1].keys() - shapes[0].keys())


def test_sensitivity_is_printed_and_saved(cli: Cli, folder: Path) -> None:
    result = cli("net.onnx", "--macs", ".7", "--calib", "calib.npz", "--sensitivity", "curves.json")
    assert result.code == 0, result
    assert "error at the fraction kept" in result.out
    curves = json.loads((folder / "curves.json").read_text())
    assert curves["graphprune_sensitivity"] == 1
    for curve in curves["groups"]:
        assert curve["kept"][0] == 1
        assert curve["errors"][0] == 0
        assert curve["errors"] == sorted(curve["errors"])
        assert curve["measured"]


def test_max_drop(cli: Cli, folder: Path) -> None:
    report = report_of(cli("net.onnx", "--max-drop", ".1", "--calib", "calib.npz", "--json", "-q"))
    assert kept(report, "macs") < 0.9
    (note,) = [note for note in report["notes"] if note.startswith("metric:")]
    after, before = (float(number) for number in re.findall(r"[\d.]+(?= after| before)", note))
    assert before - after <= 0.1
    assert correct(folder / "net.pruned.onnx") > 280


def test_dead_alone_changes_nothing_but_the_size(cli: Cli, folder: Path) -> None:
    model = onnx.load(folder / "net.onnx")
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    scale = next(n for n in model.graph.node if n.op_type == "BatchNormalization").input
    for name in scale[1:3]:
        array = onnx.numpy_helper.to_array(by_name[name]).copy()
        array[:3] = 0
        by_name[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, folder / "masked.onnx")
    report = report_of(cli("masked.onnx", "--dead", "--json", "-q"))
    assert any(note.startswith("dead:") for note in report["notes"])
    assert correct(folder / "masked.pruned.onnx") == correct(folder / "masked.onnx")


def test_blocks_alone(cli: Cli, folder: Path) -> None:
    report = report_of(cli("net.onnx", "--blocks", "1", "--calib", "calib.npz", "--json", "-q"))
    assert kept(report, "macs") < 1
    assert any(note.startswith("block ") for note in report["notes"])
    assert correct(folder / "net.pruned.onnx") > 250


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_is_of_the_model_that_was_given(cli: Cli, kind: str) -> None:
    """Whatever goes before: a block is a quarter of this network."""
    name = {"macs": "macs", "params": "parameters"}[kind]
    options = ("--blocks", "1", "--calib", "calib.npz", "--no-repair", "--json", "-q")
    alone = kept(report_of(cli("net.onnx", *options)), name)
    assert alone < 0.9
    assert 0.5 * 0.93 < kept(report_of(cli("net.onnx", f"--{kind}", "0.5", *options)), name) <= 0.5
    assert kept(report_of(cli("net.onnx", f"--{kind}", "0.95", *options)), name) == alone


@pytest.mark.parametrize("by", get_args(Criterion))
def test_blocks_by_each_measure(cli: Cli, by: str) -> None:
    report = report_of(
        cli("net.onnx", "--blocks", "1", "--blocks-by", by, "--calib", "calib.npz", "--json", "-q")
    )
    (note,) = (note for note in report["notes"] if "is gone" in note)
    assert "block /block3/Add is gone: " in note


def test_the_pass_repairs_in_place(folder: Path) -> None:
    model = ir.load(folder / "net.onnx")
    with np.load(folder / "calib.npz") as data:
        step = PruneChannelsPass(0.3, score="l2", calibration={"image": data["image"]})
    assert step(model).modified
    assert step.report is not None
    assert step.report.repaired is not None
    ir.save(model, folder / "small.onnx")
    assert correct(folder / "small.onnx") > 300


# -- bad input ------------------------------------------------------------------------------------------------------


def refused(cli: Cli, folder: Path, *arguments: object, says: str, code: int = 2) -> None:
    """One line on stderr, nothing on stdout, nothing written."""
    before = sorted(path.name for path in folder.iterdir())
    result = cli(*arguments, "-q")
    assert result.code == code, result
    assert result.out == ""
    assert re.fullmatch(r"graphprune: error: [^\n]+\n", result.err), result.err
    assert re.search(says, result.err), result.err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_budget_below_what_can_be_reached_says_what_can(cli: Cli, folder: Path) -> None:
    for options in (["--macs", ".001"], ["--macs", ".001", "--calib", "calib.npz"], ["--size", "3kB"]):
        refused(cli, folder, "net.onnx", *options, says=r"cannot be reached: .* leaves [\d,.]+", code=1)


def test_a_drop_that_no_cut_keeps(cli: Cli, folder: Path) -> None:
    (folder / "strict.py").write_text(
        "def judge(outputs, reference, labels):\n    return float(outputs is reference)\n"
    )
    refused(
        cli,
        folder,
        *("net.onnx", "--max-drop", "0", "--metric", "strict.py:judge", "--calib", "calib.npz"),
        says="no cut keeps",
        code=1,
    )


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ValueError('no such thing')", "no such thing"),
        ("return 'fine'", "fine|number"),
        ("return None", "None"),
    ],
)
def test_a_metric_that_fails(cli: Cli, folder: Path, body: str, says: str) -> None:
    (folder / "mine.py").write_text(f"def judge(outputs, reference, labels):\n    {body}\n")
    refused(
        cli,
        folder,
        *("net.onnx", "--max-drop", ".1", "--metric", "mine.py:judge", "--calib", "calib.npz"),
        says=says,
    )


GOOD = np.zeros((16, 1, 8, 8), dtype=np.float32)
BAD_INPUTS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "names": ({"picture": GOOD, "other": GOOD}, "image"),
    "rank": ({"image": GOOD[:, 0]}, "rank|shape"),
    "size": ({"image": GOOD[..., :7]}, "8"),
    "type": ({"image": GOOD.astype(np.float64)}, "float32"),
    "nan": ({"image": np.full_like(GOOD, np.nan)}, "holds nan at"),
    "too few": ({"image": GOOD[:3]}, "few|least"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_calibration_inputs(cli: Cli, folder: Path, name: str) -> None:
    arrays, says = BAD_INPUTS[name]
    np.savez(folder / "bad.npz", **arrays)  # type: ignore[arg-type]
    refused(cli, folder, "net.onnx", "--channels", ".3", "--calib", "bad.npz", says=says)


BAD_OPTIONS = {
    "two budgets": (["--macs", ".5", "--params", ".5"], "exclude each other"),
    "a budget and a ratio": (["--macs", ".5", "--channels", ".5"], "exclude each other"),
    "a budget above all": (["--macs", "1.5"], "at most 1"),
    "no budget": (["--macs", "0"], "positive"),
    "allocated ratio": (["--channels", ".5", "--scope", "allocated"], "budget"),
    "unknown scope": (["--macs", ".5", "--scope", "cosmic"], "unknown scope 'cosmic'"),
    "floor": (["--macs", ".5", "--keep-at-least", "2"], "0 to 1"),
    "size in words": (["--size", "small"], "small"),
    "blocks below zero": (["--blocks", "-1"], "blocks"),
    "too many blocks": (["--blocks", "99"], "99"),
    "a metric alone": (["--macs", ".5", "--metric", "top1"], "--max-drop"),
    "a drop without inputs": (["--max-drop", ".1"], "--calib"),
    "unknown metric": (
        ["--max-drop", ".1", "--calib", "calib.npz", "--metric", "luck"],
        "unknown metric 'luck'",
    ),
    "a score without inputs": (["--channels", ".5", "--score", "wanda"], "--calib"),
    "jobs": (["--max-drop", ".1", "--calib", "calib.npz", "--jobs", "0"], "jobs"),
    "preprocess": (["--channels", ".5", "--calib", "calib.npz", "--preprocess", "mean=x"], "mean"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(cli: Cli, folder: Path, name: str) -> None:
    options, says = BAD_OPTIONS[name]
    refused(cli, folder, "net.onnx", *options, says=says)
