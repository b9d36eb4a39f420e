"""``graphprune MODEL``: cut, make sparse, cast, prove, write, hand over."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from graphprune.errors import GraphPruneError, ModelError, PlanError, VerificationError
from graphprune.verbs import options as meaning
from graphprune.verbs.engine import engine_settings, hand_over_file

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphprune.calibration import Calibration
    from graphprune.display import Steps
    from graphprune.network import Pruned
    from graphprune.passes.cast_precision import PrecisionReport
    from graphprune.pruning import Pruning
    from graphprune.sparsity.sparsify import Sparsifier, SparsitySettings
    from graphprune.tensorrt.handover import EngineReport


def run(options: argparse.Namespace) -> int:
    """Do what the options ask for, and print a report.

    Raises:
        GraphPruneError: Whatever went wrong; nothing was written then.
    """
    target = meaning.output_path(options)
    meaning.pattern_of(options)  # these complain now rather than after the imports
    meaning.budget(options)
    start = perf_counter()
    from graphprune.display import Steps

    with Steps(quiet=options.quiet) as steps:
        work = _Run(options, target, steps)
        work.carry_out()
    work.report({**steps.seconds, "total": perf_counter() - start})
    return 0


class _Run:
    """One run, step by step; each leaves what the report will need."""

    def __init__(self, options: argparse.Namespace, target: Path, steps: Steps) -> None:
        self.options = options
        self.target = target
        self.steps = steps
        self.verifies = not options.no_verify
        self.size = 0
        self.pruning: Pruning | None = None
        self.pruned: Pruned | None = None
        self.sparsifier: Sparsifier | None = None
        self.precision: PrecisionReport | None = None
        self.engine: EngineReport | None = None

    def carry_out(self) -> None:
        """Everything but the report."""
        options = self.options
        self.steps("imports")
        sparsity = meaning.sparsity(options)
        engine = None if options.tensorrt is None else engine_settings(options, options.tensorrt)
        model, calibration = self._cut() if meaning.cuts(options) else self._load()
        if sparsity is not None:
            self._make_sparse(model, sparsity, calibration)
        if options.precision != "keep":
            self._cast(model, calibration)
        self._write(model)
        if engine is not None:
            self.engine = hand_over_file(self.target, engine, self.steps)

    # -- steps ------------------------------------------------------------------------------------------------------

    def _load(self) -> tuple[ir.Model, Calibration | None]:
        """The model as it is, and inputs if there are any."""
        from graphprune.model import as_ir

        options = self.options
        self.steps("loading")
        model, _ = as_ir(options.model)
        if options.calib is None:
            return model, None
        from graphprune.calibration import load_calibration
        from graphprune.calibration.preprocess import Preprocess
        from graphprune.graph.twin import build_twin

        preprocess = Preprocess.parse(options.preprocess) if options.preprocess is not None else None
        self.steps("calibration inputs")
        graph = build_twin(model, meaning.input_shapes(options))
        return model, load_calibration(options.calib, graph, preprocess=preprocess, seed=options.seed)

    def _cut(self) -> tuple[ir.Model, Calibration | None]:
        from graphprune.calibration.preprocess import Preprocess
        from graphprune.model import as_ir
        from graphprune.pruning import Pruning, finish

        options = self.options
        settings, drop = meaning.settings(options, meaning.budget(options)), meaning.drop(options)
        preprocess = Preprocess.parse(options.preprocess) if options.preprocess is not None else None
        self.steps("loading")
        source, _ = as_ir(options.model)
        self.pruning = Pruning(
            source,
            settings,
            calibration=options.calib,
            preprocess=preprocess,
            verify=self.verifies,
            progress=self.steps,
        )
        self.pruned = finish(self.pruning, drop, options.metric_data)
        return self.pruned.model, self.pruning.calibration

    def _make_sparse(
        self, model: ir.Model, settings: SparsitySettings, calibration: Calibration | None
    ) -> None:
        from graphprune.sparsity.sparsify import Sparsifier

        self._check_cut()
        self.sparsifier = Sparsifier(model, settings, calibration, self.steps, verify=self.verifies)
        self.sparsifier.run()

    def _cast(self, model: ir.Model, calibration: Calibration | None) -> None:
        from graphprune.passes.cast_precision import cast_precision

        if self.sparsifier is None:
            self._check_cut()
        elif self.verifies:
            self.sparsifier.check()
        self.precision = cast_precision(
            model,
            self.options.precision,
            calibration=calibration,
            deny=self.options.keep_float32,
            input_shapes=meaning.input_shapes(self.options),
            verify=self.verifies,
            seed=self.options.seed,
            progress=self.steps,
        )

    def _check_cut(self) -> None:
        """Prove a cut before what follows changes the answers."""
        if self.verifies and self.pruning is not None and self.pruned is not None:
            self.pruning.check(self.pruned)

    def _write(self, model: ir.Model) -> None:
        """Write the model and what goes with it, check the file, then put all in place."""
        from graphprune.model import staged

        options = self.options
        self.steps("writing")
        with ExitStack() as files:
            file = files.enter_context(staged(model, self.target, sources=[options.model]))
            self.size = file.size
            if self.verifies:
                self._check_file(file.path)
                self.steps("writing")
            commits: list[Callable[[], object]] = []
            if options.plan_out is not None and self.pruned is not None:
                plan = self.pruned.report.plan
                commits.append(files.enter_context(_beside(options.plan_out, plan.save, "plan")))
            if options.nm_packed is not None and self.sparsifier is not None:
                save = self.sparsifier.save_packed
                commits.append(files.enter_context(_beside(options.nm_packed, save, "packed file")))
            if self.pruning is not None and options.sensitivity is not None:
                from graphprune.choice.sensitivity import save_curves

                save_curves(self.pruning.selection.curves, self.pruning.network.groups, options.sensitivity)
            file.commit()
            for commit in commits:
                commit()

    def _check_file(self, path: Path) -> None:
        """What the file holds is what was proved in memory."""
        if self.precision is not None:
            if self.sparsifier is not None:
                self._check_cast_pattern(path)
        elif self.sparsifier is not None:
            self.sparsifier.check(path)
        elif self.pruning is not None and self.pruned is not None:
            self.pruned.report.bytes_after = self.size
            self.pruning.check(self.pruned, path)

    def _check_cast_pattern(self, path: Path) -> None:
        """Casting rounds: zeros stay zeros, so that the file holds the pattern as often as it was made.

        Raises:
            VerificationError: It does not.
        """
        from graphprune.model import load
        from graphprune.sparsity.inspection import holds, inspect_sparsity
        from graphprune.sparsity.pattern import NM

        assert self.sparsifier is not None
        settings, wanted = self.sparsifier.settings, self.sparsifier.report.sparse
        if not isinstance(settings.pattern, NM) or settings.pattern.block != (1, 1):
            return  # what a fraction or a block is counted by, magnitudes, has been rounded
        found = inspect_sparsity(load(path), settings.pattern, settings.target)
        held = sum(holds(entry, settings.pattern) for entry in found.weights)
        if held < len(wanted):
            raise VerificationError(
                f"{len(wanted)} weights were made {settings.pattern}, and {held} of the written file hold it"
            )

    # -- report -----------------------------------------------------------------------------------------------------

    def report(self, seconds: dict[str, float]) -> None:
        """Print what was done."""
        from graphprune import display

        if self.pruned is not None:
            self.pruned.report.bytes_after = self.size
            self.pruned.report.seconds = seconds
        if self.options.json:
            display.print_json(self._to_dict(seconds))
        elif not self.options.quiet:
            self._print(seconds)

    def _to_dict(self, seconds: dict[str, float]) -> dict[str, Any]:
        from graphprune import __version__
        from graphprune.model import file_size, load

        options = self.options
        result: dict[str, Any] = {
            "graphprune": __version__,
            "input": str(options.model),
            "output": str(self.target),
            "plan": None if options.plan_out is None else str(options.plan_out),
            "verified": self.verifies,
        }
        if self.pruned is not None:
            result |= self.pruned.report.to_dict()
        else:
            result["bytes"] = {"before": file_size(load(options.model)), "after": self.size}
            result["seconds"] = seconds
        for name, part in (
            ("sparsity", None if self.sparsifier is None else self.sparsifier.report),
            ("precision", self.precision),
            ("engine", self.engine),
        ):
            if part is not None:
                result[name] = part.to_dict()
        return result

    def _print(self, seconds: dict[str, float]) -> None:
        from graphprune import display

        options = self.options
        if self.pruned is not None:
            report = self.pruned.report
            display.print_report(report, options.model, str(self.target), verified=self.verifies)
            if options.verbose:
                display.print_groups(report.groups, report.plan, members=options.verbose > 1)
        else:
            display.print_files(options.model, str(self.target), self.size, seconds)
        if self.sparsifier is not None:
            from graphprune.sparsity.tables import print_sparsity

            print_sparsity(self.sparsifier.report, verified=self.verifies, weights=options.verbose > 0)
        if self.precision is not None:
            from graphprune.precision.tables import print_precision

            print_precision(self.precision, verified=self.verifies, nodes=options.verbose > 0)
        if self.engine is not None:
            from graphprune.tensorrt.tables import print_engine

            print_engine(self.engine)
        if self.pruning is not None and options.sensitivity is not None:
            display.print_curves(self.pruning.selection.curves, self.pruning.network.groups)


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
