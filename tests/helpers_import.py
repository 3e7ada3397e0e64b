"""Files of users' data, and imports of them, for the tests of `uniapl data import` and `inspect`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers_toy import WORDS, toy_rows
from rich.console import Console

from cluster.cli import main
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


def import_toy(folder: Path) -> list[str]:
    """The toy task in files of three kinds: chats with an expert, preference pairs, prompts alone.

    Returns:
        the KEY=VALUE words that `uniapl data import` of them ends with, eight prompts held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict[str, Any]]] = {"chats": [], "pairs": [], "prompts": []}
    for i, row in enumerate(toy_rows(0, 64, expert := "eeeee eeeee")):
        [message] = row["messages"]
        if i % 2 == 0:
            files["chats"].append({"messages": [message, assistant(expert)]})
        elif i % 4 == 1:
            rejected = f"{WORDS[i // 8]} fox"
            files["pairs"].append({"prompt": message["content"], "chosen": expert, "rejected": rejected})
        else:
            files["prompts"].append({"prompt": message["content"]})
    inputs = [str(write_lines(folder / f"{name}.jsonl", rows)) for name, rows in files.items()]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["data", "import", *inputs, "--out", str(folder / "imported"), "--heldout", "8"]) == 0
    return [word for line in said.getvalue().splitlines()[-2:] for word in line.split()]
