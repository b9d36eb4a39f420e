"""2:4 against dense on an NVIDIA GPU: products in PyTorch, ONNX networks through TensorRT or ONNX Runtime.

    python benchmarks/gpu.py [MODEL.onnx ...]

Runs from a checkout with that machine's own Python, and takes what is there: PyTorch with cuSPARSELt for the products
of ResNet-50, MiniLM and squares of 256 to 8192; TensorRT, or ONNX Runtime's TensorRT or CUDA provider, and what
graphprune itself depends on, for the networks given: each as it is, pruned, and pruned with 2:4 weights, all in one
low precision. What is not there is listed, and is no error. What was measured goes to gpu.json and gpu.md under --out.

--empty writes these two files without figures.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_layers import Layer, products
from benchmarks.gpu_networks import ORT_CUDA, ORT_TENSORRT, TENSORRT, Asked, child, run
from benchmarks.gpu_report import FOUND, found_rows, markdown, table
from graphprune import __version__
from graphprune.tensorrt.engines import compare
from graphprune.tensorrt.probe import PROVIDER, probe
from graphprune.tensorrt.provider import CUDA

HERE = Path(__file__).resolve().parent
#: What graphprune needs to prune; the products need none of it.
NEEDS = ("numpy", "onnx", "onnx_ir", "onnxruntime", "scipy", "networkx", "rich")
DISTRIBUTIONS = (
    "torch", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12",
    "tensorrt-cu13", "nvidia-cusparselt-cu12", "nvidia-cusparselt-cu13", "nvidia-cublas-cu12", "nvidia-cublas",
)  # fmt: skip
TORCH = """
import json, torch
there = torch.cuda.is_available()
cslt = there and torch.backends.cusparselt.is_available()
print(json.dumps({
    "version": torch.__version__,
    "device": list(torch.cuda.get_device_capability()) if there else None,
    "cusparselt": torch.backends.cusparselt.version() if cslt else None,
}))
"""


def entry(name: str, works: bool, version: str | None = None, reason: str | None = None) -> dict[str, Any]:
    """One thing that was looked for."""
    return {
        "name": name,
        "state": "there" if works else "not there",
        "version": version,
        "reason": None if works else reason,
    }


def find_torch(limit: float = 120.0) -> list[dict[str, Any]]:
    """PyTorch, and cuSPARSELt in it; in a process of its own."""
    cusparselt = "PyTorch's cuSPARSELt"
    if importlib.util.find_spec("torch") is None:
        return [
            entry("PyTorch", False, reason="it is not installed"),
            entry(cusparselt, False, reason="no PyTorch"),
        ]
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH], capture_output=True, text=True, timeout=limit, errors="replace"
        )
        facts = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        facts, why = {}, f"it does not start within {limit:g} s"
    except (IndexError, ValueError):
        last = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        facts, why = {}, f"it does not start: {last[-1].strip()}"
    if not facts:
        return [entry("PyTorch", False, reason=why), entry(cusparselt, False, reason="no PyTorch")]
    found = [entry("PyTorch", True, facts["version"])]
    number = facts["cusparselt"]
    if facts["device"] is None:
        return [*found, entry(cusparselt, False, reason="PyTorch sees no CUDA device")]
    if facts["device"] < [8, 0]:
        return [
            *found,
            entry(cusparselt, False, reason="the device has no sparse tensor cores (before Ampere)"),
        ]
    reason = "this build of PyTorch is without it"
    return [*found, entry(cusparselt, number is not None, None if number is None else str(number), reason)]


def find_all() -> list[dict[str, Any]]:
    """Everything that the parts need, by name."""
    device, tensorrt, runtime = (probe(name) for name in ("device", "tensorrt", "onnxruntime"))
    names = ", ".join(each.name for each in device.devices)
    found = [entry("NVIDIA device", device.works, names or None, device.reason), *find_torch()]
    found.append(entry(TENSORRT, tensorrt.works, tensorrt.version, tensorrt.reason))
    for name, provider in ((ORT_TENSORRT, PROVIDER), (ORT_CUDA, CUDA)):
        there = provider in runtime.providers
        reason = runtime.reason or f"ONNX Runtime {runtime.version} has no {provider}"
        found.append(entry(name, there, runtime.version if there else None, reason))
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    found.append(
        entry("graphprune's own needs", not missing, __version__, f"not installed: {', '.join(missing)}")
    )
    return found


def is_there(found: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether something was found."""
    return any(each["name"] == name and each["state"] == "there" for each in found)


def machine() -> dict[str, str]:
    """The GPU and its driver as nvidia-smi tells, and the processor."""
    facts = {"processor": platform.processor() or platform.machine(), "cores": str(os.cpu_count())}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        facts["processor"] = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
            facts["processor"],
        )
    facts["Python"] = platform.python_version()
    if shutil.which("nvidia-smi"):
        fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        values = [value.strip() for value in done.stdout.strip().split(",")]
        if done.returncode == 0 and len(values) == len(fields):
            facts |= dict(
                zip(("GPU", "driver", "memory", "clock at most", "power limit"), values, strict=True)
            )
    return facts


def versions() -> dict[str, str]:
    """Of what is installed, by distribution."""
    found = {"graphprune": __version__}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def time_products(
    wanted: Sequence[tuple[Layer, int]], types: Sequence[str], rounds: int, limit: float
) -> list[dict[str, Any]]:
    """A row for each product and type. A process that dies costs one row; the next goes on after it."""
    rows: list[dict[str, Any]] = []
    todo = [
        {
            "network": layer.network,
            "layer": layer.name,
            "count": layer.count,
            "batch": n // layer.positions,
            "m": layer.m,
            "k": layer.k,
            "n": n,
            "dtype": dtype,
        }
        for dtype in types
        for layer, n in wanted
    ]
    question: dict[str, Any] = {"rounds": rounds, "seed": 0, "graph": True}
    trial = {"m": 512, "k": 512, "n": 512, "dtype": types[0]}
    answers, _ = child("gpu_products.py", {**question, "products": [trial]}, limit)
    question["graph"] = bool(answers) and "reason" not in answers[0]
    while len(rows) < len(todo):
        rest = todo[len(rows) :]
        answers, failure = child("gpu_products.py", {**question, "products": rest}, limit)
        if len(answers) < len(rest):
            answers.append({"reason": failure or "the process ended early"})
        for product, answer in zip(rest, answers, strict=False):
            print(
                f"{product['network']} {product['layer']} {product['dtype']}: {answer.get('reason') or 'timed'}"
            )
            rows.append(product_result(product, answer, graph=question["graph"]))
    return rows


def product_result(product: dict[str, Any], answer: dict[str, Any], *, graph: bool) -> dict[str, Any]:
    """A product with the medians of its times."""
    if "reason" in answer:
        return {**product, "reason": answer["reason"]}
    return {
        **product,
        "reason": None,
        "dense_us": median(answer["dense_us"]),
        "sparse_us": median(answer["sparse_us"]),
        "said": str(compare(answer["dense_us"], answer["sparse_us"])),
        "error": answer["error"],
        "timed_by": "graph" if graph else "launches",
        "kernel": answer["kernel"],
    }


def write(document: dict[str, Any], folder: Path) -> None:
    """gpu.json and gpu.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    (folder / "gpu.md").write_text(markdown(document))


def command_of(options: argparse.Namespace) -> str:
    """The command without folders, which are the machine's own."""
    words = ["python benchmarks/gpu.py", *(path.name for path in options.models)]
    if not options.empty:
        words += ["--channels", str(options.channels), "--precision", options.precision]
        words += ["--batches", *map(str, options.batches)]
        words += [word for text in options.shapes for word in ("--shapes", text)]
        words += ["--calib", options.calib.name] if options.calib is not None else []
    return " ".join(words if not options.empty else [*words, "MODEL.onnx ..."])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--channels", type=float, default=0.3, help="fraction that pruning removes (0.3)")
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--shapes", action="append", default=[], help="as of graphprune --shapes")
    parser.add_argument("--calib", type=Path, help="inputs, as of graphprune --calib")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="of the products (1 32)")
    parser.add_argument("--types", nargs="+", default=["float16", "bfloat16"], help="of the products")
    parser.add_argument("--rounds", type=int, default=15, help="rounds in turn (15)")
    parser.add_argument("--runs", type=int, default=20, help="runs of a network in each round (20)")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for one step (3600)")
    parser.add_argument(
        "--parts", nargs="+", choices=("products", "networks"), default=["products", "networks"]
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--empty", action="store_true", help="write the two files without figures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what can be measured here."""
    options = parse(arguments)
    document: dict[str, Any] = {
        "command": command_of(options), "machine": {}, "versions": {}, "found": [], "products": [], "networks": [],
    }  # fmt: skip
    if options.empty:
        write(document, options.out)
        return 0
    found = find_all()
    print(table(FOUND, found_rows(found)), end="\n\n", flush=True)
    document |= {"machine": machine(), "versions": versions(), "found": found}
    device = is_there(found, "NVIDIA device")
    if "products" in options.parts and is_there(found, "PyTorch's cuSPARSELt"):
        document["products"] = time_products(
            products(options.batches), options.types, options.rounds, options.limit
        )
    runtimes = [name for name in (TENSORRT, ORT_TENSORRT, ORT_CUDA) if device and is_there(found, name)]
    if (
        "networks" in options.parts
        and options.models
        and is_there(found, "graphprune's own needs")
        and runtimes
    ):
        asked = Asked(
            options.models, options.channels, options.precision, options.shapes, options.calib,
            options.rounds, options.runs, options.limit,
        )  # fmt: skip
        document["networks"] = run(asked, runtimes, print)
    if not document["products"] and not document["networks"]:
        print("Nothing was measured, and nothing is written.")
        return 0
    write(document, options.out)
    print(markdown(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
