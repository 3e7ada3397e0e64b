"""This machine's scratch folder: working copies of runs and shards whose home is an object store."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import xxhash

from uniapl.config_errors import ConfigError


def scratch_folder(given: str | None) -> Path:
    """`run.scratch`; without it one of this user's own in the system's temporary folder."""
    return Path(given) if given else Path(tempfile.gettempdir()) / f"uniapl-{os.getuid()}"


def make_scratch(given: str | None) -> Path:
    """The same, made where it is not there yet, for this user alone.

    Raises:
        ConfigError: it cannot be made, or is another user's, who could put other contents into it.
    """
    folder = scratch_folder(given)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise ConfigError(f"run.scratch: {folder}: {error.strerror}; allowed: a folder that can be written") from None
    if owner != os.getuid():
        raise ConfigError(f"run.scratch: {folder} belongs to user {owner}; allowed: a folder of your own")
    return folder


def short_digest(text: str) -> str:
    """Eight characters that tell texts apart, for names of folders."""
    return xxhash.xxh3_64_hexdigest(text.encode())[:8]
