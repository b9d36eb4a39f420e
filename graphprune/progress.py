"""Steps of a run: named to whoever watches, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with the name of each step; may have a method ``part(step, done, total)`` too.
Progress = Callable[[str], None]


@contextmanager
def timed(seconds: dict[str, float], step: str, progress: Progress | None) -> Iterator[None]:
    """Name a step, and add the wall time of the block to its seconds."""
    if progress is not None:
        progress(step)
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start


def part_of(progress: Progress | None, step: str) -> Callable[[int, int], None]:
    """What a step calls with (done, in all), for those who show how far it is."""
    part = getattr(progress, "part", None)
    return lambda done, total: None if part is None else part(step, done, total)
