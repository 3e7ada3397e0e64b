"""Gradients as ZeRO-3 holds them: a flat float32 partition on every rank. All functions are collectives."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 22
"""Elements that are float64 at one time."""
NORM_ROW = 1024
"""Elements that float32 adds up."""


def local_partition(engine: Any) -> Tensor:
    """This rank's part of the gradient added up so far, [elements]; writing to it changes the gradient.

    DeepSpeed's functions for it (`safe_get_local_grad`) go parameter by parameter and may copy.
    """
    return engine.optimizer.grad_partitions_flat_buffer


def discard(engine: Any) -> None:
    """Forget the gradient added up so far: the next backward begins anew."""
    engine.optimizer.zero_grad()


def gradient_norm(engine: Any) -> float:
    """2-norm of the gradient added up so far, over all ranks, before clipping; NaN or infinite if any part is."""
    return math.sqrt(_over_ranks([_squared_norm(local_partition(engine))], engine.device)[0])


def _squared_norm(values: Tensor) -> Tensor:
    """Float32 over short rows, float64 over their norms: as exact as the values, and one pass over the memory."""
    whole = len(values) // NORM_ROW * NORM_ROW
    norms = torch.linalg.vector_norm(values[:whole].view(-1, NORM_ROW), dim=1)
    return norms.double().square().sum() + values[whole:].double().square().sum()


def norms_and_cosines(parts: dict[str, Tensor], device: Any) -> dict[str, float]:
    """`gradient/norm_A` of every term and `gradient/cosine_A_B` of every pair of which neither norm is 0.

    Args:
        parts: each term's gradient on this rank, [elements], in the order of `TERMS`.
        device: of this rank.
    """
    pairs = [(name, name) for name in parts] + list(combinations(parts, 2))
    dots = _over_ranks([_dot(parts[a], parts[b]) for a, b in pairs], device)
    found = dict(zip(pairs, dots, strict=True))
    norms = {name: math.sqrt(found[name, name]) for name in parts}
    metrics = {f"gradient/norm_{name}": norm for name, norm in norms.items()}
    for a, b in combinations(parts, 2):
        if norms[a] > 0 and norms[b] > 0:
            metrics[f"gradient/cosine_{a}_{b}"] = found[a, b] / (norms[a] * norms[b])
    return metrics


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """In float64."""
    parts = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return torch.stack([torch.dot(x.double(), y.double()) for x, y in parts]).sum()


def _over_ranks(values: list[Tensor], device: Any) -> list[float]:
    total = torch.stack(values).to(device)
    dist.all_reduce(total)
    return total.tolist()
