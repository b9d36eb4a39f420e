"""Arrays in an .npz archive, read without taking more memory than what is kept of them."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from graphprune.calibration.memory import require
from graphprune.errors import OptionError

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]

#: Bytes that are decompressed at a time.
_STEP = 1 << 22
_LOCAL_HEADER = 30


@dataclass(frozen=True)
class Member:
    """One array of the archive; only its header has been read.

    Attributes:
        path: The archive.
        name: The array's name.
        shape, dtype, fortran: What its header says.
        offset: Bytes of that header.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def mapped(self) -> Array | None:
        """The array mapped into memory; None if it is compressed."""
        with reading(self.path), zipfile.ZipFile(self.path) as archive, self.path.open("rb") as file:
            info = archive.getinfo(self.name + ".npy")
            if info.compress_type != zipfile.ZIP_STORED or not self.nbytes:
                return None
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
            # The lengths of name and extra field: the local ones may differ from the directory's.
            start = info.header_offset + _LOCAL_HEADER + sum(np.frombuffer(header, "<u2", 2, 26).tolist())
            order = "F" if self.fortran else "C"
            return np.memmap(file, self.dtype, "r", start + self.offset, self.shape, order)  # type: ignore[call-overload, no-any-return]

    def mapped_or_self(self) -> Array | Member:
        """The array, mapped, if it can be."""
        mapped = self.mapped()
        return self if mapped is None else mapped

    def load(self, index: Indices | None = None) -> Array:
        """Decompress the array, or only some of its rows.

        Args:
            index: Rows to keep, in this order; None for the whole array.

        Raises:
            OptionError: What is kept does not fit into memory, or the archive is damaged.
        """
        whole = index is None or not self.shape or self.fortran
        kept = self.nbytes if whole or index is None else self.nbytes // max(1, self.shape[0]) * len(index)
        require(
            kept,
            f"{self.name!r} in --calib {str(self.path)!r}",
            "take fewer samples, or save it as .npy, uncompressed",
        )
        with (
            reading(self.path),
            zipfile.ZipFile(self.path) as archive,
            archive.open(self.name + ".npy") as stream,
        ):
            if whole or index is None:
                array: Array = npy.read_array(stream, allow_pickle=False)
                return array if index is None else array[index]
            stream.read(self.offset)
            return self._rows(stream, index)

    def _rows(self, stream: IO[bytes], index: Indices) -> Array:
        kept = np.empty((len(index), *self.shape[1:]), self.dtype)
        order = np.argsort(index, kind="stable")
        wanted = index[order]
        row = max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        step = max(1, _STEP // row)
        last = int(wanted[-1]) + 1 if len(wanted) else 0
        for start in range(0, last, step):
            stop = min(start + step, self.shape[0])
            data = stream.read((stop - start) * row)
            block = np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])
            low, high = np.searchsorted(wanted, [start, stop])
            kept[order[low:high]] = block[wanted[low:high] - start]
        return kept


def members(path: Path) -> dict[str, Member]:
    """The arrays in an archive, by name, in the order in which they were saved.

    Raises:
        OptionError: It is no .npz archive, is damaged, or holds Python objects.
    """
    found = {}
    with reading(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            name = info.filename.removesuffix(".npy")
            if info.flag_bits & 1:
                raise ValueError("it is encrypted")
            with archive.open(info) as stream:
                version = npy.read_magic(stream)
                read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
                if read is None:
                    raise ValueError(f"{name!r} is in .npy format {version}, which holds records")
                shape, fortran, dtype = read(stream)
                offset = stream.tell()
            if dtype.hasobject:
                raise ValueError(f"{name!r} holds Python objects, which are never read")
            found[name] = Member(path, name, tuple(shape), dtype, fortran, offset)
            if min(shape, default=0) < 0 or info.file_size - offset != found[name].nbytes:
                raise ValueError(f"{name!r} does not have the size that its header says")
    return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong with an archive into an :class:`OptionError`."""
    try:
        yield
    except zipfile.BadZipFile as error:
        reason = "it is damaged" if zipfile.is_zipfile(path) else "it is no .npz file of plain arrays"
        raise complaint(path, f"{reason} ({error})") from error
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise complaint(path, str(error)) from error


def complaint(path: Path, reason: str) -> OptionError:
    """What is said of a file of inputs that cannot be read."""
    return OptionError(
        f"cannot read --calib {str(path)!r}: {reason}; make it with numpy.savez(FILE, INPUT=array, ...)"
    )
