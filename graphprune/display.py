"""What the command line prints: one glance on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import median
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from graphprune.report import Report, group_to_dict

if TYPE_CHECKING:
    from rich.status import Status

    from graphprune.axes.groups import Group
    from graphprune.choice.sensitivity import Curve
    from graphprune.network import Network
    from graphprune.plan import Plan
    from graphprune.repair.refit import RepairReport

#: Where stderr is no terminal, steps are named after this many seconds.
PATIENCE = 2.0
#: Width of tables where stdout is no terminal.
WIDE = 160


def show(*things: RenderableType) -> None:
    """Render to stdout: in colour and to its width on a terminal, plainly elsewhere, without trailing blanks."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    with console.capture() as captured:
        for thing in things:
            console.print(thing, soft_wrap=isinstance(thing, str))
    # Not through the console: it would end the process on a broken pipe.
    sys.stdout.write(re.sub(r" +$", "", captured.get(), flags=re.MULTILINE))


class Steps:
    """Times the steps of a run and shows the current one on stderr.

    On a terminal it is a spinner; elsewhere one line a step, once :data:`PATIENCE` seconds have gone by.

    Attributes:
        seconds: Wall time by step.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._quiet = quiet
        self._step: str | None = None
        self._since = perf_counter()
        self._status: Status | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._late = False

    def __enter__(self) -> Steps:
        if self._quiet:
            return self
        if sys.stderr.isatty():
            self._status = Console(stderr=True).status("")
            self._status.start()
        else:
            self._timer = threading.Timer(PATIENCE, self._speak_up)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __call__(self, step: str) -> None:
        """Enter a step."""
        self._stop_clock()
        with self._lock:
            self._step = step
            if self._status is not None:
                self._status.update(f"{step} ...")
            elif self._late:
                self._say(step)

    def part(self, step: str, done: int, total: int) -> None:
        """Say how far a step is, on a terminal."""
        with self._lock:
            if self._status is not None and total:
                self._status.update(f"{self._step}: {step} {done}/{total} ...")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_clock()
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._step, self._late = None, False
        if self._status is not None:
            self._status.stop()

    def _stop_clock(self) -> None:
        now = perf_counter()
        if self._step is not None:
            self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._since
        self._since = now

    def _speak_up(self) -> None:
        with self._lock:
            self._late = True
            if self._step is not None:
                self._say(self._step)

    @staticmethod
    def _say(step: str) -> None:
        with suppress(OSError):  # nobody may be reading it
            print(f"graphprune: {step} ...", file=sys.stderr, flush=True)


def print_curves(curves: Sequence[Curve], groups: Sequence[Group]) -> None:
    """Each group's error where so much of it is kept, one row a group."""
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    for heading in ("group", "size", "error at the fraction kept"):
        table.add_column(heading, justify="right" if heading == "size" else "left", no_wrap=True)
    for curve in curves:
        group = groups[curve.index]
        points = [
            f"{kept / group.unit:.2f}: {error:.2g}"
            for kept, error in zip(curve.kept, curve.errors, strict=True)
        ]
        table.add_row(
            escape(curve.group),
            str(group.size),
            "  ".join(points) + ("" if curve.measured else "  (by score)"),
        )
    show(table)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout; numbers that JSON does not know become null."""
    sys.stdout.write(json.dumps(_finite(data), indent=1, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def print_text(text: str) -> None:
    """Plain lines on stdout."""
    sys.stdout.write(text + "\n")


def print_report(report: Report, source: str, target: str, *, verified: bool) -> None:
    """The table before / after."""
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, before, after, spell in (
        ("parameters", report.parameters_before, report.parameters_after, _number),
        ("MACs", report.macs_before, report.macs_after, _number),
        ("file size", report.bytes_before, report.bytes_after, _bytes),
    ):
        table.add_row(name, spell(before), spell(after), _change(before, after))
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("groups", _counts(report))
    if report.output_change is not None:
        facts.add_row(
            "largest output change", f"{report.output_change:.2g} of the output's scale, on {report.inputs}"
        )
    if report.repaired is not None and report.repaired.refitted:
        facts.add_row("repaired", _repaired(report.repaired))
    if report.max_error is not None:
        facts.add_row(
            "error", f"[green]{report.max_error:.1e}[/] of the output's scale, against the masked original"
        )
    elif not verified:
        facts.add_row("error", "[yellow]not verified[/]")
    slowest = sorted(report.seconds.items(), key=lambda item: -item[1])
    steps = ", ".join(f"{name} {value:.2g}" for name, value in slowest if name != "total" and value >= 0.05)
    facts.add_row(
        "seconds", f"{report.seconds.get('total', 0.0):.2f}" + (f" [dim]({steps})[/]" if steps else "")
    )
    notes = [f"[dim]note: {escape(note)}[/]" for note in report.notes]
    show(f"[bold]{escape(source)}[/] -> [bold]{escape(target)}[/]", table, facts, *notes)


def print_files(source: str, target: str, size: int, seconds: Mapping[str, float]) -> None:
    """What was read and written, where nothing was cut."""
    steps = sorted(seconds.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {value:.2g}" for name, value in steps if name != "total" and value >= 0.05)
    show(
        f"[bold]{escape(source)}[/] -> [bold]{escape(target)}[/], {_bytes(size)},"
        f" {seconds.get('total', 0.0):.2f} seconds" + (f" [dim]({listed})[/]" if listed else "")
    )


def _repaired(repaired: RepairReport) -> str:
    """How many layers were refitted, and what that did to their errors."""
    count = len(repaired.refitted)
    layers = f"{count} layer{'' if count == 1 else 's'} refitted"
    if any(each.before is None or each.after is None for each in repaired.refitted):
        return layers
    before, after = (
        median(getattr(each, which) for each in repaired.refitted) for which in ("before", "after")
    )
    return f"{layers}; median error of their outputs {before:.2g} -> {after:.2g} of the variance"


def _counts(report: Report) -> str:
    cut = {entry.group for entry in report.plan.cuts}
    counts = {"pruned": 0, "free but not cut": 0, "statistical": 0, "frozen": 0}
    for group in report.groups:
        counts[
            "pruned"
            if group.name in cut
            else "frozen"
            if group.frozen
            else "statistical"
            if group.statistical
            else "free but not cut"
        ] += 1
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def _change(before: float, after: float) -> str:
    if not before:
        return "-"
    ratio = after / before - 1
    colour = "green" if ratio < -0.0005 else "red" if ratio > 0.0005 else "dim"
    return f"[{colour}]{ratio:+.1%}[/]"


def _number(value: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / limit * (10 if unit == 'k' else 1):.{1 if unit == 'k' else 2}f} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f} B"


def _state(group: Group) -> str:
    if group.frozen:
        return f"[red]frozen[/]: {escape(group.frozen)}"
    if group.statistical:
        return f"[yellow]statistical[/]: {escape(group.statistical)}"
    return "[green]free[/]"


def print_groups(groups: Sequence[Group], plan: Plan | None, *, members: bool) -> None:
    """The table of groups; with a plan, what it leaves of each."""
    kept = {} if plan is None else {cut.group: cut.size - len(cut.removed) for cut in plan.cuts}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("group", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for heading in ("blocks", "parameters", "MACs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for group in groups:
        size = f"{group.size} -> {kept[group.name]}" if group.name in kept else str(group.size)
        table.add_row(
            f"[bold]{escape(group.name)}[/]",
            size,
            str(len(group.blocks)),
            _number(group.parameters),
            _number(group.macs),
            _state(group),
        )
        if members:
            for member in group.members:
                table.add_row(f"  [dim]{escape(f'{member.tensor}[{member.axis}]')} {member.role}[/]")
    free = sum(not g.frozen and not g.statistical for g in groups)
    statistical = sum(bool(g.statistical) and not g.frozen for g in groups)
    frozen = len(groups) - free - statistical
    show(table, f"{len(groups)} groups: {free} free, {statistical} statistical, {frozen} frozen")


def print_notes(network: Network) -> None:
    """What could not be worked out."""
    show(*(f"[dim]note: {escape(f'{name}: {reason}')}[/]" for name, reason in network.analysis.graph.notes))


def network_to_dict(network: Network, source: str) -> dict[str, Any]:
    """Everything that is known of a model's groups, as JSON can hold it."""
    from graphprune import __version__
    from graphprune.cost import macs, parameters

    return {
        "graphprune": __version__,
        "input": source,
        "input_shapes": {name: list(shape) for name, shape in network.input_shapes.items()},
        "parameters": parameters(network.model),
        "macs": macs(network.analysis),
        "groups": [group_to_dict(group) for group in network.groups],
        "notes": [f"{name}: {reason}" for name, reason in network.analysis.graph.notes],
    }
