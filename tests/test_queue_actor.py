"""The queue actor in a real Ray: long polls, exactly once, lost actors, stop, save and restore."""

import asyncio
import json
import sys
import time

import helpers_mixing
import helpers_queue
import pytest
import ray
from helpers_mixing import Counting, prompt
from helpers_queue import (
    LONG,
    SOON,
    commit_of,
    commit_one,
    lease_from,
    lease_of,
    make_group,
    still_waiting,
    taken,
)

from actors.packed import PackedGroup, from_wire
from actors.queue import start_queue
from actors.queue_client import QueueClient
from uniapl.config import Config

for module in (helpers_mixing, helpers_queue, sys.modules[__name__]):  # tests/ is not on the path of Ray's workers
    ray.cloudpickle.register_pickle_by_value(module)


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    started = not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20)
    yield
    if started:
        ray.shutdown()


@pytest.fixture
def make_queue():
    """Queue actors on counting sources, killed after the test."""
    queues = []

    def make(
        groups=2,
        demonstrations=1,
        staleness=0,
        lease_s=600.0,
        preference=1.0,
        demonstration=1.0,
        resamples=0,
        actors=1,
    ):
        config = Config.model_validate(
            {
                "model": {"path": "unused"},
                "data": {"train": ["unused"]},
                "evaluation": {"prompts": 0},
                "rollout": {"actors": actors},
                "queue": {
                    "groups_per_step": groups,
                    "demonstrations_per_step": demonstrations,
                    "max_staleness": staleness,
                    "lease_s": lease_s,
                    "on_equal_rewards": "resample" if resamples else "keep",
                    "max_resamples": resamples,
                },
                "objective": {"preference": {"weight": preference}, "demonstration": {"weight": demonstration}},
            }
        )
        queues.append(start_queue(config, Counting(prompt), Counting(helpers_mixing.demonstration)))
        return queues[-1]

    yield make
    for queue in queues:
        ray.kill(queue)


@ray.remote(num_cpus=0)
def produce(queue, actor):
    """Commit every group twice until the queue stops; how many commits were accepted and refused."""
    accepted = refused = 0
    while not ray.get(queue.stats.remote())["stopped"]:
        lease = lease_from(queue.lease.remote(actor, 1, 1.0))
        if lease is None:
            continue
        version = ray.get(queue.stats.remote())["published"]
        group = make_group(lease, version)
        for [counts], _ in map(from_wire, ray.get([commit_of(queue, group) for _ in range(2)])):
            accepted, refused = accepted + counts, refused + (not counts)
    return accepted, refused


@ray.remote(num_cpus=0)
class Producer:
    def commit_one(self, queue):
        return commit_one(queue, "short-lived").id


def test_concurrent_producers_feed_every_group_exactly_once(make_queue):
    queue = make_queue(groups=3, demonstrations=2, staleness=1)
    producers = [produce.remote(queue, f"actor-{n}") for n in range(3)]
    consumed, demonstrations = [], []
    for step in range(6):
        batch = ray.get(queue.next_batch.remote(LONG))
        assert batch.step == step
        groups = [entry.group() for entry in batch.groups]
        assert [group.lease_id for group in groups] == [entry.lease_id for entry in batch.groups]
        assert [group.tokens for group in groups] == [entry.tokens for entry in batch.groups]
        assert all(step - entry.oldest_version <= 1 for entry in batch.groups)
        consumed += [group.prompt.id for group in groups]
        demonstrations += [d.id for d in batch.demonstrations]
        ray.get(queue.published.remote(step + 1))
    ray.get(queue.stop.remote())
    accepted, refused = (sum(each) for each in zip(*ray.get(producers), strict=True))
    counters = ray.get(queue.stats.remote())
    assert len(consumed) == len(set(consumed)) == 18
    assert demonstrations == [str(n) for n in range(12)]
    assert accepted == counters["committed"] == counters["consumed"] + counters["ready"] + counters["dropped_stale"]
    assert refused == accepted == counters["refused"]["committed"]


def test_a_poll_for_a_lease_waits_for_room_and_gives_up_in_time(make_queue):
    queue = make_queue(groups=1)
    commit_one(queue)
    ray.get(queue.next_batch.remote(LONG))
    started = time.monotonic()
    assert lease_of(queue, wait_s=0.3) is None
    assert 0.3 <= time.monotonic() - started < SOON
    waiting = queue.lease.remote("a", 1, LONG)
    assert still_waiting(waiting)
    ray.get(queue.published.remote(1))
    assert lease_from(waiting, SOON).prompt.id == "1"


def test_an_actor_gets_its_share_at_once_and_more_one_by_one(make_queue):
    """However early it asks, the others still find theirs; however late they come, nothing lies idle."""
    queue = make_queue(groups=8, actors=2)
    counts = [len(ray.get(queue.lease.remote("a", 8, LONG))) for _ in range(2)]
    counts += [len(ray.get(queue.lease.remote("b", 8, LONG)))]
    assert counts == [4, 1, 3]


def test_a_commit_brings_new_leases_but_never_those_that_others_wait_for(make_queue):
    queue = make_queue(groups=2, staleness=1)
    lease = lease_of(queue)
    [counts], leases = from_wire(ray.get(commit_of(queue, make_group(lease), want=2), timeout=SOON))
    assert counts and [next_lease.actor for next_lease in leases] == ["a", "a"]
    last = lease_of(queue)
    waiting = queue.lease.remote("b", 1, LONG)
    assert still_waiting(waiting)
    bad = make_group(last, unscored="timeout")  # its prompt is leased again: to the one who waits
    assert from_wire(ray.get(commit_of(queue, bad, want=1), timeout=SOON)) == ([True], [])
    assert lease_from(waiting, SOON).prompt == last.prompt


async def work(queue, loops, groups):
    """One rollout actor's coroutines, which make `groups` groups through a client; what they committed."""
    client = QueueClient(queue, "a")
    committed = []

    async def loop():
        while len(committed) < groups:
            lease = await client.lease()
            if lease is not None:
                assert await client.commit(make_group(lease))
                committed.append(lease.id)

    await asyncio.gather(*(loop() for _ in range(loops)))
    await client.close()
    return committed


def test_a_client_leases_and_commits_for_many_coroutines_and_leaves_nothing_open(make_queue):
    queue = make_queue(groups=20, staleness=1)
    committed = asyncio.run(work(queue, loops=8, groups=25))
    assert len(committed) == len(set(committed)) >= 25
    stats = ray.get(queue.stats.remote())
    assert (stats["committed"], stats["open"]) == (len(committed), 0)
    assert stats["releases"] == ({"the rollout actor stopped": stats["released"]} if stats["released"] else {})


def test_a_lost_queue_is_an_error_for_whoever_leases(make_queue):
    queue = make_queue(groups=1)
    lease_of(queue)
    ray.kill(queue)
    with pytest.raises(ray.exceptions.ActorDiedError):
        asyncio.run(work(queue, loops=2, groups=1))


def test_a_poll_for_a_batch_wakes_on_the_commit_that_fills_it(make_queue):
    queue = make_queue(groups=2)
    assert ray.get(queue.next_batch.remote(0.1)) is None
    waiting = queue.next_batch.remote(LONG)
    first = commit_one(queue)
    assert still_waiting(waiting)
    second = commit_one(queue, "b")
    batch = ray.get(waiting, timeout=SOON)
    assert [(type(e), e.lease_id, e.actor, e.tokens, e.generate_s, e.score_s) for e in batch.groups] == [
        (PackedGroup, first.id, "a", 10, 0.5, 0.125),
        (PackedGroup, second.id, "b", 10, 0.5, 0.125),
    ]


def test_a_released_lease_wakes_whoever_waits_for_one(make_queue):
    queue = make_queue(groups=1)
    lease = lease_of(queue)
    waiting = queue.lease.remote("b", 1, LONG)
    assert still_waiting(waiting)
    ray.get(queue.release.remote(lease.id, "engine restarted"))
    assert lease_from(waiting, SOON).prompt == lease.prompt
    assert ray.get(queue.stats.remote())["releases"] == {"engine restarted": 1}


def test_an_expired_lease_is_noticed_without_anybody_calling(make_queue):
    queue = make_queue(groups=1, lease_s=0.2)
    lease = lease_of(queue)
    again = lease_from(queue.lease.remote("b", 1, LONG), SOON)
    assert again.prompt == lease.prompt
    assert taken(queue, make_group(lease)) is False


def test_an_unscored_group_counts_as_taken_and_is_made_again(make_queue):
    queue = make_queue(groups=1)
    lease = lease_of(queue)
    assert taken(queue, make_group(lease, unscored="reward timed out")) is True
    again = lease_of(queue)
    assert (again.prompt, again.attempt) == (lease.prompt, 1)
    assert ray.get(queue.stats.remote())["unscored"] == {"reward timed out": 2}


def test_a_group_of_equal_rewards_is_kept_by_default(make_queue):
    queue = make_queue(groups=1)
    lease = lease_of(queue)
    assert taken(queue, make_group(lease, rewards=(1.0, 1.0))) is True
    assert len(ray.get(queue.next_batch.remote(LONG)).groups) == 1
    stats = ray.get(queue.stats.remote())
    assert (stats["resampled"], stats["kept_equal"]) == (0, 1)


def test_a_group_of_equal_rewards_is_made_again_up_to_the_bound_then_kept(make_queue):
    queue = make_queue(groups=1, resamples=1)
    waiting = queue.next_batch.remote(LONG)
    first = lease_of(queue)
    assert taken(queue, make_group(first, rewards=(0.0, 0.0))) is True
    assert still_waiting(waiting)
    second = lease_of(queue, "b")
    assert (second.prompt, second.attempt) == (first.prompt, 1)
    taken(queue, make_group(second, rewards=(1.0, 1.0)))
    assert [entry.lease_id for entry in ray.get(waiting, timeout=SOON).groups] == [second.id]
    stats = ray.get(queue.stats.remote())
    assert (stats["resampled"], stats["kept_equal"]) == (1, 1)


def rewards_of(lease):
    """Rewards that follow from the prompt and the attempt alone, as those of a seeded engine do; many are equal."""
    return float((lease.sequence + lease.attempt) % 2), float(lease.sequence % 3 == lease.attempt)


def batches_of(queue, actors, newest_first):
    """The groups of three synchronous batches: how they came about is not to matter."""
    made = []
    for step in range(3):
        waiting, leases = queue.next_batch.remote(LONG), []
        while still_waiting(waiting, 0.0 if leases else 0.1):
            room = [lease_of(queue, actor, wait_s=0.05) for actor in actors]
            leases += [lease for lease in room if lease is not None]
            if leases:
                lease = leases.pop(-1 if newest_first else 0)
                group = make_group(lease, version=step, rewards=rewards_of(lease))
                taken(queue, group)
        groups = [entry.group() for entry in ray.get(waiting).groups]
        made.append([(g.prompt.id, [s.score.reward for s in g.samples]) for g in groups])
        ray.get(queue.published.remote(step + 1))
    return made


def test_with_resampling_synchronous_batches_do_not_depend_on_who_commits_when(make_queue):
    one, two = make_queue(groups=3, resamples=2), make_queue(groups=3, resamples=2)
    assert batches_of(one, ["a"], newest_first=False) == batches_of(two, ["a", "b", "c"], newest_first=True)
    stats = ray.get([one.stats.remote(), two.stats.remote()])
    assert stats[0]["resampled"] == stats[1]["resampled"] > 0


def test_dropping_over_stale_groups_wakes_whoever_waits_for_a_lease(make_queue):
    queue = make_queue(groups=1, staleness=0)
    commit_one(queue)
    ray.get([queue.next_batch.remote(LONG), queue.published.remote(1)])
    stale = commit_one(queue, version=0)
    waiting = queue.lease.remote("a", 1, LONG)
    assert still_waiting(waiting)
    batch = queue.next_batch.remote(LONG)
    assert lease_from(waiting, SOON).prompt == stale.prompt
    assert still_waiting(batch, 0.1)


def test_a_lost_actor_gives_up_its_leases_and_its_polls_but_may_come_back(make_queue):
    queue = make_queue(groups=1)
    lease = lease_of(queue, "lost")
    its_poll = queue.lease.remote("lost", 1, LONG)
    others_poll = queue.lease.remote("other", 1, LONG)
    assert still_waiting(its_poll) and still_waiting(others_poll)
    assert ray.get(queue.drop_actor.remote("lost")) == 1
    assert ray.get(its_poll, timeout=SOON) == []
    assert lease_from(others_poll, SOON).prompt == lease.prompt
    back = queue.lease.remote("lost", 1, LONG)
    assert still_waiting(back)
    ray.get(queue.drop_actor.remote("other"))
    assert lease_from(back, SOON).prompt == lease.prompt


def test_ready_groups_outlive_the_actor_that_made_them(make_queue):
    queue = make_queue(groups=1)
    producer = Producer.remote()
    lease_id = ray.get(producer.commit_one.remote(queue))
    ray.kill(producer)
    batch = ray.get(queue.next_batch.remote(LONG))
    assert batch.groups[0].group().lease_id == lease_id


def test_more_polls_than_a_ray_actor_takes_by_default_do_not_block_a_commit(make_queue):
    queue = make_queue(groups=1)
    lease = lease_of(queue)
    polls = [queue.lease.remote(f"actor-{n}", 1, LONG) for n in range(1200)]
    assert taken(queue, make_group(lease))
    ray.get([queue.next_batch.remote(LONG), queue.published.remote(1)])
    assert len(ray.wait(polls, num_returns=2, timeout=2.0)[0]) == 1  # there is room for one
    ray.get(queue.stop.remote())
    assert sum(len(found) for found in ray.get(polls, timeout=SOON)) == 1


def test_stop_ends_every_poll_with_none(make_queue):
    queue = make_queue(groups=2)
    lease_of(queue), lease_of(queue)
    polls = [queue.lease.remote("a", 1, LONG), queue.lease.remote("b", 1, LONG), queue.next_batch.remote(LONG)]
    assert all(still_waiting(poll, 0.1) for poll in polls)
    ray.get(queue.stop.remote())
    assert ray.get(polls, timeout=SOON) == [[], [], None]
    assert ray.get(queue.lease.remote("a", 1, LONG), timeout=SOON) == []


def test_a_saved_queue_continues_in_another_actor(make_queue):
    queue = make_queue(groups=2)
    ready, lost = commit_one(queue), lease_of(queue)
    state = json.loads(json.dumps(ray.get(queue.state.remote())))
    resumed = make_queue(groups=2)
    ray.get(resumed.load_state.remote(state))
    assert lease_of(resumed).prompt == lost.prompt
    ray.get(resumed.drop_actor.remote("a"))
    commit_one(resumed)
    batch = ray.get(resumed.next_batch.remote(LONG))
    assert batch.groups[0].group() == make_group(ready)
    assert batch.groups[1].group().prompt == lost.prompt
    assert [d.id for d in batch.demonstrations] == ["0"]


def test_without_rollouts_batches_are_demonstrations_alone(make_queue):
    queue = make_queue(groups=4, demonstrations=2, preference=0.0)
    assert lease_of(queue, wait_s=0.0) is None
    batch = ray.get(queue.next_batch.remote(0.0))
    assert (batch.groups, [d.id for d in batch.demonstrations]) == ([], ["0", "1"])


def test_a_hard_switch_leases_nothing_before_it_and_reads_no_demonstration_after_it(make_queue):
    before, after = {"kind": "switch", "value": 0, "end": 1, "steps": 2}, {"kind": "switch", "value": 1, "steps": 2}
    queue = make_queue(groups=1, demonstrations=2, preference=before, demonstration=after)
    for step in range(2):
        assert lease_of(queue, wait_s=0.0) is None
        batch = ray.get(queue.next_batch.remote(0.0))
        assert (batch.groups, len(batch.demonstrations)) == ([], 2)
        ray.get(queue.published.remote(step + 1))
    commit_one(queue, version=2)
    batch = ray.get(queue.next_batch.remote(LONG))
    assert ([entry.oldest_version for entry in batch.groups], batch.demonstrations) == ([2], [])


def test_a_poll_for_a_lease_wakes_when_the_phase_with_rollouts_begins(make_queue):
    queue = make_queue(groups=1, preference={"kind": "switch", "value": 0, "end": 1, "steps": 1})
    waiting = queue.lease.remote("a", 1, LONG)
    ray.get(queue.next_batch.remote(0.0))
    assert still_waiting(waiting)
    ray.get(queue.published.remote(1))
    assert lease_from(waiting, SOON).prompt.id == "0"
