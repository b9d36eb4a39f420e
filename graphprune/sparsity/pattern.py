"""Sparsity patterns: how many elements of which unit may stay."""

from __future__ import annotations

import re
from dataclasses import dataclass

from graphprune.errors import OptionError

#: Largest M of an N:M pattern.
LARGEST_M = 32


@dataclass(frozen=True, slots=True)
class NM:
    """At most ``n`` of every ``m`` consecutive elements along the contracted axis differ from zero."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise OptionError(f"{self}: of {self.m} weights between 1 and {self.m} can stay, not {self.n}")
        if self.m > LARGEST_M:
            raise OptionError(f"{self}: groups of more than {LARGEST_M} weights are not supported")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Fraction of the weights that stays."""
        return self.n / self.m

    @classmethod
    def parse(cls, text: str) -> NM:
        """Read ``2:4``.

        Raises:
            OptionError: It is not of that form, or N is larger than M.
        """
        match = re.fullmatch(r"\s*(\d{1,4})\s*:\s*(\d{1,4})\s*", text)
        if match is None:
            raise OptionError(f"{text!r} is no N:M pattern, such as 2:4")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Layout:
    """A stored weight as its runtime contracts it: ``[outer, contracted, inner]``, a plain reshape of its elements.

    Groups of M run along the middle axis. A Conv's ``[K, C / g, R, S]`` is ``[K, C / g, R S]``; a MatMul's ``[C, K]``
    is ``[1, C, K]``; a batched one ``[batch, C, K]``; a Gemm's with transB ``[K, C, 1]``.

    Attributes:
        outer, contracted, inner: The three sizes.
        outputs: Number of results that each contraction makes (K; of one conv group).
    """

    outer: int
    contracted: int
    inner: int
    outputs: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.outer, self.contracted, self.inner
