"""How much memory is left: asked before a lot is taken."""

from __future__ import annotations

import os
from pathlib import Path

from graphprune.errors import OptionError

_CGROUP = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not tell.

    On Linux the kernel's estimate, or what the control group leaves if that is less; elsewhere all there is.
    """
    free: int | None = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        try:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None
    left = _left_in_group(_CGROUP)
    return free if left is None else left if free is None else min(free, left)


def _left_in_group(group: Path) -> int | None:
    """What the control group (version 2, or else 1) may still take, its page cache counted as free."""
    for limit, used, folder in (
        ("memory.max", "memory.current", group),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", group / "memory"),
    ):
        try:
            most = int((folder / limit).read_text())  # "max" where there is no limit
            now = int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return max(0, most - now + int(counts.get("inactive_file", 0)))
        except (OSError, ValueError):
            continue
    return None


def require(size: int, what: str, remedy: str) -> None:
    """Refuse what would not fit into memory.

    Raises:
        OptionError: ``size`` bytes are more than there is.
    """
    free = available()
    if free is not None and size > free:
        raise OptionError(f"{what} takes {human(size)}, only {human(free)} of memory are free; {remedy}")


def human(size: float) -> str:
    """Bytes in words.

    >>> human(123), human(5.4e9)
    ('123 B', '5.4 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
