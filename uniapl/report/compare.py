"""The comparison of several runs: curves over each other, final numbers, and only what differs in their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from uniapl.analysis import EvaluatedSample, Evaluation, histogram, shared_edges
from uniapl.changes import Change, changes, distance_changes
from uniapl.config_errors import ConfigError, masked
from uniapl.report import figures
from uniapl.report.axes import Format, clock, compact, percent
from uniapl.report.charts import Figure, histogram_chart, interval_chart, line_chart, share_bar
from uniapl.report.headline import CLASSES, Row, row, with_interval
from uniapl.report.html import write_page
from uniapl.report.page import status
from uniapl.report.run import Run, load_run

MAX_RUNS = 12
"""Six colours, each as a whole and as a dashed line."""
MAX_SAMPLES = 6
NOT_SETTINGS = ("run.name", "run.folder")


class Curve(NamedTuple):
    """One metric, with a line for each run."""

    title: str
    key: str
    unit: str
    show: Format = compact
    zero: bool = False


CURVES = [
    Curve("Reward of the rollouts", "reward/mean", "per sample", zero=True),
    Curve("Pass rate of the rollouts", "reward/pass_rate", "of samples", percent, True),
    Curve("Loss", "loss/total", "weighted sum"),
    Curve("Preference loss", "loss/preference", "unweighted"),
    Curve("Demonstration loss", "loss/demonstration", "nats per token"),
    Curve("Adversarial loss", "loss/adversarial", "unweighted"),
    Curve("Expert's text under the policy", "expert/nll", "nats per token"),
    Curve("Discriminator gap", "discriminator/gap", "score"),
    Curve("Discriminator accuracy", "discriminator/accuracy", "of pairs", percent),
    Curve("Response length in training", "length/sample_mean", "tokens", zero=True),
    Curve("Demonstrations' share of the loss", "share/demonstration", "|term| / sum", percent, True),
    Curve("Entropy of the policy", "entropy/estimate", "nats per token", zero=True),
    Curve("KL, learner to reference", "kl/reference", "nats per token", zero=True),
    Curve("KL, learner to engine", "kl/behaviour", "nats per token", zero=True),
    Curve("Gradient norm", "learner/grad_norm", "norm", zero=True),
    Curve("Staleness", "staleness/mean", "weight versions", zero=True),
    Curve("Wall time of a step", "time/step", "seconds", zero=True),
    Curve("Tokens generated", "tokens/generated_per_s", "per second", zero=True),
    Curve("Tokens trained", "tokens/trained_per_s", "per second", zero=True),
]


def write_comparison(folders: Sequence[Path], out: Path | None = None) -> Path:
    """One self-contained HTML file that compares runs with the first of them; its path.

    Args:
        folders: of 2 to 12 runs.
        out: the file; None: `comparison.html` beside the first run's folder.

    Raises:
        ConfigError: too many runs, the same one twice, or a config.yaml that is not YAML.
        RunError: a folder is not there, or holds damaged files.
    """
    if len(folders) > MAX_RUNS:
        raise ConfigError(f"report: got {len(folders)} runs; allowed: at most {MAX_RUNS} in one comparison")
    places = [Path(folder).resolve() for folder in folders]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise ConfigError(f"{folders[index]}: the same run a second time; allowed: each run once")
    runs = _told_apart([load_run(Path(folder)) for folder in folders], folders)
    return write_page(out or places[0].parent / "comparison.html", "comparison.html", **_values(runs))


def _told_apart(runs: list[Run], folders: Sequence[Path]) -> list[Run]:
    """Runs of the same name are called by their folders."""
    names = [run.name for run in runs]
    return [
        replace(run, name=str(folder)) if names.count(run.name) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def colour(index: int) -> str:
    """The classes of a run's line."""
    return figures.COLOURS[index % len(figures.COLOURS)] + (" dashed" if index >= len(figures.COLOURS) else "")


def _values(runs: list[Run]) -> dict[str, Any]:
    """What the template is filled with."""
    against = [_against(runs[0], run) for run in runs[1:]]
    return {
        "runs": [(run, colour(index), status(run)["text"]) for index, run in enumerate(runs)],
        "names": [run.name for run in runs],
        "first": runs[0].name,
        "differences": [(run.name, found) for run, found in zip(runs[1:], against, strict=True)],
        "numbers": _numbers(runs, against),
        "rates": _rates(runs),
        "curves": [figure for curve in CURVES if (figure := _overlaid(runs, curve))],
        "distributions": _distributions(runs),
        "times": _times(runs),
        "samples": _samples(runs),
        "settings": _different([_flat(run.config) for run in runs], NOT_SETTINGS),
        "versions": _different([dict(run.versions) for run in runs]),
    }


def _against(first: Run, run: Run) -> list[Row]:
    """This run after training against the first one, on the prompts that both evaluated."""
    found = changes(first.after, run.after) + distance_changes(first.after, run.after)
    return [_difference(change) for change in found if change.after]


def _difference(change: Change) -> Row:
    told = row(change)
    return told._replace(cells=[(text.replace("change", "difference"), kind) for text, kind in told.cells])


def _numbers(runs: list[Run], against: list[list[Row]]) -> list[Row]:
    """The final numbers, a row for each quantity with a cell for each run."""
    made = [f"{len(run.metrics)} of {run.planned_steps or '?'}" for run in runs]
    rows = [Row("Optimizer steps", "", [(text, "") for text in made])]
    before = [e.pass_rate if e else None for e in (run.before for run in runs)]
    rows.append(Row("Pass rate before", "of prompts", [(with_interval(rate, percent), "") for rate in before]))
    own = [[row(c) for c in changes(run.before, run.after) + distance_changes(run.before, run.after)] for run in runs]
    names = {told.name: told.small for rows_of_run in own for told in rows_of_run}
    for name, unit in names.items():
        known = [next((told for told in rows_of_run if told.name == name), None) for rows_of_run in own]
        rows.append(Row(f"{name} after", unit, [(told.cells[1][0] if told else "", "") for told in known]))
        changed = [told.cells[2][0] if told else "" for told in known]
        kinds = [told.kind if told and told.kind in CLASSES.values() else "" for told in known]
        rows.append(Row(f"{name}, change in the run", unit, list(zip(changed, kinds, strict=True))))
        others = [next((told for told in found if told.name == name), None) for found in against]
        cells = [("–", ""), *((told.cells[2][0], told.kind) if told else ("", "") for told in others)]
        rows.append(Row(f"{name}, against {runs[0].name}", unit, cells))
    seconds = [sum(record.get("time/step", 0.0) for record in run.metrics) for run in runs]
    rows.append(Row("Time in steps", "", [(clock(s) if s else "", "") for s in seconds]))
    return [found for found in rows if any(text not in ("", "–") for text, _ in found.cells)]


def _rates(runs: list[Run]) -> Figure | None:
    known = [(run.name, run.after.pass_rate, colour(i)) for i, run in enumerate(runs) if run.after]
    rows = [(name, rate, kind) for name, rate, kind in known if rate]
    if not rows:
        return None
    figure = interval_chart("Held-out pass rate after training", rows, named=False)
    return replace(figure, legend=[(kind, name) for name, _, kind in rows])


def _overlaid(runs: list[Run], curve: Curve) -> Figure | None:
    lines = [figures.series(run.metrics, curve.key, run.name, colour(i)) for i, run in enumerate(runs)]
    steps = [record["step"] for run in runs for record in run.metrics]
    span = (min(steps), max(steps)) if steps else None
    figure = line_chart(curve.title, lines, curve.unit, curve.show, curve.zero, span)
    return figure and replace(figure, legend=[(line.colour, line.name) for line in lines if len(line.xs)])


def _distributions(runs: list[Run]) -> list[Figure]:
    """Response lengths of all runs and the expert, and log-probabilities of each run's own tokens."""
    known = [(run, run.after, colour(index)) for index, run in enumerate(runs) if run.after]
    experts = {tuple(e.expert_lengths) for _, e, _ in known if e.expert_lengths}
    expert = [("expert", list(found), "c0") for found in experts] if len(experts) == 1 else []
    lengths = expert + [(run.name, e.lengths, kind) for run, e, kind in known]
    own = [(run.name, e.token_logprobs, kind) for run, e, kind in known]
    to_expert = [(run.name, e.expert_token_logprobs, kind) for run, e, kind in known]
    made = [
        _histogram("Response length after training", lengths, "tokens"),
        _histogram("Log-probability of the policy's own tokens", own, "nats"),
        _histogram("Log-probability of the expert's tokens", to_expert, "nats"),
    ]
    return [figure for figure in made if figure]


def _histogram(title: str, layers: list[tuple[str, list[Any], str]], unit: str) -> Figure | None:
    layers = [layer for layer in layers if layer[1]]
    if not layers:
        return None
    edges = shared_edges([values for _, values, _ in layers])
    drawn = [(name, histogram(values, edges), kind) for name, values, kind in layers]
    return histogram_chart(title, edges, drawn, unit, max(max(shares) for _, shares, _ in drawn))


def _times(runs: list[Run]) -> dict[str, Any]:
    """Seconds and share of every part of the steps, a column for each run."""
    totals = [{name: seconds for name, seconds, _ in figures.time_totals(run.metrics)} for run in runs]
    spent = [(name, kind) for name, kind in figures.TIMES if any(name in found for found in totals)]
    rows = [Row(name, "", [(_share(found, name), "") for found in totals]) for name, _ in spent]
    bars = [
        (run.name, share_bar([(seconds, kind) for _, seconds, kind in figures.time_totals(run.metrics)]))
        for run, found in zip(runs, totals, strict=True)
        if found
    ]
    return {"rows": rows, "bars": bars, "legend": [(kind, name) for name, kind in spent]}


def _share(found: dict[str, float], name: str) -> str:
    return f"{clock(found[name])} ({percent(found[name] / sum(found.values()))})" if name in found else ""


def _samples(runs: list[Run]) -> list[tuple[EvaluatedSample, list[tuple[str, EvaluatedSample | None]]]]:
    """The first prompts on which the runs' outcomes differ, with every run's response."""
    firsts = [(run.name, _first_samples(run.after)) for run in runs]
    prompts = dict.fromkeys(prompt for _, found in firsts for prompt in found)
    chosen = []
    for prompt in prompts:
        samples = [(name, found.get(prompt)) for name, found in firsts]
        known = [sample for _, sample in samples if sample]
        if len(known) > 1 and len({sample.passed for sample in known}) > 1:
            chosen.append((known[0], samples))
    return chosen[:MAX_SAMPLES]


def _first_samples(evaluation: Evaluation | None) -> dict[str, EvaluatedSample]:
    samples = evaluation.samples if evaluation else []
    return {sample.prompt_id: sample for sample in reversed(samples)}


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Every value of a configuration under its dotted key, without passwords in addresses."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: masked(_yaml_word(tree))}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}


def _yaml_word(value: Any) -> str:
    words: dict[Any, str] = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _different(tables: list[dict[str, str]], left_out: Sequence[str] = ()) -> list[Row]:
    """A row for each key whose values differ."""
    keys = sorted({key for table in tables for key in table} - {*left_out, ""})
    found = [(key, [table.get(key) for table in tables]) for key in keys]
    return [Row(key, "", [(v or "", "") for v in values]) for key, values in found if len(set(values)) > 1]
