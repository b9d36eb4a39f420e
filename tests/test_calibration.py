"""Calibration inputs: what is accepted, what is refused and in what words, and what is held in memory."""

from __future__ import annotations

import pickle
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.calibration import Calibration, load_calibration, memory
from graphprune.calibration.rows import Rows
from graphprune.errors import OptionError
from graphprune.graph import Graph
from tests.twins import parse, twin

Array = npt.NDArray[Any]

IMAGE = "g (float[N, 3, 4, 4] x) => (float[N, 3, 4, 4] out) { out = Relu(x) }"
FIXED = "g (float[4, 3] x, float[4, 2] z) => (float[4, 5] out) { out = Concat<axis = 1>(x, z) }"
TEXT = """g (int64[batch, seq] ids, int64[batch, seq] mask) => (int64[batch, seq] out) {
    out = Mul(ids, mask)
}"""


@pytest.fixture
def image() -> Graph:
    return twin(IMAGE)


@pytest.fixture
def text() -> Graph:
    return twin(TEXT)


def numbers(*shape: int) -> Array:
    """Distinct reals."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def joined(calibration: Calibration, size: int = 3) -> dict[str, Array]:
    """All feeds, put together again."""
    feeds = list(calibration.batches(size))
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in calibration.inputs}


# -- the forms that inputs come in --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["npz", "compressed", "npy", "mapping", "array", "list", "generator", "folder"]
)
def test_all_forms_give_the_same(form: str, image: Graph, tmp_path: Path) -> None:
    x = numbers(10, 3, 4, 4)
    source: object
    match form:
        case "npz":
            source = tmp_path / "a.npz"
            np.savez(tmp_path / "a.npz", x=x)
        case "compressed":
            source = str(tmp_path / "a.npz")
            np.savez_compressed(tmp_path / "a.npz", x=x)
        case "npy":
            source = tmp_path / "a.npy"
            np.save(tmp_path / "a.npy", x)
        case "mapping":
            source = {"x": x}
        case "array":
            source = x
        case "list":
            source = [{"x": x[:4]}, x[4:9], x[9]]
        case "generator":
            source = ({"x": x[k]} for k in range(10))
        case _:
            source = tmp_path
            np.save(tmp_path / "a.npy", x[:7])
            np.save(tmp_path / "b.npy", x[7])
            (tmp_path / "sub").mkdir()
            np.save(tmp_path / "sub" / "a.npy", x[8:])
            (tmp_path / "README.txt").write_text("not a sample")
    calibration = load_calibration(source, image)
    assert (calibration.samples, calibration.batch, calibration.labels) == (10, None, None)
    feeds = list(calibration.batches(4))
    assert [len(feed["x"]) for feed in feeds] == [4, 4, 2]
    assert all(feed["x"].dtype == np.float32 for feed in feeds)
    np.testing.assert_array_equal(joined(calibration)["x"], x)
    np.testing.assert_array_equal(joined(calibration.subset(7))["x"], x[:7])
    again = load_calibration(calibration, image)
    np.testing.assert_array_equal(joined(again)["x"], x)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 40), samples=st.integers(1, 50), seed=st.integers(0, 3), size=st.integers(1, 9))
def test_random_subset(
    tmp_path_factory: pytest.TempPathFactory, count: int, samples: int, seed: int, size: int
) -> None:
    """Without repetition, the same however it is stored, a beginning of any larger one, labels with their samples."""
    graph, folder = twin(IMAGE), tmp_path_factory.mktemp("subset")
    x, y = numbers(count, 3, 4, 4), np.arange(count)
    np.savez(folder / "stored.npz", x=x, labels=y)
    np.savez_compressed(folder / "compressed.npz", x=x, y=y)
    sources: list[object] = [{"x": x, "y": y}, folder / "stored.npz", folder / "compressed.npz"]
    sources += [[{"x": x[:1], "y": y[:1]}, {"x": x[1:], "y": y[1:]}], Calibration({"x": x}, {}, None, y)]
    seen = []
    for source in sources:
        taken = load_calibration(source, graph, samples=samples, seed=seed)
        assert taken.labels is not None
        assert taken.samples == min(samples, count) == len(set(taken.labels.tolist()))
        np.testing.assert_array_equal(joined(taken, size)["x"], x[taken.labels])
        seen.append(taken.labels.tolist())
    assert all(labels == seen[0] for labels in seen)
    more = load_calibration({"x": x, "y": y}, graph, samples=min(samples + 3, count - 1) or 1, seed=seed)
    assert more.labels is not None
    if samples < count:
        assert more.labels[:samples].tolist() == seen[0][: more.samples]
    else:
        assert seen[0] == list(range(count))


def test_seeds_differ(image: Graph) -> None:
    x = numbers(100, 3, 4, 4)
    picks = [joined(load_calibration(x, image, samples=20, seed=seed))["x"] for seed in (0, 1)]
    assert not np.array_equal(picks[0], picks[1])


def test_an_endless_iterator_is_cut(image: Graph) -> None:
    def endless() -> Iterator[Array]:
        while True:
            yield numbers(4, 3, 4, 4)

    assert load_calibration(endless(), image, samples=10).samples == 10


def test_what_is_mapped_is_not_held(image: Graph, tmp_path: Path) -> None:
    x = numbers(50, 3, 4, 4)
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "a.npz", x=x)
    np.savez(tmp_path / "f.npz", x=np.asfortranarray(x))
    for name in ("a.npy", "a.npz", "f.npz"):
        whole = load_calibration(tmp_path / name, image).inputs["x"]
        assert isinstance(whole, np.memmap)
        np.testing.assert_array_equal(whole, x)
        some = load_calibration(tmp_path / name, image, samples=9).inputs["x"]
        assert isinstance(some, Rows)
        assert len(some) == 9
    np.savez_compressed(tmp_path / "f.npz", x=np.asfortranarray(x))
    np.testing.assert_array_equal(joined(load_calibration(tmp_path / "f.npz", image))["x"], x)
    picked = load_calibration(tmp_path / "f.npz", image, samples=9)
    np.testing.assert_array_equal(joined(picked)["x"], joined(load_calibration(x, image, samples=9))["x"])


@pytest.mark.parametrize("samples", [None, 16])
def test_memory_of_compressed_archives(samples: int | None, tmp_path: Path) -> None:
    """What is taken is held once, and beside it some megabytes that are being decompressed."""
    x = np.zeros((256, 3, 80, 80), np.float32)  # 20 MB
    x[:, 0, 0, 0] = np.arange(256)
    np.savez_compressed(tmp_path / "a.npz", x=x)
    graph = twin(IMAGE.replace("4", "80"))
    tracemalloc.start()
    try:
        calibration = load_calibration(tmp_path / "a.npz", graph, samples=samples)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = x.nbytes // 256 * calibration.samples
    assert held <= peak < held + 16e6
    taken = np.concatenate([feed["x"][:, 0, 0, 0] for feed in calibration.batches(100)])
    order = np.random.default_rng(0).permutation(256)[:samples] if samples else np.arange(256)
    np.testing.assert_array_equal(taken, order)


def test_survives_pickling(image: Graph, tmp_path: Path) -> None:
    """Trials may run in other processes."""
    np.save(tmp_path / "a.npy", numbers(3, 4, 4))
    np.save(tmp_path / "b.npy", numbers(3, 4, 4) + 1)
    calibration = load_calibration(tmp_path, image)
    np.testing.assert_array_equal(
        joined(pickle.loads(pickle.dumps(calibration)))["x"], joined(calibration)["x"]
    )


def test_one_array_under_another_name(image: Graph, tmp_path: Path) -> None:
    x = numbers(5, 3, 4, 4)
    np.savez(tmp_path / "a.npz", pixels=x, y=np.arange(5))
    with pytest.warns(UserWarning, match="'pixels' is taken for the model's input 'x'"):
        calibration = load_calibration(tmp_path / "a.npz", image)
    assert calibration.labels is not None
    np.testing.assert_array_equal(joined(calibration)["x"], x)
    other = twin(IMAGE.replace(" x)", " pixels)").replace("Relu(x)", "Relu(pixels)"))
    with pytest.warns(UserWarning, match="'x' is taken|ignored: weights") as caught:
        load_calibration({"x": x, "weights": np.ones(5)}, other)
    assert len(caught) == 2


def test_labels_that_are_inputs_stay_inputs() -> None:
    graph = twin("g (float[N, 2] x, float[N, 2] y) => (float[N, 2] out) { out = Add(x, y) }")
    calibration = load_calibration({"x": numbers(3, 2), "y": numbers(3, 2)}, graph, labels=[1, 2, 3])
    assert set(calibration.inputs) == {"x", "y"}
    assert calibration.labels is not None
    assert calibration.labels.tolist() == [1, 2, 3]


# -- the batch axis -----------------------------------------------------------------------------------------------


def test_fixed_batch() -> None:
    graph = twin(FIXED)
    with pytest.warns(UserWarning, match="the last 2 of 10 are left out"):
        calibration = load_calibration(
            {"x": numbers(10, 3), "z": numbers(10, 2)}, graph, labels=np.arange(10)
        )
    assert (calibration.batch, calibration.samples) == (4, 8)
    assert [len(feed["x"]) for feed in calibration.batches(100)] == [4, 4]
    assert calibration.subset(5).samples == 8
    assert calibration.subset(4).samples == 4
    assert calibration.labels is not None
    assert calibration.labels.tolist() == list(range(8))
    with pytest.warns(UserWarning, match="left out"):
        assert load_calibration(calibration, graph, samples=5).samples == 4
    with pytest.warns(UserWarning, match="'z' is given once"):
        once = load_calibration({"x": numbers(8, 3), "z": numbers(4, 2)}, graph)
    assert (set(once.inputs), set(once.fixed)) == ({"x"}, {"z"})
    with pytest.raises(OptionError, match="takes 4 samples at once; the calibration inputs have 3"):
        load_calibration({"x": numbers(3, 3), "z": numbers(3, 2)}, graph)


def test_inputs_without_a_batch_axis_are_fixed() -> None:
    graph = twin(
        """g (float[N, 3] x, float[3] shift, float scale) => (float[N, 3] out) {
            a = Add(x, shift)
            out = Mul(a, scale)
        }"""
    )
    arrays = {"x": numbers(7, 3), "shift": numbers(3), "scale": np.float32(2)}
    for source in (arrays, [arrays, {**arrays, "x": numbers(2, 3)}]):
        calibration = load_calibration(source, graph)
        assert set(calibration.fixed) == {"shift", "scale"}
        for feed in calibration.batches(2):
            assert feed["shift"].shape == (3,)
            assert feed["scale"].shape == ()
    with pytest.raises(OptionError, match="'shift' has no batch axis in the model, but differs"):
        load_calibration([arrays, {**arrays, "shift": numbers(3) + 1}], graph)


def test_batch_axis_by_its_symbol() -> None:
    """Recurrent networks: time first, and a state with layers first."""
    model = parse(
        """g (float[time, batch, 2] x, float[1, batch, 3] h) => (float[time, 1, batch, 3] out) {
            out = RNN<hidden_size = 3>(x, w, r, , , h)
        }""",
        w=np.ones((1, 3, 2), np.float32) / 10,
        r=np.eye(3, dtype=np.float32)[None] / 10,
    )
    from graphprune.graph.twin import build_twin

    x, h = numbers(5, 7, 2), numbers(1, 7, 3)
    calibration = load_calibration({"x": x, "h": h}, build_twin(model), samples=6)
    assert (calibration.samples, dict(calibration.axes)) == (6, {"x": 1, "h": 1})
    import onnx_ir as ir

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (whole,) = session.run(None, {"x": x, "h": h})
    order = np.random.default_rng(0).permutation(7)[:6]
    parts = [session.run(None, feed)[0] for feed in calibration.batches(4)]
    np.testing.assert_allclose(np.concatenate(parts, axis=2), whole[:, :, order], rtol=1e-5)


def test_state_whose_batch_axis_has_no_name() -> None:
    graph = twin("g (float[?, 3] x, float[2, ?, 3] h) => (float[2, ?, 3] out) { out = Add(x, h) }")
    calibration = load_calibration({"x": numbers(5, 3), "h": numbers(2, 5, 3)}, graph)
    assert [feed["h"].shape for feed in calibration.batches(3)] == [(2, 3, 3), (2, 2, 3)]


def test_feeds_of_different_lengths(text: Graph) -> None:
    """Samples of one length come together; each with its own mask."""
    lengths = [5, 5, 3, 3, 3, 5]
    feeds = [{"ids": np.full((2, n), k), "mask": np.full((2, n), -k)} for k, n in enumerate(lengths)]
    calibration = load_calibration(feeds, text, labels=np.arange(12))
    assert [feed["ids"].shape for feed in calibration.batches(4)] == [(4, 5), (4, 3), (2, 3), (2, 5)]
    some = load_calibration(feeds, text, labels=np.arange(12), samples=7)
    assert some.samples == 7
    assert some.labels is not None
    rows = [(int(row[0]), len(row)) for feed in some.batches(4) for row in feed["ids"]]
    assert rows == [(label // 2, lengths[label // 2]) for label in some.labels.tolist()]
    assert all((feed["mask"] == -feed["ids"]).all() for feed in some.batches(4))


def test_inputs_of_another_count() -> None:
    """Images beside a fixed set of texts: the model says that they are different things, by name."""
    net = """g (float[{0}, 3] image, float[{1}, 3] text) => (float[{0}, {1}] out) {{
        t = Transpose(text)
        out = MatMul(image, t)
    }}"""
    arrays = {"image": numbers(9, 3), "text": numbers(2, 3)}
    with pytest.warns(UserWarning, match="'text' is given once"):
        calibration = load_calibration(arrays, twin(net.format("images_batch", "texts_batch")))
    assert [{name: len(array) for name, array in feed.items()} for feed in calibration.batches(5)] == [
        {"image": 5, "text": 2},
        {"image": 4, "text": 2},
    ]
    refused(
        twin(net.format("unk__1", "unk__2")),
        arrays,
        "different numbers of samples: 'image' 9, 'text' 2 along axis 0",
    )


# -- what is refused ----------------------------------------------------------------------------------------------


def refused(graph: Graph, source: object, match: str, **options: Any) -> None:
    with pytest.raises(OptionError, match=match) as caught:
        load_calibration(source, graph, **options)
    assert "\n" not in str(caught.value)


def test_wrong_names(text: Graph) -> None:
    ones = np.ones((4, 3), np.int64)
    refused(
        text,
        {"ids": ones, "attention": ones},
        r"lack 'mask': the model wants 'ids' int64 \[batch, seq\], 'mask' int64 \[batch, seq\]; given: ids, attention",
    )
    refused(text, {}, r"lack 'ids', 'mask'.*given: nothing")
    refused(text, ones, r"lack 'ids', 'mask'.*given: one array without a name")
    refused(text, [ones], r"feed 0 .* is a ndarray; the model has 2 inputs: give a mapping")
    refused(
        text,
        [{"ids": ones, "mask": ones}, {"ids": ones}],
        r"feed 1 .* has ids, the ones before have ids, mask",
    )
    refused(text, Calibration({"ids": ones}, {}), r"lack 'mask'")
    refused(text, [], "gave no feed")
    refused(text, 3, "not int")


WRONG_ARRAYS: dict[str, tuple[Array, str]] = {
    "rank": (numbers(3, 4, 4), r"rank 4, the one given rank 3: .*'x' float32 \[N, 3, 4, 4\].*array\[None\]"),
    "rank 5": (numbers(1, 1, 3, 4, 4), r"rank 4, the one given rank 5"),
    "size": (
        numbers(5, 4, 4, 3),
        r"axis 1 of input 'x' must be 3, in the one given it is 4: .*\[5, 4, 4, 3\]",
    ),
    "float64": (np.ones((2, 3, 4, 4)), r"must be float32, the one given is float64: .*astype\('float32'\)"),
    "uint8": (
        np.ones((2, 3, 4, 4), np.uint8),
        r"is uint8: save it as array\.astype\('float32'\).*--preprocess",
    ),
    "empty": (numbers(0, 3, 4, 4), r"have 0 samples; at least 1"),
    "objects": (np.array([None, 1]), r"the one given is object"),
    "scalar": (np.array(1, np.float32), r"rank 4, the one given rank 0"),
}


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_wrong_arrays(case: str, image: Graph, tmp_path: Path) -> None:
    array, match = WRONG_ARRAYS[case]
    refused(image, {"x": array}, match)
    if array.dtype != object:
        np.savez(tmp_path / "a.npz", x=array)
        refused(image, tmp_path / "a.npz", match)
        np.savez_compressed(tmp_path / "a.npz", x=array)
        refused(image, tmp_path / "a.npz", match)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(value: float, image: Graph, tmp_path: Path) -> None:
    x = numbers(20, 3, 4, 4)
    x[13, 2, 0, 3] = x[17, 0, 0, 0] = value
    match = rf"input 'x' holds {value} at \[13, 2, 0, 3\]"
    refused(image, x, match)
    np.savez(tmp_path / "a.npz", x=x)
    refused(image, tmp_path / "a.npz", match)
    np.savez_compressed(tmp_path / "a.npz", x=x)
    refused(image, tmp_path / "a.npz", match)
    refused(image, tmp_path / "a.npz", r"input 'x' holds", samples=19)
    refused(image, [x[:10], x[10:]], r"input 'x', feed 1, holds .* at \[3, 2, 0, 3\]")
    (tmp_path / "a.npz").unlink()
    np.save(tmp_path / "a.npy", x[:5])
    np.save(tmp_path / "b.npy", x[5:])
    lazy = load_calibration(tmp_path, image)
    with pytest.raises(OptionError, match=r"b\.npy' holds .* at"):
        list(lazy.batches(4))


def test_different_lengths(text: Graph) -> None:
    ids, mask = np.ones((4, 3), np.int64), np.ones((5, 3), np.int64)
    refused(text, {"ids": ids, "mask": mask}, r"different numbers of samples: 'ids' 4, 'mask' 5")
    refused(text, {"ids": ids, "mask": ids}, "3 labels for 4 samples", labels=[1, 2, 3])
    refused(twin(FIXED), {"x": numbers(8, 3), "z": numbers(12, 2)}, "'x' 8, 'z' 12")
    with pytest.raises(OptionError, match="'a' 2, 'b' 3"):
        Calibration({"a": numbers(2), "b": numbers(3)}, {})
    with pytest.raises(OptionError, match="5 samples are no multiple of the 2"):
        Calibration({"a": numbers(5)}, {}, 2)


def test_too_few(image: Graph) -> None:
    refused(image, numbers(3, 3, 4, 4), "have 3 samples; at least 64 are needed", least=64)
    refused(image, numbers(99, 3, 4, 4), "have 9 samples; at least 64 are needed", samples=9, least=64)
    refused(image, numbers(9, 3, 4, 4), "samples must be at least 1", samples=0)


def test_files_that_cannot_be_read(image: Graph, tmp_path: Path) -> None:
    refused(image, tmp_path / "none.npz", r"cannot read --calib '.*none\.npz': .*numpy\.savez")
    (tmp_path / "text.npz").write_text("hello")
    refused(image, tmp_path / "text.npz", r"no \.npz file of plain arrays")
    (tmp_path / "empty.npz").write_bytes(b"")
    refused(image, tmp_path / "empty.npz", r"no \.npz file")
    np.savez(tmp_path / "a.npz", x=numbers(9, 3, 4, 4))
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(data[: len(data) // 2])
    refused(image, tmp_path / "a.npz", r"cannot read --calib .*numpy\.savez")
    np.savez_compressed(tmp_path / "c.npz", x=numbers(999, 3, 4, 4))
    data = (tmp_path / "c.npz").read_bytes()
    half = len(data) // 2
    (tmp_path / "c.npz").write_bytes(data[:half] + bytes(64) + data[half + 64 :])
    refused(image, tmp_path / "c.npz", r"cannot read --calib '.*c\.npz'")
    np.savez(tmp_path / "o.npz", x=np.array([{"a": 1}], object))
    refused(image, tmp_path / "o.npz", r"'x' holds Python objects, which are never read")
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], object))
    refused(image, tmp_path / "o.npy", r"Python objects, which are never read")
    np.save(tmp_path / "cut.npy", numbers(9, 3, 4, 4))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-7])
    refused(image, tmp_path / "cut.npy", r"cannot read --calib '.*cut\.npy'")
    (tmp_path / "one.png").write_bytes(b"\x89PNG")
    refused(image, tmp_path / "one.png", "one image: give the folder")


def test_folders_that_do_not_fit(image: Graph, text: Graph, tmp_path: Path) -> None:
    refused(image, tmp_path, r"a folder without images or \.npy files")
    refused(text, tmp_path, r"the model has 2: give an \.npz with 'ids' int64")
    (tmp_path / "a.png").write_bytes(b"")
    refused(image, tmp_path, "folder of images: say with --preprocess")
    np.save(tmp_path / "b.npy", numbers(3, 4, 4))
    refused(image, tmp_path, r"images \(a\.png, \.\.\.\) and \.npy files \(b\.npy, \.\.\.\)")
    (tmp_path / "a.png").unlink()
    np.save(tmp_path / "c.npy", numbers(4, 4))
    refused(image, tmp_path, r"c\.npy' has shape \[4, 4\].*one sample of it, or a batch")
    (tmp_path / "c.npy").unlink()
    np.save(tmp_path / "c.npy", np.ones((3, 4, 4)))
    refused(image, tmp_path, r"float64")


def test_sizes_are_checked_before_memory_is_taken(
    image: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small archive that would unfold into more than there is."""
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((30_000, 3, 4, 4), np.float32))
    assert (tmp_path / "bomb.npz").stat().st_size < 20_000
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    refused(
        image,
        tmp_path / "bomb.npz",
        r"'x' in --calib .* takes 5\.76 MB, only 1 MB of memory are free; take fewer",
    )
    assert load_calibration(tmp_path / "bomb.npz", image, samples=100).samples == 100

    def feeds() -> Iterator[Array]:
        while True:
            yield np.zeros((3_000, 3, 4, 4), np.float32)

    refused(image, feeds(), "the next feed .* say how many samples")


def test_a_header_that_lies(image: Graph, tmp_path: Path) -> None:
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    header += b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 3, 4, 4)}".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("x.npy", header + bytes(64))
    refused(image, tmp_path / "lie.npz", "'x' does not have the size that its header says")


def test_nothing_is_warned_about_without_cause(image: Graph, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=numbers(5, 3, 4, 4), labels=np.arange(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_calibration(tmp_path / "a.npz", image)
