"""The command line: arguments in, exit codes out.

    graphprune model.onnx --channels 0.3        prune, verify, write model.pruned.onnx
    graphprune inspect model.onnx               list the coupling groups
    graphprune inspect model.onnx --why A B     the chain of operations that ties two tensors

Everything heavy is imported by the verbs themselves, so that ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from graphprune.arguments import parse
from graphprune.errors import BudgetError, GraphPruneError, OptionError, PlanError, VerificationError

if TYPE_CHECKING:
    from graphprune.choice.budget import Budget
    from graphprune.choice.search import Drop
    from graphprune.network import Pruned
    from graphprune.settings import Settings

#: Exit codes. An interrupted command ends with 128 + the signal's number, as shells have it.
OK, FAILED, BAD_INPUT, BUG = 0, 1, 2, 70


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0, 1 (verification failed, or a budget out of reach), 2 (bad input), 130 (interrupted).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(given)
        with _terminable(), _plain_warnings(options.quiet):
            code = _inspect(options) if options.verb == "inspect" else _prune(options)
            sys.stdout.flush()
            return code
    except GraphPruneError as error:
        return _fail(str(error), FAILED if isinstance(error, VerificationError | BudgetError) else BAD_INPUT)
    except BrokenPipeError:
        # Whoever read us has seen enough. The interpreter would complain once more when it closes stdout.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", 128 + signal.SIGINT)
    except _Terminated:
        return _fail("terminated; nothing was written", 128 + signal.SIGTERM)
    except MemoryError:
        return _fail("out of memory; nothing was written", BAD_INPUT)
    except Exception as error:
        import traceback

        traceback.print_exc()
        return _fail(f"internal error, please report it with the lines above: {error!r}", BUG)


def _fail(message: str, code: int) -> int:
    with suppress(OSError):
        print(f"graphprune: error: {' '.join(message.split())}", file=sys.stderr)
    return code


# -- what the arguments mean ------------------------------------------------------------------------------------


def _input_shapes(options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in options.input_shape:
        if name in shapes:
            raise OptionError(f"--input-shape gives {name!r} twice")
        shapes[name] = shape
    return shapes


def _output_path(options: argparse.Namespace) -> Path:
    """Where the result goes; complains now rather than after the work."""
    source = Path(options.model)
    if source.is_dir():
        raise OptionError(f"{options.model}: a folder; give the .onnx file in it")
    target: Path = options.output or source.with_name(f"{source.stem}.pruned.onnx")
    for path, what in ((target, "output"), (options.plan_out, "plan")):
        if path is None:
            continue
        if path.is_dir():
            raise OptionError(f"the {what} {str(path)!r} is a folder; give the name of the file to write")
        if not path.parent.is_dir():
            raise OptionError(
                f"the folder {str(path.parent)!r} for the {what} does not exist; create it first"
            )
        if _same_file(path, source):
            raise OptionError(
                f"the {what} {str(path)!r} is the input itself, which is never changed; give another name"
            )
    if options.plan_out is not None and _same_file(options.plan_out, target):
        raise OptionError(f"the model and the plan would both be written to {str(target)!r}")
    return target


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b))
    except OSError:
        return False


def _budget(options: argparse.Namespace) -> Budget | None:
    """The budget, once it is clear that one thing is asked for."""
    from graphprune.choice.budget import only_budget

    budget = only_budget(
        {kind: getattr(options, kind) for kind in ("macs", "params", "size", "latency", "energy")}
    )
    ways = {
        "--channels": options.channels is not None or options.channels_for,
        "a budget": budget is not None,
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
    if not given and not options.dead and not options.blocks:
        raise OptionError(
            "say what to remove: --channels RATIO (such as 0.3), --channels-for GLOB=RATIO, a budget such as --macs"
            " 0.5, --max-drop, --dead, --blocks N, or --plan FILE"
        )
    if options.max_drop is None and (options.metric is not None or options.metric_data is not None):
        raise OptionError("--metric and --metric-data judge trials of --max-drop, which is missing")
    if options.max_drop is not None and options.calib is None and options.metric_data is None:
        raise OptionError("--max-drop is judged on inputs: give some with --calib or --metric-data")
    return budget


def _settings(options: argparse.Namespace, budget: Budget | None) -> Settings:
    from graphprune.choice.choose import Request
    from graphprune.plan import Plan
    from graphprune.scores import find_score
    from graphprune.settings import Settings

    request = Request(
        options.channels or 0.0,
        options.round_to,
        options.residual,
        options.include,
        options.exclude,
        dict(options.channels_for),
    )
    if options.score is not None:
        find_score(options.score)
    return Settings(
        request,
        budget,
        options.score,
        options.scope,
        options.keep_at_least,
        Plan.load(options.plan) if options.plan is not None else None,
        options.repair,
        options.dead,
        options.blocks,
        options.blocks_by,
        _input_shapes(options),
        options.seed,
        options.max_drop is not None,
    )


def _drop(options: argparse.Namespace) -> Drop | None:
    if options.max_drop is None:
        return None
    from graphprune.choice.metrics import find_metric
    from graphprune.choice.search import Drop

    if options.metric is not None:
        find_metric(options.metric)
    return Drop(options.max_drop, options.metric, options.jobs)


# -- verbs ------------------------------------------------------------------------------------------------------


def _prune(options: argparse.Namespace) -> int:
    target = _output_path(options)
    budget = _budget(options)
    start = perf_counter()
    from graphprune.display import Steps

    with Steps(quiet=options.quiet) as steps:
        steps("imports")
        from graphprune.calibration.preprocess import Preprocess
        from graphprune.model import as_ir, staged
        from graphprune.pruning import Pruning, finish

        settings, drop = _settings(options, budget), _drop(options)
        preprocess = Preprocess.parse(options.preprocess) if options.preprocess is not None else None
        steps("loading")
        source, _ = as_ir(options.model)
        pruning = Pruning(
            source,
            settings,
            calibration=options.calib,
            preprocess=preprocess,
            verify=not options.no_verify,
            progress=steps,
        )
        pruned = finish(pruning, drop, options.metric_data)
        curves = pruning.selection.curves if options.sensitivity is not None else None
        steps("writing")
        with staged(pruned.model, target, sources=[options.model]) as file:
            pruned.report.bytes_after = file.size
            if not options.no_verify:
                pruning.check(pruned, file.path)
            steps("writing")
            with _beside(options.plan_out, pruned) as commit_plan:
                file.commit()
                commit_plan()
        if curves is not None:
            from graphprune.choice.sensitivity import save_curves

            save_curves(curves, pruning.network.groups, options.sensitivity)
    pruned.report.seconds = {**steps.seconds, "total": perf_counter() - start}
    _print_report(options, pruned, target)
    if curves is not None and not (options.quiet or options.json):
        from graphprune import display

        display.print_curves(curves, pruning.network.groups)
    return OK


@contextmanager
def _beside(path: Path | None, pruned: Pruned) -> Iterator[Callable[[], None]]:
    """Write the plan under a temporary name; the function that is yielded puts it in place."""
    if path is None:
        yield lambda: None
        return
    import tempfile

    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        pruned.report.plan.save(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are for the owner alone
        yield lambda: _rename(temporary, path)
    except OSError as error:
        raise PlanError(f"the plan {str(path)!r} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _rename(temporary: Path, path: Path) -> None:
    temporary.replace(path)


def _print_report(options: argparse.Namespace, pruned: Pruned, target: Path) -> None:
    from graphprune import display

    report = pruned.report
    if options.json:
        from graphprune import __version__

        display.print_json(
            {
                "graphprune": __version__,
                "input": str(options.model),
                "output": str(target),
                "plan": None if options.plan_out is None else str(options.plan_out),
                "verified": not options.no_verify,
                **report.to_dict(),
            }
        )
    elif not options.quiet:
        display.print_report(report, options.model, str(target), verified=not options.no_verify)
        if options.verbose:
            display.print_groups(report.groups, report.plan, members=options.verbose > 1)


def _inspect(options: argparse.Namespace) -> int:
    shapes = _input_shapes(options)
    from graphprune import display

    with display.Steps(quiet=options.quiet) as steps:
        steps("imports")
        from graphprune.model import as_ir
        from graphprune.pipeline import analyze_ir

        steps("loading")
        model, _ = as_ir(options.model)
        steps("analysis")
        network = analyze_ir(model, shapes)
        if options.why:
            from graphprune.axes.coupling import why

            answer = why(network, *options.why)
    if options.why:
        if options.json:
            display.print_json(answer.to_dict())
        else:
            display.print_text(str(answer))
    elif options.json:
        display.print_json(display.network_to_dict(network, options.model))
    else:
        display.print_groups(network.groups, None, members=options.verbose > 0)
        display.print_notes(network)
    return OK


# -- signals and warnings ---------------------------------------------------------------------------------------


class _Terminated(BaseException):
    """SIGTERM; not an Exception, so that nothing on the way takes it for an error."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that temporary files are removed."""

    def terminate(signum: int, frame: object) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _plain_warnings(quiet: bool) -> Iterator[None]:
    """Warnings as one line each, without the place in the code that raised them."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        with suppress(OSError):
            print(f"graphprune: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        if quiet:
            warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    sys.exit(main())
