"""What users give as inputs: arrays, archives, folders, feeds. Here they are opened; nothing large is read yet."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.calibration.memory import require
from graphprune.calibration.npz import Member, complaint, members
from graphprune.calibration.rows import (
    IMAGES,
    ArrayPiece,
    FilePiece,
    ImagePiece,
    PreparedPiece,
    Rows,
    open_npy,
)
from graphprune.errors import OptionError

if TYPE_CHECKING:
    from graphprune.calibration.preprocess import Preprocess
    from graphprune.graph import Tensor

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]

#: Names of an array of labels beside the inputs.
LABELS = ("labels", "y")
#: Symbols that exporters number through: two of them may well mean one size.
_NUMBERED = re.compile(r"|\?|None|unk__\d+|p2o\.DynamicDimension\.\d+")
#: The name under which an array without a name is offered.
NAMELESS = ""


@dataclass(frozen=True)
class Wanted:
    """What the model says of an input.

    Attributes:
        name: Of the input.
        dtype: Element type; None where the input is no tensor.
        dims: Sizes, symbols, and None for a size without a name; None where the rank is not known.
        strings: The elements are strings.
    """

    name: str
    dtype: np.dtype[Any] | None
    dims: tuple[int | str | None, ...] | None
    strings: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Wanted:
        """What is wanted for an input of the twin: dynamic dimensions are those of the model, not of the twin."""
        import onnx_ir as ir

        shape = tensor.value.shape if tensor.value is not None else None
        dims = None if shape is None else tuple(_dim(dim) for dim in shape)
        dtype = None if tensor.dtype is None else np.dtype(tensor.dtype.numpy())
        return cls(tensor.name, dtype, dims, tensor.dtype == ir.DataType.STRING)

    def __str__(self) -> str:
        dims = "" if self.dims is None else ", ".join("?" if dim is None else str(dim) for dim in self.dims)
        kind = "string" if self.strings else self.dtype
        return f"{self.name!r} {kind} [{'...' if self.dims is None else dims}]"


def _dim(dim: Any) -> int | str | None:
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    return None if dim.value is None or _NUMBERED.fullmatch(dim.value) else str(dim.value)


@dataclass(frozen=True)
class Feeds:
    """One input's arrays from several feeds.

    Attributes:
        arrays: Of the model's rank, or one less: a single sample.
        rank: The model's; None where it is not known.
    """

    arrays: tuple[Array, ...]
    rank: int | None

    @property
    def ndim(self) -> int:
        return self.arrays[0].ndim if self.rank is None else self.rank

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.arrays[0].dtype

    def count(self, axis: int) -> int:
        """Samples in all feeds."""
        return sum(1 if array.ndim < self.ndim else array.shape[axis] for array in self.arrays)

    def rows(self, axis: int) -> Rows:
        """The samples, along axis 0 of each piece."""
        pieces = []
        for number, array in enumerate(self.arrays):
            batch = array[None] if array.ndim < self.ndim else np.moveaxis(array, axis, 0)
            pieces.append(ArrayPiece(batch, f"feed {number}"))
        return Rows(pieces)

    def single(self) -> Array | None:
        """The array where all feeds have the same one."""
        first = self.arrays[0]
        return first if all(np.array_equal(first, array) for array in self.arrays[1:]) else None


#: The array for one input: in memory or mapped, compressed in an archive, in files, in feeds.
Offer: TypeAlias = Array | Member | Rows | Feeds


def open_source(
    source: object, wanted: Sequence[Wanted], preprocess: Preprocess | None, samples: int | None
) -> dict[str, Offer]:
    """The arrays that a source offers, by name; an array without a name is called :data:`NAMELESS`.

    Args:
        source: See :func:`graphprune.calibration.load_calibration`.
        wanted: The model's inputs.
        preprocess: What makes inputs of images in files.
        samples: How many to take of an iterator that may have no end.

    Raises:
        OptionError: It cannot be read, or is nothing of the kind.
    """
    if isinstance(source, str | os.PathLike):
        return _open_path(Path(source), wanted, preprocess)
    if isinstance(source, Mapping):
        return {str(name): np.asarray(array) for name, array in source.items()}
    if isinstance(source, np.ndarray):
        return {NAMELESS: source}
    if hasattr(source, "__array__"):  # a tensor of another library
        return {NAMELESS: np.asarray(source)}
    if isinstance(source, Iterable):
        return _collect(source, wanted, samples)
    raise OptionError(
        f"calibration inputs are a path, a mapping of arrays, or an iterable of feeds, not {type(source).__name__}"
    )


def _open_path(path: Path, wanted: Sequence[Wanted], preprocess: Preprocess | None) -> dict[str, Offer]:
    if path.is_dir():
        return {NAMELESS: _open_folder(path, wanted, preprocess)}
    try:
        with path.open("rb") as file:
            magic = file.read(6)
    except OSError as error:
        raise complaint(path, str(error)) from error
    if magic == b"\x93NUMPY":
        return {NAMELESS: open_npy(path)}
    if magic[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return {name: member.mapped_or_self() for name, member in members(path).items()}
    if path.suffix.lower() in IMAGES:
        raise complaint(path, "it is one image: give the folder of images")
    raise complaint(path, "it is no .npz file of plain arrays, no .npy file and no folder")


# -- folders --------------------------------------------------------------------------------------------------------


def _open_folder(folder: Path, wanted: Sequence[Wanted], preprocess: Preprocess | None) -> Rows:
    shown = f"--calib {str(folder)!r}"
    if len(wanted) != 1:
        raise OptionError(
            f"{shown} is a folder, which holds samples of one input; the model has {len(wanted)}: give an .npz"
            f" with {', '.join(map(str, wanted))}"
        )
    images, arrays = [], []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() == ".npy":
                arrays.append(path)
            elif path.suffix.lower() in IMAGES:
                images.append(path)
    if not images and not arrays:
        raise OptionError(f"{shown} is a folder without images or .npy files; say where the samples are")
    if images and arrays:
        raise OptionError(
            f"{shown} holds images ({images[0].name}, ...) and .npy files ({arrays[0].name}, ...); part them"
        )
    dtype = wanted[0].dtype or np.dtype(np.float32)
    if arrays:
        return Rows([_npy_piece(path, wanted[0], preprocess) for path in sorted(arrays)])
    if preprocess is None:
        raise OptionError(
            f"{shown} is a folder of images: say with --preprocess how the network takes them, such as"
            " --preprocess imagenet or --preprocess 'mean=0.5;std=0.5;size=224x224;layout=nchw'"
        )
    return Rows([ImagePiece(path, preprocess, dtype) for path in sorted(images)])


def _npy_piece(path: Path, wanted: Wanted, preprocess: Preprocess | None) -> FilePiece | PreparedPiece:
    """A file in a folder: one sample, or a batch of them where it has the model's rank."""
    array = open_npy(path)
    shown = f"--calib {str(path)!r}"
    # Images have a rank of their own: H W C, or N H W C.
    of_image = preprocess is not None and array.dtype == np.uint8
    rank = 4 if of_image else array.ndim + 1 if wanted.dims is None else len(wanted.dims)
    if array.ndim not in (rank, rank - 1):
        raise OptionError(
            f"{shown} has shape {list(array.shape)}; the model wants {wanted}, and a file holds one"
            " sample of it, or a batch"
        )
    single = array.ndim == rank - 1
    piece = FilePiece(path, (1, *array.shape) if single else array.shape, array.dtype, single)
    if of_image and preprocess is not None:
        return PreparedPiece(piece, preprocess, wanted.dtype or np.dtype(np.float32))
    return piece


# -- feeds ----------------------------------------------------------------------------------------------------------


def _collect(feeds: Iterable[object], wanted: Sequence[Wanted], samples: int | None) -> dict[str, Offer]:
    """The arrays of all feeds; only the first ``samples`` of an iterator, which may have no end."""
    enough = samples if not isinstance(feeds, Sequence) else None
    ranks = {want.name: None if want.dims is None else len(want.dims) for want in wanted}
    found: dict[str, list[Array]] = {}
    names: list[str] | None = None
    taken = 0
    for number, feed in enumerate(feeds):
        if isinstance(feed, Mapping):
            arrays = {str(name): np.asarray(array) for name, array in feed.items()}
        elif len(wanted) == 1:
            arrays = {wanted[0].name: np.asarray(feed)}
        else:
            raise OptionError(
                f"feed {number} of the calibration inputs is a {type(feed).__name__}; the model has"
                f" {len(wanted)} inputs: give a mapping with {', '.join(map(str, wanted))}"
            )
        names = names or list(arrays)
        if set(arrays) != set(names):
            raise OptionError(
                f"feed {number} of the calibration inputs has {', '.join(arrays) or 'nothing'}, the ones before"
                f" have {', '.join(names)}"
            )
        for name, array in arrays.items():
            rank = ranks.get(name)
            if rank is not None and array.ndim not in (rank, rank - 1):
                raise OptionError(
                    f"feed {number} of the calibration inputs gives {name!r} with shape {list(array.shape)}; the model"
                    f" wants rank {rank}, or {rank - 1} for one sample"
                )
            found.setdefault(name, []).append(array)
        first = next((want.name for want in wanted if want.name in arrays), None)
        if first is not None:
            array, rank = arrays[first], ranks[first]
            taken += array.shape[0] if array.ndim and array.ndim == (rank or array.ndim) else 1
        if enough is not None and taken >= enough:
            break
        if not isinstance(feeds, Sequence):
            size = sum(array.nbytes for array in arrays.values())
            require(2 * size, "the next feed of the calibration inputs", "say how many samples are enough")
    if names is None:
        raise OptionError("the calibration inputs are empty: the iterable gave no feed")
    return {name: Feeds(tuple(arrays), ranks.get(name)) for name, arrays in found.items()}
