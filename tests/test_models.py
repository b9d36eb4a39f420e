"""The shipped networks: what models/README.md says of them, and that pruning them works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

import graphprune

MODELS = Path(__file__).resolve().parent.parent / "models"
# Correct of the 360 held-out images, as models/README.md states.
CORRECT = {"digits": 353, "digits_transformer": 344}

names = pytest.mark.parametrize("name", CORRECT)


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Images (360, 1, 8, 8) float32 in 0..1 and labels (360,)."""
    with np.load(MODELS / "digits_test.npz") as data:
        return data["image"].astype(np.float32) / 16, data["label"]


def logits(model: bytes, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (result,) = session.run(["logits"], {"image": images})
    return np.asarray(result)


def serialised(model: object) -> bytes:
    """The bytes of an onnx_ir.Model, which is what `prune` returns for a path."""
    assert isinstance(model, onnx_ir.Model)
    return bytes(onnx_ir.to_proto(model).SerializeToString())


@names
def test_file_is_valid_small_and_whole(name: str) -> None:
    path = MODELS / f"{name}.onnx"
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert path.stat().st_size < 300_000
    assert all(opset.version >= 18 for opset in model.opset_import)
    assert all(weight.data_location != onnx.TensorProto.EXTERNAL for weight in model.graph.initializer)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_batch_normalization_is_kept() -> None:
    ops = [node.op_type for node in onnx.load(MODELS / "digits.onnx").graph.node]
    assert ops.count("BatchNormalization") == 10


def test_no_traces_of_the_exporting_machine() -> None:
    for name in CORRECT:
        content = (MODELS / f"{name}.onnx").read_bytes()
        assert b".py" not in content.replace(b"models/train_digits.py", b"")


@names
def test_accuracy_is_what_the_readme_states(name: str) -> None:
    images, labels = held_out()
    right = logits((MODELS / f"{name}.onnx").read_bytes(), images).argmax(1) == labels
    # Another build of the runtime rounds otherwise: one image may lie on the border.
    assert abs(int(right.sum()) - CORRECT[name]) <= 1
    readme = (MODELS / "README.md").read_text()
    assert f"{CORRECT[name]} of 360" in readme


def test_held_out_images_are_scikit_learns_last() -> None:
    from sklearn.datasets import load_digits

    images, labels = held_out()
    bunch = load_digits()
    np.testing.assert_array_equal(images[:, 0] * 16, bunch.images[-360:])
    np.testing.assert_array_equal(labels, bunch.target[-360:])


@names
@pytest.mark.parametrize("residual", [False, True])
def test_pruned_network_is_verified_smaller_and_runs_at_any_batch(name: str, residual: bool) -> None:
    path = MODELS / f"{name}.onnx"
    before = path.read_bytes()
    pruned, report = graphprune.prune(path, channels=0.3, residual=residual, verify=True)
    assert path.read_bytes() == before
    assert report.max_error is not None
    assert report.max_error <= 1e-4
    assert report.parameters_after < report.parameters_before
    assert report.macs_after < report.macs_before

    content = serialised(pruned)
    onnx.checker.check_model(onnx.ModelProto.FromString(content), full_check=True)
    images, _ = held_out()
    for batch in (1, 7):
        assert logits(content, images[:batch]).shape == (batch, 10)


@names
def test_light_pruning_keeps_most_of_the_accuracy(name: str) -> None:
    """A choice by weights beats chance by far: what is removed is what matters least."""
    images, labels = held_out()
    pruned, _ = graphprune.prune(MODELS / f"{name}.onnx", channels=0.1, round_to=1)
    right = logits(serialised(pruned), images).argmax(1) == labels
    assert right.mean() > 0.8


@names
def test_half_the_arithmetic_is_gone_and_repair_keeps_the_accuracy(name: str) -> None:
    """Without labels and without training; the floors are two points below what was measured."""
    images, labels = held_out()
    pruned, report = graphprune.prune(
        MODELS / f"{name}.onnx",
        macs=0.5,
        residual=name == "digits_transformer",
        calibration=MODELS / "digits_calibration.npz",
    )
    assert report.macs_after <= 0.5 * report.macs_before
    assert report.repaired is not None
    for each in report.repaired.refitted:
        assert each.before is not None
        assert each.after is not None
        assert each.after <= each.before + 1e-9
    correct = int((logits(serialised(pruned), images).argmax(axis=1) == labels).sum())
    assert correct >= CORRECT[name] - 7
