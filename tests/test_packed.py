"""The packed form and its file: exact round trips, and nothing that a damaged file can do."""

from __future__ import annotations

import json
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from graphprune.errors import ModelError, OptionError
from graphprune.kernels.nm import bit_patterns, nm_mask
from graphprune.kernels.packed import index_bits, pack, packed_sizes, unpack
from graphprune.sparsity.packed import DTYPES as STORED
from graphprune.sparsity.packed import PackedReader, PackedWeight, PackedWriter
from graphprune.sparsity.pattern import NM, Layout

Array = npt.NDArray[Any]

DTYPES = [
    np.dtype(t)
    for t in (
        *("f8", "f4", "f2", ml_dtypes.bfloat16),
        *(
            ml_dtypes.float8_e4m3fn,
            ml_dtypes.float8_e4m3fnuz,
            ml_dtypes.float8_e5m2,
            ml_dtypes.float8_e5m2fnuz,
        ),
        *("i1", "i4", "u1"),
    )
]
PATTERNS = st.integers(1, 32).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m)))


@st.composite
def sparse_bits(draw: st.DrawFn, pattern: tuple[int, int]) -> Array:
    """Any bit patterns, NaN and -0 included, of which n of each m (or fewer) are not +0."""
    n, m = pattern
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.tuples(st.integers(0, 4), st.integers(0, 70), st.integers(0, 5)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits = generator.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    if draw(st.booleans()):
        bits[..., :-1] = 0
        bits[..., -1] &= 0x80  # zeros of both signs
    bits = np.ascontiguousarray(bits).view(f"u{dtype.itemsize}")[..., 0]
    bits[generator.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.9]))] = 0
    mask = nm_mask(generator.random(shape), n, m)
    return np.where(mask, bits, 0).astype(bits.dtype).view(dtype)


@given(st.data(), PATTERNS)
@settings(max_examples=300, deadline=None)
def test_round_trip_is_exact_to_the_bit(data: st.DataObject, pattern: tuple[int, int]) -> None:
    array = data.draw(sparse_bits(pattern))
    values, indices = pack(array, *pattern)
    shape: tuple[int, int, int] = array.shape
    assert values.dtype == array.dtype
    assert (values.shape, indices.size) == packed_sizes(shape, *pattern)
    restored = unpack(values, indices, shape, *pattern)
    assert restored.dtype == array.dtype
    np.testing.assert_array_equal(bit_patterns(restored), bit_patterns(array))


@pytest.mark.parametrize("shape", [(3, 1_400_002, 1), (1, 514, 4096), (700, 96, 9)], ids=str)
def test_large_arrays_go_in_strips(shape: tuple[int, int, int]) -> None:
    array = np.random.default_rng(0).integers(1, 100, shape).astype(np.int8)
    array[~nm_mask(array, 3, 5)] = 0
    np.testing.assert_array_equal(unpack(*pack(array, 3, 5), shape, 3, 5), array)


def test_indices_are_bits_from_the_lowest_on() -> None:
    array = np.zeros((1, 12, 1), np.float32)
    array[0, [1, 3, 6, 7, 8, 10], 0] = [1, 2, 3, 4, 5, 6]
    values, indices = pack(array, 2, 4)
    np.testing.assert_array_equal(values.ravel(), [1, 2, 3, 4, 5, 6])
    expected = [1, 3, 2, 3, 0, 2]
    number = sum(place << (2 * k) for k, place in enumerate(expected))
    assert int.from_bytes(indices.tobytes(), "little") == number
    assert [index_bits(m) for m in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32)] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_values_follow_the_layout() -> None:
    array = np.array([[1, 0], [0, 2], [3, 4], [5, 6]], np.int8).reshape(1, 4, 2)
    array[0, 2] = 0
    values, indices = pack(array, 2, 4)
    np.testing.assert_array_equal(values, [[[1, 2], [5, 6]]])
    assert indices.tolist() == [0 | 1 << 2 | 3 << 4 | 3 << 6]


def test_what_cannot_be_restored_is_refused() -> None:
    for extra in (1.0, -0.0, np.nan):
        array = np.array([1, extra, 2, 0], np.float32).reshape(1, 4, 1)
        with pytest.raises(ValueError, match="does not hold 2:4"):
            pack(array, 2, 4)
    with pytest.raises(ValueError, match="no pattern"):
        pack(array, 5, 4)
    with pytest.raises(ValueError, match="outer, contracted, inner"):
        pack(array[0], 2, 4)


@pytest.mark.parametrize(("n", "m", "byte"), [(2, 4, 0b0101), (2, 4, 0b0001), (2, 3, 0b1100)])
def test_damaged_indices_are_refused(n: int, m: int, byte: int) -> None:
    with pytest.raises(ValueError, match="damaged"):
        unpack(np.ones((1, n, 1)), np.array([byte], np.uint8), (1, m, 1), n, m)


def test_parts_that_do_not_fit_are_refused() -> None:
    values, indices = pack(np.ones((1, 4, 1), np.float32), 4, 4)
    bad: tuple[tuple[Array, Array], ...] = (
        (values[:, 1:], indices),
        (values, indices[:0]),
        (values, indices.astype(np.int16)),
    )
    for some, others in bad:
        with pytest.raises(ValueError, match="where 4:4 of"):
            unpack(some, others, (1, 4, 1), 4, 4)


def some_weights() -> list[tuple[PackedWeight, Array]]:
    """One of each dtype, in several layouts, odd sizes among them."""
    generator = np.random.default_rng(0)
    found = []
    places = [
        ((5, 7, 3, 3), Layout(5, 7, 9, 5)),
        ((9, 3), Layout(1, 9, 3, 3, 2)),
        ((3, 8), Layout(3, 8, 1, 3)),
        ((2, 12, 5), Layout(2, 12, 5, 5, 2)),
    ]
    for k, dtype in enumerate(DTYPES):
        shape, layout = places[k % len(places)]
        pattern = NM(2, 4) if k % 2 else NM(1, 3)
        array = (generator.standard_normal(layout.shape) * 9).astype(dtype)
        array[~nm_mask(generator.random(layout.shape), pattern.n, pattern.m)] = 0
        found.append((PackedWeight(f"layer {k}/weight", dtype, shape, layout, pattern), array.reshape(shape)))
    return found


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[tuple[PackedWeight, Array]]]:
    weights = some_weights()
    path = tmp_path / "packed.safetensors"
    with PackedWriter(path, [weight for weight, _ in weights]) as writer:
        for weight, array in reversed(weights):
            writer.write(weight.name, array)
    return path, weights


def test_a_file_gives_back_every_weight(written: tuple[Path, list[tuple[PackedWeight, Array]]]) -> None:
    path, weights = written
    with PackedReader(path) as reader:
        assert reader.weights == {weight.name: weight for weight, _ in weights}
        for weight, array in weights:
            restored = reader.read(weight.name)
            assert restored.dtype == array.dtype
            assert restored.shape == array.shape
            np.testing.assert_array_equal(bit_patterns(restored), bit_patterns(array))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_other_readers_find_the_same(written: tuple[Path, list[tuple[PackedWeight, Array]]]) -> None:
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    path, weights = written
    tensors = dict(safetensors.deserialize(path.read_bytes()))
    assert len(tensors) == 2 * len(weights)
    for weight, array in weights:
        values, indices = pack(array.reshape(weight.layout.shape), weight.pattern.n, weight.pattern.m)
        found = tensors[f"{weight.name}.values"]
        assert found["dtype"] == STORED[array.dtype.name]
        assert tuple(found["shape"]) == values.shape
        assert bytes(found["data"]) == values.tobytes()
        assert bytes(tensors[f"{weight.name}.indices"]["data"]) == indices.tobytes()
    with safetensors.safe_open(path, framework="numpy") as file:
        assert json.loads(file.metadata()["layer 1/weight.packed"])["pattern"] == "2:4"


def test_every_tensor_is_aligned(written: tuple[Path, list[tuple[PackedWeight, Array]]]) -> None:
    path, weights = written
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for weight, _ in weights:
        offset = 8 + length + header[f"{weight.name}.values"]["data_offsets"][0]
        assert offset % weight.dtype.itemsize == 0


def test_after_an_error_the_old_file_is_there(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    path.write_bytes(b"old")
    (weight, array), *_ = some_weights()

    def attempt(then: Callable[[PackedWriter], Any]) -> None:
        with PackedWriter(path, [weight]) as writer:
            then(writer)

    def twice(writer: PackedWriter) -> None:
        writer.write(weight.name, array)
        writer.write(weight.name, array)

    attempts: tuple[tuple[str, Callable[[PackedWriter], Any]], ...] = (
        ("announced and not written", lambda writer: None),
        ("not float64", lambda writer: writer.write(weight.name, array.astype(np.float32))),
        ("does not hold 1:3", lambda writer: writer.write(weight.name, np.ones_like(array))),
        ("before", twice),
    )
    for match, then in attempts:
        with pytest.raises(ValueError, match=match):
            attempt(then)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]
    with (
        pytest.raises(ModelError, match="cannot be written"),
        PackedWriter(tmp_path / "no" / "folder", [weight]),
    ):
        pass


def test_what_cannot_be_packed_is_refused() -> None:
    layout = Layout(3, 8, 1, 3)
    with pytest.raises(OptionError, match="single elements"):
        PackedWeight("w", np.dtype("f4"), (3, 8), layout, NM(2, 4, (4, 1)))
    with pytest.raises(OptionError, match="complex64"):
        PackedWeight("w", np.dtype("c8"), (3, 8), layout, NM(2, 4))
    with pytest.raises(ValueError, match="does not reshape"):
        PackedWeight("w", np.dtype("f4"), (3, 7), layout, NM(2, 4))
    weight = PackedWeight("w", np.dtype("f4"), (3, 8), layout, NM(2, 4))
    with pytest.raises(ValueError, match="one name"):
        PackedWriter("packed.safetensors", [weight, weight])


def with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def described(header: dict[str, Any], **changes: Any) -> None:
    key = "layer 1/weight.packed"
    header["__metadata__"][key] = json.dumps({**json.loads(header["__metadata__"][key]), **changes})


HUGE = 2**62
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no metadata": lambda h: h.pop("__metadata__"),
    "another format": lambda h: h["__metadata__"].update(format="pt"),
    "huge shape": lambda h: h["layer 1/weight.values"].update(shape=[HUGE, HUGE, HUGE]),
    "huge offsets": lambda h: h["layer 1/weight.values"].update(data_offsets=[0, HUGE]),
    "negative offsets": lambda h: h["layer 1/weight.values"].update(data_offsets=[-8, 0]),
    "no number": lambda h: h["layer 1/weight.values"].update(shape=[True, "2", 3.0]),
    "no offsets": lambda h: h["layer 1/weight.values"].pop("data_offsets"),
    "unknown type": lambda h: h["layer 1/weight.values"].update(dtype="F7"),
    "type of no name": lambda h: h["layer 1/weight.values"].update(dtype=["F32"]),
    "same place": lambda h: h["layer 2/weight.indices"].update(h["layer 1/weight.indices"]),
    "a hole": lambda h: [h.pop("layer 1/weight.indices"), h["__metadata__"].pop("layer 1/weight.packed")],
    "not described": lambda h: h["__metadata__"].pop("layer 1/weight.packed"),
    "huge layout": lambda h: described(h, layout=[HUGE, 4, HUGE], shape=[HUGE, 4, HUGE]),
    "empty and huge": lambda h: described(h, layout=[0, 4, 2**80], shape=[0]),
    "another pattern": lambda h: described(h, pattern="1:4"),
    "no pattern": lambda h: described(h, pattern="5:4"),
    "pattern of no text": lambda h: described(h, pattern=None),
    "another shape": lambda h: described(h, shape=[3, 3]),
    "layout of two": lambda h: described(h, layout=[27, 1]),
    "description of no text": lambda h: h["__metadata__"].update({"layer 1/weight.packed": 7}),
    "description of no object": lambda h: h["__metadata__"].update({"layer 1/weight.packed": "[]"}),
    "description that is deep": lambda h: h["__metadata__"].update({"layer 1/weight.packed": "[" * 100_000}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_damaged_headers_are_refused(
    written: tuple[Path, list[tuple[PackedWeight, Array]]], change: Callable[[dict[str, Any]], None]
) -> None:
    path, _ = written
    with_header(path, change)
    tracemalloc.start()
    with pytest.raises(ModelError, match="damaged"):
        PackedReader(path)
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        b"\xff" * 16,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xff",
        (40_000).to_bytes(8, "little") + b"[" * 40_000,
        (14).to_bytes(8, "little") + b'{"a":1,"a":1} ',
    ],
    ids=["empty", "short", "long header", "no object", "no text", "deep", "twice"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "packed.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        PackedReader(path)


def test_cut_and_damaged_files_are_refused(written: tuple[Path, list[tuple[PackedWeight, Array]]]) -> None:
    path, _ = written
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 9):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="damaged"):
            PackedReader(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ModelError, match="damaged"):
        PackedReader(path)
    path.write_bytes(whole[:-1] + b"\xff")  # the last bytes are indices
    with PackedReader(path) as reader:
        last = list(reader.weights)[-1]
        with pytest.raises(ModelError, match="do not ascend"):
            reader.read(last)
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        PackedReader(path)


def test_one_weight_at_a_time_is_in_memory(tmp_path: Path) -> None:
    shape, layout = (512, 2048), Layout(512, 2048, 1, 512)
    array = np.zeros(shape, np.float32)
    array[:, ::2] = 1.0
    weights = [PackedWeight(f"w{k}", array.dtype, shape, layout, NM(2, 4)) for k in range(12)]
    path = tmp_path / "packed.safetensors"
    tracemalloc.start()
    with PackedWriter(path, weights) as writer:
        for weight in weights:
            writer.write(weight.name, array)
    with PackedReader(path) as reader:
        for weight in weights:
            np.testing.assert_array_equal(reader.read(weight.name), array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * array.nbytes < path.stat().st_size
