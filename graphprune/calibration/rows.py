"""Samples that are read when they are asked for: rows of arrays, of mapped files, of folders of files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from graphprune.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

    from graphprune.calibration.preprocess import Preprocess

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]
Shape = tuple[int, ...]

#: Bytes that are checked at a time.
_STEP = 1 << 22
#: Files with these endings are images.
IMAGES = frozenset(
    f".{ending}"
    for ending in (
        *("png", "jpg", "jpeg", "jpe", "jp2", "bmp", "dib", "gif", "webp"),
        *("avif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "tga"),
    )
)


class Piece(Protocol):
    """Samples that lie together: an array, or a file.

    Attributes:
        name: Where they are, for messages.
        count: How many there are.
        shape: Samples first.
        dtype: Of the elements.
    """

    @property
    def name(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def read(self, rows: Indices) -> Array:
        """Some of the samples, in this order."""


@dataclass(frozen=True)
class ArrayPiece:
    """An array, in memory or mapped.

    Attributes:
        array: ``[samples, ...]``.
        name: See :class:`Piece`.
    """

    array: Array
    name: str = "the array"

    @property
    def count(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> Shape:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def read(self, rows: Indices) -> Array:
        return np.asarray(_take(self.array, rows))


@dataclass(frozen=True)
class FilePiece:
    """An .npy file, opened only to be read.

    Attributes:
        path: The file.
        shape, dtype: See :class:`Piece`.
        single: It holds one sample, without the axis for samples.
    """

    path: Path
    shape: Shape
    dtype: np.dtype[Any]
    single: bool

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def count(self) -> int:
        return self.shape[0]

    def read(self, rows: Indices) -> Array:
        array = open_npy(self.path)
        array = np.asarray(_take(array[None] if self.single else array, rows))
        check_finite(array, f"--calib {self.name!r}")
        return array


@dataclass(frozen=True)
class ImagePiece:
    """An image, decoded when it is read.

    Attributes:
        path: The file.
        preprocess: What makes an input of it.
        dtype: What the model wants.
    """

    path: Path
    preprocess: Preprocess
    dtype: np.dtype[Any]

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def count(self) -> int:
        return 1

    @cached_property
    def shape(self) -> Shape:
        with open_image(self.path) as image:
            return (1, *self.preprocess.shape_of((image.height, image.width)))

    def read(self, rows: Indices) -> Array:
        with open_image(self.path) as image:
            try:
                image.load()
            except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
                raise unreadable(self.path, error) from error
            batch = self.preprocess.apply([image]).astype(self.dtype, copy=False)
            return batch if len(rows) == 1 else batch[np.zeros_like(rows)]


@dataclass(frozen=True)
class PreparedPiece:
    """Images in an array or a file, prepared when they are read.

    Attributes:
        source: Images ``[samples, H, W, C]`` or ``[samples, H, W]``.
        preprocess: What makes an input of them.
        dtype: What the model wants.
    """

    source: Piece
    preprocess: Preprocess
    dtype: np.dtype[Any]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def count(self) -> int:
        return self.source.count

    @property
    def shape(self) -> Shape:
        return (self.source.count, *self.preprocess.shape_of(self.source.shape[1:]))

    def read(self, rows: Indices) -> Array:
        return self.preprocess.apply(self.source.read(rows)).astype(self.dtype, copy=False)


class Rows:
    """The samples of one input, in pieces. Slicing reads; :meth:`pick` does not.

    Samples may differ in shape (texts of different lengths): a slice that mixes shapes cannot be read, and
    :meth:`run` tells how far one may go.

    >>> rows = Rows([ArrayPiece(np.arange(6).reshape(3, 2)), ArrayPiece(np.arange(9).reshape(3, 3))])
    >>> len(rows), rows.run(0, 6), rows[1:3].tolist()
    (6, 3, [[2, 3], [4, 5]])
    >>> rows.pick(np.array([5, 0]))[:1].tolist()
    [[6, 7, 8]]
    """

    def __init__(self, pieces: Sequence[Piece], index: Indices | None = None) -> None:
        """Rows of pieces.

        Args:
            pieces: At least one, all of one type and rank.
            index: Which of the samples, numbered through all pieces, in which order; None for all.
        """
        self.pieces = tuple(pieces)
        self._starts = np.cumsum([0, *(piece.count for piece in self.pieces)])
        self.index = np.arange(self._starts[-1]) if index is None else index

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that samples have: one, as a rule."""
        return tuple(dict.fromkeys(piece.shape[1:] for piece in self.pieces))

    @property
    def shape(self) -> Shape:
        """Number of samples, and the shape of the first of :attr:`shapes`."""
        return (len(self.index), *self.shapes[0])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self.pieces[0].dtype

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: slice) -> Array:
        """Read some samples.

        Raises:
            OptionError: A file cannot be read, or holds NaN or infinity.
        """
        index = self.index[key]
        if not len(index):
            return np.empty((0, *self.shape[1:]), self.dtype)
        of = self._piece_of(index)
        borders = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(index)]
        read = [
            self.pieces[of[start]].read(index[start:stop] - self._starts[of[start]])
            for start, stop in pairwise(borders)
        ]
        return read[0] if len(read) == 1 else np.concatenate(read)

    def _piece_of(self, index: Indices) -> Indices:
        return np.searchsorted(self._starts, index, side="right") - 1

    def pick(self, index: Indices) -> Rows:
        """The samples at these positions, in this order."""
        index = self.index[index]
        if not len(index):
            return Rows(self.pieces[:1], index)
        used, of = np.unique(self._piece_of(index), return_inverse=True)
        pieces = [self.pieces[piece] for piece in used.tolist()]
        starts = np.cumsum([0, *(piece.count for piece in pieces[:-1])])
        return Rows(pieces, index - self._starts[used][of] + starts[of])

    def run(self, start: int, stop: int) -> int:
        """The last position up to ``stop`` before which all samples from ``start`` on have one shape."""
        if len(self.shapes) == 1:
            return stop
        shapes = [self.pieces[piece].shape[1:] for piece in self._piece_of(self.index[start:stop]).tolist()]
        return next((start + k for k, shape in enumerate(shapes) if shape != shapes[0]), stop)


def _take(array: Array, rows: Indices) -> Array:
    """``array[rows]``, without a copy where the rows lie in one stretch."""
    if len(rows) and (len(rows) == 1 or (np.diff(rows) == 1).all()):
        return array[int(rows[0]) : int(rows[-1]) + 1]
    return array[rows]


def check_finite(array: Array | Rows, what: str, index: Indices | None = None) -> None:
    """Refuse NaN and infinity.

    Args:
        array: ``[samples, ...]``, or a scalar; read by stretches of some megabytes.
        what: What the array is, for the message.
        index: What to call the samples; their position by default.

    Raises:
        OptionError: It holds one; the message has the index of the first.
    """
    if isinstance(array, np.ndarray) and array.ndim == 0:
        return check_finite(array[None], what)
    if array.dtype.kind not in "fcV":
        return None
    step = max(1, _STEP // max(1, array.dtype.itemsize * math.prod(array.shape[1:])))
    for start in range(0, len(array), step):
        block = array[start : start + step]
        finite = np.isfinite(block)
        if not finite.all():
            place = [int(axis[0]) for axis in np.nonzero(~finite)]
            value = block[tuple(place)]
            place[0] = start + place[0] if index is None else int(index[start + place[0]])
            raise OptionError(
                f"{what} holds {value} at {place}; take out such samples, or find out where they come from"
            )
    return None


def open_npy(path: Path) -> Array:
    """The array in an .npy file, mapped rather than read.

    Raises:
        OptionError: It is no such file, or holds Python objects.
    """
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError) as error:
        objects = "object" in str(error).lower()
        reason = "it holds Python objects, which are never read" if objects else str(error)
        raise OptionError(f"cannot read --calib {str(path)!r}: {reason}") from error
    return array


def open_image(path: Path) -> Image:
    """An image, its pixels not decoded yet.

    Raises:
        OptionError: It is none, or Pillow is not installed.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise OptionError(
            "images are read through Pillow: pip install 'graphprune[images]', or give an .npz of arrays"
        ) from error
    try:
        return PIL.Image.open(path)
    except Exception as error:  # decoders raise anything
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> OptionError:
    """The complaint about an image that cannot be decoded."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify" in reason:
        reason = "it is no image that Pillow knows"
    return OptionError(f"cannot read the image {str(path)!r}: {reason}; mend it or take it out of the folder")
