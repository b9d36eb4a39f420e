"""The whole chain on the network that is shipped, in one command; its report is the example that is committed.

    python benchmarks/chain.py

Writes results/chain.md and results/chain.json, and prints the former. Nothing but graphprune is needed; with TensorRT
and a GPU there is an engine too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed import machine

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "models"
SHAPES = "image:1x1x8x8,8x1x8x8,64x1x8x8"
ARGUMENTS = [
    "digits.onnx",
    *("--channels", "0.3"),
    *("--nm", "2:4"),
    *("--precision", "fp16"),
    *("--calib", "digits_calibration.npz"),
    *("--tensorrt", "digits.plan"),
    *("--shapes", SHAPES),
    *("-o", "digits.small.onnx"),
]


def right(path: Path) -> int:
    """How many of the 360 held-out images a network reads right."""
    with np.load(MODELS / "digits_test.npz") as data:
        images, labels = data["image"].astype(np.float32) / 16, data["label"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {"image": images}
    return int((session.run(None, feeds)[0].argmax(axis=1) == labels).sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where the results go")
    options = parser.parse_args()
    command = [sys.executable, "-m", "graphprune", *ARGUMENTS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("digits.onnx", "digits_calibration.npz"):
            shutil.copy(MODELS / file, folder)
        table, report = (
            subprocess.run(
                [*command, *more], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            for more in ([], ["--json"])
        )
        before, after = right(folder / "digits.onnx"), right(folder / "digits.small.onnx")
        script = (folder / "digits.small.trt.sh").read_text()
    lines = [
        "# The whole chain on the network that is shipped",
        "",
        f"    graphprune {' '.join(ARGUMENTS)}",
        "",
        ", ".join(f"{key} {value}" for key, value in machine().items()),
        "",
        "What it prints:",
        "",
        *(f"    {line}".rstrip() for line in table.splitlines()),
        "",
        f"Of 360 held-out images {before} are read right before, {after} after; nothing was trained. `chain.json` is",
        "the same report from `--json`. The script for trtexec that it writes:",
        "",
        *(f"    {line}".rstrip() for line in script.splitlines()),
        "",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "chain.md").write_text("\n".join(lines))
    (options.out / "chain.json").write_text(json.dumps(json.loads(report), indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
