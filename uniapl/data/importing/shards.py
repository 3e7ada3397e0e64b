"""Arrow files written whole: under another name until the last byte is on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from uniapl.data.importing.rows import PAIR_SCHEMA, TRAIN_SCHEMA

PART = ".part"
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 4 << 20
"""A record batch ends with the first of the two: what is held in memory of a shard."""


class ShardFile:
    """One uncompressed Arrow IPC file, its bytes a function of schema and rows alone."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.rows = path, 0
        self._part, self._schema = path.with_name(path.name + PART), schema
        self._sink = pa.OSFile(str(self._part), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)
        self._held: list[dict[str, Any]] = []
        self._characters = 0

    def add(self, row: dict[str, Any]) -> None:
        """Append the row's values of the schema's columns."""
        self._held.append(row)
        self.rows += 1
        self._characters += sum(len(m["content"]) for m in row["messages"])
        self._characters += sum(len(row.get(name) or "") for name in ("response", "verifier", "rejected"))
        if len(self._held) == _BATCH_ROWS or self._characters >= _BATCH_CHARACTERS:
            self._write()

    def close(self) -> dict[str, Any]:
        """Finish the file and give it its name; returns name, rows, bytes and SHA-256."""
        self._write()
        self._writer.close()
        self._sink.close()
        with self._part.open("rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(self._part, self.path)
        return {"name": self.path.name, "rows": self.rows, "bytes": self.path.stat().st_size, "sha256": digest}

    def _write(self) -> None:
        if self._held:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._held, schema=self._schema))
        self._held, self._characters = [], 0


class Shard:
    """`train-NNNNN.arrow` and, where there are pairs among its rows, `comparisons-NNNNN.arrow`."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._train = ShardFile(folder / f"train-{number:05}.arrow", TRAIN_SCHEMA)
        self._pairs: ShardFile | None = None

    @property
    def rows(self) -> int:
        return self._train.rows

    def add(self, row: dict[str, Any]) -> None:
        self._train.add(row)
        if "rejected" in row:
            if self._pairs is None:
                self._pairs = ShardFile(self._folder / f"comparisons-{self._number:05}.arrow", PAIR_SCHEMA)
            self._pairs.add(row)

    def close(self) -> list[dict[str, Any]]:
        """Finish the files; returns what `ShardFile.close` says of each."""
        return [file.close() for file in (self._train, self._pairs) if file is not None]
