"""A run's folder: configuration, versions, consumed batches."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from cluster.changes import check_changes
from cluster.checkpoints import installed_versions
from uniapl.config import Config
from uniapl.config_errors import ConfigError, read_yaml
from uniapl.records import MixedBatch, batch_table


def open_run(config: Config, resume: bool) -> Path:
    """Make the run's folder, or go on in it.

    Raises:
        ConfigError: the folder is there and `resume` was not asked for, or a key changed that must not.
    """
    folder = config.run_dir
    if (folder / "config.yaml").exists():
        if not resume:
            raise ConfigError(f"run.name: {folder} is there already; allowed: another name, or --resume to go on")
        _report_changes(config, folder)
    for part in ("batches", "checkpoints", "eval"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    tree = config.model_dump(mode="json")
    _write_whole(folder / "config.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    _write_whole(folder / "versions.json", json.dumps(installed_versions(), indent=1))
    return folder


def _write_whole(path: Path, text: str) -> None:
    """Replace a file in one move: a run killed here is resumed with what stands in it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _report_changes(config: Config, folder: Path) -> None:
    before = read_yaml(folder / "config.yaml")
    for line in check_changes(before, config.model_dump(mode="json"), str(folder)):
        warnings.warn(line, stacklevel=3)


def save_batch(folder: Path, batch: MixedBatch, part: str = "batches") -> Path:
    """Keep a batch as it was consumed, in PART/step-NNNNN.arrow of the run's folder; returns the path."""
    table = batch_table(batch)
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
