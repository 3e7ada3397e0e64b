"""Which charts the report shows, made from a run's metrics and evaluations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from uniapl.analysis import Comparison, Evaluation, Interval, compare_lengths, compare_logprobs
from uniapl.metrics import OLDEST
from uniapl.report.axes import Format, compact, percent
from uniapl.report.charts import Figure, Series, band_chart, histogram_chart, line_chart, rate_bars, stacked_chart

Metrics = list[dict[str, Any]]
COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
PREFERENCE, DEMONSTRATION, ADVERSARIAL, KL = "c1", "c2", "c3", "c4"
TERMS = (("preference", PREFERENCE), ("demonstration", DEMONSTRATION), ("adversarial", ADVERSARIAL), ("kl", KL))
PAIRS = (
    ("demonstration", "preference"),
    ("demonstration", "adversarial"),
    ("demonstration", "kl"),
    ("preference", "adversarial"),
    ("preference", "kl"),
    ("adversarial", "kl"),
)
SHORT = {"demonstration": "demo", "preference": "pref", "adversarial": "adv", "kl": "kl"}
DOTTED = ("gradient/", "entropy/exact")
"""Metrics of diagnostic steps only, drawn with a dot at each."""
PLAIN = ("weight/", "queue/resampled", "queue/kept_equal", "queue/dropped", "queue/stale_used")
"""Metrics without noise, drawn as they are."""
BEFORE, AFTER = "c6", "c1"
POLICY, EXPERT = "c1", "c2"
TIMES = (
    *(("generate", "c1"), ("score", "c2"), ("wait", "c3"), ("train", "c4")),
    *(("evaluate", "c7"), ("broadcast", "c5"), ("other", "c6")),
)
"""Parts of a step's time, with their colours."""


class Chart(NamedTuple):
    """A chart over optimizer steps. `lines`: (metric, name, colour); `nonzero`: without lines that are 0 throughout."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    unit: str
    show: Format = compact
    zero: bool = False
    note: str = ""
    nonzero: bool = False


TRAINING = [
    Chart(
        "Reward of the rollouts",
        (("reward/mean", "mean reward", "c1"), ("reward/pass_rate", "pass rate", "c2")),
        "per sample",
        zero=True,
    ),
    Chart("Loss", (("loss/total", "total", "c6"),), "weighted sum"),
    Chart("Preference loss", (("loss/preference", "L_pref", PREFERENCE),), "unweighted"),
    Chart("Demonstration loss", (("loss/demonstration", "L_demo", DEMONSTRATION),), "nats per token"),
    Chart("Adversarial loss", (("loss/adversarial", "L_adv", ADVERSARIAL),), "unweighted"),
    Chart(
        "Groups that teach nothing by reward",
        (("reward/zero_advantage_groups", "all samples rewarded alike", "c4"),),
        "of groups",
        percent,
        zero=True,
    ),
    Chart(
        "Groups of equal rewards so far",
        (("queue/resampled", "sampled again", "c1"), ("queue/kept_equal", "kept", "c4")),
        "groups",
        zero=True,
        nonzero=True,
    ),
]
WEIGHTS = Chart(
    "Weights of the terms",
    tuple((f"weight/{term}", term, colour) for term, colour in TERMS),
    "factor",
    zero=True,
    nonzero=True,
)
GRADIENTS = [
    Chart(
        "Gradient norm of each term",
        tuple((f"gradient/norm_{term}", term, colour) for term, colour in TERMS),
        "norm",
        zero=True,
        note="On diagnostic steps.",
    ),
    Chart(
        "Cosines between the terms' gradients",
        tuple(
            (f"gradient/cosine_{a}_{b}", f"{SHORT[a]}, {SHORT[b]}", c) for (a, b), c in zip(PAIRS, COLOURS, strict=True)
        ),
        "cosine",
        zero=True,
        note="On diagnostic steps. Below 0 two terms pull against each other.",
    ),
]
EXPERT_CHARTS = [
    Chart(
        "Discriminator score",
        (("discriminator/expert_mean", "expert", EXPERT), ("discriminator/sample_mean", "policy", POLICY)),
        "score",
    ),
    Chart(
        "Discriminator gap",
        (("discriminator/gap", "expert − policy", "c3"),),
        "score",
        note="0: the discriminator cannot tell them apart.",
    ),
    Chart(
        "Discriminator accuracy",
        (("discriminator/accuracy", "expert above policy", "c3"),),
        "of pairs",
        percent,
        note="50 %: the discriminator cannot tell them apart.",
    ),
    Chart("Discriminator margin", (("discriminator/margin", "expert − policy", "c3"),), "logits"),
    Chart("Discriminator loss", (("discriminator/loss", "Bradley-Terry", "c3"),), "nats per pair", zero=True),
    Chart("Expert's text under the policy", (("expert/nll", "negative log-likelihood", EXPERT),), "nats per token"),
    Chart(
        "Response length in training",
        (("length/demonstration_mean", "expert", EXPERT), ("length/sample_mean", "policy", POLICY)),
        "tokens",
        zero=True,
    ),
    Chart("Responses cut off at the limit", (("length/truncated", "cut off", "c4"),), "of samples", percent, True),
]
HEALTH = [
    Chart(
        "Entropy of the policy",
        (("entropy/estimate", "estimate, −log π of the samples", "c1"), ("entropy/exact", "exact", "c4")),
        "nats per token",
        zero=True,
    ),
    Chart("KL, learner to reference", (("kl/reference", "k3 estimate", KL),), "nats per token", zero=True),
    Chart(
        "KL, learner to engine",
        (("kl/behaviour", "k3 estimate", "c1"),),
        "nats per token",
        zero=True,
    ),
    Chart("Probability ratio", (("ratio/mean", "mean", "c1"), ("ratio/max", "largest", "c4")), "π_θ / π_prox"),
    Chart(
        "Clipped tokens",
        (
            ("ratio/clip_fraction", "preference", PREFERENCE),
            ("ratio/clip_fraction_adversarial", "adversarial", ADVERSARIAL),
        ),
        "of tokens",
        percent,
        True,
    ),
    Chart("Rollout correction", (("correction/mean", "mean", "c3"),), "κ"),
    Chart(
        "Tokens left out by the correction",
        (("correction/masked_fraction", "κ = 0", "c4"),),
        "of tokens",
        percent,
        zero=True,
        nonzero=True,
    ),
    Chart("Effective sample size", (("importance/ess", "n_eff / n", "c1"),), "of tokens", percent, True),
    Chart("Gradient norm", (("learner/grad_norm", "before clipping", "c5"),), "norm", zero=True),
    Chart("Learning rate", (("learner/learning_rate", "learning rate", "c6"),), "per step", zero=True),
    Chart(
        "Queue",
        (("queue/ready", "groups ready", "c1"), ("queue/open", "prompts leased", "c2")),
        "groups",
        zero=True,
    ),
]
STALENESS = [
    Chart(
        "Staleness",
        (("staleness/mean", "mean", "c1"), ("staleness/max", "largest", "c4")),
        "weight versions",
        zero=True,
        note="Optimizer steps between the weights that sampled a token and those that it trained.",
    ),
    Chart(
        "Stale and unscored groups so far",
        (
            ("queue/dropped_stale", "too stale, dropped", "c4"),
            ("queue/stale_used", "too stale, used and corrected", "c1"),
            ("queue/dropped_unscored", "unscored, dropped", "c2"),
        ),
        "groups",
        zero=True,
    ),
    Chart(
        "Rows passed over or cut so far",
        (
            ("queue/skipped_prompts", "bad, as prompts", "c4"),
            ("queue/skipped_demonstrations", "bad, as demonstrations", "c2"),
            ("queue/cut_experts", "expert response cut", "c1"),
        ),
        "rows",
        zero=True,
        nonzero=True,
    ),
]
SPEED = [
    Chart(
        "Throughput",
        (("tokens/generated_per_s", "generated", "c1"), ("tokens/trained_per_s", "trained", "c3")),
        "tokens/s",
        zero=True,
    ),
    Chart(
        "Packing efficiency",
        (("learner/packing_efficiency", "row tokens in use", "c5"),),
        "of tokens",
        percent,
        True,
    ),
]


class CheckRow(NamedTuple):
    """One constraint's pass rate before and after, and the picture of it."""

    name: str
    before: Interval | None
    after: Interval | None
    picture: object


def series(metrics: Metrics, key: str, name: str, colour: str) -> Series:
    """A metric over the steps that have it."""
    found = [(record["step"], record[key]) for record in metrics if key in record]
    style: Any = "dots" if key.startswith(DOTTED) else "plain" if key.startswith(PLAIN) else "smooth"
    return Series(name, [step for step, _ in found], [value for _, value in found], colour, style)


def line_figures(metrics: Metrics, charts: Sequence[Chart]) -> list[Figure]:
    """The charts for which this run has metrics."""
    made = []
    for chart in charts:
        lines = [series(metrics, *line) for line in chart.lines]
        lines = [line for line in lines if any(line.ys) or not chart.nonzero]
        figure = line_chart(chart.title, lines, chart.unit, chart.show, chart.zero, _span(metrics))
        if figure is not None:
            made.append(Figure(figure.title, figure.svg, figure.legend, chart.note))
    return made


def _span(metrics: Metrics) -> tuple[float, float] | None:
    """First and last step of the run: the same axis for what only some of its steps have."""
    return (metrics[0]["step"], metrics[-1]["step"]) if metrics else None


def share_figure(metrics: Metrics) -> Figure | None:
    """What part of the loss each term was, step by step."""
    layers = [series(metrics, f"share/{name}", name, colour) for name, colour in TERMS]
    return stacked_chart("Shares of the weighted loss", [s for s in layers if any(s.ys)], "|term| / sum", percent)


def gradient_share_figure(metrics: Metrics) -> Figure | None:
    """What part of the gradient each term was, on the steps that measured it."""
    layers = []
    for name, colour in TERMS:
        found = [(m["step"], m[f"gradient/norm_{name}"], _norms(m)) for m in metrics if f"gradient/norm_{name}" in m]
        shares = [norm / whole if whole else 0.0 for _, norm, whole in found]
        layers.append(Series(name, [step for step, _, _ in found], shares, colour))
    figure = stacked_chart("Shares of the gradient", [s for s in layers if any(s.ys)], "norm / sum of norms", percent)
    note = "Norm of each weighted term's gradient, on diagnostic steps."
    return Figure(figure.title, figure.svg, figure.legend, note) if figure else None


def _norms(record: dict[str, Any]) -> float:
    return float(sum(record.get(f"gradient/norm_{name}", 0.0) for name, _ in TERMS))


def balance_figures(metrics: Metrics) -> list[Figure]:
    """What the weights are tuned by: the weights, and what each term adds to loss and gradient."""
    shares = [figure for figure in (share_figure(metrics), gradient_share_figure(metrics)) if figure]
    return line_figures(metrics, [WEIGHTS]) + shares + line_figures(metrics, GRADIENTS)


def staleness_figures(metrics: Metrics) -> list[Figure]:
    """How old the sampled tokens were, in the mean and by age, and what was too old."""
    ages = sorted(
        {key for record in metrics for key in record if re.fullmatch(r"staleness/age_\d{1,3}", key)},
        key=lambda key: int(key.removeprefix("staleness/age_")),
    )
    names = [f"age {key[14:]}" + (" or more" if key[14:] == str(OLDEST) else "") for key in ages]
    layers = [series(metrics, key, name, COLOURS[i % 6]) for i, (key, name) in enumerate(zip(ages, names, strict=True))]
    by_age = stacked_chart("Tokens by age", layers, "of tokens", percent)
    drawn = line_figures(metrics, STALENESS)
    return drawn[:1] + ([by_age] if by_age else []) + drawn[1:]


def importance_figures(metrics: Metrics) -> list[Figure]:
    """How far the sampled tokens' probabilities lie apart in learner and engine."""
    names = {"min": "smallest", "p01": "1 %", "p50": "median", "p99": "99 %", "max": "largest"}
    whole = [record for record in metrics if all(f"importance/{name}" in record for name in names)]
    smallest, low, median, high, largest = (series(whole, f"importance/{k}", name, "c1") for k, name in names.items())
    title, unit = "Importance weights", "π_θ / π_b per token"
    figure = band_chart(title, low, median, high, [smallest, largest], unit, _span(metrics))
    note = "Line: median. Band: 1 % to 99 % of the sampled tokens. Smallest and largest: under the pointer."
    return [Figure(figure.title, figure.svg, figure.legend, note)] if figure else []


def time_figure(metrics: Metrics) -> Figure | None:
    """Where the seconds of each step went."""
    layers = [series(metrics, f"time/{name}", name, colour) for name, colour in TIMES]
    return stacked_chart("Wall time of a step", [s for s in layers if any(s.ys)], "seconds")


def time_totals(metrics: Metrics) -> list[tuple[str, float, str]]:
    """(name, seconds over all steps, colour) of each part of the steps."""
    totals = [(name, sum(record.get(f"time/{name}", 0.0) for record in metrics), colour) for name, colour in TIMES]
    return [row for row in totals if row[1] > 0]


def distribution_figures(evaluations: list[tuple[str, Evaluation]]) -> list[Figure]:
    """Response lengths and token log-probabilities, policy against expert, a chart for each evaluation."""
    names, loaded = [name for name, _ in evaluations], [evaluation for _, evaluation in evaluations]
    lengths = _histograms("Response length", names, compare_lengths(loaded), "tokens")
    return lengths + _histograms("Token log-probability", names, compare_logprobs(loaded), "nats")


def check_rows(before: Evaluation | None, after: Evaluation | None) -> list[CheckRow]:
    """Every constraint's pass rates, in order of name."""
    old, new = (evaluation.check_rates if evaluation else {} for evaluation in (before, after))
    rows = []
    for name in sorted(old.keys() | new.keys()):
        bars = [(rate, colour) for rate, colour in ((old.get(name), BEFORE), (new.get(name), AFTER)) if rate]
        rows.append(CheckRow(name, old.get(name), new.get(name), rate_bars(bars)))
    return rows


def training_checks(metrics: Metrics) -> list[tuple[str, float, float]]:
    """(constraint, mean pass rate in the first fifth of its steps, in the last fifth), in order of name."""
    rows = []
    for key in sorted({key for record in metrics for key in record if key.startswith("check/")}):
        rates = [record[key] for record in metrics if key in record]
        count = max(1, len(rates) // 5)
        rows.append((key.removeprefix("check/"), sum(rates[:count]) / count, sum(rates[-count:]) / count))
    return rows


def _histograms(title: str, names: list[str], found: list[Comparison | None], unit: str) -> list[Figure]:
    known = [(name, one) for name, one in zip(names, found, strict=True) if one is not None]
    top = max((max(one.policy + one.expert) for _, one in known), default=1.0)
    figures = []
    for name, one in known:
        layers = [("expert", one.expert, EXPERT), ("policy", one.policy, POLICY)]
        figure = histogram_chart(f"{title}, {name}", one.edges, layers, unit, top)
        note = (
            f"Mean {compact(one.policy_mean)} {unit}, expert {compact(one.expert_mean)}. "
            f"Distance: Wasserstein-1 {compact(one.wasserstein)} {unit}, KS {compact(one.ks)}."
        )
        figures.append(Figure(figure.title, figure.svg, figure.legend, note))
    return figures
