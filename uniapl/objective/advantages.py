"""Advantages of the samples of one group."""

from __future__ import annotations

import math

DELTA = 1e-6
"""Added to the standard deviation, so that a nearly constant group does not divide by zero."""


def group_advantages(values: list[float], divide_by_std: bool) -> list[float]:
    """A_i = r_i - mean r, divided by (std r + DELTA) where asked for (GRPO; without: Dr.GRPO).

    A group of one sample, or of equal values, gets exactly 0. Values so far apart that their difference is no float
    get infinite advantages, which the learner's check of the loss finds.

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
    # Scaling by a power of two is exact, and neither sums nor squares of what is at most 1 overflow.
    exponent = max(0, math.frexp(max(map(abs, values)))[1])
    scaled = [math.ldexp(v, -exponent) for v in values]
    mean = math.fsum(scaled) / len(scaled)
    centred = [v - mean for v in scaled]
    if not divide_by_std:
        return [math.ldexp(c, exponent - 1) * 2.0 if exponent else c for c in centred]
    std = math.sqrt(math.fsum(c * c for c in centred) / len(centred))
    return [c / (std + math.ldexp(DELTA, -exponent)) for c in centred]
