"""The mixing queue's rules as a pure state machine: leases, staleness, what a batch is made of.

One prompt's life: it is drawn from the prompt source and gets the next `sequence` number; it is
leased; its group is committed and stands ready; it goes into a batch; the batch's optimizer step is
published and the group is forgotten. On the way a lease may expire or be released, a group may hold
samples that nobody could score, or grow too old: then the prompt is leased again under its old
sequence number. Versions count published optimizer steps; batch k updates the weights of version k.

There is no clock here (`now`, in seconds, is passed in and never runs backward) and no I/O.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, Protocol, TypeVar

from uniapl.records import Demonstration, Prompt

T_co = TypeVar("T_co", covariant=True)
LEASE_COUNTERS = ("leased", "committed", "expired", "released")
GROUP_COUNTERS = ("consumed", "dropped_stale", "dropped_unscored", "regenerated")
REMEMBERED_LEASES = 4096
REMEMBERED_REASONS = 64


class Source(Protocol[T_co]):
    """An endless stream of records with a cursor that can be saved (JSON-able) and restored."""

    def next(self) -> T_co: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Task:
    """A prompt that has to become a group."""

    sequence: int
    """Place in the order in which prompts were drawn; groups enter batches in this order."""
    prompt: Prompt
    attempt: int = 0
    """How many groups of this prompt were thrown away because samples could not be scored."""


@dataclass(frozen=True)
class Lease:
    """The right to commit one group for one prompt until `deadline` (seconds on the queue's clock)."""

    id: int
    sequence: int
    prompt: Prompt
    attempt: int
    actor: str
    deadline: float

    @property
    def task(self) -> Task:
        return Task(self.sequence, self.prompt, self.attempt)


@dataclass(frozen=True)
class ReadyGroup:
    """A committed group; `handle` is the caller's, never looked into."""

    task: Task
    lease_id: int
    handle: Any
    oldest_version: int
    tokens: int
    actor: str


@dataclass(frozen=True)
class BatchPlan:
    """What optimizer step `step` consumes: groups in the order of their sequence, demonstrations."""

    step: int
    groups: list[ReadyGroup]
    demonstrations: list[Demonstration]


@dataclass(frozen=True)
class Committed:
    """The lease was open. `outcome` says whether the group is ready or why it was thrown away."""

    outcome: Literal["ready", "regenerated", "dropped_unscored"]


@dataclass(frozen=True)
class Refused:
    """The group does not count; nothing about other groups changed."""

    reason: Literal["committed", "expired", "released", "closed", "unknown", "not_the_holder", "future_version"]


@dataclass(frozen=True)
class _Taken:
    """A batch whose step is not yet published, and the demonstration cursor before it was made."""

    plan: BatchPlan
    cursor: dict[str, Any] | None


class MixingQueue:
    """Leases prompts, takes groups, makes batches.

    Args:
        prompts: never read when `groups_per_step` is 0, and may then be None.
        demonstrations: never read when `demonstrations_per_step` is 0, and may then be None.
        groups_per_step, demonstrations_per_step: what every batch holds.
        max_staleness: versions that a group may lie behind the weights it updates. 0 is strictly
            synchronous: nothing is leased between `next_batch` and `published`.
        lease_s: seconds until an open lease expires.
        max_regenerations: how often a prompt is leased again because samples were unscored.

    Raises:
        ValueError: a source that is needed is None, or every batch would be empty.
    """

    def __init__(
        self,
        prompts: Source[Prompt] | None,
        demonstrations: Source[Demonstration] | None,
        *,
        groups_per_step: int,
        demonstrations_per_step: int,
        max_staleness: int,
        lease_s: float,
        max_regenerations: int,
    ) -> None:
        if groups_per_step + demonstrations_per_step == 0:
            raise ValueError("groups_per_step and demonstrations_per_step are both 0: every batch would be empty")
        self._prompts = _needed(prompts, groups_per_step, "prompts")
        self._demonstrations = _needed(demonstrations, demonstrations_per_step, "demonstrations")
        self.groups_per_step = groups_per_step
        self.demonstrations_per_step = demonstrations_per_step
        self.max_staleness = max_staleness
        self.lease_s = lease_s
        self.max_regenerations = max_regenerations
        self._next_lease = 0
        self._next_sequence = 0
        self._step = 0
        self._published = 0
        self._waiting: dict[int, Task] = {}  # by sequence: to be leased again
        self._open: dict[int, Lease] = {}  # by lease id, which is also the order of deadlines
        self._ready: dict[int, ReadyGroup] = {}  # by sequence
        self._taken: list[_Taken] = []
        self._closed: dict[int, str] = {}  # lease id -> how it ended, of the latest leases
        self._counts: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._unscored: Counter[str] = Counter()

    @property
    def admissible(self) -> int:
        """How many leases admission allows now: groups that still fit under the staleness bound."""
        batches = self.max_staleness + 1 - (self._step - self._published)
        return max(0, batches * self.groups_per_step - len(self._open) - len(self._ready))

    def lease(self, actor: str, now: float) -> Lease | None:
        """The next prompt for `actor`, those to be leased again first; None when admission forbids."""
        self.expire(now)
        if self.admissible == 0:
            return None
        task = self._waiting.pop(min(self._waiting)) if self._waiting else self._draw()
        lease = Lease(self._next_lease, task.sequence, task.prompt, task.attempt, actor, now + self.lease_s)
        self._next_lease += 1
        self._open[lease.id] = lease
        self._counts["leased"] += 1
        return lease

    def commit(
        self,
        lease_id: int,
        handle: Any,
        *,
        oldest_version: int,
        tokens: int,
        unscored: list[str],
        actor: str,
        prompt_id: str,
        now: float,
    ) -> Committed | Refused:
        """Take the group made under a lease, once.

        Args:
            oldest_version: of the weights that sampled any of the group's tokens.
            unscored: one reason per sample that could not be scored.
            actor, prompt_id: must be the lease's; after a restart of the queue a lease id may come
                from another life.
        """
        self.expire(now)
        refusal = self._refusal(lease_id, actor, prompt_id, oldest_version)
        if refusal is not None:
            self._refused[refusal.reason] += 1
            return refusal
        task = self._close(lease_id, "committed").task
        if unscored:
            return self._throw_away(task, unscored)
        self._ready[task.sequence] = ReadyGroup(task, lease_id, handle, oldest_version, tokens, actor)
        return Committed("ready")

    def release(self, lease_id: int) -> bool:
        """Give an open lease back, so that its prompt is leased again; False when it was not open."""
        if lease_id not in self._open:
            return False
        self._return(lease_id, "released")
        return True

    def drop_actor(self, actor: str) -> int:
        """Release every lease of a lost actor; returns how many there were."""
        lost = [lease.id for lease in self._open.values() if lease.actor == actor]
        for lease_id in lost:
            self._return(lease_id, "released")
        return len(lost)

    def expire(self, now: float) -> int:
        """End the leases whose deadline has passed; returns how many there were."""
        overdue = list(takewhile(lambda lease: lease.deadline < now, self._open.values()))
        for lease in overdue:
            self._return(lease.id, "expired")
        return len(overdue)

    def next_batch(self) -> BatchPlan | None:
        """The next batch, or None while there are too few ready groups.

        Groups more than `max_staleness` versions behind the weights that this batch updates are
        dropped first, and their prompts leased again.
        """
        self._drop_stale()
        if len(self._ready) < self.groups_per_step:
            return None
        cursor = self._demonstrations.state_dict() if self._demonstrations else None
        groups = [self._ready.pop(sequence) for sequence in sorted(self._ready)[: self.groups_per_step]]
        plan = BatchPlan(self._step, groups, self._draw_demonstrations())
        self._step += 1
        self._taken.append(_Taken(plan, cursor))
        self._counts["consumed"] += len(groups)
        return plan

    def published(self, version: int) -> None:
        """The weights of `version` have reached the rollout actors: batches before it are done with.

        Raises:
            ValueError: the version runs backward, or ahead of the batches that were made.
        """
        if not self._published <= version <= self._step:
            raise ValueError(f"version {version} published; allowed: {self._published} to {self._step}")
        self._published = version
        self._taken = [taken for taken in self._taken if taken.plan.step >= version]

    def counters(self) -> dict[str, Any]:
        """What happened so far, and how much stands where now.

        leased = committed + expired + released + open;
        committed = consumed + ready + dropped_stale + dropped_unscored + regenerated.
        """
        return {
            **{name: self._counts[name] for name in LEASE_COUNTERS + GROUP_COUNTERS},
            "open": len(self._open),
            "ready": len(self._ready),
            "waiting": len(self._waiting),
            "drawn": self._next_sequence,
            "step": self._step,
            "published": self._published,
            "refused": dict(self._refused),
            "unscored": dict(self._unscored),
        }

    def state_dict(self, pack: Callable[[Any], Any] = lambda handle: handle, version: int | None = None) -> dict:
        """Everything a resumed run needs; JSON-able when what `pack` makes of a handle is.

        Open leases become prompts to be leased again. Batches that `version` does not contain are
        taken apart: their groups are ready again and the demonstration cursor stands before them.

        Args:
            version: optimizer steps in the weights saved beside this; the published version by default.

        Raises:
            ValueError: `version` is older than the published one, or not yet reached.
        """
        version = self._published if version is None else version
        if not self._published <= version <= self._step:
            raise ValueError(f"version {version} saved; allowed: {self._published} to {self._step}")
        undone = [taken for taken in self._taken if taken.plan.step >= version]
        again = [group for taken in undone for group in taken.plan.groups]
        ready = sorted([*self._ready.values(), *again], key=lambda group: group.task.sequence)
        leased = [lease.task for lease in self._open.values()]
        waiting = sorted([*self._waiting.values(), *leased], key=lambda task: task.sequence)
        counts = Counter(self._counts)
        counts.update(released=len(leased), consumed=-len(again))
        cursor = self._demonstrations.state_dict() if self._demonstrations else None
        return {
            "version": version,
            "next_lease": self._next_lease,
            "next_sequence": self._next_sequence,
            "waiting": [dataclasses.asdict(task) for task in waiting],
            "ready": [_packed(group, pack) for group in ready],
            "prompts": self._prompts.state_dict() if self._prompts else None,
            "demonstrations": undone[0].cursor if undone else cursor,
            "counts": dict(counts),
            "refused": dict(self._refused),
            "unscored": dict(self._unscored),
        }

    def load_state_dict(self, state: dict[str, Any], unpack: Callable[[Any], Any] = lambda packed: packed) -> None:
        """Continue from `state_dict`; leases open until now are closed, their ids never given again.

        A source that the saved run did not read starts at its beginning.
        """
        self._step = self._published = state["version"]
        self._next_lease = max(self._next_lease, state["next_lease"])
        self._next_sequence = state["next_sequence"]
        self._waiting = {entry["sequence"]: _task(entry) for entry in state["waiting"]}
        self._ready = {entry["task"]["sequence"]: _unpacked(entry, unpack) for entry in state["ready"]}
        self._open, self._closed, self._taken = {}, {}, []
        self._counts = Counter(state["counts"])
        self._refused, self._unscored = Counter(state["refused"]), Counter(state["unscored"])
        if self._prompts and state["prompts"] is not None:
            self._prompts.load_state_dict(state["prompts"])
        if self._demonstrations and state["demonstrations"] is not None:
            self._demonstrations.load_state_dict(state["demonstrations"])

    def _draw(self) -> Task:
        assert self._prompts is not None  # noqa: S101 (admission is 0 without groups)
        task = Task(self._next_sequence, self._prompts.next())
        self._next_sequence += 1
        return task

    def _draw_demonstrations(self) -> list[Demonstration]:
        if self._demonstrations is None:
            return []
        return [self._demonstrations.next() for _ in range(self.demonstrations_per_step)]

    def _refusal(self, lease_id: int, actor: str, prompt_id: str, oldest_version: int) -> Refused | None:
        lease = self._open.get(lease_id)
        if lease is None:
            ended = self._closed.get(lease_id, "closed") if lease_id < self._next_lease else "unknown"
            return Refused(ended)  # type: ignore[arg-type]
        if (lease.actor, lease.prompt.id) != (actor, prompt_id):
            return Refused("not_the_holder")
        if oldest_version > self._step:
            self._return(lease_id, "released")
            return Refused("future_version")
        return None

    def _close(self, lease_id: int, how: str) -> Lease:
        self._closed[lease_id] = how
        if len(self._closed) > REMEMBERED_LEASES:
            del self._closed[next(iter(self._closed))]
        self._counts[how] += 1
        return self._open.pop(lease_id)

    def _return(self, lease_id: int, how: str) -> None:
        task = self._close(lease_id, how).task
        self._waiting[task.sequence] = task

    def _throw_away(self, task: Task, unscored: list[str]) -> Committed:
        for reason in unscored:
            if reason in self._unscored or len(self._unscored) < REMEMBERED_REASONS:
                self._unscored[reason] += 1
        if task.attempt >= self.max_regenerations:
            self._counts["dropped_unscored"] += 1
            return Committed("dropped_unscored")
        self._counts["regenerated"] += 1
        self._waiting[task.sequence] = dataclasses.replace(task, attempt=task.attempt + 1)
        return Committed("regenerated")

    def _drop_stale(self) -> None:
        stale = [g for g in self._ready.values() if self._step - g.oldest_version > self.max_staleness]
        for group in stale:
            del self._ready[group.task.sequence]
            self._waiting[group.task.sequence] = group.task
        self._counts["dropped_stale"] += len(stale)


def _needed(source: Any, per_step: int, name: str) -> Any:
    """`source` where it is read, None where it is not."""
    if per_step and source is None:
        raise ValueError(f"{name}: no source, but {per_step} are wanted per step")
    return source if per_step else None


def _packed(group: ReadyGroup, pack: Callable[[Any], Any]) -> dict[str, Any]:
    fields = {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    return {**fields, "task": dataclasses.asdict(group.task), "handle": pack(group.handle)}


def _unpacked(entry: dict[str, Any], unpack: Callable[[Any], Any]) -> ReadyGroup:
    return ReadyGroup(**{**entry, "task": _task(entry["task"]), "handle": unpack(entry["handle"])})


def _task(entry: dict[str, Any]) -> Task:
    return Task(**{**entry, "prompt": Prompt(**entry["prompt"])})
