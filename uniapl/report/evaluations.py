"""The held-out pass rate over training, from evaluations before, beside and after it."""

from __future__ import annotations

from pathlib import Path

from uniapl.analysis import Evaluation
from uniapl.report.axes import percent
from uniapl.report.charts import Figure, Series, line_chart


def load_beside(run_dir: Path) -> list[Evaluation]:
    """What `evaluation.every` wrote, by step.

    Raises:
        RunError: a file is no saved evaluation.
    """
    return sorted((Evaluation.load(path) for path in (run_dir / "eval").glob("step-*.json")), key=lambda e: e.step)


def pass_rate_curve(before: Evaluation | None, beside: list[Evaluation], after: Evaluation | None) -> Figure | None:
    """The pass rate with both ends of its 95 % interval; None where there is none beside training."""
    if not beside:
        return None
    every = [e for e in (before, *beside, after) if e is not None]
    rates = [(e.step, rate) for e in every if (rate := e.pass_rate) is not None]
    steps = [float(step) for step, _ in rates]
    series = [
        Series("pass rate", steps, [rate.value for _, rate in rates], "c1", "dots"),
        Series("95 % interval, from", steps, [rate.low for _, rate in rates], "c6", "plain"),
        Series("to", steps, [rate.high for _, rate in rates], "c6", "plain"),
    ]
    figure = line_chart("Held-out pass rate over training", series, "share", percent)
    spanning = sum(len(e.versions) > 1 for e in beside)
    if figure is None or not spanning:
        return figure
    of = f"{spanning} of {len(beside)} evaluations beside training took" if len(beside) > 1 else "The one took"
    note = f"{of} so long that new weights came in between; they stand at the step of the first."
    return Figure(figure.title, figure.svg, figure.legend, note)
