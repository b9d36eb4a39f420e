"""Time and memory of graphprune beside its rivals, in one run.

    python benchmarks/speed.py --torch-python A/bin/python --onnxsim-python B/bin/python

A holds torch, torchvision, onnx and torch-pruning 1.6.1; B holds onnxsim 0.8.1; this interpreter holds graphprune.
Four parts, chosen by --parts:

process  seconds and peak memory of whole processes, from the shell to the written file, at the same ratio
latency  ONNX Runtime on what came out, graphprune's ratio set so that the MACs are equal, sessions alternating
growth   seconds of `graphprune.analyze` against the number of nodes, with the slope in log-log
memory   peak memory of `graphprune` above its peak on a small model, against the model's size

Writes speed.md and speed.json under --out and prints the former.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import graphprune
from benchmarks.synthetic import macs, residual_chain, write_perceptron

HERE = Path(__file__).resolve().parent
GRAPHPRUNE = [sys.executable, "-c", "import sys; from graphprune.cli import main; sys.exit(main())"]
MB = 1e6


@dataclass
class Process:
    """What one child process used."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    output: str

    def figures(self) -> dict[str, float]:
        """All but what it printed, which names folders of the machine."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "peak_mb": self.peak_mb}


@dataclass
class Section:
    """One table of the report, with all that was measured for it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [
            f"## {self.title}",
            "",
            "| " + " | ".join(self.header) + " |",
            "|---" * len(self.header) + "|",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *self.notes, ""])


@dataclass
class Settings:
    """Where things are and how often they are measured."""

    folder: Path
    torch_python: str | None
    onnxsim_python: str | None
    ratio: float
    repeats: int
    threads: int
    sizes: list[int]
    megabytes: list[int]


def run(command: list[str], folder: Path) -> Process:
    """Runs a command to its end; time and memory are the kernel's figures for that process and its children.

    Raises
    ------
    RuntimeError
        where it fails, with the end of what it wrote.
    """
    with tempfile.TemporaryFile("w+", dir=folder) as out:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=HERE.parent)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        output = out.read()
    if child.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended {child.returncode}:\n{output[-2000:]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Process(seconds, usage.ru_utime + usage.ru_stime, peak / MB, output)


def rival(python: str, *arguments: str) -> list[str]:
    return [python, str(HERE / "rivals.py"), *arguments]


def network_file(settings: Settings, name: str) -> Path:
    """The unpruned network as .onnx, exported once."""
    path = settings.folder / f"{name}.onnx"
    if not path.exists():
        assert settings.torch_python is not None, "the networks are exported with --torch-python"
        run(rival(settings.torch_python, "export", name, str(path)), settings.folder)
    return path


def graphprune_command(source: Path, out: Path, ratio: float, *options: str) -> list[str]:
    return [*GRAPHPRUNE, str(source), "--channels", f"{ratio:g}", "-o", str(out), "--quiet", *options]


def contestants(settings: Settings, name: str) -> dict[str, tuple[list[str], Path]]:
    """The commands that prune a network, and where each writes."""
    source, folder, ratio = network_file(settings, name), settings.folder, f"{settings.ratio:g}"
    found: dict[str, tuple[list[str], Path]] = {}

    for label, stem, options in (
        ("graphprune", "graphprune", ()),
        ("graphprune --no-verify", "unverified", ("--no-verify",)),
    ):
        out = folder / f"{name}.{stem}.onnx"
        found[label] = (graphprune_command(source, out, settings.ratio, *options), out)
    if settings.torch_python and name != "vgg16":
        out = folder / f"{name}.torch_pruning.onnx"
        command = rival(settings.torch_python, "torch-pruning", name, str(out), "--ratio", ratio)
        found["torch-pruning"] = (command, out)
    if settings.onnxsim_python and name != "densenet201":
        for job in ("onnxsim", "onnxsim-cpp"):
            out = folder / f"{name}.{job}.onnx"
            found[job] = (rival(settings.onnxsim_python, job, str(source), str(out), "--ratio", ratio), out)
    return found


def whole_process(settings: Settings) -> Section:
    """Alternating runs of all contestants on each network; medians, and the ratio to graphprune's."""
    section = Section(
        f"Whole process at ratio {settings.ratio:g}",
        ["network", "tool", "seconds", "CPU s", "times graphprune", "peak MB", "MACs kept", "steps"],
        [],
        [
            f"Medians of {settings.repeats} alternating runs, from the start of the interpreter to the file written."
        ],
    )
    for name in ("resnet50", "densenet201", "vgg16"):
        jobs = contestants(settings, name)
        runs: dict[str, list[Process]] = {label: [] for label in jobs}
        for _ in range(settings.repeats):
            for label, (command, _out) in jobs.items():
                runs[label].append(run(command, settings.folder))
        base = statistics.median(r.seconds for r in runs["graphprune"])
        whole = macs(network_file(settings, name))
        for label, results in runs.items():
            seconds = statistics.median(r.seconds for r in results)
            kept = macs(jobs[label][1]) / whole
            steps = (
                results[-1].output.strip().splitlines()[-1]
                if label not in runs or "graphprune" not in label
                else ""
            )
            cpu = statistics.median(r.cpu_seconds for r in results)
            peak = statistics.median(r.peak_mb for r in results)
            times = f"{seconds:.2f}", f"{cpu:.2f}", f"{seconds / base:.1f}"
            section.rows.append([name, label, *times, f"{peak:.0f}", f"{kept:.3f}", steps])
            for result in results:
                section.raw.append({"network": name, "tool": label, "macs_kept": kept, **result.figures()})
    return section


def at_equal_macs(settings: Settings, name: str, target: int) -> tuple[Path, float]:
    """graphprune's result whose MACs come nearest to `target`, by bisection on the ratio."""
    source = network_file(settings, name)
    low, high = 0.0, 0.95
    best: tuple[float, Path, float] | None = None
    for step in range(7):
        ratio = (low + high) / 2
        out = settings.folder / f"{name}.equal{step}.onnx"
        run(graphprune_command(source, out, ratio, "--no-verify"), settings.folder)
        found = macs(out)
        error = abs(found / target - 1)
        if best is None or error < best[0]:
            best = (error, out, ratio)
        low, high = (ratio, high) if found > target else (low, ratio)
    assert best is not None
    return best[1], best[2]


def paired_latency(settings: Settings, paths: list[Path], rounds: int = 31) -> list[list[float]]:
    """Milliseconds of each file in each round, one image, the order of the files turned round every time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # or it takes cores from who runs next
    sessions = [
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in paths
    ]
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    times: list[list[float]] = [[] for _ in paths]
    for turn in range(-3, rounds):
        order = range(len(paths)) if turn % 2 else reversed(range(len(paths)))
        for index in order:
            session = sessions[index]
            start = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: image})
            if turn >= 0:  # the first rounds warm up
                times[index].append(1e3 * (time.perf_counter() - start))
    return times


def latency(settings: Settings) -> Section:
    section = Section(
        "ONNX Runtime latency at equal MACs",
        ["network", "against", "its MACs kept", "ours", "its ms", "our ms", "unpruned ms", "ours / its"],
        [],
        [
            f"One image of 224 x 224, {settings.threads} thread(s), medians of 31 alternating runs; "
            "the last column is the median of the pairs' quotients."
        ],
    )
    for name in ("resnet50", "densenet201", "vgg16"):
        source = network_file(settings, name)
        whole = macs(source)
        for label, (command, out) in contestants(settings, name).items():
            if label.startswith("graphprune") or label == "onnxsim-cpp":
                continue
            if not out.exists():
                run(command, settings.folder)
            target = macs(out)
            ours, ratio = at_equal_macs(settings, name, target)
            theirs_ms, ours_ms, whole_ms = paired_latency(settings, [out, ours, source])
            quotient = statistics.median(a / b for a, b in zip(ours_ms, theirs_ms, strict=True))
            kept, our_kept = target / whole, macs(ours) / whole
            medians = [statistics.median(ms) for ms in (theirs_ms, ours_ms, whole_ms)]
            section.rows.append(
                [
                    name,
                    label,
                    f"{kept:.3f}",
                    f"{our_kept:.3f}",
                    *(f"{ms:.1f}" for ms in medians),
                    f"{quotient:.3f}",
                ]
            )
            section.raw.append(
                {"network": name, "against": label, "ratio": ratio, "macs_kept": [kept, our_kept]}
                | {"ms": {"theirs": theirs_ms, "ours": ours_ms, "unpruned": whole_ms}}
            )
    return section


def analysis_seconds(settings: Settings, path: Path) -> float:
    """Seconds of one `graphprune.analyze` in a fresh process, the model's loading and the imports apart."""
    code = (
        "import sys, time, onnx, onnxruntime, graphprune; from graphprune import analyze\n"
        "m = onnx.load(sys.argv[1]); t = time.perf_counter(); analyze(m); print(time.perf_counter() - t)"
    )
    result = run([sys.executable, "-c", code, str(path)], settings.folder)
    return float(result.output.strip().splitlines()[-1])


def slope(points: list[tuple[float, float]]) -> float:
    """The exponent of growth: least squares in log-log."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def growth(settings: Settings) -> Section:
    section = Section("Analysis time", ["network", "nodes", "seconds", "ms a node"], [])
    points: list[tuple[float, float]] = []
    paths = [network_file(settings, n) for n in ("resnet50", "densenet201")] if settings.torch_python else []
    for nodes in settings.sizes:
        path = settings.folder / f"chain{nodes}.onnx"
        if not path.exists():
            onnx.save(residual_chain(nodes), path)
        paths.append(path)
    for path in paths:
        count = len(onnx.load(path, load_external_data=False).graph.node)
        repeats = settings.repeats if count <= 10_000 else 1
        seconds = statistics.median(analysis_seconds(settings, path) for _ in range(repeats))
        if path.stem.startswith("chain"):
            points.append((count, seconds))
        section.rows.append([path.stem, f"{count:,}", f"{seconds:.3f}", f"{1e3 * seconds / count:.3f}"])
        section.raw.append({"network": path.stem, "nodes": count, "seconds": seconds})
    if len(points) > 1:
        section.notes = [
            f"chainN is a residual network of N nodes. Growth exponent over the chains: {slope(points):.2f} "
            f"(over the upper half: {slope(points[len(points) // 2 - 1 :]):.2f}); 1 is linear."
        ]
    return section


def memory(settings: Settings) -> Section:
    section = Section(
        "Peak memory",
        ["model", "options", "file MB", "peak MB", "above the small model", "times the file", "seconds"],
        [],
        [
            "Models of Gemm 2048 x 2048 and Relu with external data. Peak resident memory of the whole process, "
            "pages of mapped files included."
        ],
    )
    small = settings.folder / "small.onnx"
    write_perceptron(small, 0, width=16)
    out = settings.folder / "memory.out.onnx"
    for options in ((), ("--no-verify",)):
        shape = ("--input-shape", "x:1,16")
        floor = run(graphprune_command(small, out, settings.ratio, *shape, *options), settings.folder).peak_mb
        for megabytes in settings.megabytes:
            path = settings.folder / f"perceptron{megabytes}.onnx"
            if not path.exists():
                write_perceptron(path, megabytes)
            size = path.with_suffix(".data").stat().st_size / MB
            shape = ("--input-shape", "x:1,2048")
            result = run(graphprune_command(path, out, settings.ratio, *shape, *options), settings.folder)
            above = result.peak_mb - floor
            cells = f"{size:.0f}", f"{result.peak_mb:.0f}", f"{above:.0f}", f"{above / size:.2f}"
            verified = " ".join(options) or "verified"
            section.rows.append([path.stem, verified, *cells, f"{result.seconds:.1f}"])
            measured = {"model": path.stem, "options": options, "file_mb": size, "floor_mb": floor}
            section.raw.append(measured | result.figures())
            for left in settings.folder.glob("memory.out*"):
                left.unlink()
    return section


def machine() -> dict[str, str]:
    """The processor, its cores, and the memory, as far as the system tells."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor
        )
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "memory": f"{pages / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def versions(settings: Settings) -> dict[str, str]:
    """Versions of this interpreter's and the rivals' distributions."""
    found = {"graphprune": graphprune.__version__}
    found |= {name: importlib.metadata.version(name) for name in ("onnx", "onnx-ir", "onnxruntime", "numpy")}
    ask = (
        "import sys; from importlib.metadata import version as v; print(' '.join(v(n) for n in sys.argv[1:]))"
    )
    for python, wanted in (
        (settings.torch_python, ["torch", "torchvision", "torch-pruning"]),
        (settings.onnxsim_python, ["onnxsim"]),
    ):
        if python:
            answer = subprocess.run([python, "-c", ask, *wanted], capture_output=True, text=True, check=True)
            found |= dict(zip(wanted, answer.stdout.split(), strict=True))
    return found


# Memory first: until it runs its own program a child counts its parent's pages as its peak, and later parts load
# networks into this process.
PARTS = {"memory": memory, "process": whole_process, "latency": latency, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", help="interpreter with torch, torchvision and torch-pruning")
    parser.add_argument("--onnxsim-python", help="interpreter with onnxsim")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="where the networks are made and kept (default: temporary)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where speed.md and speed.json go")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime in the latency part")
    parser.add_argument("--sizes", default="500,1000,2000,5000,10000,20000,50000", help="nodes of the chains")
    parser.add_argument("--megabytes", default="100,300,1000", help="sizes of the models of the memory part")
    options = parser.parse_args()
    if unknown := set(options.parts.split(",")) - PARTS.keys():
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="graphprune-speed.") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        settings = Settings(
            folder,
            options.torch_python,
            options.onnxsim_python,
            options.ratio,
            options.repeats,
            options.threads,
            [int(n) for n in options.sizes.split(",")],
            [int(n) for n in options.megabytes.split(",")],
        )
        sections = []
        for part in options.parts.split(","):
            print(f"{part} ...", file=sys.stderr, flush=True)
            sections.append(PARTS[part](settings))
    # Without folders: where the environments lie is nobody's business.
    words = [Path(word).name if "/" in word else word for word in sys.argv]
    facts = {
        "command": f"python benchmarks/speed.py {shlex.join(words[1:])}",
        **machine(),
        **versions(settings),
    }
    text = "# Speed\n\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n\n"
    text += "\n".join(section.markdown() for section in sections)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "speed.md").write_text(text)
    dump = json.dumps({"facts": facts, "sections": [asdict(s) for s in sections]}, indent=1)
    (options.out / "speed.json").write_text(dump + "\n")
    print(text)


if __name__ == "__main__":
    main()
