"""A build plan as a shell script for trtexec.

Which options there are in which version is taken from trtexec's own reader and help text, samples/common/
sampleOptions.cpp of NVIDIA/TensorRT at the tags v8.6.1, v10.0.1, v10.16 and v11.1. An option that a version does not
know ends the run ("Unknown option"), so each version gets its own:

- all: ``--onnx``, ``--saveEngine``, ``--sparsity=enable``, ``--minShapes``/``--optShapes``/``--maxShapes``,
  ``--memPoolSize=workspace:MiB``, ``--timingCacheFile``, ``--profilingVerbosity=detailed``, ``--dumpLayerInfo``,
  ``--exportLayerInfo``, ``--verbose``, ``--skipInference`` (which still exports the layers).
- 8.6: ``--fp16`` and ``--int8`` permit these types; there are no strongly typed networks.
- 10: ``--stronglyTyped``; ``--fp16`` and its like are refused beside it.
- 11: networks are always strongly typed; ``--fp16`` and its like are gone, ``--stronglyTyped`` does nothing.

``--sparsity=force`` keeps the first two of every four weights, whatever they are; it is never written.

Shapes are written ``NAME:1x3x224x224``, separated by commas. All colons but the last belong to the name, and no quoting
protects commas and single quotes.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from graphprune.errors import OptionError
from graphprune.tensorrt.plan import BuildPlan
from graphprune.tensorrt.profiles import Shape, shape_text

_SCRIPT = """\
#!/usr/bin/env bash
# Builds {shown_engine} from {shown_model}
# with trtexec of TensorRT {version}. Written by graphprune.
# The program is found on PATH, or named by TRTEXEC. Files lie beside this script unless their paths are absolute.
set -euo pipefail
cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")"

engine={engine}
log={log}
partial="$engine.partial"
trap 'rm -f -- "$partial"' EXIT

"${{TRTEXEC:-trtexec}}" \\
{options} 2>&1 | tee -- "$log"
mv -f -- "$partial" "$engine"

echo
echo "What TensorRT says of the sparse weights; the last two lines count:"
grep -aF '(Sparsity)' -- "$log" || echo "nothing: look at $log"
"""


def trtexec_options(plan: BuildPlan, folder: Path | None = None) -> list[str]:
    """The options of trtexec, one argument each, without shell quoting and without ``--saveEngine``.

    Parameters
    ----------
    plan : BuildPlan
        The plan.
    folder : pathlib.Path, optional
        The folder that trtexec runs in: paths are written as seen from there.

    Raises
    ------
    OptionError
        If an input's name cannot be given to trtexec.
    """
    options = [f"--onnx={_seen_from(plan.model, folder)}"]
    if plan.major == 8:
        options += ["--fp16"] * ("FLOAT16" in plan.precision.floats) + ["--int8"] * plan.precision.quantized
    elif plan.major == 10:
        options.append("--stronglyTyped")
    if plan.sparsity:
        options.append("--sparsity=enable")
    shaped = [
        profile for profile in plan.profiles if profile.usual
    ]  # 8.6 cannot read a scalar's shape, which is static
    for flag, which in (("minShapes", 0), ("optShapes", 1), ("maxShapes", 2)):
        if shaped:
            listed = ",".join(_named(profile.name, profile.shapes[which]) for profile in shaped)
            options.append(f"--{flag}={listed}")
    if plan.workspace is not None:
        options.append(f"--memPoolSize=workspace:{plan.workspace}")
    if plan.timing_cache is not None:
        options.append(f"--timingCacheFile={_seen_from(plan.timing_cache, folder)}")
    options += ["--profilingVerbosity=detailed", "--dumpLayerInfo"]
    if plan.layers is not None:
        options.append(f"--exportLayerInfo={_seen_from(plan.layers, folder)}")
    if plan.verbose:
        options.append("--verbose")
    return [*options, "--skipInference"]


def shell_script(plan: BuildPlan, folder: Path) -> str:
    """A script that builds the plan's engine, for a file in a folder.

    The engine appears whole or not at all. The log goes to the engine's name with ".log".

    Raises
    ------
    OptionError
        If an input's name cannot be given to trtexec.
    """
    engine = _seen_from(plan.engine, folder)
    quoted = [shlex.quote(option) for option in trtexec_options(plan, folder)]
    lines = [quoted[0], '--saveEngine="$partial"', *quoted[1:]]
    return _SCRIPT.format(
        engine=shlex.quote(engine),
        shown_engine=_one_line(engine),
        shown_model=_one_line(_seen_from(plan.model, folder)),
        version="8.6" if plan.major == 8 else plan.major,
        log=shlex.quote(f"{engine}.log"),
        options=" \\\n".join(f"    {line}" for line in lines),
    )


def _seen_from(path: str, folder: Path | None) -> str:
    """A path as the script's folder sees it: relative where it lies at or below, else absolute."""
    if folder is None:
        return path
    absolute, home = os.path.abspath(path), os.path.abspath(folder)  # noqa: PTH100 - links are kept as they are
    try:
        seen = Path(absolute).relative_to(home).as_posix()
    except ValueError:
        return absolute
    # trtexec reads a leading ~ as the home folder, other programs a leading - as an option
    return f"./{seen}" if seen.startswith(("~", "-")) else seen


def _named(name: str, shape: Shape) -> str:
    if any(mark in name for mark in ",'\n"):
        raise OptionError(
            f"input {name!r}: trtexec cannot be given a shape for a name with commas, single quotes or line feeds;"
            " rename the input, or build with the Python API"
        )
    return f"{name}:{shape_text(shape)}"


def _one_line(text: str) -> str:
    """For a comment: what would end the line is shown."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
