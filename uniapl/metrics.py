"""What is worth logging of a consumed batch, and where the time of a step went."""

from __future__ import annotations

from collections import Counter
from statistics import fmean, pstdev

from uniapl.objective.sequences import shaped_rewards
from uniapl.objective_config import ObjectiveConfig
from uniapl.records import MixedBatch, Sample

OLDEST = 8
"""The last bar of the histogram of staleness: this age and more."""


def batch_metrics(batch: MixedBatch, objective: ObjectiveConfig, weights: dict[str, float]) -> dict[str, float]:
    """Rewards, checks, staleness, expert scores and lengths of a batch; keys without data are left out.

    Args:
        weights: of the terms in this step.
    """
    found: dict[str, float] = {}
    samples = [sample for group in batch.groups for sample in group.samples]
    if samples:
        compared = [shaped_rewards(group, objective, weights) for group in batch.groups]
        found |= _rewards(compared, samples) | _checks(samples) | _discriminator(samples)
        found |= _staleness(batch.step, samples)
        found["length/sample_mean"] = fmean(len(s.token_ids) for s in samples)
        found["length/truncated"] = fmean(s.finish_reason == "length" for s in samples)
        found["tokens/generated"] = float(sum(len(s.token_ids) for s in samples))
    if batch.demonstrations:
        found["length/demonstration_mean"] = fmean(len(d.response_ids) for d in batch.demonstrations)
    return found


def _staleness(step: int, samples: list[Sample]) -> dict[str, float]:
    """By token: how many versions older than the weights that step `step` updates were those that drew it.

    `staleness/age_K` is the fraction of tokens of age K; of `OLDEST` and more in the last.
    """
    tokens: Counter[int] = Counter()
    for span in (span for sample in samples for span in sample.versions):
        tokens[step - span.version] += span.end - span.start
    whole = tokens.total()
    if not whole:
        return {}
    found = {
        "staleness/mean": sum(age * n for age, n in tokens.items()) / whole,
        "staleness/max": float(max(age for age, n in tokens.items() if n)),
    }
    for age in range(min(int(found["staleness/max"]), OLDEST) + 1):
        at = sum(n for a, n in tokens.items() if a == age or a > age == OLDEST)
        found[f"staleness/age_{age}"] = at / whole
    return found


def _rewards(compared: list[list[float | None]], samples: list[Sample]) -> dict[str, float]:
    """`compared`: of every group, what the preference term compares, [samples]."""
    rewards = [s.score.reward for s in samples if s.score is not None and s.score.reward is not None]
    equal = [len(set(group) - {None}) <= 1 for group in compared]
    return {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "reward/pass_rate": fmean(_passed(s) for s in samples),
        "reward/zero_advantage_groups": fmean(equal),
    }


def _passed(sample: Sample) -> bool:
    """Every check holds or, where there are none, the reward is at least 1."""
    score = sample.score
    if score is None or score.reward is None:
        return False
    return all(score.checks.values()) if score.checks else score.reward >= 1.0


def _checks(samples: list[Sample]) -> dict[str, float]:
    outcomes: dict[str, list[bool]] = {}
    for sample in samples:
        for name, passed in (sample.score.checks if sample.score else {}).items():
            outcomes.setdefault(name, []).append(passed)
    return {f"check/{name}": fmean(passed) for name, passed in sorted(outcomes.items())}


def _discriminator(samples: list[Sample]) -> dict[str, float]:
    """How well the samples with an expert score are told from the expert's own responses.

    `accuracy` is the share of samples that score below the expert's own response, `margin` by how much
    they do on average, which is also the gap between the means.
    """
    pairs = [
        (s.score.expert_reference, s.score.expert_score)
        for s in samples
        if s.score is not None and s.score.expert_score is not None and s.score.expert_reference is not None
    ]
    if not pairs:
        return {}
    expert, sample = fmean(expert for expert, _ in pairs), fmean(sample for _, sample in pairs)
    return {
        "discriminator/accuracy": fmean(sample < expert for expert, sample in pairs),
        "discriminator/margin": expert - sample,
        "discriminator/sample_mean": sample,
        "discriminator/expert_mean": expert,
        "discriminator/gap": expert - sample,
        "discriminator/paired": len(pairs) / len(samples),
    }


def time_split(waited: float, groups: list[tuple[float, float]]) -> dict[str, float]:
    """Split the seconds spent waiting for a batch along its last group: generating, scoring, the rest.

    Args:
        waited: seconds from asking for the batch to having it.
        groups: (seconds generating, seconds scoring) of the batch's groups; empty without rollouts.
    """
    generate, score = max(groups, key=sum, default=(0.0, 0.0))
    score = min(score, waited)
    generate = min(generate, waited - score)
    return {"time/generate": generate, "time/score": score, "time/wait": waited - generate - score}
