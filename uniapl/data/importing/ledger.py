"""What an import has done, beside its shards: while it goes on in `.import.json`, at its end in `manifest.json`."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uniapl.data.errors import DataError
from uniapl.data.importing.records import Request
from uniapl.data.importing.shards import PART

LEDGER, MANIFEST = ".import.json", "manifest.json"


@dataclass
class Counts:
    """Rows of the sources by what became of them."""

    imported: int = 0
    pairs: int = 0
    """Of the imported rows, those that are in a comparisons file too."""
    without_response: int = 0
    held_back: int = 0
    """Rows whose prompt is a held-out one."""
    skipped: dict[str, Any] = field(default_factory=dict)
    """By reason: how many, and the message of the first."""

    def skip(self, error: DataError) -> None:
        found = self.skipped.setdefault(error.reason, {"rows": 0, "first": str(error)})
        found["rows"] += 1


@dataclass
class Ledger:
    """The state of an import after its last whole shard."""

    request: dict[str, Any]
    inputs: list[dict[str, Any]]
    scan: dict[str, Any] | None = None
    """Of `uniapl.data.importing.scan`, once it is done."""
    files: list[dict[str, Any]] = field(default_factory=list)
    shards: int = 0
    source: int = 0
    """The source that goes on, and its first row that is not done."""
    row: int = 0
    counts: Counts = field(default_factory=Counts)
    finished: bool = False

    def save(self, folder: Path) -> None:
        """Replace what is in the folder; the last time under the name of the manifest."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=True) + "\n"
        place = folder / (MANIFEST if self.finished else LEDGER)
        part = place.with_name(place.name + PART)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, place)
        if self.finished:
            (folder / LEDGER).unlink(missing_ok=True)


def open_ledger(request: Request, inputs: list[dict[str, Any]]) -> Ledger:
    """The ledger of this import in its folder: a new one, or that of the same import begun earlier.

    Raises:
        DataError: the folder holds something else, or what the import wrote was changed.
    """
    asked = {k: v for k, v in dataclasses.asdict(request).items() if k != "out"}
    for name in (MANIFEST, LEDGER):
        if (request.out / name).is_file():
            found = _read(request.out / name)
            # Of an import that got nowhere there is nothing to keep: its mistake may have been put right.
            return _checked(found, asked, inputs, request.out) if found.files else Ledger(asked, inputs)
    if other := next(request.out.glob("*.arrow"), None):
        raise DataError(f"{other}: stands where shards are to be written; allowed: an empty folder, or another --out")
    return Ledger(asked, inputs)


def forget(folder: Path) -> None:
    """Remove what an import, whichever it was, has written into the folder."""
    for place in (folder / MANIFEST, folder / LEDGER):
        if place.is_file():
            for file in _read(place).files:
                (folder / Path(file["name"]).name).unlink(missing_ok=True)
            place.unlink()


def _read(path: Path) -> Ledger:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Ledger(**found | {"counts": Counts(**found["counts"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: cannot be read: {error}; allowed: as an import wrote it, or another --out") from None


def _checked(ledger: Ledger, asked: dict[str, Any], inputs: list[dict[str, Any]], folder: Path) -> Ledger:
    allowed = "the same command and inputs, another --out, or --overwrite"
    for name, value in asked.items():
        if ledger.request.get(name) != value:
            before = ledger.request.get(name)
            raise DataError(
                f"{folder}: holds an import with {name} = {before!r:.200}, not {value!r:.200}; allowed: {allowed}"
            )
    none: dict[str, Any] = {}
    for before, now in itertools.zip_longest(ledger.inputs, inputs, fillvalue=none):
        if before != now:
            name = (now or before)["name"]
            raise DataError(f"{folder}: {name} is not what it was when the import began; allowed: {allowed}")
    for file in ledger.files:
        _check_file(folder / file["name"], file["sha256"])
    return ledger


def _check_file(path: Path, digest: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: is gone since it was imported; allowed: all files of the import, or --overwrite")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise DataError(f"{path}: was changed since it was imported; allowed: as it was, or --overwrite")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps a second import out of it.

    Raises:
        DataError: another import is under way there, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; allowed: a folder that can be written") from None
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(f"{folder}: another import is under way there; allowed: one at a time") from None
    finally:
        os.close(place)
