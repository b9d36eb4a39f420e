"""How labels move: each flow against the op that it stands for, run by numpy on the labels themselves."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphprune.axes import flow as flows
from graphprune.axes.flow import (
    ChainFlow,
    Flow,
    Operand,
    ReshapeFlow,
    SignatureFlow,
    TakeFlow,
    reshape_blocks,
)
from graphprune.axes.labels import Atoms, Labels, varying_axes
from graphprune.axes.signature import bind, parse

X, Y = Operand(False, 0), Operand(True, 0)


def push(flow: Flow, atoms: Atoms, source: Operand, labels: Labels) -> dict[Operand, Labels]:
    """What a flow carries to the other operands."""
    return {target: atoms.find(carried) for target, carried in flow.push(atoms, source, labels, "Op 'op'")}


def numbered(atoms: Atoms, shape: tuple[int, ...]) -> Labels:
    """A label of its own for every element."""
    return atoms.new(prod(shape)).reshape(shape)


def same_everywhere(found: Labels, expected: Labels) -> bool:
    return bool((np.broadcast_to(found, expected.shape) == expected).all())


# -- take ----------------------------------------------------------------------------------------


@st.composite
def takes(draw: st.DrawFn, holes: bool = True) -> tuple[TakeFlow, tuple[int, ...]]:
    """An index along some axis of some shape, holes included."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    axis = draw(st.integers(0, len(shape) - 1))
    index = draw(st.lists(st.integers(-1 if holes else 0, shape[axis] - 1), min_size=1, max_size=6))
    return TakeFlow(X, Y, axis, np.asarray(index, dtype=np.int64), shape[axis]), shape


def taken(flow: TakeFlow, array: Labels) -> Labels:
    """The op itself; 0 where nothing is taken."""
    result = array.take(np.maximum(flow.index, 0), axis=flow.axis)
    result[(slice(None),) * flow.axis + (flow.index < 0,)] = 0
    return result


@given(takes())
def test_take_forward_is_the_op_itself(given_take: tuple[TakeFlow, tuple[int, ...]]) -> None:
    flow, shape = given_take
    atoms = Atoms()
    labels = numbered(atoms, shape)
    carried = push(flow, atoms, X, labels)[Y]
    assert same_everywhere(carried, atoms.find(taken(flow, labels)))


@given(takes())
def test_take_backward_is_its_transpose(given_take: tuple[TakeFlow, tuple[int, ...]]) -> None:
    """What the target bears comes back to the position that it was taken from; all that were taken from one are one."""
    flow, shape = given_take
    atoms = Atoms()
    out = (*shape[: flow.axis], len(flow.index), *shape[flow.axis + 1 :])
    labels = numbered(atoms, out)
    carried = np.broadcast_to(push(flow, atoms, Y, labels)[X], shape)
    labels = atoms.find(labels)
    for position, source in enumerate(flow.index.tolist()):
        if source >= 0:
            there = carried.take(source, axis=flow.axis)
            assert np.array_equal(there, labels.take(position, axis=flow.axis))
    unused = [i for i in range(shape[flow.axis]) if i not in flow.index]
    assert not carried.take(unused, axis=flow.axis).any()


@given(takes(holes=False))
def test_there_and_back_says_nothing_new_of_what_was_taken(
    given_take: tuple[TakeFlow, tuple[int, ...]],
) -> None:
    flow, shape = given_take
    atoms = Atoms()
    labels = numbered(atoms, shape)
    there = push(flow, atoms, X, labels)[Y]
    events = atoms.events
    back = np.broadcast_to(push(flow, atoms, Y, there)[X], shape)
    assert atoms.events == events
    used = np.isin(np.arange(shape[flow.axis]), flow.index)
    assert np.array_equal(
        back.compress(used, axis=flow.axis), atoms.find(labels).compress(used, axis=flow.axis)
    )


def test_a_shuffled_axis_must_not_depend_on_rows() -> None:
    """One literal index serves all rows: a ragged labelling would need one index a row."""
    atoms = Atoms()
    labels = numbered(atoms, (2, 3))
    swap = TakeFlow(X, Y, 1, np.asarray([2, 1, 0]), 3)
    push(swap, atoms, X, labels)
    assert np.array_equal(atoms.find(labels[0]), atoms.find(labels[1]))
    for index, literal, united in (([1, 2], False, False), ([0, 2], False, True), ([1, 2], True, True)):
        atoms = Atoms()  # a range is written as a range, which may begin elsewhere; all else is an index
        labels = numbered(atoms, (2, 3))
        push(TakeFlow(X, Y, 1, np.asarray(index), 3, literal=literal), atoms, X, labels)
        assert (atoms.events > 0) == united


@given(st.integers(1, 4), st.sampled_from([(), (1,), (2,), (2, 2)]), st.data())
def test_gather_by_an_array_of_indices(size: int, places: tuple[int, ...], data: st.DataObject) -> None:
    index = data.draw(hnp.arrays(np.int64, places, elements=st.integers(0, size - 1)))
    flow = TakeFlow(X, Y, 1, index.ravel(), size, places)
    atoms = Atoms()
    labels = numbered(atoms, (2, size, 3))
    carried = push(flow, atoms, X, labels)[Y]
    expected = atoms.find(labels.take(index, axis=1))
    assert carried.ndim == expected.ndim
    assert same_everywhere(carried, expected)
    back = np.broadcast_to(push(flow, atoms, Y, carried)[X], labels.shape)
    used = np.unique(index)
    assert np.array_equal(back.take(used, axis=1), atoms.find(labels).take(used, axis=1))


def test_pieces_of_a_concat() -> None:
    pieces = [TakeFlow(Y, Operand(False, slot), 0, np.arange(2 * slot, 2 * slot + 2), 4) for slot in (0, 1)]
    atoms = Atoms()
    whole = atoms.new(4)
    assert push(pieces[0], atoms, Y, whole) == {X: pytest.approx(whole[:2])}
    part = atoms.new(2)
    (carried,) = push(pieces[1], atoms, Operand(False, 1), part).values()
    assert carried.tolist() == [0, 0, *part.tolist()]


@given(takes(holes=False), st.data())
def test_chains_are_one_take_after_another(
    given_take: tuple[TakeFlow, tuple[int, ...]], data: st.DataObject
) -> None:
    first, shape = given_take
    axis = data.draw(st.sampled_from([a for a in range(len(shape) + 1) if a != first.axis]))
    if axis == len(shape):
        shape = (*shape, 3)
    index = sorted(data.draw(st.sets(st.integers(0, shape[axis] - 1), min_size=1)))
    chain = ChainFlow((first, TakeFlow(X, Y, axis, np.asarray(index), shape[axis])))
    assert chain.operands() == (X, Y)
    atoms = Atoms()
    labels = numbered(atoms, shape)
    carried = push(chain, atoms, X, labels)[Y]
    expected = atoms.find(labels).take(first.index, axis=first.axis).take(index, axis=axis)
    assert same_everywhere(carried, expected)
    back = np.broadcast_to(push(chain, atoms, Y, carried)[X], shape)
    assert (back[back > 0] == atoms.find(labels)[back > 0]).all()


# -- reshape ----------------------------------------------------------------------------------------


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of equal size, ones among them."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=1, max_size=5))

    def shape() -> tuple[int, ...]:
        sizes: list[int] = []
        for factor in factors:
            joined = draw(st.booleans())
            if sizes and joined:
                sizes[-1] *= factor
            else:
                sizes.append(factor)
            sizes += draw(st.sampled_from(([], [1])))
        return tuple(sizes)

    return shape(), shape()


@given(reshapes())
def test_reshape_is_the_op_itself_both_ways(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    source, target = pair
    flow = ReshapeFlow(X, Y, source, target)
    for start, end, operand, other in ((source, target, X, Y), (target, source, Y, X)):
        atoms = Atoms()
        labels = numbered(atoms, start)
        carried = push(flow, atoms, operand, labels)[other]
        assert carried.ndim == len(end)
        assert all(size in (1, full) for size, full in zip(carried.shape, end, strict=True))
        assert same_everywhere(carried, labels.reshape(end))
        assert atoms.events == 0
        assert same_everywhere(push(flow, atoms, other, carried)[operand], labels)


@given(reshapes(), st.data())
def test_reshape_of_labels_that_vary_along_some_axes(
    pair: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    source, target = pair
    atoms = Atoms()
    small = numbered(atoms, data.draw(st.tuples(*(st.sampled_from([1, size]) for size in source))))
    carried = push(ReshapeFlow(X, Y, source, target), atoms, X, small)[Y]
    assert same_everywhere(carried, np.broadcast_to(small, source).reshape(target))


@given(reshapes())
def test_blocks_of_a_reshape(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    source, target = pair
    blocks = reshape_blocks(source, target)
    assert [axis for left, _ in blocks for axis in left] == list(range(len(source)))
    assert [axis for _, right in blocks for axis in right] == list(range(len(target)))
    for left, right in blocks:
        assert prod(source[a] for a in left) == prod(target[a] for a in right)


def test_blocks_of_shapes_of_different_sizes() -> None:
    with pytest.raises(ValueError, match="differ in size"):
        reshape_blocks((2, 3), (2, 4))


def test_a_labelling_that_would_grow_too_large_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MAX_ELEMENTS", 10)
    atoms = Atoms()
    labels = atoms.new(4).reshape(4, 1)
    assert push(ReshapeFlow(X, Y, (4, 4), (16,)), atoms, X, labels) == {}
    assert "16 elements" in (atoms.frozen(int(labels[0, 0])) or "")


# -- signatures ----------------------------------------------------------------------------------------


def signature(
    text: str, inputs: list[tuple[int, ...]], output: tuple[int, ...], **sizes: int
) -> SignatureFlow:
    return SignatureFlow(bind(parse(text), inputs, [output], sizes))


def test_labels_pass_along_shared_factors() -> None:
    flow = signature("n c S*, c -> n c S*", [(2, 3, 4), (3,)], (2, 3, 4))
    atoms = Atoms()
    labels = atoms.new(3).reshape(1, 3, 1)
    carried = push(flow, atoms, X, labels)
    assert {operand: array.tolist() for operand, array in carried.items()} == {
        Operand(False, 1): labels.ravel().tolist(),
        Y: labels.tolist(),
    }
    assert atoms.events == 0


def test_contracted_labels_stay_among_the_inputs() -> None:
    flow = signature("m k, k n -> m n", [(2, 3), (3, 4)], (2, 4))
    atoms = Atoms()
    labels = atoms.new(3).reshape(1, 3)
    assert list(push(flow, atoms, X, labels)) == [Operand(False, 1)]


def test_a_context_that_the_other_operand_lacks_is_united() -> None:
    """Which dimensions of a head go may not depend on the head where a table serves all heads."""
    flow = signature("b (h d), d -> b (h d)", [(2, 6), (3,)], (2, 6))
    atoms = Atoms()
    labels = atoms.new(6).reshape(1, 6)
    carried = push(flow, atoms, X, labels)
    found = atoms.find(labels).reshape(2, 3)
    assert np.array_equal(found[0], found[1])
    assert len(np.unique(found)) == 3
    assert np.array_equal(atoms.find(carried[Operand(False, 1)]), found[0])


def test_groups_keep_their_own_channels() -> None:
    flow = signature("n (g c), (g k) c -> n (g k)", [(1, 6), (4, 3)], (1, 4), g=2)
    atoms = Atoms()
    labels = atoms.new(6).reshape(1, 6)
    weight = push(flow, atoms, X, labels)[Operand(False, 1)]
    assert atoms.events == 0
    # Rows 0 and 1 of the weight belong to the first group, 2 and 3 to the second.
    assert weight.tolist() == np.repeat(labels.reshape(2, 3), 2, axis=0).tolist()


@pytest.mark.parametrize("mark", ["!", "="])
def test_blocked_factors_freeze(mark: str) -> None:
    flow = signature(f"n c{mark} -> n c{mark}", [(2, 3)], (2, 3))
    atoms = Atoms()
    labels = atoms.new(3).reshape(1, 3)
    assert push(flow, atoms, X, labels) == {}
    assert "nothing may be removed along 'c'" in (atoms.frozen(1) or "")


def test_normalised_factors_are_statistical() -> None:
    flow = signature("n c~, c~ -> n c~", [(2, 3), (3,)], (2, 3))
    atoms = Atoms()
    carried = push(flow, atoms, X, atoms.new(3).reshape(1, 3))
    assert set(carried) == {Operand(False, 1), Y}
    assert "normalised over 'c'" in (atoms.statistical(1) or "")
    assert atoms.frozen(1) is None


def test_axes_of_which_nothing_is_said_freeze() -> None:
    flow = signature("n _ -> n", [(2, 3)], (2,))
    atoms = Atoms()
    assert push(flow, atoms, X, atoms.new(3).reshape(1, 3)) == {}
    assert "nothing may be removed along axis 1" in (atoms.frozen(1) or "")


def test_parts_of_an_axis() -> None:
    """Query and key side by side: the first part goes with one operand, the second with another."""
    flow = signature("b d[0:3] | b e[3:5], d -> b e", [(2, 5), (3,)], (2, 2))
    atoms = Atoms()
    labels = atoms.new(5).reshape(1, 5)
    carried = push(flow, atoms, X, labels)
    assert carried[Operand(False, 1)].tolist() == [1, 2, 3]
    assert carried[Y].tolist() == [[4, 5]]
    back = push(flow, atoms, Operand(False, 1), atoms.new(3))
    assert back[X].tolist() == [[6, 7, 8, 0, 0]]


def test_the_hidden_state_stands_twice_in_one_weight() -> None:
    flow = signature("(q= h) _ | _ h^ -> h", [(6, 3)], (3,), q=2)
    atoms = Atoms()
    labels = atoms.new(6).reshape(6, 1)
    carried = push(flow, atoms, X, labels)
    rows = atoms.find(labels).ravel()
    assert rows[:3].tolist() == rows[3:].tolist()
    assert carried[X].shape in ((1, 3), (6, 1), (6, 3))
    assert carried[Y].tolist() == rows[:3].tolist()


@given(st.permutations(range(3)), st.data())
def test_transposing_twice_is_transposing_once(order: list[int], data: st.DataObject) -> None:
    """A chain of signatures says what their composition says."""
    second = data.draw(st.permutations(range(3)))
    shape = (2, 3, 4)
    words = [f"x{i}" for i in range(3)]

    def transposed(axes: list[int], size: tuple[int, ...]) -> SignatureFlow:
        return signature(
            f"{' '.join(words)} -> {' '.join(words[a] for a in axes)}", [size], tuple(size[a] for a in axes)
        )

    middle = tuple(shape[a] for a in order)
    atoms = Atoms()
    labels = numbered(atoms, shape)
    axis = data.draw(st.integers(0, 2))
    labels = labels.take([0], axis=axis)
    own = varying_axes(labels)[-1]
    first = push(transposed(order, shape), atoms, X, labels)[Y]
    both = push(transposed(second, middle), atoms, X, first)[Y]
    once = push(transposed([order[a] for a in second], shape), atoms, X, labels)[Y]
    assert same_everywhere(atoms.find(both), atoms.find(once))
    # A later axis of the target is no context: labels are united along it, so that the own axis stays the same.
    assert (
        varying_axes(atoms.find(once)) == ()
        or [order[a] for a in second][varying_axes(atoms.find(once))[-1]] == own
    )
