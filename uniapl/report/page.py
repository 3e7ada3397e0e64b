"""Reads a run folder and writes its `report.html`."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from uniapl.analysis import Evaluation, Interval, paired_difference
from uniapl.config_errors import masked, parse_yaml
from uniapl.report import figures
from uniapl.report.axes import clock, compact, percent, points
from uniapl.report.charts import MAX_POINTS, interval_chart, share_bar
from uniapl.report.figures import AFTER, BEFORE
from uniapl.report.samples import choose, paired_samples, shown
from uniapl.report.words import objective_words
from uniapl.runlog import RunError, read_metrics

FOLDER = Path(__file__).parent
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class Run:
    """What a run folder holds; whatever is missing is empty or None."""

    name: str
    config_text: str
    config: dict[str, Any]
    metrics: figures.Metrics
    before: Evaluation | None
    after: Evaluation | None
    versions: list[tuple[str, str]]

    @property
    def planned_steps(self) -> int | None:
        steps = self.setting("run.steps")
        return steps if isinstance(steps, int) else None

    @property
    def made_rollouts(self) -> bool:
        return any("reward/mean" in record for record in self.metrics)

    def setting(self, dotted: str) -> Any:
        """A value of the configuration, None where it is not there."""
        node: Any = self.config
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node


def write_report(run_dir: Path) -> Path:
    """Make `run_dir/report.html`, one file that needs no other and no network; its path.

    It is made of whatever the run has so far, and says what is missing.

    Raises:
        RunError: there is no such folder, or its metrics, evaluations or versions are damaged.
        ConfigError: its config.yaml is not YAML.
    """
    path = Path(run_dir) / "report.html"
    html = render(load_run(run_dir))
    fresh = path.with_suffix(".tmp")
    fresh.write_bytes(html.encode("utf-8", "replace"))
    fresh.replace(path)
    return path


def load_run(run_dir: Path) -> Run:
    """Everything that the report is made of.

    Raises:
        RunError, ConfigError: as `write_report` does.
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
        before=_evaluation(run_dir / "eval" / "before.json"),
        after=_evaluation(run_dir / "eval" / "after.json"),
        versions=_versions(run_dir / "versions.json"),
    )


def render(run: Run) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, finalize=_visible
    )
    environment.filters |= {"percent": percent, "points": points, "clock": clock, "compact": compact, "shown": shown}
    script, style = ((FOLDER / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    return environment.get_template("report.html").render(
        run=run,
        status=_status(run),
        facts=_facts(run),
        headline=_headline(run),
        training=figures.line_figures(run.metrics, figures.TRAINING),
        balance=figures.balance_figures(run.metrics),
        steps_per_point=max(1, -(-len(run.metrics) // MAX_POINTS)),
        training_checks=figures.training_checks(run.metrics),
        expert=figures.line_figures(run.metrics, figures.EXPERT_CHARTS),
        distributions=_distributions(run),
        checks=figures.check_rows(run.before, run.after),
        health=figures.line_figures(run.metrics, figures.HEALTH) + figures.importance_figures(run.metrics),
        times=_times(run.metrics),
        samples=choose(paired_samples(run.before, run.after)),
        style=Markup(style),  # noqa: S704 (our own file)
        script=Markup(script),  # noqa: S704 (our own file)
        style_hash=_policy_hash(style),
        script_hash=_policy_hash(script),
    )


def _policy_hash(text: str) -> str:
    """What the page's Content-Security-Policy knows an inline script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _visible(value: Any) -> Any:
    """Control characters in data as their pictures: HTML has no other way to hold them."""
    return value.translate(CONTROLS) if type(value) is str else value


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


def _status(run: Run) -> dict[str, Any]:
    """How far the run came, in words, and whether it is complete."""
    made, planned = len(run.metrics), run.planned_steps
    if not made:
        return {"complete": False, "text": "No optimizer step was logged."}
    if planned is None:
        return {
            "complete": False,
            "text": f"{made} steps logged; config.yaml, which says how many were planned, is missing.",
        }
    if made < planned:
        return {"complete": False, "text": f"Not finished: {made} of {planned} steps were made."}
    return {"complete": True, "text": f"Finished: {made} optimizer steps."}


def _facts(run: Run) -> list[tuple[str, str]]:
    """The run in a few (name, value) pairs."""
    facts = [("Model", run.setting("model.path"))]
    facts += [("Objective", objective_words(run.setting("objective"))), ("Batch", _batch(run))]
    if run.metrics:
        seconds = sum(record.get("time/step", 0.0) for record in run.metrics)
        begun = run.metrics[0].get("time")
        if begun:
            facts.append(("First step", f"{datetime.fromtimestamp(begun, UTC):%Y-%m-%d %H:%M} UTC"))
        facts.append(("Time in steps", clock(seconds) if seconds else None))
    return [(name, str(value)) for name, value in facts if value]


def _batch(run: Run) -> str:
    groups, size = run.setting("queue.groups_per_step"), run.setting("rollout.group_size")
    parts = []
    if groups and size and run.made_rollouts:
        parts.append(f"{groups} prompts × {size} samples")
    demonstrations = run.setting("queue.demonstrations_per_step")
    if demonstrations and any("loss/demonstration" in record for record in run.metrics):
        parts.append(f"{demonstrations} demonstrations")
    return " + ".join(parts)


def _headline(run: Run) -> dict[str, Any]:
    """Held-out pass rates, their difference, and the chart of both; empty parts where there is no evaluation."""
    rates: list[tuple[str, Interval, str]] = []
    for name, evaluation, colour in (("before", run.before, BEFORE), ("after", run.after, AFTER)):
        rate = evaluation.pass_rate if evaluation else None
        if rate is not None:
            rates.append((name, rate, colour))
    paired = paired_difference(run.before, run.after) if run.before and run.after else None
    return {
        "rates": rates,
        "paired": paired,
        "certain": paired is not None and not paired.difference.low <= 0 <= paired.difference.high,
        "figure": interval_chart("Held-out pass rate", rates) if rates else None,
        "unscored": [(n, e.unscored) for n, e in (("before", run.before), ("after", run.after)) if e and e.unscored],
    }


def _distributions(run: Run) -> list[figures.Figure]:
    evaluations = []
    if run.before is not None:
        evaluations.append(("before", run.before))
    if run.after is not None:
        evaluations.append(("after", run.after))
    return figures.distribution_figures(evaluations)


def _times(metrics: figures.Metrics) -> dict[str, Any]:
    """Where the wall time went, in all and per step."""
    totals = figures.time_totals(metrics)
    whole = sum(seconds for _, seconds, _ in totals)
    per_step = figures.time_figure(metrics)
    return {
        "rows": [(name, seconds, seconds / whole, colour) for name, seconds, colour in totals],
        "bar": share_bar([(seconds, colour) for _, seconds, colour in totals]),
        "figures": ([per_step] if per_step else []) + figures.line_figures(metrics, figures.SPEED),
    }
