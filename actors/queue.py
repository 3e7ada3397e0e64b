"""The mixing queue as an async Ray actor: long polls around `uniapl.mixing`, groups as blocks of bytes.

Rollout actors call `lease` and `commit` (see `queue_client`), the driver calls `next_batch` and `published`.
Groups are kept in this actor's memory and therefore live as long as it does, not as long as the rollout actor
that made them; a batch goes to the driver as one object.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import ray

from actors.packed import PackedBatch, PackedGroup, from_wire, packed, to_wire
from uniapl.config import Config
from uniapl.leases import Lease
from uniapl.loglines import log_lines
from uniapl.mixing import BatchPlan, Committed, MixingQueue, Source
from uniapl.records import Demonstration, Group, Prompt, Sample, Score, VersionSpan
from uniapl.rounds import lease_round

T = TypeVar("T")
MAX_CONCURRENCY = 10_000
"""Calls in flight: every rollout actor holds a long poll open for each group that it wants."""
EXPIRY_CHECK_S = 1.0
GC_ALLOCATIONS = 100_000
logger = logging.getLogger(__name__)


def start_queue(
    config: Config,
    prompts: Source[Prompt] | None = None,
    demonstrations: Source[Demonstration] | None = None,
    options: dict[str, Any] | None = None,
) -> ray.actor.ActorHandle:
    """A running `QueueActor`. Its sources are opened from `config.data` inside it where none is given.

    Args:
        options: further ones of Ray's, such as where it runs.
    """
    remote = ray.remote(num_cpus=0, max_concurrency=MAX_CONCURRENCY, enable_task_events=False)(QueueActor)
    return remote.options(**options or {}).remote(config, prompts, demonstrations)


class QueueActor:
    """One per run. Every method is a coroutine; the rules never run two at a time."""

    def __init__(
        self,
        config: Config,
        prompts: Source[Prompt] | None = None,
        demonstrations: Source[Demonstration] | None = None,
    ) -> None:
        self._lines = log_lines(config.run.name, "queue")
        if prompts is None and demonstrations is None:
            from uniapl.data.sources import open_sources

            prompts, demonstrations = open_sources(config)
        queue, objective = config.queue, config.objective
        self._mixing = MixingQueue(
            prompts if objective.uses_rollouts else None,
            demonstrations if objective.uses_demonstrations else None,
            needs=functools.lru_cache(maxsize=256)(functools.partial(batch_needs, config)),
            max_staleness=queue.max_staleness,
            drop_stale=queue.on_stale == "drop",
            lease_s=queue.lease_s,
            max_regenerations=queue.max_regenerations,
            max_resamples=queue.max_resamples if queue.on_equal_rewards == "resample" else 0,
            max_reissues=queue.max_reissues,
        )
        self._actors = config.rollout.actors
        self._group_size = config.rollout.group_size
        self._lock = asyncio.Lock()
        self._room = asyncio.Condition(self._lock)  # for those who wait for a lease
        self._filled = asyncio.Condition(self._lock)  # for those who wait for a batch
        self._polls = self._wanted = 0  # how many calls wait for leases, and for how many
        self._drops: Counter[str] = Counter()  # how often each actor was lost
        self._releases: Counter[str] = Counter()
        self._synchronous = queue.max_staleness == 0
        self._members: list[str] = []  # who takes part in rounds
        self._shares: dict[str, list[Lease]] = {}  # of the round, not yet asked for
        self._at_publish: dict[str, Any] | None = None  # the state before a round, in synchronous mode
        self._stopped = False
        self._expiry: asyncio.Task | None = None
        # Thousands of groups and leases without cycles: to walk them all again and again took a tenth of the time.
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS, *gc.get_threshold()[1:])

    async def lease(self, actor: str, count: int, wait_s: float) -> list[Lease]:
        """Up to `count` prompts for `actor`, and no more than its share, so that the others get theirs.

        Empty after `wait_s` seconds without a prompt, or when the queue was stopped or the actor dropped.
        """
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._expire_for_ever())
        drops = self._drops[actor]
        self._polls += 1
        self._wanted += count
        try:
            found = await self._poll(
                self._room,
                lambda: self._give(actor, min(count, self._mixing.share(actor, max(self._polls, self._actors)))),
                wait_s,
                given_up=lambda: self._drops[actor] != drops,
            )
        finally:
            self._polls -= 1
            self._wanted -= count
        return found or []

    def _give(self, actor: str, count: int) -> list[Lease] | None:
        """As many leases as admission allows; None where it allows none."""
        leases: list[Lease] = []
        while len(leases) < count and (lease := self._mixing.lease(actor, time.monotonic())) is not None:
            leases.append(lease)
        return leases or None

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

    async def commit(self, wire: bytes, want: int = 0) -> bytes:
        """Take scored groups of one actor, each once, and give it up to `want` leases where nobody waits for them.

        Args:
            wire: a list of `PackedGroup`, by `to_wire`.

        Returns:
            by `to_wire`: for each group whether it counts, which it does not when its lease had ended; and the leases.
        """
        groups: list[PackedGroup] = from_wire(wire)
        accepted = [self._take(group) for group in groups]
        await self._wake()
        spare = 0 if self._stopped else min(want, self._mixing.admissible - self._wanted)
        return to_wire((accepted, self._give(groups[0].actor, spare) or []))

    def _take(self, group: PackedGroup) -> bool:
        result = self._mixing.commit(
            group.lease_id,
            group,
            oldest_version=group.oldest_version,
            tokens=group.tokens,
            unscored=group.unscored,
            equal_rewards=group.equal_rewards,
            actor=group.actor,
            prompt_id=group.prompt_id,
            now=time.monotonic(),
            partial=group.samples < self._group_size,
        )
        if isinstance(result, Committed):
            if group.unscored:
                logger.warning("prompt %s: %s, unscored: %s", group.prompt_id, result.outcome, group.unscored[0])
            return True
        logger.warning("lease %d of %s refused: %s", group.lease_id, group.actor, result.reason)
        return False

    async def release(self, lease_id: int, reason: str) -> None:
        """Give a lease back without a group; its prompt is leased again, a straggler's not without a bound."""
        if self._mixing.release(lease_id, reason):
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

    async def next_batch(self, wait_s: float) -> PackedBatch | None:
        """The next batch; None after `wait_s` seconds without enough ready groups, or when stopped."""

        def attempt() -> BatchPlan | None:
            plan = self._mixing.next_batch()
            self._room.notify(self._mixing.admissible)  # dropping over-stale groups may have made room
            return plan

        plan = await self._poll(self._filled, attempt, wait_s)
        if plan is None:
            return None
        return PackedBatch(plan.step, [packed(group) for group in plan.groups], plan.demonstrations)

    async def published(self, version: int) -> None:
        """Rollout actors have the weights of `version`; its batches' groups are forgotten here.

        Raises:
            ValueError: the version runs backward, or ahead of the batches that were handed out.
        """
        self._mixing.published(version)
        self._lines.step = version + 1
        if self._synchronous:
            state = self._mixing.state_dict()
            self._at_publish = None if state["ready"] else state  # ready: left over from an asynchronous life
        await self._wake()

    async def stats(self) -> dict[str, Any]:
        """`MixingQueue.counters`, with the reasons of releases and whether the queue was stopped."""
        return {**self._mixing.counters(), "releases": dict(self._releases), "stopped": self._stopped}

    async def usage(self) -> dict[str, float]:
        """Processor seconds that the queue's process has used so far, and its resident memory in MiB."""
        return {"cpu_s": time.process_time(), "resident_mib": resident_mib()}

    async def state(self, version: int | None = None) -> dict[str, Any]:
        """Everything a resumed run needs, ready groups written out, JSON-able.

        In synchronous mode it is the state that the round of `version` began with: a resumed run makes the
        whole round again, for half a round would be computed in other batches, with other last bits.

        Args:
            version: optimizer steps in the checkpoint that this goes into; the published one by default.
        """
        if self._at_publish is not None and self._at_publish["version"] == version:
            return self._at_publish
        return self._mixing.state_dict(pack=lambda handle: dataclasses.asdict(handle.group()), version=version)

    async def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`; whatever was leased or ready before is forgotten."""
        self._mixing.load_state_dict(state, unpack=lambda group: PackedGroup.of(group_from_dict(group)))
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
            if everyone or self._mixing.fillable:
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


def resident_mib() -> float:
    """This process's resident memory."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        pages = int(statm.read().split()[1])
    return pages * resource.getpagesize() / 2**20


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
