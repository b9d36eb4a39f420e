"""What the command line prints of a cast."""

from __future__ import annotations

from collections import Counter

from rich.markup import escape
from rich.table import Table

from graphprune.display import show
from graphprune.passes.cast_precision import PrecisionReport

#: Reasons listed without -v.
LISTED = 4


def print_precision(report: PrecisionReport, *, verified: bool, nodes: bool) -> None:
    """How much was lowered, why the rest was not, and how far the outputs are off.

    Args:
        report: What was done.
        verified: Outputs were compared.
        nodes: Every node that stays float32.
    """
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    low, high = report.contractions
    facts.add_row(
        report.precision,
        f"[green]{len(report.lowered)}[/] nodes, {low} of {low + high} layers with weights;"
        f" {report.casts} casts, {report.weights} weights",
    )
    if report.max_error:
        name, error = max(
            report.max_error.items(), key=lambda item: item[1] / report.bounds.get(item[0], 1.0)
        )
        bound = report.bounds.get(name)
        allowed = "" if bound is None else f", {bound:.1e} allowed"
        facts.add_row("rounding", f"[green]{error:.1e}[/] of the output's scale{allowed} ({escape(name)})")
    elif not verified:
        facts.add_row("rounding", "[yellow]not verified[/]")
    reasons = Counter(kept.reason for kept in report.kept)
    lines = [
        f"[dim]float32, {count}: {escape(reason)}[/]"
        for reason, count in reasons.most_common(None if nodes else LISTED)
    ]
    lines += [f"[dim]note: {escape(note)}[/]" for note in report.notes]
    show(facts, *lines)
