"""Shards in an object store: copied once to this machine's scratch folder, and memory-mapped from there.

A copy is used again while the store says the same size and time of change and the copy has the checksum it came with.
"""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from uniapl.config import Config
from uniapl.data.errors import DataError
from uniapl.scratch import make_scratch
from uniapl.storage import AT_ONCE, Entry, StorageError, download, fingerprint, is_remote, matches


def with_local_data(config: Config) -> Config:
    """The same configuration with paths on this machine in the place of URLs of shards, which are copied if need be.

    Raises:
        DataError: nothing matches, or the store cannot be used; names the key.
    """
    data = config.data
    parts = ("train", "heldout") if config.evaluation.prompts else ("train",)
    found = {part: local_shards(config, part) for part in parts}
    return config.model_copy(update={"data": data.model_copy(update=found)})


def local_shards(config: Config, part: str) -> list[str]:
    """`data.train` or `data.heldout` as paths and globs on this machine.

    Raises:
        DataError: nothing matches, or the store cannot be used; names the key.
    """
    places: list[str] = getattr(config.data, part)
    return [
        path for place in places for path in (_copies(config, f"data.{part}", place) if is_remote(place) else [place])
    ]


def _copies(config: Config, key: str, place: str) -> list[str]:
    cache = make_scratch(config.run.scratch) / "shards"
    try:
        entries = matches(place)
        if not entries:
            raise DataError(f"{key}: {place}: nothing there matches; allowed: existing .arrow or .parquet files")
        old = [entry for entry in entries if not _is_current(entry, _path(cache, entry))]
        if old:
            with _progress(old) as done, ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda entry: _copy(entry, _path(cache, entry), done), old))
    except StorageError as error:
        raise DataError(f"{key}: {error}; allowed: shards that this machine can read") from None
    return [glob.escape(str(_path(cache, entry))) for entry in entries]


def _path(cache: Path, entry: Entry) -> Path:
    """Below the cache as in the store, so that messages name the shard."""
    scheme, _, rest = entry.url.partition("://")
    return cache / scheme / rest.strip("/")


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".copy.json")


def _is_current(entry: Entry, path: Path) -> bool:
    try:
        copied = json.loads(_note(path).read_text(encoding="utf-8"))
        same = entry.mtime_ns is not None and [entry.size, entry.mtime_ns] == [copied["size"], copied["mtime_ns"]]
        return same and fingerprint(path) == copied["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _copy(entry: Entry, path: Path, done: Callable[[int], None]) -> None:
    """What another run has mapped into its memory stays as it is: the new file only takes the name."""
    _note(path).unlink(missing_ok=True)
    found = download(entry.url, path)
    if found[0] != entry.size:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"{entry.url}: {found[0]} of {entry.size} bytes arrived; allowed: whole files; the same command tries again"
        )
    note = {"size": entry.size, "mtime_ns": entry.mtime_ns, "fingerprint": found}
    partial = _note(path).with_suffix(".partial")
    partial.write_text(json.dumps(note), encoding="utf-8")
    partial.replace(_note(path))
    done(entry.size)


@contextmanager
def _progress(entries: list[Entry]) -> Iterator[Callable[[int], None]]:
    """A line, and in a terminal a bar, on stderr; yields what is told the bytes of each file that has come."""
    from rich.console import Console
    from rich.progress import Progress

    total = sum(entry.size for entry in entries)
    console = Console(file=sys.stderr)
    line = f"copying {len(entries)} shards, {total / 2**20:.1f} MiB, from the object store"
    if not console.is_terminal:
        print(line, file=sys.stderr, flush=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(line, total=total)
        yield lambda size: progress.advance(task, size)
