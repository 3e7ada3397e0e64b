"""The learning rate over optimizer steps."""

from __future__ import annotations

import math

from uniapl.config import LearnerConfig


def learning_rate(step: int, steps: int, config: LearnerConfig) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine down to `min_learning_rate_ratio` of the peak.

    Args:
        step: the optimizer step about to be made, from 0; the first one already has a rate above 0.
        steps: optimizer steps of the whole run.
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    span = max(1, steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    low = config.min_learning_rate_ratio
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
