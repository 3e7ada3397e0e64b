"""A rollout actor's side of the queue: one call for a group, or for several that are finished at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from actors.packed import PackedGroup, from_wire, to_wire
from uniapl.leases import Lease
from uniapl.records import Group

LEASE_WAIT_S = 5.0


class QueueClient:
    """The calls of one rollout actor, whose coroutines each lease, work and commit in turn.

    A commit brings the next leases back with it, where there is room. What comes together while a call is
    under way, finished groups or wishes for a lease, goes into the next one: where the queue is slow, there are
    fewer calls.

    Args:
        queue: handle of the queue actor.
        actor: this rollout actor's name.
        rounds: leases come with `lease_round` alone, never with a commit.
    """

    def __init__(self, queue: Any, actor: str, rounds: bool = False) -> None:
        self._queue = queue
        self._actor = actor
        self._rounds = rounds
        self._finished: list[tuple[PackedGroup, asyncio.Future[bool]]] = []
        self._committing: asyncio.Task | None = None
        self._idle: list[asyncio.Future[Lease | None]] = []
        self._leasing: asyncio.Task | None = None
        self._given: deque[Lease] = deque()
        """Leases that came with a commit, for the next who ask."""

    async def lease(self) -> Lease | None:
        """The next prompt; None after `LEASE_WAIT_S` without one, or when the queue was stopped."""
        if self._given:
            return self._given.popleft()
        answer: asyncio.Future[Lease | None] = asyncio.get_running_loop().create_future()
        self._idle.append(answer)
        if self._leasing is None or self._leasing.done():
            self._leasing = asyncio.create_task(self._lease_for_idle())
        return await answer

    async def lease_round(self) -> list[Lease]:
        """All that this actor has to make of the next round; empty as `lease` gives None."""
        return await self._queue.lease_round.remote(self._actor, LEASE_WAIT_S) or []

    async def commit(self, group: Group) -> bool:
        """Hand over a scored group; False when its lease had ended: then the group does not count."""
        return await self.commit_packed(PackedGroup.of(group))

    async def commit_packed(self, group: PackedGroup) -> bool:
        """As `commit`."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._finished.append((group, answer))
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._commit_finished())
        return await answer

    async def release(self, lease_id: int, reason: str) -> None:
        """Give a lease back without a group."""
        await self._queue.release.remote(lease_id, reason)

    async def close(self) -> None:
        """Give back the leases that nobody took."""
        while self._given:
            await self.release(self._given.popleft().id, "the rollout actor stopped")

    async def _commit_finished(self) -> None:
        while self._finished:
            sent, self._finished = self._finished, []
            want = 0 if self._rounds else len(sent)
            try:
                wire = to_wire([group for group, _ in sent])
                accepted, leases = from_wire(await self._queue.commit.remote(wire, want))
            except Exception as error:
                for _, answer in sent:
                    answer.set_exception(error)
                continue
            self._given.extend(leases)
            for (_, answer), counts in zip(sent, accepted, strict=True):
                answer.set_result(counts)

    async def _lease_for_idle(self) -> None:
        while self._idle:
            asked, self._idle = self._idle, []
            try:
                leases = await self._queue.lease.remote(self._actor, len(asked), LEASE_WAIT_S)
            except Exception as error:
                for answer in asked:
                    answer.set_exception(error)
                continue
            # Those without a lease ask again, together with those who came since; without any all hear of it.
            unserved = asked[len(leases) :]
            for answer, lease in zip(asked, leases or [None] * len(asked), strict=False):
                answer.set_result(lease)
            self._idle = (unserved if leases else []) + self._idle
