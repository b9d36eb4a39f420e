"""From images to what a network takes: resized, normalised, laid out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from graphprune.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]

#: Weights of red, green and blue in grey, in units of 2 ** -16: ITU-R BT.601 as Pillow rounds it.
_LUMA = (19595, 38470, 7471)


@dataclass(frozen=True)
class Preprocess:
    """What is done to an image before the network sees it: ``(x * scale - mean) / std`` per channel.

    With the defaults for ``scale`` this is torchvision's ToTensor and Normalize.

    Attributes:
        mean: One number, or one for each channel, in the order of channels that the network takes.
        std: Likewise; none is zero.
        size: (height, width) to resize to; None leaves images as they are.
        layout: ``"nchw"`` or ``"nhwc"``.
        scale: Factor on pixel values; None for 1/255 on integers and 1 on reals.
        color: Channels that the network takes: ``"rgb"``, ``"bgr"`` or ``"gray"``. Images come as RGB or grey.
        resize: ``"stretch"`` to ``size``, or ``"crop"``: resize until ``size`` is covered and take the middle.
        crop_pct: With ``"crop"``: ``size`` is this part of what the image is resized to (.875 with ImageNet).
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    layout: Literal["nchw", "nhwc"] = "nchw"
    scale: float | None = None
    color: Literal["rgb", "bgr", "gray"] = "rgb"
    resize: Literal["stretch", "crop"] = "stretch"
    crop_pct: float = 1.0

    #: Values of the keys that name something.
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layout": ("nchw", "nhwc"),
        "color": ("rgb", "bgr", "gray"),
        "resize": ("stretch", "crop"),
    }

    def __post_init__(self) -> None:
        for key, choices in self.CHOICES.items():
            if getattr(self, key) not in choices:
                raise _wrong(key, getattr(self, key), f"one of {', '.join(choices)}")
        for key in ("mean", "std"):
            numbers = getattr(self, key)
            if len(numbers) not in (1, self.channels) or not all(math.isfinite(x) for x in numbers):
                raise _wrong(key, numbers, f"one number, or {self.channels} for color={self.color}")
        if not all(x > 0 for x in self.std):
            raise _wrong("std", self.std, "above 0")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise _wrong("size", self.size, "HEIGHTxWIDTH, such as 224x224")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale != 0):
            raise _wrong("scale", self.scale, "a number other than 0, such as 1/255")
        if not 0 < self.crop_pct <= 1:
            raise _wrong("crop_pct", self.crop_pct, "above 0 and at most 1")

    @property
    def channels(self) -> int:
        """Channels that leave."""
        return 1 if self.color == "gray" else 3

    @property
    def exact(self) -> bool:
        """True if pixel values stay what they are."""
        return self.scale == 1 and set(self.mean) == {0.0} and set(self.std) == {1.0}

    @classmethod
    def parse(cls, text: str) -> Preprocess:
        """Read the argument of ``--preprocess``.

        Args:
            text: ``KEY=VALUE;KEY=VALUE;...``, perhaps after the name of a preset (``imagenet;size=256x256``), or the
                path of a JSON file with the same keys (and ``preset``).

        Raises:
            OptionError: A key is unknown or given twice, or its value has the wrong form; the message names the key.

        >>> Preprocess.parse("mean=.5;std=0.25;size=28x32;color=gray;scale=1/255").size
        (28, 32)
        """
        if text.strip().endswith(".json"):
            return cls._build(_read_json(Path(text.strip())))
        given: dict[str, object] = {}
        for position, item in enumerate(part.strip() for part in text.split(";")):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals:
                key, value = "preset", item
            if not item or (not equals and position):
                raise OptionError(
                    f"--preprocess: {item!r} is not of the form KEY=VALUE; keys are {', '.join(_READERS)}"
                )
            if key in given:
                raise OptionError(f"--preprocess gives {key!r} twice")
            given[key] = value
        return cls._build(given)

    @classmethod
    def _build(cls, given: Mapping[str, object]) -> Preprocess:
        values: dict[str, Any] = {}
        base = cls()
        for key, value in given.items():
            if key == "preset":
                if not isinstance(value, str) or value not in PRESETS:
                    raise _wrong(
                        key, value, f"one of {', '.join(PRESETS)}, or KEY=VALUE;..., or a .json file"
                    )
                base = PRESETS[value]
                continue
            if key not in _READERS:
                raise OptionError(f"--preprocess: unknown key {key!r}; keys are {', '.join(_READERS)}")
            read, form = _READERS[key]
            try:
                values[key] = read(value)
            except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
                raise _wrong(key, value, form) from error
        return replace(base, **values)

    def shape_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that an image of shape ``[H, W]`` or ``[H, W, C]`` gets."""
        height, width = self.size or shape[:2]
        return (self.channels, height, width) if self.layout == "nchw" else (height, width, self.channels)

    def apply(self, images: Array | Sequence[Image]) -> Float32Array:
        """Make a batch of images.

        Args:
            images: ``[N, H, W, C]`` or ``[N, H, W]`` with 1 or 3 channels, uint8 or real, or Pillow images (of one
                size, unless ``size`` is set).

        Returns:
            float32 ``[N, C, H, W]``, or ``[N, H, W, C]`` with ``layout="nhwc"``.

        Raises:
            OptionError: The images have another form, or cannot be resized.
        """
        if isinstance(images, np.ndarray):
            pixels = self._colored(images)
            if self.size not in (None, pixels.shape[1:3]):
                pixels = self._resized(pixels)
        else:
            pixels = np.stack([self._of_image(image) for image in images])
        batch = pixels.astype(np.float32)
        if self.scale is not None:
            batch *= np.float32(self.scale)
        elif pixels.dtype.kind in "iu":
            batch /= np.float32(255)
        batch -= np.asarray(self.mean, np.float32)
        batch /= np.asarray(self.std, np.float32)
        return np.ascontiguousarray(batch.transpose(0, 3, 1, 2)) if self.layout == "nchw" else batch

    def _colored(self, images: Array) -> Array:
        """``[N, H, W, channels]`` in the network's order of channels."""
        pixels = images[..., None] if images.ndim == 3 else images
        if pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or pixels.dtype.kind not in "uf":
            raise OptionError(
                "--preprocess takes images [N, H, W, 3] or [N, H, W], uint8 or real; given are"
                f" {images.dtype} {list(images.shape)}"
            )
        if pixels.dtype.kind == "u" and pixels.dtype.itemsize > 1 and self.scale is None:
            raise OptionError(
                f"--preprocess: say what {pixels.dtype} pixels are multiplied by, such as scale=1/65535"
            )
        if self.color == "gray" and pixels.shape[3] == 3:
            if pixels.dtype == np.uint8:
                return ((pixels @ np.array(_LUMA, np.uint32) + 0x8000) >> 16).astype(np.uint8)[..., None]
            weights = (np.array(_LUMA) / 2**16).astype(pixels.dtype)
            return np.asarray(pixels @ weights)[..., None]
        if self.color != "gray" and pixels.shape[3] == 1:
            return np.repeat(pixels, 3, axis=3)
        return pixels[..., ::-1] if self.color == "bgr" else pixels

    def _resized(self, pixels: Array) -> Array:
        try:
            import PIL.Image
        except ImportError as error:
            raise OptionError("--preprocess size needs Pillow: pip install 'graphprune[images]'") from error
        if pixels.dtype != np.uint8:
            raise OptionError(f"--preprocess size: only uint8 images are resized, these are {pixels.dtype}")
        squeezed = pixels[..., 0] if pixels.shape[3] == 1 else np.ascontiguousarray(pixels)
        resized = [np.asarray(self._fit(PIL.Image.fromarray(image))) for image in squeezed]
        return np.stack(resized).reshape(len(pixels), *(self.size or ()), pixels.shape[3])

    def _of_image(self, image: Image) -> Array:
        """uint8 ``[H, W, channels]``."""
        if image.mode.startswith(("I", "F")):
            raise OptionError(
                f"an image has more than 8 bits a channel (mode {image.mode}); save it with 8, or give arrays"
            )
        fitted = self._fit(image.convert("L" if self.color == "gray" else "RGB"))
        pixels = np.asarray(fitted).reshape(fitted.height, fitted.width, self.channels)
        return pixels[..., ::-1] if self.color == "bgr" else pixels

    def _fit(self, image: Image) -> Image:
        from PIL.Image import Resampling

        if self.size is None:
            return image
        height, width = self.size
        if self.resize == "stretch":
            return image.resize((width, height), Resampling.BILINEAR)
        # As torchvision's Resize and CenterCrop: the tighter side is exact, the other is rounded down.
        cover_height, cover_width = round(height / self.crop_pct), round(width / self.crop_pct)
        if cover_height * image.width >= cover_width * image.height:
            cover_width = max(cover_width, int(cover_height * image.width / image.height))
        else:
            cover_height = max(cover_height, int(cover_width * image.height / image.width))
        covering = image.resize((cover_width, cover_height), Resampling.BILINEAR)
        top, left = round((cover_height - height) / 2), round((cover_width - width) / 2)
        return covering.crop((left, top, left + width, top + height))


def _numbers(value: object) -> tuple[float, ...]:
    if isinstance(value, str):
        return tuple(_number(part) for part in value.split(","))
    return tuple(_number(part) for part in (value if isinstance(value, list) else [value]))


def _number(value: object) -> float:
    """A number, or a fraction such as ``1/255``."""
    if isinstance(value, str) and "/" in value:
        above, below = value.split("/")
        return float(Fraction(above.strip()) / Fraction(below.strip()))
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    return float(value)


def _size(value: object) -> tuple[int, int]:
    parts = value if isinstance(value, list) else str(value).replace("x", ",").split(",")
    height, width = parts if len(parts) > 1 else (parts[0], parts[0])
    if isinstance(height, float) or isinstance(width, float):
        raise TypeError
    return int(height), int(width)


def _word(value: object) -> str:
    return str(value).lower()


#: How each key is read, and what form it has.
_READERS: dict[str, tuple[Callable[[object], object], str]] = {
    "mean": (_numbers, "numbers such as 0.485,0.456,0.406"),
    "std": (_numbers, "numbers such as 0.229,0.224,0.225"),
    "size": (_size, "HEIGHTxWIDTH, such as 224x224"),
    "layout": (_word, "nchw or nhwc"),
    "scale": (_number, "a number such as 1/255"),
    "color": (_word, "rgb, bgr or gray"),
    "resize": (_word, "stretch or crop"),
    "crop_pct": (_number, "a number such as 0.875"),
}

#: Settings that many networks share, by name.
PRESETS: dict[str, Preprocess] = {
    # torchvision's: resize the shorter side to 256, crop 224 x 224.
    "imagenet": Preprocess(
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224), resize="crop", crop_pct=0.875
    ),
}


def _wrong(key: str, value: object, form: str) -> OptionError:
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return OptionError(f"--preprocess {key}: {str(shown)!r} is not {form}")


def _read_json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read --preprocess {str(path)!r}: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"--preprocess {str(path)!r} must hold an object with keys {', '.join(_READERS)}")
    return {key: value for key, value in found.items() if value is not None}
