"""Depth: residual branches, found in the graph, measured, and removed whole."""

from __future__ import annotations

from typing import Literal, TypeAlias

from graphprune.errors import OptionError

#: How a branch is judged; see :func:`graphprune.depth.measures.measure_branches`.
Criterion: TypeAlias = Literal["cosine", "error", "refit"]
#: What each says of a branch that is gone.
SAYS: dict[Criterion, str] = {
    "cosine": "it turned the stream by {:.3g}",
    "error": "without it the outputs change by {:.3g} of their size",
    "refit": "a refit leaves {:.3g} more of the stream's variance unexplained without it",
}


def check_criterion(by: str) -> None:
    """Complain of a measure that does not exist.

    Raises:
        OptionError: ``by`` is none.
    """
    if by not in SAYS:
        raise OptionError(f"unknown measure of blocks {by!r}; there are {', '.join(SAYS)}")
