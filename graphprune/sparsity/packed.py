"""Packed weights in a .safetensors file: written and read one weight at a time.

A .safetensors file is eight bytes with the length of a header (little-endian), the header (JSON: dtype, shape and
offsets of each tensor), and the tensors' bytes one after another (https://github.com/huggingface/safetensors, README,
section Format). Of a weight ``w`` there are ``w.values`` in the weight's dtype and ``w.indices``, bytes, as
:mod:`graphprune.kernels.packed` describes them. The header's ``__metadata__`` has ``format`` (:data:`FORMAT`) and,
under ``w.packed``, JSON with the pattern, the weight's shape, the layout ``[outer, contracted, inner]`` that the shape
reshapes to, and where its outputs lie (their number, axis and step).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from graphprune.errors import ModelError, OptionError
from graphprune.kernels.packed import pack, packed_sizes, unpack
from graphprune.sparsity.pattern import NM, Layout

Array = npt.NDArray[Any]

#: What ``__metadata__`` says of the file, so that a later arrangement can be told from this one.
FORMAT = "graphprune packed N:M, 1"
#: The format's own limit on its header.
LARGEST_HEADER = 100_000_000

#: The format's names of NumPy's and ml_dtypes' types.
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}


def _numpy_dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes

    for numpy_name, own in DTYPES.items():
        if own == name:
            return np.dtype(getattr(ml_dtypes, numpy_name, None) or numpy_name)
    raise ModelError(f"the type {name} is unknown; known are {', '.join(DTYPES.values())}")


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight as a packed file has it.

    Attributes:
        name: The initializer's.
        dtype: NumPy's, or ml_dtypes'.
        shape: As stored in the model.
        layout: Its reshape, along whose middle axis the groups run.
        pattern: What it holds; its unit is one element.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    layout: Layout
    pattern: NM

    def __post_init__(self) -> None:
        if prod(self.shape) != prod(self.layout.shape):
            raise ValueError(f"{self.name}: {self.shape} does not reshape to {self.layout.shape}")
        if self.pattern.block != (1, 1):
            raise OptionError(
                f"{self.name}: {self.pattern} cannot be packed, only patterns of single elements"
            )
        if self.dtype.name not in DTYPES:
            raise OptionError(f"{self.name}: {self.dtype} cannot be packed; these can: {', '.join(DTYPES)}")

    @property
    def values(self) -> tuple[int, int, int]:
        """Shape of the packed values."""
        return packed_sizes(self.layout.shape, self.pattern.n, self.pattern.m)[0]

    @property
    def value_bytes(self) -> int:
        return prod(self.values) * self.dtype.itemsize

    @property
    def index_bytes(self) -> int:
        return packed_sizes(self.layout.shape, self.pattern.n, self.pattern.m)[1]

    @property
    def names(self) -> tuple[str, str]:
        """Of the two tensors in the file."""
        return f"{self.name}.values", f"{self.name}.indices"

    def described(self) -> str:
        """What ``__metadata__`` says of it."""
        layout = self.layout
        return json.dumps(
            {
                "pattern": str(self.pattern),
                "shape": list(self.shape),
                "layout": list(layout.shape),
                "outputs": [layout.outputs, layout.outputs_axis, layout.outputs_step],
            }
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor's place in the file, from the end of the header on."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _arrange(weights: Sequence[PackedWeight]) -> dict[str, _Entry]:
    """Where each tensor goes: the widest types first, so that all lie at multiples of their item's size."""
    tensors = [
        entry
        for w in weights
        for entry in (
            (w.dtype.itemsize, w.names[0], DTYPES[w.dtype.name], w.values, w.value_bytes),
            (1, w.names[1], "U8", (w.index_bytes,), w.index_bytes),
        )
    ]
    entries: dict[str, _Entry] = {}
    at = 0
    for _, name, dtype, shape, size in sorted(tensors, key=lambda tensor: -tensor[0]):
        if name in entries:
            raise ValueError(f"two tensors are called {name}")
        entries[name] = _Entry(dtype, shape, at, at + size)
        at += size
    return entries


def _header(weights: Sequence[PackedWeight], entries: Mapping[str, _Entry]) -> bytes:
    content: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, **{f"{w.name}.packed": w.described() for w in weights}}
    }
    for name, entry in entries.items():
        content[name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [entry.start, entry.stop],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


class PackedWriter:
    """Writes a packed file beside its target; it is renamed into place when every weight is in it.

    Use as a context manager; after an error inside it nothing is left, and a file that was there is as it was.

    Args:
        path: The file.
        weights: All that will come, in any order: the header has to stand before the first of them.

    Raises:
        ModelError: The file cannot be written.
        ValueError: Two weights have one name.
    """

    def __init__(self, path: str | os.PathLike[str], weights: Sequence[PackedWeight]) -> None:
        self.path = Path(path)
        self._weights = {weight.name: weight for weight in weights}
        if len(self._weights) < len(weights):
            raise ValueError("two weights have one name")
        self._entries = _arrange(weights)
        header = _header(weights, self._entries)
        if len(header) > LARGEST_HEADER:
            raise ModelError(
                f"{self.path}: {len(weights)} weights are too many for the header of one .safetensors file"
            )
        self._start = 8 + len(header)
        self._missing = set(self._weights)
        self._prefix = len(header).to_bytes(8, "little") + header

    def __enter__(self) -> Self:
        try:
            descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        except OSError as error:
            raise ModelError(f"{self.path} cannot be written: {error.strerror}") from error
        self._staged = Path(name)
        self._file: IO[bytes] = os.fdopen(descriptor, "wb")
        try:
            self._put(0, memoryview(self._prefix))
        except BaseException:
            self._discard()
            raise
        return self

    def _put(self, at: int, content: memoryview) -> None:
        try:
            self._file.seek(at)
            self._file.write(content)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be written: {error.strerror}") from error

    def write(self, name: str, array: Array) -> None:
        """Pack a weight.

        Args:
            name: One of those announced, each once.
            array: Of its shape and dtype.

        Raises:
            ValueError: It was not announced so, or does not hold its pattern.
            ModelError: The file cannot be written.
        """
        weight = self._weights[name]
        if name not in self._missing:
            raise ValueError(f"{name} was written before")
        if array.shape != weight.shape or array.dtype != weight.dtype:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}, not {weight.dtype} {weight.shape} as announced"
            )
        try:
            parts = pack(array.reshape(weight.layout.shape), weight.pattern.n, weight.pattern.m)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        for tensor, part in zip(weight.names, parts, strict=True):
            content = _little_endian(part).reshape(-1).view(np.uint8)
            self._put(self._start + self._entries[tensor].start, content.data)
        self._missing.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard()
            return
        try:
            if self._missing:
                raise ValueError(f"{self.path}: {', '.join(sorted(self._missing))} announced and not written")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            mask = os.umask(0)
            os.umask(mask)
            self._staged.chmod(0o666 & ~mask)  # as any new file; temporary ones are their owner's alone
            self._staged.replace(self.path)
        except OSError as failure:
            self._discard()
            raise ModelError(f"{self.path} cannot be written: {failure.strerror}") from failure
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        with suppress(OSError):
            self._file.close()
        self._staged.unlink(missing_ok=True)


class PackedReader:
    """Reads a packed file; nothing in it is believed before it is checked against the file's size.

    Use as a context manager.

    Args:
        path: The file.

    Attributes:
        weights: By name.

    Raises:
        ModelError: It cannot be read, is damaged, or is another kind of .safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file: BufferedReader = self.path.open("rb")
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error.strerror}") from error
        try:
            self._entries, self.weights = self._open()
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise ModelError(f"{self.path} cannot be read: {error.strerror}") from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path} is no packed .safetensors file, or is damaged: {what}")

    def _open(self) -> tuple[dict[str, _Entry], dict[str, PackedWeight]]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise self._damaged(f"a header of {length} bytes in a file of {size}")
        self._start = 8 + length
        try:
            content = json.loads(self._file.read(length).decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is no JSON ({type(error).__name__})") from error
        if not isinstance(content, dict):
            raise self._damaged("its header is no JSON object")
        described = content.pop("__metadata__", None)
        if not isinstance(described, dict) or described.pop("format", None) != FORMAT:
            raise self._damaged(f"its metadata does not say {FORMAT!r}")
        entries = {name: self._entry(name, entry) for name, entry in content.items()}
        at = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != at:
                raise self._damaged(f"{name} begins at {entry.start} where the one before ends at {at}")
            at = entry.stop
        if at != size - self._start:
            raise self._damaged(f"its tensors end at {at} of {size - self._start} bytes")
        weights = {}
        for key, text in described.items():
            weight = self._weight(key, text, entries)
            weights[weight.name] = weight
        left = entries.keys() - {name for weight in weights.values() for name in weight.names}
        if left:
            raise self._damaged(f"{min(left)} is described nowhere")
        return entries, weights

    def _entry(self, name: str, entry: Any) -> _Entry:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"{name} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if (
            not _are_sizes(shape)
            or not _are_sizes(offsets)
            or len(offsets) != 2
            or dtype not in DTYPES.values()
        ):
            raise self._damaged(f"the dtype, shape or offsets of {name}")
        if offsets[1] - offsets[0] != prod(shape) * _numpy_dtype(dtype).itemsize:
            raise self._damaged(f"{name} has {offsets[1] - offsets[0]} bytes, which {dtype} {shape} has not")
        return _Entry(dtype, tuple(shape), offsets[0], offsets[1])

    def _weight(self, key: str, text: Any, entries: Mapping[str, _Entry]) -> PackedWeight:
        name = key.removesuffix(".packed")
        values, indices = entries.get(f"{name}.values"), entries.get(f"{name}.indices")
        if name == key or values is None or indices is None or not isinstance(text, str):
            raise self._damaged(f"{key!r} does not describe values and indices")
        try:
            said = json.loads(text, object_pairs_hook=_unique)
            sizes, shape, outputs = said["layout"], said["shape"], said["outputs"]
            if not _are_sizes([*sizes, *shape, *outputs]) or (len(sizes), len(outputs)) != (3, 3):
                raise ValueError("its sizes")
            weight = PackedWeight(
                name,
                _numpy_dtype(values.dtype),
                tuple(shape),
                Layout(*sizes, *outputs),
                NM.parse(said["pattern"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError, OptionError) as error:
            raise self._damaged(f"the description of {name}: {error}") from error
        if values.shape != weight.values or (indices.dtype, indices.shape) != ("U8", (weight.index_bytes,)):
            raise self._damaged(f"values or indices of {name} are not those of {weight.pattern} of {sizes}")
        return weight

    def _read(self, name: str) -> Array:
        entry = self._entries[name]
        array = np.empty(entry.shape, _numpy_dtype(entry.dtype))
        content = array.reshape(-1).view(np.uint8)
        self._file.seek(self._start + entry.start)
        if self._file.readinto(content.data) != content.size:
            raise self._damaged(f"it ends within {name}")
        return _little_endian(array)

    def read(self, name: str) -> Array:
        """A weight in its own shape, zeros included.

        Raises:
            ModelError: The file is damaged, or cannot be read.
            KeyError: There is no such weight.
        """
        weight = self.weights[name]
        try:
            values, indices = (self._read(tensor) for tensor in weight.names)
            array = unpack(values, indices, weight.layout.shape, weight.pattern.n, weight.pattern.m)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error.strerror}") from error
        except (ValueError, OverflowError) as error:
            raise self._damaged(f"{name}: {error}") from error
        return array.reshape(weight.shape)


def _little_endian(array: Array) -> Array:
    """From this machine's order of bytes to the file's, or back."""
    return array if sys.byteorder == "little" else array.byteswap()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises: ValueError: A key comes twice; JSON leaves open which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _are_sizes(numbers: Any) -> bool:
    """Whether it is a list of integers that are not negative (and not bool)."""
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
