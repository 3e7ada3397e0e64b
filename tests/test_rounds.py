"""Rounds of the synchronous mode: who makes which group follows from sequence and members, not from timing."""

from __future__ import annotations

import asyncio

from helpers_mixing import Counting, commit, demonstration, make_queue, prompt

from actors.queue import QueueActor
from uniapl.config import Config
from uniapl.rounds import lease_round

SOON = 5.0


def shares(round_: dict) -> dict[str, list[int]]:
    return {actor: [lease.sequence for lease in leases] for actor, leases in round_.items()}


class TestRules:
    def test_a_round_is_shared_out_by_sequence(self) -> None:
        queue = make_queue(groups=5)
        assert shares(lease_round(queue, ["a", "b"], 0.0)) == {"a": [0, 2, 4], "b": [1, 3]}
        assert queue.admissible == 0

    def test_fewer_prompts_than_actors_leave_some_out(self) -> None:
        assert shares(lease_round(make_queue(groups=2), ["a", "b", "c"], 0.0)) == {"a": [0], "b": [1]}

    def test_no_round_begins_while_a_lease_is_open_and_what_is_made_again_goes_by_sequence(self) -> None:
        queue = make_queue(groups=4, resamples=1)
        first = lease_round(queue, ["a", "b"], 0.0)
        last = first["b"].pop()
        for lease in [*first["b"], *first["a"]]:
            commit(queue, lease, equal=lease.sequence in (0, 2))
        assert lease_round(queue, ["a", "b"], 0.0) == {}
        commit(queue, last, equal=True)
        again = lease_round(queue, ["a", "b"], 0.0)
        assert shares(again) == {"a": [0, 3], "b": [2]}
        assert {lease.attempt for leases in again.values() for lease in leases} == {1}

    def test_nobody_no_round(self) -> None:
        assert lease_round(make_queue(), [], 0.0) == {}

    def test_leases_that_expired_make_the_next_round(self) -> None:
        queue = make_queue(groups=2, lease_s=10.0, reissues=1)
        lease_round(queue, ["a", "b"], 0.0)
        assert lease_round(queue, ["a"], 9.0) == {}
        assert shares(lease_round(queue, ["a"], 11.0)) == {"a": [0, 1]}


def actor(groups: int = 4) -> QueueActor:
    tree = {
        "model": {"path": "unused"},
        "data": {"train": ["unused"]},
        "evaluation": {"prompts": 0},
        "queue": {"groups_per_step": groups, "demonstrations_per_step": 1},
    }
    return QueueActor(Config.model_validate(tree), Counting(prompt), Counting(demonstration))


class TestActor:
    def test_each_member_gets_its_share_whoever_asks_first(self) -> None:
        async def ask(order: list[str]) -> dict[str, list[int]]:
            queue = actor()
            await queue.set_members(["b", "a"])
            asked = {name: asyncio.create_task(queue.lease_round(name, SOON)) for name in order}
            found = {name: [lease.sequence for lease in await task or []] for name, task in asked.items()}
            await queue.stop()
            return found

        expected = {"a": [0, 2], "b": [1, 3]}
        assert asyncio.run(ask(["a", "b"])) == expected
        assert asyncio.run(ask(["b", "a"])) == expected

    def test_a_lost_members_share_is_made_by_the_rest_when_they_are_done(self) -> None:
        async def lose() -> list[int]:
            queue = actor()
            await queue.set_members(["a", "b"])
            mine = await queue.lease_round("a", SOON) or []
            waiting = asyncio.create_task(queue.lease_round("a", SOON))
            assert await queue.drop_actor("b") == 2
            await asyncio.sleep(0.05)
            assert not waiting.done()
            for lease in mine:
                await queue.release(lease.id, "test")
            return [lease.sequence for lease in await waiting or []]

        assert asyncio.run(lose()) == [0, 1, 2, 3]

    def test_a_newcomer_takes_part_from_the_next_round_on(self) -> None:
        async def join() -> tuple[list[int], list[int]]:
            queue = actor()
            await queue.set_members(["a"])
            mine = await queue.lease_round("a", SOON) or []
            assert len(mine) == 4
            new = asyncio.create_task(queue.lease_round("b", SOON))
            await asyncio.sleep(0.05)
            for lease in mine:
                await queue.release(lease.id, "test")
            share = await queue.lease_round("a", SOON) or []
            return [lease.sequence for lease in share], [lease.sequence for lease in await new or []]

        assert asyncio.run(join()) == ([0, 2], [1, 3])

    def test_what_is_saved_is_the_state_before_the_round(self) -> None:
        """Half a round would be computed in other batches when the run goes on, with other last bits."""

        async def save() -> dict:
            queue = actor()
            await queue.published(0)
            before = await queue.state(0)
            await queue.lease_round("a", SOON)
            after = await queue.state(0)
            assert after == before
            return after

        state = asyncio.run(save())
        assert (state["next_sequence"], state["next_lease"], state["waiting"], state["ready"]) == (0, 0, [], [])
