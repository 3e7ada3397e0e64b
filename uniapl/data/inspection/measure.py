"""Counts, lengths and duplicates of shards, in one walk over their rows.

What is held of a row are 8 bytes for each of its hashes and lengths.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from uniapl.data.comparisons import ComparisonReader, Pair
from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError
from uniapl.data.importing.rows import prompt_key
from uniapl.data.progress import EVERY, Bar
from uniapl.data.reader import Row, ShardReader, expand

Reader = ShardReader | ComparisonReader
QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def open_shards(paths_or_globs: Iterable[str]) -> dict[str, list[Path]]:
    """The files by kind: `shards`, and `comparisons` for those with a column `chosen` and none `response`.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    found: dict[str, list[Path]] = {}
    for path in expand(paths_or_globs):
        names = schema_of(path).names
        pairs = "chosen" in names and "response" not in names
        found.setdefault("comparisons" if pairs else "shards", []).append(path)
    return found


def schema_of(path: Path) -> pa.Schema:
    """The columns of an Arrow or Parquet file.

    Raises:
        DataError: it is neither.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PAR1":
                return pq.read_schema(path)
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).schema
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: neither Arrow nor Parquet, or damaged: {error}; allowed: a whole file") from None


def measure(kind: str, files: list[Path], encoder: ChatEncoder | None, bar: Bar) -> tuple[dict[str, Any], Reader]:
    """What `show` prints of files of one kind, and their rows.

    Args:
        kind: as `open_shards` says.
        files: of that kind.
        encoder: counts tokens; without one lengths are in characters.
        bar: shows how far the walk is.

    Raises:
        DataError: a file cannot be used; rows that cannot are counted.
    """
    walk = _Walk(encoder)
    named = []
    opened = ComparisonReader if kind == "comparisons" else ShardReader
    for path in files:
        own: Reader = opened([path])
        bar.stage(f"reading {path.name}", len(own))
        walk.read(own, bar)
        named.append({"name": str(path), "rows": len(own), "bytes": path.stat().st_size})
    return {
        "kind": kind,
        "files": named,
        "schema": {field.name: str(field.type) for field in schema_of(files[0])},
        **walk.found(),
    }, opened(files)


class _Walk:
    def __init__(self, encoder: ChatEncoder | None) -> None:
        self._encoder = encoder
        self._counts: Counter[str] = Counter()
        self._bad: dict[str, dict[str, Any]] = {}
        self._lengths: dict[str, array[int]] = {}
        self._hashes = {name: array("Q") for name in ("rows", "ids")}
        self._prompts: list[np.ndarray[Any, Any]] = []
        """Keys of the prompts of each file."""

    def read(self, reader: Reader, bar: Bar) -> None:
        prompts = array("Q")
        for index in range(len(reader)):
            if index % EVERY == 0:
                bar.at(index, index)
            self._counts["rows"] += 1
            try:
                self._row(reader[index], prompts)
            except DataError as error:
                found = self._bad.setdefault(error.reason, {"rows": 0, "first": str(error)})
                found["rows"] += 1
        self._prompts.append(np.frombuffer(prompts, dtype=np.uint64))

    def _row(self, row: Row | Pair, prompts: array[int]) -> None:
        responses = _responses(row)
        encoder = self._encoder
        lengths = {name: len(encoder.response_ids(text) if encoder else text) for name, text in responses.items()}
        prompt = encoder.prompt_ids(row.messages) if encoder else "".join(m["content"] for m in row.messages)
        for name, length in ({"prompt": len(prompt)} | lengths).items():
            self._lengths.setdefault(name, array("Q")).append(length)
        roles = [message["role"] for message in row.messages]
        self._counts["with system message"] += "system" in roles
        self._counts["with several turns"] += roles.count("user") > 1
        if isinstance(row, Row):
            self._counts["with response"] += row.response is not None
            self._counts["with verifier"] += row.verifier is not None
        prompts.append(int(prompt_key(row.messages), 16))
        self._hashes["rows"].append(_hash([row.messages, responses]))
        self._hashes["ids"].append(_hash(row.id))

    def found(self) -> dict[str, Any]:
        keys = [np.unique(keys) for keys in self._prompts]
        _, times = np.unique(np.concatenate(keys), return_counts=True)
        return {
            "counts": dict(self._counts),
            "bad rows": self._bad,
            "unit": "tokens" if self._encoder else "characters",
            "lengths": {name: _distribution(values) for name, values in self._lengths.items()},
            "duplicates": {
                "rows": _repeated(self._hashes["rows"]),
                "ids": _repeated(self._hashes["ids"]),
                "prompts": _repeated(np.concatenate(self._prompts)),
                "prompts in several files": int((times > 1).sum()),
            },
        }


def _responses(row: Row | Pair) -> dict[str, str]:
    if isinstance(row, Pair):
        return {"chosen": row.chosen, "rejected": row.rejected}
    return {} if row.response is None else {"response": row.response}


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest(), "little")


def _repeated(hashes: Any) -> int:
    """How many values have stood before."""
    values = np.asarray(hashes, dtype=np.uint64)
    return len(values) - len(np.unique(values))


def _distribution(lengths: array[int]) -> dict[str, Any]:
    """Quantiles, the mean, and a histogram: rows of at least 1, 2, 4, 8 … and less than twice that."""
    values = np.asarray(lengths)
    quantiles = {name: int(np.quantile(values, q, method="lower")) for name, q in QUANTILES.items()}
    first, last = (int(np.log2(max(int(values.min()), 1)))), int(np.log2(max(int(values.max()), 1)))
    edges = [2**power for power in range(first, last + 2)]
    counts, _ = np.histogram(values, edges)
    histogram = [{"from": low, "rows": int(n)} for low, n in zip(edges[:-1], counts, strict=True)]
    return quantiles | {"mean": round(float(values.mean()), 1), "histogram": histogram}
