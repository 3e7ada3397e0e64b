"""The held-out split: a first walk over all rows that picks prompts and counts, for a second one that writes shards."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from uniapl.data.errors import DataError
from uniapl.data.importing.rows import TRAIN_SCHEMA, prompt_key
from uniapl.data.importing.shards import ShardFile

HELDOUT = "heldout.arrow"


class _Smallest:
    """The first row of each of the `n` prompts with the smallest keys, and how many rows have them.

    A key that leaves never comes back, since the largest of those that stay only falls.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._heap: list[tuple[int, str]] = []
        self.first: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, int] = {}

    def add(self, key: str, row: dict[str, Any]) -> None:
        if key in self.first:
            self.rows[key] += 1
            return
        value = -int(key, 16)
        if len(self._heap) == self._n and (not self._n or value <= self._heap[0][0]):
            return
        self.first[key], self.rows[key] = row, 1
        heapq.heappush(self._heap, (value, key))
        if len(self._heap) > self._n:
            gone = heapq.heappop(self._heap)[1]
            del self.first[gone], self.rows[gone]


def scan(rows: Iterable[dict[str, Any]], heldout: int, folder: Path) -> dict[str, Any]:
    """Write `heldout` prompts, each with the first of its rows, to `HELDOUT`, in the order of the source.

    Which prompts these are depends on their text alone: they have the smallest hashes.

    Returns:
        `rows`: all; `training`: those without a held-out prompt; `keys` of the held-out prompts; `files` written.

    Raises:
        DataError: there are no more prompts than `heldout`.
    """
    picked, total = _Smallest(heldout), 0
    for row in rows:
        picked.add(prompt_key(row["messages"]), row)
        total += 1
    training = total - sum(picked.rows.values())
    if total and (training == 0 or len(picked.first) < heldout):
        raise DataError(f"--heldout: got {heldout}; allowed: < {len(picked.first)}, the different prompts of all rows")
    files = []
    if heldout:
        file = ShardFile(folder / HELDOUT, TRAIN_SCHEMA)
        for row in picked.first.values():
            file.add(row)
        files.append(file.close())
    return {"rows": total, "training": training, "keys": sorted(picked.first), "files": files}
