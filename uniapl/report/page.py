"""The report of one run: `report.html` in its folder."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from uniapl.report import figures
from uniapl.report.axes import clock
from uniapl.report.charts import MAX_POINTS, share_bar
from uniapl.report.headline import headline
from uniapl.report.html import fill, write_page
from uniapl.report.run import Run, load_run
from uniapl.report.samples import choose, paired_samples
from uniapl.report.words import objective_words

__all__ = ["render", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Make `run_dir/report.html`, one file that needs no other and no network; its path.

    It is made of whatever the run has so far, and says what is missing.

    Raises:
        RunError: there is no such folder, or its metrics, evaluations or versions are damaged.
        ConfigError: its config.yaml is not YAML.
    """
    return write_page(Path(run_dir) / "report.html", "report.html", **_values(load_run(run_dir)))


def render(run: Run) -> str:
    """The page as text."""
    return fill("report.html", **_values(run))


def _values(run: Run) -> dict[str, Any]:
    """What the template is filled with."""
    return {
        "run": run,
        "status": status(run),
        "facts": _facts(run),
        "headline": headline(run),
        "training": figures.line_figures(run.metrics, figures.TRAINING),
        "balance": figures.balance_figures(run.metrics),
        "steps_per_point": max(1, -(-len(run.metrics) // MAX_POINTS)),
        "training_checks": figures.training_checks(run.metrics),
        "expert": figures.line_figures(run.metrics, figures.EXPERT_CHARTS),
        "distributions": figures.distribution_figures(run.evaluations),
        "checks": figures.check_rows(run.before, run.after),
        "staleness": figures.staleness_figures(run.metrics),
        "health": figures.line_figures(run.metrics, figures.HEALTH) + figures.importance_figures(run.metrics),
        "times": times(run.metrics),
        "samples": choose(paired_samples(run.before, run.after)),
    }


def status(run: Run) -> dict[str, Any]:
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


def times(metrics: figures.Metrics) -> dict[str, Any]:
    """Where the wall time went, in all and per step."""
    totals = figures.time_totals(metrics)
    whole = sum(seconds for _, seconds, _ in totals)
    per_step = figures.time_figure(metrics)
    return {
        "rows": [(name, seconds, seconds / whole, colour) for name, seconds, colour in totals],
        "bar": share_bar([(seconds, colour) for _, seconds, colour in totals]),
        "figures": ([per_step] if per_step else []) + figures.line_figures(metrics, figures.SPEED),
    }
