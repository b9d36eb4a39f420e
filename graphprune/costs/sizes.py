"""Sizes in bytes as people write them."""

from __future__ import annotations

import math
import re

from graphprune.errors import OptionError

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([kKMGT]?)(i?)([bB]?)\s*")
_POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str | int | float) -> int:
    """Bytes from a number or from text such as ``5MB``.

    ``kB``, ``MB``, ``GB`` and ``TB`` are powers of 1000, ``KiB``, ``MiB``, ``GiB`` and ``TiB`` powers of 1024; the
    ``B`` may be left out. Fractions of a byte are dropped.

    Raises:
        OptionError: It is no size, or below one byte.

    >>> parse_size("5MB"), parse_size("1.5 KiB"), parse_size("200k"), parse_size(4096)
    (5000000, 1536, 200000, 4096)
    """
    if isinstance(text, str):
        match = _SIZE.fullmatch(text)
        if match is None or (match[3] and not match[2]):
            raise OptionError(f"{text!r} is no size; write it as 5MB, 1.5GiB or a number of bytes")
        number, prefix = float(match[1]), "k" if match[2] == "K" else match[2]
        size = number * (1024 if match[3] else 1000) ** _POWERS[prefix]
    elif isinstance(text, bool) or not isinstance(text, int | float):
        raise OptionError(f"{text!r} is no size; give text such as 5MB or a number of bytes")
    else:
        size = float(text)
    if not (math.isfinite(size) and size >= 1):
        raise OptionError(f"{text!r} is no size: give at least one byte")
    return int(size)
