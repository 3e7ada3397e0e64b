"""The configuration of the mixing queue."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from uniapl.config_types import NonNegative, Seconds, Section
from uniapl.objective_config import SurrogateConfig

SAMPLING_PART = 0.8
"""Of a lease, for sampling, where `queue.group_timeout_s` is null."""


class QueueConfig(Section):
    """How batches are made of groups and demonstrations."""

    groups_per_step: NonNegative = Field(8, description="prompts of a batch, with rollout.group_size samples each")
    demonstrations_per_step: NonNegative = Field(16, description="expert responses of a batch")
    max_staleness: NonNegative = Field(
        0, description="versions (optimizer steps) of age at most; 0: strictly synchronous"
    )
    on_stale: Literal["drop", "correct"] = Field(
        "drop", description="older groups: sample the prompt again, or use them and rely on objective.surrogate"
    )
    lease_s: Seconds = Field(600.0, description="seconds to sample, score and commit; then as a straggler")
    group_timeout_s: Seconds | None = Field(None, description="seconds to sample a group; null: 0.8 x lease_s")
    on_straggler: Literal["accept", "reissue"] = Field(
        "reissue", description="samples missing by then: use the group without them, or sample the prompt again"
    )
    min_group: Annotated[int, Field(ge=2)] = Field(2, description="samples that a group is accepted with")
    max_reissues: NonNegative = Field(2, description="times a prompt is sampled again for stragglers; then dropped")
    max_regenerations: NonNegative = Field(2, description="times a prompt is sampled again that could not be scored")
    on_equal_rewards: Literal["keep", "resample"] = Field(
        "keep", description="groups without a preference: use them, or sample the prompt again"
    )
    max_resamples: NonNegative = Field(2, description="times a prompt is resampled for equal rewards; then kept")

    @property
    def sampling_s(self) -> float:
        """Seconds that a group has to be sampled: what is left of its lease is for scoring and the commit."""
        return SAMPLING_PART * self.lease_s if self.group_timeout_s is None else self.group_timeout_s


def queue_conflicts(q: QueueConfig, group_size: int, surrogate: SurrogateConfig) -> list[str]:
    """Values that cannot go together, each as one line that begins with a key."""
    found = []
    if q.group_timeout_s is not None and q.group_timeout_s >= q.lease_s:
        found.append(f"queue.group_timeout_s: got {q.group_timeout_s:g}; allowed: < queue.lease_s = {q.lease_s:g}")
    if q.on_straggler == "accept" and q.min_group > group_size:
        found.append(f"queue.min_group: got {q.min_group}; allowed: <= rollout.group_size = {group_size}")
    if q.on_stale == "correct" and (surrogate.proximal, surrogate.correction) == ("step_start", "off"):
        found.append(
            "queue.on_stale: got 'correct'; allowed: when objective.surrogate corrects, "
            "by correction (not 'off') or proximal = 'behaviour'"
        )
    return found
