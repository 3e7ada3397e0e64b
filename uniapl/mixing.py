"""The mixing queue's rules as a pure state machine: admission, staleness, what a batch is made of.

One prompt's life: it is drawn from the prompt source and gets the next `sequence` number; it is
leased; its group is committed and stands ready; it goes into a batch; the batch's optimizer step is
published and the group is forgotten. On the way a lease may expire or be released, a group may hold
samples that nobody could score, hold equal rewards alone, or grow too old: then the prompt is leased
again under its old sequence number. Versions count published optimizer steps; batch k updates the
weights of version k.

There is no clock here (`now`, in seconds, is passed in and never runs backward) and no I/O.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from uniapl.feed import Feed, Needs, Source
from uniapl.leases import (
    LEASE_COUNTERS,
    MAX_LOSSES,
    NEW_WEIGHTS,
    STRAGGLER,
    Committed,
    Lease,
    Leases,
    Refused,
    Task,
    task_from_dict,
)
from uniapl.ready import BatchPlan, ReadyGroup, ReadyGroups, pack_ready, unpack_ready
from uniapl.records import Demonstration, Prompt

GROUP_COUNTERS = (
    "consumed",
    "dropped_stale",
    "dropped_unscored",
    "regenerated",
    "resampled",
    "kept_equal",
    "stale_used",
    "aborted",
    "stragglers_accepted",
    "stragglers_reissued",
    "dropped_straggler",
    "dropped_lethal",
)
REMEMBERED_REASONS = 64


@dataclass(frozen=True)
class _Taken:
    """A batch whose step is not yet published, and the demonstration cursor before it was made."""

    plan: BatchPlan
    cursor: dict[str, Any] | None


class MixingQueue:
    """Leases prompts, takes groups, makes batches.

    Args:
        prompts: None only when no batch needs groups.
        demonstrations: None only when no batch needs demonstrations.
        needs: what each batch holds.
        max_staleness: versions that a group may lie behind the weights it updates. 0 is strictly
            synchronous: nothing is leased between `next_batch` and `published`.
        lease_s: seconds until an open lease expires.
        max_regenerations: how often a prompt is leased again because samples were unscored.
        max_resamples: how often a prompt is leased again because all rewards of its group were equal
            (dynamic sampling, DAPO); then the group is kept. 0 keeps every such group.
        max_reissues: how often a prompt is leased again because samples were missing at the deadline of
            its group, or its lease expired; then it is dropped.
        drop_stale: lease the prompts of older groups again; without, such groups are used and counted.

    Raises:
        ValueError: the first batch would be empty, or needs a source that is None. `lease` and `next_batch`
            raise the same of the batches after it.
    """

    def __init__(
        self,
        prompts: Source[Prompt] | None,
        demonstrations: Source[Demonstration] | None,
        *,
        needs: Needs,
        max_staleness: int,
        lease_s: float,
        max_regenerations: int,
        max_resamples: int,
        max_reissues: int = 0,
        drop_stale: bool = True,
    ) -> None:
        self._feed = Feed(prompts, demonstrations, needs)
        self.max_staleness = max_staleness
        self.max_regenerations = max_regenerations
        self.max_resamples = max_resamples
        self.max_reissues = max_reissues
        self.drop_stale = drop_stale
        self._leases = Leases(lease_s)
        self._next_sequence = 0
        self._step = 0
        self._published = 0
        self._waiting: dict[int, Task] = {}  # by sequence: to be leased again
        self._ready = ReadyGroups()
        self._taken: list[_Taken] = []
        self._counts: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._unscored: Counter[str] = Counter()
        self._feed.needs(0)

    @property
    def admissible(self) -> int:
        """How many leases admission allows now.

        What is leased or ready must fit into the batches from the next one to make up to the one that is
        `max_staleness` steps ahead of the published version.
        """
        ahead = range(self._step, self._published + self.max_staleness + 1)
        return max(0, sum(self._feed.groups(step) for step in ahead) - len(self._leases.open) - len(self._ready))

    def share(self, actor: str, actors: int) -> int:
        """How many leases `actor` may take at once: what is missing to its part of all that may be open, or one."""
        held = self._leases.held
        part = math.ceil((len(self._leases.open) + self.admissible) / max(actors, len(held)))
        return max(1, part - held[actor])

    @property
    def fillable(self) -> bool:
        """Whether `next_batch` has something to do: a batch to make, or groups that are too old to drop."""
        old = self.drop_stale and self._ready.any_older(self._oldest_fresh)
        return old or len(self._ready) >= self._feed.groups(self._step)

    @property
    def open(self) -> int:
        """How many leases are open."""
        return len(self._leases.open)

    def lease(self, actor: str, now: float) -> Lease | None:
        """The next prompt for `actor`, those to be leased again first; None when admission forbids."""
        self.expire(now)
        if self.admissible == 0:
            return None
        task = self._waiting.pop(min(self._waiting)) if self._waiting else self._draw()
        return self._leases.give(task, actor, now)

    def commit(
        self,
        lease_id: int,
        handle: Any,
        *,
        oldest_version: int,
        tokens: int,
        unscored: list[str],
        equal_rewards: bool,
        actor: str,
        prompt_id: str,
        now: float,
        partial: bool = False,
    ) -> Committed | Refused:
        """Take the group made under a lease, once.

        Args:
            oldest_version: of the weights that sampled any of the group's tokens.
            unscored: one reason per sample that could not be scored.
            equal_rewards: all samples have the same reward; not looked at when any is unscored.
            actor, prompt_id: must be the lease's; after a restart of the queue a lease id may come
                from another life.
            partial: samples that were missing at the deadline are left out; only counted.
        """
        self.expire(now)
        refusal = self._refusal(lease_id, actor, prompt_id, oldest_version)
        if refusal is not None:
            self._refused[refusal.reason] += 1
            return refusal
        task = self._leases.close(lease_id, "committed")
        self._counts["stragglers_accepted"] += partial
        if unscored:
            return self._throw_away(task, unscored)
        if equal_rewards and task.resamples < self.max_resamples:
            return self._again(dataclasses.replace(task, resamples=task.resamples + 1), "resampled")
        self._counts["kept_equal"] += equal_rewards
        self._ready.add(ReadyGroup(task, lease_id, handle, oldest_version, tokens, actor))
        return Committed("ready")

    def release(self, lease_id: int, reason: str = "") -> bool:
        """Give an open lease back, so that its prompt is leased again; False when it was not open.

        A prompt released as a `STRAGGLER` more than `max_reissues` times is dropped instead.
        """
        if lease_id not in self._leases.open:
            return False
        task = self._leases.close(lease_id, "released")
        if reason == STRAGGLER:
            self._reissue(task)
            return True
        if reason == NEW_WEIGHTS:
            self._counts["aborted"] += 1
            task = dataclasses.replace(task, aborts=task.aborts + 1)
        self._waiting[task.sequence] = task
        return True

    def drop_actor(self, actor: str) -> int:
        """Release every lease of a lost actor, drop a prompt lost so too often; returns how many there were."""
        lost = self._leases.held_by(actor)
        for lease_id in lost:
            task = self._leases.close(lease_id, "released")
            if task.losses >= MAX_LOSSES:
                self._counts["dropped_lethal"] += 1
            else:
                self._waiting[task.sequence] = dataclasses.replace(task, losses=task.losses + 1)
        return len(lost)

    def expire(self, now: float) -> int:
        """End the leases whose deadline has passed, each as a straggler's; returns how many there were."""
        overdue = self._leases.overdue(now)
        for lease_id in overdue:
            self._reissue(self._leases.close(lease_id, "expired"))
        return len(overdue)

    def next_batch(self) -> BatchPlan | None:
        """The next batch, or None while there are too few ready groups.

        Groups more than `max_staleness` versions behind the weights that this batch updates are
        dropped first, and their prompts leased again; with `drop_stale` off they are used, and counted.

        Raises:
            ValueError: the batch would be empty, or needs a source that is None.
        """
        wanted, demonstrations = self._feed.needs(self._step)
        self._drop_stale()
        if len(self._ready) < wanted:
            return None
        cursor = self._feed.cursors()["demonstrations"]
        groups = self._ready.take(wanted)
        self._counts["stale_used"] += sum(group.oldest_version < self._oldest_fresh for group in groups)
        plan = BatchPlan(self._step, groups, self._feed.demonstrations(demonstrations))
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
        committed = consumed + ready + dropped_stale + dropped_unscored + regenerated + resampled;
        released holds aborted and dropped_lethal; it and expired hold stragglers_reissued and dropped_straggler;
        drawn = consumed + ready + waiting + open + dropped_unscored + dropped_straggler + dropped_lethal;
        kept_equal: groups of equal rewards that became ready; stale_used: consumed groups beyond max_staleness;
        stragglers_accepted: committed groups without the samples that were missing at the deadline;
        skipped_prompts, skipped_demonstrations, cut_experts: of the sources, see `uniapl.feed.ROW_COUNTERS`.
        """
        return {
            **{name: self._leases.counts[name] for name in LEASE_COUNTERS},
            **{name: self._counts[name] for name in GROUP_COUNTERS},
            **self._feed.rows(),
            "open": len(self._leases.open),
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
        ready = sorted([*self._ready, *again], key=lambda group: group.task.sequence)
        leased = [lease.task for lease in self._leases.open.values()]
        waiting = sorted([*self._waiting.values(), *leased], key=lambda task: task.sequence)
        lease_counts, counts = Counter(self._leases.counts), Counter(self._counts)
        lease_counts["released"] += len(leased)
        counts["consumed"] -= len(again)
        cursors = self._feed.cursors()
        return {
            "version": version,
            "next_lease": self._leases.next_id,
            "lease_counts": dict(lease_counts),
            "next_sequence": self._next_sequence,
            "waiting": [dataclasses.asdict(task) for task in waiting],
            "ready": [pack_ready(group, pack) for group in ready],
            "prompts": cursors["prompts"],
            "demonstrations": undone[0].cursor if undone else cursors["demonstrations"],
            "counts": dict(counts),
            "refused": dict(self._refused),
            "unscored": dict(self._unscored),
        }

    def load_state_dict(self, state: dict[str, Any], unpack: Callable[[Any], Any] = lambda packed: packed) -> None:
        """Continue from `state_dict`; leases open until now are closed, their ids never given again.

        A source that the saved run did not read starts at its beginning.
        """
        self._step = self._published = state["version"]
        self._leases.restart(state["next_lease"], state["lease_counts"])
        self._next_sequence = state["next_sequence"]
        self._waiting = {entry["sequence"]: task_from_dict(entry) for entry in state["waiting"]}
        self._ready = ReadyGroups([unpack_ready(entry, unpack) for entry in state["ready"]])
        self._taken = []
        self._counts = Counter(state["counts"])
        self._refused, self._unscored = Counter(state["refused"]), Counter(state["unscored"])
        self._feed.load_cursors(state)

    def _draw(self) -> Task:
        task = Task(self._next_sequence, self._feed.prompt())
        self._next_sequence += 1
        return task

    def _refusal(self, lease_id: int, actor: str, prompt_id: str, oldest_version: int) -> Refused | None:
        refusal = self._leases.refusal(lease_id, actor, prompt_id)
        if refusal is None and oldest_version > self._step:
            task = self._leases.close(lease_id, "released")
            self._waiting[task.sequence] = task
            return Refused("future_version")
        return refusal

    def _reissue(self, task: Task) -> None:
        """Have a prompt whose group was not there in time sampled anew, with another seed, or drop it."""
        if task.reissues >= self.max_reissues:
            self._counts["dropped_straggler"] += 1
            return
        self._counts["stragglers_reissued"] += 1
        self._waiting[task.sequence] = dataclasses.replace(task, reissues=task.reissues + 1)

    def _again(self, task: Task, outcome: Literal["regenerated", "resampled"]) -> Committed:
        self._counts[outcome] += 1
        self._waiting[task.sequence] = task
        return Committed(outcome)

    def _throw_away(self, task: Task, unscored: list[str]) -> Committed:
        for reason in unscored:
            if reason in self._unscored or len(self._unscored) < REMEMBERED_REASONS:
                self._unscored[reason] += 1
        if task.regenerations >= self.max_regenerations:
            self._counts["dropped_unscored"] += 1
            return Committed("dropped_unscored")
        return self._again(dataclasses.replace(task, regenerations=task.regenerations + 1), "regenerated")

    @property
    def _oldest_fresh(self) -> int:
        """The oldest version that may have sampled a token of the next batch."""
        return self._step - self.max_staleness

    def _drop_stale(self) -> None:
        stale = self._ready.take_older(self._oldest_fresh) if self.drop_stale else []
        for group in stale:
            self._waiting[group.task.sequence] = group.task
        self._counts["dropped_stale"] += len(stale)
