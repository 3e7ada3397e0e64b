"""The mixing queue as an async Ray actor: long polls around `uniapl.mixing`, groups in the object store.

Rollout actors call `lease` and `commit`, the driver calls `next_batch` and `published`. Groups are put
into the object store by this actor and therefore live as long as it does, not as long as the rollout
actor that made them; the driver and the learner get references.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from uniapl.config import Config
from uniapl.leases import Lease
from uniapl.mixing import BatchPlan, Committed, MixingQueue, ReadyGroup, Source
from uniapl.records import Demonstration, Group, Prompt, Sample, Score, VersionSpan
from uniapl.rounds import lease_round

T = TypeVar("T")
MAX_CONCURRENCY = 10_000
"""Calls in flight: every rollout actor holds a long poll open for each group that it wants."""
EXPIRY_CHECK_S = 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupEntry:
    """A group of a batch: `ref` resolves to a `records.Group`; the rest is known without fetching it."""

    ref: ray.ObjectRef
    lease_id: int
    tokens: int
    oldest_version: int
    actor: str
    generate_s: float
    score_s: float


@dataclass(frozen=True)
class BatchRefs:
    """What optimizer step `step` consumes, by reference; the order is the batch's order."""

    step: int
    groups: list[GroupEntry]
    demonstrations: list[Demonstration]


@dataclass(frozen=True)
class _Stored:
    """The handle that the mixing rules carry."""

    ref: ray.ObjectRef
    generate_s: float
    score_s: float


def start_queue(
    config: Config,
    prompts: Source[Prompt] | None = None,
    demonstrations: Source[Demonstration] | None = None,
) -> ray.actor.ActorHandle:
    """A running `QueueActor`. Its sources are opened from `config.data` inside it where none is given."""
    remote = ray.remote(num_cpus=0, max_concurrency=MAX_CONCURRENCY)(QueueActor)
    return remote.remote(config, prompts, demonstrations)


class QueueActor:
    """One per run. Every method is a coroutine; the rules never run two at a time."""

    def __init__(
        self,
        config: Config,
        prompts: Source[Prompt] | None = None,
        demonstrations: Source[Demonstration] | None = None,
    ) -> None:
        if prompts is None and demonstrations is None:
            from uniapl.data.sources import open_sources

            prompts, demonstrations = open_sources(config)
        queue, objective = config.queue, config.objective
        self._mixing = MixingQueue(
            prompts if objective.uses_rollouts else None,
            demonstrations if objective.uses_demonstrations else None,
            needs=lambda step: batch_needs(config, step),
            max_staleness=queue.max_staleness,
            drop_stale=queue.on_stale == "drop",
            lease_s=queue.lease_s,
            max_regenerations=queue.max_regenerations,
            max_resamples=queue.max_resamples if queue.on_equal_rewards == "resample" else 0,
        )
        self._lock = asyncio.Lock()
        self._room = asyncio.Condition(self._lock)  # for those who wait for a lease
        self._filled = asyncio.Condition(self._lock)  # for those who wait for a batch
        self._drops: Counter[str] = Counter()  # how often each actor was lost
        self._releases: Counter[str] = Counter()
        self._synchronous = queue.max_staleness == 0
        self._members: list[str] = []  # who takes part in rounds
        self._shares: dict[str, list[Lease]] = {}  # of the round, not yet asked for
        self._at_publish: dict[str, Any] | None = None  # the state before a round, in synchronous mode
        self._stopped = False
        self._expiry: asyncio.Task | None = None

    async def lease(self, actor: str, wait_s: float) -> Lease | None:
        """The next prompt for `actor`; None after `wait_s` seconds without one, or when stopped or dropped."""
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._expire_for_ever())
        drops = self._drops[actor]

        def attempt() -> Lease | None:
            return self._mixing.lease(actor, time.monotonic())

        return await self._poll(self._room, attempt, wait_s, given_up=lambda: self._drops[actor] != drops)

    async def set_members(self, actors: list[str]) -> None:
        """Who takes part in rounds from the next one on; whoever asks without being named joins them."""
        self._members = sorted(actors)
        await self._wake(everyone=True)

    async def lease_round(self, actor: str, wait_s: float) -> list[Lease] | None:
        """All that `actor` has to make of the next round (`uniapl.rounds`); None as from `lease`.

        For the strictly synchronous mode: a round begins when no lease is open, so that what a member gets,
        and in which order, follows from the seed and the members alone.
        """
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._expire_for_ever())
        if actor not in self._members:
            self._members = sorted([*self._members, actor])
        drops = self._drops[actor]

        def attempt() -> list[Lease] | None:
            if not self._shares:
                self._shares = lease_round(self._mixing, self._members, time.monotonic())
                if self._shares:
                    self._room.notify_all()
            return self._shares.pop(actor, None)

        return await self._poll(self._room, attempt, wait_s, given_up=lambda: self._drops[actor] != drops)

    async def commit(self, lease_id: int, group: Group) -> bool:
        """Take a scored group, once; False when its lease had ended: then the group does not count."""
        stored = _Stored(ray.put(group), group.generate_s, group.score_s)
        result = self._mixing.commit(
            lease_id,
            stored,
            oldest_version=group.oldest_version,
            tokens=group.tokens,
            unscored=group.unscored,
            equal_rewards=has_equal_rewards(group),
            actor=group.actor,
            prompt_id=group.prompt.id,
            now=time.monotonic(),
        )
        await self._wake()
        if isinstance(result, Committed):
            if group.unscored:
                logger.warning("prompt %s: %s, unscored: %s", group.prompt.id, result.outcome, group.unscored[0])
            return True
        logger.warning("lease %d of %s refused: %s", lease_id, group.actor, result.reason)
        return False

    async def release(self, lease_id: int, reason: str) -> None:
        """Give a lease back without a group; its prompt is leased again."""
        if self._mixing.release(lease_id):
            self._releases[reason[:100]] += 1
            await self._wake()

    async def drop_actor(self, actor: str) -> int:
        """Release all that a lost actor held and end its long polls; returns how many leases it held.

        An actor started again under the same name may lease at once.
        """
        self._drops[actor] += 1
        self._members = [member for member in self._members if member != actor]
        self._shares.pop(actor, None)
        lost = self._mixing.drop_actor(actor)
        await self._wake(everyone=True)
        return lost

    async def next_batch(self, wait_s: float) -> BatchRefs | None:
        """The next batch; None after `wait_s` seconds without enough ready groups, or when stopped."""

        def attempt() -> BatchPlan | None:
            plan = self._mixing.next_batch()
            self._room.notify(self._mixing.admissible)  # dropping over-stale groups may have made room
            return plan

        plan = await self._poll(self._filled, attempt, wait_s)
        if plan is None:
            return None
        return BatchRefs(plan.step, [_entry(group) for group in plan.groups], plan.demonstrations)

    async def published(self, version: int) -> None:
        """Rollout actors have the weights of `version`; its batches' groups are forgotten here.

        Raises:
            ValueError: the version runs backward, or ahead of the batches that were handed out.
        """
        self._mixing.published(version)
        if self._synchronous:
            state = self._mixing.state_dict()
            self._at_publish = None if state["ready"] else state  # ready: left over from an asynchronous life
        await self._wake()

    async def stats(self) -> dict[str, Any]:
        """`MixingQueue.counters`, with the reasons of releases and whether the queue was stopped."""
        return {**self._mixing.counters(), "releases": dict(self._releases), "stopped": self._stopped}

    async def state(self, version: int | None = None) -> dict[str, Any]:
        """Everything a resumed run needs, ready groups written out, JSON-able.

        In synchronous mode it is the state that the round of `version` began with: a resumed run makes the
        whole round again, for half a round would be computed in other batches, with other last bits.

        Args:
            version: optimizer steps in the checkpoint that this goes into; the published one by default.
        """
        if self._at_publish is not None and self._at_publish["version"] == version:
            return self._at_publish
        state = self._mixing.state_dict(version=version)
        groups = await asyncio.gather(*(entry["handle"].ref for entry in state["ready"]))
        for entry, group in zip(state["ready"], groups, strict=True):
            entry["handle"] = dataclasses.asdict(group)
        return state

    async def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`; whatever was leased or ready before is forgotten."""
        self._mixing.load_state_dict(state, unpack=_stored_from_dict)
        self._shares, self._at_publish = {}, None
        await self._wake()

    async def stop(self) -> None:
        """End every long poll with None, now and from now on."""
        self._stopped = True
        if self._expiry is not None:
            self._expiry.cancel()
        await self._wake(everyone=True)

    async def _poll(
        self,
        changed: asyncio.Condition,
        attempt: Callable[[], T | None],
        wait_s: float,
        given_up: Callable[[], bool] = lambda: False,
    ) -> T | None:
        """Attempt now and whenever `changed` is notified, until it gives something or `wait_s` is over."""
        try:
            async with asyncio.timeout(wait_s), changed:
                while not (self._stopped or given_up()):
                    if (found := attempt()) is not None:
                        return found
                    await changed.wait()
        except TimeoutError:
            await self._wake()  # a notification that came together with the timeout goes to another
        return None

    async def _wake(self, everyone: bool = False) -> None:
        """Wake as many waiters for a lease as there are leases to give, and those who wait for a batch."""
        async with self._lock:
            if everyone:
                self._room.notify_all()
            else:
                self._room.notify(self._mixing.admissible)
            self._filled.notify_all()

    async def _expire_for_ever(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_CHECK_S)
            if self._mixing.expire(time.monotonic()):
                await self._wake()


def batch_needs(config: Config, step: int) -> tuple[int, int]:
    """Groups and demonstrations of the batch for optimizer step `step`: none of what no term uses there."""
    queue, objective = config.queue, config.objective
    return (
        queue.groups_per_step if objective.rollouts_at(step) else 0,
        queue.demonstrations_per_step if objective.demonstrations_at(step) else 0,
    )


def has_equal_rewards(group: Group) -> bool:
    """Whether every sample was scored and all rewards are the same: by reward none is preferred."""
    rewards = {sample.score.reward if sample.score else None for sample in group.samples}
    return len(rewards) == 1 and None not in rewards


def _entry(group: ReadyGroup) -> GroupEntry:
    stored: _Stored = group.handle
    return GroupEntry(
        ref=stored.ref,
        lease_id=group.lease_id,
        tokens=group.tokens,
        oldest_version=group.oldest_version,
        actor=group.actor,
        generate_s=stored.generate_s,
        score_s=stored.score_s,
    )


def _stored_from_dict(packed: dict[str, Any]) -> _Stored:
    group = group_from_dict(packed)
    return _Stored(ray.put(group), group.generate_s, group.score_s)


def group_from_dict(packed: dict[str, Any]) -> Group:
    """The inverse of `dataclasses.asdict` on a group."""
    samples = [
        Sample(
            **{
                **sample,
                "versions": [VersionSpan(**span) for span in sample["versions"]],
                "score": sample["score"] and Score(**sample["score"]),
            }
        )
        for sample in packed["samples"]
    ]
    return Group(**{**packed, "prompt": Prompt(**packed["prompt"]), "samples": samples})
