"""The arguments of the command line. Only the standard library is imported here: ``--help`` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from graphprune import __version__

_DESCRIPTION = """\
Remove channels, filters, heads and hidden units from an ONNX model, together with everything that is coupled
to them; check that the result equals the original with the removed positions masked; write it.
"""

_EPILOG = """\
examples:
  graphprune model.onnx --channels 0.3                    writes model.pruned.onnx
  graphprune model.onnx --channels 0.5 --exclude 'head*' -o small.onnx
  graphprune model.onnx --channels-for 'layer4*=0.6' --round-to 16 --plan-out plan.json
  graphprune model.onnx --plan plan.json                  carry out a plan made before
  graphprune model.onnx --macs 0.5 --calib inputs.npz     half the arithmetic, spread where it hurts least, repaired
  graphprune model.onnx --max-drop 0.01 --calib labelled.npz
  graphprune masked.onnx --dead                           make a masked network small, exactly
  graphprune model.onnx --nm 2:4                          two of every four weights zero, as GPUs like it
  graphprune model.onnx --channels 0.3 --nm 2:4 --calib inputs.npz
  graphprune model.onnx --channels 0.3 --nm 2:4 --tensorrt model.plan
  graphprune engine model.onnx                            plan, script, and an engine where TensorRT is installed
  graphprune inspect model.onnx                           the coupling groups, and why some are frozen
  graphprune inspect model.onnx --require 2:4             exit with 1 unless the weights hold it
  graphprune inspect model.onnx --why conv1.weight conv2.weight

exit codes: 0 done; 1 the result failed its verification, or a budget or pattern cannot be had: nothing was written; or
an engine is required and cannot be had, or is wrong: the model was written by then; 2 bad input, nothing was written
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"graphprune: error: {message} (see {self.prog} --help)\n")


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments, and pick the verb: ``prune`` unless the first argument names another.

    Raises:
        SystemExit: With code 2 for what cannot be parsed, said in one line on stderr; with 0 for ``--help``.
    """
    parsers = {"inspect": _inspect_parser, "engine": _engine_parser, "prune": _prune_parser}
    verb = given[0] if given and given[0] in parsers else None
    parser = parsers[verb or "prune"]()
    options = parser.parse_args(given[1:] if verb else given)
    options.verb = verb or "prune"
    if options.verb == "prune" and options.tensorrt is None:
        _refuse_engine_options(parser, options)
    return options


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an ONNX file; never changed")
    parser.add_argument(
        "--input-shape",
        action="append",
        type=_input_shape,
        default=[],
        metavar="NAME:1,3,224,224",
        help="sizes for an input with dynamic dimensions; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="print groups (-vv: with their members)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no table, no warnings")
    parser.add_argument("--version", action="version", version=f"graphprune {__version__}")


def _prune_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="graphprune",
        usage="graphprune MODEL (--channels RATIO | --macs FRACTION | --nm N:M | ...) [options]\n"
        "       graphprune inspect MODEL [options]\n"
        "       graphprune engine MODEL [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _common(parser)
    what = parser.add_argument_group("what goes")
    what.add_argument(
        "--channels",
        type=float,
        metavar="RATIO",
        help="fraction to remove of every free group, 0 <= RATIO < 1",
    )
    what.add_argument(
        "--channels-for",
        action="append",
        type=_channels_for,
        default=[],
        metavar="GLOB=RATIO",
        help="fraction for groups that touch a matching node or tensor; may be repeated",
    )
    what.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="cut only groups that touch a matching node or tensor; may be repeated",
    )
    what.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="leave alone groups that touch a matching node or tensor; may be repeated",
    )
    what.add_argument(
        "--residual",
        action="store_true",
        help="also cut groups whose removal changes a statistic, such as the stream through LayerNorm",
    )
    what.add_argument(
        "--round-to",
        type=int,
        metavar="N",
        help="what stays of a group is a multiple of N (default: 8 for groups of 32 and more; 1: any number)",
    )
    what.add_argument(
        "--dead",
        action="store_true",
        help="first remove, exactly, what contributes nothing (alone: only that)",
    )
    what.add_argument(
        "--blocks",
        type=int,
        default=0,
        metavar="N",
        help="first remove the N residual branches that matter least",
    )
    what.add_argument(
        "--blocks-by",
        choices=("cosine", "error", "refit"),
        default="cosine",
        help="which: those that turn the stream least, those without which the outputs change least (slower), or those"
        " that a refit of what is left makes good best",
    )
    what.add_argument("--plan", type=Path, metavar="FILE", help="carry out this plan instead of choosing")
    _budget_arguments(parser)
    _sparsity_arguments(parser)
    _measure_arguments(parser)
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: MODEL.pruned.onnx beside MODEL"
    )
    out.add_argument("--plan-out", type=Path, metavar="FILE", help="also write the plan, as JSON")
    out.add_argument(
        "--precision",
        choices=("keep", "fp16", "bf16"),
        default="keep",
        help="then let nodes compute in float16 or bfloat16 where that is safe; inputs and outputs keep their types",
    )
    out.add_argument(
        "--keep-float32",
        action="append",
        default=[],
        metavar="GLOB",
        help="with --precision: op types or nodes that stay float32; may be repeated",
    )
    out.add_argument(
        "--tensorrt",
        type=Path,
        metavar="FILE",
        help="then hand the model to TensorRT: plan and script for it, and this engine where TensorRT is installed",
    )
    _engine_arguments(parser)
    check = parser.add_argument_group("verification")
    check.add_argument("--no-verify", action="store_true", help="do not compare with the masked original")
    check.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="for random inputs and scores (default: 0)"
    )
    return parser


def _budget_arguments(parser: argparse.ArgumentParser) -> None:
    budget = parser.add_argument_group(
        "budgets", "instead of --channels; fractions are what to keep, and are spread where it hurts least"
    )
    for flag, what in (
        ("--macs", "multiply-accumulates"),
        ("--params", "parameters"),
        ("--latency", "time in ONNX Runtime on this machine, measured"),
        ("--energy", "energy, by a model of memory traffic and arithmetic"),
    ):
        budget.add_argument(flag, type=float, metavar="FRACTION", help=f"{what} to keep, such as 0.5")
    budget.add_argument("--size", metavar="BYTES", help="the file's size at most, such as 5MB")
    budget.add_argument(
        "--max-drop",
        type=float,
        metavar="D",
        help="remove as much as keeps the metric within D of the original's (needs inputs)",
    )
    budget.add_argument(
        "--metric",
        metavar="NAME",
        help="top1 (needs labels), agreement, cosine, or a Python function as module:function",
    )
    budget.add_argument(
        "--metric-data",
        type=Path,
        metavar="FILE",
        help="inputs to judge on (default: a quarter of --calib, held out)",
    )
    budget.add_argument(
        "--scope",
        metavar="NAME",
        help="how a ratio or budget is spread: local, global, isomorphic, allocated"
        " (default: allocated for budgets with --calib, else local)",
    )
    budget.add_argument(
        "--keep-at-least",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="what every group keeps in any case (default: 0.1)",
    )
    budget.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="trials of --max-drop that run at once (default: 1)"
    )


def _sparsity_arguments(parser: argparse.ArgumentParser) -> None:
    sparsity = parser.add_argument_group(
        "sparse weights", "after channels have gone; with --calib chosen and fitted by inputs"
    )
    sparsity.add_argument("--nm", metavar="N:M", help="keep N of every M weights along each sum, such as 2:4")
    sparsity.add_argument(
        "--unstructured",
        type=float,
        metavar="FRACTION",
        help="zero this fraction of each weight, anywhere in it",
    )
    sparsity.add_argument(
        "--block",
        metavar="RxC",
        help="units of R outputs by C summed elements stay or go as one (default: 1x1)",
    )
    _target_argument(sparsity)
    sparsity.add_argument(
        "--nm-method",
        metavar="NAME",
        help="which weights stay: magnitude, wanda, sparsegpt, alps (default: alps with --calib, else magnitude)",
    )
    sparsity.add_argument(
        "--permute",
        action="store_true",
        help="first reorder channels so that larger weights stay, the function being the same; best without --calib",
    )
    sparsity.add_argument(
        "--permute-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="how long to look for an order (default: 30)",
    )
    sparsity.add_argument(
        "--nm-tail",
        choices=("dense", "refuse"),
        default="dense",
        help="where M does not divide an axis: leave its last channels dense, or the whole weight (default: dense)",
    )
    sparsity.add_argument(
        "--nm-packed",
        type=Path,
        metavar="FILE",
        help="also write the weights packed, values and indices, as .safetensors",
    )


def _target_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--nm-target",
        default="tensorrt",
        metavar="NAME",
        help="whose rules say which weights can have the pattern: tensorrt, onnxruntime, any (default: tensorrt)",
    )


def _measure_arguments(parser: argparse.ArgumentParser) -> None:
    measure = parser.add_argument_group("calibration, scores, repair")
    measure.add_argument(
        "--calib",
        type=Path,
        metavar="PATH",
        help="inputs to measure, repair and verify on: an .npz (an array for each input; 'labels' are labels),"
        " an .npy, or a folder of images or .npy files",
    )
    measure.add_argument(
        "--preprocess",
        metavar="SPEC",
        help="makes inputs of images: imagenet, a .json file, or 'mean=...;std=...;size=HxW;layout=nchw'",
    )
    measure.add_argument(
        "--score",
        metavar="NAME",
        help="what goes first: l1, l2, linf, random, bn-scale, fpgm, lamp; with --calib mean-abs, variance, apoz,"
        " wanda, thinet, lasso, obs, taylor, fisher, obd (default: obs with --calib, else l2)",
    )
    measure.add_argument(
        "--repair",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="refit what reads a cut (default: with --calib)",
    )
    measure.add_argument(
        "--sensitivity",
        type=Path,
        metavar="FILE",
        help="also measure each group's curve of error against size, print it and save it as JSON",
    )


def _engine_arguments(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("TensorRT")
    engine.add_argument(
        "--trt-version",
        type=int,
        metavar="N",
        help="major version to plan for: 8, 10 or 11 (default: the installed one, else 11)",
    )
    engine.add_argument(
        "--shapes",
        action="append",
        default=[],
        metavar="NAME:MIN,OPT,MAX",
        help="sizes of a dynamic input, such as image:1x3x224x224,8x3x224x224,32x3x224x224; may be repeated",
    )
    engine.add_argument("--no-sparsity", action="store_true", help="do not let TensorRT use sparse kernels")
    engine.add_argument("--workspace", type=int, metavar="MIB", help="memory that kernels may use")
    engine.add_argument("--timing-cache", type=Path, metavar="FILE", help="default: ENGINE.timing")
    engine.add_argument(
        "--require-engine", action="store_true", help="exit with 1 where no engine can be built"
    )
    engine.add_argument(
        "--bench",
        action="store_true",
        help="time the original, the pruned model with dense kernels only, and the engine, in turn",
    )
    engine.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="what the engine is compared with (default: MODEL where it is pruned in the same run)",
    )
    engine.add_argument(
        "--provider",
        action="store_true",
        help="also write options for ONNX Runtime's TensorRT provider, and run the model by it where it is there",
    )


def _refuse_engine_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What says how an engine is made says nothing where none is."""
    for given, flag in (
        (options.trt_version, "--trt-version"),
        (options.shapes, "--shapes"),
        (options.no_sparsity, "--no-sparsity"),
        (options.workspace, "--workspace"),
        (options.timing_cache, "--timing-cache"),
        (options.require_engine, "--require-engine"),
        (options.bench, "--bench"),
        (options.baseline, "--baseline"),
        (options.provider, "--provider"),
    ):
        if given is not None and given is not False and given != []:
            parser.error(f"{flag} says how an engine is made: give --tensorrt FILE too")


def _engine_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="graphprune engine",
        description="Hand a model to TensorRT: write a build plan and a script for trtexec, build an engine where"
        " TensorRT is installed, and say whether its sparse kernels were used.",
        allow_abbrev=False,
    )
    _common(parser)
    parser.add_argument(
        "--engine", type=Path, metavar="FILE", help="the engine to write (default: MODEL.plan beside MODEL)"
    )
    _engine_arguments(parser)
    inputs = parser.add_argument_group("inputs to compare the engine with ONNX Runtime on")
    inputs.add_argument(
        "--calib",
        type=Path,
        metavar="PATH",
        help="an .npz, an .npy, or a folder of images or .npy files (default: random)",
    )
    inputs.add_argument("--preprocess", metavar="SPEC", help="makes inputs of images: see graphprune --help")
    inputs.add_argument("--seed", type=_seed, default=0, metavar="N", help="for random inputs (default: 0)")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="graphprune inspect",
        description="List the coupling groups of a model: what can only go together, and what cannot go at all.",
        allow_abbrev=False,
    )
    _common(parser)
    parser.add_argument(
        "--why",
        nargs=2,
        metavar=("A", "B"),
        help="print the chain of operations that ties two tensors, each NAME or NAME[AXIS]",
    )
    parser.add_argument(
        "--sparsity",
        action="store_true",
        help="list the weights instead: the N:M pattern that each truly holds, and whether it can have one",
    )
    parser.add_argument(
        "--require",
        metavar="N:M",
        help="exit with 1 where a weight that can have this pattern does not hold it (implies --sparsity)",
    )
    _target_argument(parser)
    return parser


def _input_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, colon, sizes = text.rpartition(":")  # names may hold colons
    try:
        shape = tuple(int(size) for size in sizes.replace("x", ",").split(",")) if sizes.strip() else ()
    except ValueError:
        shape, colon = (), ""
    if not colon or not name or any(size < 0 for size in shape):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME:1,3,224,224")
    return name, shape


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no non-negative integer")
    return int(text)


def _channels_for(text: str) -> tuple[str, float]:
    pattern, _, ratio = text.rpartition("=")
    try:
        if pattern:
            return pattern, float(ratio)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not of the form GLOB=RATIO, such as 'layer4*=0.5'")
