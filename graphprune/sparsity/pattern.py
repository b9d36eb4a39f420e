"""Sparsity patterns: how many elements of which unit may stay."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from graphprune.errors import OptionError

#: Largest M of an N:M pattern.
LARGEST_M = 32


#: Rows (outputs) and columns (contracted elements) of the unit that stays or goes as one.
Block: TypeAlias = tuple[int, int]


def parse_block(text: str) -> Block:
    """Read ``4x1``: 4 outputs by 1 contracted element.

    Raises:
        OptionError: It is not of that form.
    """
    match = re.fullmatch(r"\s*([1-9]\d{0,3})\s*[xX]\s*([1-9]\d{0,3})\s*", text)
    if match is None:
        raise OptionError(f"{text!r} is no block, such as 4x1")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, slots=True)
class NM:
    """At most ``n`` of every ``m`` consecutive units along the contracted axis differ from zero.

    Attributes:
        n, m: The pattern.
        block: The unit; one element by default.
    """

    n: int
    m: int
    block: Block = (1, 1)

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise OptionError(f"{self}: of {self.m} weights between 1 and {self.m} can stay, not {self.n}")
        if self.m > LARGEST_M:
            raise OptionError(f"{self}: groups of more than {LARGEST_M} weights are not supported")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{_in_blocks(self.block)}"

    @property
    def density(self) -> float:
        """Fraction of the weights that stays."""
        return self.n / self.m

    @classmethod
    def parse(cls, text: str, block: Block = (1, 1)) -> NM:
        """Read ``2:4``.

        Raises:
            OptionError: It is not of that form, or N is larger than M.
        """
        match = re.fullmatch(r"\s*(\d{1,4})\s*:\s*(\d{1,4})\s*", text)
        if match is None:
            raise OptionError(f"{text!r} is no N:M pattern, such as 2:4")
        return cls(int(match[1]), int(match[2]), block)


@dataclass(frozen=True, slots=True)
class Unstructured:
    """A fraction of each weight's units is zero, wherever they lie.

    Attributes:
        fraction: How much goes, 0 < fraction < 1.
        block: The unit; one element by default.
    """

    fraction: float
    block: Block = (1, 1)

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise OptionError(
                f"--unstructured {self.fraction:g}: the fraction that goes lies between 0 and 1"
            )

    def __str__(self) -> str:
        return f"{self.fraction:.0%} unstructured{_in_blocks(self.block)}"

    @property
    def density(self) -> float:
        """Fraction of the weights that stays."""
        return 1 - self.fraction


#: What a weight can be made to hold.
Pattern: TypeAlias = NM | Unstructured


def _in_blocks(block: Block) -> str:
    return "" if block == (1, 1) else f" in blocks of {block[0]}x{block[1]}"


@dataclass(frozen=True, slots=True)
class Layout:
    """A stored weight as its runtime contracts it: ``[outer, contracted, inner]``, a plain reshape of its elements.

    Groups of M run along the middle axis. A Conv's ``[K, C / g, R, S]`` is ``[K, C / g, R S]``; a MatMul's ``[C, K]``
    is ``[1, C, K]``; a batched one ``[batch, C, K]``; a Gemm's with transB ``[K, C, 1]``.

    Attributes:
        outer, contracted, inner: The three sizes.
        outputs: Number of results that each contraction makes (K; of one conv group).
        outputs_axis: Where neighbouring outputs lie: 0 for outer, 2 for inner.
        outputs_step: From one output to the next along that axis.
    """

    outer: int
    contracted: int
    inner: int
    outputs: int
    outputs_axis: int = 0
    outputs_step: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.outer, self.contracted, self.inner

    def stretches(self, m: int, elements: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of stretches of about so many elements, each of whole groups; :meth:`view` shapes them."""
        row = self.contracted * self.inner
        if not row:
            return
        if row <= elements:
            step = max(elements // row, 1) * row
            for start in range(0, self.outer * row, step):
                yield start, min(start + step, self.outer * row)
            return
        step = max(elements // (m * self.inner), 1) * m * self.inner
        for first in range(0, self.outer * row, row):
            for start in range(first, first + row, step):
                yield start, min(start + step, first + row)

    def view(self, start: int, stop: int) -> tuple[int, int, int]:
        """The shape of a stretch: ``[outer, contracted, inner]``, fewer of one of the first two."""
        row = self.contracted * self.inner
        if (stop - start) % row == 0:
            return (stop - start) // row, self.contracted, self.inner
        return 1, (stop - start) // self.inner, self.inner
