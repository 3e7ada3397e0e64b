"""The unified loss of packed rows: the weighted sum of the terms, each over its own count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uniapl.objective.rows import Rows
from uniapl.objective.terms import (
    LOG_RATIO_LIMIT,
    Surrogate,
    demonstration_loss,
    k3,
    policy_ratio,
    rollout_correction,
    surrogate_loss,
)
from uniapl.objective_config import TERMS, ObjectiveConfig

REDUCED = (
    *(f"loss/{term}" for term in TERMS),
    "tokens/sampled",
    "tokens/adversarial",
    "tokens/demonstration",
    "sum/ratio",
    "sum/correction",
    "sum/masked",
    "sum/clipped",
    "sum/clipped_adversarial",
    "sum/kl",
    "sum/kl_reference",
    "sum/entropy_estimate",
    "sum/expert_nll",
)
"""The keys of `RowsLoss.sums`."""


@dataclass(frozen=True)
class RowsLoss:
    """The loss of some rows and its statistics."""

    loss: Tensor
    """Scalar with gradient: summed over all rows and ranks it is the loss of the whole batch."""
    sums: dict[str, float]
    """By `REDUCED`; may be added up over rows and ranks."""
    finite: Tensor
    """[N], bool: whether every term that counts has a finite loss of the token, those measured at a weight of 0 too."""
    log_ratio: Tensor
    """[sampled tokens], without gradient: log pi - log pi_behaviour."""


def rows_loss(
    logprobs: Tensor,
    rows: Rows,
    counts: Tensor,
    weights: dict[str, float],
    objective: ObjectiveConfig,
    reference: Tensor | None = None,
    proximal: Tensor | None = None,
) -> RowsLoss:
    """The rows' part of L = w_pref L_pref + mu L_demo + lambda L_adv + beta L_kl.

    Args:
        logprobs: [N], of the rows' targets at their temperatures, with gradient.
        rows: the signals of those targets.
        counts: [len(TERMS)], the denominators of `TERMS` over the whole batch, all ranks.
        weights: of every term in this step.
        objective: everything else about the terms.
        reference: [N], log-probabilities under the frozen reference; needed where the weight of `kl` is > 0.
        proximal: [N], log-probabilities before the batch's first optimizer step. By default `logprobs` themselves, as
            in that first step: rho is 1 in value and its gradient is grad log pi.

    Raises:
        ValueError: there is no `reference` and the weight of `kl` is > 0.
    """
    if reference is None and weights["kl"] > 0:
        raise ValueError("the weight of the term kl is > 0 and there are no log-probabilities of a reference")
    logprobs = logprobs if logprobs.dtype == torch.float64 else logprobs.float()
    start = logprobs.detach() if proximal is None else proximal.detach()
    sampled = rows.sampled > 0
    correction, preference, adversarial = _surrogates(logprobs, start, rows, objective)
    divergence = torch.zeros_like(start) if reference is None else k3(logprobs, reference.detach(), sampled)
    terms = {
        "demonstration": demonstration_loss(logprobs, start, rows.demonstration, objective.demonstration.token_weight),
        "preference": preference.loss,
        "adversarial": adversarial.loss,
        "kl": divergence * rows.kl,
    }
    means = {term: terms[term] / count for term, count in zip(TERMS, counts.tolist(), strict=True) if count > 0}
    # A term without weight is left out, not added as 0: the others stay the same to the bit.
    total = sum((weights[term] * mean for term, mean in means.items() if weights[term] > 0), torch.zeros_like(start))
    loss = total.sum() + logprobs[:0].sum()  # the second part is 0, and differentiable where no term counts
    sums = {f"loss/{term}": mean.detach().sum() for term, mean in means.items()}
    finite = torch.stack([mean.detach().isfinite() for mean in means.values()] or [torch.isfinite(start)]).all(0)
    sums |= _statistics(logprobs.detach(), rows, sampled, correction, preference, adversarial)
    sums["sum/kl_reference"] = divergence.detach().sum()
    behaved = (logprobs.detach() - rows.behaviour)[sampled]
    return RowsLoss(loss, _as_floats(sums), finite, behaved)


def _surrogates(
    logprobs: Tensor, start: Tensor, rows: Rows, objective: ObjectiveConfig
) -> tuple[Tensor, Surrogate, Surrogate]:
    """kappa [N], the surrogate of the preference term and that of the adversarial term, which share rho and kappa."""
    options, pref, adv = objective.surrogate, objective.preference, objective.adversarial
    anchor = rows.behaviour if options.proximal == "behaviour" else start
    sampled = rows.sampled > 0
    ratio = policy_ratio(logprobs, anchor, sampled, rows.sequence, options.ratio)
    correction = rollout_correction(anchor, rows.behaviour, sampled, rows.sequence, options)
    preference = surrogate_loss(
        ratio, correction, rows.preference_advantage, rows.preference, pref.clip_low, pref.clip_high
    )
    adversarial = surrogate_loss(
        ratio, correction, rows.adversarial_advantage, rows.adversarial, adv.clip_low, adv.clip_high
    )
    return correction, preference, adversarial


def _statistics(
    logprobs: Tensor, rows: Rows, sampled: Tensor, correction: Tensor, preference: Surrogate, adversarial: Surrogate
) -> dict[str, Tensor]:
    """Sums over the rows' tokens; the learner divides by `tokens/...` at the end."""
    demonstrated = rows.demonstration > 0
    logs = torch.where(sampled, logprobs - rows.behaviour, 0.0).clamp(max=LOG_RATIO_LIMIT)
    return {
        "tokens/sampled": sampled.sum(),
        "tokens/adversarial": (rows.adversarial > 0).sum(),
        "tokens/demonstration": demonstrated.sum(),
        "sum/ratio": (torch.exp(logs) * sampled).sum(),
        "sum/correction": (correction * sampled).sum(),
        "sum/masked": ((correction == 0) & sampled).sum(),
        "sum/clipped": preference.clipped.sum(),
        "sum/clipped_adversarial": adversarial.clipped.sum(),
        "sum/kl": k3(rows.behaviour, logprobs, sampled).sum(),
        "sum/entropy_estimate": -torch.where(sampled, logprobs, 0.0).sum(),
        "sum/expert_nll": -torch.where(demonstrated, logprobs, 0.0).sum(),
    }


def _as_floats(sums: dict[str, Tensor]) -> dict[str, float]:
    """Every key of `REDUCED`, 0 where it is missing; one transfer from the device for all of them."""
    values = torch.stack([value.double() for value in sums.values()]).tolist()
    return dict.fromkeys(REDUCED, 0.0) | dict(zip(sums, values, strict=True))
