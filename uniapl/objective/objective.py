"""The unified loss of packed rows: the weighted sum of the three terms, each over its own count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uniapl.config import ObjectiveConfig
from uniapl.objective.rows import TERMS, Rows
from uniapl.objective.terms import demonstration_loss, k3, surrogate_loss


@dataclass(frozen=True)
class RowsLoss:
    """The loss of some rows and its statistics, sums that may be added up over rows and ranks."""

    loss: Tensor
    """Scalar with gradient: summed over all rows and ranks it is the loss of the whole batch."""
    sums: dict[str, float]


def rows_loss(logprobs: Tensor, rows: Rows, counts: Tensor, config: ObjectiveConfig) -> RowsLoss:
    """The rows' part of L = w_pref L_pref + mu L_demo + lambda L_adv.

    One optimizer step is made per batch, so pi_proximal is the policy's own value in this forward pass:
    rho = 1 in value, its gradient is grad log pi, and kappa carries the whole correction for pi_behaviour.

    Args:
        logprobs: [N], of the rows' targets at their temperatures, with gradient.
        rows: the signals of those targets.
        counts: [3], tokens that count in each of `TERMS` over the whole batch, all ranks.
        config: weights, clips and the cap of the correction.
    """
    logprobs = logprobs.float()
    proximal = logprobs.detach()
    cap = config.preference.correction_cap
    pref, adv = config.preference, config.adversarial
    preference = surrogate_loss(
        logprobs,
        proximal,
        rows.behaviour,
        rows.preference_advantage,
        rows.preference,
        pref.clip_low,
        pref.clip_high,
        cap,
    )
    adversarial = surrogate_loss(
        logprobs,
        proximal,
        rows.behaviour,
        rows.adversarial_advantage,
        rows.adversarial,
        adv.clip_low,
        adv.clip_high,
        cap,
    )
    totals = {
        "demonstration": demonstration_loss(logprobs, rows.demonstration).sum(),
        "preference": preference.loss.sum(),
        "adversarial": adversarial.loss.sum(),
    }
    loss = logprobs.sum() * 0.0
    sums = {}
    for count, name in zip(counts.tolist(), TERMS, strict=True):
        if config.weights[name] > 0 and count > 0:
            loss = loss + config.weights[name] * totals[name] / count
            sums[f"loss/{name}"] = totals[name].item() / count
    sampled = torch.maximum(rows.preference, rows.adversarial)
    return RowsLoss(loss, sums | _statistics(proximal, rows, sampled, preference.correction, preference.clipped))


def _statistics(logprobs: Tensor, rows: Rows, sampled: Tensor, correction: Tensor, clipped: Tensor) -> dict[str, float]:
    """Sums over the rows' sampled tokens; the learner divides by `tokens/sampled` at the end."""
    return {
        "tokens/sampled": sampled.sum().item(),
        "tokens/demonstration": rows.demonstration.sum().item(),
        "sum/ratio": (torch.exp((logprobs - rows.behaviour) * sampled) * sampled).sum().item(),
        "sum/correction": (correction * sampled).sum().item(),
        "sum/clipped": clipped.sum().item(),
        "sum/kl": (k3(rows.behaviour, logprobs, sampled) * sampled).sum().item(),
        "sum/expert_nll": -(logprobs * rows.demonstration).sum().item(),
    }
