"""The little language of computing ops: which factors the axes of an op's tensors are made of.

A signature names, for each input and output, the factors of each axis::

    Conv         n (g c) S!*, (g k) c R!*, (g k)? -> n (g k) T!*
    MatMul       b m k, b k n -> b m n
    BatchNorm    n c S*, c, c, c, c -> n c S*

Terms of inputs and outputs are separated by commas, inputs and outputs by ``->``. One operand may be described by
several views, joined with ``|``: each is true of it. Within a term:

``c``        a factor; equal names in one signature are one factor, of one size
``(g c)``    an axis that is a product of factors, the last fastest
``S*``       as many axes as the operand's rank leaves, named S0, S1, ... (one such factor a term)
``1``        an axis of size 1, broadcast
``_``        an axis of which nothing is said: nothing may be removed along it
``?``        alone: an operand of which nothing is said
``[2:5]``    after an axis: the view is of these positions of that axis only (bounds are integers)

A factor is *contracted* when it stands in inputs but in no output. A mark behind its name says what removal along the
factor would mean otherwise; a mark holds for the factor wherever it stands, except ``^``:

``!``   blocked: positions are mixed or counted (a convolution's space); nothing is removed along it
``=``   blocked, but computed separately for each position (the direction of an LSTM)
``~``   normalised over: removal changes a statistic (LayerNorm, Softmax)
``^``   in this operand the op sums over the factor itself (the recurrent weight of an LSTM)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, lru_cache
from math import prod

from graphprune.errors import RuleError

_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z][A-Za-z0-9]*)|(?P<punct>[()\[\]:|?_!~=^*,]|->)|(?P<number>\d+))")


class Role(Enum):
    """What it means to remove positions along a factor."""

    PASS = "pass-through"
    CONTRACTED = "contracted"
    NORMALISED = "normalised"
    BLOCKED = "blocked"
    SEPARATE = "separate"


_MARKS = {"!": Role.BLOCKED, "=": Role.SEPARATE, "~": Role.NORMALISED}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a term: its factors (empty: size 1; None: nothing is said), and the positions that are meant."""

    factors: tuple[str, ...] | None
    take: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Term:
    """One view of one operand; ``axes`` is None where nothing is said of it."""

    axes: tuple[Axis, ...] | None
    summed: frozenset[str] = frozenset()
    starred: str | None = None


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed signature: for each input and each output, its views."""

    text: str
    inputs: tuple[tuple[Term, ...], ...]
    outputs: tuple[tuple[Term, ...], ...]
    roles: Mapping[str, Role] = field(default_factory=dict)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0
        self.roles: dict[str, Role] = {}

    def fail(self, message: str) -> RuleError:
        return RuleError(f"signature {self.text!r}, at column {self.position + 1}: {message}")

    def peek(self) -> str:
        match = _TOKEN.match(self.text, self.position)
        if match:
            return match.group().strip()
        if self.text[self.position :].strip():
            raise self.fail(f"unexpected {self.text[self.position :].strip()[0]!r}")
        return ""

    def next(self) -> str:
        token = self.peek()
        match = _TOKEN.match(self.text, self.position)
        self.position = match.end() if match else len(self.text)
        return token

    def accept(self, token: str) -> bool:
        if self.peek() == token:
            self.next()
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise self.fail(f"expected {token!r}, found {self.peek() or 'the end'!r}")

    def factor(self, summed: set[str]) -> str:
        name = self.next()
        while self.peek() in ("!", "~", "=", "^"):
            mark = self.next()
            if mark == "^":
                summed.add(name)
            else:
                self.roles[name] = _MARKS[mark]
        return name

    def number(self) -> int:
        token = self.next()
        if not token.isdigit():
            raise self.fail(f"expected a position, found {token!r}")
        return int(token)

    def term(self) -> Term:
        axes: list[Axis] = []
        summed: set[str] = set()
        starred: str | None = None
        while (token := self.peek()) not in ("", ",", "|", "->"):
            take = None
            if token == "?":
                self.next()
                if axes:
                    raise self.fail("'?' stands alone in its term")
                return Term(None)
            if token == "(":
                self.next()
                factors = []
                while not self.accept(")"):
                    if not self.peek()[:1].isalpha():
                        raise self.fail(f"expected a factor or ')', found {self.peek() or 'the end'!r}")
                    factors.append(self.factor(summed))
                axis = Axis(tuple(factors))
            elif token == "_":
                self.next()
                axis = Axis(None)
            elif token == "1":
                self.next()
                axis = Axis(())
            elif token[0].isalpha():
                name = self.factor(summed)
                if self.accept("*"):
                    if starred:
                        raise self.fail("a second '*' in one term")
                    starred = name
                    # 'S!*' and 'S*!' read the same
                    if self.peek() in _MARKS:
                        self.roles[name] = _MARKS[self.next()]
                axis = Axis((name,))
            else:
                raise self.fail(f"unexpected {token!r}")
            if self.accept("["):
                start = self.number()
                self.expect(":")
                take = (start, self.number())
                self.expect("]")
                axis = Axis(axis.factors, take)
            axes.append(axis)
        return Term(tuple(axes), frozenset(summed), starred)

    def operands(self) -> tuple[tuple[Term, ...], ...]:
        found: list[tuple[Term, ...]] = []
        while True:
            views = [self.term()]
            while self.accept("|"):
                views.append(self.term())
            found.append(tuple(views))
            if not self.accept(","):
                return tuple(found)


@lru_cache(maxsize=4096)
def parse(text: str) -> Pattern:
    """Parse a signature.

    Raises:
        RuleError: The text is malformed; the message quotes it and points at the fault.
    """
    parser = _Parser(text)
    inputs = parser.operands()
    parser.expect("->")
    outputs = parser.operands()
    if parser.peek():
        raise parser.fail(f"unexpected {parser.peek()!r}")
    return Pattern(text, inputs, outputs, parser.roles)


@dataclass(frozen=True)
class View:
    """One view of one operand of an op, its stars expanded.

    Attributes:
        is_output, slot: Which operand: ``outputs[slot]`` or ``inputs[slot]``.
        axes: One entry an axis of the operand.
        summed: Factors that the op sums over in this operand (contracted ones included).
    """

    is_output: bool
    slot: int
    axes: tuple[Axis, ...]
    summed: frozenset[str]

    @cached_property
    def factors(self) -> tuple[str, ...]:
        """All factors of the view, slowest first."""
        return tuple(name for axis in self.axes for name in axis.factors or ())


@dataclass(frozen=True, slots=True)
class Signature:
    """A pattern bound to the shapes of one op: every factor has a size and a role."""

    text: str
    views: tuple[View, ...]
    sizes: Mapping[str, int]
    roles: Mapping[str, Role]

    def role(self, factor: str) -> Role:
        return self.roles.get(factor, Role.PASS)


def _expand(pattern: Pattern, term: Term, rank: int, where: str) -> tuple[Axis, ...]:
    assert term.axes is not None
    if term.starred is None:
        if len(term.axes) != rank:
            raise RuleError(
                f"signature {pattern.text!r}: {where} has rank {rank}, the term has {len(term.axes)} axes"
            )
        return term.axes
    extra = rank - len(term.axes) + 1
    if extra < 0:
        raise RuleError(f"signature {pattern.text!r}: {where} has rank {rank}, too low for its term")
    axes: list[Axis] = []
    for axis in term.axes:
        if axis.factors == (term.starred,):
            axes += [Axis((f"{term.starred}{i}",)) for i in range(extra)]
        else:
            axes.append(axis)
    return tuple(axes)


def bind(
    pattern: Pattern,
    input_shapes: Sequence[tuple[int, ...] | None],
    output_shapes: Sequence[tuple[int, ...] | None],
    sizes: Mapping[str, int] | None = None,
) -> Signature:
    """Bind a pattern to the shapes of one op.

    Args:
        pattern: The parsed signature.
        input_shapes: Static shapes by slot; None where the operand is missing (its terms are passed over).
        output_shapes: Likewise for the outputs.
        sizes: Factor sizes known beforehand (from attributes such as ``group``).

    Raises:
        RuleError: Ranks or sizes contradict the signature.
    """
    known = dict(sizes or {})
    views: list[View] = []
    shapes: list[tuple[int, ...]] = []
    starred: dict[str, int] = {}
    for is_output, operands, operand_shapes in (
        (False, pattern.inputs, input_shapes),
        (True, pattern.outputs, output_shapes),
    ):
        for slot, terms in enumerate(operands):
            shape = operand_shapes[slot] if slot < len(operand_shapes) else None
            if shape is None:
                continue
            where = f"{'output' if is_output else 'input'} {slot}"
            for term in terms:
                if term.axes is None:
                    continue
                axes = _expand(pattern, term, len(shape), where)
                if term.starred:
                    starred[term.starred] = max(starred.get(term.starred, 0), len(shape) - len(term.axes) + 1)
                views.append(View(is_output, slot, axes, term.summed))
                shapes.append(shape)
    _solve_sizes(pattern, views, shapes, known)
    roles: dict[str, Role] = {}
    in_outputs = {name for view in views if view.is_output for name in view.factors}
    for view in views:
        for name in view.factors:
            base = name if name in pattern.roles else name.rstrip("0123456789")
            marked = pattern.roles.get(base)
            roles[name] = marked or (Role.PASS if name in in_outputs else Role.CONTRACTED)
    final = tuple(
        View(
            v.is_output,
            v.slot,
            v.axes,
            v.summed
            | frozenset(
                f
                for f in v.factors
                if not v.is_output and f not in in_outputs and roles[f] is not Role.NORMALISED
            ),
        )
        for v in views
    )
    return Signature(pattern.text, final, known, roles)


def _solve_sizes(
    pattern: Pattern, views: Sequence[View], shapes: Sequence[tuple[int, ...]], known: dict[str, int]
) -> None:
    """Work out factor sizes by division until nothing changes; check that all axes multiply out."""
    equations: list[tuple[tuple[str, ...], int, str]] = []
    for view, shape in zip(views, shapes, strict=True):
        for index, (axis, size) in enumerate(zip(view.axes, shape, strict=True)):
            where = f"{'output' if view.is_output else 'input'} {view.slot}, axis {index}"
            if axis.factors is not None:
                if axis.take is not None:
                    size = max(0, min(axis.take[1], size) - axis.take[0])
                equations.append((axis.factors, size, where))
    pending = equations
    while pending:
        left = []
        for factors, size, where in pending:
            missing = [name for name in factors if name not in known]
            if len(missing) > 1:
                left.append((factors, size, where))
                continue
            rest = prod(known[name] for name in factors if name in known)
            if missing:
                if rest == 0 or size % rest:
                    raise RuleError(
                        f"signature {pattern.text!r}: {where} of size {size} is no multiple of {rest}"
                    )
                known[missing[0]] = size // rest
            elif rest != size:
                spelled = " ".join(factors) or "1"
                raise RuleError(
                    f"signature {pattern.text!r}: {where} has size {size}, but ({spelled}) is {rest}"
                )
        if len(left) == len(pending):
            names = sorted({n for f, _, _ in left for n in f if n not in known})
            raise RuleError(
                f"signature {pattern.text!r}: the size of {', '.join(names)} cannot be worked out"
            )
        pending = left
