"""What the command line prints of an engine."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from graphprune.display import show
from graphprune.tensorrt.handover import EngineReport
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
    show(facts, *notes)
