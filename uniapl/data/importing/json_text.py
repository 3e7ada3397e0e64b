"""Rows of JSON files, read as they come: one object a line, or one array of objects."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from uniapl.data.errors import DataError
from uniapl.data.importing.records import Record
from uniapl.data.importing.values import why_not_json

MAX_ROW_BYTES = 64 << 20
"""Of one row's JSON text: no more of a file is held at a time."""
_CHUNK = 1 << 16
_SPACE = b" \t\r\n"
_OUTSIDE = re.compile(rb"[\[\]{},\"]")
_INSIDE = re.compile(rb"[\\\"]")


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, IO[bytes]]]:
    """The file's bytes, unpacked where it ends in .gz, and the file itself, whose position tells how far it is read."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            with gzip.open(raw) as unpacked:
                yield unpacked, raw
        else:
            yield raw, raw


def json_rows(path: Path, start: int) -> Iterator[Record]:
    """The rows of a JSON or JSON Lines file from number `start` on.

    Raises:
        DataError: text between the rows that is not JSON; a row in itself is the caller's to judge.
    """
    with opened(path) as (text, raw):
        first = _skip_space(text)
        if first == b"[":
            yield from _array(path, text, raw, start)
        else:
            text.seek(0)
            yield from _lines(path, text, raw, start)


def _skip_space(text: IO[bytes]) -> bytes:
    while (char := text.read(1)) and char in _SPACE:
        pass
    return char


def _lines(path: Path, text: IO[bytes], raw: IO[bytes], start: int) -> Iterator[Record]:
    row = -1
    number = 0
    while line := text.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(f"{path}: line {number}: more than {MAX_ROW_BYTES} bytes; allowed: one row a line")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            row += 1
            if row >= start:
                yield Record(row, f"{path}: row {row} (line {number})", _parsed(line.rstrip()), raw.tell())


def _parsed(text: bytes) -> dict[str, Any] | DataError:
    """The row's columns, or what is wrong with it."""
    try:
        found = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"{error}; allowed: UTF-8 text", "not UTF-8")
    except (ValueError, RecursionError) as error:
        return DataError(f"not JSON ({why_not_json(error)}); allowed: a JSON object", "not JSON")
    if not isinstance(found, dict):
        return DataError(f"a JSON {type(found).__name__}; allowed: a JSON object", "not an object")
    return found


def _array(path: Path, text: IO[bytes], raw: IO[bytes], start: int) -> Iterator[Record]:
    for row, element in enumerate(_elements(path, text)):
        if row >= start:
            yield Record(row, f"{path}: row {row}", _parsed(element), raw.tell())


def _elements(path: Path, text: IO[bytes]) -> Iterator[bytes]:
    """The texts of an array's elements, found by counting brackets outside strings; `text` stands behind its `[`."""
    element, rows, depth = bytearray(), 0, 0
    for token, before in _tokens(text):
        element += before
        depth += (token in b"[{") - (token in b"]}") if token else 0
        if len(element) > MAX_ROW_BYTES:
            raise DataError(f"{path}: row {rows}: more than {MAX_ROW_BYTES} bytes; allowed: an array of smaller rows")
        if depth == -1 or (depth == 0 and token == b","):
            if rows or depth == 0 or element.strip():
                yield bytes(element)
            if depth == -1:
                break
            rows += 1
            element.clear()
        else:
            element += token
    else:
        raise DataError(f"{path}: the array does not end after row {rows}; allowed: a whole file")


def _tokens(text: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Brackets and commas outside strings, each with the text since the last one; an empty one at a chunk's end."""
    quoted = escaped = False
    while chunk := text.read(_CHUNK):
        begin, at = 0, int(escaped)
        escaped = False
        while found := (_INSIDE if quoted else _OUTSIDE).search(chunk, at):
            at = found.end()
            if found.group() == b'"':
                quoted = not quoted
            elif quoted:  # a backslash: the byte behind it means nothing
                escaped = at == len(chunk)
                at += 1
            else:
                yield found.group(), chunk[begin : found.start()]
                begin = at
        yield b"", chunk[begin:]
