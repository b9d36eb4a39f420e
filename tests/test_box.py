"""The numerics: boxes of masks, and norms by label."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphprune.kernels import saliency
from graphprune.kernels.box import Mask, box, broadcast_box, compact, separable
from graphprune.kernels.saliency import sums_by_label

shapes = hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)
masks = shapes.flatmap(lambda shape: hnp.arrays(np.bool_, shape))


@st.composite
def ragged(draw: st.DrawFn) -> Mask:
    """Masks that do compact: each row keeps as many as the next, though not the same."""

    def build(sizes: list[tuple[int, int]]) -> Mask:
        if not sizes:
            return np.ones((), dtype=bool)
        (size, keep), *rest = sizes
        chosen = draw(st.permutations(range(size)))[:keep]
        inner = [build(rest) for _ in range(size)]
        empty = np.zeros_like(inner[0])
        return np.stack([part if i in chosen else empty for i, part in enumerate(inner)])

    sizes = draw(
        st.lists(
            st.integers(1, 3).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
            min_size=1,
            max_size=3,
        )
    )
    return build(sizes)


def brute_box(mask: Mask) -> tuple[int, ...] | None:
    """All non-empty slices along the leading axis have the same box, and so on inwards."""
    if mask.ndim == 0:
        return ()
    parts = [part for part in mask if part.any()]
    if not parts:
        return (0,) * mask.ndim
    inner = {brute_box(part) for part in parts}
    if len(inner) != 1 or None in inner:
        return None
    (sizes,) = inner
    assert sizes is not None
    return (len(parts), *sizes)


def brute_compact(array: npt.NDArray[Any], mask: Mask) -> list[Any]:
    """Nested lists of what is kept."""
    if mask.ndim == 1:
        return [value for value, keep in zip(array.tolist(), mask.tolist(), strict=True) if keep]
    return [brute_compact(part, keep) for part, keep in zip(array, mask, strict=True) if keep.any()]


@given(masks)
def test_box_by_recursion(mask: Mask) -> None:
    assert box(mask) == brute_box(mask)


@given(ragged())
def test_compact_by_recursion(mask: Mask) -> None:
    array = np.arange(mask.size).reshape(mask.shape)
    left = compact(array, mask)
    assert left.shape == brute_box(mask)
    assert left.tolist() == brute_compact(array, mask)
    assert left.flags["C_CONTIGUOUS"]
    assert left.ravel().tolist() == array[mask].tolist()


@given(ragged(), st.data())
def test_axes_that_a_mask_does_not_depend_on(mask: Mask, data: st.DataObject) -> None:
    """A broadcasting mask says the same as the whole one."""
    shape = list(mask.shape)
    position = data.draw(st.integers(0, mask.ndim))
    small = np.expand_dims(mask, position)
    shape.insert(position, 3)
    array = np.arange(np.prod(shape)).reshape(shape)
    whole = np.broadcast_to(small, shape)
    assert broadcast_box(small, tuple(shape)) == box(whole)
    assert np.array_equal(compact(array, small), compact(array, whole))
    assert compact(array, small).size == whole.sum()


@given(ragged(), st.data())
def test_compacting_commutes_with_reshape(mask: Mask, data: st.DataObject) -> None:
    """Row-major order is what both keep, wherever both sides are boxes."""
    size = mask.size
    other = data.draw(st.sampled_from([(a, size // a) for a in range(1, size + 1) if size % a == 0]))
    turned = mask.reshape(other)
    array = np.arange(size)
    if box(turned) is None:
        with pytest.raises(ValueError, match="does not compact"):
            compact(array.reshape(other), turned)
    else:
        first = compact(array.reshape(mask.shape), mask)
        second = compact(array.reshape(other), turned)
        assert first.ravel().tolist() == second.ravel().tolist()


@given(masks)
def test_separable_is_an_outer_product(mask: Mask) -> None:
    factors = separable(mask)
    outer = np.ones((), dtype=bool)
    for factor in [
        mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)) for axis in range(mask.ndim)
    ]:
        outer = outer[..., None] & factor
    if factors is None:
        assert not mask.any() or not np.array_equal(outer, mask)
    else:
        assert np.array_equal(outer, mask)
        assert [factor.sum() for factor in factors] == list(box(mask) or ())


@given(shapes, st.sampled_from([1.0, 2.0, 3.0]), st.data())
def test_sums_by_label_by_brute_force(shape: tuple[int, ...], power: float, data: st.DataObject) -> None:
    array = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-8, 8, width=16)))
    small = tuple(data.draw(st.sampled_from([1, size])) for size in shape)
    labels = data.draw(hnp.arrays(np.int32, small, elements=st.integers(0, 6)))
    expected = np.zeros(8)
    for label, value in zip(
        np.broadcast_to(labels, shape).ravel().tolist(), array.ravel().tolist(), strict=True
    ):
        if label:
            expected[label] += abs(float(value)) ** power
    found = sums_by_label(array, labels, 8, power)
    assert found.dtype == np.float64
    assert found[0] == 0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_sums_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    array = rng.standard_normal((7, 5, 3)).astype(np.float32)
    for shape in ((7, 1, 1), (1, 5, 1), (7, 1, 3), (1, 1, 3), (7, 5, 3)):
        labels = rng.integers(0, 9, shape, dtype=np.int32)
        monkeypatch.setattr(saliency, "BLOCK", 1 << 22)
        whole = sums_by_label(array, labels, 9, 2)
        monkeypatch.setattr(saliency, "BLOCK", 16)
        np.testing.assert_allclose(sums_by_label(array, labels, 9, 2), whole, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint8, np.int32])
def test_sums_of_other_types(dtype: type[np.generic]) -> None:
    array = np.asarray([[1, 2], [100, 120]]).astype(dtype)
    labels = np.asarray([[1], [2]], dtype=np.int32)
    assert sums_by_label(array, labels, 3, 1).tolist() == [0, 3, 220]
    assert sums_by_label(array, labels, 3, 2).tolist() == [0, 5, 24400]


def test_a_scalar_weight() -> None:
    scalar = np.asarray(-3.0, dtype=np.float32)
    assert sums_by_label(scalar, np.asarray(1, dtype=np.int32), 2, 2).tolist() == [0, 9]
