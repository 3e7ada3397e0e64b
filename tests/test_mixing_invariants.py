"""What holds whatever happens: the mixing queue under random interleavings of everything."""

import json

import hypothesis.strategies as st
from helpers_mixing import commit, make_queue
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from uniapl.leases import MAX_LOSSES, NEW_WEIGHTS, STRAGGLER, Refused
from uniapl.mixing import Committed

ACTORS = st.sampled_from(["a", "b", "c"])
NEEDS = st.tuples(st.integers(0, 3), st.integers(0, 2)).filter(any)


class MixingQueueMachine(RuleBasedStateMachine):
    """Drives the queue and keeps its own account of leases, batches and versions."""

    @initialize(
        phases=st.lists(NEEDS, min_size=1, max_size=4),
        staleness=st.integers(0, 3),
        regenerations=st.integers(0, 2),
        resamples=st.integers(0, 2),
        reissues=st.integers(0, 2),
    )
    def start(self, phases, staleness, regenerations, resamples, reissues):
        self.needs = lambda step: phases[step % len(phases)]
        self.options = {"needs": self.needs, "staleness": staleness}
        self.options |= {"regenerations": regenerations, "resamples": resamples, "reissues": reissues}
        self.queue = make_queue(**self.options, lease_s=10.0)
        self.now = 0.0
        self.given, self.ended = [], []  # leases
        self.batches = []  # batches[k]: what step k took
        self.published_version = 0
        self.losses = {}  # sequence -> leases that ended with their actor
        self.thrown_away = {}  # sequence -> {attempt: outcome}

    def groups_of(self, steps):
        return sum(self.needs(step)[0] for step in steps)

    @rule(actor=ACTORS)
    def lease(self, actor):
        overdue = sum(lease.deadline < self.now for lease in self.queue._leases.open.values())
        room = self.queue.admissible + overdue
        self.expect_expiry()
        lease = self.queue.lease(actor, self.now)
        assert (lease is None) == (room == 0)
        if lease is not None:
            assert all(lease.id > other.id for other in self.given + self.ended)
            self.given.append(lease)

    def expect_expiry(self):
        """The next call of the queue ends the overdue leases, each as a straggler's."""
        for lease in self.queue._leases.open.values():
            if lease.deadline < self.now:
                self.keep_account_of_straggler(lease)

    def keep_account_of_straggler(self, lease):
        """Whether its prompt is to be leased again."""
        thrown_away = self.thrown_away.setdefault(lease.sequence, {})
        again = list(thrown_away.values()).count("reissued") < self.options["reissues"]
        assert lease.attempt == len(thrown_away)
        thrown_away[lease.attempt] = "reissued"
        return again

    def take(self, index):
        """One of the leases that no commit was tried for, open or not."""
        lease = self.given.pop(index % len(self.given))
        self.ended.append(lease)
        return lease

    @rule(index=st.integers(0, 9), unscored=st.booleans(), equal=st.booleans(), behind=st.integers(0, 2))
    def commit(self, index, unscored, equal, behind):
        if not self.given:
            return
        lease = self.take(index)
        was_open = lease.id in self.queue._leases.open
        version = max(0, self.published_version - behind)
        self.expect_expiry()
        result = commit(self.queue, lease, version, ["bad"] * unscored, self.now, equal=equal)
        assert isinstance(result, Committed if was_open and self.now <= lease.deadline else Refused)
        if isinstance(result, Committed):
            self.keep_account(lease, result.outcome, unscored, equal)

    def keep_account(self, lease, outcome, unscored, equal):
        """Every attempt is thrown away once at most, and for each reason no more often than its bound."""
        thrown_away = self.thrown_away.setdefault(lease.sequence, {})
        before = list(thrown_away.values())
        if unscored:
            again = before.count("regenerated") < self.options["regenerations"]
            assert outcome == ("regenerated" if again else "dropped_unscored")
        elif equal:
            again = before.count("resampled") < self.options["resamples"]
            assert outcome == ("resampled" if again else "ready")
        else:
            assert outcome == "ready"
        assert lease.attempt == len(before) and lease.attempt not in thrown_away
        if outcome != "ready":
            thrown_away[lease.attempt] = outcome

    @rule(indices=st.lists(st.integers(0, 9), min_size=1, max_size=8), actor=ACTORS)
    def actor_works_off_what_admission_allows(self, indices, actor):
        for _ in indices:
            self.lease(actor)
        for index in indices:
            self.commit(index, unscored=False, equal=False, behind=0)

    @rule()
    def even_if_all_rewards_are_equal_a_published_run_gets_its_next_batch(self):
        self.published_version = len(self.batches)
        self.queue.published(self.published_version)
        for actor in ("a", "b", "c"):
            self.drop_actor(actor)
        self.given.clear()
        most = (self.groups_of([len(self.batches)]) + self.queue.admissible) * (self.options["resamples"] + 1)
        made = len(self.batches)
        self.next_batch()
        for _ in range(most):
            if len(self.batches) > made:
                break
            self.lease("a")
            if self.given:
                self.commit(0, unscored=False, equal=True, behind=0)
            self.next_batch()
        assert len(self.batches) == made + 1

    @rule(index=st.integers(0, 9))
    def commit_again(self, index):
        if not self.ended:
            return
        before = self.queue.counters()
        self.expect_expiry()
        assert isinstance(commit(self.queue, self.ended[index % len(self.ended)], now=self.now), Refused)
        changed = {k for k, v in self.queue.counters().items() if v != before[k]}
        assert changed <= {"refused", "expired", "open", "waiting", "stragglers_reissued", "dropped_straggler"}

    @rule(index=st.integers(0, 9), reason=st.sampled_from(["", NEW_WEIGHTS, STRAGGLER]))
    def release(self, index, reason):
        if not self.given:
            return
        lease = self.take(index)
        was_open = lease.id in self.queue._leases.open
        assert self.queue.release(lease.id, reason) == was_open
        if was_open and reason == STRAGGLER:
            assert (lease.sequence in self.queue._waiting) == self.keep_account_of_straggler(lease)

    @rule(actor=ACTORS)
    def drop_actor(self, actor):
        for lease in self.queue._leases.open.values():
            if lease.actor == actor:
                self.losses[lease.sequence] = self.losses.get(lease.sequence, 0) + 1
        before = self.queue.counters()["dropped_lethal"]
        self.queue.drop_actor(actor)
        assert max(self.losses.values(), default=0) <= MAX_LOSSES + 1
        lethal = [sequence for sequence, count in self.losses.items() if count > MAX_LOSSES]
        assert not set(lethal) & self.queue._waiting.keys()
        assert self.queue.counters()["dropped_lethal"] - before <= len(lethal)
        assert not [lease for lease in self.queue._leases.open.values() if lease.actor == actor]

    @rule(seconds=st.floats(0, 8))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def expire(self):
        self.expect_expiry()
        self.queue.expire(self.now)
        assert all(lease.deadline >= self.now for lease in self.queue._leases.open.values())

    @rule()
    def next_batch(self):
        plan = self.queue.next_batch()
        if plan is None:
            assert self.queue.counters()["ready"] < self.needs(len(self.batches))[0]
            return
        groups, demonstrations = self.needs(plan.step)
        assert plan.step == len(self.batches)
        sequences = [group.task.sequence for group in plan.groups]
        assert sequences == sorted(sequences) and len(sequences) == groups
        assert all(plan.step - group.oldest_version <= self.options["staleness"] for group in plan.groups)
        first = sum(self.needs(step)[1] for step in range(plan.step))
        assert [int(d.id) for d in plan.demonstrations] == list(range(first, first + demonstrations))
        self.batches.append(sequences)

    @rule()
    def publish(self):
        if len(self.batches) > self.published_version:
            self.published_version += 1
            self.queue.published(self.published_version)

    @rule(trained=st.integers(0, 3))
    def kill_and_resume(self, trained):
        version = min(self.published_version + trained, len(self.batches))
        state = json.loads(json.dumps(self.queue.state_dict(version=version)))
        self.queue = make_queue(**self.options, lease_s=10.0)
        self.queue.load_state_dict(state)
        del self.batches[version:]
        self.published_version = version

    @invariant()
    def the_ledgers_balance(self):
        c = self.queue.counters()
        assert c["leased"] == c["committed"] + c["expired"] + c["released"] + c["open"]
        thrown_away = c["dropped_stale"] + c["dropped_unscored"] + c["regenerated"] + c["resampled"]
        assert c["committed"] == c["consumed"] + c["ready"] + thrown_away
        stragglers = c["stragglers_reissued"] + c["dropped_straggler"]
        assert c["expired"] <= stragglers
        assert c["released"] + c["expired"] >= c["aborted"] + stragglers + c["dropped_lethal"]
        assert min(v for v in c.values() if isinstance(v, int)) >= 0

    @invariant()
    def admission_bounds_what_is_under_way(self):
        c = self.queue.counters()
        unpublished = sum(len(batch) for batch in self.batches[self.published_version :])
        published = self.published_version
        capacity = self.groups_of(range(published, published + self.options["staleness"] + 1))
        assert c["open"] + c["ready"] + unpublished <= capacity
        assert self.queue.admissible == capacity - c["open"] - c["ready"] - unpublished

    @invariant()
    def every_prompt_drawn_is_in_exactly_one_place(self):
        q = self.queue
        trained = [sequence for batch in self.batches for sequence in batch]
        ready = [group.task.sequence for group in q._ready]
        places = [*q._waiting, *ready, *(lease.sequence for lease in q._leases.open.values()), *trained]
        assert len(places) == len(set(places))
        dropped = sum(q.counters()[f"dropped_{why}"] for why in ("unscored", "straggler", "lethal"))
        assert len(places) + dropped == q.counters()["drawn"]
        assert q.counters()["consumed"] == len(trained)

    @invariant()
    def consumed_handles_are_kept_only_until_published(self):
        kept = [taken.plan.step for taken in self.queue._taken]
        assert kept == list(range(self.published_version, len(self.batches)))


MixingQueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestMixingQueue = MixingQueueMachine.TestCase
