"""Labels: the union-find, colourings, and what they are merged by."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphprune.axes.labels import (
    Atoms,
    Colouring,
    Labels,
    compress,
    distinct,
    merged,
    unite_along,
    unite_identical,
    varying_axes,
)

COUNT = 12
pairs = st.lists(st.tuples(st.integers(0, COUNT), st.integers(0, COUNT)), max_size=20)
#: Some unions at once, then some more.
rounds = st.lists(pairs, max_size=4)


def fresh(count: int = COUNT) -> Atoms:
    atoms = Atoms()
    atoms.new(count)
    return atoms


def array(values: object) -> Labels:
    return np.asarray(values, dtype=np.int32)


def unite(atoms: Atoms, some: list[tuple[int, int]]) -> None:
    if some:
        left, right = zip(*some, strict=True)
        atoms.union(array(left), array(right))


def partition(atoms: Atoms) -> list[set[int]]:
    roots = atoms.find(np.arange(1, len(atoms), dtype=np.int32)).tolist()
    classes: dict[int, set[int]] = {}
    for label, root in enumerate(roots, 1):
        classes.setdefault(root, set()).add(label)
    return sorted(classes.values(), key=min)


labellings = hnp.arrays(np.int32, hnp.array_shapes(max_dims=3, max_side=4), elements=st.integers(0, 5))


@st.composite
def two_labellings(draw: st.DrawFn) -> tuple[Labels, Labels]:
    """Two labellings of one tensor, of disjoint labels, each varying along some of its axes."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    sides = [tuple(draw(st.sampled_from([1, size])) for size in shape) for _ in range(2)]
    first = draw(hnp.arrays(np.int32, sides[0], elements=st.integers(0, 5)))
    second = draw(hnp.arrays(np.int32, sides[1], elements=st.sampled_from([0, 6, 7, 8, 9])))
    return first, second


# -- the union-find ---------------------------------------------------------------------------------------------------


@given(rounds)
def test_classes_are_the_connected_components(steps: list[list[tuple[int, int]]]) -> None:
    atoms = fresh()
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(1, COUNT + 1))
    for some in steps:
        unite(atoms, some)
        graph.add_edges_from((a, b) for a, b in some if a and b)
    assert partition(atoms) == sorted(nx.connected_components(graph), key=min)


@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_unions_does_not_matter(some: list[tuple[int, int]], random: object) -> None:
    at_once, one_by_one = fresh(), fresh()
    unite(at_once, some)
    shuffled = list(some)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for pair in shuffled:
        unite(one_by_one, [pair])
    assert partition(at_once) == partition(one_by_one)
    everything = np.arange(COUNT + 1, dtype=np.int32)
    assert np.array_equal(at_once.find(everything), one_by_one.find(everything))


@given(pairs)
def test_find_names_the_smallest_and_is_a_fixpoint(some: list[tuple[int, int]]) -> None:
    atoms = fresh()
    unite(atoms, some)
    everything = np.arange(COUNT + 1, dtype=np.int32)
    roots = atoms.find(everything)
    assert roots[0] == 0
    assert (roots <= everything).all()
    assert np.array_equal(atoms.find(roots), roots)


@given(pairs, st.sets(st.integers(1, COUNT)), pairs)
def test_frozen_spreads_over_classes(
    before: list[tuple[int, int]], frozen: set[int], after: list[tuple[int, int]]
) -> None:
    atoms = fresh()
    unite(atoms, before)
    for label in frozen:
        atoms.freeze(array([label]), f"because of {label}")
    unite(atoms, after)
    for members in partition(atoms):
        reasons = {atoms.frozen(label) for label in members}
        assert len(reasons) == 1
        reason = reasons.pop()
        if members & frozen:
            assert reason in {f"because of {label}" for label in members & frozen}
        else:
            assert reason is None
        assert atoms.is_frozen(array(sorted(members))).tolist() == [reason is not None] * len(members)


def test_the_first_reason_stays_and_no_label_is_never_frozen() -> None:
    atoms = fresh()
    atoms.freeze(array([0, 3]), "first")
    atoms.freeze(array([3]), "second")
    atoms.mark_statistical(array([4]), "a mean")
    assert atoms.frozen(3) == "first"
    assert atoms.frozen(0) is None
    assert atoms.frozen(4) is None
    assert atoms.statistical(4) == "a mean"
    assert atoms.all_frozen(array([0, 3]))
    assert not atoms.all_frozen(array([3, 4]))


def test_events_count_what_was_learnt() -> None:
    atoms = fresh()
    unite(atoms, [(1, 2), (2, 3)])
    known = atoms.events
    assert known > 0
    unite(atoms, [(1, 3), (0, 5), (4, 4)])
    assert atoms.events == known
    atoms.freeze(array([2]), "why")
    assert atoms.events > known
    known = atoms.events
    atoms.freeze(array([1]), "known already")
    assert atoms.events == known


def test_more_labels_than_were_made_room_for() -> None:
    atoms = Atoms()
    first = atoms.new(3)
    many = atoms.new(5000)
    assert first.tolist() == [1, 2, 3]
    assert many[0] == 4
    assert len(atoms) == 5004
    atoms.union(first[:1], many[-1:])
    assert atoms.find(many[-1:]).tolist() == [1]


# -- arrays of labels ------------------------------------------------------------------------------


@given(labellings)
def test_compress_keeps_every_element(labels: Labels) -> None:
    small = compress(labels)
    assert np.array_equal(np.broadcast_to(small, labels.shape), labels)
    for axis, size in enumerate(small.shape):
        first = small.take([0], axis=axis)
        assert size == 1 or not (small == first).all()


@given(labellings)
def test_varying_axes_by_definition(labels: Labels) -> None:
    found = []
    for axis in range(labels.ndim):
        lines = np.moveaxis(labels, axis, -1).reshape(-1, labels.shape[axis])
        if any(len({label for label in line if label}) > 1 for line in lines.tolist()):
            found.append(axis)
    full = [axis for axis, size in enumerate(labels.shape) if size > 1]
    assert varying_axes(labels) == tuple(found or full[-1:])


@given(labellings, st.integers(0, 2))
def test_unite_along_makes_lines_one_class(labels: Labels, axis: int) -> None:
    axis %= labels.ndim
    atoms = fresh(5)
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(1, 6))
    for line in np.moveaxis(labels, axis, -1).reshape(-1, labels.shape[axis]).tolist():
        there = [label for label in line if label]
        graph.add_edges_from(pairwise(there))
    small = unite_along(atoms, labels, axis)
    assert small.shape[axis] == 1
    if labels.shape[axis] > 1:
        assert partition(atoms) == sorted(nx.connected_components(graph), key=min)
        whole = np.broadcast_to(small, labels.shape)
        assert (atoms.find(labels)[labels > 0] == whole[labels > 0]).all()


@settings(max_examples=300)
@given(two_labellings())
def test_unite_identical_by_brute_force(both: tuple[Labels, Labels]) -> None:
    left, right = both
    atoms = fresh(9)
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(1, 10))
    shape = np.broadcast_shapes(left.shape, right.shape)
    cells: list[dict[int, frozenset[int]]] = []
    for labels in both:
        flat = np.broadcast_to(labels, shape).ravel()
        cells.append({int(v): frozenset(np.flatnonzero(flat == v).tolist()) for v in np.unique(flat) if v})
    if any(a > 1 and b > 1 for a, b in zip(left.shape, right.shape, strict=True)):
        for one, covered in cells[0].items():
            graph.add_edges_from((one, other) for other, also in cells[1].items() if covered == also)
    unite_identical(atoms, left, right)
    assert partition(atoms) == sorted(nx.connected_components(graph), key=min)


@given(two_labellings())
def test_merged_says_all_that_either_says(both: tuple[Labels, Labels]) -> None:
    left, right = both
    joined = merged(left, right)
    shape = np.broadcast_shapes(left.shape, right.shape)
    a, b = np.broadcast_to(left, shape), np.broadcast_to(right, shape)
    agree = (a == b)[(a > 0) & (b > 0)].all()
    if joined is None:
        assert not agree or varying_axes(left)[-1:] != varying_axes(right)[-1:]
    else:
        assert agree
        assert np.array_equal(np.broadcast_to(joined, shape), np.where(a > 0, a, b))


def test_pieces_of_a_concat_are_joined() -> None:
    assert (found := merged(array([[1, 2, 0, 0]]), array([[0, 0, 3, 4]]))) is not None
    assert found.tolist() == [[1, 2, 3, 4]]
    assert merged(array([[1, 2]]), array([[2, 1]])) is None


@given(st.lists(labellings, max_size=3))
def test_distinct(some: list[Labels]) -> None:
    assert distinct(some).tolist() == sorted({v for labels in some for v in labels.ravel().tolist() if v})


# -- colourings -------------------------------------------------------------------------------------------------------


def test_a_colouring_learns_each_thing_once() -> None:
    atoms, colouring = fresh(), Colouring((2, 3))
    assert colouring.add(atoms, array([[1, 2, 3]]), 9)
    assert not colouring.add(atoms, array([[1, 2, 3]]), 9)
    assert not colouring.add(atoms, array([[1, 2, 3], [1, 2, 3]]), 9)
    assert not colouring.add(atoms, array([[0, 0, 0]]), 9)
    assert colouring.add(atoms, array([[4], [5]]), 9)
    assert [labels.tolist() for labels in colouring.labellings] == [[[1, 2, 3]], [[4], [5]]]


def test_labels_of_the_same_elements_are_united() -> None:
    atoms, colouring = fresh(), Colouring((3,))
    colouring.add(atoms, array([1, 2, 3]), 9)
    assert not colouring.add(atoms, array([6, 5, 4]), 9)
    assert atoms.find(array([4, 5, 6])).tolist() == [3, 2, 1]
    assert len(colouring.labellings) == 1


def test_a_label_of_the_whole_tensor_freezes() -> None:
    atoms, colouring = fresh(), Colouring((2, 2))
    assert not colouring.add(atoms, array([[7, 7], [7, 7]]), 9)
    assert atoms.frozen(7) == "it is all there is along its axis"
    assert colouring.labellings == []


def test_too_many_labellings_freeze() -> None:
    atoms, colouring = fresh(), Colouring((2, 2))
    assert colouring.add(atoms, array([[1, 2]]), 1)
    assert not colouring.add(atoms, array([[3], [4]]), 1)
    assert "more than 1 ways" in (atoms.frozen(3) or "")
    assert atoms.frozen(1) is None


@given(two_labellings(), pairs)
def test_tidy_is_idempotent_and_loses_no_element(
    both: tuple[Labels, Labels], some: list[tuple[int, int]]
) -> None:
    shape = np.broadcast_shapes(both[0].shape, both[1].shape)
    atoms, colouring = fresh(), Colouring(shape)
    for labels in both:
        colouring.add(atoms, labels, 9)
    unite(atoms, some)
    said = spoken(atoms, colouring)
    colouring.tidy(atoms)
    first = [labels.copy() for labels in colouring.labellings]
    assert spoken(atoms, colouring) >= {(label, cell) for label, cell in said if atoms.frozen(label) is None}
    colouring.tidy(atoms)
    assert len(first) == len(colouring.labellings)
    assert all(np.array_equal(a, b) for a, b in zip(first, colouring.labellings, strict=True))


def spoken(atoms: Atoms, colouring: Colouring) -> set[tuple[int, int]]:
    """(class, element) pairs."""
    return {
        (label, cell)
        for labels in colouring.labellings
        for cell, label in enumerate(np.broadcast_to(atoms.find(labels), colouring.shape).ravel().tolist())
        if label
    }
