"""What sparsity the weights of a model truly hold, whoever made it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphprune.errors import SparsityError
from graphprune.model.stream import STRETCH_BYTES, element_type, reading, stretches
from graphprune.sparsity.eligibility import find_target, judged
from graphprune.sparsity.pattern import NM
from graphprune.sparsity.proof import most_held
from graphprune.sparsity.report import SparsityReport, WeightReport
from graphprune.sparsity.sites import Site, find_sites

#: Names listed in an error.
LISTED = 5


def inspect_sparsity(
    model: ir.Model,
    pattern: NM,
    target: str = "tensorrt",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> SparsityReport:
    """Look at every weight that an op sums over, one after another.

    Args:
        model: Not changed.
        pattern: What is looked for; weights are judged in groups of its M.
        target: The runtime whose rules say which weights can have it.
        progress: Called with (weights done, weights in all).

    Returns:
        A report; ``holds`` is the smallest N that holds with that M, "dense" where that is M.

    Raises:
        OptionError: The target does not know the pattern.
    """
    runtime = find_target(target, pattern)
    sites = find_sites(model)
    entries = []
    for number, site in enumerate(sites):
        if progress is not None:
            progress(number, len(sites))
        entry = judged(site, pattern, runtime)
        _look(site, pattern, entry)
        entries.append(entry)
    return SparsityReport(str(pattern), target, "inspection", entries)


def _look(site: Site, pattern: NM, entry: WeightReport) -> None:
    """Count zeros, and the most that any group holds."""
    if site.dtype.bitwidth < 8 or site.dtype == ir.DataType.STRING:
        return
    tensor, layout = site.tensor, site.layout
    dtype, zeros = element_type(tensor), 0
    with reading(tensor) as read:
        for start, stop in stretches(tensor.size, STRETCH_BYTES // dtype.itemsize):
            part = np.empty(stop - start, dtype)
            read(start, part)
            zeros += len(part) - int(np.count_nonzero(part))
    entry.zeros = zeros / tensor.size if tensor.size else 0.0
    # Fewer channels than M hold any pattern, and none.
    if layout is not None and tensor.size and layout.contracted >= pattern.m:
        most = most_held(tensor, layout, pattern.m)
        entry.holds = "dense" if most >= pattern.m else f"{most}:{pattern.m}"


def holds(entry: WeightReport, pattern: NM) -> bool:
    """Whether a weight that was looked at holds a pattern."""
    if entry.holds is None:
        return False
    return entry.holds != "dense" and int(entry.holds.split(":")[0]) <= pattern.n


def require(report: SparsityReport, pattern: NM) -> None:
    """Insist on a pattern.

    Raises:
        SparsityError: A weight that can have it does not hold it, or there is none that can.
    """
    able = [entry for entry in report.weights if entry.eligible]
    if not able:
        raise SparsityError(f"no weight can be {pattern} for {report.target}: nothing to require it of")
    short = [entry for entry in able if not holds(entry, pattern)]
    if short:
        named = ", ".join(f"{entry.name} ({entry.holds})" for entry in short[:LISTED])
        more = f" and {len(short) - LISTED} more" if len(short) > LISTED else ""
        raise SparsityError(f"{len(short)} of {len(able)} weights do not hold {pattern}: {named}{more}")
