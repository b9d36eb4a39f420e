"""``graphprune inspect``: what a model holds, without changing it."""

from __future__ import annotations

import argparse

from graphprune.errors import OptionError
from graphprune.verbs.options import input_shapes


def run(options: argparse.Namespace) -> int:
    """Print the coupling groups, the chain that ties two tensors, or what sparsity the weights hold.

    Raises:
        GraphPruneError: The model cannot be read, or falls short of what ``--require`` names.
    """
    if options.sparsity or options.require is not None:
        if options.why:
            raise OptionError("--why is about coupling, --sparsity about zeros: give one")
        return _sparsity(options)
    return _groups(options)


def _groups(options: argparse.Namespace) -> int:
    shapes = input_shapes(options)
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
    return 0


def _sparsity(options: argparse.Namespace) -> int:
    from graphprune import display

    with display.Steps(quiet=options.quiet) as steps:
        steps("imports")
        from graphprune.model import as_ir
        from graphprune.sparsity.inspection import inspect_sparsity, require
        from graphprune.sparsity.pattern import NM
        from graphprune.sparsity.tables import print_weights

        pattern = NM.parse(options.require or "2:4")
        steps("loading")
        model, _ = as_ir(options.model)
        steps("weights")
        report = inspect_sparsity(
            model, pattern, options.nm_target, progress=lambda done, total: steps.part("weights", done, total)
        )
    if options.json:
        from graphprune import __version__

        display.print_json({"graphprune": __version__, "input": options.model, "sparsity": report.to_dict()})
    elif not options.quiet:
        print_weights(report)
    if options.require is not None:
        require(report, pattern)
    return 0
