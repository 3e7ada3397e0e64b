"""The mixing queue, rule by rule: admission, exactly once, groups that are thrown away."""

import dataclasses

from helpers_mixing import commit, lease_all, make_queue, names

from uniapl.leases import MAX_LOSSES, NEW_WEIGHTS, STRAGGLER, Refused
from uniapl.mixing import Committed

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


def test_admission_counts_what_each_batch_ahead_needs():
    queue = make_queue(staleness=2, needs=lambda step: ([1, 0, 3, 2][step], 1))
    assert len(lease_all(queue)) == 4  # batches 0 to 2
    for lease in queue._leases.open.copy().values():
        commit(queue, lease)
    assert [len(queue.next_batch().groups) for _ in range(2)] == [1, 0]
    queue.published(1)
    assert len(lease_all(queue)) == 2  # batch 3


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


def test_an_expired_prompt_is_leased_again_in_its_old_place_as_a_straggler():
    queue = make_queue(lease_s=10.0, reissues=1)
    first = queue.lease("a", 0.0)
    queue.lease("a", 5.0)
    assert queue.expire(11.0) == 1
    again = queue.lease("b", 11.0)
    assert (again.task.prompt, again.sequence, again.attempt) == (first.prompt, first.sequence, 1)
    assert again.id == 2
    assert commit(queue, first, now=11.0) == Refused("expired")
    assert commit(queue, again, now=11.0) == Committed("ready")


def test_a_prompt_whose_leases_all_expire_is_dropped_for_another():
    queue = make_queue(groups=1, lease_s=10.0, reissues=2)
    leases = [queue.lease("a", 11.0 * life) for life in range(4)]
    assert [(lease.prompt.id, lease.attempt) for lease in leases] == [("0", 0), ("0", 1), ("0", 2), ("1", 0)]
    counters = queue.counters()
    assert (counters["stragglers_reissued"], counters["dropped_straggler"], counters["expired"]) == (2, 1, 3)


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
    assert [queue.lease("kept", 0.0).task for _ in lost] == [
        dataclasses.replace(lease.task, losses=1) for lease in lost
    ]
    assert commit(queue, kept) == Committed("ready")


def test_a_prompt_that_is_lost_with_its_actor_again_and_again_is_dropped_for_another():
    queue = make_queue(groups=1)
    for life in range(MAX_LOSSES + 1):
        assert queue.lease("a", 0.0).prompt.id == "0"
        assert queue.counters()["dropped_lethal"] == 0, life
        queue.drop_actor("a")
    assert queue.counters()["dropped_lethal"] == 1
    assert queue.lease("a", 0.0).prompt.id == "1"


def test_an_actor_without_leases_loses_none_and_a_resumed_queue_knows_the_losses():
    queue = make_queue(groups=1)
    for _ in range(MAX_LOSSES):
        queue.lease("a", 0.0)
        queue.drop_actor("b")
        queue.drop_actor("a")
    resumed = make_queue(groups=1)
    resumed.load_state_dict(queue.state_dict())
    assert resumed.lease("a", 0.0).prompt.id == "0"
    resumed.drop_actor("a")
    assert resumed.lease("a", 0.0).prompt.id == "1"


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


# Unscored, equally rewarded and stale groups


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


def test_equal_rewards_are_kept_where_no_resampling_is_wanted():
    queue = make_queue(groups=1, resamples=0)
    assert commit(queue, queue.lease("a", 0.0), equal=True) == Committed("ready")
    assert (queue.counters()["resampled"], queue.counters()["kept_equal"]) == (0, 1)


def test_a_prompt_of_equal_rewards_is_sampled_again_up_to_the_bound_then_kept():
    queue = make_queue(groups=1, resamples=2)
    outcomes = []
    for attempt in range(3):
        lease = queue.lease("a", 0.0)
        assert (lease.prompt.id, lease.attempt) == ("0", attempt)
        outcomes.append(commit(queue, lease, equal=True).outcome)
    assert outcomes == ["resampled", "resampled", "ready"]
    assert names(queue.next_batch())[0] == ["0"]
    assert (queue.counters()["resampled"], queue.counters()["kept_equal"]) == (2, 1)


def test_a_group_of_different_rewards_ends_the_resampling():
    queue = make_queue(groups=1, resamples=2)
    assert commit(queue, queue.lease("a", 0.0), equal=True) == Committed("resampled")
    assert commit(queue, queue.lease("a", 0.0)) == Committed("ready")
    assert (queue.counters()["resampled"], queue.counters()["kept_equal"]) == (1, 0)


def test_unscored_and_equally_rewarded_groups_have_bounds_of_their_own_and_never_the_same_attempt():
    queue = make_queue(groups=1, regenerations=2, resamples=2)
    attempts, outcomes = [], []
    for unscored in (True, False, False, True, False):
        lease = queue.lease("a", 0.0)
        attempts.append(lease.attempt)
        outcomes.append(commit(queue, lease, unscored=["timeout"] * unscored, equal=True).outcome)
    assert outcomes == ["regenerated", "resampled", "resampled", "regenerated", "ready"]
    assert attempts == [0, 1, 2, 3, 4]


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


def test_over_stale_groups_may_be_used_and_are_counted():
    queue = make_queue(groups=1, staleness=1, drop_stale=False)
    slow, quick = lease_all(queue)
    commit(queue, quick)
    queue.next_batch()
    queue.published(1)
    commit(queue, queue.lease("a", 0.0), version=1)
    queue.next_batch()
    queue.published(2)
    assert queue.counters()["stale_used"] == 0
    commit(queue, slow, version=0)
    assert names(queue.next_batch())[0] == ["0"]
    assert (queue.counters()["stale_used"], queue.counters()["dropped_stale"]) == (1, 0)


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


# Stragglers, and groups that new weights ended


def test_a_straggler_is_sampled_again_with_another_attempt_up_to_the_bound_then_dropped_for_another_prompt():
    queue = make_queue(groups=1, reissues=2)
    for attempt in range(3):
        lease = queue.lease("a", 0.0)
        assert (lease.prompt.id, lease.attempt) == ("0", attempt)
        assert queue.release(lease.id, STRAGGLER)
        assert commit(queue, lease) == Refused("released")
    assert queue.lease("a", 0.0).prompt.id == "1"
    counters = queue.counters()
    assert (counters["stragglers_reissued"], counters["dropped_straggler"], counters["released"]) == (2, 1, 3)


def test_a_group_accepted_without_its_stragglers_is_counted():
    queue = make_queue(groups=2)
    commit(queue, queue.lease("a", 0.0), partial=True)
    commit(queue, queue.lease("a", 0.0))
    assert names(queue.next_batch())[0] == ["0", "1"]
    assert queue.counters()["stragglers_accepted"] == 1


def test_a_group_ended_for_new_weights_is_the_same_attempt_again_and_knows_how_often_it_was_ended():
    queue = make_queue(groups=1)
    for aborts in range(3):
        lease = queue.lease("a", 0.0)
        assert (lease.prompt.id, lease.attempt, lease.task.aborts) == ("0", 0, aborts)
        queue.release(lease.id, NEW_WEIGHTS)
    assert queue.counters()["aborted"] == 3


def test_a_lease_given_back_for_any_other_reason_is_no_attempt():
    queue = make_queue(groups=1)
    lease = queue.lease("a", 0.0)
    queue.release(lease.id, "engine restarted")
    assert queue.lease("a", 0.0).task == lease.task
