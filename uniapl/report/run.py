"""What a run's folder holds, for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uniapl.analysis import Evaluation
from uniapl.config_errors import masked, parse_yaml
from uniapl.data.used import files_recorded
from uniapl.report.evaluations import load_beside
from uniapl.runlog import RunError, read_metrics

Metrics = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What a run folder holds; whatever is missing is empty or None."""

    name: str
    config_text: str
    config: dict[str, Any]
    metrics: Metrics
    before: Evaluation | None
    after: Evaluation | None
    versions: list[tuple[str, str]]
    beside: list[Evaluation] = field(default_factory=list)
    data: list[list[str]] = field(default_factory=list)
    """A row of `uniapl.data.used.COLUMNS` for each file of the data."""

    @property
    def planned_steps(self) -> int | None:
        steps = self.setting("run.steps")
        return steps if isinstance(steps, int) else None

    @property
    def evaluations(self) -> list[tuple[str, Evaluation]]:
        """Those that there are, by name."""
        return [(name, e) for name, e in (("before", self.before), ("after", self.after)) if e is not None]

    @property
    def made_rollouts(self) -> bool:
        return any("reward/mean" in record for record in self.metrics)

    def setting(self, dotted: str) -> Any:
        """A value of the configuration, None where it is not there."""
        node: Any = self.config
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node


def load_run(run_dir: Path) -> Run:
    """Everything that the report is made of.

    Raises:
        RunError: there is no such folder, or its metrics, evaluations, versions or list of data are damaged.
        ConfigError: its config.yaml is not YAML.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: no such folder; allowed: the folder of a run")
    text = _text(run_dir / "config.yaml")
    return Run(
        name=run_dir.resolve().name,
        config_text=masked(text),
        config=parse_yaml(text, str(run_dir / "config.yaml")),
        metrics=read_metrics(run_dir),
        beside=load_beside(run_dir),
        before=_evaluation(run_dir / "eval" / "before.json"),
        after=_evaluation(run_dir / "eval" / "after.json"),
        versions=_versions(run_dir / "versions.json"),
        data=files_recorded(run_dir),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _evaluation(path: Path) -> Evaluation | None:
    return Evaluation.load(path) if path.is_file() else None


def _versions(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return sorted((str(name), str(version)) for name, version in found.items())
    except (ValueError, AttributeError):
        raise RunError(f"{path}: not a JSON object of names and versions; allowed: one written by a run") from None
