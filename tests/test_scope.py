"""How a fraction is spread over groups: fractions reached, floors held, structures told apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.axes.groups import Group
from graphprune.choice.rounding import allowed_counts, keep_count
from graphprune.choice.scope import SCOPES, keep_counts, ranked_parts, structures
from graphprune.errors import OptionError
from graphprune.model import as_ir
from graphprune.pipeline import analyze_ir

from .patterns.builder import Builder

Array = npt.NDArray[np.float64]


def made(*blocks: list[int]) -> list[Group]:
    """Groups with blocks of these sizes, labels counted from 1."""
    groups, start = [], 1
    for index, sizes in enumerate(blocks):
        arrays = []
        for size in sizes:
            arrays.append(np.arange(start, start + size, dtype=np.int32))
            start += size
        groups.append(Group(f"g{index}", arrays, index=index))
    return groups


def by_group(groups: list[Group], values: list[Array]) -> Array:
    """Scores of all labels from those of each group, in the order of its labels."""
    scores = np.zeros(1 + sum(g.size for g in groups))
    for group, value in zip(groups, values, strict=True):
        scores[group.labels] = value
    return scores


def removed(groups: list[Group], kept: list[int]) -> int:
    return sum(g.size - k * g.size // g.unit for g, k in zip(groups, kept, strict=True))


#: Up to five groups of one to three blocks, each block a multiple of the group's unit.
group_lists = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 3), min_size=1, max_size=3)), min_size=1, max_size=5
).map(lambda items: made(*[[unit * m for m in multiples] for unit, multiples in items]))


@settings(max_examples=100, deadline=None)
@given(group_lists, st.floats(0, 0.99), st.sampled_from([None, 1, 4, 8]))
def test_local_is_each_groups_ratio(groups: list[Group], ratio: float, round_to: int | None) -> None:
    scores = np.random.default_rng(0).random(1 + sum(g.size for g in groups))
    kept = keep_counts(groups, scores, [ratio] * len(groups), "local", 0.0, round_to)
    assert kept == [keep_count(group, ratio, round_to) for group in groups]


@settings(max_examples=150, deadline=None)
@given(
    group_lists,
    st.floats(0, 0.99),
    st.sampled_from(SCOPES),
    st.floats(0, 1),
    st.sampled_from([None, 1, 4, 8]),
    st.data(),
)
def test_floors_hold_and_what_stays_is_allowed(
    groups: list[Group], ratio: float, scope: str, floor: float, round_to: int | None, data: st.DataObject
) -> None:
    scores = np.random.default_rng(data.draw(st.integers(0, 99))).exponential(
        size=1 + sum(g.size for g in groups)
    )
    free = data.draw(st.lists(st.booleans(), min_size=len(groups), max_size=len(groups)))
    wanted = [ratio if f else None for f in free]
    for group, there, keep in zip(
        groups, free, keep_counts(groups, scores, wanted, scope, floor, round_to), strict=True
    ):
        assert 1 <= keep <= group.unit
        assert keep >= floor * group.unit - 1e-6
        assert keep == group.unit or (there and keep in allowed_counts(group, round_to))


@settings(max_examples=150, deadline=None)
@given(group_lists, st.floats(0, 0.99), st.floats(0, 0.5), st.integers(0, 99))
def test_global_reaches_the_fraction(groups: list[Group], ratio: float, floor: float, seed: int) -> None:
    """Of all labels together, to within half of the largest step; or all floors are reached."""
    scores = np.random.default_rng(seed).exponential(size=1 + sum(g.size for g in groups))
    kept = keep_counts(groups, scores, [ratio] * len(groups), "global", floor, 1)
    total = sum(g.size for g in groups)
    step = max(g.size // g.unit for g in groups)
    at_floor = all(k == allowed_counts(g, 1, floor)[0] for g, k in zip(groups, kept, strict=True))
    assert abs(removed(groups, kept) - ratio * total) <= step / 2 + 1e-9 or (
        at_floor and removed(groups, kept) < ratio * total
    )


@settings(max_examples=100, deadline=None)
@given(group_lists, st.floats(0, 0.99), st.integers(0, 99))
def test_global_takes_the_lowest(groups: list[Group], ratio: float, seed: int) -> None:
    """With single blocks and no rounding: no label that goes is worth more than one that stays, floors apart."""
    groups = made(*[[g.size] for g in groups])
    scores = np.random.default_rng(seed).exponential(size=1 + sum(g.size for g in groups)) + 0.01
    kept = keep_counts(groups, scores, [ratio] * len(groups), "global", 0.0, 1)
    gone: list[float] = []
    left: list[float] = []
    for group, keep in zip(groups, kept, strict=True):
        worth = np.sort(scores[group.labels]) / scores[group.labels].mean()
        gone += worth[: group.size - keep].tolist()
        left += worth[group.size - keep :].tolist() if keep > 1 else []
    assert not gone or not left or max(gone) <= min(left) * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(group_lists, st.floats(0, 0.99), st.floats(0, 0.99), st.sampled_from(SCOPES), st.integers(0, 99))
def test_a_larger_ratio_keeps_no_more(
    groups: list[Group], first: float, second: float, scope: str, seed: int
) -> None:
    scores = np.random.default_rng(seed).exponential(size=1 + sum(g.size for g in groups))
    less, more = (
        keep_counts(groups, scores, [ratio] * len(groups), scope, 0.1, 1) for ratio in sorted((first, second))
    )
    assert all(a >= b for a, b in zip(less, more, strict=True))


@settings(max_examples=100, deadline=None)
@given(group_lists, st.floats(0.01, 0.99), st.sampled_from(SCOPES), st.floats(0.01, 100), st.integers(0, 99))
def test_the_scale_of_a_groups_scores_does_not_matter(
    groups: list[Group], ratio: float, scope: str, factor: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.integers(1, 1000, g.size).astype(np.float64) for g in groups]
    wanted = [ratio] * len(groups)
    scaled = [values[0] * 2.0 ** round(np.log2(factor)), *values[1:]]
    assert keep_counts(groups, by_group(groups, values), wanted, scope) == keep_counts(
        groups, by_group(groups, scaled), wanted, scope
    )


def test_global_cuts_where_scores_are_uneven() -> None:
    groups = made([10], [10])
    even, uneven = np.ones(10), np.r_[np.full(5, 0.01), np.full(5, 2.0)]
    kept = keep_counts(groups, by_group(groups, [even, uneven]), [0.25, 0.25], "global", 0.1, 1)
    assert kept == [10, 5]


def test_a_floor_sends_the_rest_elsewhere() -> None:
    groups = made([10], [10])
    scores = by_group(groups, [np.linspace(1, 2, 10), np.r_[np.full(9, 0.01), 5.0]])
    assert keep_counts(groups, scores, [0.45, 0.45], "global", 0.1, 1) == [10, 1]
    assert keep_counts(groups, scores, [0.45, 0.45], "global", 0.5, 1) == [6, 5]


def test_blocks_lose_the_same_fraction() -> None:
    """The k-th weakest of each block count together: zeros of one block do not go before the other's first."""
    groups = made([4, 8], [6])
    scores = by_group(groups, [np.r_[0.0, 0, 1, 1, np.full(8, 3.0)], np.r_[1.0, 1, 1, 1, 1, 1.2]])
    np.testing.assert_allclose(ranked_parts(groups[0], scores), [2, 2, 7 / 3, 7 / 3])
    kept = keep_counts(groups, scores, [0.5, 0.5], "global", 0.0, 1)
    assert removed(groups, kept) == 9
    assert groups[0].unit == 4
    assert groups[1].unit == 6


def test_rounding_in_global_goes_from_multiple_to_multiple() -> None:
    groups = made([36], [64])
    scores = by_group(groups, [np.linspace(0.9, 1.1, 36), np.linspace(0.1, 1.9, 64)])
    kept = keep_counts(groups, scores, [0.3, 0.3], "global", 0.1, 8)
    assert kept == [36, 32]
    kept = keep_counts(groups, scores, [0.35, 0.35], "global", 0.1, 8)
    assert kept == [32, 32]


def test_ratios_of_their_own_do_not_compete() -> None:
    groups = made([10], [10], [10])
    scores = by_group(groups, [np.full(10, 5.0), np.linspace(0, 1, 10), np.linspace(0, 1, 10)])
    kept = keep_counts(groups, scores, [0.5, 0.2, None], "global", 0.1, 1)
    assert kept == [5, 8, 10]


def test_worthless_groups_go_down_to_their_floor() -> None:
    groups = made([10], [10])
    scores = by_group(groups, [np.zeros(10), np.linspace(1, 2, 10)])
    assert keep_counts(groups, scores, [0.5, 0.5], "global", 0.1, 1) == [1, 9]


def test_bad_options() -> None:
    groups = made([4])
    with pytest.raises(OptionError, match="unknown scope 'galactic'; there are local, global, isomorphic"):
        keep_counts(groups, np.zeros(5), [0.5], "galactic")
    with pytest.raises(OptionError, match=r"keep_at_least is 1\.5"):
        keep_counts(groups, np.zeros(5), [0.5], keep_at_least=1.5)


# -- structures --------------------------------------------------------------------------------------------------


def groups_of(draw: Callable[[Builder], None]) -> list[Group]:
    builder = Builder("net", 18)
    draw(builder)
    return analyze_ir(as_ir(builder.finish().model)[0]).groups


def residual_net(builder: Builder) -> None:
    """Residual blocks of two widths, two with BatchNorm, one without, one whose sum has its operands swapped."""
    x = builder.stem(8)
    for name, width in (("one", 12), ("two", 16)):
        inner = builder.relu(builder.batch_norm(f"{name}_bn", builder.conv(f"{name}_in", x, 8, width), width))
        y = builder.conv(f"{name}_out", inner, width, 8)
        x = builder.relu(builder.add(x, y) if name == "one" else builder.add(y, x))
    inner = builder.relu(builder.conv("three_in", x, 8, 12))
    x = builder.relu(builder.add(x, builder.conv("three_out", inner, 12, 8)))
    inner = builder.relu(builder.batch_norm("deep_bn", builder.conv("deep_in", x, 8, 12), 12))
    inner = builder.relu(builder.conv("deep", inner, 12, 12, group=12))
    builder.head(builder.relu(builder.add(x, builder.conv("deep_out", inner, 12, 8))), 8)


def test_structures_ignore_names_and_sizes_only() -> None:
    groups = groups_of(residual_net)
    of = dict(zip((g.name for g in groups), structures(groups), strict=True))
    assert of["one_in.w[0]"] == of["two_in.w[0]"]
    assert len({of[f"{name}.w[0]"] for name in ("stem", "one_in", "three_in", "deep_in")}) == 4


def test_structures_do_not_depend_on_the_order_of_operands() -> None:
    def sum_of(swapped: bool) -> Callable[[Builder], None]:
        def draw(builder: Builder) -> None:
            x = builder.stem(8)
            y = builder.conv("branch", x, 8, 8)
            builder.head(builder.relu(builder.add(*((y, x) if swapped else (x, y)))), 8)

        return draw

    assert structures(groups_of(sum_of(False))) == structures(groups_of(sum_of(True)))


def test_isomorphic_ranks_groups_of_one_structure_only() -> None:
    groups = groups_of(residual_net)
    place = {g.name: i for i, g in enumerate(groups)}
    one, two, three = (place[f"{name}_in.w[0]"] for name in ("one", "two", "three"))
    scores = np.ones(1 + max(int(g.labels.max()) for g in groups))
    scores[groups[two].labels[:14]] = 0.01  # 14 of 28 labels of the pair, and 14 of 40 of all three
    wanted: list[float | None] = [None] * len(groups)
    wanted[one] = wanted[two] = wanted[three] = 0.5
    kept = keep_counts(groups, scores, wanted, "isomorphic", 0.1, 1)
    assert (kept[one], kept[two], kept[three]) == (12, 2, 6)
    everything = keep_counts(groups, scores, wanted, "global", 0.1, 1)
    assert kept != everything
    assert everything[two] == 2
