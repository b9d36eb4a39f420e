"""What a TensorRT build log says of sparse weights.

Two pairs of lines are known. Their wording, and the prefixes around them, are facts taken from these sources:

- 8.x, ``(Sparsity) Layers eligible for sparse math: A, B`` and ``(Sparsity) TRT inference plan picked sparse
  implementation for layers: A``: NVIDIA TensorRT developer guide 8.6, "Sparsity"; NVIDIA/TensorRT issues 1403, 2169,
  2271, 4054, 4056.
- 10 and 11, ``(Sparsity) Found N layer(s) eligible to use sparse tactics[: A, B]`` and ``(Sparsity) Chose M layer(s)
  using sparse tactics[: A]``: the llm_sparsity example of NVIDIA/Model-Optimizer, and logs that users show.
- Prefixes ``[MM/DD/YYYY-HH:MM:SS] [I] [TRT]`` of trtexec (samples/common/logging.h), ``[...] [TRT] [I]`` of the Python
  logger (python/src/infer/pyCore.cpp), ``[TensorRT] INFO:`` of the Python logger of 8.0.

A build may report several times, once for each pass over the tactics; the last pair is about the engine that is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_MARK = "(Sparsity)"
_ELIGIBLE = (
    re.compile(r"Found (?P<count>\d+) layer\(s\) eligible[^:]*(?::(?P<names>.*))?$"),
    re.compile(r"Layers eligible for sparse math:(?P<names>.*)$"),
)
_CHOSEN = (
    re.compile(r"Chose (?P<count>\d+) layer\(s\)[^:]*(?::(?P<names>.*))?$"),
    re.compile(r"TRT inference plan picked sparse implementation for layers:(?P<names>.*)$"),
)
#: What a line of trtexec or of a Python logger begins with.
_PREFIX = re.compile(r"^\s*(\[\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d\]|\[[VIWEF]\]|\[TRT\]|\[TensorRT\]|&&&& )")
#: No terminal is wider than this: a longer line was not wrapped by one.
_WIDEST = 300
_BANNER = re.compile(r"TensorRT\.trtexec \[TensorRT v(\d{4,6})\]")
_VERSION = re.compile(r"TensorRT version:\s*(\d+(?:\.\d+)+)")
_ERROR = re.compile(r"(?:\[[EF]\]|\[TensorRT\] (?:INTERNAL_)?ERROR:)\s*(?:\[TRT\]\s*)?(?P<text>.+)$")


@dataclass(frozen=True, slots=True)
class Mention:
    """One line of a pair.

    Attributes:
        count: Number of layers.
        names: Their names; empty where the line has none.
        complete: As many names as are counted. False where the line was cut, or where names with commas in them could
            not be told apart.
    """

    count: int
    names: tuple[str, ...] = ()
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Pair:
    """What one pass found and chose; None for a line that is missing."""

    eligible: Mention | None = None
    chosen: Mention | None = None


@dataclass(frozen=True, slots=True)
class SparsityLog:
    """The evidence of one log.

    Attributes:
        pairs: In the order of the log.
        version: TensorRT's version where the log says it, such as "8.6.1".
        errors: Texts of the lines of severity error.
    """

    pairs: tuple[Pair, ...] = ()
    version: str | None = None
    errors: tuple[str, ...] = ()

    @property
    def last(self) -> Pair | None:
        """The pair that counts; None where the log says nothing of sparse weights."""
        return self.pairs[-1] if self.pairs else None


def parse_log(text: str, known: Iterable[str] = ()) -> SparsityLog:
    """Read a build log of TensorRT 8, 10 or 11, of trtexec or of the Python API.

    Parameters
    ----------
    text : str
        The log; other programs' lines may be in it.
    known : iterable of str
        Names of the network's nodes. Only those with ``", "`` in them are used: the log separates layers by just that.

    Returns
    -------
    SparsityLog
        Without pairs where there is no line about sparse weights, or only a cut one.

    Examples
    --------
    >>> log = parse_log("(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b + c\\n"
    ...                 "(Sparsity) Chose 1 layer(s) using sparse tactics: b + c")
    >>> log.last.eligible.count, log.last.chosen.names
    (2, ('b + c',))
    """
    awkward = sorted((name for name in known if ", " in name), key=len, reverse=True)
    lines = [_ANSI.sub("", line) for line in text.splitlines()]
    pairs: list[Pair] = []
    for statement in _statements(lines):
        if (mention := _mention(_ELIGIBLE, statement, awkward)) is not None:
            pairs.append(Pair(eligible=mention))
        elif (mention := _mention(_CHOSEN, statement, awkward)) is not None:
            if pairs and pairs[-1].chosen is None:
                pairs[-1] = Pair(pairs[-1].eligible, mention)
            else:
                pairs.append(Pair(chosen=mention))
    errors = tuple(match["text"].strip() for line in lines if (match := _ERROR.search(line)))
    return SparsityLog(tuple(pairs), _version(lines), errors)


def _statements(lines: list[str]) -> Iterator[str]:
    """What stands after ``(Sparsity)``, each on one line, as it was before a terminal wrapped it."""
    for index, line in enumerate(lines):
        _, mark, statement = line.partition(_MARK)
        if not mark:
            continue
        width = len(line)
        # Only where lines have prefixes can one without be told from a message of its own.
        if _PREFIX.match(line) and width <= _WIDEST:
            last = width
            for following in lines[index + 1 :]:
                if last != width or not 0 < len(following) <= width or _PREFIX.match(following):
                    break
                if _MARK in following:
                    break
                statement, last = statement + following, len(following)
        yield statement.strip()


def _mention(patterns: tuple[re.Pattern[str], ...], statement: str, awkward: list[str]) -> Mention | None:
    for pattern in patterns:
        match = pattern.search(statement)
        if match is None:
            continue
        listed = (match["names"] or "").strip()
        names = _names(listed, awkward)
        cut = listed.endswith((",", " +"))
        counted = match.groupdict().get("count")
        if counted is None:
            return Mention(len(names), names, not cut)
        return Mention(int(counted), names, not cut and len(names) in (0, int(counted)))
    return None


def _names(listed: str, awkward: list[str]) -> tuple[str, ...]:
    """Names separated by ``", "``, those that hold one themselves kept whole."""
    for index, name in enumerate(awkward):
        listed = listed.replace(name, f"\0{index}\0")
    names = []
    for piece in listed.split(", "):
        for index, name in enumerate(awkward):
            piece = piece.replace(f"\0{index}\0", name)
        if piece := piece.strip().removesuffix(",").strip():
            names.append(piece)
    return tuple(names)


def _version(lines: list[str]) -> str | None:
    for line in lines:
        if match := _VERSION.search(line):
            return match[1]
        if match := _BANNER.search(line):
            # NV_TENSORRT_VERSION: of 8.x in thousands and hundreds, from 10 on in ten thousands and hundreds.
            number = int(match[1])
            unit = 10_000 if number >= 100_000 else 1_000
            return f"{number // unit}.{number % unit // 100}.{number % 100}"
    return None
