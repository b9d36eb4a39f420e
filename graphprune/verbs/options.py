"""What the options of a pruning run mean: checked against each other before any work is done."""

from __future__ import annotations

import argparse
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.errors import OptionError

if TYPE_CHECKING:
    from graphprune.choice.budget import Budget
    from graphprune.choice.search import Drop
    from graphprune.settings import Settings
    from graphprune.sparsity.pattern import Pattern
    from graphprune.sparsity.sparsify import SparsitySettings


def input_shapes(options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Sizes for inputs with dynamic dimensions."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in options.input_shape:
        if name in shapes:
            raise OptionError(f"--input-shape gives {name!r} twice")
        shapes[name] = shape
    return shapes


def output_path(options: argparse.Namespace) -> Path:
    """Where the result goes; complains now rather than after the work."""
    source = Path(options.model)
    if source.is_dir():
        raise OptionError(f"{options.model}: a folder; give the .onnx file in it")
    target: Path = options.output or source.with_name(f"{source.stem}.pruned.onnx")
    taken: dict[str, Path] = {}
    for path, what in (
        (target, "model"),
        (options.plan_out, "plan"),
        (options.nm_packed, "packed file"),
    ):
        if path is None:
            continue
        if path.is_dir():
            raise OptionError(f"the {what} {str(path)!r} is a folder; give the name of the file to write")
        if not path.parent.is_dir():
            raise OptionError(
                f"the folder {str(path.parent)!r} for the {what} does not exist; create it first"
            )
        if same_file(path, source):
            raise OptionError(
                f"the {what} {str(path)!r} is the input itself, which is never changed; give another name"
            )
        for other, there in taken.items():
            if same_file(path, there):
                raise OptionError(f"the {other} and the {what} would both be written to {str(path)!r}")
        taken[what] = path
    return target


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file."""
    try:
        return a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b))
    except OSError:
        return False


def pattern_of(options: argparse.Namespace) -> Pattern | None:
    """The sparsity that weights are to have; None where none is asked for."""
    from graphprune.sparsity.pattern import NM, Unstructured, parse_block

    if options.nm is not None and options.unstructured is not None:
        raise OptionError("--nm and --unstructured exclude each other; give one")
    block = (1, 1) if options.block is None else parse_block(options.block)
    if options.nm_packed is not None and (options.unstructured is not None or block != (1, 1)):
        raise OptionError("--nm-packed packs N:M patterns of single weights: give --nm without --block")
    if options.nm is not None:
        return NM.parse(options.nm, block)
    if options.unstructured is not None:
        return Unstructured(options.unstructured, block)
    for given, flag in (
        (options.block, "--block"),
        (options.nm_method, "--nm-method"),
        (options.nm_packed, "--nm-packed"),
        (options.permute or None, "--permute"),
    ):
        if given is not None:
            raise OptionError(f"{flag} says how weights become sparse: give --nm, such as --nm 2:4, too")
    return None


def sparsity(options: argparse.Namespace) -> SparsitySettings | None:
    """How weights become sparse; None where that is not asked for."""
    pattern = pattern_of(options)
    if pattern is None:
        return None
    from graphprune.sparsity.sparsify import SparsitySettings

    return SparsitySettings(
        pattern,
        options.nm_target,
        options.nm_method,
        options.repair,
        options.permute,
        options.permute_seconds,
        options.nm_tail,
        options.include if not cuts(options) else (),
        options.exclude if not cuts(options) else (),
        input_shapes(options),
        options.seed,
    )


def cuts(options: argparse.Namespace) -> bool:
    """Whether anything is to be cut out of the network."""
    return bool(
        options.channels is not None
        or options.channels_for
        or options.plan is not None
        or options.dead
        or options.blocks
        or options.max_drop is not None
        or any(getattr(options, kind) is not None for kind in ("macs", "params", "size", "latency", "energy"))
    )


def budget(options: argparse.Namespace) -> Budget | None:
    """The budget, once it is clear that one thing is asked for."""
    from graphprune.choice.budget import only_budget

    found = only_budget(
        {kind: getattr(options, kind) for kind in ("macs", "params", "size", "latency", "energy")}
    )
    ways = {
        "--channels": options.channels is not None or options.channels_for,
        "a budget": found is not None,
        "--max-drop": options.max_drop is not None,
        "--plan": options.plan is not None,
    }
    given = [way for way, there in ways.items() if there]
    if options.plan is not None and (len(given) > 1 or options.include or options.exclude):
        raise OptionError(
            "--plan says what goes; leave out --channels, --channels-for, budgets, --include and --exclude"
        )
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)} exclude each other; give one")
    if options.keep_float32 and options.precision == "keep":
        raise OptionError("--keep-float32 names exceptions to --precision, which is missing")
    others = (options.nm, options.unstructured, None if options.precision == "keep" else options.precision)
    if not cuts(options) and all(other is None for other in others):
        raise OptionError(
            "say what to remove: --channels RATIO (such as 0.3), --channels-for GLOB=RATIO, a budget such as --macs"
            " 0.5, --max-drop, --dead, --blocks N, --plan FILE, --nm 2:4, or --precision fp16"
        )
    if options.max_drop is None and (options.metric is not None or options.metric_data is not None):
        raise OptionError("--metric and --metric-data judge trials of --max-drop, which is missing")
    if options.max_drop is not None and options.calib is None and options.metric_data is None:
        raise OptionError("--max-drop is judged on inputs: give some with --calib or --metric-data")
    return found


def settings(options: argparse.Namespace, found: Budget | None) -> Settings:
    """What to cut."""
    from graphprune.choice.choose import Request
    from graphprune.plan import Plan
    from graphprune.scores import find_score
    from graphprune.settings import Settings

    request = Request(
        options.channels or 0.0,
        _round_to(options),
        options.residual,
        options.include,
        options.exclude,
        dict(options.channels_for),
    )
    if options.score is not None:
        find_score(options.score)
    return Settings(
        request,
        found,
        options.score,
        options.scope,
        options.keep_at_least,
        Plan.load(options.plan) if options.plan is not None else None,
        options.repair,
        options.dead,
        options.blocks,
        options.blocks_by,
        input_shapes(options),
        options.seed,
        options.max_drop is not None,
    )


def _round_to(options: argparse.Namespace) -> int | None:
    """What groups keep multiples of: with a pattern, of what its target asks for, so that weights stay eligible."""
    pattern = pattern_of(options)
    if options.round_to is not None or pattern is None:
        given: int | None = options.round_to
        return given
    from graphprune.sparsity.eligibility import find_target
    from graphprune.sparsity.pattern import NM

    target = find_target(options.nm_target, pattern)
    unit = pattern.m * pattern.block[1] if isinstance(pattern, NM) else 1
    return lcm(unit, target.channels, target.outputs)


def drop(options: argparse.Namespace) -> Drop | None:
    """The accuracy that may be lost; None where something else says how much goes."""
    if options.max_drop is None:
        return None
    from graphprune.choice.metrics import find_metric
    from graphprune.choice.search import Drop

    if options.metric is not None:
        find_metric(options.metric)
    return Drop(options.max_drop, options.metric, options.jobs)
