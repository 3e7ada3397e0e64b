"""Groups as they travel from rollout actors through the queue to the driver: one block of bytes each.

The queue reads only what stands beside the bytes. It neither unpickles groups, nor gives each an object of
its own in Ray's store, which would cost it more than everything else that it does for a group.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from uniapl.mixing import ReadyGroup
from uniapl.records import Demonstration, Group


@dataclass(frozen=True)
class PackedGroup:
    """A scored group, and what the queue wants to know of it; `samples` is their number."""

    lease_id: int
    prompt_id: str
    actor: str
    oldest_version: int
    tokens: int
    samples: int
    unscored: list[str]
    equal_rewards: bool
    generate_s: float
    score_s: float
    data: bytes

    @classmethod
    def of(cls, group: Group) -> PackedGroup:
        return cls(
            lease_id=group.lease_id,
            prompt_id=group.prompt.id,
            actor=group.actor,
            oldest_version=group.oldest_version,
            tokens=group.tokens,
            samples=len(group.samples),
            unscored=group.unscored,
            equal_rewards=has_equal_rewards(group),
            generate_s=group.generate_s,
            score_s=group.score_s,
            data=to_wire(group),
        )

    def group(self) -> Group:
        """The group itself."""
        group: Group = from_wire(self.data)
        return group


@dataclass(frozen=True)
class PackedBatch:
    """What optimizer step `step` consumes; the order is the batch's order."""

    step: int
    groups: list[PackedGroup]
    demonstrations: list[Demonstration]


def packed(group: ReadyGroup) -> PackedGroup:
    """The handle that the queue's rules carry."""
    handle: PackedGroup = group.handle
    return handle


def to_wire(value: Any) -> bytes:
    """`value` as bytes: Ray hands on bytes as they are, while its own pickler asks Python about every object."""
    return pickle.dumps(value, protocol=5)


def from_wire(data: bytes) -> Any:
    """The inverse of `to_wire`."""
    return pickle.loads(data)  # noqa: S301 (packed by this run's own actor, which sends pickles anyway)


def has_equal_rewards(group: Group) -> bool:
    """Whether every sample was scored and all rewards are the same: by reward none is preferred."""
    rewards = {sample.score.reward if sample.score else None for sample in group.samples}
    return len(rewards) == 1 and None not in rewards
