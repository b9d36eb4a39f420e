"""Preprocessing: against NumPy written down plainly, and against Pillow for what it resizes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from graphprune.calibration import Calibration, load_calibration, preprocess
from graphprune.calibration.preprocess import PRESETS, Preprocess
from graphprune.errors import OptionError
from tests.twins import twin

Array = npt.NDArray[Any]
CIFAR = Preprocess.parse("mean=0.485,0.456,0.406;std=0.229,0.224,0.225")


def pixels(*shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# -- the arithmetic -----------------------------------------------------------------------------------------------


def plainly(image: Array, mean: list[float], std: list[float], scale: float) -> Array:
    """``(x * scale - mean) / std`` in float64, one value at a time."""
    out = np.empty((image.shape[2], *image.shape[:2]))
    for y, x, c in np.ndindex(*image.shape):
        out[c, y, x] = (float(image[y, x, c]) * scale - mean[c]) / std[c]
    return out


def test_the_formula() -> None:
    images = pixels(4, 5, 6, 3)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = np.stack([plainly(image, mean, std, 1 / 255) for image in images])
    batch = CIFAR.apply(images)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    np.testing.assert_allclose(batch, expected, rtol=1e-5, atol=1e-6)
    # As torchvision computes it, in float32, bit for bit.
    torch_like = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    torch_like -= np.array(mean, np.float32).reshape(3, 1, 1)
    torch_like /= np.array(std, np.float32).reshape(3, 1, 1)
    np.testing.assert_array_equal(batch, torch_like)


@settings(deadline=None, max_examples=40)
@given(
    color=st.sampled_from(["rgb", "bgr", "gray"]),
    layout=st.sampled_from(["nchw", "nhwc"]),
    channels=st.sampled_from([0, 1, 3]),
    scale=st.sampled_from([None, 1.0, 0.5]),
    size=st.sampled_from([None, (5, 6), (4, 9)]),
    resize=st.sampled_from(["stretch", "crop"]),
)
def test_arrays_and_pillow_images_agree(
    color: Any, layout: Any, channels: int, scale: float | None, size: tuple[int, int] | None, resize: Any
) -> None:
    """Whatever the order of channels, however grey is made, whether resized or not."""
    how = Preprocess((0.25,), (2.0,), size, layout, scale, color, resize)
    images = pixels(3, 5, 6, *([channels] if channels else []))
    by_array = how.apply(images)
    by_image = how.apply([Image.fromarray(image[..., 0] if channels == 1 else image) for image in images])
    np.testing.assert_array_equal(by_array, by_image)
    assert by_array.shape == (3, *how.shape_of(images.shape[1:]))


def test_channels() -> None:
    images = pixels(2, 4, 4, 3)
    plain = Preprocess(scale=1)
    np.testing.assert_array_equal(plain.apply(images), images.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(
        Preprocess(scale=1, color="bgr", layout="nhwc").apply(images), images[..., ::-1]
    )
    means = Preprocess((1, 2, 3), scale=1, color="bgr")  # in the order in which they leave
    np.testing.assert_array_equal(
        means.apply(images),
        images[..., ::-1].transpose(0, 3, 1, 2) - np.array([1, 2, 3], np.float32).reshape(3, 1, 1),
    )
    gray = Preprocess(scale=1, color="gray").apply(images)
    np.testing.assert_allclose(gray[:, 0], images @ [0.299, 0.587, 0.114], atol=0.51)
    np.testing.assert_array_equal(plain.apply(images[..., 0]), np.stack([images[..., 0]] * 3, axis=1))


def test_real_images() -> None:
    images = pixels(2, 4, 4, 3).astype(np.float64) / 255
    np.testing.assert_allclose(CIFAR.apply(images), CIFAR.apply(pixels(2, 4, 4, 3)), atol=1e-6)
    half = Preprocess(scale=0.5, color="gray").apply(images)
    np.testing.assert_allclose(half[:, 0], images @ [0.299, 0.587, 0.114] / 2, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (224, 224), (100, 101), (256, 1000)])
def test_crop_covers_and_takes_the_middle(height: int, width: int) -> None:
    """As torchvision's Resize(256) and CenterCrop(224)."""
    image = Image.fromarray(pixels(height, width, 3))
    short = min(height, width)
    resized = image.resize((int(256 * width / short), int(256 * height / short)), Image.Resampling.BILINEAR)
    top, left = round((resized.height - 224) / 2), round((resized.width - 224) / 2)
    expected = np.asarray(resized)[top : top + 224, left : left + 224]
    found = Preprocess(scale=1, size=(224, 224), resize="crop", crop_pct=0.875, layout="nhwc").apply([image])
    np.testing.assert_array_equal(found[0], expected)


@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    part=st.floats(0.3, 1),
)
@settings(deadline=None)
def test_crop_never_leaves_the_image(shape: tuple[int, int], size: tuple[int, int], part: float) -> None:
    how = Preprocess(size=size, resize="crop", crop_pct=part)
    white = how.apply([Image.new("RGB", shape[::-1], "white")])
    assert white.shape == (1, 3, *size)
    np.testing.assert_array_equal(white, 1)  # beyond its borders an image is black


# -- the command line's way to say it -------------------------------------------------------------------------------


def test_parse(tmp_path: Path) -> None:
    text = "mean=0.485,0.456,0.406;std=0.229,0.224,0.225;size=224x192;layout=NHWC;scale=1/255;color=bgr;resize=crop"
    expected = Preprocess(
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 192), "nhwc", 1 / 255, "bgr", "crop"
    )
    assert Preprocess.parse(text) == expected
    assert Preprocess.parse(" mean = 0.5 ; size=32; crop_pct=0.5") == Preprocess(
        (0.5,), size=(32, 32), crop_pct=0.5
    )
    assert Preprocess.parse("imagenet") == PRESETS["imagenet"]
    assert Preprocess.parse("imagenet;size=256x256").size == (256, 256)
    assert Preprocess.parse("size=96,32;preset=imagenet").std == (0.229, 0.224, 0.225)
    values = {"preset": "imagenet", "size": [10, 12], "scale": None, "mean": 0.5, "std": [0.1, 0.2, 0.3]}
    (tmp_path / "how.json").write_text(json.dumps(values))
    read = Preprocess.parse(str(tmp_path / "how.json"))
    assert (read.size, read.mean, read.std, read.resize) == ((10, 12), (0.5,), (0.1, 0.2, 0.3), "crop")


def test_every_field_can_be_said() -> None:
    assert list(preprocess._READERS) == [field.name for field in fields(Preprocess)]


WRONG = {
    "": "'' is not of the form KEY=VALUE; keys are mean, std",
    "mean=0.5;": "'' is not of the form KEY=VALUE",
    "mean=0.5;imagenet": "'imagenet' is not of the form KEY=VALUE",
    "imagent": "preset: 'imagent' is not one of imagenet",
    "means=1": "unknown key 'means'; keys are mean, std, size",
    "mean=1;mean=2": "gives 'mean' twice",
    "mean=a,b": "mean: 'a,b' is not numbers such as",
    "mean=1,2": r"mean: '1\.0,2\.0' is not one number, or 3 for color=rgb",
    "mean=0.1,0.2,0.3;color=gray": "mean: .* is not one number, or 1 for color=gray",
    "mean=nan": "mean: 'nan' is not one number",
    "std=0": "std: '0.0' is not above 0",
    "std=1,-1,1": "std: .* is not above 0",
    "size=224y224": "size: '224y224' is not HEIGHTxWIDTH",
    "size=0x5": "size: '0,5' is not HEIGHTxWIDTH",
    "size=1x2x3": "size: '1x2x3' is not HEIGHTxWIDTH",
    "layout=chw": "layout: 'chw' is not one of nchw, nhwc",
    "color=yuv": "color: 'yuv' is not one of rgb, bgr, gray",
    "resize=fit": "resize: 'fit' is not one of stretch, crop",
    "scale=0": r"scale: '0\.0' is not a number other than 0",
    "scale=1/0": "scale: '1/0' is not a number",
    "crop_pct=2": "crop_pct: '2.0' is not above 0 and at most 1",
    "none.json": "cannot read --preprocess 'none.json'",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_text(text: str) -> None:
    with pytest.raises(OptionError, match=WRONG[text]):
        Preprocess.parse(text)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[1]", "must hold an object"),
        ("{", "cannot read"),
        ('{"size": [1.5, 2]}', "size"),
        ('{"mean": true}', "mean"),
    ],
)
def test_wrong_json(content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "how.json").write_text(content)
    with pytest.raises(OptionError, match=match):
        Preprocess.parse(str(tmp_path / "how.json"))


def test_wrong_images() -> None:
    with pytest.raises(OptionError, match=r"given are int64 \[1, 2, 2, 3\]"):
        CIFAR.apply(np.ones((1, 2, 2, 3), np.int64))
    with pytest.raises(OptionError, match=r"given are uint8 \[1, 3, 8, 8\]"):
        CIFAR.apply(np.ones((1, 3, 8, 8), np.uint8))
    with pytest.raises(OptionError, match="uint16 pixels are multiplied by, such as scale=1/65535"):
        CIFAR.apply(np.ones((1, 2, 2, 3), np.uint16))
    with pytest.raises(OptionError, match="only uint8 images are resized"):
        Preprocess(size=(4, 4)).apply(np.ones((1, 2, 2, 3), np.float32))
    with pytest.raises(OptionError, match="more than 8 bits"):
        CIFAR.apply([Image.fromarray(np.ones((4, 4), np.uint16))])


# -- as calibration inputs --------------------------------------------------------------------------------------------

NET = "g (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] out) { out = Relu(x) }"


def feed(calibration: Calibration) -> Array:
    return np.concatenate([feed["x"] for feed in calibration.batches(2)])


@pytest.mark.parametrize("samples", [None, 3])
def test_uint8_arrays(samples: int | None, tmp_path: Path) -> None:
    images, labels = pixels(5, 8, 8, 3), np.arange(5)
    np.savez_compressed(tmp_path / "a.npz", x=images, y=labels)
    np.savez(tmp_path / "b.npz", x=images, y=labels)
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "a.npy", images[:4])
    np.save(tmp_path / "folder" / "b.npy", images[4])
    for source in (
        {"x": images, "y": labels},
        tmp_path / "a.npz",
        tmp_path / "b.npz",
        [{"x": images[:2], "y": labels[:2]}, {"x": images[2:], "y": labels[2:]}],
    ):
        calibration = load_calibration(source, twin(NET), preprocess=CIFAR, samples=samples)
        assert calibration.labels is not None
        np.testing.assert_array_equal(feed(calibration), CIFAR.apply(images[calibration.labels]))
    folder = load_calibration(
        tmp_path / "folder", twin(NET), preprocess=CIFAR, labels=labels, samples=samples
    )
    assert folder.labels is not None
    np.testing.assert_array_equal(feed(folder), CIFAR.apply(images[folder.labels]))


def test_a_folder_of_images(tmp_path: Path) -> None:
    images = [pixels(9 + k, 20 - k, 3, seed=k) for k in range(5)]
    for k, image in enumerate(images):
        (tmp_path / f"class{k % 2}").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"class{k % 2}" / f"{k}.png")
    Image.fromarray(images[0][..., 0]).save(tmp_path / "gray.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    how = Preprocess.parse("mean=.5;std=.25;size=8x8;resize=crop")
    calibration = load_calibration(tmp_path, twin(NET), preprocess=how)
    in_order = [images[k] for k in (0, 2, 4, 1, 3)]
    expected = how.apply(
        [Image.fromarray(image) for image in in_order] + [Image.fromarray(images[0][..., 0])]
    )
    np.testing.assert_array_equal(feed(calibration), expected)
    some = load_calibration(tmp_path, twin(NET), preprocess=how, samples=4, labels=np.arange(6))
    assert some.labels is not None
    np.testing.assert_array_equal(feed(some), expected[some.labels])


def test_images_are_decoded_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(6):
        Image.fromarray(pixels(8, 8, 3, seed=k)).save(tmp_path / f"{k}.png")
    decoded = []
    plain_apply = Preprocess.apply

    def counted(self: Preprocess, images: Any) -> Any:
        decoded.append(len(images))
        return plain_apply(self, images)

    monkeypatch.setattr(Preprocess, "apply", counted)
    calibration = load_calibration(tmp_path, twin(NET), preprocess=CIFAR)
    assert not decoded
    batches = calibration.batches(2)
    next(batches)
    assert sum(decoded) == 2
    next(batches)
    assert sum(decoded) == 4


def test_images_of_several_sizes(tmp_path: Path) -> None:
    """A fully convolutional network takes them as they are, those of one size together."""
    graph = twin("g (float[N, 3, H, W] x) => (float[N, 3, H, W] out) { out = Relu(x) }")
    shapes = [(8, 8), (8, 8), (6, 9), (6, 9), (6, 9), (8, 8)]
    for k, shape in enumerate(shapes):
        Image.fromarray(pixels(*shape, 3, seed=k)).save(tmp_path / f"{k}.png")
    calibration = load_calibration(tmp_path, graph, preprocess=CIFAR)
    assert [f["x"].shape for f in calibration.batches(2)] == [
        (2, 3, 8, 8), (2, 3, 6, 9), (1, 3, 6, 9), (1, 3, 8, 8)
    ]  # fmt: skip
    with pytest.raises(
        OptionError, match=r"axis 2 of input 'x' must be 8, .* it is 6.*--preprocess \(see its size"
    ):
        load_calibration(tmp_path, twin(NET), preprocess=CIFAR)


def test_unreadable_images(tmp_path: Path) -> None:
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("no image")
    with pytest.raises(
        OptionError, match=r"cannot read the image '.*b\.jpg': it is no image that Pillow knows"
    ):
        load_calibration(tmp_path, twin(NET), preprocess=CIFAR)
    (tmp_path / "b.jpg").unlink()
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    calibration = load_calibration(tmp_path, twin(NET), preprocess=CIFAR)
    with pytest.raises(OptionError, match=r"cannot read the image '.*a\.png': .*mend it or take it out"):
        list(calibration.batches(1))


def test_other_types() -> None:
    images = pixels(3, 8, 8, 3)
    half = twin("g (float16[N, 3, 8, 8] x) => (float16[N, 3, 8, 8] out) { out = Relu(x) }")
    taken = feed(load_calibration({"x": images}, half, preprocess=CIFAR))
    np.testing.assert_array_equal(taken, CIFAR.apply(images).astype(np.float16))
    bytes_in = twin("g (uint8[N, 3, 8, 8] x) => (uint8[N, 3, 8, 8] out) { out = Identity(x) }")
    taken = feed(load_calibration({"x": images}, bytes_in, preprocess=Preprocess(scale=1)))
    np.testing.assert_array_equal(taken, images.transpose(0, 3, 1, 2))
    assert taken.dtype == np.uint8
    with pytest.raises(OptionError, match="'x' takes uint8: --preprocess must leave pixels as they are"):
        load_calibration({"x": images}, bytes_in, preprocess=CIFAR)
    real = load_calibration({"x": images.astype(np.float64)}, twin(NET), preprocess=Preprocess(scale=1 / 255))
    np.testing.assert_allclose(feed(real), images.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    vectors = twin("g (float[N, 3] x) => (float[N, 3] out) { out = Relu(x) }")
    with pytest.raises(OptionError, match="must be float32, the one given is float64"):
        load_calibration({"x": np.ones((2, 3))}, vectors, preprocess=CIFAR)
    with pytest.raises(OptionError, match=r"--preprocess is for images.*none is"):
        load_calibration({"x": np.ones((2, 3), np.float32)}, vectors, preprocess=CIFAR)


def test_beside_other_inputs() -> None:
    """Only images are touched."""
    graph = twin(
        """g (float[N, 3, 8, 8] x, float[N, 1, 1, 1] gate) => (float[N, 3, 8, 8] out) {
            out = Mul(x, gate)
        }"""
    )
    gate = np.ones((4, 1, 1, 1), np.float32) * 5
    images = pixels(4, 8, 8, 3)
    (fed,) = load_calibration({"x": images, "gate": gate}, graph, preprocess=CIFAR).batches(4)
    np.testing.assert_array_equal(fed["gate"], gate)
    np.testing.assert_array_equal(fed["x"], CIFAR.apply(images))


def test_what_is_fed_can_be_run(tmp_path: Path) -> None:
    import onnx_ir as ir

    from tests.twins import parse

    model = parse(NET)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "a.png")
    for fed in load_calibration(tmp_path, twin(NET), preprocess=CIFAR).batches(8):
        (out,) = session.run(None, fed)
        np.testing.assert_array_equal(out, np.maximum(fed["x"], 0))


def test_without_pillow(tmp_path: Path) -> None:
    """Arrays need none; images name the extra."""
    (tmp_path / "a.png").write_bytes(b"")
    code = f"""
import sys
sys.modules["PIL"] = None
import numpy as np
from graphprune.calibration import load_calibration
from graphprune.errors import OptionError
from graphprune.calibration.preprocess import Preprocess
from tests.twins import twin

graph, how = twin({NET!r}), Preprocess()
calibration = load_calibration({{"x": np.ones((2, 8, 8, 3), np.uint8)}}, graph, preprocess=how)
assert next(calibration.batches(2))["x"].shape == (2, 3, 8, 8)
for source in ({str(tmp_path)!r}, {{"x": np.ones((2, 9, 9, 3), np.uint8)}}):
    try:
        list(load_calibration(source, graph, preprocess=Preprocess(size=(8, 8))).batches(2))
    except OptionError as error:
        assert "graphprune[images]" in str(error), error
    else:
        raise AssertionError(source)
"""
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)
