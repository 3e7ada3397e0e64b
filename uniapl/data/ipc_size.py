"""How much memory an Arrow IPC file takes when it is decoded, told before anything is decoded.

A compressed buffer begins with the length that it has uncompressed, and Arrow allocates that much: a file of a
few KiB can ask for more memory than there is. pyarrow shows neither these lengths nor where the buffers stand, so
they are read here from the messages' metadata: flatbuffers as in Arrow's format/Message.fbs, which pyarrow has
verified by then.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pyarrow as pa

_START = 8
"""Bytes of the magic number and its padding, before the first message."""
_HEADER, _DICTIONARY_DATA, _BUFFERS, _COMPRESSION = 2, 1, 2, 3
"""Numbers of fields in the tables Message, DictionaryBatch and RecordBatch."""


def largest_block(path: Path) -> int:
    """Bytes of the largest record batch or dictionary of a file once decoded.

    Raises:
        pa.ArrowException, struct.error: the file is damaged.
    """
    with pa.memory_map(str(path)) as source:
        source.seek(_START)
        largest = 0
        for message in pa.ipc.MessageReader.open_stream(source):
            if message.type in ("record batch", "dictionary"):
                largest = max(largest, _decoded_bytes(message))
        return largest


def _decoded_bytes(message: pa.ipc.Message) -> int:
    metadata = memoryview(message.metadata)
    body = memoryview(message.body)
    batch = _child(metadata, _child(metadata, 0), _HEADER)
    if message.type == "dictionary":
        batch = _child(metadata, batch, _DICTIONARY_DATA)
    if not _slot(metadata, batch, _COMPRESSION):
        return len(body)
    buffers = _child(metadata, batch, _BUFFERS)
    (count,) = struct.unpack_from("<I", metadata, buffers)
    total = 0
    for number in range(count):
        offset, length = struct.unpack_from("<qq", metadata, buffers + 4 + 16 * number)
        if length > 0:
            (decoded,) = struct.unpack_from("<q", body, offset)
            total += length if decoded == -1 else decoded  # -1: left as it is
    return total


def _child(metadata: memoryview, table: int, field: int | None = None) -> int:
    """Where the table or vector begins that a field of a table refers to; without field, that `table` refers to."""
    at = table if field is None else table + _slot(metadata, table, field)
    return at + int(struct.unpack_from("<I", metadata, at)[0])


def _slot(metadata: memoryview, table: int, field: int) -> int:
    """Where in a table the field stands; 0: it is left out."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    (size,) = struct.unpack_from("<H", metadata, vtable)
    at = 4 + 2 * field
    return int(struct.unpack_from("<H", metadata, vtable + at)[0]) if at < size else 0
