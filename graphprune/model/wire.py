"""The few facts of the protobuf wire format that keep weights out of memory.

A model file is a ``ModelProto`` whose bulk is ``graph.initializer[i].raw_data``. :func:`lift` walks the bytes of a
(memory-mapped) file and cuts these payloads out, so that protobuf parses a skeleton of some kilobytes while the weights
stay on disk as views; :func:`write_model` streams them back in. Format: https://protobuf.dev/programming-guides/encoding/;
field numbers: onnx.proto.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import onnx

Buffer = bytes | mmap.mmap
#: Number, wire type, start of the tag, start and end of the payload.
Field = tuple[int, int, int, int, int]

#: Field numbers in onnx.proto.
MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW_DATA = 7, 5, 9
#: Protobuf and ONNX Runtime refuse larger messages.
MAXIMUM_MESSAGE = 2**31 - 1
#: Payloads below this stay in the skeleton: cutting them out saves nothing.
LIFT_BYTES = 4096


#: Larger tensors are written without a copy in memory.
STREAM_BYTES = 2**20
#: Bytes handed to the system at a time: with megabytes at once the page cache of some kernels takes ten times as long.
WRITE_BYTES = 2**18


class Payload(Protocol):
    """A tensor as far as writing it goes: onnx_ir's tensors; some yield ``chunks()``."""

    @property
    def nbytes(self) -> int: ...

    def tobytes(self) -> bytes: ...


class WireError(ValueError):
    """The bytes are not a protobuf message; ``truncated`` if they only end too early."""

    def __init__(self, message: str, truncated: bool = False) -> None:
        super().__init__(message)
        self.truncated = truncated


def read_varint(buffer: Buffer, position: int, end: int) -> tuple[int, int]:
    """The variable-length integer at ``position`` and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise WireError(f"the data ends inside a number at byte {position}", truncated=True)
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise WireError(f"a number at byte {position} is longer than 10 bytes")


def varint(value: int) -> bytes:
    """``value`` (not negative) in the variable-length encoding."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def fields(buffer: Buffer, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in ``buffer[start:end]``, nested messages not entered.

    Yields
    ------
    number, wire_type, tag, start, end : int
        What the field is, and where its tag and its payload lie.

    Raises
    ------
    WireError
        On a malformed tag, a group (ONNX has none) or a field that reaches beyond ``end``.
    """
    position = start
    while position < end:
        tag = position
        key = buffer[position]
        if key < 0x80:  # nearly always: worth not calling anything
            position += 1
        else:
            key, position = read_varint(buffer, position, end)
        number, wire_type = key >> 3, key & 7
        if wire_type == 2:
            length, position = read_varint(buffer, position, end)
            payload_end = position + length
        elif wire_type == 0:
            _, payload_end = read_varint(buffer, position, end)
        elif wire_type == 1:
            payload_end = position + 8
        elif wire_type == 5:
            payload_end = position + 4
        else:
            number = 0
            payload_end = position
        if number == 0:
            raise WireError(f"byte {tag} does not start a protobuf field")
        if payload_end > end:
            raise WireError(
                f"field {number} at byte {tag} needs {payload_end - position} bytes and {end - position} are left",
                truncated=True,
            )
        yield number, wire_type, tag, position, payload_end
        position = payload_end


class Lifted(NamedTuple):
    """A payload that :func:`lift` cut out: ``graph.initializer[ordinal].raw_data`` is ``buffer[start:end]``."""

    ordinal: int
    start: int
    end: int


def lift(buffer: Buffer, threshold: int = LIFT_BYTES) -> tuple[bytes, list[Lifted]]:
    """Cut the raw data of large initializers of the main graph out of a serialized model.

    Parameters
    ----------
    buffer : bytes or mmap.mmap
        A serialized ``onnx.ModelProto``.
    threshold : int
        Raw data of fewer bytes is left where it is.

    Returns
    -------
    skeleton : bytes
        The same model; the initializers that were cut have no ``raw_data`` field.
    lifted : list of Lifted
        Where the payloads lie in ``buffer``.

    Raises
    ------
    WireError
        If the bytes are no protobuf message down to the initializers' fields.
    """
    lifted: list[Lifted] = []
    skeleton: list[bytes] = []
    ordinal = 0  # runs on over repeated graph fields: a parser merges them
    for number, wire_type, tag, start, end in fields(buffer, 0, len(buffer)):
        if number != MODEL_GRAPH or wire_type != 2:
            skeleton.append(buffer[tag:end])
            continue
        graph: list[bytes] = []
        kept = start  # what lies from here on is copied as it is
        for part, part_type, part_tag, part_start, part_end in fields(buffer, start, end):
            if part != GRAPH_INITIALIZER or part_type != 2:
                continue
            if part_end - part_start >= threshold:
                members = list(fields(buffer, part_start, part_end))
                raw = [member for member in members if member[:2] == (TENSOR_RAW_DATA, 2)]
                if len(raw) == 1 and raw[0][4] - raw[0][3] >= threshold:
                    _, _, raw_tag, raw_start, raw_end = raw[0]
                    lifted.append(Lifted(ordinal, raw_start, raw_end))
                    tensor = buffer[part_start:raw_tag] + buffer[raw_end:part_end]
                    graph += [buffer[kept:part_tag], _prefix(GRAPH_INITIALIZER, len(tensor)), tensor]
                    kept = part_end
            ordinal += 1
        graph.append(buffer[kept:end])
        body = b"".join(graph)
        skeleton += [_prefix(MODEL_GRAPH, len(body)), body]
    return b"".join(skeleton), lifted


def _prefix(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    return varint(number << 3 | 2) + varint(length)


def write_model(proto: onnx.ModelProto, payloads: Sequence[Payload | None], file: IO[bytes]) -> None:
    """Write ``proto`` to ``file`` with the raw data of its main graph's initializers streamed in.

    Parameters
    ----------
    proto : onnx.ModelProto
        Consumed: its graph's initializers are taken out.
    payloads : sequence of Payload or None
        One for each initializer: the tensor that its raw data comes from, or None where it is complete as it is.
    file : binary file
        Open for writing.

    Raises
    ------
    WireError
        If the message would exceed 2 GB, before anything is written, or a payload has not the size that was announced.
    """
    graph = proto.graph
    heads = [tensor.SerializeToString() for tensor in graph.initializer]
    bodies = [
        len(head)
        + (len(_prefix(TENSOR_RAW_DATA, tensor.nbytes)) + tensor.nbytes if tensor is not None else 0)
        for head, tensor in zip(heads, payloads, strict=True)
    ]
    del graph.initializer[:]
    rest = graph.SerializeToString()
    proto.ClearField("graph")
    model = proto.SerializeToString()
    length = len(rest) + sum(len(_prefix(GRAPH_INITIALIZER, body)) + body for body in bodies)
    prefix = _prefix(MODEL_GRAPH, length)
    if len(model) + len(prefix) + length > MAXIMUM_MESSAGE:
        raise WireError(f"the model takes {length / 1e9:.2f} GB, and one ONNX file cannot exceed 2 GB")
    file.write(model + prefix + rest)
    for head, body, tensor in zip(heads, bodies, payloads, strict=True):
        file.write(_prefix(GRAPH_INITIALIZER, body) + head)
        if tensor is not None:
            file.write(_prefix(TENSOR_RAW_DATA, tensor.nbytes))
            write_tensor(file, tensor)


def write_tensor(file: IO[bytes], tensor: Payload) -> None:
    """Write a tensor's bytes; WireError if they are not as many as it says."""
    written = 0
    for chunk in _chunks_of(tensor):
        for start in range(0, len(chunk), WRITE_BYTES):
            written += file.write(chunk[start : start + WRITE_BYTES])
    if written != tensor.nbytes:
        raise WireError(f"{tensor.nbytes} bytes of weights were announced and {written} written")


def _chunks_of(tensor: Payload) -> Iterator[bytes | memoryview]:
    """A tensor's bytes, without a copy of the whole where the tensor is large and can do without one."""
    chunks = getattr(tensor, "chunks", None)
    if chunks is not None:
        yield from chunks()
        return
    contents = getattr(tensor, "numpy", None)
    if tensor.nbytes >= STREAM_BYTES and contents is not None and sys.byteorder == "little":
        array = contents()
        if array.nbytes == tensor.nbytes and array.flags.c_contiguous:  # not packed, several elements a byte
            yield memoryview(array.reshape(-1).view("u1"))
            return
    yield tensor.tobytes()
