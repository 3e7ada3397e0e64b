"""Shards on disk as one table with random access: Arrow IPC files, memory-mapped, and Parquet files.

Memory does not grow with the data set: an uncompressed IPC file is read in place by the operating system's
pages; of compressed IPC (decoded once on opening, to check it) and Parquet, the last few decoded blocks (record
batches, row groups) are kept, so a shuffled walk decodes a block for nearly every row: such files are for data
sets of a few blocks. Ids are names for logs: they may repeat, within a shard and between shards.
"""

from __future__ import annotations

import bisect
import glob
import itertools
import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from uniapl.data.errors import DataError
from uniapl.records import SHARD_SCHEMA

ROLES = ("system", "user", "assistant")
KEPT_BLOCKS = 4


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

    Raises:
        DataError: on opening, for a missing file, a glob without a match, a torn file, a wrong schema or
            no row at all; on reading, for a row that is not sound, naming file, row and column.
    """

    def __init__(self, paths_or_globs: Iterable[str | Path]) -> None:
        self._files = [_open(path) for path in expand(paths_or_globs)]
        self._ends = list(itertools.accumulate(file.rows for file in self._files))
        if len(self) == 0:
            raise DataError(f"{', '.join(str(f.path) for f in self._files)}: no rows; allowed: at least one row")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """The row with this index over all shards."""
        file, row = self._locate(index)
        return _sound_row(file.read(row, SHARD_SCHEMA.names), f"{file.path}: row {row}")

    def has_response(self, index: int) -> bool:
        """Whether the row has an expert response, without reading the rest of it."""
        file, row = self._locate(index)
        return file.read(row, ["response"])["response"] is not None

    def _locate(self, index: int) -> tuple[_IpcFile | _ParquetFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}; allowed: 0 to {len(self) - 1}")
        number = bisect.bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number - 1] if number else 0)


def expand(paths_or_globs: Iterable[str | Path]) -> list[Path]:
    """The files that are meant, each once, globs in sorted order.

    Raises:
        DataError: a path that is no file, or a glob that matches none.
    """
    found: dict[Path, None] = {}
    for entry in map(str, paths_or_globs):
        matches = sorted(glob.glob(entry, recursive=True)) if glob.has_magic(entry) else [entry]
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            kind = "no file matches" if glob.has_magic(entry) else "no such file"
            raise DataError(f"{entry}: {kind}; allowed: existing .arrow or .parquet files")
        found.update(dict.fromkeys(files))
    if not found:
        raise DataError("no shards are named; allowed: at least one path or glob")
    return list(found)


class _Blocks:
    """The last few decoded blocks of a file."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, Any] = OrderedDict()

    def get(self, number: int, load: Any) -> Any:
        if number not in self._blocks:
            if len(self._blocks) >= KEPT_BLOCKS:
                self._blocks.popitem(last=False)
            self._blocks[number] = load(number)
        self._blocks.move_to_end(number)
        return self._blocks[number]


class _IpcFile:
    """One Arrow IPC file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        _check_schema(path, self._reader.schema)
        self._ends: list[int] = []
        for number in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(number)
            batch.validate()
            self._ends.append((self._ends[-1] if self._ends else 0) + batch.num_rows)
        self.rows = self._ends[-1] if self._ends else 0
        self._blocks = _Blocks()

    def read(self, row: int, columns: list[str]) -> dict[str, Any]:
        number = bisect.bisect_right(self._ends, row)
        batch = self._blocks.get(number, self._reader.get_batch)
        offset = row - (self._ends[number - 1] if number else 0)
        return _values(self.path, row, columns, batch, offset)


class _ParquetFile:
    """One Parquet file, read by row groups."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = pq.ParquetFile(path, memory_map=True)
        _check_schema(path, self._file.schema_arrow)
        groups = range(self._file.metadata.num_row_groups)
        self._ends = list(itertools.accumulate(self._file.metadata.row_group(g).num_rows for g in groups))
        self.rows = self._ends[-1] if self._ends else 0
        self._blocks = _Blocks()

    def read(self, row: int, columns: list[str]) -> dict[str, Any]:
        number = bisect.bisect_right(self._ends, row)
        try:
            group = self._blocks.get(number, lambda n: self._file.read_row_group(n, columns=SHARD_SCHEMA.names))
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self.path}: row {row}: row group {number} is damaged: {error}; allowed: a whole file", "damaged"
            ) from None
        return _values(self.path, row, columns, group, row - (self._ends[number - 1] if number else 0))


def _open(path: Path) -> _IpcFile | _ParquetFile:
    try:
        with path.open("rb") as file:
            magic = file.read(6)
        if magic[:4] == b"PAR1":
            return _ParquetFile(path)
        if magic == b"ARROW1":
            return _IpcFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read, truncated or damaged: {error}; allowed: a whole file") from None
    raise DataError(f"{path}: neither Arrow IPC nor Parquet; allowed: a file in one of these formats")


def _values(path: Path, row: int, columns: list[str], block: Any, offset: int) -> dict[str, Any]:
    values = {}
    for name in columns:
        try:
            values[name] = block.column(name)[offset].as_py()
        except (UnicodeDecodeError, pa.ArrowException) as error:
            raise DataError(f"{path}: row {row}: column {name}: {error}; allowed: UTF-8 text", "not UTF-8") from None
    return values


def _check_schema(path: Path, schema: pa.Schema) -> None:
    for field in SHARD_SCHEMA:
        if field.name not in schema.names:
            raise DataError(
                f"{path}: column {field.name}: missing; allowed: the columns {', '.join(SHARD_SCHEMA.names)}"
            )
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


def _sound_row(values: dict[str, Any], where: str) -> Row:
    """The row, or a DataError for the first column that is not sound."""
    if not values["id"]:
        raise DataError(f"{where}: column id: {_null_or_empty(values['id'])}; allowed: text", "bad id")
    _check_messages(values["messages"], where)
    _check_response(values["response"], where)
    _check_verifier(values["verifier"], where)
    return Row(values["id"], values["messages"], values["response"], values["verifier"], where)


def _null_or_empty(value: Any) -> str:
    return "null" if value is None else "empty"


def _check_messages(messages: list[dict[str, str]] | None, where: str) -> None:
    where = f"{where}: column messages"
    if not messages:
        raise DataError(f"{where}: {_null_or_empty(messages)}; allowed: at least one message", "no messages")
    for number, message in enumerate(messages):
        if message is None or message["role"] not in ROLES:
            role = None if message is None else message["role"]
            raise DataError(f"{where}: message {number}: role {role!r}; allowed: {', '.join(ROLES)}", "bad role")
        if not message["content"] or not message["content"].strip():
            problem = _null_or_empty(message["content"])
            raise DataError(f"{where}: message {number}: content {problem}; allowed: text", "empty message")
    if messages[-1]["role"] != "user":
        role = messages[-1]["role"]
        raise DataError(f"{where}: the last role is {role!r}; allowed: user, whom the response answers", "bad role")


def _check_response(response: str | None, where: str) -> None:
    if response is not None and not response.strip():
        raise DataError(f"{where}: column response: empty; allowed: text, or null for none", "empty response")


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
