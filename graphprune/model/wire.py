"""The few facts of the protobuf wire format that keep weights out of memory.

A model file is a ``ModelProto`` whose bulk is ``graph.initializer[i].raw_data``. :func:`lift` walks the bytes of a
(memory-mapped) file and cuts these payloads out, so that protobuf parses a skeleton of some kilobytes while the weights
stay on disk as views; :func:`write_model` streams them back in. Format: https://protobuf.dev/programming-guides/encoding/;
field numbers: onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import onnx

Buffer = bytes | mmap.mmap
#: Size of a tensor's data in bytes, and a function that writes exactly so many to a file.
Payload = tuple[int, Callable[[IO[bytes]], object]]

#: Field numbers in onnx.proto.
MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW_DATA = 7, 5, 9
#: Protobuf and ONNX Runtime refuse larger messages.
MAXIMUM_MESSAGE = 2**31 - 1
#: Payloads below this stay in the skeleton: cutting them out saves nothing.
LIFT_BYTES = 4096


class WireError(ValueError):
    """The bytes are not a protobuf message; ``truncated`` if they only end too early."""

    def __init__(self, message: str, truncated: bool = False) -> None:
        super().__init__(message)
        self.truncated = truncated


class Field(NamedTuple):
    """One field of a message: its number, wire type, and where its tag and payload lie in the buffer."""

    number: int
    wire_type: int
    tag: int
    start: int
    end: int


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

    Raises
    ------
    WireError
        On a malformed tag, a group (ONNX has none) or a field that reaches beyond ``end``.
    """
    position = start
    while position < end:
        tag = position
        key, position = read_varint(buffer, position, end)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            _, payload_end = read_varint(buffer, position, end)
        elif wire_type == 1:
            payload_end = position + 8
        elif wire_type == 2:
            length, position = read_varint(buffer, position, end)
            payload_end = position + length
        elif wire_type == 5:
            payload_end = position + 4
        else:
            raise WireError(f"byte {tag} does not start a protobuf field")
        if number == 0:
            raise WireError(f"byte {tag} does not start a protobuf field")
        if payload_end > end:
            raise WireError(
                f"field {number} at byte {tag} needs {payload_end - position} bytes and {end - position} are left",
                truncated=True,
            )
        yield Field(number, wire_type, tag, position, payload_end)
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
    index = 0  # runs on over repeated graph fields: a parser merges them
    for field in fields(buffer, 0, len(buffer)):
        if field.number != MODEL_GRAPH or field.wire_type != 2:
            skeleton.append(buffer[field.tag : field.end])
            continue
        graph: list[bytes] = []
        for part in fields(buffer, field.start, field.end):
            if part.number != GRAPH_INITIALIZER or part.wire_type != 2:
                graph.append(buffer[part.tag : part.end])
                continue
            members = list(fields(buffer, part.start, part.end))
            raw = [m for m in members if m.number == TENSOR_RAW_DATA and m.wire_type == 2]
            if len(raw) == 1 and raw[0].end - raw[0].start >= threshold:
                lifted.append(Lifted(index, raw[0].start, raw[0].end))
                tensor = b"".join(buffer[m.tag : m.end] for m in members if m is not raw[0])
                graph.append(_prefix(GRAPH_INITIALIZER, len(tensor)) + tensor)
            else:
                graph.append(buffer[part.tag : part.end])
            index += 1
        body = b"".join(graph)
        skeleton.append(_prefix(MODEL_GRAPH, len(body)) + body)
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
    payloads : sequence
        One for each initializer: its size in bytes and a function that writes exactly so many bytes to a file, or None
        where the initializer is complete as it is.
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
        len(head) + (len(_prefix(TENSOR_RAW_DATA, payload[0])) + payload[0] if payload else 0)
        for head, payload in zip(heads, payloads, strict=True)
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
    for head, body, payload in zip(heads, bodies, payloads, strict=True):
        file.write(_prefix(GRAPH_INITIALIZER, body) + head)
        if payload is not None:
            nbytes, write = payload
            file.write(_prefix(TENSOR_RAW_DATA, nbytes))
            write_exactly(file, nbytes, write)


def write_exactly(file: IO[bytes], nbytes: int, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` put ``nbytes`` bytes into ``file``; WireError if it wrote another number."""
    # numpy writes to the file descriptor behind Python's buffer: flush so that both agree about the position
    file.flush()
    before = file.tell()
    write(file)
    file.flush()
    written = file.tell() - before
    if written != nbytes:
        raise WireError(f"{nbytes} bytes of weights were announced and {written} written")
