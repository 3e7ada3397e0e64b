"""Leases: who may commit the group of which prompt until when; every lease ends once, and how is known."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from uniapl.records import Prompt

LEASE_COUNTERS = ("leased", "committed", "expired", "released")
REMEMBERED_LEASES = 4096
NEW_WEIGHTS = "ended for new weights"
STRAGGLER = "samples missing at the deadline"
"""What a lease is released with; any other reason is only counted under its name."""
MAX_LOSSES = 2
"""A prompt whose lease ended this often with the actor that held it is dropped the next time: it may have ended it."""
MAX_ABORTS = 2
"""A group that new weights have ended this often is finished with them the next time."""


@dataclass(frozen=True)
class Task:
    """A prompt that has to become a group."""

    sequence: int
    """Place in the order in which prompts were drawn; groups enter batches in this order."""
    prompt: Prompt
    regenerations: int = 0
    """How many groups of this prompt were thrown away because samples could not be scored."""
    resamples: int = 0
    """How many were thrown away because all their rewards were equal."""
    reissues: int = 0
    """How many were given up because samples were missing at the group's deadline, or the lease expired."""
    aborts: int = 0
    """How many were ended for new weights: sampled again with the same seed, since the weights differ."""
    losses: int = 0
    """How many leases ended with the rollout actor that held them: sampled again with the same seed."""

    @property
    def attempt(self) -> int:
        """Which group of this prompt it is, from 0; with `sequence` it makes the sampler's seed."""
        return self.regenerations + self.resamples + self.reissues


def task_from_dict(packed: dict[str, Any]) -> Task:
    """The inverse of `dataclasses.asdict` on a task."""
    return Task(**{**packed, "prompt": Prompt(**packed["prompt"])})


@dataclass(frozen=True)
class Lease:
    """The right to commit one group for one prompt until `deadline` (seconds on the queue's clock)."""

    id: int
    task: Task
    actor: str
    deadline: float

    @property
    def sequence(self) -> int:
        return self.task.sequence

    @property
    def prompt(self) -> Prompt:
        return self.task.prompt

    @property
    def attempt(self) -> int:
        return self.task.attempt


@dataclass(frozen=True)
class Committed:
    """The lease was open. `outcome` says whether the group is ready or why it was thrown away."""

    outcome: Literal["ready", "regenerated", "dropped_unscored", "resampled"]


@dataclass(frozen=True)
class Refused:
    """The group does not count; nothing about other groups changed."""

    reason: Literal["committed", "expired", "released", "closed", "unknown", "not_the_holder", "future_version"]


class Leases:
    """The open leases, and how the latest closed ones ended.

    Args:
        lease_s: seconds until an open lease expires.
    """

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        # By lease id, which is also the order of deadlines. Ordered, since finding the first of a dict from whose
        # front many were removed takes longer the more they were.
        self.open: OrderedDict[int, Lease] = OrderedDict()
        self.held: Counter[str] = Counter()  # open ones by actor
        self.next_id = 0
        self.counts: Counter[str] = Counter()
        self._closed: OrderedDict[int, str] = OrderedDict()

    def give(self, task: Task, actor: str, now: float) -> Lease:
        """A new lease of `task` for `actor`."""
        lease = Lease(self.next_id, task, actor, now + self.lease_s)
        self.next_id += 1
        self.open[lease.id] = lease
        self.held[actor] += 1
        self.counts["leased"] += 1
        return lease

    def close(self, lease_id: int, how: Literal["committed", "expired", "released"]) -> Task:
        """End an open lease and count it; what it was for."""
        self._closed[lease_id] = how
        if len(self._closed) > REMEMBERED_LEASES:
            self._closed.popitem(last=False)
        self.counts[how] += 1
        lease = self.open.pop(lease_id)
        self.held[lease.actor] -= 1
        if not self.held[lease.actor]:
            del self.held[lease.actor]
        return lease.task

    def overdue(self, now: float) -> list[int]:
        """Open leases whose deadline has passed."""
        return [lease.id for lease in takewhile(lambda lease: lease.deadline < now, self.open.values())]

    def held_by(self, actor: str) -> list[int]:
        """The open leases of an actor."""
        return [lease.id for lease in self.open.values() if lease.actor == actor]

    def refusal(self, lease_id: int, actor: str, prompt_id: str) -> Refused | None:
        """Why nothing may be committed under `lease_id`; None when `actor` holds it for that prompt."""
        lease = self.open.get(lease_id)
        if lease is None:
            ended = self._closed.get(lease_id, "closed") if lease_id < self.next_id else "unknown"
            return Refused(ended)  # type: ignore[arg-type]
        return None if (lease.actor, lease.prompt.id) == (actor, prompt_id) else Refused("not_the_holder")

    def restart(self, next_id: int, counts: dict[str, int]) -> None:
        """Nothing is open any more; ids given before, here or in the saved run, are never given again."""
        self.next_id = max(self.next_id, next_id)
        self.held.clear()
        self.open, self._closed, self.counts = OrderedDict(), OrderedDict(), Counter(counts)
