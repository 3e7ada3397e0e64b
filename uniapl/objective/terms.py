"""The terms of the objective, per token. All tensors are [tokens]: the response tokens of packed rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """The clipped surrogate and what is worth logging of it."""

    loss: Tensor
    """Per token, 0 where the mask is 0."""
    ratio: Tensor
    correction: Tensor
    clipped: Tensor
    """1 where the clip decides, so that the token has no gradient."""


def demonstration_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """-log pi(y_t) on the expert's tokens: maximum likelihood (SFT)."""
    return -logprobs * mask


def surrogate_loss(
    logprobs: Tensor,
    proximal: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    correction_cap: float,
) -> Surrogate:
    """-kappa_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A), the PPO surrogate of Schulman et al. 2017.

    rho_t = pi / pi_proximal; kappa_t = min(pi_proximal / pi_behaviour, cap) is truncated importance
    sampling for the engine that drew the tokens (decoupled PPO: Hilton et al. 2022, AReaL 2025).

    Args:
        logprobs: of the policy being trained, with gradient.
        proximal: of the policy at the start of the optimizer step, without gradient.
        behaviour: of the engine that sampled, as it reported them.
        advantages: the sample's advantage, repeated over its tokens.
        mask: 1 for sampled tokens, 0 elsewhere.
    """
    mask = mask.to(logprobs.dtype)
    # Outside the mask the exponents are set to 0: a 0 x inf would otherwise be NaN.
    ratio = torch.exp((logprobs - proximal) * mask)
    correction = torch.exp((proximal - behaviour) * mask).clamp(max=correction_cap).detach()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    free, bound = ratio * advantages, clipped_ratio * advantages
    loss = -correction * torch.minimum(free, bound) * mask
    return Surrogate(loss, ratio.detach(), correction, (bound < free).to(mask.dtype) * mask)


def k3(logprobs: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(p || q) per token, tokens drawn from p: q/p - 1 - log(q/p) >= 0.

    Args:
        logprobs: of p, the distribution that drew the tokens.
        other: of q.
    """
    delta = (other - logprobs) * mask
    return torch.expm1(delta) - delta
