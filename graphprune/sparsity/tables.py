"""What the command line prints of sparse weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from graphprune.display import show
from graphprune.sparsity.report import SparsityReport, WeightReport

#: Reasons listed without -v.
LISTED = 4


def print_weights(report: SparsityReport) -> None:
    """One row a weight: what it holds, whether it can have the pattern, and why not."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("weight", overflow="fold")
    table.add_column("op", no_wrap=True)
    for heading in ("sums over", "outputs", "zeros", "holds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"{report.pattern} on {report.target}", overflow="fold")
    for entry in report.weights:
        layout = entry.layout
        table.add_row(
            f"[bold]{escape(entry.name)}[/]",
            entry.op,
            "-" if layout is None else str(layout.contracted),
            "-" if layout is None else str(layout.outputs),
            "-" if entry.zeros is None else f"{entry.zeros:.1%}",
            entry.holds or "-",
            _verdict(entry),
        )
    able = sum(entry.eligible for entry in report.weights)
    show(table, f"{len(report.weights)} weights, {able} of them can be {report.pattern} for {report.target}")


def _verdict(entry: WeightReport) -> str:
    if not entry.eligible:
        return f"[red]no[/]: {escape(entry.reason or '')}"
    tail = f", its last {entry.tail} channels stay dense" if entry.tail else ""
    if entry.unlikely is not None:
        return f"[yellow]yes[/], gain unlikely: {escape(entry.unlikely)}{tail}"
    return f"[green]yes[/]{tail}"


def print_sparsity(report: SparsityReport, *, verified: bool, weights: bool) -> None:
    """The summary of a run.

    Args:
        report: What was done.
        verified: The result was looked at again.
        weights: One row a weight too.
    """
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    done = report.sparse
    counts = f"[green]{len(done)}[/] of {len(report.weights)} weights, {report.share:.1%} of their elements"
    facts.add_row(report.pattern, f"{counts}; {report.method}")
    kept = [(entry.kept, entry.size) for entry in done if entry.kept is not None]
    if kept:
        share = sum(part * size for part, size in kept) / sum(size for _, size in kept)
        facts.add_row("magnitude kept", f"{share:.1%}")
    if report.permutation is not None:
        facts.add_row("channels reordered", _permutation(report.permutation))
    unlikely = sum(entry.unlikely is not None for entry in done)
    if unlikely and report.target == "tensorrt":
        facts.add_row("gain", f"likely for {len(done) - unlikely}, unlikely for {unlikely} (small layers)")
    if verified:
        rest = "what stays was fitted" if report.layers else "[green]nothing else changed[/]"
        facts.add_row("checked", f"the weights hold the pattern; {rest}")
    else:
        facts.add_row("checked", "[yellow]no[/]")
    reasons = Counter(entry.reason for entry in report.skipped if entry.reason)
    skipped = [
        f"[dim]left as {'it was' if count == 1 else 'they were'}, {count}: {escape(reason)}[/]"
        for reason, count in reasons.most_common(None if weights else LISTED)
    ]
    notes = [f"[dim]note: {escape(note)}[/]" for note in report.notes]
    show(facts, *skipped, *notes)
    if weights:
        print_weights(report)


def _permutation(permutation: Mapping[str, Any]) -> str:
    kept = permutation["kept"]
    return (
        f"magnitude kept {kept['unpermuted']:.1%} as they were, {kept['permuted']:.1%} reordered,"
        f" {kept['bound']:.1%} without a pattern"
    )
