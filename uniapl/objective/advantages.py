"""Advantages of the samples of one group."""

from __future__ import annotations

import math

DELTA = 1e-6
"""Added to the standard deviation, so that a nearly constant group does not divide by zero."""


def group_advantages(values: list[float], divide_by_std: bool) -> list[float]:
    """A_i = r_i - mean r, divided by (std r + DELTA) where asked for (GRPO; without: Dr.GRPO).

    A group of one sample, or of equal values, gets exactly 0.

    Args:
        values: one reward or expert score per sample, [samples].
        divide_by_std: with the population standard deviation of the group.

    Raises:
        ValueError: a value is not finite.
    """
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"group values must be finite, got {values}")
    if len(set(values)) <= 1:
        return [0.0] * len(values)
    mean = math.fsum(values) / len(values)
    centred = [v - mean for v in values]
    if not divide_by_std:
        return centred
    std = math.sqrt(math.fsum(c * c for c in centred) / len(values))
    return [c / (std + DELTA) for c in centred]
