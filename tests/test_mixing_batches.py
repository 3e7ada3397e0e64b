"""The mixing queue, rule by rule: what batches hold, versions, save and restore."""

import json

import pytest
from helpers_mixing import commit, lease_all, make_queue, names, train_one_step
from hypothesis import given
from hypothesis import strategies as st

from uniapl.leases import Refused
from uniapl.mixing import Committed

# What a batch holds

schedules = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["commit", "release"])), max_size=40)
attempts = st.tuples(st.integers(0, 8), st.integers(0, 2))
unscored_sets = equal_sets = st.sets(attempts, max_size=6)


def batch_of(schedule, unscored, equal):
    """One synchronous step in which leases end in the order that `schedule` names: the attempts it holds."""
    queue, leases, plan, moves = make_queue(groups=4, regenerations=1, resamples=1), [], None, iter(schedule)
    while plan is None:
        leases += lease_all(queue)
        at, move = next(moves, (0, "commit"))
        lease = leases.pop(at % len(leases))
        if move == "release":
            queue.release(lease.id)
        else:
            attempt = (lease.sequence, lease.attempt)
            commit(queue, lease, unscored=["bad"] * (attempt in unscored), equal=attempt in equal)
        plan = queue.next_batch()
    return names(plan), [group.task.attempt for group in plan.groups]


@given(schedules, unscored_sets, equal_sets)
def test_a_synchronous_batch_does_not_depend_on_the_order_of_commits(schedule, unscored, equal):
    assert batch_of(schedule, unscored, equal) == batch_of([], unscored, equal)


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


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_phase_without_groups_leases_only_what_staleness_admits_ahead(staleness):
    """Demonstrations for 4 steps, then groups: the hard switch."""
    queue = make_queue(staleness=staleness, needs=lambda step: (0, 2) if step < 4 else (3, 0))
    made = []
    for step in range(6):
        allowed = 3 * max(0, min(staleness, step + staleness - 3) + (step >= 4))
        counters = queue.counters()
        assert queue.admissible == allowed - counters["open"] - counters["ready"]
        for lease in lease_all(queue):
            commit(queue, lease, version=step)
        made.append(names(queue.next_batch()))
        queue.published(step + 1)
    assert made[:4] == [([], [str(2 * step), str(2 * step + 1)]) for step in range(4)]
    assert made[4:] == [(["0", "1", "2"], []), (["3", "4", "5"], [])]
    assert queue.counters()["dropped_stale"] == 0


def test_after_a_switch_to_demonstrations_nothing_more_is_leased():
    queue = make_queue(staleness=1, needs=lambda step: (2, 0) if step < 2 else (0, 1))
    for step in range(4):
        for lease in lease_all(queue):
            commit(queue, lease, version=step)
        queue.next_batch()
        queue.published(step + 1)
    counters = queue.counters()
    assert (counters["drawn"], counters["consumed"], counters["ready"], counters["open"]) == (4, 4, 0, 0)


@pytest.mark.parametrize(("needs", "read"), [((1, 0), ["prompts"]), ((0, 1), ["demonstrations"])])
def test_a_source_that_no_batch_needs_is_never_read(needs, read):
    queue = make_queue(staleness=1, needs=lambda step: needs)
    for _ in range(3):
        train_one_step(queue)
    state = queue.state_dict()
    assert [name for name in ("prompts", "demonstrations") if state[name]["position"]] == read


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ((0, 0), "batch 0 would be empty: it needs no groups and no demonstrations"),
        ((2, 0), "prompts: no source, but batch 0 needs 2 groups"),
        ((0, 3), "demonstrations: no source, but batch 0 needs 3"),
    ],
)
def test_a_queue_without_what_its_first_batch_needs_is_refused(needs, message):
    with pytest.raises(ValueError) as raised:
        make_queue(groups=0, demonstrations=0, needs=lambda step: needs)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ((0, 0), "batch 1 would be empty: it needs no groups and no demonstrations"),
        ((2, 0), "prompts: no source, but batch 1 needs 2 groups"),
    ],
)
def test_a_later_batch_without_what_it_needs_is_refused_when_its_turn_comes(later, message):
    queue = make_queue(groups=0, needs=lambda step: later if step else (0, 1))
    train_one_step(queue)
    with pytest.raises(ValueError) as raised:
        queue.next_batch()
    assert str(raised.value) == message


def test_leasing_for_a_batch_ahead_without_a_source_is_refused():
    queue = make_queue(groups=0, staleness=1, needs=lambda step: (step, 1))
    with pytest.raises(ValueError, match=r"^prompts: no source, but a batch ahead needs groups$"):
        queue.lease("a", 0.0)


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


def switching(step):
    """Demonstrations, then both, then groups."""
    return (0, 2) if step < 2 else (4, 1) if step < 4 else (3, 0)


@pytest.mark.parametrize("needs", [None, switching])
@given(steps_before=st.integers(0, 5), commits_before=st.integers(0, 4))
def test_a_resumed_synchronous_run_makes_the_batches_of_an_undisturbed_one(needs, steps_before, commits_before):
    undisturbed = make_queue(needs=needs)
    expected = [train_one_step(undisturbed) for _ in range(steps_before + 3)]
    killed = make_queue(needs=needs)
    found = [train_one_step(killed) for _ in range(steps_before)]
    for lease in lease_all(killed)[:commits_before]:
        commit(killed, lease, version=steps_before)
    resumed = restored(killed.state_dict(), needs=needs)
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


def test_both_kinds_of_attempts_and_their_counters_are_saved():
    queue = make_queue(groups=1, regenerations=1, resamples=1)
    commit(queue, queue.lease("a", 0.0), equal=True)
    commit(queue, queue.lease("a", 0.0), unscored=["timeout"])
    resumed = restored(queue.state_dict(), groups=1, regenerations=1, resamples=1)
    assert resumed.counters() == queue.counters()
    again = resumed.lease("a", 0.0)
    assert again.attempt == 2
    assert commit(resumed, again, equal=True) == Committed("ready")


def test_group_handles_are_packed_on_saving_and_unpacked_on_loading():
    queue = make_queue(groups=1)
    commit(queue, queue.lease("a", 0.0))
    state = queue.state_dict(pack=lambda handle: {"kept": handle})
    resumed = make_queue(groups=1)
    resumed.load_state_dict(state, unpack=lambda packed: packed["kept"] + 100)
    assert resumed.next_batch().groups[0].handle == 100
