"""The mixing queue, rule by rule."""

import json

import pytest
from helpers_mixing import Counting, commit, demonstration, lease_all, make_queue, names, prompt
from hypothesis import given
from hypothesis import strategies as st

from uniapl.mixing import Committed, MixingQueue, Refused


def train_one_step(queue, now=0.0):
    """Lease, commit and publish one synchronous step; what its batch held."""
    version = queue.counters()["published"]
    for lease in lease_all(queue, now=now):
        commit(queue, lease, version, now=now)
    plan = queue.next_batch()
    queue.published(plan.step + 1)
    return names(plan)


# Admission


def test_synchronous_admission_allows_one_batch_and_nothing_until_it_is_published():
    queue = make_queue(groups=4, staleness=0)
    leases = lease_all(queue)
    assert [lease.prompt.id for lease in leases] == ["0", "1", "2", "3"]
    for lease in leases:
        commit(queue, lease)
    assert queue.lease("a", 0.0) is None
    assert queue.next_batch() is not None
    assert queue.lease("a", 0.0) is None
    queue.published(1)
    assert len(lease_all(queue)) == 4


def test_asynchronous_admission_runs_ahead_by_max_staleness_batches():
    queue = make_queue(groups=2, staleness=1)
    first, second, *ahead = lease_all(queue)
    assert len(ahead) == 2
    commit(queue, first), commit(queue, second)
    assert queue.next_batch().step == 0
    assert queue.lease("a", 0.0) is None  # the step of batch 0 is not published: still ahead by as much
    queue.published(1)
    assert len(lease_all(queue)) == 2


def test_groups_made_in_order_are_never_staler_than_allowed():
    queue = make_queue(groups=2, staleness=1)
    for step in range(5):
        for lease in lease_all(queue):
            commit(queue, lease, version=step)
        plan = queue.next_batch()
        assert all(plan.step - group.oldest_version <= 1 for group in plan.groups)
        queue.published(step + 1)
    assert queue.counters()["dropped_stale"] == 0


# Exactly once


def test_a_second_commit_of_a_lease_is_refused():
    queue = make_queue()
    lease = queue.lease("a", 0.0)
    assert commit(queue, lease) == Committed("ready")
    assert commit(queue, lease) == Refused("committed")
    assert queue.counters()["ready"] == 1
    assert queue.counters()["refused"] == {"committed": 1}


def test_a_commit_counts_up_to_the_deadline_and_not_after_it():
    queue = make_queue(lease_s=10.0)
    on_time, late = queue.lease("a", 0.0), queue.lease("a", 0.0)
    assert (on_time.deadline, late.deadline) == (10.0, 10.0)
    assert commit(queue, on_time, now=10.0) == Committed("ready")
    assert commit(queue, late, now=10.1) == Refused("expired")


def test_an_expired_prompt_is_leased_again_in_its_old_place_and_attempt():
    queue = make_queue(lease_s=10.0)
    first = queue.lease("a", 0.0)
    queue.lease("a", 5.0)
    assert queue.expire(11.0) == 1
    again = queue.lease("b", 11.0)
    assert again.task == first.task
    assert again.id == 2
    assert commit(queue, first, now=11.0) == Refused("expired")
    assert commit(queue, again, now=11.0) == Committed("ready")


def test_a_released_lease_is_given_again_and_cannot_be_committed():
    queue = make_queue()
    lease = queue.lease("a", 0.0)
    assert queue.release(lease.id) is True
    assert queue.release(lease.id) is False
    assert commit(queue, lease) == Refused("released")
    assert queue.lease("b", 0.0).task == lease.task


def test_the_leases_of_a_lost_actor_and_only_those_are_given_again():
    queue = make_queue(groups=4)
    lost = [queue.lease("lost", 0.0), queue.lease("lost", 0.0)]
    kept = queue.lease("kept", 0.0)
    assert queue.drop_actor("lost") == 2
    assert queue.drop_actor("lost") == 0
    assert [queue.lease("kept", 0.0).task for _ in lost] == [lease.task for lease in lost]
    assert commit(queue, kept) == Committed("ready")


def test_leases_that_were_never_given_or_belong_to_others_are_refused():
    queue = make_queue()
    lease = queue.lease("a", 0.0)
    assert commit(queue, lease, actor="b") == Refused("not_the_holder")
    assert commit(queue, lease, prompt_id="other") == Refused("not_the_holder")
    assert commit(make_queue(), lease) == Refused("unknown")
    assert commit(queue, lease) == Committed("ready")


def test_how_old_leases_ended_is_remembered_within_a_bound():
    queue = make_queue(groups=1)
    first = queue.lease("a", 0.0)
    for _ in range(5000):
        queue.drop_actor("a")
        queue.lease("a", 0.0)
    assert commit(queue, first) == Refused("closed")


def test_a_group_from_weights_that_this_run_never_made_is_refused_and_its_prompt_leased_again():
    queue = make_queue()
    lease = queue.lease("a", 0.0)
    assert commit(queue, lease, version=3) == Refused("future_version")
    assert queue.lease("a", 0.0).task == lease.task


# Unscored and stale groups


def test_a_group_with_unscored_samples_is_made_again_then_dropped_for_another_prompt():
    queue = make_queue(groups=1, regenerations=2)
    outcomes = []
    for attempt in range(3):
        lease = queue.lease("a", 0.0)
        assert (lease.prompt.id, lease.attempt) == ("0", attempt)
        outcomes.append(commit(queue, lease, unscored=["timeout"]).outcome)
    assert outcomes == ["regenerated", "regenerated", "dropped_unscored"]
    assert queue.lease("a", 0.0).prompt.id == "1"
    counters = queue.counters()
    assert (counters["regenerated"], counters["dropped_unscored"], counters["unscored"]) == (2, 1, {"timeout": 3})


def test_without_regenerations_an_unscored_group_is_dropped_at_once():
    queue = make_queue(groups=1, regenerations=0)
    assert commit(queue, queue.lease("a", 0.0), unscored=["NaN"]) == Committed("dropped_unscored")


def test_over_stale_groups_are_dropped_and_their_prompts_leased_again_in_their_old_place():
    queue = make_queue(groups=1, staleness=1)
    slow, quick = lease_all(queue)
    commit(queue, quick)
    assert names(queue.next_batch())[0] == ["1"]
    queue.published(1)
    commit(queue, queue.lease("a", 0.0), version=1)
    assert names(queue.next_batch())[0] == ["2"]
    queue.published(2)
    commit(queue, slow, version=0)
    assert queue.next_batch() is None  # version 0 is two behind
    assert queue.counters()["dropped_stale"] == 1
    assert queue.lease("a", 0.0).task == slow.task


def test_staleness_is_measured_at_the_step_that_trains_on_the_group():
    """A learner that takes batches before it has published counts those steps too."""
    queue = make_queue(groups=1, staleness=2)
    slow, *quick = lease_all(queue)
    for lease in quick:
        commit(queue, lease)
        queue.next_batch()
    commit(queue, slow)
    assert queue.next_batch().step == 2
    assert queue.counters()["published"] == 0
    queue.published(3)
    late = queue.lease("a", 0.0)
    commit(queue, late, version=0)
    assert queue.next_batch() is None


# What a batch holds

schedules = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["commit", "release"])), max_size=40)
unscored_sets = st.sets(st.tuples(st.integers(0, 8), st.integers(0, 1)), max_size=6)


def batch_of(schedule, unscored):
    """One synchronous step in which leases end in the order that `schedule` names."""
    queue, leases, plan, moves = make_queue(groups=4, regenerations=1), [], None, iter(schedule)
    while plan is None:
        leases += lease_all(queue)
        at, move = next(moves, (0, "commit"))
        lease = leases.pop(at % len(leases))
        if move == "release":
            queue.release(lease.id)
        else:
            bad = (lease.sequence, lease.attempt) in unscored
            commit(queue, lease, unscored=["bad"] if bad else [])
        plan = queue.next_batch()
    return names(plan)


@given(schedules, unscored_sets)
def test_a_synchronous_batch_does_not_depend_on_the_order_of_commits(schedule, unscored):
    assert batch_of(schedule, unscored) == batch_of([], unscored)


def test_ready_groups_enter_batches_in_the_order_their_prompts_were_drawn():
    queue = make_queue(groups=2, staleness=1)
    a, b, c, d = lease_all(queue)
    for lease in (d, b, c, a):
        commit(queue, lease)
    assert names(queue.next_batch()) == (["0", "1"], ["0", "1"])
    assert names(queue.next_batch()) == (["2", "3"], ["2", "3"])


def test_no_demonstration_is_used_up_by_a_batch_that_cannot_be_made():
    queue = make_queue(groups=1, demonstrations=2)
    assert queue.next_batch() is None
    commit(queue, queue.lease("a", 0.0))
    assert names(queue.next_batch()) == (["0"], ["0", "1"])


def test_without_groups_batches_are_demonstrations_alone_and_nothing_is_leased():
    queue = make_queue(groups=0, demonstrations=3)
    assert queue.lease("a", 0.0) is None
    assert names(queue.next_batch()) == ([], ["0", "1", "2"])
    assert names(queue.next_batch()) == ([], ["3", "4", "5"])
    queue.published(2)
    assert queue.next_batch().step == 2


def test_without_demonstrations_their_source_is_never_read():
    unread = Counting(demonstration)
    queue = MixingQueue(
        Counting(prompt),
        unread,
        groups_per_step=1,
        demonstrations_per_step=0,
        max_staleness=0,
        lease_s=1.0,
        max_regenerations=0,
    )
    assert train_one_step(queue) == (["0"], [])
    assert unread.position == 0
    assert names(make_queue(groups=0).next_batch())[0] == []


@pytest.mark.parametrize(
    ("groups", "demonstrations", "message"),
    [
        (0, 0, "groups_per_step and demonstrations_per_step are both 0: every batch would be empty"),
        (2, 0, "prompts: no source, but 2 are wanted per step"),
        (0, 3, "demonstrations: no source, but 3 are wanted per step"),
    ],
)
def test_a_queue_without_what_it_needs_is_refused(groups, demonstrations, message):
    with pytest.raises(ValueError) as raised:
        MixingQueue(
            None,
            None,
            groups_per_step=groups,
            demonstrations_per_step=demonstrations,
            max_staleness=0,
            lease_s=1.0,
            max_regenerations=0,
        )
    assert str(raised.value) == message


# Versions


def test_published_versions_follow_the_batches_and_may_repeat():
    queue = make_queue(groups=0, demonstrations=1)
    queue.next_batch()
    queue.published(1)
    queue.published(1)
    with pytest.raises(ValueError, match=r"^version 2 published; allowed: 1 to 1$"):
        queue.published(2)
    with pytest.raises(ValueError, match=r"^version 0 published; allowed: 1 to 1$"):
        queue.published(0)


# Save and restore


def restored(state, **options):
    queue = make_queue(**options)
    queue.load_state_dict(json.loads(json.dumps(state)))
    return queue


@given(st.integers(0, 4), st.integers(0, 4))
def test_a_resumed_synchronous_run_makes_the_batches_of_an_undisturbed_one(steps_before, commits_before):
    undisturbed = make_queue()
    expected = [train_one_step(undisturbed) for _ in range(steps_before + 3)]
    killed = make_queue()
    found = [train_one_step(killed) for _ in range(steps_before)]
    for lease in lease_all(killed)[:commits_before]:
        commit(killed, lease, version=steps_before)
    resumed = restored(killed.state_dict())
    found += [train_one_step(resumed) for _ in range(3)]
    assert found == expected


def test_a_batch_that_the_saved_weights_do_not_contain_is_made_again():
    queue = make_queue(groups=1, demonstrations=1, staleness=1)
    for lease in lease_all(queue):
        commit(queue, lease)
    first, second = queue.next_batch(), queue.next_batch()
    resumed = restored(queue.state_dict(version=1), groups=1, demonstrations=1, staleness=1)
    again = resumed.next_batch()
    assert (again.step, names(again)) == (1, names(second))
    resumed = restored(queue.state_dict(), groups=1, demonstrations=1, staleness=1)
    assert [names(resumed.next_batch()), names(resumed.next_batch())] == [names(first), names(second)]


def test_only_versions_between_published_and_taken_can_be_saved():
    queue = make_queue()
    with pytest.raises(ValueError, match=r"^version 1 saved; allowed: 0 to 0$"):
        queue.state_dict(version=1)


def test_open_leases_are_saved_as_prompts_to_lease_again_and_their_ids_stay_closed():
    queue = make_queue()
    lease = queue.lease("a", 0.0)
    resumed = restored(queue.state_dict())
    assert commit(resumed, lease) == Refused("closed")
    again = resumed.lease("a", 0.0)
    assert (again.id, again.task) == (1, lease.task)
    assert resumed.counters()["released"] == 1


def test_group_handles_are_packed_on_saving_and_unpacked_on_loading():
    queue = make_queue(groups=1)
    commit(queue, queue.lease("a", 0.0))
    state = queue.state_dict(pack=lambda handle: {"kept": handle})
    resumed = make_queue(groups=1)
    resumed.load_state_dict(state, unpack=lambda packed: packed["kept"] + 100)
    assert resumed.next_batch().groups[0].handle == 100
