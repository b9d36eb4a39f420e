"""Prune every network of the corpus and say what came of it.

    python benchmarks/corpus.py FOLDER [--only GLOB] [--jobs N] [--resume] [--out benchmarks/results]

FOLDER is filled by ``corpus_export.py``; each ``name.onnx`` there has a ``name.json``.  Needs only graphprune and what
graphprune needs.  Each file is measured in a process of its own, with a time and a memory limit, through graphprune's
public interface: pruned at ``channels=0.3``, and once more with ``residual=True`` unless it is a plain convolutional or
recurrent network.  Files with open axes (``-dyn``) are pruned once and then compared with the masked original at three
sizes.  Beside graphprune's own verification the result is judged here: the ONNX checker with full shape inference, and
a run in ONNX Runtime whose outputs must have the original's shapes and types.

Writes ``corpus.md`` and ``corpus.json`` to the folder of ``--out``; ends 0 when every expectation of `EXPECTATIONS`
(in `corpus_report`) holds and 1 otherwise.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import corpus_report

RATIO = 0.3
SECONDS = 300
MEMORY = 14 * 2**30
#: Kinds whose residual streams carry no normalisation: nothing is left for ``residual=True``.
WITHOUT_RESIDUAL = frozenset({"convolution", "recurrent"})
Shapes = dict[str, tuple[int, ...]]


def measure(path: Path, ratio: float) -> dict[str, Any]:
    """Everything the table says of one file.

    Returns
    -------
    dict
        The description beside the file, ``megabytes``, ``nodes``, ``plain`` and, where it applies, ``residual``: each
        the result of one call of `graphprune.prune` (`_prune_once`).
    """
    import onnx

    description: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    model = onnx.load(path)
    shapes = description["sizes"] or [{n: v["shape"] for n, v in description["inputs"].items()}]
    sizes: list[Shapes] = [{n: tuple(s) for n, s in size.items()} for size in shapes]
    expected = _run(model, description["inputs"], sizes)
    found: dict[str, Any] = {
        **{k: description[k] for k in ("network", "source", "kind", "exporter", "dynamic", "versions")},
        "megabytes": round(path.stat().st_size / 2**20, 1),
        "nodes": len(model.graph.node),
        "plain": _prune_once(path, description, sizes, expected, ratio, residual=False),
    }
    if description["kind"] not in WITHOUT_RESIDUAL:
        found["residual"] = _prune_once(path, description, sizes, expected, ratio, residual=True)
    return found


def _prune_once(
    path: Path,
    description: Mapping[str, Any],
    sizes: Sequence[Shapes],
    expected: Outputs,
    ratio: float,
    *,
    residual: bool,
) -> dict[str, Any]:
    """One run of `graphprune.prune` on the file, judged; keys as `corpus_report` reads them.

    ``valid``: the checker accepts the pruned model, ONNX Runtime runs it, and its outputs have the original's shapes
    and types.  ``exact``: graphprune's verification passed (at all sizes for a file with open axes); ``error`` is its
    largest deviation, relative to the output's scale.
    """
    import graphprune

    shapes: Shapes = {n: tuple(v["shape"]) for n, v in description["inputs"].items()}
    options: dict[str, Any] = {"channels": ratio, "residual": residual, "input_shapes": shapes}
    result: dict[str, Any] = {"valid": False, "exact": False, "problem": ""}
    began = time.perf_counter()
    try:
        pruned, report = graphprune.prune(str(path), **options)
    except graphprune.NothingToPruneError as problem:
        return {
            **result,
            "valid": True,
            "exact": True,
            "error": 0.0,
            "macs": 1.0,
            "parameters": 1.0,
            **_line(problem),
        }
    except graphprune.VerificationError as problem:
        # Not exact: the figures of the same run without verification still tell where to look.
        result.update(_line(problem))
        try:
            pruned, report = graphprune.prune(str(path), verify=False, **options)
        except Exception as second:
            return {**result, **_line(second)}
    except Exception as problem:
        return {**result, **_line(problem)}
    else:
        result.update(exact=True, error=_error_of(report))
    result["total_seconds"] = round(time.perf_counter() - began, 3)
    result.update(_figures(report))
    try:
        _assert_valid(pruned, expected, description["inputs"], sizes)
        result["valid"] = True
    except Exception as problem:
        result.update(_line(problem))
    if description["dynamic"] and result["valid"] and result["exact"]:
        same = {"residual": residual, "input_shapes": shapes}
        result.update(_compare_at_sizes(path, report.plan, same, description["inputs"], sizes))
    return result


def _compare_at_sizes(
    path: Path, plan: Any, options: Mapping[str, Any], inputs: Mapping[str, Any], sizes: Sequence[Shapes]
) -> dict[str, Any]:
    """Pruned against masked original at every size of `sizes`: one plan, carried out and verified on such inputs."""
    import graphprune

    errors: list[float] = []
    try:
        for seed, shapes in enumerate(sizes):
            feeds = _feeds(inputs, shapes, seed)
            _, report = graphprune.prune(str(path), plan=plan, calibration=feeds, **options)
            errors.append(_error_of(report))
    except Exception as problem:
        return {"exact": False, "sizes": errors, **_line(problem)}
    return {"exact": max(errors) <= corpus_report.TOLERANCE, "sizes": errors, "error": max(errors)}


def _error_of(report: Any) -> float:
    if report.max_error is None:
        raise ValueError("the report has no result of verification")
    return float(report.max_error)


def _feeds(inputs: Mapping[str, Any], shapes: Shapes, seed: int) -> dict[str, Any]:
    """Seeded inputs of the given shapes: normal reals, or integers below the bound in the description."""
    import numpy as np

    random = np.random.default_rng(seed)
    bounds = {name: inputs[name]["integers_below"] for name in shapes}
    return {
        name: random.integers(2, bounds[name], shape)
        if bounds[name]
        else random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def _figures(report: Any) -> dict[str, Any]:
    groups = list(report.groups)
    frozen = [g for g in groups if g.frozen]
    reasons = Counter[str]()
    for group in frozen:
        reasons[str(group.frozen)] += int(group.size)
    return {
        "parameters": report.parameters_after / max(report.parameters_before, 1),
        "macs": report.macs_after / max(report.macs_before, 1),
        "macs_before": int(report.macs_before),
        "parameters_before": int(report.parameters_before),
        "seconds": {k: round(float(v), 4) for k, v in report.seconds.items()},
        "free": sum(1 for g in groups if not g.frozen and not g.statistical),
        "statistical": sum(1 for g in groups if not g.frozen and g.statistical),
        "frozen": len(frozen),
        "reasons": reasons.most_common(4),
    }


def _line(problem: BaseException) -> dict[str, str]:
    """The problem as one line of a table."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [""]
    return {"problem": f"{type(problem).__name__}: {lines[0][:240]}"}


#: Of each size of input: name, shape and element type of every output.
Outputs = list[list[tuple[str, tuple[int, ...], str]]]


def _run(model: Any, inputs: Mapping[str, Any], sizes: Sequence[Shapes]) -> Outputs:
    """Run a ModelProto in ONNX Runtime on seeded random inputs of every size; raise when an output is not finite."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    found: Outputs = []
    for shapes in sizes:
        values = session.run(None, _feeds(inputs, shapes, 0))
        if not all(np.isfinite(v).all() for v in values):
            raise ValueError("an output is not finite")
        found.append([(n, v.shape, str(v.dtype)) for n, v in zip(names, values, strict=True)])
    return found


def _assert_valid(pruned: Any, expected: Outputs, inputs: Mapping[str, Any], sizes: Sequence[Shapes]) -> None:
    """Check the pruned model without graphprune's help; raise with the reason when it is not usable."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(pruned)
    onnx.checker.check_model(proto, full_check=True)
    for shapes, before, after in zip(sizes, expected, _run(proto, inputs, sizes), strict=True):
        if before != after:
            raise ValueError(f"outputs at {shapes}: {before} became {after}")


# ------------------------------------------------------------------------------------------------------ processes
def _child(pipe: Connection, path: Path, ratio: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        pipe.send(measure(path, ratio))
    except BaseException as problem:  # whatever it was, it is this file's result
        pipe.send(_line(problem))


def measure_apart(path: Path, ratio: float, seconds: float) -> dict[str, Any]:
    """`measure` in a process of its own; a process that dies or takes too long is a result too."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, path, ratio))
    process.start()
    there.close()
    try:
        found: dict[str, Any] = (
            here.recv() if here.poll(seconds) else {"problem": f"more than {seconds:.0f} s"}
        )
    except EOFError:
        process.join()
        found = {"problem": f"the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    if "plain" not in found:
        described = json.loads(path.with_suffix(".json").read_text())
        keys = ("network", "source", "kind", "exporter", "dynamic", "versions")
        found = {**{k: described[k] for k in keys}, "plain": {"valid": False, "exact": False, **found}}
    return found


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def main() -> int:
    """Measure, write both files, print the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the exported corpus")
    parser.add_argument("--only", default="*", metavar="GLOB", help="files to measure, by stem")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="files at a time; timings are of use at 1"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the results that corpus.json has without a problem"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of corpus.md and corpus.json",
    )
    parser.add_argument("--channels", type=float, default=RATIO, metavar="R", help="the ratio to remove")
    parser.add_argument("--timeout", type=float, default=SECONDS, metavar="S", help="seconds a file may take")
    arguments = parser.parse_args()
    paths = sorted(
        p
        for p in arguments.folder.glob("*.onnx")
        if p.with_suffix(".json").exists() and fnmatch.fnmatch(p.stem, arguments.only)
    )
    if not paths:
        print(
            f"corpus.py: no exported network in {arguments.folder} matches {arguments.only!r}",
            file=sys.stderr,
        )
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    ledger: Path = arguments.out / "corpus.json"
    results: dict[str, dict[str, Any]] = {}
    if arguments.resume and ledger.exists():
        results = json.loads(ledger.read_text())["results"]
    todo = [p for p in paths if corpus_report.problem_of(results.get(p.stem))]
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["onnx", "onnxruntime", "onnx_ir", "graphprune.pipeline"]
    )
    command = ["python", "benchmarks/corpus.py", arguments.folder.name, *_options_given(sys.argv[1:])]
    began = time.time()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {pool.submit(measure_apart, p, arguments.channels, arguments.timeout): p for p in todo}
        for i, future in enumerate(as_completed(futures), 1):
            stem = futures[future].stem
            results[stem] = future.result()
            print(f"{i}/{len(todo)} {corpus_report.one_line(stem, results[stem])}", flush=True)
            _write_whole(ledger, json.dumps(corpus_report.document(results, command), indent=1))
    print(f"{len(todo)} files in {time.time() - began:.0f} s")
    document = corpus_report.document(results, command)
    _write_whole(ledger, json.dumps(document, indent=1))
    text, held = corpus_report.markdown(document)
    _write_whole(arguments.out / "corpus.md", text)
    print(text[: text.index("## Every file")])
    return 0 if held else 1


def _options_given(words: Sequence[str]) -> list[str]:
    """The command line's options, without the folders, which are of one machine."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or word == "--out":
            skip = word == "--out"
            continue
        if word.startswith("-") or (kept and kept[-1] in ("--only", "--jobs", "--channels", "--timeout")):
            kept.append(word if word.isprintable() and " " not in word and "*" not in word else f"'{word}'")
    return kept


if __name__ == "__main__":
    sys.exit(main())
