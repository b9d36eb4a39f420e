"""Structured OBS against brute force over subsets, and least squares over samples."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.kernels.obs import (
    LEAST_DAMPING,
    Reader,
    corrected_weight,
    reconstruction_error,
    remove_greedily,
)

Array = npt.NDArray[Any]


def inputs(n: int, d: int, rng: np.random.Generator) -> Array:
    """Correlated, of unequal scales."""
    mixed = rng.standard_normal((n, d)) @ (np.eye(d) + 0.7 * rng.standard_normal((d, d)))
    return np.asarray(mixed * rng.lognormal(0, 0.7, d))


def owned(sizes: list[int], spare: int, rng: np.random.Generator) -> tuple[list[Array], int]:
    """Features of units of the given sizes, scattered, beside some that belong to none."""
    d = sum(sizes) + spare
    places = rng.permutation(d)
    return [np.array(part) for part in np.split(places, np.cumsum(sizes))[:-1]], d


def reader(
    sizes: list[int], m: int, seed: int, *, spare: int = 2, scale: float = 1.0, samples: int = 60
) -> tuple[Reader, Array]:
    rng = np.random.default_rng(seed)
    features, d = owned(sizes, spare, rng)
    x = inputs(samples, d, rng)
    return Reader(x.T @ x, rng.standard_normal((d, m)), features, scale), x


def by_samples(part: Reader, x: Array, removed: Any, damping: float = 0.0) -> tuple[float, Array]:
    """Error and weight of the best map from the inputs kept, by least squares over the samples.

    Damping is samples of the unit matrix: rows that hold each weight to what it was.
    """
    d = len(part.gram)
    x = np.r_[x, np.sqrt(max(damping, LEAST_DAMPING) * np.trace(part.gram) / d) * np.eye(d)]
    gone = {int(row) for unit in removed for row in part.features[unit]}
    kept = [row for row in range(d) if row not in gone]
    wanted = x @ part.weight
    weight = scipy.linalg.lstsq(x[:, kept], wanted)[0]
    return part.scale * float(((x[:, kept] @ weight - wanted) ** 2).sum()), np.asarray(weight)


def brute(readers: list[tuple[Reader, Array]], removed: Any) -> float:
    return sum(by_samples(part, x, removed)[0] for part, x in readers)


def some_readers(seed: int, units: int = 6) -> list[tuple[Reader, Array]]:
    """Three readers of the same units: one feature each, several each, and unequally many (of some units none)."""
    rng = np.random.default_rng(seed)
    return [
        reader([1] * units, 3, seed, scale=2.0),
        reader([3] * units, 4, seed + 1, scale=0.3, samples=90),
        reader(rng.integers(0, 3, units).tolist(), 40, seed + 2),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_each_step_is_the_cheapest_extension(seed: int) -> None:
    """The first removal is the best of all units; each later one the best given those before."""
    readers = some_readers(seed)
    removal = remove_greedily([part for part, _ in readers], 1)
    assert len(removal.order) == 5
    before: list[int] = []
    for unit, error in zip(removal.order, removal.errors, strict=True):
        errors = {other: brute(readers, [*before, other]) for other in range(6) if other not in before}
        assert unit == min(errors, key=errors.__getitem__)
        assert error == pytest.approx(errors[unit], rel=1e-6)
        before.append(int(unit))


@pytest.mark.parametrize("seed", range(5))
def test_no_subset_is_cheaper_than_the_best(seed: int) -> None:
    """Over all subsets of a size: greedy is none better than the best, and is the best of size one."""
    readers = some_readers(seed)
    removal = remove_greedily([part for part, _ in readers], 0)
    for size in range(1, 7):
        best = min(brute(readers, subset) for subset in combinations(range(6), size))
        assert removal.errors[size - 1] >= best * (1 - 1e-6)
        if size in (1, 6):
            assert removal.errors[size - 1] == pytest.approx(best, rel=1e-6)


@given(st.integers(0, 999), st.integers(0, 6))
@settings(deadline=None, max_examples=50)
def test_errors_are_those_of_the_sets(seed: int, keep: int) -> None:
    readers = [part for part, _ in some_readers(seed)]
    removal = remove_greedily(readers, keep)
    assert len(removal.order) == 6 - keep
    assert (np.diff(removal.errors, prepend=0.0) >= 0).all()
    for count, error in enumerate(removal.errors, 1):
        assert error == pytest.approx(reconstruction_error(readers, removal.order[:count]), rel=1e-5)


@given(
    st.integers(0, 999), st.lists(st.integers(0, 5), unique=True, max_size=6), st.sampled_from([0.0, 0.05])
)
@settings(deadline=None, max_examples=50)
def test_error_of_a_set_is_that_of_the_samples(seed: int, removed: list[int], damping: float) -> None:
    total, readers = 0.0, some_readers(seed)
    for part, x in readers:
        error, weight = by_samples(part, x, removed, damping)
        total += error
        corrected = corrected_weight(part, np.array(removed, dtype=int), damping=damping)
        assert np.allclose(corrected, weight, atol=1e-5)
    got = reconstruction_error([part for part, _ in readers], np.array(removed, dtype=int), damping=damping)
    assert got == pytest.approx(total, rel=1e-6, abs=1e-9)


def test_weights_at_counts() -> None:
    readers = some_readers(0)
    removal = remove_greedily([part for part, _ in readers], 1, weights_at=(6, 4, 1))
    assert [len(kept) for kept, _ in removal.weights] == [6, 4, 1]
    for kept, weights in removal.weights:
        removed = np.setdiff1d(np.arange(6), kept)
        assert set(removal.order[: 6 - len(kept)]) == set(removed)
        for (part, x), weight in zip(readers, weights, strict=True):
            assert np.allclose(weight, by_samples(part, x, removed)[1], atol=1e-5)
    untouched = removal.weights[0][1]
    assert all(
        np.array_equal(weight, part.weight) for weight, (part, _) in zip(untouched, readers, strict=True)
    )


@given(st.integers(0, 999), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_a_twin_is_free(seed: int, size: int) -> None:
    """A unit whose inputs equal another's costs nothing, and the other then is as costly as both."""
    rng = np.random.default_rng(seed)
    x = inputs(50, 4 * size, rng)
    x[:, :size] = x[:, size : 2 * size]
    part = Reader(x.T @ x, rng.standard_normal((4 * size, 3)), list(np.arange(4 * size).reshape(4, size)))
    removal = remove_greedily([part], 0)
    scale = removal.errors[-1]
    assert removal.order[0] in (0, 1)
    assert removal.errors[0] <= 1e-6 * scale
    assert reconstruction_error([part], np.array([0, 1])) > 1e-4 * scale


@given(st.integers(0, 999), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_orthogonal_inputs_cost_their_norm_times_their_weight(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    norms, weight = rng.lognormal(size=5 * size), rng.standard_normal((5 * size, 3))
    features = list(np.arange(5 * size).reshape(5, size))
    removal = remove_greedily([Reader(np.diag(norms**2), weight, features)], 0)
    wanted = ((norms[:, None] * weight) ** 2).reshape(5, -1).sum(axis=1)
    assert np.array_equal(removal.order, np.argsort(wanted))
    assert np.allclose(removal.errors, np.cumsum(np.sort(wanted)), rtol=1e-6)


def test_scale_weighs_readers() -> None:
    """Two readers that disagree: the one that weighs more has its way."""
    first, second = np.array([[1.0], [2.0], [3.0]]), np.array([[3.0], [2.0], [1.0]])
    units = [np.array([unit]) for unit in range(3)]
    for scale, cheapest in ((10.0, 0), (0.1, 2)):
        readers = [Reader(np.eye(3), first, units, scale), Reader(np.eye(3), second, units)]
        removal = remove_greedily(readers, 2)
        assert removal.order.tolist() == [cheapest]
        assert removal.errors[0] == pytest.approx(min(scale * 1 + 9, scale * 9 + 1))


@pytest.mark.parametrize("zero", ["gram", "weight", "input"])
def test_what_is_never_read_is_free(zero: str) -> None:
    part, x = reader([2] * 4, 3, 0, spare=0)
    gram, weight = part.gram.copy(), part.weight.copy()
    if zero == "gram":
        gram[:] = 0.0
    elif zero == "weight":
        weight[part.features[2]] = 0.0
    else:
        x[:, part.features[2]] = 0.0
        gram = x.T @ x
    changed = Reader(gram, weight, part.features)
    removal = remove_greedily([changed], 0, weights_at=(2,))
    assert all(np.isfinite(weight).all() for _, weights in removal.weights for weight in weights)
    if zero == "gram":
        assert not removal.errors.any()
        assert reconstruction_error([changed], np.array([0, 1])) == 0.0
    else:
        assert removal.order[0] == 2
        assert removal.errors[0] <= 1e-6 * removal.errors[-1]


@pytest.mark.parametrize("seed", range(3))
def test_blocks_lose_equally_many(seed: int) -> None:
    """Each step removes the cheapest of each block, given all before."""
    readers = some_readers(seed)
    blocks = [np.array([4, 0, 2]), np.array([1, 5])]
    removal = remove_greedily([part for part, _ in readers], 2, blocks=blocks)
    assert len(removal.order) == 4
    assert 3 not in removal.order  # in no block
    before: list[int] = []
    for place, unit in enumerate(removal.order):
        block = [other for other in blocks[place % 2].tolist() if other not in before]
        assert unit == min(block, key=lambda other: brute(readers, [*before, other]))
        before.append(int(unit))


@pytest.mark.parametrize("blocks", [1, 4])
def test_rounds_change_little(blocks: int) -> None:
    """Many units in few rounds: the error is the plain greedy removal's, to a small part, all along the way."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((900, 40)) @ rng.standard_normal((40, 240)), 0)
    x += 0.3 * rng.standard_normal(x.shape)
    gram = x.T @ x
    parts = [
        Reader(gram, rng.standard_normal((240, 30)), list(np.arange(240).reshape(80, 3))),
        Reader(gram[:80, :80], rng.standard_normal((80, 300)), list(np.arange(80).reshape(80, 1))),
    ]
    tied = list(np.arange(80).reshape(blocks, -1))
    plain = remove_greedily(parts, 8, blocks=tied, batch=1)
    for batch in (2, 5):
        rounds = remove_greedily(parts, 8, blocks=tied, batch=batch)
        assert np.all(rounds.errors <= 1.03 * plain.errors)
        assert rounds.errors[-1] == pytest.approx(reconstruction_error(parts, rounds.order), rel=1e-5)


def test_many_removals_stay_exact() -> None:
    """Enough of them that the inverse is brought up to date and compacted several times."""
    part, _ = reader([3] * 400, 5, 0, spare=10, samples=2500)
    removal = remove_greedily([part], 40)
    for count in (50, 200, 360):
        assert removal.errors[count - 1] == pytest.approx(
            reconstruction_error([part], removal.order[:count]), rel=1e-5
        )


@pytest.mark.parametrize("samples", [3, 20, 100])
def test_fewer_samples_than_features(samples: int) -> None:
    """Float32 statistics of low rank, scales that differ by millions, twins and dead inputs: no digit is lost."""
    rng = np.random.default_rng(samples)
    x = rng.standard_normal((samples, 300)) * rng.lognormal(0, 3, 300)
    x[:, :30], x[:, 60:90] = x[:, 30:60], 0.0
    x = x.astype(np.float32)
    part = Reader(x.T @ x, rng.standard_normal((300, 5)), list(np.arange(300).reshape(100, 3)))
    removal = remove_greedily([part], 0)
    for count in (30, 60, 80, 90, 99):
        wanted = reconstruction_error([part], removal.order[:count])
        assert removal.errors[count - 1] == pytest.approx(wanted, rel=1e-4)


def test_same_result_each_time() -> None:
    parts = [part for part, _ in some_readers(3)]
    assert np.array_equal(remove_greedily(parts, 0).order, remove_greedily(parts, 0).order)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 7}, "7 of 6 units"),
        ({"keep": -1}, "-1 of 6 units"),
        ({"keep": 1, "blocks": [np.array([0, 1, 2])]}, "do not allow it"),
        ({"keep": 1, "blocks": []}, "do not allow it"),
        ({"keep": 3, "blocks": [np.array([0, 1]), np.array([1, 2])]}, "share no unit"),
        ({"keep": 3, "blocks": [np.array([0, 6])]}, "lie in 0 to 5"),
        ({"keep": 3, "weights_at": (2,)}, "wanted at 2 units"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remove_greedily([part for part, _ in some_readers(0)], **arguments)


def test_readers_that_do_not_fit() -> None:
    units = [np.array([0]), np.array([1])]
    with pytest.raises(ValueError, match="no reader"):
        remove_greedily([], 0)
    with pytest.raises(ValueError, match="no unit"):
        remove_greedily([Reader(np.eye(2), np.ones((2, 1)), [])], 0)
    with pytest.raises(ValueError, match="a weight that is not finite"):
        remove_greedily([Reader(np.eye(2), np.full((2, 1), np.inf), units)], 0)
    with pytest.raises(ValueError, match="a scale below zero"):
        remove_greedily([Reader(np.eye(2), np.ones((2, 1)), units, np.nan)], 0)
    with pytest.raises(ValueError, match="do not fit"):
        remove_greedily([Reader(np.eye(2), np.ones((3, 1)), units)], 0)
    with pytest.raises(ValueError, match="do not fit"):
        remove_greedily([Reader(np.eye(2), np.ones((2, 1)), part) for part in (units, units[:1])], 0)
    with pytest.raises(ValueError, match="one owner"):
        remove_greedily([Reader(np.eye(2), np.ones((2, 1)), [units[0], units[0]])], 0)
    with pytest.raises(ValueError, match="one owner"):
        remove_greedily([Reader(np.eye(2), np.ones((2, 1)), [units[0], np.array([2])])], 0)
    with pytest.raises(ValueError, match="not finite"):
        remove_greedily([Reader(np.full((2, 2), np.nan), np.ones((2, 1)), units)], 0)
