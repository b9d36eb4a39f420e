"""``graphprune engine``: hand a network to TensorRT as it is."""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from graphprune.errors import OptionError
from graphprune.verbs.options import input_shapes, output_path, same_file

if TYPE_CHECKING:
    from graphprune.display import Steps
    from graphprune.tensorrt.handover import EngineReport, EngineSettings


def run(options: argparse.Namespace) -> int:
    """Write plan and script, build where TensorRT is, print the verdict.

    Raises:
        GraphPruneError: See :func:`graphprune.tensorrt.handover.hand_over`.
    """
    from graphprune import display

    start = perf_counter()
    source = Path(options.model)
    settings = engine_settings(options, options.engine or source.with_suffix(".plan"))
    with display.Steps(quiet=options.quiet) as steps:
        report = hand_over_file(source, settings, steps)
    if options.json:
        from graphprune import __version__

        display.print_json(
            {
                "graphprune": __version__,
                "input": str(source),
                "engine": report.to_dict(),
                "seconds": {**steps.seconds, "total": perf_counter() - start},
            }
        )
    elif not options.quiet:
        from graphprune.tensorrt.tables import print_engine

        print_engine(report)
    return 0


def engine_settings(options: argparse.Namespace, engine: Path) -> EngineSettings:
    """What the options say of an engine.

    Raises:
        OptionError: A shape is none, a file is not there, or the engine would overwrite a network.
    """
    from graphprune.model import load
    from graphprune.tensorrt.handover import EngineSettings
    from graphprune.tensorrt.numbers import Source
    from graphprune.tensorrt.profiles import check_profiles, network_inputs, parse_profile

    if engine.is_dir():
        raise OptionError(f"the engine {str(engine)!r} is a folder; give the name of the file to write")
    if not engine.parent.is_dir():
        raise OptionError(f"the folder {str(engine.parent)!r} for the engine does not exist; create it first")
    if same_file(engine, Path(options.model)):
        raise OptionError(f"the engine {str(engine)!r} is the input itself, which is never changed")
    if options.baseline is not None and same_file(engine, options.baseline):
        raise OptionError(f"the engine {str(engine)!r} is the baseline, which is never changed")
    if options.verb == "prune" and same_file(engine, output_path(options)):
        raise OptionError(f"the engine and the model would both be written to {str(engine)!r}")
    shapes = tuple(parse_profile(text) for text in options.shapes)
    check_profiles(network_inputs(load(options.model)), shapes)  # now rather than after the work
    original = options.baseline
    if original is not None:
        check_profiles(network_inputs(load(original)), shapes)
    elif options.verb == "prune":
        original = Path(options.model)
    if options.calib is not None and not options.calib.exists():
        raise OptionError(f"the calibration inputs {str(options.calib)!r} do not exist")
    return EngineSettings(
        engine=engine,
        major=options.trt_version,
        sparsity=not options.no_sparsity,
        shapes=shapes,
        workspace=options.workspace,
        timing_cache=options.timing_cache,
        required=options.require_engine,
        original=original,
        bench=options.bench,
        provider=options.provider,
        source=Source(options.calib, options.preprocess, input_shapes(options), options.seed),
    )


def hand_over_file(path: Path, settings: EngineSettings, steps: Steps) -> EngineReport:
    """Hand a file over, saying how far it is."""
    steps("imports")
    from graphprune.tensorrt.handover import hand_over

    return hand_over(path, settings, step=steps)
