"""Which files a run's data were, by SHA-256: kept in its folder, for the report and the card of its model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from uniapl.config import Config
from uniapl.data.errors import DataError
from uniapl.data.reader import expand
from uniapl.runlog import RunError
from uniapl.storage import is_remote

FILE = "data.json"
"""In the run's folder; written when training is over, since every byte of the data is read for it."""
COLUMNS = ("used for", "file", "bytes", "SHA-256")
"""Of the tables that show the rows."""


def files_used(config: Config) -> list[list[str]]:
    """What `data.train` and `data.heldout` name, a row of `COLUMNS` for each file; reads all of them."""
    rows: list[list[str]] = []
    for use, paths in (("training", config.data.train), ("evaluation", config.data.heldout)):
        for path in paths:
            if is_remote(path):
                rows.append([use, path, "in an object store", ""])
                continue
            try:
                rows += [[use, str(file), str(file.stat().st_size), _sha256(file)] for file in expand([path])]
            except (DataError, OSError):  # the run is over: its data may have gone
                rows.append([use, path, "not there any more", ""])
    return rows


def files_recorded(run: Path) -> list[list[str]]:
    """The rows that the run has kept; none of a run that did not come to its end.

    Raises:
        RunError: the file is damaged.
    """
    path = run / FILE
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [[str(cell) for _, cell in zip(COLUMNS, row, strict=True)] for row in rows]
    except (ValueError, TypeError):
        raise RunError(f"{path}: not the rows of a table; allowed: one written by a run") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
