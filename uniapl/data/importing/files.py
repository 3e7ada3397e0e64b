"""Files as sources of rows: JSON, JSON Lines, CSV, Parquet and Arrow."""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from uniapl.data.errors import DataError
from uniapl.data.importing.json_text import MAX_ROW_BYTES, json_rows, opened
from uniapl.data.importing.records import Record
from uniapl.data.reader import check_structure

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
"""Of files; the first four also with .gz behind."""
LOOKED_AT = 100
"""Rows of a JSON file whose columns together tell its format: not every row has all of them."""
_BATCH = 256
"""Rows of a Parquet file that are decoded at a time."""
_HASHED = 1 << 20
"""Bytes of a file that are read at a time for its SHA-256."""
_DAMAGED = (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error)


class FileSource:
    """Rows of one file, read one at a time.

    Raises:
        DataError: the ending is none of `ENDINGS`; the file is damaged, or holds no row.
    """

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        plain = path.with_suffix("") if path.suffix == ".gz" else path
        self._ending = plain.suffix.lower()
        if self._ending not in ENDINGS or (path.suffix == ".gz" and self._ending in (".parquet", ".arrow")):
            raise DataError(f"{path}: unknown kind of file; allowed: names that end in {', '.join(ENDINGS)}")
        self.size: int | None = os.path.getsize(path)
        self.columns = self._columns()

    def identity(self, told: Callable[[int], None]) -> dict[str, Any]:
        """Name, bytes and SHA-256; `told` is called with the bytes that were read so far."""
        digest, read = hashlib.sha256(), 0
        with self._path.open("rb") as file:
            while part := file.read(_HASHED):
                digest.update(part)
                read += len(part)
                told(read)
        return {"name": self.name, "bytes": os.path.getsize(self._path), "sha256": digest.hexdigest()}

    def rows(self, start: int, columns: list[str]) -> Iterator[Record]:
        """The rows from number `start` on."""
        try:
            if self._ending == ".csv":
                yield from _csv_rows(self._path, start)
            elif self._ending == ".parquet":
                yield from _parquet_rows(self._path, start, columns)
            elif self._ending == ".arrow":
                yield from _arrow_rows(self._path, start, columns)
            else:
                yield from json_rows(self._path, start)
        except _DAMAGED as error:
            raise DataError(
                f"{self.name}: cannot be read, truncated or damaged: {error}; allowed: a whole file"
            ) from None

    def _columns(self) -> list[str]:
        try:
            if self._ending == ".parquet":
                return list(pq.read_schema(self._path).names)
            if self._ending == ".arrow":
                with pa.memory_map(str(self._path)) as file:
                    return list(pa.ipc.open_file(file).schema.names)
        except _DAMAGED as error:
            raise DataError(
                f"{self.name}: cannot be read, truncated or damaged: {error}; allowed: a whole file"
            ) from None
        records = list(itertools.islice(self.rows(0, []), LOOKED_AT))
        if not records:
            raise DataError(f"{self.name}: no rows; allowed: at least one row")
        found = [record.values for record in records if isinstance(record.values, dict)]
        if not found:
            raise DataError(f"{records[0].where}: {records[0].values}")
        return list(dict.fromkeys(name for values in found for name in values))


def _csv_rows(path: Path, start: int) -> Iterator[Record]:
    """The first line names the columns; text that is not UTF-8 is the fault of its row alone."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with opened(path) as (text, raw):
        lines = (line.decode("utf-8", "surrogateescape") for line in _csv_lines(path, text))
        reader = csv.reader(lines, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise DataError(f"{path}: line 1: got {names!r:.200}; allowed: different names of columns")
        for row, values in enumerate(filter(None, reader)):
            if row >= start:
                where = f"{path}: row {row} (line {reader.line_num})"
                yield Record(row, where, _csv_values(names, values), raw.tell())


def _csv_lines(path: Path, text: Any) -> Iterator[bytes]:
    number = 0
    while line := text.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(f"{path}: line {number}: more than {MAX_ROW_BYTES} bytes; allowed: shorter lines")
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _csv_values(names: list[str], values: list[str]) -> dict[str, Any] | DataError:
    if len(values) != len(names):
        return DataError(f"{len(values)} fields; allowed: {len(names)}, as in the first line", "number of fields")
    for name, value in zip(names, values, strict=True):
        if any("\ud800" <= char <= "\udfff" for char in value):
            return DataError(f"column {name}: not UTF-8; allowed: UTF-8 text", "not UTF-8")
    return dict(zip(names, values, strict=True))


def _parquet_rows(path: Path, start: int, columns: list[str]) -> Iterator[Record]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        total, size = file.metadata.num_rows, os.path.getsize(path)
        wanted = [name for name in file.schema_arrow.names if name in columns]
        row = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= start:
                row += rows
                continue
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=wanted, use_threads=False):
                yield from _batch_rows(path, batch, row, start, size, total)
                row += batch.num_rows


def _arrow_rows(path: Path, start: int, columns: list[str]) -> Iterator[Record]:
    with pa.memory_map(str(path)) as source:
        schema = pa.ipc.open_file(source).schema
        fields = [i for i, name in enumerate(schema.names) if name in columns]
        file = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields))
        batches = (file.get_batch(i) for i in range(file.num_record_batches))
        row, size = 0, os.path.getsize(path)
        total = sum(file.get_batch(i).num_rows for i in range(file.num_record_batches))
        for batch in batches:
            check_structure(batch)
            yield from _batch_rows(path, batch, row, start, size, total)
            row += batch.num_rows


def _batch_rows(path: Path, batch: pa.RecordBatch, first: int, start: int, size: int, total: int) -> Iterator[Record]:
    for offset in range(max(0, start - first), batch.num_rows):
        row = first + offset
        yield Record(row, f"{path}: row {row}", _batch_values(batch, offset), size * (row + 1) // total)


def _batch_values(batch: pa.RecordBatch, offset: int) -> dict[str, Any] | DataError:
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[offset].as_py()
        except UnicodeDecodeError as error:
            return DataError(f"column {name}: {error}; allowed: UTF-8 text", "not UTF-8")
    return values
