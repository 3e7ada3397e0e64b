"""Preference pairs on disk: what a cotrained discriminator warms up on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from uniapl.data.reader import ShardReader, sound_row
from uniapl.records import COMPARISON_SCHEMA


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, of which `chosen` was preferred. `where` names file and row, for messages."""

    id: str
    messages: list[dict[str, str]]
    chosen: str
    rejected: str
    where: str


class ComparisonReader:
    """The pairs of all files under one index, read as shards are.

    Raises:
        DataError: as `ShardReader`, for files of `COMPARISON_SCHEMA`.
    """

    def __init__(self, paths_or_globs: Iterable[str | Path]) -> None:
        self._rows = ShardReader(paths_or_globs, COMPARISON_SCHEMA)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Pair:
        values, where = self._rows.values(index)
        said = {}
        for name in ("chosen", "rejected"):
            row = {"id": values["id"], "messages": values["messages"], "response": values[name] or "", "verifier": None}
            said[name] = sound_row(row, where, response=name).response or ""
        return Pair(values["id"], values["messages"], said["chosen"], said["rejected"], where)
