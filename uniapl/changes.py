"""What training changed on held-out prompts, with 95 % intervals from resampled prompts (the bootstrap).

The unit is the prompt: tokens and samples of one prompt go together, so that many tokens of few prompts do not look
like much evidence. Before and after are resampled alike, as they are of the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from uniapl.analysis import (
    EvaluatedSample,
    Evaluation,
    Interval,
    histogram,
    paired_difference,
    shared_edges,
    wasserstein_1,
)

RESAMPLES = 500
POINTS = 256
"""At most so many places at which a resample's distribution functions are compared."""
FEW = 8
"""With fewer prompts nothing is called a change: resamples of a handful are too much alike."""


@dataclass(frozen=True)
class Change:
    """A quantity before and after training, and their difference; None where it is not known.

    `better`: +1 where more is better, -1 where less is.
    """

    name: str
    unit: str
    better: int
    before: Interval | None
    after: Interval | None
    difference: Interval | None

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the difference's interval leaves out 0, else `no significant change`."""
        d = self.difference
        if d is None:
            return ""
        if d.count < FEW:
            return "too few prompts to tell"
        if d.low <= 0 <= d.high:
            return "no significant change"
        return "better" if d.value * self.better > 0 else "worse"


def changes(before: Evaluation | None, after: Evaluation | None) -> list[Change]:
    """Of pass rate, reward and the expert's likelihood, as far as they are there."""
    nll = [_mean(_expert_nll(e) if e else None) for e in (before, after)]
    found = [
        _pass_rate(before, after),
        _reward(before, after),
        _change("Expert's negative log-likelihood", "nats per token", -1, *nll),
    ]
    return [change for change in found if change.before or change.after]


def distance_changes(before: Evaluation | None, after: Evaluation | None) -> list[Change]:
    """Of the distances between policy and expert: lengths, and log-probabilities that the policy gives the tokens."""
    found = []
    for name, unit, values in (
        ("Response length", "tokens", _lengths),
        ("Token log-probability", "nats", _logprobs),
    ):
        sides = [values(e) if e else None for e in (before, after)]
        flat = [np.concatenate(part) for side in sides if side for part in (side.policy, side.expert)]
        if not flat:
            continue
        for kind, of, says in (("Wasserstein-1", _Wasserstein(flat), unit), ("Jensen-Shannon", _Shannon(flat), "bits")):
            found.append(
                _change(f"{name}: {kind} to the expert", says, -1, *(of(side) if side else None for side in sides))
            )
    return found


def jensen_shannon(p: Sequence[float], q: Sequence[float]) -> float:
    """The Jensen-Shannon divergence of two histograms over the same bins, in bits: 0 for equal, 1 for disjoint."""
    return float(_jensen_shannon(np.asarray(p, dtype=float)[None], np.asarray(q, dtype=float)[None])[0])


@dataclass(frozen=True)
class _Estimate:
    """A value, the same from each resample, and the number of prompts; of equal `units`: may be paired."""

    value: float
    resampled: np.ndarray
    units: tuple[object, ...]
    count: int
    least: float = -np.inf

    @property
    def interval(self) -> Interval:
        return _interval(self.value, self.resampled, self.count, self.least)


def _interval(value: float, resampled: np.ndarray, count: int, least: float = -np.inf) -> Interval:
    """Percentiles, less what resampling itself adds on average: resamples lie farther apart than samples."""
    low, high = np.quantile(resampled, [0.025, 0.975]) - (resampled.mean() - value)
    return Interval(value, float(max(least, min(low, value))), float(max(high, value)), count)


def _change(name: str, unit: str, better: int, old: _Estimate | None, new: _Estimate | None) -> Change:
    difference = None
    if old is not None and new is not None and old.units == new.units:
        difference = _interval(new.value - old.value, new.resampled - old.resampled, new.count)
    return Change(name, unit, better, old.interval if old else None, new.interval if new else None, difference)


def _pass_rate(before: Evaluation | None, after: Evaluation | None) -> Change:
    old, new = (e.pass_rate if e else None for e in (before, after))
    paired = paired_difference(before, after) if before and after else None
    return Change("Pass rate", "of prompts", 1, old, new, paired.difference if paired else None)


Sums = tuple[tuple[object, ...], np.ndarray, np.ndarray]
"""Of a mean over prompts: their names, and of each the sum and the count of its values."""


def _reward(before: Evaluation | None, after: Evaluation | None) -> Change:
    """Of each on all prompts that it scored; their difference on those that both did."""
    old, new = (_rewards(e) if e else {} for e in (before, after))
    both = [prompt for prompt in old if prompt in new]
    paired = (_mean(_reward_sums({prompt: found[prompt] for prompt in both})) for found in (old, new))
    difference = _change("", "", 1, *paired).difference
    whole = [_mean(_reward_sums(found)) for found in (old, new)]
    return replace(_change("Reward", "", 1, *whole), difference=difference)


def _rewards(e: Evaluation) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for sample in e.samples:
        if sample.reward is not None:
            values.setdefault(sample.prompt_id, []).append(sample.reward)
    return values


def _reward_sums(values: dict[str, list[float]]) -> Sums:
    return tuple(values), np.array([np.mean(v) for v in values.values()]), np.ones(len(values))


def _expert_nll(e: Evaluation) -> Sums:
    """By expert response; the prompts and the lengths tell whether two evaluations are of the same ones."""
    responses = _expert_responses(e)
    return (
        _names(e) if responses else (),
        np.array([-r.sum() for r in responses]),
        np.array([len(r) for r in responses]),
    )


def _expert_responses(e: Evaluation) -> list[np.ndarray]:
    values = np.asarray(e.expert_token_logprobs, dtype=float)
    if sum(e.expert_lengths) != len(values):
        return []
    return [part for part in np.split(values, np.cumsum(e.expert_lengths)[:-1]) if len(part)] if len(values) else []


def _mean(sums: Sums | None) -> _Estimate | None:
    if sums is None or not len(sums[1]):
        return None
    units, total, count = sums
    weights = _resamples(len(total))
    return _Estimate(float(total.sum() / count.sum()), weights @ total / (weights @ count), units, len(total))


@lru_cache(maxsize=8)
def _resamples(units: int) -> np.ndarray:
    """How often each unit is drawn in each resample, [RESAMPLES, units]; the same at every call."""
    draw = np.random.default_rng(units)  # other draws for another number of units
    return draw.multinomial(units, np.full(units, 1 / units), size=RESAMPLES).astype(float)


class Sides(NamedTuple):
    """The values of each prompt's samples and of each expert response, and what tells the prompts from others."""

    policy: list[np.ndarray]
    expert: list[np.ndarray]
    units: tuple[object, ...]


def _lengths(e: Evaluation) -> Sides | None:
    return _sides(e, lambda s: [s.tokens], [np.array([float(n)]) for n in e.expert_lengths])


def _logprobs(e: Evaluation) -> Sides | None:
    return _sides(e, lambda s: s.token_logprobs, _expert_responses(e))


def _sides(e: Evaluation, values: Callable[[EvaluatedSample], list[Any]], expert: list[np.ndarray]) -> Sides | None:
    """None where the policy or the expert has no values."""
    policy = _by_prompt(e, values)
    return Sides(policy, expert, _names(e)) if policy and expert else None


def _names(e: Evaluation) -> tuple[object, ...]:
    return (*dict.fromkeys(sample.prompt_id for sample in e.samples), *e.expert_lengths)


def _by_prompt(e: Evaluation, values: Callable[[EvaluatedSample], list[Any]]) -> list[np.ndarray]:
    found: dict[str, list[float]] = {}
    for sample in e.samples:
        found.setdefault(sample.prompt_id, []).extend(values(sample))
    return [np.asarray(v, dtype=float) for v in found.values() if v]


class _Wasserstein:
    """The area between two distribution functions; of resamples at `POINTS` quantiles of all values."""

    def __init__(self, flat: list[np.ndarray]) -> None:
        everything = np.concatenate(flat)
        self._points = np.unique(np.quantile(everything, np.linspace(0, 1, POINTS), method="nearest"))

    def __call__(self, sides: Sides) -> _Estimate:
        policy, expert = ([np.searchsorted(np.sort(v), self._points, "right") for v in side] for side in sides[:2])
        gaps = np.abs(_shares(policy, _sizes(sides.policy)) - _shares(expert, _sizes(sides.expert)))
        value = wasserstein_1(*(np.concatenate(side).tolist() for side in sides[:2]))
        return _Estimate(value, gaps[:, :-1] @ np.diff(self._points), sides.units, len(sides.policy), least=0.0)


class _Shannon:
    """The Jensen-Shannon divergence of histograms over the bins that all values share."""

    def __init__(self, flat: list[np.ndarray]) -> None:
        self._edges = shared_edges([values.tolist() for values in flat])

    def __call__(self, sides: Sides) -> _Estimate:
        value = jensen_shannon(*(histogram(np.concatenate(side).tolist(), self._edges) for side in sides[:2]))
        policy, expert = ([self._counts(values) for values in side] for side in sides[:2])
        resampled = _jensen_shannon(_shares(policy, _sizes(sides.policy)), _shares(expert, _sizes(sides.expert)))
        return _Estimate(value, resampled, sides.units, len(sides.policy), least=0.0)

    def _counts(self, values: np.ndarray) -> np.ndarray:
        """Values in each bin, [bins]; what lies outside counts in the outermost ones."""
        places = np.searchsorted(self._edges, values, side="right") - 1
        return np.bincount(np.clip(places, 0, len(self._edges) - 2), minlength=len(self._edges) - 1)


def _shares(counts: list[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """Of each resample the share of its values in every place, [RESAMPLES, places]."""
    weights = _resamples(len(sizes))
    return weights @ np.array(counts, dtype=float) / (weights @ sizes)[:, None]


def _sizes(side: list[np.ndarray]) -> np.ndarray:
    return np.array([len(values) for values in side], dtype=float)


def _jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Row by row, [rows]."""
    middle = (p + q) / 2

    def divergence(a: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(a > 0, a * np.log2(a / middle), 0.0).sum(axis=1)

    return np.maximum(0.0, (divergence(p) + divergence(q)) / 2)
