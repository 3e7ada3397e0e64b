"""A step's metrics, from sums over rows and ranks."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from uniapl.objective.objective import REDUCED
from uniapl.objective_config import TERMS

QUANTILES = {"min": 0.0, "p01": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}
LARGEST_LOG = 700.0
"""exp of more is no finite float64."""
_KEYS = (
    *REDUCED,
    "loss/total",
    "tokens/trained",
    "tokens/rows",
    "tokens/computed",
    "tokens/reference",
    "tokens/entropy",
    "sum/entropy",
)


def over_ranks(sums: dict[str, float], device: str) -> dict[str, float]:
    """Sums over the ranks, every rank sending the same keys in the same order. A collective."""
    values = torch.tensor([sums.get(key, 0.0) for key in _KEYS], dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(_KEYS, values.tolist(), strict=True))


def gathered(parts: list[Tensor], device: str) -> Tensor:
    """The values of all ranks as one, [values of all ranks], float64. A collective.

    Args:
        parts: this rank's, each [values].
    """
    values = torch.cat([part.double() for part in parts] or [torch.zeros(0, dtype=torch.float64)])
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(values)], device=device))
    lengths = [int(size.item()) for size in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.float64, device=device)
    padded[: len(values)] = values.to(padded)
    everyone = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(everyone, padded)
    return torch.cat([part[:length] for part, length in zip(everyone, lengths, strict=True)]).cpu()


def importance_metrics(log_ratios: Tensor) -> dict[str, float]:
    """Quantiles of w = pi_theta / pi_behaviour per sampled token, and (sum w)^2 / (n sum w^2), Kish's sample size.

    Args:
        log_ratios: [tokens], log w of the whole batch.
    """
    if len(log_ratios) == 0:
        return {}
    logs = np.asarray(log_ratios, dtype=np.float64).clip(-LARGEST_LOG, LARGEST_LOG)
    found = np.quantile(logs, list(QUANTILES.values()), method="inverted_cdf")
    metrics = {f"importance/{name}": float(np.exp(value)) for name, value in zip(QUANTILES, found, strict=True)}
    scaled = np.exp(logs - logs.max())  # the size does not depend on the scale, and this one cannot overflow
    metrics["importance/ess"] = float(scaled.sum() ** 2 / (len(scaled) * (scaled**2).sum()))
    return metrics


def checked_loss(totals: dict[str, float]) -> float:
    """The loss or, where it is finite and a term that is measured at a weight of 0 is not, that term."""
    losses = [totals["loss/total"], *(totals[f"loss/{term}"] for term in TERMS)]
    return next((loss for loss in losses if not math.isfinite(loss)), losses[0])


def step_metrics(totals: dict[str, float], counts: Tensor, weights: dict[str, float]) -> dict[str, float]:
    """Losses, shares and means per token; a term that counts nothing or has a weight of 0 is left out.

    Args:
        totals: over all ranks.
        counts: [terms], the terms' denominators.
        weights: of the terms in this step.
    """
    t = totals
    active = [term for term, count in zip(TERMS, counts.tolist(), strict=True) if weights[term] > 0 and count > 0]
    sizes = {term: abs(weights[term] * t[f"loss/{term}"]) for term in active}
    whole = sum(sizes.values()) or 1.0
    found = {"loss/total": t["loss/total"]}
    found |= {f"loss/{term}": t[f"loss/{term}"] for term in active}
    found |= {f"share/{term}": size / whole for term, size in sizes.items()}
    found |= {"tokens/trained": t["tokens/trained"], "tokens/computed": t["tokens/computed"]}
    found["learner/packing_efficiency"] = t["tokens/computed"] / t["tokens/rows"]
    if t["tokens/demonstration"]:
        found["expert/nll"] = t["sum/expert_nll"] / t["tokens/demonstration"]
    return found | _of_samples(t, active) if t["tokens/sampled"] else found


def _of_samples(t: dict[str, float], active: list[str]) -> dict[str, float]:
    n = t["tokens/sampled"]
    found = {
        "ratio/mean": t["sum/ratio"] / n,
        "correction/mean": t["sum/correction"] / n,
        "correction/masked_fraction": t["sum/masked"] / n,
        "kl/behaviour": t["sum/kl"] / n,
        "entropy/estimate": t["sum/entropy_estimate"] / n,
    }
    if t["tokens/reference"]:
        found["kl/reference"] = t["sum/kl_reference"] / t["tokens/reference"]
    if t["tokens/entropy"]:
        found["entropy/exact"] = t["sum/entropy"] / t["tokens/entropy"]
    if "preference" in active:
        found["ratio/clip_fraction"] = t["sum/clipped"] / n
    if "adversarial" in active:
        found["ratio/clip_fraction_adversarial"] = t["sum/clipped_adversarial"] / t["tokens/adversarial"]
    return found
