"""A run's folder: configuration, versions, consumed batches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from cluster.changes import check_changes
from cluster.checkpoints import has_checkpoints, installed_versions
from cluster.run_store import RunStore
from uniapl.config import Config, load_config
from uniapl.config_errors import ConfigError
from uniapl.data import used
from uniapl.recorded import recorded_table
from uniapl.records import MixedBatch

GIT_S = 10
"""For git to look at the code."""


def open_run(config: Config, resume: bool, store: RunStore | None = None) -> Path:
    """Make the run's folder, or go on in it; with a `store`, its working copy and the folder in the store.

    Raises:
        ConfigError: the folder is there and `resume` was not asked for; it cannot be written; a key changed with which
            its checkpoints cannot go on.
    """
    folder = config.run_dir
    if store is not None:
        store.open(resume)
    if os.path.exists(folder / "config.yaml"):
        if not resume:
            raise ConfigError(f"run.name: {folder} is there already; allowed: another name, or --resume to go on")
        if store.has_checkpoints() if store is not None else has_checkpoints(folder):
            _report_changes(config, folder)
    try:
        for part in ("batches", "checkpoints", "eval"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.folder: {folder}: {error.strerror}; allowed: a folder that can be written") from None
    tree = config.model_dump(mode="json")
    _write_whole(folder / "config.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    _write_whole(folder / "versions.json", json.dumps(installed_versions() | _code_version(), indent=1))
    if store is not None:
        store.push()
    return folder


def _code_version() -> dict[str, str]:
    """The commit of this project's own code, with `-dirty` where files differ from it; none outside a git checkout."""
    root, git = Path(__file__).resolve().parent.parent, shutil.which("git")
    if git is None or not (root / ".git").exists():
        return {}
    words = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=GIT_S)  # noqa: S603 (git)
        if done.returncode == 0:
            return {"uniapl commit": done.stdout.strip()}
    return {}


def save_data_record(folder: Path) -> None:
    """Write down which files the data were."""
    write_json(folder / used.FILE, used.files_used(load_config(folder / "config.yaml")))


def _write_whole(path: Path, text: str) -> None:
    """Replace a file in one move: a run killed here is resumed with what stands in it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _report_changes(config: Config, folder: Path) -> None:
    before = load_config(folder / "config.yaml").model_dump(mode="json")
    for line in check_changes(before, config.model_dump(mode="json"), str(folder)):
        warnings.warn(line, stacklevel=3)


def save_batch(
    folder: Path, batch: MixedBatch, config: Config, weights: dict[str, float], part: str = "batches"
) -> Path:
    """Keep a batch and the step that consumed it, in PART/step-NNNNN.arrow of the run's folder; returns the path.

    Args:
        weights: of every term in this step.
    """
    table = recorded_table(batch, config, weights)
    path = folder / part / f"step-{batch.step:05d}.arrow"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return partial.replace(path)


def write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
