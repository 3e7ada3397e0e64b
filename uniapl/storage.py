"""Object stores: files below URLs such as s3://bucket/folder, through Arrow's file systems or, if need be, fsspec's.

Credentials come from the environment or the machine's role, never from a URL. A store has no rename: what must be
whole or not there at all is one `write`.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import xxhash

from uniapl.runlog import RunError

CONNECT_S = 5.0
REQUEST_S = 30.0
"""Without a byte from S3; then the request is made again, at most `TRIES` times in all."""
TRIES = 5
GCS_S = 60.0
"""For a request to Google Cloud Storage with all its tries."""
BLOCK = 16 << 20
AT_ONCE = 4
"""Files that one machine sends or fetches at a time."""
Fingerprint = list[Any]
"""[bytes, xxh3 checksum in hexadecimal]: as it stands in a manifest."""
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REQUEST = re.compile(r" \(Request ID: [^)]*\)")
_SECRETS = re.compile(r"(?<=://)[^/]*@")


class StorageError(RunError):
    """A store that cannot be used, in one line: the URL and what the store said."""


@dataclass(frozen=True)
class Entry:
    """One file in a store; `mtime_ns` is None where the store does not tell."""

    url: str
    size: int
    mtime_ns: int | None


def is_remote(path: str | Path) -> bool:
    """Whether it is a URL, and no path on this machine."""
    return "://" in str(path)


def url_conflicts(places: dict[str, list[str]]) -> list[str]:
    """What is wrong with URLs as such, one line each, without what may be a secret in it.

    Args:
        places: paths and URLs by their key in the configuration.
    """
    named = [(key, place) for key, found in places.items() for place in found if is_remote(place)]
    return [f"{key}: {problem}" for key, place in named if (problem := _url_problem(key, place)) is not None]


def _url_problem(key: str, url: str) -> str | None:
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if "@" in bucket:
        return f"got '{_SECRETS.sub('***@', url)}'; allowed: no credentials in a URL, they come from the environment"
    if scheme in ("s3", "gs", "gcs") and not _BUCKET.fullmatch(bucket):
        return f"got '{url}'; allowed: {scheme}://BUCKET/PATH"
    if any(part in (".", "..") for part in path.split("/")):
        return f"got '{url}'; allowed: a URL without '.' and '..' in its path"
    if scheme == "memory" and key == "run.folder":
        return f"got '{url}', which one process alone sees; allowed: a store that all nodes see"
    return None


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def fingerprint(path: Path) -> Fingerprint:
    """Of a file on this machine."""
    with path.open("rb") as file:
        return _pour(file, None)


def read(url: str) -> bytes:
    """A small file.

    Raises:
        StorageError: it is not there, or the store cannot be used.
    """
    with _told(url):
        fs, path = _at(url)
        with fs.open_input_stream(path) as stream:
            return stream.read()


def write(url: str, data: bytes) -> None:
    """A small file, whole or not at all (but for file://)."""
    with _told(url):
        fs, path = _at(url)
        _make_parent(fs, path)
        with fs.open_output_stream(path) as stream:
            stream.write(data)


def upload(path: Path, url: str) -> Fingerprint:
    """Copy a file into a store; returns what was read of it, which is what the store says that it has."""
    with _told(url):
        fs, target = _at(url)
        _make_parent(fs, target)
        with path.open("rb") as source, fs.open_output_stream(target) as sink:
            found = _pour(source, sink)
        held = fs.get_file_info(target).size
        if held != found[0]:
            raise OSError(f"{found[0]} bytes were written, the store has {held}")
        return found


def download(url: str, path: Path) -> Fingerprint:
    """Copy a file out of a store, under its name when it is whole; returns what was read."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _told(url):
            fs, source = _at(url)
            with fs.open_input_stream(source) as stream, partial.open("wb") as sink:
                found = _pour(stream, sink)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return found


def upload_all(files: dict[str, Path], url: str) -> dict[str, Fingerprint]:
    """Copy files into the folder `url` under their names, some at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda name: upload(files[name], join(url, name)), files)
        return dict(zip(files, found, strict=True))


def download_all(names: list[str], url: str, folder: Path) -> dict[str, Fingerprint]:
    """Copy files of the folder `url` into one on this machine under the same names, some at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda name: download(join(url, name), folder / name), names)
        return dict(zip(names, found, strict=True))


def exists(url: str) -> bool:
    """Whether there is such a file."""
    from pyarrow.fs import FileType

    with _told(url):
        fs, path = _at(url)
        return fs.get_file_info(path).type == FileType.File


def find(url: str) -> dict[str, Entry]:
    """All files below the folder `url`, by name within it; empty where there is nothing.

    Names that would lead out of a folder on this machine are passed over: a store takes any text for a name.
    """
    from pyarrow.fs import FileSelector, FileType

    with _told(url):
        fs, folder = _at(url)
        infos = fs.get_file_info(FileSelector(folder, recursive=True, allow_not_found=True))
    below = folder.strip("/") + "/"
    files = [info for info in infos if info.type == FileType.File]
    names = {info.path.lstrip("/").removeprefix(below): info for info in files}
    return {name: _entry(url, name, info) for name, info in names.items() if not {"", ".", ".."} & {*name.split("/")}}


def matches(pattern: str) -> list[Entry]:
    """The files that a URL or a glob means, in the order of their names; `*` stops at a `/`, `**` does not."""
    from pyarrow.fs import FileType

    folder, names = _split(pattern)
    if not names:
        with _told(pattern):
            fs, path = _at(pattern)
            info = fs.get_file_info(path)
        return [_entry(pattern, "", info)] if info.type == FileType.File else []
    found = find(folder)
    return [found[name] for name in sorted(found) if _fits(name.split("/"), names)]


def delete(url: str) -> None:
    """A file; one that is not there is no error."""
    with _told(url):
        fs, path = _at(url)
        try:
            fs.delete_file(path)
        except FileNotFoundError:
            return


def delete_all(url: str, first: str | None = None) -> None:
    """The folder `url` with every file below it; the one called `first` goes first."""
    if first is not None:
        delete(join(url, first))
    if find(url):
        with _told(url), suppress(FileNotFoundError):  # what GCS says of a folder whose files it has deleted
            fs, path = _at(url)
            fs.delete_dir(path)
        if find(url):
            raise StorageError(
                f"{url}: files are still there after they were deleted; allowed: the right to delete them"
            )


def check_writable(url: str) -> None:
    """Write a small file into the folder `url`, read it and delete it.

    Raises:
        StorageError: one of these cannot be done.
    """
    probe = join(url, f".uniapl-write-test-{os.uname().nodename}-{os.getpid()}")
    write(probe, b"uniapl")
    if read(probe) != b"uniapl":
        raise StorageError(f"{probe}: the store does not give back what was written; allowed: one that does")
    delete(probe)


def _pour(source: Any, sink: IO[bytes] | Any | None) -> Fingerprint:
    digest, size = xxhash.xxh3_64(), 0
    while block := source.read(BLOCK):
        digest.update(block)
        size += len(block)
        if sink is not None:
            sink.write(block)
    return [size, digest.hexdigest()]


def _entry(url: str, name: str, info: Any) -> Entry:
    return Entry(join(url, name) if name else url, info.size, info.mtime_ns)


def _split(pattern: str) -> tuple[str, list[str]]:
    """The folder above the first part of a glob that is none, and the parts from there on; no part: no glob."""
    scheme, _, rest = pattern.partition("://")
    parts = rest.split("/")
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
    return f"{scheme}://{'/'.join(parts[:first])}", parts[first:]


def _fits(parts: list[str], pattern: list[str]) -> bool:
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or (not parts[0].startswith(".") and _fits(parts[1:], pattern))
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    return not hidden and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Whatever a file system raises, in one line; a full disk on this machine stays what it is."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # fsspec's file systems raise what their libraries raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(f"{url}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is not there"
    return " ".join(_REQUEST.sub("", str(error)).split())[:300] or type(error).__name__


def _make_parent(fs: Any, path: str) -> None:
    """Folders exist on file systems alone; in S3 and GCS they would be objects of their own."""
    if fs.type_name not in ("s3", "gcs") and "/" in path.strip("/"):
        fs.create_dir(path.rpartition("/")[0], recursive=True)


def _at(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    scheme, _, rest = url.partition("://")
    path = rest.rstrip("/")
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return _s3(rest.partition("/")[0], endpoint, region), path
    if scheme in ("gs", "gcs"):
        return _gcs(), path
    if scheme == "file":
        return _local(), path or "/"
    return _by_fsspec(scheme), path


@functools.cache
def _s3(bucket: str, endpoint: str | None, region: str | None) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    if endpoint is None and region is None:
        region = resolve_s3_region(bucket)
    scheme, _, host = (endpoint or "").rpartition("://")
    return S3FileSystem(
        region=region,
        scheme=scheme or None,
        endpoint_override=host or None,
        connect_timeout=CONNECT_S,
        request_timeout=REQUEST_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=TRIES),
        allow_delayed_open=True,
    )


@functools.cache
def _gcs() -> Any:
    from pyarrow.fs import GcsFileSystem

    return GcsFileSystem(retry_time_limit=timedelta(seconds=GCS_S))


@functools.cache
def _local() -> Any:
    from pyarrow.fs import LocalFileSystem

    return LocalFileSystem()


@functools.cache
def _by_fsspec(scheme: str) -> Any:
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(fsspec.filesystem(scheme)))
