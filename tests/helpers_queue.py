"""Calls of a queue actor as the tests make them, one lease and one group at a time."""

import ray

from actors.packed import PackedGroup, from_wire, to_wire
from uniapl.records import Group, Sample, Score, VersionSpan

LONG = 60.0  # seconds: a poll that takes this long has hung
SOON = 10.0


def make_group(lease, version=0, unscored=None, rewards=(0.0, 1.0)):
    """Two short samples, as an engine with weights `version` would have made them."""
    scores = [Score(None if unscored else reward, unscored, {"check": True}) for reward in rewards]
    spans = [VersionSpan(0, 2, version)]
    samples = [Sample([n, 7], [-0.5, -0.25], spans, "text", "stop", score) for n, score in enumerate(scores)]
    return Group(lease.id, lease.prompt, samples, lease.actor, generate_s=0.5, score_s=0.125)


def lease_of(queue, actor="a", wait_s=LONG):
    return lease_from(queue.lease.remote(actor, 1, wait_s))


def lease_from(call, timeout=None):
    """The lease that a call for one gave; None where it gave none."""
    return next(iter(ray.get(call, timeout=timeout)), None)


def commit_one(queue, actor="a", version=0):
    lease = lease_of(queue, actor)
    assert taken(queue, make_group(lease, version))
    return lease


def commit_of(queue, group, want=0):
    """A call that commits one group."""
    return queue.commit.remote(to_wire([PackedGroup.of(group)]), want)


def taken(queue, group):
    """Whether the queue took it."""
    [accepted], _ = from_wire(ray.get(commit_of(queue, group), timeout=SOON))
    return accepted


def still_waiting(call, seconds=0.3):
    return ray.wait([call], timeout=seconds)[0] == []
