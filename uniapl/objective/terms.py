"""The terms of the objective, per token. All tensors are [N]: the response tokens of packed rows.

What a mask leaves out never enters an exponential, not even as 0 x infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uniapl.objective_config import SurrogateConfig

LOG_RATIO_LIMIT = 20.0
"""Ratios of probabilities end at e^20, without gradient beyond: such a token is bad data, and e^89 is infinite."""


@dataclass(frozen=True)
class Surrogate:
    """The clipped surrogate of one term."""

    loss: Tensor
    """Per token, with its weight in the term; 0 where that is 0."""
    clipped: Tensor
    """1 where the clip decides, so that the token has no gradient."""


def demonstration_loss(logprobs: Tensor, proximal: Tensor, weight: Tensor, weighting: str) -> Tensor:
    """-c_t log pi(y_t) on the expert's tokens: maximum likelihood (SFT).

    Args:
        logprobs: of the policy being trained, with gradient.
        proximal: of the policy at the start of the optimizer step, without gradient.
        weight: of each token in the term, 0 where it does not count.
        weighting: `uniform`: c = 1; `p_one_minus_p`: c = p (1 - p) without gradient (CHORD, arXiv 2508.11408), small
            for tokens that the policy already has and for those that it would never say.
    """
    losses = -torch.where(weight > 0, logprobs, 0.0) * weight
    return losses * -torch.exp(proximal) * torch.expm1(proximal) if weighting == "p_one_minus_p" else losses


def policy_ratio(logprobs: Tensor, proximal: Tensor, sampled: Tensor, sequence: Tensor, level: str) -> Tensor:
    """rho = pi / pi_proximal with gradient; 1 where nothing was sampled.

    Args:
        sampled: bool.
        sequence: the number of the sequence that each token is of.
        level: `token`, or `sequence`: exp of the mean log-ratio over the sequence's tokens (GSPO, arXiv 2507.18071).
    """
    logs = torch.where(sampled, logprobs - proximal, 0.0)
    if level == "sequence":
        logs = _sequence_sum(logs, sequence) / _sequence_sum(torch.ones_like(logs), sequence)
    return torch.exp(logs.clamp(max=LOG_RATIO_LIMIT))


def rollout_correction(
    proximal: Tensor, behaviour: Tensor, sampled: Tensor, sequence: Tensor, config: SurrogateConfig
) -> Tensor:
    """kappa = pi_proximal / pi_behaviour, bounded, without gradient; 1 where nothing was sampled.

    Corrects for the engine that drew the tokens (decoupled PPO: Hilton et al. 2022, AReaL 2025). `truncate`:
    min(kappa, cap); `mask`: 0 outside [floor, cap]; `sequence`: min(product over the sequence, cap); `off`: 1.

    Args:
        sampled: bool.
        sequence: the number of the sequence that each token is of.
    """
    if config.correction == "off" or config.proximal == "behaviour":  # pi_proximal is pi_behaviour then
        return torch.ones_like(proximal)
    logs = torch.where(sampled, proximal - behaviour, 0.0).detach()
    if config.correction == "sequence":
        logs = _sequence_sum(logs, sequence)
    kappa = torch.exp(logs)
    if config.correction == "mask":
        return torch.where((kappa >= config.floor) & (kappa <= config.cap), kappa, 0.0)
    return kappa.clamp(max=config.cap)


def _sequence_sum(values: Tensor, sequence: Tensor) -> Tensor:
    """For every token the sum over the tokens of its sequence. There are at most as many sequences as tokens."""
    return torch.zeros_like(values).index_add(0, sequence, values)[sequence]


def surrogate_loss(
    ratio: Tensor, correction: Tensor, advantages: Tensor, weight: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """-kappa min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), the PPO surrogate (Schulman et al. 2017).

    Args:
        ratio: rho, with gradient.
        correction: kappa.
        advantages: the sample's advantage, repeated over its tokens.
        weight: of each token in the term, 0 where it does not count.
    """
    free, bound = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    clipped = ((bound < free) & (weight > 0)).to(ratio.dtype)
    return Surrogate(-correction * torch.minimum(free, bound) * weight, clipped)


def k3(logprobs: Tensor, other: Tensor, counted: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(p || q) per token, tokens drawn from p: q/p - 1 - log(q/p) >= 0.

    Args:
        logprobs: of p, the distribution that drew the tokens.
        other: of q.
        counted: bool; 0 elsewhere.
    """
    logs = torch.where(counted, other - logprobs, 0.0).clamp(max=LOG_RATIO_LIMIT)
    return torch.expm1(logs) - logs
