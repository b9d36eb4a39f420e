"""The table of `corpus.py`: its expectations, its summary, and the Markdown of both."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

#: The largest deviation, relative to the output's scale, that counts as exact.
TOLERANCE = 1e-4
#: MACs that may be left at channels=0.3, by kind, without and with residual=True.
MACS_PLAIN = {"convolution": 0.55, "transformer": 0.78}
MACS_RESIDUAL = {"transformer": 0.65}
ANALYSIS_SECONDS = 5.0
FILES = 200
#: Two exports of one network that keep MACs further apart than this are listed: one of them is over-coupled or frozen.
EXPORTERS_APART = 0.02

Result = Mapping[str, Any]
Results = Mapping[str, Result]


def runs(result: Result) -> list[Result]:
    """The one or two runs of a file."""
    return [result[k] for k in ("plain", "residual") if k in result]


def problem_of(result: Result | None) -> str:
    """What is wrong with a result, empty when nothing is."""
    if result is None:
        return "not measured"
    for run in runs(result):
        if not (run["valid"] and run["exact"]):
            return str(run.get("problem") or "not exact")
    return ""


def analysis_seconds(result: Result) -> float | None:
    """The slower analysis of the file's runs."""
    found = [run["seconds"]["analysis"] for run in runs(result) if "analysis" in run.get("seconds", {})]
    return max(found, default=None)


def _macs_above(results: Results, run: str, limits: Mapping[str, float]) -> list[str]:
    found = []
    for stem, result in results.items():
        limit = limits.get(result["kind"])
        macs = result.get(run, {}).get("macs")
        if limit is not None and macs is not None and macs > limit:
            reasons = "; ".join(f"{text} ({size})" for text, size in result[run].get("reasons", []))
            statistical = result[run].get("statistical", 0)
            found.append(
                f"{stem}: {macs:.3f} > {limit}. Frozen: {reasons or 'nothing'}; statistical groups: {statistical}"
            )
    return found


def _too_slow(results: Results) -> list[str]:
    slow = [(stem, analysis_seconds(r)) for stem, r in results.items()]
    return [f"{stem}: {s:.1f} s" for stem, s in slow if s is not None and s > ANALYSIS_SECONDS]


def _too_few(results: Results) -> list[str]:
    files = len(results)
    dynamic = sum(1 for r in results.values() if r["dynamic"])
    few = [] if files >= FILES else [f"{files} files"]
    return few + ([] if 10 * dynamic >= files - dynamic else [f"{dynamic} of them with open axes"])


#: What the issue asks of the corpus: sentence, and the function that lists what breaks it.
EXPECTATIONS: Sequence[tuple[str, Callable[[Results], list[str]]]] = (
    (f"at least {FILES} files, a tenth of them also with open axes", _too_few),
    (
        "every network valid and exact",
        lambda results: [f"{stem}: {problem_of(r)}" for stem, r in results.items() if problem_of(r)],
    ),
    (
        f"no network of plain convolutions above {MACS_PLAIN['convolution']}, no transformer above "
        f"{MACS_PLAIN['transformer']} of its MACs",
        lambda results: _macs_above(results, "plain", MACS_PLAIN),
    ),
    (
        f"no transformer above {MACS_RESIDUAL['transformer']} of its MACs with --residual",
        lambda results: _macs_above(results, "residual", MACS_RESIDUAL),
    ),
    (f"no analysis above {ANALYSIS_SECONDS:.0f} s", _too_slow),
)


def exporters_apart(results: Results) -> list[str]:
    """The networks whose two exports keep different shares of the MACs."""
    found = []
    for stem, result in results.items():
        other = results.get(stem.replace("-dynamo", "-script"))
        if result["exporter"] != "dynamo" or other is None:
            continue
        for run in ("plain", "residual"):
            a, b = result.get(run, {}).get("macs"), other.get(run, {}).get("macs")
            if a is not None and b is not None and abs(a - b) > EXPORTERS_APART:
                found.append(f"{stem.replace('-dynamo', '')} ({run}): dynamo {a:.3f}, script {b:.3f}")
    return found


def document(results: Results, command: Sequence[str]) -> dict[str, Any]:
    """Everything that corpus.json holds: what was run, on what, and each file's result."""
    packages = ("graphprune", "onnx", "onnx-ir", "onnxruntime", "numpy", "scipy")
    exported = sorted({f"{k} {v}" for r in results.values() for k, v in r.get("versions", {}).items()})
    return {
        "command": " ".join(command),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "exported_with": exported,
        "results": dict(sorted(results.items())),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from the checkout"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def one_line(stem: str, result: Result) -> str:
    """A file's result as one line of progress."""
    parts = [stem]
    for name in ("plain", "residual"):
        if name in result:
            run = result[name]
            verdict = "exact" if run["valid"] and run["exact"] else "WRONG" if run["valid"] else "INVALID"
            parts.append(f"{name}: {verdict} macs {_share(run.get('macs'))} error {_error(run.get('error'))}")
    return ", ".join([*parts, problem_of(result)]).rstrip(", ")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}" if value else "0"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _median(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.median(known):.3f}" if known else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" if i == 0 else "--:" for i in range(len(head))) + "|",
    ]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _family_rows(results: Results) -> list[list[str]]:
    families: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results.values():
        families[(result["source"], result["kind"])].append(result)
        families[("all", "")].append(result)
    rows = []
    for (source, kind), members in sorted(families.items(), key=lambda item: (item[0][0] == "all", item[0])):
        plain, residual = ([m[k] for m in members if k in m] for k in ("plain", "residual"))
        rows.append(
            [
                f"{source} {kind}".strip(),
                str(len(members)),
                str(sum(1 for m in members if all(run["valid"] for run in runs(m)))),
                str(sum(1 for m in members if not problem_of(m))),
                _median([run.get("parameters") for run in plain]),
                _median([run.get("macs") for run in plain]),
                _median([run.get("macs") for run in residual]),
                _median([analysis_seconds(m) for m in members]),
            ]
        )
    return rows


def _file_row(stem: str, result: Result) -> list[str]:
    plain, residual = result["plain"], result.get("residual", {})
    errors = [run["error"] for run in runs(result) if run.get("error") is not None]
    return [
        stem,
        result["kind"],
        str(result.get("nodes", "")),
        "yes" if all(run["valid"] for run in runs(result)) else "**no**",
        _error(max(errors, default=None)) if all(run["exact"] for run in runs(result)) else "**no**",
        _share(plain.get("parameters")),
        _share(plain.get("macs")),
        _share(residual.get("parameters")),
        _share(residual.get("macs")),
        _seconds(analysis_seconds(result)),
        _seconds(plain.get("total_seconds")),
        f"{plain.get('free', '')}/{plain.get('statistical', '')}/{plain.get('frozen', '')}",
        next((run["problem"] for run in runs(result) if run.get("problem")), ""),
    ]


def markdown(document: Mapping[str, Any]) -> tuple[str, bool]:
    """The page, and whether every expectation held."""
    results: Results = document["results"]
    machine = document["machine"]
    lines = [
        "# The corpus",
        "",
        f"`{document['command']}`, {document['date']}, on {machine['processor']} ({machine['cores']} cores); "
        + ", ".join(f"{k} {v}" for k, v in document["versions"].items())
        + ". Exported with "
        + ", ".join(document["exported_with"])
        + ".",
        "",
        "Shares are of the original at `channels=0.3`; *exact* is the largest deviation of the pruned model from the "
        f"masked original, relative to the output's scale, at most {TOLERANCE:.0e}. Files that end in `-dyn` have open "
        "axes: pruned once, compared at three sizes. Seconds are of one process; the total includes verification.",
        "",
        "## Expectations",
        "",
    ]
    held = True
    for sentence, violations in EXPECTATIONS:
        broken = violations(results)
        held = held and not broken
        lines.append(f"- {'pass' if not broken else f'FAIL ({len(broken)})'}: {sentence}")
        lines += [f"  - {line}" for line in broken]
    apart = exporters_apart(results)
    lines += ["", f"Exports of one network more than {EXPORTERS_APART} of the MACs apart: {len(apart)}."]
    lines += [f"- {line}" for line in apart]
    slowest = sorted(((analysis_seconds(r) or 0.0, stem) for stem, r in results.items()), reverse=True)[:5]
    lines += [
        "",
        "Slowest analyses: " + ", ".join(f"{stem} {seconds:.2f} s" for seconds, stem in slowest) + ".",
    ]
    head = ["family", "files", "valid", "exact", "parameters", "MACs", "MACs, residual", "analysis s"]
    lines += ["", "## By family (medians)", "", *_table(head, _family_rows(results))]
    head = [
        "file",
        "kind",
        "nodes",
        "valid",
        "exact",
        "parameters",
        "MACs",
        "parameters, residual",
        "MACs, residual",
        "analysis s",
        "total s",
        "free/statistical/frozen",
        "problem",
    ]
    lines += ["", "## Every file", "", *_table(head, [_file_row(s, r) for s, r in results.items()]), ""]
    return "\n".join(lines), held
