"""How well the policy does on held-out prompts, and how close it came to the expert.

An `Evaluation` is made before and after training on the same prompts. Compared are pass rates (paired
by prompt) and two distributions: response lengths in tokens, and the log-probabilities that the policy
gives its own samples' tokens and the expert's tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uniapl.runlog import RunError, strict_json

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class EvaluatedSample:
    """One response to a held-out prompt. `prompt` is the last user message; `token_logprobs`: [tokens]."""

    prompt_id: str
    prompt: str
    response: str
    tokens: int
    reward: float | None
    """None: it could not be scored; such a sample is counted, never taken for a failure."""
    checks: dict[str, bool]
    expert_response: str | None
    token_logprobs: list[float]

    @property
    def passed(self) -> bool | None:
        """Every check holds, or, where there are none, the reward is at least 1; None when unscored."""
        if self.reward is None:
            return None
        return all(self.checks.values()) if self.checks else self.reward >= 1.0


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval, and the number of independent units behind it."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Evaluation:
    """The policy after `step` optimizer steps, on held-out prompts.

    `expert_lengths`: tokens of each expert response; `expert_token_logprobs`: what the policy gives the
    expert's tokens, all responses in a row. `versions`: of the weights that the samples' tokens were drawn from; beside
    training that is asynchronous they may be several. Made beside training, it has no log-probabilities.
    """

    step: int
    samples: list[EvaluatedSample]
    expert_lengths: list[int]
    expert_token_logprobs: list[float]
    versions: list[int] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            RunError: a number in it is not finite.
        """
        path = Path(path)
        try:
            text = json.dumps(dataclasses.asdict(self), allow_nan=False)
        except ValueError:
            raise RunError(f"{path}: the evaluation holds a number that is not finite; allowed: finite ones") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".tmp")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            RunError: the file is missing or is no saved evaluation.
        """
        try:
            tree = strict_json(Path(path).read_text(encoding="utf-8"))
            samples = [EvaluatedSample(**sample) for sample in tree.pop("samples")]
            return cls(samples=samples, **tree)
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}; allowed: a saved evaluation") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise RunError(f"{path}: not a saved evaluation; allowed: JSON with the fields of one") from None

    @property
    def unscored(self) -> int:
        """Samples that no reward could judge."""
        return sum(sample.reward is None for sample in self.samples)

    @property
    def lengths(self) -> list[int]:
        """Response lengths in tokens."""
        return [sample.tokens for sample in self.samples]

    @property
    def token_logprobs(self) -> list[float]:
        """Log-probabilities of the policy's own sampled tokens, all samples in a row."""
        return [value for sample in self.samples for value in sample.token_logprobs]

    @property
    def prompt_rates(self) -> dict[str, float]:
        """Share of passing samples of each prompt that has a scored one."""
        return _rates((sample.prompt_id, sample.passed) for sample in self.samples)

    @property
    def pass_rate(self) -> Interval | None:
        """Mean pass rate over prompts with its Wilson interval; None when nothing was scored.

        Several samples of one prompt count as one unit: the interval is rather too wide than too narrow.
        """
        return _mean_interval(self.prompt_rates.values())

    @property
    def check_rates(self) -> dict[str, Interval]:
        """Pass rate of each check over the scored samples that it applies to."""
        outcomes: dict[str, list[float]] = {}
        for sample in self.samples:
            for name, passed in sample.checks.items() if sample.reward is not None else ():
                outcomes.setdefault(name, []).append(float(passed))
        found = {name: _mean_interval(values) for name, values in sorted(outcomes.items())}
        return {name: interval for name, interval in found.items() if interval is not None}


@dataclass(frozen=True)
class PairedDifference:
    """After minus before on the prompts that both evaluations scored."""

    difference: Interval
    gained: int
    """Prompts with a higher pass rate than before."""
    lost: int
    """Prompts with a lower one."""


@dataclass(frozen=True)
class Comparison:
    """Policy against expert as two histograms over the same bins, and two distances between them.

    `edges`: [bins + 1], `policy` and `expert`: [bins], fractions that sum to 1; `wasserstein` has the
    values' unit, `ks` is within [0, 1]. What lies outside the edges is counted in the outermost bins.
    """

    edges: list[float]
    policy: list[float]
    expert: list[float]
    wasserstein: float
    ks: float
    policy_mean: float
    expert_mean: float


def wilson_interval(rate: float, count: int) -> Interval:
    """Wilson's score interval of a proportion (95 %).

    Raises:
        ValueError: the count is not positive, or the rate lies outside [0, 1].
    """
    if count <= 0 or not 0 <= rate <= 1:
        raise ValueError(f"rate {rate} of {count}; allowed: a rate within [0, 1] of at least one")
    z2 = Z_95**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Interval(rate, max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half)), count)


def paired_difference(before: Evaluation, after: Evaluation) -> PairedDifference | None:
    """How much the pass rate changed, paired by prompt; None when no prompt was scored both times.

    The interval is Bonett and Price's for paired proportions (2012): Wald's on the data with one gained
    and one lost prompt added, so that a few or no changes do not give an interval of no width.
    """
    old, new = before.prompt_rates, after.prompt_rates
    changes = np.array([new[prompt] - old[prompt] for prompt in old if prompt in new])
    if changes.size == 0:
        return None
    padded = np.append(changes, (1.0, -1.0))
    centre, half = padded.mean(), Z_95 * padded.std() / math.sqrt(padded.size)
    value = float(changes.mean())
    low, high = float(max(-1.0, centre - half)), float(min(1.0, centre + half))
    interval = Interval(value, min(low, value), max(high, value), int(changes.size))
    return PairedDifference(interval, gained=int((changes > 0).sum()), lost=int((changes < 0).sum()))


def wasserstein_1(a: Sequence[float], b: Sequence[float]) -> float:
    """The area between the two empirical distribution functions: the earth mover's distance.

    Raises:
        ValueError: one of them is empty.
    """
    points, fa, fb = _distribution_functions(a, b)
    return float(np.sum(np.abs(fa - fb)[:-1] * np.diff(points)))


def ks_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest gap between the two empirical distribution functions (Kolmogorov-Smirnov).

    Raises:
        ValueError: one of them is empty.
    """
    _, fa, fb = _distribution_functions(a, b)
    return float(np.max(np.abs(fa - fb)))


def shared_edges(series: Iterable[Sequence[float]], bins: int = 24, tail: float = 0.005) -> list[float]:
    """Edges of equal bins over all values, `tail` of them left outside at each end.

    Whole numbers get edges at halves, so that no bin holds more of them than another.

    Raises:
        ValueError: there are no values.
    """
    values = np.concatenate([np.asarray(one, dtype=float) for one in series] or [np.array([])])
    if values.size == 0:
        raise ValueError("no values to make bins of; allowed: at least one")
    low, high = np.quantile(values, [tail, 1 - tail])
    if np.all(values == np.round(values)):
        width = max(1, math.ceil((high - low + 1) / bins))
        first = math.floor(low) - 0.5
        return [first + width * k for k in range(math.ceil((high + 0.5 - first) / width) + 1)]
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1).tolist()


def histogram(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """Fractions of `values` per bin, [bins]; what lies outside counts in the outermost bins.

    Raises:
        ValueError: there are no values.
    """
    if len(values) == 0:
        raise ValueError("a histogram of no values; allowed: at least one")
    counts, _ = np.histogram(np.clip(np.asarray(values, dtype=float), edges[0], edges[-1]), edges)
    return (counts / counts.sum()).tolist()


def compare(policy: Sequence[float], expert: Sequence[float], edges: Sequence[float]) -> Comparison:
    """Both histograms over `edges` and the distances between the two sets of values.

    Raises:
        ValueError: one of them is empty.
    """
    return Comparison(
        edges=list(edges),
        policy=histogram(policy, edges),
        expert=histogram(expert, edges),
        wasserstein=wasserstein_1(policy, expert),
        ks=ks_distance(policy, expert),
        policy_mean=float(np.mean(policy)),
        expert_mean=float(np.mean(expert)),
    )


def compare_lengths(evaluations: Sequence[Evaluation]) -> list[Comparison | None]:
    """Response lengths in tokens, policy against expert, all evaluations over the same bins."""
    return _compare_all([(e.lengths, e.expert_lengths) for e in evaluations])


def compare_logprobs(evaluations: Sequence[Evaluation]) -> list[Comparison | None]:
    """Token log-probabilities under the policy, own samples against the expert's tokens, over the same bins."""
    return _compare_all([(e.token_logprobs, e.expert_token_logprobs) for e in evaluations])


def _compare_all(pairs: list[tuple[Any, Any]]) -> list[Comparison | None]:
    """None where the policy or the expert has no values."""
    whole = [pair for pair in pairs if len(pair[0]) and len(pair[1])]
    if not whole:
        return [None] * len(pairs)
    edges = shared_edges([values for pair in whole for values in pair])
    return [compare(*pair, edges) if len(pair[0]) and len(pair[1]) else None for pair in pairs]


def _distribution_functions(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if len(a) == 0 or len(b) == 0:
        raise ValueError("a distance to no values; allowed: at least one on both sides")
    points = np.union1d(a, b)
    fa, fb = (np.searchsorted(np.sort(one), points, side="right") / len(one) for one in (a, b))
    return points, fa, fb


def _rates(outcomes: Iterable[tuple[str, bool | None]]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for key, passed in outcomes:
        if passed is not None:
            grouped.setdefault(key, []).append(float(passed))
    return {key: sum(values) / len(values) for key, values in grouped.items()}


def _mean_interval(values: Iterable[float]) -> Interval | None:
    numbers = list(values)
    return wilson_interval(sum(numbers) / len(numbers), len(numbers)) if numbers else None
