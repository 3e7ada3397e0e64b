"""Shards on disk as one table with random access: Arrow IPC files, memory-mapped, and Parquet files.

Memory does not grow with the data set: an uncompressed IPC file is read in place by the operating system's
pages; of compressed IPC (decoded once on opening, to check it) and Parquet, the last few decoded blocks (record
batches, row groups) are kept, so a shuffled walk decodes a block for nearly every row: such files are for data
sets of a few blocks. Ids are names for logs: they may repeat, within a shard and between shards.

Nothing in a file is believed: before the first row of an IPC file is read, the structure of every record batch is
checked whole (offsets against buffers), and of a decoded Parquet row group the number of rows. Files must not be
changed while they are open.
"""

from __future__ import annotations

import bisect
import glob
import itertools
import json
import os
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from uniapl.data.errors import DataError
from uniapl.data.ipc_size import largest_block
from uniapl.records import SHARD_SCHEMA

ROLES = ("system", "user", "assistant")
KEPT_BLOCKS = 4
MAX_BLOCK_BYTES = 2 << 30
"""Of one record batch or row group, decoded."""
MAX_CHARACTERS = 1 << 20
"""Of one text in a row: tokenizing more takes seconds."""
MAX_ID_CHARACTERS = 1000
_PARQUET_ROWS = 1024
"""Decoded at a time, so that a row group that grows beyond its limit is noticed."""
_NO_ID_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
DAMAGED = (OSError, pa.ArrowException, ValueError, OverflowError, MemoryError, struct.error)
"""What pyarrow raises for damaged files; ValueError: also names of columns that are not UTF-8."""


@dataclass(frozen=True)
class Row:
    """A sound row of a shard. `where` names its file and its row there, for messages."""

    id: str
    messages: list[dict[str, str]]
    response: str | None
    verifier: str | None
    where: str


class ShardReader:
    """The rows of all shards under one index, in the order of the paths (a glob's matches sorted).

    Args:
        paths_or_globs: of the files.
        schema: whose columns are read; indexing and `has_response` need those of `SHARD_SCHEMA`.

    Raises:
        DataError: on opening, for a missing file, a glob without a match, a torn file, a wrong schema or
            no row at all; on reading, for a row that is not sound, naming file, row and column.
    """

    def __init__(self, paths_or_globs: Iterable[str | Path], schema: pa.Schema = SHARD_SCHEMA) -> None:
        self._columns = schema.names
        self._files = [_open(path, schema) for path in expand(paths_or_globs)]
        sizes = [file.path.stat().st_size for file in self._files]
        self.fingerprint = f"{len(sizes)} of {sum(sizes)} bytes ({xxhash.xxh32_hexdigest(repr(sizes).encode())})"
        """Files, bytes, and a hash of every file's size in order: tells data sets apart without reading them."""
        self._ends = list(itertools.accumulate(file.rows for file in self._files))
        if len(self) == 0:
            raise DataError(f"{', '.join(str(f.path) for f in self._files)}: no rows; allowed: at least one row")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """The row with this index over all shards."""
        return sound_row(*self.values(index))

    def values(self, index: int) -> tuple[dict[str, Any], str]:
        """The values of a row by column, not yet checked, and its file and row for messages."""
        file, row = self._locate(index)
        return file.read(row, self._columns), f"{file.path}: row {row}"

    def has_response(self, index: int) -> bool:
        """Whether the row has an expert response, without reading the rest of it."""
        file, row = self._locate(index)
        return file.read(row, ["response"])["response"] is not None

    def _locate(self, index: int) -> tuple[_IpcFile | _ParquetFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}; allowed: 0 to {len(self) - 1}")
        number = bisect.bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number - 1] if number else 0)


def expand(paths_or_globs: Iterable[str | Path], allowed: str = "existing .arrow or .parquet files") -> list[Path]:
    """The files that are meant, each once, globs in sorted order.

    Args:
        paths_or_globs: of the files.
        allowed: which files may be meant, for the message.

    Raises:
        DataError: a path that is no file, or a glob that matches none.
    """
    found: dict[Path, None] = {}
    for entry in map(str, paths_or_globs):
        pattern = glob.has_magic(entry) and not os.path.isfile(entry)
        matches = sorted(_glob(entry)) if pattern else [entry]
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            kind = "no file matches" if pattern else "no such file"
            raise DataError(f"{entry}: {kind}; allowed: {allowed}")
        found.update(dict.fromkeys(files))
    if not found:
        raise DataError("no shards are named; allowed: at least one path or glob")
    return list(found)


def _glob(pattern: str) -> list[str]:
    """The matches of a glob; `**` does not follow links to folders, which may lead back to where they stand."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return glob.glob(pattern)
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:first])
    found = (path.relative_to(root) for path in root.glob(str(Path(*parts[first:]))))
    return [str(root / path) for path in found if not any(part.startswith(".") for part in path.parts)]


class _Blocks:
    """The last few decoded blocks of a file; `load` decodes one by its number."""

    def __init__(self, path: Path, name: str, load: Callable[[int], Any], ends: list[int]) -> None:
        self._path, self._name, self._load, self._ends = path, name, load, ends
        self._blocks: OrderedDict[int, Any] = OrderedDict()

    def read(self, row: int, columns: list[str]) -> dict[str, Any]:
        """The values of a row, numbered over the whole file."""
        number = bisect.bisect_right(self._ends, row)
        first = self._ends[number - 1] if number else 0
        try:
            block = self._get(number, self._ends[number] - first)
        except DAMAGED as error:
            raise DataError(
                f"{self._path}: row {row}: {self._name} {number} is damaged: {error}; allowed: a whole file", "damaged"
            ) from None
        return _values(self._path, row, columns, block, row - first)

    def _get(self, number: int, rows: int) -> Any:
        if number not in self._blocks:
            block = self._load(number)
            if block.num_rows != rows:
                raise ValueError(f"{block.num_rows} rows where the file says {rows}")
            if len(self._blocks) >= KEPT_BLOCKS:
                self._blocks.popitem(last=False)
            self._blocks[number] = block
        self._blocks.move_to_end(number)
        return self._blocks[number]


class _IpcFile:
    """One Arrow IPC file, of which only the columns of `wanted` are decoded."""

    def __init__(self, path: Path, wanted: pa.Schema) -> None:
        self.path = path
        source = pa.memory_map(str(path))
        schema = pa.ipc.open_file(source).schema
        _check_schema(path, schema, wanted)
        _check_size(path, "record batch", largest_block(path))
        columns = [schema.get_field_index(name) for name in wanted.names]
        reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=columns))
        rows = []
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            check_structure(batch)
            rows.append(batch.num_rows)
        ends = list(itertools.accumulate(rows))
        self.rows = ends[-1] if ends else 0
        self.read = _Blocks(path, "record batch", reader.get_batch, ends).read


class _ParquetFile:
    """One Parquet file, read by row groups."""

    def __init__(self, path: Path, wanted: pa.Schema) -> None:
        self.path, self._columns = path, wanted.names
        self._file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        _check_schema(path, self._file.schema_arrow, wanted)
        groups = [self._file.metadata.row_group(g) for g in range(self._file.metadata.num_row_groups)]
        if any(group.num_rows < 0 for group in groups):
            raise ValueError("a row group says that it has fewer than 0 rows")
        _check_size(path, "row group", max((group.total_byte_size for group in groups), default=0))
        ends = list(itertools.accumulate(group.num_rows for group in groups))
        self.rows = ends[-1] if ends else 0
        self.read = _Blocks(path, "row group", self._load, ends).read

    def _load(self, number: int) -> pa.Table:
        size, batches = 0, []
        for batch in self._file.iter_batches(_PARQUET_ROWS, row_groups=[number], columns=self._columns):
            size += batch.nbytes
            if size > MAX_BLOCK_BYTES:
                raise ValueError(f"more than {MAX_BLOCK_BYTES} bytes")
            batches.append(batch)
        return pa.Table.from_batches(batches)


def _open(path: Path, wanted: pa.Schema) -> _IpcFile | _ParquetFile:
    try:
        with path.open("rb") as file:
            magic = file.read(6)
        if magic[:4] == b"PAR1":
            return _ParquetFile(path, wanted)
        if magic == b"ARROW1":
            return _IpcFile(path, wanted)
    except DataError:
        raise
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read, truncated or damaged: {error}; allowed: a whole file") from None
    raise DataError(f"{path}: neither Arrow IPC nor Parquet; allowed: a file in one of these formats")


def _check_size(path: Path, block: str, size: int) -> None:
    if size > MAX_BLOCK_BYTES:
        raise DataError(
            f"{path}: a {block} of {size} bytes when decoded; allowed: <= {MAX_BLOCK_BYTES}, in smaller ones if need be"
        )


def check_structure(batch: pa.RecordBatch) -> None:
    """Check every offset against its buffer, but not yet whether texts are UTF-8: that is one row's fault.

    Raises:
        pa.ArrowException: one points elsewhere.
    """
    batch.validate()
    for column in batch.columns:
        column.cast(_as_bytes(column.type)).validate(full=True)  # takes the buffers as they are


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The same type with bytes in the place of text."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    return pa.binary() if pa.types.is_string(kind) else kind


def _values(path: Path, row: int, columns: list[str], block: Any, offset: int) -> dict[str, Any]:
    values = {}
    for name in columns:
        try:
            values[name] = block.column(name)[offset].as_py()
        except (UnicodeDecodeError, pa.ArrowException) as error:
            raise DataError(f"{path}: row {row}: column {name}: {error}; allowed: UTF-8 text", "not UTF-8") from None
    return values


def _check_schema(path: Path, schema: pa.Schema, wanted: pa.Schema) -> None:
    for field in wanted:
        if field.name not in schema.names:
            raise DataError(f"{path}: column {field.name}: missing; allowed: the columns {', '.join(wanted.names)}")
        if schema.names.count(field.name) > 1:
            raise DataError(f"{path}: column {field.name}: stands twice; allowed: once")
        found = schema.field(field.name).type
        if not _same_type(found, field.type):
            raise DataError(f"{path}: column {field.name}: type {found}; allowed: {field.type}")


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Equal up to 64-bit offsets, nullability and the name of a list's items, which writers choose freely."""
    if pa.types.is_list(wanted):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and _same_type(found.value_type, wanted.value_type)
    if pa.types.is_struct(wanted):
        names = [field.name for field in wanted]
        return (
            pa.types.is_struct(found)
            and sorted(field.name for field in found) == sorted(names)
            and all(_same_type(found.field(name).type, wanted.field(name).type) for name in names)
        )
    return found.equals(wanted) or (pa.types.is_string(wanted) and pa.types.is_large_string(found))


def sound_row(values: dict[str, Any], where: str, response: str = "response") -> Row:
    """The row of these values.

    Args:
        values: by column of `SHARD_SCHEMA`.
        where: file and row.
        response: what the file calls the response.

    Raises:
        DataError: for the first column that is not sound; the message begins with `where`.
    """
    _check_id(values["id"], where)
    _check_messages(values["messages"], where)
    for column, name in (("response", response), ("verifier", "verifier")):
        _check_length(values[column], f"{where}: column {name}")
    _check_response(values["response"], f"{where}: column {response}")
    _check_verifier(values["verifier"], where)
    return Row(values["id"], values["messages"], values["response"], values["verifier"], where)


def _null_or_empty(value: Any) -> str:
    return "null" if value is None else "empty"


def _check_id(name: str | None, where: str) -> None:
    where = f"{where}: column id"
    if not name:
        raise DataError(f"{where}: {_null_or_empty(name)}; allowed: text", "bad id")
    if len(name) > MAX_ID_CHARACTERS:
        raise DataError(f"{where}: {len(name)} characters; allowed: <= {MAX_ID_CHARACTERS}", "bad id")
    if _NO_ID_CHARACTER.search(name):
        raise DataError(f"{where}: got {name!a:.80}; allowed: text without control characters", "bad id")


def _check_length(text: str | None, where: str) -> None:
    if text is not None and len(text) > MAX_CHARACTERS:
        raise DataError(f"{where}: {len(text)} characters; allowed: <= {MAX_CHARACTERS}", "text too long")


def _check_messages(messages: list[dict[str, str]] | None, where: str) -> None:
    where = f"{where}: column messages"
    if not messages:
        raise DataError(f"{where}: {_null_or_empty(messages)}; allowed: at least one message", "no messages")
    for number, message in enumerate(messages):
        if message is None or message["role"] not in ROLES:
            role = None if message is None else message["role"]
            raise DataError(f"{where}: message {number}: role {role!r:.80}; allowed: {', '.join(ROLES)}", "bad role")
        if not message["content"] or not message["content"].strip():
            problem = _null_or_empty(message["content"])
            raise DataError(f"{where}: message {number}: content {problem}; allowed: text", "empty message")
        _check_length(message["content"], f"{where}: message {number}: content")
    if messages[-1]["role"] != "user":
        role = messages[-1]["role"]
        raise DataError(f"{where}: the last role is {role!r}; allowed: user, whom the response answers", "bad role")


def _check_response(response: str | None, where: str) -> None:
    if response is not None and not response.strip():
        raise DataError(f"{where}: empty; allowed: text, or null for none", "empty response")


def _check_verifier(verifier: str | None, where: str) -> None:
    if verifier is None:
        return
    try:
        parsed = json.loads(verifier)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: column verifier: not JSON ({error}); allowed: a JSON object", "bad verifier"
        ) from None
    if not isinstance(parsed, dict):
        raise DataError(
            f"{where}: column verifier: a JSON {type(parsed).__name__}; allowed: a JSON object", "bad verifier"
        )
