"""The tables of accuracy.md, made of accuracy.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Cells = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Aim:
    """The most that the metric may lose at a share of the MACs."""

    network: str
    macs: float
    loss: float


AIMS = (
    Aim("resnet56", 0.7, 0.01),
    Aim("resnet56", 0.5, 0.04),
    Aim("minilm", 0.8, 0.01),
    Aim("minilm", 0.7, 0.03),
)
#: Promised and measured latency may differ by so much of the measured.
LATENCY = 0.1
#: Seconds that calibration and repair of ResNet-50 may take.
REPAIR = 600

TITLES = {
    "resnet56": "ResNet-56 on CIFAR-10",
    "resnet20": "ResNet-20 on CIFAR-10",
    "minilm": "MiniLM-L6 on STS-B",
    "ppocr_direction": "PP-OCR direction classifier on rendered words",
    "ppocr_recogniser": "PP-OCR recogniser on rendered words",
}


def table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def markdown(results: Mapping[str, Any]) -> str:
    """The whole of accuracy.md."""
    lines = ["# Accuracy without training", ""]
    lines += [f"- {key}: {value}" for key, value in results["facts"].items()]
    cells: Cells = results["cells"]
    for section in (_aims(cells), *(_network(cells, name) for name in TITLES), _method()):
        if written := list(section):
            lines += ["", *written]
    return "\n".join(lines).rstrip() + "\n"


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _aims(cells: Cells) -> Iterator[str]:
    yield "## Aims"
    yield ""
    rows = []
    for aim in AIMS:
        key = f"{aim.network}/graphprune/obs/allocated/repair/{aim.macs:g}"
        cell, whole = cells.get(key, {}), cells.get(f"{aim.network}/unpruned", {})
        what = f"{TITLES[aim.network]} at {aim.macs:g} of the MACs, default method"
        if "metric" in cell and "metric" in whole:
            loss = whole["metric"] - cell["metric"]
            rows.append([what, f"loses at most {aim.loss:.3f}", f"{loss:.4f}", _verdict(loss <= aim.loss)])
        else:
            rows.append([what, f"loses at most {aim.loss:.3f}", cell.get("error", "not measured"), ""])
    for name in ("resnet56", "resnet50"):
        cell = cells.get(f"{name}/latency/0.6", {})
        what = f"latency=0.6, {name}, one image"
        aim_text = f"foretold within {LATENCY:.0%} of measured"
        if "measured" in cell:
            off = abs(cell["predicted"] / cell["measured"] - 1)
            figures = f"foretold {cell['predicted']:.3f}, measured {cell['measured']:.3f}"
            rows.append([what, aim_text, f"{figures} ({off:.1%} off)", _verdict(off <= LATENCY)])
        else:
            rows.append([what, aim_text, cell.get("error", "not measured"), ""])
    cell = cells.get("resnet50/repair/channels-0.3", {})
    what = "calibration and repair, ResNet-50, 224 x 224, 256 inputs"
    if "seconds" in cell:
        memory = f"{cell['peak_mb']:.0f} MB at most, {cell['inputs_mb']:.0f} MB of them the inputs"
        figures = f"{cell['seconds']:.0f} s, {memory}"
        rows.append([what, f"under {REPAIR} s", figures, _verdict(cell["seconds"] < REPAIR)])
    else:
        rows.append([what, f"under {REPAIR} s", cell.get("error", "not measured"), ""])
    yield from table(["what", "aim", "result", ""], rows)


def _network(cells: Cells, name: str) -> Iterator[str]:
    mine = {key: cell for key, cell in cells.items() if key.startswith(f"{name}/")}
    whole = mine.get(f"{name}/unpruned", {})
    if "metric" not in whole:
        return
    methods: dict[tuple[str, ...], dict[float, Mapping[str, Any]]] = {}
    for key, cell in mine.items():
        parts = key.split("/")
        if len(parts) == 6:
            methods.setdefault(tuple(parts[1:5]), {})[float(parts[5])] = cell
    shares = sorted({share for found in methods.values() for share in found}, reverse=True)
    yield f"## {TITLES[name]}"
    yield ""
    yield (
        f"{whole['name']}, {whole['samples']} samples, unpruned {_figure(whole['metric'])}, "
        f"{whole['macs'] / 1e6:.1f} M MACs. Columns: share of the MACs that stays."
    )
    yield ""
    notes: dict[str, str] = {}
    rows = []
    for method, found in sorted(methods.items(), key=lambda item: _order(item[0], item[1])):
        tool, score, scope, repair = method
        kept = "repaired" if repair == "repair" else ""
        times = [cell["cpu_seconds"] for cell in found.values() if "cpu_seconds" in cell and "metric" in cell]
        figures = [_cell(found.get(share), notes) for share in shares]
        seconds = f"{sum(times) / len(times):.0f}" if times else ""
        rows.append([tool, score, scope, kept, *figures, seconds])
    header = ["tool", "score", "scope", "repair", *(f"{share:g}" for share in shares), "CPU s"]
    yield from table(header, rows)
    if notes:
        yield ""
        yield from (f"{mark}: {reason}  " for reason, mark in notes.items())


def _order(method: tuple[str, ...], found: Mapping[float, Mapping[str, Any]]) -> tuple[Any, ...]:
    """graphprune first; the best at the smallest share first within a tool."""
    metrics = [-cell.get("metric", 0.0) for _, cell in sorted(found.items())]
    return method[0] != "graphprune", method[0], -len(metrics), metrics


def _figure(metric: float) -> str:
    return f"{100 * metric:.1f}"


def _cell(cell: Mapping[str, Any] | None, notes: dict[str, str]) -> str:
    if cell is None:
        return ""
    if "metric" in cell:
        return _figure(cell["metric"])
    return f"({notes.setdefault(cell['error'], chr(ord('a') + len(notes) % 26))})"


def _method() -> Iterator[str]:
    yield "## How"
    yield ""
    yield (
        "No training anywhere. Every method is given the same 512 unlabelled inputs: CIFAR-10 training images; "
        "sentences of STS-B's development set (there is no training split beside it) that the test set lacks, cut to "
        "16 tokens; rendered words other than those judged on. Metrics are in per cent, in ONNX Runtime. MACs of every "
        "result are counted by graphprune on the .onnx file; rivals are given the ratio that reaches the target by "
        "bisection, within 3 %. *uniform* removes the same share of each group; *allocated* divides the budget by the "
        "groups' measured errors; *global* is the rivals' one threshold over all layers."
    )
    yield ""
    yield (
        "torch-pruning prunes the convolutions inside the blocks of a PyTorch twin whose logits agree with the file to "
        "1e-4: it does not follow the padded shortcuts. Its Taylor score takes the network's own predictions for "
        "labels. onnxsim simplifies the model first, since its pruning expects BatchNormalization folded. *CPU s* is "
        "the mean of the row's prunings: rivals' without their start and their search for the ratio; graphprune's with "
        "scores and error curves only in the first cell of a score, since the others take them over."
    )
