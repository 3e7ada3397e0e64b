"""The report's first words: what changed on held-out prompts, by how much, and whether that may be chance."""

from __future__ import annotations

from typing import Any, NamedTuple

from uniapl.analysis import Interval, paired_difference
from uniapl.changes import Change, changes, distance_changes
from uniapl.report.axes import compact, percent, points
from uniapl.report.charts import interval_chart
from uniapl.report.figures import AFTER, BEFORE
from uniapl.report.run import Run

CLASSES = {"better": "pass", "worse": "fail"}


class Row(NamedTuple):
    """A row of a table: its name, a word on it, and the text and class of each cell."""

    name: str
    small: str
    cells: list[tuple[str, str]]

    @property
    def verdict(self) -> str:
        return self.cells[-1][0]

    @property
    def kind(self) -> str:
        return self.cells[-1][1]


def headline(run: Run) -> dict[str, Any]:
    """Held-out pass rates, what else changed, and the chart of the rates; empty parts where there is no evaluation."""
    rates: list[tuple[str, Interval, str]] = []
    for name, evaluation, colour in (("before", run.before, BEFORE), ("after", run.after, AFTER)):
        rate = evaluation.pass_rate if evaluation else None
        if rate is not None:
            rates.append((name, rate, colour))
    paired = paired_difference(run.before, run.after) if run.before and run.after else None
    rows, distances = ([row(c) for c in find(run.before, run.after)] for find in (changes, distance_changes))
    return {
        "rates": rates,
        "paired": paired,
        "verdict": rows[0].verdict if paired else "",
        "rows": rows,
        "distances": distances,
        "sure": [one for one in rows[1:] + distances if one.verdict in CLASSES],
        "figure": interval_chart("Held-out pass rate", rates) if rates else None,
        "unscored": [(n, e.unscored) for n, e in (("before", run.before), ("after", run.after)) if e and e.unscored],
    }


def row(change: Change) -> Row:
    """The change as text."""
    fraction = change.unit == "of prompts"
    show, differ = (percent, points) if fraction else (compact, _signed)
    cells = [
        (with_interval(change.before, show), ""),
        (with_interval(change.after, show), ""),
        (with_interval(change.difference, differ, " points" if fraction else ""), ""),
        (change.verdict, CLASSES.get(change.verdict, "none")),
    ]
    return Row(change.name, change.unit, cells)


def with_interval(interval: Interval | None, show: Any, after: str = "") -> str:
    """Such as `19 % (11 % to 30 %)`; empty for None."""
    return f"{show(interval.value)}{after} ({show(interval.low)} to {show(interval.high)})" if interval else ""


def _signed(value: float) -> str:
    return f"+{compact(value)}" if value > 0 else compact(value)
