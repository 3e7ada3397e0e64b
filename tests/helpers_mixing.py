"""Counting sources and small records for the tests of the mixing queue."""

from uniapl.mixing import MixingQueue
from uniapl.records import Demonstration, Prompt


class Counting:
    """An endless source whose nth record is named n, with a cursor as the shard sources have."""

    def __init__(self, make):
        self.make, self.position = make, 0

    def next(self):
        self.position += 1
        return self.make(str(self.position - 1))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def prompt(name):
    return Prompt(name, [{"role": "user", "content": name}], [1, 2, 3])


def demonstration(name):
    return Demonstration(name, [1, 2], [3])


def make_queue(
    groups=4,
    demonstrations=2,
    staleness=0,
    lease_s=10.0,
    regenerations=1,
    resamples=0,
    reissues=0,
    needs=None,
    drop_stale=True,
):
    """A queue whose batches all hold the same, or what `needs` says of each."""
    return MixingQueue(
        Counting(prompt) if groups else None,
        Counting(demonstration) if demonstrations else None,
        needs=needs or (lambda step: (groups, demonstrations)),
        max_staleness=staleness,
        lease_s=lease_s,
        max_regenerations=regenerations,
        max_resamples=resamples,
        max_reissues=reissues,
        drop_stale=drop_stale,
    )


def commit(queue, lease, version=0, unscored=(), now=0.0, actor=None, prompt_id=None, equal=False, partial=False):
    """Commit a group whose handle is its lease's id."""
    return queue.commit(
        lease.id,
        lease.id,
        oldest_version=version,
        tokens=10,
        unscored=list(unscored),
        equal_rewards=equal,
        actor=actor or lease.actor,
        prompt_id=prompt_id or lease.prompt.id,
        now=now,
        partial=partial,
    )


def lease_all(queue, actor="a", now=0.0):
    """Every lease that admission allows."""
    found = []
    while (lease := queue.lease(actor, now)) is not None:
        found.append(lease)
    return found


def names(plan):
    """The prompts and demonstrations of a batch, in its order."""
    return [group.task.prompt.id for group in plan.groups], [d.id for d in plan.demonstrations]


def train_one_step(queue, now=0.0):
    """Lease, commit and publish one synchronous step; what its batch held."""
    version = queue.counters()["published"]
    for lease in lease_all(queue, now=now):
        commit(queue, lease, version, now=now)
    plan = queue.next_batch()
    queue.published(plan.step + 1)
    return names(plan)
