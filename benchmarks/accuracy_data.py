"""The networks of accuracy.py, what they are calibrated on, and how good a pruned one is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
Shapes = dict[str, tuple[int, ...]]

#: Unlabelled inputs that every method is given.
SAMPLES = 512
#: Tokens of a calibration sentence.
TOKENS = 16
#: Of ImageNet, as the checkpoints were trained with.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Task:
    """A network and what it is judged on.

    Attributes
    ----------
    name
        Of the network; the file is ``source``.
    calibration
        Inputs by name, samples along axis 0. Nothing that is judged on is in it.
    input_shapes
        At which MACs are counted: one sample.
    samples
        How many inputs the accuracy is over.
    metric
        What ``accuracy`` gives, in words.
    accuracy
        The metric of a model file; between 0 and 1, higher is better.
    """

    name: str
    source: Path
    calibration: Feeds
    input_shapes: Shapes
    samples: int
    metric: str
    accuracy: Callable[[Path], float]


def session(path: Path, threads: int) -> Any:
    """The model in ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Of a pair that is timed in turn one would run beside the other's spinning threads.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs(path: Path, threads: int, name: str, inputs: Array, batch: int) -> Iterator[Array]:
    """The first output for each batch of the one input."""
    runtime = session(path, threads)
    for start in range(0, len(inputs), batch):
        yield runtime.run(None, {name: inputs[start : start + batch]})[0]


# ------------------------------------------------------------------------------------------------------ CIFAR-10
def _normalised(images: Array) -> Array:
    """uint8 N x 32 x 32 x 3 -> float32 N x 3 x 32 x 32."""
    scaled = (images / np.float32(255) - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


def cifar(name: str, folder: Path, samples: int | None, threads: int, seed: int) -> Task:
    """A CIFAR-10 ResNet: top-1 on the test images, calibrated on training images without their labels."""
    with np.load(folder / "cifar10_train.npz") as archive:
        training = archive["x"]
    with np.load(folder / "cifar10_test.npz") as archive:
        images, labels = _normalised(archive["x"][:samples]), archive["y"][:samples]
    chosen = np.random.default_rng(seed).choice(len(training), SAMPLES, replace=False)

    def accuracy(path: Path) -> float:
        found = [a.argmax(1) for a in outputs(path, threads, "input", images, 250)]
        return float((np.concatenate(found) == labels).mean())

    calibration = {"input": _normalised(training[chosen])}
    shapes: Shapes = {"input": (1, 3, 32, 32)}
    source = folder / f"{name}.onnx"
    return Task(name, source, calibration, shapes, len(images), "top-1 on CIFAR-10", accuracy)


# --------------------------------------------------------------------------------------------------------- STS-B
def sentences(name: str, folder: Path, samples: int | None, threads: int, seed: int) -> Task:
    """MiniLM-L6: Spearman's correlation of the cosine similarity of mean-pooled states with the human scores.

    Calibration sentences are those of the development set that are not in the test set, cut to their first 15 tokens
    and the closing one; shorter ones are left out, so that no padding gets into the statistics.
    """
    from scipy.stats import spearmanr

    with np.load(folder / f"{name}.npz") as archive:
        dev, test, scores = archive["dev"], archive["test"], archive["scores"]
    test, scores = test[: 2 * samples if samples else None], scores[:samples]
    judged = {row.tobytes() for row in test}
    unique = np.unique(dev[(dev > 0).sum(1) >= TOKENS], axis=0)
    unique = unique[[row.tobytes() not in judged for row in unique]]
    if len(unique) < SAMPLES:
        raise ValueError(f"{len(unique)} sentences of {TOKENS} tokens, {SAMPLES} needed")
    chosen = unique[np.random.default_rng(seed).choice(len(unique), SAMPLES, replace=False)]
    closing = chosen[np.arange(SAMPLES), (chosen > 0).sum(1) - 1]
    tokens = np.concatenate([chosen[:, : TOKENS - 1], closing[:, None]], 1)
    order = np.argsort((test > 0).sum(1), kind="stable")

    def accuracy(path: Path) -> float:
        runtime = session(path, threads)
        embedded = np.zeros((len(test), 384))
        for start in range(0, len(test), 64):
            rows = order[start : start + 64]
            ids = test[rows][:, : (test[rows] > 0).sum(1).max()]
            mask = (ids > 0).astype(np.int64)
            (states,) = runtime.run(None, {"input_ids": ids, "attention_mask": mask})
            embedded[rows] = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        embedded /= np.linalg.norm(embedded, axis=1, keepdims=True)
        similarity = (embedded[0::2] * embedded[1::2]).sum(1)
        return float(spearmanr(similarity, scores).statistic)

    calibration = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    shapes: Shapes = {"input_ids": (1, TOKENS), "attention_mask": (1, TOKENS)}
    source = folder / f"{name}.onnx"
    return Task(name, source, calibration, shapes, len(scores), "Spearman on STS-B", accuracy)


# -------------------------------------------------------------------------------------------------------- PP-OCR
def _pictures(images: Array, widths: Array) -> Array:
    """uint8 N x 48 x W x 3 -> float32 N x 3 x 48 x W in -1 ... 1, and 0 right of the text, as RapidOCR does it."""
    scaled = images.transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1)
    inside = np.arange(images.shape[2]) < widths[:, None]
    return np.ascontiguousarray(scaled * inside[:, None, None, :], np.float32)


def _collapsed(path: list[int], characters: list[str]) -> str:
    """Greedy CTC: repeats made one, blanks (number 0) dropped."""
    kept = [k for k, before in zip(path, [0, *path], strict=False) if k and k != before]
    return "".join(characters[k - 1] for k in kept)


def ppocr(name: str, folder: Path, samples: int | None, threads: int, seed: int) -> Task:
    """A PP-OCR network on rendered words: share of directions, or of whole words, that are right."""
    with np.load(folder / f"{name}.npz") as archive:
        calibration = _pictures(archive["calibration"], archive["calibration_widths"])
        images = _pictures(archive["images"][:samples], archive["widths"][:samples])
        labels = archive["labels"][:samples]
    source = folder / f"{name}.onnx"
    model = onnx.load(source)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    characters = [*metadata.get("character", "").splitlines(), " "]
    order = np.random.default_rng(seed).permutation(len(calibration))[:SAMPLES]

    def accuracy(path: Path) -> float:
        right = 0
        for i, found in enumerate(outputs(path, threads, "x", images, 50)):
            truth = labels[50 * i : 50 * i + len(found)]
            if name == "ppocr_direction":
                right += int((found.argmax(1) == truth).sum())
            else:
                texts = [_collapsed(row.argmax(1).tolist(), characters) for row in found]
                right += sum(a == b for a, b in zip(texts, truth, strict=True))
        return right / len(images)

    metric = "directions right" if name == "ppocr_direction" else "words right"
    shapes: Shapes = {"x": (1, *images.shape[1:])}
    return Task(name, source, {"x": calibration[order]}, shapes, len(images), metric, accuracy)


#: Networks by name: the loader, and the export of accuracy_export.py that makes its files (None: they are in DATA).
TASKS: dict[str, tuple[Callable[[str, Path, int | None, int, int], Task], str | None]] = {
    "resnet56": (cifar, None),
    "resnet20": (cifar, None),
    "minilm": (sentences, "minilm"),
    "ppocr_direction": (ppocr, "ppocr"),
    "ppocr_recogniser": (ppocr, "ppocr"),
}
