"""Files of users' data, and imports of them, for the tests of `uniapl data import` and `inspect`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from uniapl.data.importing.job import run_import
from uniapl.data.importing.ledger import Ledger
from uniapl.data.importing.records import Request
from uniapl.data.progress import Bar
from uniapl.data.reader import Row, ShardReader


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSON Lines; bytes and text as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def chats(n: int) -> list[dict[str, Any]]:
    """Chats of one turn; every third prompt has been asked before, in other letters."""
    prompts = [f"  Question {i - 1}" if i % 3 == 2 else f"question {i}" for i in range(n)]
    return [{"messages": [user(p), assistant(f"answer {i}")]} for i, p in enumerate(prompts)]


def imported(
    out: Path, *inputs: object, overwrite: bool = False, console: Console | None = None, **options: Any
) -> Ledger:
    """Import into `out`, without a bar unless there is a console."""
    request = dataclasses.replace(Request([str(i) for i in inputs], out), **options)
    with Bar(console or Console(quiet=True)) as bar:
        return run_import(request, bar, overwrite)


def rows_of(*shards: object) -> list[Row]:
    """All rows of shards."""
    reader = ShardReader([str(shard) for shard in shards])
    return [reader[i] for i in range(len(reader))]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
