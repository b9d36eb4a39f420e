"""What the command line prints of an engine."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from graphprune.display import show
from graphprune.tensorrt.bench import Timed
from graphprune.tensorrt.handover import EngineReport
from graphprune.tensorrt.numbers import Numbers
from graphprune.tensorrt.probe import PROVIDER
from graphprune.tensorrt.verdict import Verdict

_COLOURS = {
    Verdict.SPARSE_USED: "green",
    Verdict.ELIGIBLE_NOT_CHOSEN: "yellow",
    Verdict.NOT_ELIGIBLE: "red",
    Verdict.UNKNOWN: "dim",
}


def print_engine(report: EngineReport) -> None:
    """Files, the verdict on sparse weights, and what was found on this machine."""
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("plan", f"{escape(str(report.plan_path))}, for TensorRT {report.plan.major}")
    facts.add_row("script", f"{escape(str(report.script_path))}, runs trtexec")
    if report.built is not None:
        built = report.built
        facts.add_row(
            "engine",
            f"[green]{escape(str(built.engine))}[/], by TensorRT {built.version} in {built.seconds:.1f} s",
        )
    if report.provider_path is not None:
        facts.add_row("options", f"{escape(str(report.provider_path))}, for ONNX Runtime")
    if report.session is not None:
        count = report.session.placed[PROVIDER]
        facts.add_row(
            "ONNX Runtime",
            f"[green]{report.session.version} computed {count} {'node' if count == 1 else 'nodes'} by TensorRT[/]",
        )
    for numbers in (report.numbers, report.session_numbers):
        if numbers is not None:
            facts.add_row("numbers", _numbers(numbers))
    verdict = report.judgement
    colour = _COLOURS[verdict.verdict]
    facts.add_row("sparse kernels", f"[{colour}]{verdict.verdict.value}[/]: {escape(verdict.reason)}")
    eligible = [entry for entry in report.weights.weights if entry.eligible]
    holding = [entry for entry in eligible if entry.name in verdict.holding]
    likely = sum(entry.unlikely is None for entry in holding)
    facts.add_row(
        "weights",
        f"{len(holding)} of {len(eligible)} that can be 2:4 hold it; a gain is likely for {likely} of them",
    )
    conformance = report.conformance
    if conformance is not None:
        said = "parses and builds" if conformance.builds else "parses" if conformance.parses else "refuses"
        facts.add_row(
            "form",
            f"TensorRT-RTX {conformance.version} {said} it (types and shapes; it says nothing of speed)",
        )
    notes = [f"[dim]note: {escape(note)}[/]" for note in report.notes]
    show(facts, *([_times(report.bench)] if report.bench else []), *notes)


def _numbers(numbers: Numbers) -> str:
    worst = numbers.worst
    if worst is None:
        return f"no output has a bound; run on {escape(numbers.inputs)}"
    return (
        f"output {escape(repr(worst.name))} differs from ONNX Runtime's by {worst.difference:.1e} of its scale on"
        f" {escape(numbers.inputs)}; {worst.bound:.1e} is allowed in {numbers.kind}"
    )


def _times(bench: Sequence[Timed]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("engine", "types"):
        table.add_column(column, overflow="fold")
    table.add_column("median ms", justify="right")
    table.add_column("against the first")
    table.add_column("against the one before")
    for timed in bench:
        table.add_row(
            escape(timed.name),
            ", ".join(timed.floats),
            f"{timed.milliseconds:.4f}",
            "" if timed.gain is None else str(timed.gain),
            "" if timed.over_last is None else str(timed.over_last),
        )
    return table
