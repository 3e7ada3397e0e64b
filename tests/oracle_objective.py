"""The objective once more, slowly: plain loops over unpacked, unpadded sequences in float64.

Written from the formulas alone; shares no code with `uniapl.objective`.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DELTA = 1e-6


@dataclass
class Known:
    """Log-probabilities of one response, float64, [tokens]."""

    current: Tensor  # with gradient
    start: Tensor  # before the optimizer step
    reference: Tensor


@dataclass
class Sampled:
    """A sample with its advantage in one term."""

    known: Known
    behaviour: list[float]
    advantage: float


def oracle_terms(batch: Any, objective: Any, known: dict[str, Known], lam: float, longest: int) -> dict[str, Tensor]:
    """The terms of a batch that count something, each divided by its own count.

    Args:
        known: by `PROMPT/INDEX` of a sample, or the id of a demonstration.
        lam: the adversarial weight, for rewards that are shaped by the expert score.
        longest: the constant length.
    """
    preference, adversarial, kl = [], [], []
    for group in batch.groups:
        scores = [s.score.expert_score for s in group.samples]
        rewards = [s.score.reward for s in group.samples]
        if objective.adversarial.as_reward:
            rewards = [r + lam * (s or 0.0) for r, s in zip(rewards, scores, strict=True)]
        paired = all(s is not None for s in scores) and not objective.adversarial.as_reward
        for i, sample in enumerate(group.samples):
            if not sample.token_ids:
                continue
            k, b = known[f"{group.prompt.id}/{i}"], sample.logprobs
            preference.append(Sampled(k, b, advantage(rewards, i, objective.preference.advantage_std)))
            kl.append(k)
            if paired:
                adversarial.append(Sampled(k, b, advantage(scores, i, objective.adversarial.advantage_std)))
    shown = [known[d.id] for d in batch.demonstrations if d.response_ids]
    found = {}
    if shown:
        found["demonstration"] = demonstration_term(shown, objective.demonstration.token_weight)
    if preference:
        found["preference"] = surrogate_term(preference, objective.preference, objective.surrogate, longest)
    if adversarial:
        found["adversarial"] = surrogate_term(adversarial, objective.adversarial, objective.surrogate, longest)
    if kl:
        found["kl"] = average([kl_tokens(k) for k in kl], objective.preference.average, longest)
    return found


def advantage(values: list[float], index: int, divide: bool) -> float:
    if len(set(values)) == 1:
        return 0.0
    centred = values[index] - statistics.mean(values)
    return centred / (statistics.pstdev(values) + DELTA) if divide else centred


def demonstration_term(shown: list[Known], weighting: str) -> Tensor:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for k in shown:
        for current, start in zip(k.current, k.start.tolist(), strict=True):
            p = math.exp(start)
            total = total - current * (p * (1 - p) if weighting == "p_one_minus_p" else 1.0)
            count += 1
    return total / count


def surrogate_term(samples: list[Sampled], term: Any, options: Any, longest: int) -> Tensor:
    losses = []
    for s in samples:
        n = len(s.behaviour)
        proximal = s.behaviour if options.proximal == "behaviour" else s.known.start.tolist()
        ratios = [torch.exp(s.known.current[t] - proximal[t]) for t in range(n)]
        if options.ratio == "sequence":
            product = torch.ones((), dtype=torch.float64)
            for ratio in ratios:
                product = product * ratio
            ratios = [product ** (1 / n)] * n
        kappas = corrections(proximal, s.behaviour, options)
        losses.append(torch.stack([clipped(r, s.advantage, term) * k for r, k in zip(ratios, kappas, strict=True)]))
    return average(losses, term.average, longest)


def corrections(proximal: list[float], behaviour: list[float], options: Any) -> list[float]:
    raw = [math.exp(p - b) for p, b in zip(proximal, behaviour, strict=True)]
    if options.correction == "off":
        return [1.0] * len(raw)
    if options.correction == "mask":
        return [k if options.floor <= k <= options.cap else 0.0 for k in raw]
    if options.correction == "sequence":
        return [min(math.prod(raw), options.cap)] * len(raw)
    return [min(k, options.cap) for k in raw]


def clipped(ratio: Tensor, a: float, term: Any) -> Tensor:
    bound = min(max(ratio.item(), 1 - term.clip_low), 1 + term.clip_high)
    # The smaller of the two products; the bounded one is a constant unless it is the ratio itself.
    return -ratio * a if ratio.item() * a <= bound * a else torch.tensor(-bound * a, dtype=torch.float64)


def kl_tokens(k: Known) -> Tensor:
    return torch.stack([torch.exp(q - p) - 1 - (q - p) for p, q in zip(k.current, k.reference.tolist(), strict=True)])


def average(losses: list[Tensor], how: str, longest: int) -> Tensor:
    """Per-token losses of every sequence into one number."""
    if how == "token":
        return sum(x.sum() for x in losses) / sum(len(x) for x in losses)
    if how == "sequence":
        return sum(x.mean() for x in losses) / len(losses)
    return sum(x.sum() for x in losses) / (len(losses) * longest)
