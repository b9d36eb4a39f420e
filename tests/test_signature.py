"""The language of signatures: parsing, binding to shapes, and errors that point at the fault."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.axes.signature import Axis, Role, bind, parse
from graphprune.errors import GraphPruneError, RuleError


def test_a_convolution() -> None:
    pattern = parse("n (g c) S!*, (g k) c R!*, (g k) -> n (g k) T!*")
    (x,), (w,), (b,) = pattern.inputs
    assert x.axes == (Axis(("n",)), Axis(("g", "c")), Axis(("S",)))
    assert (x.starred, w.starred, b.starred) == ("S", "R", None)
    assert pattern.roles == {"S": Role.BLOCKED, "R": Role.BLOCKED, "T": Role.BLOCKED}
    bound = bind(pattern, [(2, 6, 5, 7), (8, 3, 3, 3), (8,)], [(2, 8, 3, 5)], {"g": 2})
    assert {name: bound.sizes[name] for name in ("n", "g", "c", "k", "S0", "S1", "T1")} == {
        "n": 2, "g": 2, "c": 3, "k": 4, "S0": 5, "S1": 7, "T1": 5,
    }  # fmt: skip
    assert [bound.role(name) for name in ("n", "g", "c", "k", "S0")] == [
        Role.PASS, Role.PASS, Role.CONTRACTED, Role.PASS, Role.BLOCKED,
    ]  # fmt: skip
    weight = bound.views[1]
    assert weight.factors == ("g", "k", "c", "R0", "R1")
    assert weight.summed == {"c", "R0", "R1"}


def test_marks() -> None:
    pattern = parse("a! b= c~ d^, (e! f^) -> a b c d")
    assert pattern.roles == {"a": Role.BLOCKED, "b": Role.SEPARATE, "c": Role.NORMALISED, "e": Role.BLOCKED}
    assert pattern.inputs[0][0].summed == {"d"}
    assert pattern.inputs[1][0].summed == {"f"}


def test_a_mark_before_and_behind_the_star_reads_the_same() -> None:
    one, other = parse("n S!* -> n"), parse("n S*! -> n")
    assert (one.inputs, one.roles) == (other.inputs, other.roles)


def test_views_wildcards_and_parts() -> None:
    pattern = parse("(h d)[0:6] | (h e)[6:9], ?, _ 1 -> h")
    first, second = pattern.inputs[0]
    assert first.axes == (Axis(("h", "d"), (0, 6)),)
    assert second.axes == (Axis(("h", "e"), (6, 9)),)
    assert pattern.inputs[1][0].axes is None
    assert pattern.inputs[2][0].axes == (Axis(None), Axis(()))
    bound = bind(pattern, [(9,), (4, 4), (7, 1)], [(3,)])
    assert bound.sizes == {"h": 3, "d": 2, "e": 1}
    assert [(view.is_output, view.slot) for view in bound.views] == [
        (False, 0),
        (False, 0),
        (False, 2),
        (True, 0),
    ]


def test_a_scalar_has_an_empty_term() -> None:
    pattern = parse("n,  -> ")
    assert pattern.inputs[1][0].axes == ()
    assert pattern.outputs[0][0].axes == ()
    assert bind(pattern, [(3,), ()], [()]).role("n") is Role.CONTRACTED


def test_missing_operands_are_passed_over() -> None:
    pattern = parse("n c, c, c -> n c")
    assert [view.slot for view in bind(pattern, [(2, 3), None, (3,)], [(2, 3)]).views] == [0, 2, 0]
    assert [view.slot for view in bind(pattern, [(2, 3)], [(2, 3)]).views] == [0, 0]


def test_stars_take_what_the_rank_leaves() -> None:
    pattern = parse("n S* c -> n S* c")
    for rank in range(2, 6):
        bound = bind(pattern, [tuple(range(2, 2 + rank))], [tuple(range(2, 2 + rank))])
        assert bound.views[0].factors == ("n", *(f"S{i}" for i in range(rank - 2)), "c")


def test_summed_over_in_one_operand_only() -> None:
    bound = bind(parse("b i, h i, h^ q -> b h"), [(2, 3), (4, 3), (4, 5)], [(2, 4)])
    assert [view.summed for view in bound.views] == [{"i"}, {"i"}, {"h", "q"}, set()]


def test_what_is_normalised_over_is_not_summed_over() -> None:
    bound = bind(parse("n c~, c~ -> n 1"), [(2, 3), (3,)], [(2, 1)])
    assert bound.role("c") is Role.NORMALISED
    assert all(not view.summed for view in bound.views)


names = st.sampled_from("abcdefgh")
axes = st.lists(names, min_size=1, max_size=3, unique=True).map(tuple)


@given(st.lists(axes, min_size=1, max_size=4), st.dictionaries(names, st.integers(1, 5), min_size=8))
def test_sizes_are_worked_out_by_division(term: list[tuple[str, ...]], sizes: dict[str, int]) -> None:
    """Every factor alone in one operand, products of them in another."""
    used = sorted({name for axis in term for name in axis})
    text = f"{' '.join(used)}, {' '.join('(' + ' '.join(axis) + ')' for axis in term)} -> {' '.join(used)}"
    alone = tuple(sizes[name] for name in used)
    products = tuple(prod(sizes[name] for name in axis) for axis in term)
    bound = bind(parse(text), [alone, products], [alone])
    assert bound.sizes == {name: sizes[name] for name in used}
    for index, axis in enumerate(term):
        wrong = (*products[:index], products[index] + 1, *products[index + 1 :])
        with pytest.raises(
            RuleError, match=f"axis {index} has size {wrong[index]}, but .{' '.join(axis)}. is"
        ):
            bind(parse(text), [alone, wrong], [alone])


@given(axes, st.integers(1, 6))
def test_one_unknown_of_a_product(axis: tuple[str, ...], size: int) -> None:
    known = dict.fromkeys(axis[1:], 3)
    text = f"({' '.join(axis)}) -> {axis[0]}"
    assert bind(parse(text), [(size * 3 ** len(known),)], [(size,)], known).sizes[axis[0]] == size
    if known:
        with pytest.raises(RuleError, match="is no multiple of"):
            bind(parse(text), [(size * 3 ** len(known) + 1,)], [None], known)


@pytest.mark.parametrize(
    ("text", "rest", "message"),
    [
        ("n (g c -> n", "-> n", r"expected a factor or '\)', found '->'"),
        ("n ( ) | -> n (", "", r"expected a factor or '\)', found 'the end'"),
        ("n c", "", "expected '->', found 'the end'"),
        ("n -> n -> n", "-> n", "unexpected '->'"),
        ("n % -> n", "% -> n", "unexpected '%'"),
        ("n ? -> n", "-> n", r"'\?' stands alone in its term"),
        ("S* T* -> n", "-> n", r"a second '\*' in one term"),
        ("n[1] -> n", "] -> n", "expected ':', found ']'"),
        ("n[a:2] -> n", ":2] -> n", "expected a position, found 'a'"),
        ("n ) -> n", ") -> n", r"unexpected '\)'"),
    ],
)
def test_errors_quote_the_text_and_point_at_the_fault(text: str, rest: str, message: str) -> None:
    """The column is that of the fault, or just behind it."""
    with pytest.raises(RuleError, match=message) as raised:
        parse(text)
    said = str(raised.value)
    assert said.startswith(f"signature {text!r}, at column ")
    column = int(said.removeprefix(f"signature {text!r}, at column ").partition(":")[0])
    assert text[column - 1 :].strip() == rest
    assert isinstance(raised.value, GraphPruneError)


@pytest.mark.parametrize(
    ("text", "inputs", "outputs", "message"),
    [
        ("n c -> n c", [(2, 3, 4)], [(2, 3)], "input 0 has rank 3, the term has 2 axes"),
        ("n c S* -> n", [(2,)], [(2,)], "input 0 has rank 1, too low for its term"),
        ("n c -> n c", [(2, 3)], [(2, 4)], r"output 0, axis 1 has size 4, but \(c\) is 3"),
        ("n 1 -> n", [(2, 3)], [(2,)], r"input 0, axis 1 has size 3, but \(1\) is 1"),
        ("(a b) -> (a b)", [(6,)], [(6,)], "the size of a, b cannot be worked out"),
        ("a, (a b) -> b", [(4,), (6,)], [None], "input 1, axis 0 of size 6 is no multiple of 4"),
    ],
)
def test_binding_errors(
    text: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...] | None], message: str
) -> None:
    with pytest.raises(RuleError, match=message) as raised:
        bind(parse(text), inputs, outputs)
    assert repr(text) in str(raised.value)


@given(st.text(alphabet="nc S*()[]:|?_!~=^,->1 2", max_size=14))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        pattern = parse(text)
    except RuleError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert pattern.text == text
        assert pattern.inputs
        assert pattern.outputs
    assert not refusal or repr(text) in refusal
