"""``graphprune MODEL``: cut, make sparse, prove, write."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from graphprune.errors import GraphPruneError, ModelError, PlanError
from graphprune.verbs import options as meaning
from graphprune.verbs.engine import engine_settings, hand_over_file

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphprune.calibration import Calibration
    from graphprune.display import Steps
    from graphprune.network import Pruned
    from graphprune.pruning import Pruning
    from graphprune.sparsity.sparsify import Sparsifier, SparsitySettings
    from graphprune.tensorrt.handover import EngineReport


def run(options: argparse.Namespace) -> int:
    """Prune, make sparse, write; print a report.

    Raises:
        GraphPruneError: Whatever went wrong; nothing was written then.
    """
    target = meaning.output_path(options)
    meaning.pattern_of(options)  # these complain now rather than after the imports
    meaning.budget(options)
    start = perf_counter()
    from graphprune.display import Steps

    pruning: Pruning | None = None
    pruned: Pruned | None = None
    with Steps(quiet=options.quiet) as steps:
        steps("imports")
        from graphprune.model import as_ir, copy

        sparsity = meaning.sparsity(options)
        engine = None if options.tensorrt is None else engine_settings(options, options.tensorrt)
        if meaning.cuts(options):
            from graphprune.pruning import finish

            pruning = _pruning(options, steps)
            pruned = finish(pruning, meaning.drop(options), options.metric_data)
            model, calibration = pruned.model, pruning.calibration
            if sparsity is not None and not options.no_verify:
                pruning.check(pruned)  # now: what follows changes the answers
        else:
            steps("loading")
            source, _ = as_ir(options.model)
            model, calibration = copy(source), _calibration(options, source, steps)
        sparsifier = None
        if sparsity is not None:
            sparsifier = _sparsifier(model, sparsity, calibration, steps, not options.no_verify)
        size = _write(options, target, model, pruning, pruned, sparsifier, steps)
        report = None if engine is None else hand_over_file(target, engine, steps)
    seconds = {**steps.seconds, "total": perf_counter() - start}
    if pruned is not None:
        pruned.report.bytes_after = size
        pruned.report.seconds = seconds
    _print(options, target, size, pruning, pruned, sparsifier, report, seconds)
    return 0


def _pruning(options: argparse.Namespace, steps: Steps) -> Pruning:
    from graphprune.calibration.preprocess import Preprocess
    from graphprune.model import as_ir
    from graphprune.pruning import Pruning

    settings = meaning.settings(options, meaning.budget(options))
    preprocess = Preprocess.parse(options.preprocess) if options.preprocess is not None else None
    meaning.drop(options)  # a metric that is not there is said before the work
    steps("loading")
    source, _ = as_ir(options.model)
    return Pruning(
        source,
        settings,
        calibration=options.calib,
        preprocess=preprocess,
        verify=not options.no_verify,
        progress=steps,
    )


def _calibration(options: argparse.Namespace, source: ir.Model, steps: Steps) -> Calibration | None:
    """The inputs of a run that cuts nothing."""
    if options.calib is None:
        return None
    from graphprune.calibration import load_calibration
    from graphprune.calibration.preprocess import Preprocess
    from graphprune.graph.twin import build_twin

    preprocess = Preprocess.parse(options.preprocess) if options.preprocess is not None else None
    steps("calibration inputs")
    graph = build_twin(source, meaning.input_shapes(options))
    return load_calibration(options.calib, graph, preprocess=preprocess, seed=options.seed)


def _sparsifier(
    model: ir.Model, settings: SparsitySettings, calibration: Calibration | None, steps: Steps, verify: bool
) -> Sparsifier:
    from graphprune.sparsity.sparsify import Sparsifier

    sparsifier = Sparsifier(model, settings, calibration, steps, verify=verify)
    sparsifier.run()
    return sparsifier


def _write(
    options: argparse.Namespace,
    target: Path,
    model: ir.Model,
    pruning: Pruning | None,
    pruned: Pruned | None,
    sparsifier: Sparsifier | None,
    steps: Steps,
) -> int:
    """Write the model and what goes with it, check the file, then put all in place; bytes of the model."""
    from graphprune.model import staged

    steps("writing")
    with ExitStack() as files:
        file = files.enter_context(staged(model, target, sources=[options.model]))
        if not options.no_verify:
            if sparsifier is not None:
                sparsifier.check(file.path)
            elif pruning is not None and pruned is not None:
                pruned.report.bytes_after = file.size
                pruning.check(pruned, file.path)
            steps("writing")
        commits: list[Callable[[], object]] = []
        if options.plan_out is not None and pruned is not None:
            commits.append(files.enter_context(_beside(options.plan_out, pruned.report.plan.save, "plan")))
        if options.nm_packed is not None and sparsifier is not None:
            commits.append(
                files.enter_context(_beside(options.nm_packed, sparsifier.save_packed, "packed file"))
            )
        if pruning is not None and options.sensitivity is not None:
            _save_curves(pruning, options.sensitivity)
        size = file.size
        file.commit()
        for commit in commits:
            commit()
    return size


def _save_curves(pruning: Pruning, path: Path) -> None:
    from graphprune.choice.sensitivity import save_curves

    save_curves(pruning.selection.curves, pruning.network.groups, path)


@contextmanager
def _beside(path: Path, save: Callable[[Path], object], what: str) -> Iterator[Callable[[], object]]:
    """Write a file under a temporary name; the function that is yielded puts it in place."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        save(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are for the owner alone
        yield lambda: temporary.replace(path)
    except OSError as error:
        kind: type[GraphPruneError] = PlanError if what == "plan" else ModelError
        raise kind(f"the {what} {str(path)!r} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _print(
    options: argparse.Namespace,
    target: Path,
    size: int,
    pruning: Pruning | None,
    pruned: Pruned | None,
    sparsifier: Sparsifier | None,
    engine: EngineReport | None,
    seconds: dict[str, float],
) -> None:
    from graphprune import __version__, display

    verified = not options.no_verify
    if options.json:
        result: dict[str, Any] = {
            "graphprune": __version__,
            "input": str(options.model),
            "output": str(target),
            "plan": None if options.plan_out is None else str(options.plan_out),
            "verified": verified,
        }
        if pruned is not None:
            result |= pruned.report.to_dict()
        else:
            result |= {
                "bytes": {"before": size, "after": size},
                "seconds": seconds,
            }  # zeros take as much room
        if sparsifier is not None:
            result["sparsity"] = sparsifier.report.to_dict()
        if engine is not None:
            result["engine"] = engine.to_dict()
        display.print_json(result)
        return
    if options.quiet:
        return
    if pruned is not None:
        display.print_report(pruned.report, options.model, str(target), verified=verified)
        if options.verbose:
            display.print_groups(pruned.report.groups, pruned.report.plan, members=options.verbose > 1)
    if sparsifier is not None:
        from graphprune.sparsity.tables import print_sparsity

        print_sparsity(
            sparsifier.report,
            None if pruned is not None else (options.model, str(target), seconds),
            verified=verified,
            weights=options.verbose > 0,
        )
    if engine is not None:
        from graphprune.tensorrt.tables import print_engine

        print_engine(engine)
    if pruning is not None and options.sensitivity is not None:
        display.print_curves(pruning.selection.curves, pruning.network.groups)
