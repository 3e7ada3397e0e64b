"""Rewards: verifiers, the user's functions, their cache, and how their values become a `Score`."""

from uniapl.rewards.registry import BUILT_IN, Reward, require_rewards, resolve
from uniapl.rewards.types import RewardCallable, RewardResult, ScoreRequest, UnscorableError, verifier_field

__all__ = [
    "BUILT_IN",
    "Reward",
    "RewardCallable",
    "RewardResult",
    "ScoreRequest",
    "UnscorableError",
    "require_rewards",
    "resolve",
    "verifier_field",
]
