"""One input of the model and what is given for it: types, shapes, and which axis holds the samples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.calibration.npz import Member
from graphprune.calibration.preprocess import Preprocess
from graphprune.calibration.rows import ArrayPiece, FilePiece, PreparedPiece, Rows, check_finite
from graphprune.calibration.sources import Feeds, Offer, Wanted
from graphprune.errors import OptionError
from graphprune.graph.sizes import BATCH

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]


class Input:
    """What is offered for one input.

    Attributes:
        axis: The batch axis; None where the input is the same for every sample.
        prepared: It is made of images by ``preprocess``.
    """

    def __init__(
        self, wanted: Wanted, offer: Offer, preprocess: Preprocess | None, only: bool = True
    ) -> None:
        """Check the type of what is offered.

        Args:
            wanted: What the model says.
            offer: What is given.
            preprocess: For images.
            only: The model has no other input: a real array of rank 4 is then an image too.

        Raises:
            OptionError: The type is wrong, or ``preprocess`` would not give it.
        """
        self.only = only
        self.wanted = wanted
        self.offer = offer
        self.axis: int | None = 0
        self.preprocess = preprocess if preprocess is not None and self._is_image() else None
        self.prepared = self.preprocess is not None or (
            isinstance(offer, Rows) and not all(isinstance(piece, FilePiece) for piece in offer.pieces)
        )
        kind = np.dtype(object) if wanted.dtype is None else wanted.dtype
        if self.prepared and preprocess is not None and kind.kind in "iu" and not preprocess.exact:
            raise OptionError(
                f"input {wanted.name!r} takes {kind}: --preprocess must leave pixels as they are: scale=1,"
                " no mean, no std"
            )
        if not self.prepared:
            self._check_type()

    def _is_image(self) -> bool:
        if isinstance(self.offer, Rows) or self.wanted.dtype is None or self.wanted.strings:
            return False
        rank = self.offer.ndim if isinstance(self.offer, Feeds) else len(self.offer.shape)
        if isinstance(self.offer, Feeds) and self.offer.arrays[0].ndim == 3:
            rank = 3
        wanted_rank = 4 if self.wanted.dims is None else len(self.wanted.dims)
        real = self.only and self.offer.dtype.kind == "f" and self.wanted.dtype.kind in "fV"
        return wanted_rank == 4 and (
            (self.offer.dtype == np.uint8 and rank in (3, 4)) or (real and rank == 4)
        )

    def _check_type(self) -> None:
        want, offer = self.wanted, self.offer
        match offer:
            case Rows():
                given = {piece.dtype for piece in offer.pieces}
            case Feeds():
                given = {array.dtype for array in offer.arrays}
            case _:
                given = {offer.dtype}
        for have in given:
            if want.strings:
                if have.kind not in "USO":
                    raise OptionError(f"input {want.name!r} must hold strings, the one given {have}")
            elif have != want.dtype:
                hint = "; images are converted by --preprocess" if have == np.uint8 else ""
                raise OptionError(
                    f"input {want.name!r} must be {want.dtype}, the one given is {have}: save it as"
                    f" array.astype('{want.dtype}'){hint}"
                )

    @property
    def rank(self) -> int:
        return self.offer.ndim if isinstance(self.offer, Feeds) else len(self.offer.shape)

    def length(self) -> int:
        """Samples that are offered."""
        axis = self.axis or 0
        if isinstance(self.offer, Feeds):
            return self.offer.count(axis)
        if isinstance(self.offer, Rows):
            return len(self.offer)
        return self.offer.shape[axis]

    @property
    def ragged(self) -> bool:
        """Samples differ in shape."""
        if isinstance(self.offer, Feeds):
            return self.axis is not None and len(self.offer.rows(self.axis).shapes) > 1
        return isinstance(self.offer, Rows) and len(self.offer.shapes) > 1

    def rows(self, index: Indices | None) -> Array | Rows:
        """The samples at ``index``, samples first, checked."""
        rows = self._open(index)
        for shape in rows.shapes if isinstance(rows, Rows) else (rows.shape[1:],):
            self._check_shape((len(rows), *shape))
        return rows

    def _open(self, index: Indices | None) -> Array | Rows:
        axis, offer = self.axis or 0, self.offer
        what = f"input {self.wanted.name!r}"
        if isinstance(offer, Member):
            if axis or self.rank != len(offer.shape):
                offer = offer.load()
            else:
                array = offer.load(index)
                check_finite(array, what, index)
                return self._prepare(Rows([ArrayPiece(array)])) if self.preprocess else array
        if isinstance(offer, Rows):  # files, which are checked when they are read
            return offer if index is None else offer.pick(index)
        if isinstance(offer, Feeds):
            rows = offer.rows(axis)
            if len(rows.pieces) == 1 and not self.preprocess:
                offer = np.moveaxis(rows.pieces[0].read(np.arange(len(rows))), 0, axis)
            else:
                rows = rows if index is None else rows.pick(index)
                for piece in rows.pieces:
                    check_finite(piece.read(np.arange(piece.count)), f"{what}, {piece.name},")
                return self._prepare(rows)
        array = np.moveaxis(offer, axis, 0)
        lazy = Rows([ArrayPiece(array)], index)
        in_order = None if index is None else np.sort(index)
        check_finite(Rows(lazy.pieces, in_order), what, in_order)
        if self.preprocess:
            return self._prepare(lazy)
        if index is None:
            return array
        return lazy if isinstance(array, np.memmap) else array[index]

    def _prepare(self, rows: Rows) -> Rows:
        if self.preprocess is None or self.wanted.dtype is None:
            return rows
        return Rows(
            [PreparedPiece(piece, self.preprocess, self.wanted.dtype) for piece in rows.pieces], rows.index
        )

    def single(self) -> Array:
        """The array that is the same for every sample, checked."""
        offer = self.offer
        if isinstance(offer, Feeds):
            same = offer.single()
            if same is None:
                raise OptionError(
                    f"input {self.wanted.name!r} has no batch axis in the model, but differs from feed to feed"
                )
            array = same
        elif isinstance(offer, Member):
            array = offer.load()
        else:
            array = offer[:] if isinstance(offer, Rows) else np.asarray(offer)
        self._check_shape(array.shape)
        check_finite(array, f"input {self.wanted.name!r}")
        return array

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Against the model's; ``shape`` has the samples first."""
        want = self.wanted
        if want.dims is None:
            return
        if self.axis:
            shape = (*shape[1 : self.axis + 1], shape[0], *shape[self.axis + 1 :])
        if len(shape) != len(want.dims):
            hint = (
                "; one sample needs an axis for samples, array[None]"
                if len(shape) + 1 == len(want.dims)
                else ""
            )
            raise OptionError(
                f"input {want.name!r} has rank {len(want.dims)}, the one given rank {len(shape)}: the model wants"
                f" {want}, given is {list(shape)}{hint}"
            )
        for axis, (size, dim) in enumerate(zip(shape, want.dims, strict=True)):
            if axis != self.axis and isinstance(dim, int) and size != dim:
                raise OptionError(
                    f"axis {axis} of input {want.name!r} must be {dim}, in the one given it is {size}: the model wants"
                    f" {want}, given is {list(shape)}{self._hint()}"
                )

    def _hint(self) -> str:
        if not self.prepared:
            return ""
        return " after --preprocess (see its size, layout and color)"


# -- the batch axis -------------------------------------------------------------------------------------------------


def find_batch(inputs: Sequence[Input]) -> tuple[int | None, int]:
    """Set the batch axis of each input.

    Returns:
        Samples that the model takes at once (None for any number), and how many are given (1 where no input has a
        batch axis).
    """
    for each in inputs:
        each.axis = _dynamic_axis(each.wanted.dims)
        if each.axis is not None and each.rank <= each.axis:
            each.axis = None
    batched = [each for each in inputs if each.axis is not None]
    if not batched:
        return _find_fixed_batch(inputs)
    main = next((each for each in batched if _is_batch(_symbol(each))), batched[0])
    count = main.length()
    for each in inputs:
        if each.axis is None:
            each.axis = _same_size_axis(each, count)
        elif each.length() != count:
            symbols = {_symbol(main), _symbol(each)}
            if None in symbols or len(symbols) == 1:
                raise OptionError(
                    f"the calibration inputs have different numbers of samples: {main.wanted.name!r} {count},"
                    f" {each.wanted.name!r} {each.length()} along axis {each.axis}"
                )
            each.axis = None
            _warn_single(each)
    return None, count


def _find_fixed_batch(inputs: Sequence[Input]) -> tuple[int | None, int]:
    with_first = [each for each in inputs if each.wanted.dims and each.rank]
    main = next((each for each in with_first if each.rank > 1), next(iter(with_first), None))
    batch = main.wanted.dims[0] if main is not None and main.wanted.dims else None
    if main is None or not isinstance(batch, int) or not batch:
        return None, 1
    main.axis = 0
    count = main.length()
    for each in with_first:
        if each is main or not each.wanted.dims or each.wanted.dims[0] != batch:
            continue
        each.axis = 0
        if each.length() == batch < count:
            each.axis = None
            _warn_single(each)
        elif each.length() != count:
            raise OptionError(
                f"the calibration inputs have different numbers of samples: {main.wanted.name!r} {count},"
                f" {each.wanted.name!r} {each.length()}"
            )
    return batch, count


def _warn_single(each: Input) -> None:
    warnings.warn(
        f"input {each.wanted.name!r} is given once and taken to be the same for every sample", stacklevel=5
    )


def _is_batch(symbol: str | None) -> bool:
    return symbol is not None and BATCH.search(symbol) is not None


def _symbol(each: Input) -> str | None:
    dim = each.wanted.dims[each.axis] if each.wanted.dims and each.axis is not None else None
    return dim if isinstance(dim, str) else None


def _dynamic_axis(dims: tuple[int | str | None, ...] | None) -> int | None:
    """The axis whose symbol says batch, or axis 0 where it is dynamic."""
    if dims is None:
        return 0
    named = (axis for axis, dim in enumerate(dims) if isinstance(dim, str) and _is_batch(dim))
    return next(named, 0 if dims and not isinstance(dims[0], int) else None)


def _same_size_axis(each: Input, count: int) -> int | None:
    """An axis without a name, of an input whose first axis is none for samples, that has one entry for each sample."""
    dims, offer = each.wanted.dims, each.offer
    if dims is None or isinstance(offer, Rows | Feeds) or len(offer.shape) != len(dims) or count == 1:
        return None
    return next((k for k, dim in enumerate(dims) if dim is None and offer.shape[k] == count), None)
